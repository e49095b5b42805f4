//! Structured outputs of a trained model, and calls in the formats that real chat templates show.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::PathBuf;

use bitfast_llm::{
    ChatMessage, EngineArgs, FinishReason, KvCacheMemory, LLM, Prompt, Request, RequestOutput,
    SamplingParams, Structured,
};
use bitfast_testkit::fixtures;
use bitfast_text::{
    AnswerParser, AnswerPart, ChatTemplate, PromptEnd, RenderOptions, TemplateTokens, Thinking, ToolFormat,
    ToolParser, UnixTime,
};
use serde_json::{Value, json};

fn smollm2(change: impl FnOnce(&mut EngineArgs)) -> LLM {
    let mut args = EngineArgs::new(fixtures::smollm2_gguf().display().to_string());
    args.threads = std::num::NonZeroUsize::new(2);
    args.max_model_len = Some(256);
    change(&mut args);
    LLM::new(args).unwrap()
}

fn person() -> Value {
    json!({
        "type": "object",
        "properties": {
            "name": { "type": "string", "maxLength": 20 },
            "age": { "type": "integer", "minimum": 0, "maximum": 120 },
            "hobbies": { "type": "array", "items": { "enum": ["chess", "music", "running"] }, "minItems": 1, "maxItems": 3 }
        },
        "required": ["name", "age", "hobbies"],
        "additionalProperties": false
    })
}

fn check(structured: &Structured, text: &str) -> bool {
    match structured {
        Structured::Json(_) => serde_json::from_str::<Value>(text).is_ok_and(|value| {
            value["name"].as_str().is_some_and(|name| name.chars().count() <= 20)
                && value["age"].as_u64().is_some_and(|age| age <= 120)
                && value["hobbies"].as_array().is_some_and(|list| (1..=3).contains(&list.len()))
        }),
        Structured::JsonObject => serde_json::from_str::<Value>(text).is_ok_and(|value| value.is_object()),
        // The pattern below.
        Structured::Regex(_) => {
            let parts: Vec<&str> = text.split('-').collect();
            let digits = |part: &&str, len| part.len() == len && part.bytes().all(|b| b.is_ascii_digit());
            parts.len() == 3 && digits(&parts[0], 4) && digits(&parts[1], 2) && digits(&parts[2], 2)
        }
        Structured::Choice(texts) => texts.iter().any(|choice| choice == text),
        Structured::Grammar(_) => text.split(" + ").all(|n| n.parse::<u32>().is_ok_and(|n| n < 100)),
    }
}

fn questions() -> Vec<Request> {
    let ask = |text: &str, structured: Option<Structured>| {
        let params = SamplingParams {
            max_tokens: Some(72),
            logprobs: Some(1),
            structured_outputs: structured,
            ..SamplingParams::greedy()
        };
        Request::new(Prompt::Chat(vec![ChatMessage::new("user", text)]), params)
    };
    vec![
        ask("Describe a person called Ann as JSON.", Some(Structured::Json(person()))),
        ask(
            "When did the second world war end?",
            Some(Structured::Regex("[0-9]{4}-[0-9]{2}-[0-9]{2}".into())),
        ),
        ask("Is the sky blue?", Some(Structured::Choice(vec!["yes".into(), "no".into(), "perhaps".into()]))),
        ask("Name two colours.", None),
        ask(
            "What is 2 + 3 as a sum?",
            Some(Structured::Grammar("start: n (\" + \" n)~1..4\nn: /[0-9]{1,2}/".into())),
        ),
    ]
}

/// Valid, and the same alone and in a crowd whose prompts are cut; without the mask, not valid.
#[test]
#[cfg_attr(not(has_smollm2), ignore = "SmolLM2 is not in the cache: cargo xtask models")]
fn a_trained_model_answers_in_form_whatever_runs_beside_it() {
    let llm = smollm2(|args| {
        args.max_num_seqs = Some(8);
        args.max_num_batched_tokens = Some(32);
        args.kv_cache_memory = KvCacheMemory::Tokens(1024);
        args.enable_prefix_caching = false;
    });
    let requests = questions();
    let alone: Vec<RequestOutput> =
        requests.iter().map(|request| llm.stream(request.clone()).unwrap().finish().unwrap()).collect();
    for (request, output) in requests.iter().zip(&alone) {
        let Some(structured) = &request.params.structured_outputs else { continue };
        let text = &output.outputs[0].text;
        assert!(check(structured, text), "{structured:?}: {text}");
        assert_eq!(output.outputs[0].finish_reason, Some(FinishReason::Stop), "{text}");
    }
    let mut crowd: Vec<Option<RequestOutput>> = vec![None; requests.len()];
    llm.run(requests.clone(), &mut |index, result| {
        crowd[index] = Some(result.unwrap());
        ControlFlow::Continue(())
    });
    for (truth, output) in alone.iter().zip(&crowd) {
        assert_eq!(truth.outputs, output.as_ref().unwrap().outputs);
    }
    let mut free = requests[0].clone();
    let structured = free.params.structured_outputs.take().unwrap();
    let output = llm.stream(free).unwrap().finish().unwrap();
    assert!(
        !check(&structured, &output.outputs[0].text),
        "valid without the mask: {}",
        output.outputs[0].text
    );
}

fn cache() -> PathBuf {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    variable("BITFAST_CACHE")
        .or_else(|| Some(variable("XDG_CACHE_HOME")?.join("bitfast")))
        .or_else(|| Some(variable("HOME")?.join(".cache/bitfast")))
        .expect("a cache folder")
        .join("test-models")
}

fn template(name: &str) -> ChatTemplate {
    let source = match name {
        "qwen3" | "deepseek_v3" => {
            let text = std::fs::read_to_string(cache().join(name).join("tokenizer_config.json")).unwrap();
            serde_json::from_str::<Value>(&text).unwrap()["chat_template"].as_str().unwrap().to_owned()
        }
        _ => std::fs::read_to_string(cache().join(format!("llama.cpp/templates/{name}.jinja"))).unwrap(),
    };
    let tokens =
        TemplateTokens { bos: Some("<s>".into()), eos: Some("</s>".into()), others: BTreeMap::new() };
    ChatTemplate::new(&source, tokens).unwrap_or_else(|e| panic!("{name}: {e}"))
}

/// What a template writes for a past call is what its model was trained to write: the parser reads it back.
#[test]
#[cfg_attr(not(has_test_models), ignore = "its files are not in the cache: cargo xtask models")]
fn calls_as_real_templates_show_them_are_read_back() {
    let cases = [
        ("qwen3", ToolFormat::Hermes, true),
        ("Qwen-Qwen3-0.6B", ToolFormat::Hermes, true),
        ("Qwen-Qwen2.5-7B-Instruct", ToolFormat::Hermes, false),
        ("Qwen-QwQ-32B", ToolFormat::Hermes, true),
        ("NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use", ToolFormat::Hermes, false),
        ("meta-llama-Llama-3.1-8B-Instruct", ToolFormat::Llama3Json, false),
        ("meta-llama-Llama-3.2-3B-Instruct", ToolFormat::Llama3Json, false),
        ("meta-llama-Llama-3.3-70B-Instruct", ToolFormat::Llama3Json, false),
        ("deepseek_v3", ToolFormat::DeepSeekV3, false),
        ("llama-cpp-deepseek-r1", ToolFormat::DeepSeekV3, true),
        ("deepseek-ai-DeepSeek-V3.1", ToolFormat::DeepSeekV31, true),
    ];
    for (name, format, thinks) in cases {
        let template = template(name);
        assert_eq!(ToolFormat::of_template(&template), Some(format), "{name}");
        assert_eq!(Thinking::in_template(&template), thinks, "{name}");
        // As clients send it: arguments are text, content is null.
        let function = json!({ "name": "weather", "arguments": "{\"city\": \"Bern\", \"days\": [1, 2]}" });
        let call = json!({ "id": "call00001", "type": "function", "function": function });
        let past = json!({ "role": "assistant", "content": null, "tool_calls": [call] });
        let messages = [ChatMessage::new("user", "Hi"), serde_json::from_value(past).unwrap()];
        let tool = json!({ "type": "function", "function": { "name": "weather", "description": "w", "parameters": { "type": "object", "properties": {} } } });
        let options = |end| RenderOptions {
            prompt_end: end,
            tools: vec![tool.clone()],
            ..RenderOptions::at(UnixTime(0))
        };
        let render = |messages: &[ChatMessage], end| {
            let text = template.render(&template.fit_calls(messages), &options(end));
            text.unwrap_or_else(|e| panic!("{name}: {e}"))
        };
        let asked = render(&messages[..1], PromptEnd::Closed);
        let whole = render(&messages, PromptEnd::Closed);
        let answer = whole.strip_prefix(&asked).unwrap_or_else(|| panic!("{name}: {whole}\n---\n{asked}"));
        let mut parser = AnswerParser::new(None, Some(ToolParser::new(format, ["weather"])));
        // The header of the answer is part of the prompt.
        let begin = answer.find(['{', '<']).unwrap();
        let answer = match format {
            ToolFormat::Llama3Json => &answer[answer.find('{').unwrap()..],
            _ => &answer[begin..],
        };
        let mut parts = parser.push(answer);
        parts.extend(parser.finish());
        let calls: Vec<_> = parts.iter().filter(|part| matches!(part, AnswerPart::Call { .. })).collect();
        assert_eq!(calls, [&AnswerPart::Call { index: 0, name: "weather".into() }], "{name}: {answer}");
        let arguments: String = parts
            .iter()
            .filter_map(|part| match part {
                AnswerPart::Arguments { text, .. } => Some(text.as_str()),
                _ => None,
            })
            .collect();
        let arguments: Value =
            serde_json::from_str(&arguments).unwrap_or_else(|e| panic!("{name}: {e}: {answer}"));
        assert_eq!(arguments, json!({ "city": "Bern", "days": [1, 2] }), "{name}");
    }
}

/// Where thoughts begin, by the prompts of real templates.
#[test]
#[cfg_attr(not(has_test_models), ignore = "its files are not in the cache: cargo xtask models")]
fn templates_open_thoughts_or_leave_it_to_the_model() {
    let cases = [
        ("qwen3", json!({}), Thinking::Tagged),
        ("qwen3", json!({ "enable_thinking": false }), Thinking::Tagged),
        ("deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", json!({ "enable_thinking": true }), Thinking::Opened),
        ("Qwen-QwQ-32B", json!({ "enable_thinking": true }), Thinking::Opened),
        ("deepseek-ai-DeepSeek-V3.1", json!({ "thinking": true }), Thinking::Opened),
        ("deepseek-ai-DeepSeek-V3.1", json!({ "thinking": false }), Thinking::Tagged),
    ];
    for (name, kwargs, thinking) in cases {
        let kwargs = kwargs.as_object().unwrap().clone();
        let options = RenderOptions { kwargs, ..RenderOptions::at(UnixTime(0)) };
        let prompt = template(name).render(&[ChatMessage::new("user", "Hi")], &options).unwrap();
        assert_eq!(Thinking::after(&prompt), thinking, "{name}: {prompt:?}");
    }
}
