//! Chat templates: what Hugging Face's environment offers, what is refused, and what hostile
//! sources cannot do.

use bitfast_text::{
    ChatMessage, ChatTemplate, InvalidMessage, PromptEnd, RenderOptions, TemplateError, TemplateTokens,
    UnixTime,
};
use proptest::prelude::*;
use serde_json::{Value, json};

/// 2026-01-02 03:04:05.
const NOW: UnixTime = UnixTime(1_767_323_045);

fn template(source: &str) -> ChatTemplate {
    let tokens =
        TemplateTokens { bos: Some("<s>".into()), eos: Some("</s>".into()), ..TemplateTokens::default() };
    ChatTemplate::new(source, tokens).unwrap()
}

fn messages(value: Value) -> Vec<ChatMessage> {
    serde_json::from_value(value).unwrap()
}

fn render(source: &str) -> Result<String, TemplateError> {
    render_with(source, json!([{ "role": "user", "content": "Hi" }]), &RenderOptions::at(NOW))
}

fn render_with(source: &str, value: Value, options: &RenderOptions) -> Result<String, TemplateError> {
    template(source).render(&messages(value), options)
}

#[test]
fn blocks_take_their_line_with_them() {
    let source = "{% for m in messages %}\n  {% if true %}\n{{ m.role }}: {{ m['content'] }}\n  {% endif %}\n{% endfor %}\n";
    assert_eq!(render(source).unwrap(), "user: Hi\n");
}

#[test]
fn variables() {
    let mut options = RenderOptions::at(NOW);
    options.tools = vec![json!({ "name": "f" })];
    options.kwargs.insert("enable_thinking".into(), json!(false));
    options.kwargs.insert("messages".into(), json!("not these"));
    let source = "{{ bos_token }}|{{ eos_token }}|{{ add_generation_prompt }}|{{ enable_thinking }}|{{ tools[0].name }}|\
                  {{ documents is none }}|{{ messages | length }}|{{ unknown is defined }}";
    let one = json!([{ "role": "user", "content": "Hi" }]);
    assert_eq!(render_with(source, one.clone(), &options).unwrap(), "<s>|</s>|True|False|f|True|1|False");
    options.prompt_end = PromptEnd::Closed;
    assert_eq!(render_with("{{ add_generation_prompt }}", one, &options).unwrap(), "False");
}

#[test]
fn python_methods_loop_controls_and_the_time() {
    let source = "{{ ' a,b '.strip().split(',')[-1] }}{{ 'x'.startswith('x') }}{{ {'k': 1}.get('k') }}\
                  {% for i in range(9) %}{% if i == 1 %}{% continue %}{% elif i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}\
                  {{ strftime_now('%d %b %Y %H:%M:%S') }}{% generation %}!{% endgeneration %}";
    assert_eq!(render(source).unwrap(), "bTrue10202 Jan 2026 03:04:05!");
    assert!(matches!(render("{{ strftime_now('%') }}"), Err(TemplateError::Render { .. })));
}

/// The right sides are what Python's `json.dumps(..., ensure_ascii=False)` writes.
#[test]
fn json_as_python_writes_it() {
    let mut options = RenderOptions::at(NOW);
    options.tools = vec![json!({ "b": "<é> & \"'\n\u{1}", "a": [1, 2.0, 1e16, true, null, {}, []] })];
    let check = |source: &str, expected: &str| {
        let one = json!([{ "role": "user", "content": "Hi" }]);
        assert_eq!(render_with(source, one, &options).unwrap(), expected, "{source}");
    };
    check(
        "{{ tools[0] | tojson }}",
        r#"{"b": "<é> & \"'\n\u0001", "a": [1, 2.0, 1e+16, true, null, {}, []]}"#,
    );
    check("{{ tools[0].a[:2] | tojson(indent=2) }}", "[\n  1,\n  2.0\n]");
    check(
        "{{ {'b': 1, 'a': 'é🦙'} | tojson(sort_keys=true, ensure_ascii=true) }}",
        r#"{"a": "\u00e9\ud83e\udd99", "b": 1}"#,
    );
    check("{{ {'b': 1, 'a': 2} | tojson(separators=(',', ':')) }}", r#"{"b":1,"a":2}"#);
    assert!(matches!(render("{{ undefined_name | tojson }}"), Err(TemplateError::Render { .. })));
}

#[test]
fn content_as_parts_or_text_whatever_the_template_reads() {
    let parts = json!([{ "role": "user", "content": [{ "type": "text", "text": "a" }, "b"] }]);
    let text = json!([{ "role": "user", "content": "ab" }]);
    let reads_text = "{% for m in messages %}{{ m.content }}{% endfor %}";
    let reads_parts = "{% for m in messages %}{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endfor %}";
    let reads_both = "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}\
                      {% for p in m.content %}({{ p.text }}){% endfor %}{% endif %}{% endfor %}";
    let check = |source, value: &Value, expected| {
        assert_eq!(render_with(source, value.clone(), &RenderOptions::at(NOW)).unwrap(), expected);
    };
    check(reads_text, &parts, "a\nb");
    check(reads_text, &text, "ab");
    check(reads_parts, &parts, "[a][b]");
    check(reads_parts, &text, "[ab]");
    check(reads_both, &parts, "(a)(b)");
    check(reads_both, &text, "ab");
}

#[test]
fn continuing_the_last_message() {
    let source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}";
    let trimming = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}<end>{% endfor %}";
    let options = RenderOptions { prompt_end: PromptEnd::ContinueLast, ..RenderOptions::at(NOW) };
    let talk = json!([{ "role": "user", "content": "Hi" }, { "role": "assistant", "content": "Sure, " }]);
    assert_eq!(render_with(source, talk.clone(), &options).unwrap(), "<user>Hi<end><assistant>Sure, ");
    assert_eq!(render_with(trimming, talk.clone(), &options).unwrap(), "<user>Hi<end><assistant>Sure,");
    let cannot = |source: &str, value: Value| {
        let error = render_with(source, value, &options).unwrap_err();
        assert!(matches!(error, TemplateError::CannotContinue(_)), "{error:?}");
    };
    cannot("{{ messages[0].content }}", talk);
    cannot(source, json!([{ "role": "assistant", "content": null }]));
}

#[test]
fn messages_that_are_none() {
    let parse = |value: Value| ChatMessage::try_from(value).unwrap_err();
    assert_eq!(parse(json!("Hi")), InvalidMessage::NotAnObject);
    assert_eq!(parse(json!({ "content": "Hi" })), InvalidMessage::NoRole);
    assert_eq!(parse(json!({ "role": 1 })), InvalidMessage::NoRole);
    assert_eq!(parse(json!({ "role": "user", "content": 1 })), InvalidMessage::Content);
    let image = json!({ "role": "user", "content": ["a", { "type": "image_url", "image_url": {} }] });
    assert_eq!(parse(image), InvalidMessage::Part { index: 1, kind: "image_url".into() });
    let message =
        ChatMessage::try_from(json!({ "role": "tool", "content": null, "tool_calls": null, "x": 1 }));
    assert_eq!(Value::from(message.unwrap()), json!({ "role": "tool", "content": null, "x": 1 }));
    let error = template("x").render(&[], &RenderOptions::at(NOW)).unwrap_err();
    assert_eq!(error, TemplateError::NoMessages);
}

#[test]
fn errors_name_their_line() {
    let error = ChatTemplate::new("a\n\n{% endfor %}", TemplateTokens::default()).unwrap_err();
    assert!(matches!(error, TemplateError::Syntax { line: 3, .. }), "{error:?}");
    let error = render("a\n{{ messages[0].content.nothing.more }}").unwrap_err();
    assert!(matches!(error, TemplateError::Render { line: Some(2), .. }), "{error:?}");
    let error = render("a\n\n{{ raise_exception('Roles must alternate!') }}").unwrap_err();
    assert_eq!(error, TemplateError::Raised { message: "Roles must alternate!".into(), line: Some(3) });
    let inside = "{% macro check() %}{{ raise_exception('no') }}{% endmacro %}\n{{ check() }}";
    assert!(matches!(render(inside).unwrap_err(), TemplateError::Raised { message, .. } if message == "no"));
}

/// Each of these would run for hours, fill the memory or overflow the stack.
#[test]
fn hostile_templates_end() {
    let loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
    let output = "{% set x = 'a' * 1000000 %}{% for a in range(99999) %}{{ x }}{% endfor %}";
    let recursion = "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}";
    let recursive_loop = "{% for a in [1] recursive %}{{ loop([a]) }}{% endfor %}";
    assert!(matches!(render(loops), Err(TemplateError::Limit { what: "instructions", .. })));
    assert!(matches!(render(output), Err(TemplateError::Limit { what: "bytes of output", .. })));
    assert!(matches!(render(recursion), Err(TemplateError::Render { .. })));
    assert!(render(recursive_loop).is_err());
    for source in ["{{ 'a' * 10000000000 }}", "{{ range(10000000000) | list }}", "{{ [1] * 10000000000 }}"] {
        assert!(matches!(render(source), Err(TemplateError::Render { .. })), "{source}");
    }
    let nested = "{% set ns = namespace(x=[], y=[]) %}{% for i in range(99999) %}{% set ns.x = [ns.x] %}\
                  {% set ns.y = [ns.y] %}{% endfor %}{{ ns.x == ns.y }}";
    assert!(matches!(render(nested), Ok(_) | Err(TemplateError::Limit { .. })));
    let deeper = "{% set ns = namespace(x=[]) %}{% for j in range(99) %}{% for i in range(99999) %}\
                  {% set ns.x = {'k': ns.x} %}{% endfor %}{% endfor %}";
    assert!(matches!(render(deeper), Err(TemplateError::Limit { .. })));
    let printed = "{% set ns = namespace(x=[]) %}{% for i in range(50000) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}";
    assert_eq!(render(printed).unwrap().len(), 100_002);
    assert!(matches!(render("{{ [1] | tojson(indent=1000000000) }}"), Err(TemplateError::Render { .. })));
    let brackets = format!("{{{{ {}1{} }}}}", "(".repeat(100_000), ")".repeat(100_000));
    assert!(ChatTemplate::new(&brackets, TemplateTokens::default()).is_err());
}

/// Found by the property test below.
#[test]
fn a_tag_that_is_all_border_is_an_error() {
    for source in [" generation {%}}", "{%}", "generation{%}%}", "{%%}generation"] {
        assert!(ChatTemplate::new(source, TemplateTokens::default()).is_err(), "{source}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]
    #[test]
    fn any_source_ends_in_a_text_or_an_error(
        pieces in prop::collection::vec(prop::sample::select(PIECES.to_vec()), 0..24), noise in ".{0,12}"
    ) {
        let source = pieces.concat() + &noise;
        if let Ok(template) = ChatTemplate::new(&source, TemplateTokens::default()) {
            let talk = messages(json!([{ "role": "user", "content": "é" }, { "role": "assistant", "content": ["x"] }]));
            for prompt_end in [PromptEnd::NewAnswer, PromptEnd::ContinueLast] {
                let _ = template.render(&talk, &RenderOptions { prompt_end, ..RenderOptions::at(NOW) });
            }
        }
    }

    #[test]
    fn any_message_is_data(text in ".{0,40}") {
        let source = "{% for m in messages %}{{ m.content }}{% endfor %}";
        let value = json!([{ "role": "user", "content": text }]);
        prop_assert_eq!(render_with(source, value, &RenderOptions::at(NOW)).unwrap(), text);
    }
}

/// Syntax in pieces; most sums are wrong, many are not.
const PIECES: &[&str] = &[
    "{%",
    "{%-",
    "-%}",
    "%}\n",
    "{{",
    "}}",
    "{#",
    "#}",
    " for m in messages ",
    " endfor ",
    " if ",
    " endif ",
    " else ",
    "m.content",
    "m['role']",
    "messages",
    "[-1:]",
    "[::0]",
    " ~ ",
    " + ",
    " * ",
    " // 0",
    " % ",
    "9999999999",
    "-1",
    "''",
    "'a'",
    "none",
    "true",
    "{}",
    "[]",
    "(",
    ")",
    " | ",
    "tojson",
    "trim",
    "list",
    "sort",
    "join(',')",
    "indent(99)",
    "replace('', 'ab')",
    "batch(0)",
    "slice(3)",
    "map('upper')",
    "default(1)",
    " is ",
    "iterable",
    " in ",
    " not ",
    " set x = ",
    " set ns = namespace(a=1) ",
    " set ns.a = ",
    "x",
    "range(5)",
    " macro f(x) ",
    " endmacro ",
    "f(1)",
    "loop.index",
    "loop.cycle(1)",
    " break ",
    " continue ",
    " generation ",
    " endgeneration ",
    "strftime_now('%Y%')",
    "raise_exception('no')",
    "é",
    "\n",
    " ",
    "{{ 'a' * 3 }}",
    "{% for a in 'ab' %}",
    "{% endfor %}",
    "{% if true %}",
    "{% endif %}",
    "{{ messages }}",
    "{{ messages | tojson(indent=2) }}",
    "{{ '%s'.format(1) }}",
    "{{ 'x'.center(9) }}",
];
