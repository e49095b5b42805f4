//! Chat templates of real models, rendered as Hugging Face renders them.

use std::collections::BTreeMap;

use bitfast_text::{
    ChatMessage, ChatTemplate, PromptEnd, RenderOptions, TemplateError, TemplateTokens, UnixTime,
};
use sha2::{Digest, Sha256};

use crate::files::{cached, folder, smollm2, template};

#[derive(serde::Deserialize)]
struct Golden {
    now: i64,
    cases: BTreeMap<String, Case>,
    sha256: BTreeMap<String, BTreeMap<String, Option<String>>>,
}

#[derive(serde::Deserialize)]
struct Case {
    messages: Vec<ChatMessage>,
    #[serde(default)]
    tools: Vec<serde_json::Value>,
    #[serde(default)]
    kwargs: serde_json::Map<String, serde_json::Value>,
    end: Option<String>,
}

impl Case {
    fn options(&self, now: i64) -> RenderOptions {
        let prompt_end = match self.end.as_deref() {
            Some("closed") => PromptEnd::Closed,
            Some("continue") => PromptEnd::ContinueLast,
            _ => PromptEnd::NewAnswer,
        };
        let (tools, kwargs) = (self.tools.clone(), self.kwargs.clone());
        RenderOptions { prompt_end, tools, kwargs, ..RenderOptions::at(UnixTime(now)) }
    }
}

/// Rendered differently, and why that stays.
const DIFFERENT: &[(&str, &str)] = &[
    // Adds to a `|safe` string, upon which Jinja escapes the rest for HTML; no engine of the field
    // wants `&#34;` in a prompt.
    ("meetkai-functionary-medium-v3.1", "tools offered"),
    ("meetkai-functionary-medium-v3.1", "tool call"),
];

/// The source of a template by its name in the golden file.
fn source(name: &str) -> String {
    if !["deepseek_v3", "llama3", "llama3_1", "qwen3"].contains(&name) {
        return template(name);
    }
    let path = cached(&format!("test-models/{name}/tokenizer_config.json"));
    let config: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    config["chat_template"].as_str().unwrap().to_owned()
}

#[test]
#[cfg_attr(not(has_test_models), ignore = "its files are not in the cache: cargo xtask models")]
fn every_template_as_hugging_face() {
    let golden: Golden = serde_json::from_str(include_str!("templates.json")).unwrap();
    let (mut same, mut wrong) = (0, Vec::new());
    for (name, expected) in golden.sha256.iter().filter(|(name, _)| *name != "smollm2") {
        let source = source(name);
        let tokens = TemplateTokens {
            bos: Some("<BOS>".into()),
            eos: Some("<EOS>".into()),
            ..TemplateTokens::default()
        };
        let template = ChatTemplate::new(&source, tokens).unwrap_or_else(|error| panic!("{name}: {error}"));
        for (case, expected) in expected {
            let options = golden.cases[case].options(golden.now);
            let rendered = template.render(&golden.cases[case].messages, &options);
            // Where Python fails on a value's type, ours may be lenient; it only must not panic.
            let Some(expected) = expected else { continue };
            let hash = rendered.as_ref().ok().map(|text| short_sha256(text));
            let known = DIFFERENT.contains(&(name.as_str(), case.as_str()));
            match hash.as_ref() == Some(expected) {
                true if known => wrong.push(format!("{name}, {case}: is listed as different, and is not")),
                true => same += 1,
                false if known => {}
                false => wrong.push(format!("{name}, {case}: {:.300}", format!("{rendered:?}"))),
            }
        }
    }
    assert!(wrong.is_empty(), "{} wrong, {same} same\n{}", wrong.len(), wrong.join("\n"));
    assert!(same > 700, "{same}");
}

fn short_sha256(text: &str) -> String {
    Sha256::digest(text).iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

/// 2026-01-02.
const NOW: UnixTime = UnixTime(1_767_323_045);

fn conversation() -> Vec<ChatMessage> {
    vec![
        ChatMessage::new("system", "You are terse."),
        ChatMessage::new("user", "Hi"),
        ChatMessage::new("assistant", "Hello!"),
        ChatMessage::new("user", "2+2?"),
    ]
}

#[test]
#[cfg_attr(not(has_test_models), ignore = "its files are not in the cache: cargo xtask models")]
fn smollm2_prompt() {
    let tokenizer = smollm2();
    let template = tokenizer.chat_template().unwrap();
    let prompt = template.render(&conversation(), &RenderOptions::at(NOW)).unwrap();
    assert_eq!(
        prompt,
        "<|im_start|>system\nYou are terse.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n\
         <|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    );
    let short = template.render(&[ChatMessage::new("user", "Hi")], &RenderOptions::at(NOW)).unwrap();
    assert!(short.starts_with("<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained"));
    let ids = tokenizer.encode(&prompt, true).unwrap();
    assert_eq!(ids[..6], [1, 9690, 198, 2683, 359, 1733]);
    assert_eq!(ids.iter().filter(|&&id| id == 1).count(), 5);
}

#[test]
#[cfg_attr(not(has_test_models), ignore = "its files are not in the cache: cargo xtask models")]
fn llama3_1_prompt() {
    let (tokenizer, source) = (folder("llama3_1"), template("meta-llama-Llama-3.1-8B-Instruct"));
    let tokens = TemplateTokens { bos: Some("<|begin_of_text|>".into()), ..TemplateTokens::default() };
    let template = ChatTemplate::new(&source, tokens).unwrap();
    let prompt = template.render(&conversation(), &RenderOptions::at(NOW)).unwrap();
    assert_eq!(
        prompt,
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n\
         Today Date: 26 Jul 2024\n\nYou are terse.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>\
         <|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n\
         2+2?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    );
    // The template writes the begin token itself.
    assert_eq!(tokenizer.encode(&prompt, false).unwrap()[..2], [128000, 128006]);
}

#[test]
#[cfg_attr(not(has_test_models), ignore = "its files are not in the cache: cargo xtask models")]
fn qwen3_prompt_with_and_without_thinking() {
    let tokenizer = folder("qwen3");
    let template = tokenizer.chat_template().unwrap();
    let mut options = RenderOptions::at(NOW);
    let head = "<|im_start|>system\nYou are terse.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n\
                <|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(template.render(&conversation(), &options).unwrap(), head);
    options.kwargs.insert("enable_thinking".into(), false.into());
    assert_eq!(template.render(&conversation(), &options).unwrap(), format!("{head}<think>\n\n</think>\n\n"));
}

#[test]
#[cfg_attr(not(has_test_models), ignore = "its files are not in the cache: cargo xtask models")]
fn deepseek_v3_prompt() {
    let tokenizer = folder("deepseek_v3");
    let prompt = tokenizer.chat_template().unwrap().render(&conversation(), &RenderOptions::at(NOW)).unwrap();
    assert_eq!(
        prompt,
        "<｜begin▁of▁sentence｜>You are terse.<｜User｜>Hi<｜Assistant｜>Hello!<｜end▁of▁sentence｜><｜User｜>2+2?<｜Assistant｜>"
    );
}

#[test]
#[cfg_attr(not(has_test_models), ignore = "its files are not in the cache: cargo xtask models")]
fn the_time_is_the_one_given() {
    let source = template("meta-llama-Llama-3.2-3B-Instruct");
    let template = ChatTemplate::new(&source, TemplateTokens::default()).unwrap();
    let prompt = template.render(&conversation(), &RenderOptions::at(NOW)).unwrap();
    assert!(prompt.contains("Today Date: 02 Jan 2026"), "{prompt}");
}

#[test]
#[cfg_attr(not(has_test_models), ignore = "its files are not in the cache: cargo xtask models")]
fn roles_that_a_template_refuses() {
    let source = template("google-gemma-2-2b-it");
    let template = ChatTemplate::new(&source, TemplateTokens::default()).unwrap();
    let error = template.render(&conversation(), &RenderOptions::at(NOW)).unwrap_err();
    let TemplateError::Raised { message, line: Some(_) } = &error else { panic!("{error:?}") };
    assert_eq!(message, "System role not supported");
}
