//! What answers must be and how they are read: structured outputs, tools and reasoning over HTTP. The model writes
//! noise, so what it says is said by constraints.

mod common;

use std::sync::OnceLock;

use bitfast_server::{ServeError, Server, ServerConfig};
use common::{Client, Running, TEMPLATE, merged, templated};
use serde_json::{Value, json};

fn server() -> Client {
    static SERVER: OnceLock<Running> = OnceLock::new();
    SERVER.get_or_init(|| Running::start(templated(&(TEMPLATE.to_owned() + "{# </think> #}")), |_| ())).client
}

fn tools() -> Value {
    let city = json!({
        "type": "object", "properties": { "city": { "enum": ["Paris", "Bern"] } }, "required": ["city"],
        "additionalProperties": false,
    });
    json!([
        { "type": "function", "function": { "name": "weather", "description": "d", "parameters": city } },
        { "type": "function", "function": { "name": "now" } },
    ])
}

fn chat(fields: Value) -> Value {
    let base = json!({ "messages": [{ "role": "user", "content": "q" }], "seed": 3, "max_tokens": 700 });
    merged(&[base, fields])
}

/// An answer that says exactly this.
fn saying(text: &str, fields: Value) -> Value {
    let grammar = format!("start: {}", Value::from(text));
    merged(&[chat(fields), json!({ "structured_outputs": { "grammar": grammar } })])
}

/// The message, the same whole and streamed, and why it ended.
fn message(body: &Value) -> (Value, Value) {
    let s = server();
    let whole = s.post("/v1/chat/completions", body).ok()["choices"][0].clone();
    let reply = s.post("/v1/chat/completions", &merged(&[body.clone(), json!({ "stream": true })]));
    assert_eq!(reply.status, 200, "{}", reply.text());
    let mut streamed = json!({ "content": null, "reasoning_content": null, "tool_calls": [] });
    let mut reason = Value::Null;
    for event in reply.events() {
        let choice = &event["choices"][0];
        let delta = &choice["delta"];
        for field in ["content", "reasoning_content"] {
            if let Some(more) = delta[field].as_str() {
                let text = streamed[field].as_str().unwrap_or_default().to_owned() + more;
                streamed[field] = text.into();
            }
        }
        for call in delta["tool_calls"].as_array().into_iter().flatten() {
            let calls = streamed["tool_calls"].as_array_mut().unwrap();
            if let Some(name) = call["function"]["name"].as_str() {
                assert_eq!(call["index"], calls.len(), "calls come in order");
                assert!(call["id"].as_str().unwrap().starts_with("call_") && call["type"] == "function");
                calls.push(json!({ "name": name, "arguments": "" }));
            } else {
                assert!(call.get("id").is_none(), "an id comes once");
            }
            let arguments = &mut calls[call["index"].as_u64().unwrap() as usize]["arguments"];
            *arguments = (arguments.as_str().unwrap().to_owned()
                + call["function"]["arguments"].as_str().unwrap())
            .into();
        }
        if !choice["finish_reason"].is_null() {
            reason = choice["finish_reason"].clone();
        }
    }
    let said = &whole["message"];
    assert_eq!(
        said["content"].as_str().unwrap_or_default(),
        streamed["content"].as_str().unwrap_or_default()
    );
    assert_eq!(said.get("reasoning_content").unwrap_or(&Value::Null), &streamed["reasoning_content"]);
    let calls: Vec<Value> =
        said["tool_calls"].as_array().into_iter().flatten().map(|c| c["function"].clone()).collect();
    assert_eq!(Value::from(calls), streamed["tool_calls"]);
    assert_eq!(whole["finish_reason"], reason);
    (said.clone(), reason)
}

#[test]
fn response_formats_and_structured_outputs_hold() {
    let s = server();
    let schema = json!({
        "type": "object", "properties": { "n": { "type": "integer", "minimum": 1, "maximum": 9 } },
        "required": ["n"], "additionalProperties": false,
    });
    let format =
        json!({ "type": "json_schema", "json_schema": { "name": "x", "schema": schema, "strict": true } });
    let completion =
        |fields: Value| merged(&[json!({ "prompt": ["a", "b"], "seed": 1, "max_tokens": 500 }), fields]);
    let texts = |fields: Value| -> Vec<String> {
        let answer = s.post("/v1/completions", &completion(fields)).ok();
        let choices = answer["choices"].as_array().unwrap().clone();
        choices.iter().map(|choice| choice["text"].as_str().unwrap().to_owned()).collect()
    };
    let is_digit = |text: &str| {
        let value: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{text}: {e}"));
        assert!((1..=9).contains(&value["n"].as_i64().unwrap()), "{text}");
    };
    texts(json!({ "structured_outputs": { "json": schema } })).iter().for_each(|text| is_digit(text));
    texts(json!({ "structured_outputs": { "json": schema.to_string(), "regex": null } }))
        .iter()
        .for_each(|t| is_digit(t));
    texts(json!({ "response_format": format })).iter().for_each(|text| is_digit(text));
    for text in texts(json!({ "structured_outputs": { "regex": "[ab]{3}-[0-9]{2}" } })) {
        assert!(text.len() == 6 && text.as_bytes()[3] == b'-', "{text}");
    }
    for text in texts(json!({ "structured_outputs": { "choice": ["yes", "no"] } })) {
        assert!(["yes", "no"].contains(&text.as_str()), "{text}");
    }
    // The server may read thoughts: a format leaves the choice to have some.
    let (said, reason) = message(&chat(json!({ "response_format": format, "temperature": 0 })));
    if reason == "stop" {
        is_digit(said["content"].as_str().unwrap());
    }
    let free = texts(json!({ "response_format": { "type": "text" } }));
    assert!(free.iter().all(|text| serde_json::from_str::<Value>(text).is_err()), "noise is JSON: {free:?}");
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let s = server();
    let refused = |fields: Value, param: &str| {
        let reply = s.post("/v1/chat/completions", &chat(fields.clone()));
        assert_eq!(reply.refused(), (400, Some(param.to_owned())), "{fields}: {}", reply.text());
        assert!(reply.json()["error"]["message"].as_str().unwrap().starts_with(param), "{}", reply.text());
    };
    let schema = |schema: Value| json!({ "response_format": { "type": "json_schema", "json_schema": { "name": "x", "schema": schema } } });
    refused(schema(json!({ "type": "nonsense" })), "response_format.json_schema.schema");
    refused(schema(json!(5)), "response_format.json_schema.schema");
    refused(schema(Value::Null), "response_format.json_schema.schema");
    refused(json!({ "response_format": { "type": "xml" } }), "response_format");
    refused(json!({ "response_format": "json" }), "response_format");
    refused(json!({ "structured_outputs": { "regex": "(" } }), "structured_outputs.regex");
    refused(json!({ "structured_outputs": { "choice": [] } }), "structured_outputs.choice");
    refused(json!({ "structured_outputs": { "grammar": "start: x" } }), "structured_outputs.grammar");
    refused(json!({ "structured_outputs": { "json": {}, "regex": "a" } }), "structured_outputs");
    refused(json!({ "structured_outputs": [] }), "structured_outputs");
    let both =
        json!({ "structured_outputs": { "regex": "a" }, "response_format": { "type": "json_object" } });
    refused(both, "structured_outputs");
    refused(json!({ "tools": [{ "type": "x" }] }), "tools[0].type");
    refused(
        json!({ "tools": [{ "type": "function", "function": { "name": "a b" } }] }),
        "tools[0].function.name",
    );
    let odd = json!({ "type": "function", "function": { "name": "a", "parameters": [] } });
    refused(json!({ "tools": [odd] }), "tools[0].function.parameters");
    let bad = json!({ "type": "function", "function": { "name": "a", "parameters": { "type": "object", "properties": 5 } } });
    refused(json!({ "tools": [bad], "tool_choice": "required" }), "tools");
    refused(json!({ "tool_choice": "auto" }), "tool_choice");
    refused(json!({ "tools": tools(), "tool_choice": "sometimes" }), "tool_choice");
    refused(
        json!({ "tools": tools(), "tool_choice": { "type": "function", "function": { "name": "x" } } }),
        "tool_choice",
    );
}

#[test]
fn calls_that_the_model_makes_are_read() {
    let text = "I look. <tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Zürich\"}}\n</tool_call>\n\
                <tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>";
    let (said, reason) = message(&saying(text, json!({ "tools": tools() })));
    assert_eq!((&said["content"], &reason), (&json!("I look."), &json!("tool_calls")));
    let calls = said["tool_calls"].as_array().unwrap();
    assert_eq!(calls[0]["function"], json!({ "name": "weather", "arguments": "{\"city\": \"Zürich\"}" }));
    assert_eq!(calls[1]["function"], json!({ "name": "now", "arguments": "{}" }));
    assert_ne!(calls[0]["id"], calls[1]["id"]);
    // One at most, when that was asked for.
    let (said, reason) = message(&saying(text, json!({ "tools": tools(), "parallel_tool_calls": false })));
    let calls = said["tool_calls"].as_array().unwrap();
    assert_eq!((calls.len(), &calls[0]["function"]["name"]), (1, &json!("weather")));
    assert_eq!(reason, "tool_calls");
    // Without tools, or with none wanted, it is text.
    for fields in [json!({}), json!({ "tools": tools(), "tool_choice": "none" })] {
        let (said, reason) = message(&saying(text, fields));
        assert_eq!((said["content"].as_str(), reason.as_str()), (Some(text), Some("stop")));
        assert!(said.get("tool_calls").is_none());
    }
    let broken = "<tool_call>{\"name\": weather}</tool_call>";
    let (said, reason) = message(&saying(broken, json!({ "tools": tools() })));
    assert_eq!((said["content"].as_str(), reason.as_str()), (Some(broken), Some("stop")));
}

#[test]
fn calls_that_are_demanded_are_made() {
    let named = json!({ "type": "function", "function": { "name": "weather" } });
    for seed in 0..3 {
        let fields = json!({ "tools": tools(), "tool_choice": named, "seed": seed });
        let (said, reason) = message(&chat(fields));
        if reason == "tool_calls" {
            let calls = said["tool_calls"].as_array().unwrap();
            assert_eq!((calls.len(), &calls[0]["function"]["name"]), (1, &json!("weather")));
            let arguments = calls[0]["function"]["arguments"].as_str().unwrap();
            let arguments: Value = serde_json::from_str(arguments).unwrap();
            assert!(["Paris", "Bern"].contains(&arguments["city"].as_str().unwrap()), "{said}");
            assert!(said["content"].is_null());
        } else {
            assert!(said["reasoning_content"].is_string(), "neither call nor thought: {said}");
        }
    }
}

#[test]
fn thoughts_are_told_apart() {
    let (said, _) = message(&saying("<think>\nHm.\n</think>\n\nYes.", json!({})));
    assert_eq!((&said["reasoning_content"], &said["content"]), (&json!("Hm."), &json!("Yes.")));
    let (said, _) = message(&saying("Yes.", json!({})));
    assert_eq!((said.get("reasoning_content"), &said["content"]), (None, &json!("Yes.")));
    // The template opened the thoughts.
    let think = json!({ "chat_template_kwargs": { "think": true }, "tools": tools() });
    let text = "Hm.</think><tool_call>{\"name\": \"now\", \"arguments\": {}}</tool_call>";
    let (said, reason) = message(&saying(text, think.clone()));
    assert_eq!(
        (&said["reasoning_content"], &said["content"], &reason),
        (&json!("Hm."), &Value::Null, &json!("tool_calls"))
    );
    assert_eq!(said["tool_calls"][0]["function"]["name"], "now");
    let (said, _) = message(&saying("Only thoughts", think));
    assert_eq!((&said["reasoning_content"], &said["content"]), (&json!("Only thoughts"), &Value::Null));
}

#[test]
fn flags_decide_what_is_read() {
    let with = |change: &dyn Fn(&mut ServerConfig)| Running::start(templated(TEMPLATE), change);
    let ask = |server: &Running, body: Value| {
        server.client.post("/v1/chat/completions", &body).ok()["choices"][0]["message"].clone()
    };
    let thought = "<think>a</think>b";
    let auto = with(&|_| ());
    assert_eq!(ask(&auto, saying(thought, json!({})))["content"], thought, "this template has no thoughts");
    let flagged = with(&|config| {
        config.reasoning_parser = Some("qwen3".into());
        config.tool_call_parser = Some("llama3_json".into());
    });
    assert_eq!(ask(&flagged, saying(thought, json!({})))["content"], "b");
    let call = "{\"name\": \"now\", \"parameters\": {}}";
    let said = ask(&flagged, saying(call, json!({ "tools": tools() })));
    assert_eq!(said["tool_calls"][0]["function"], json!({ "name": "now", "arguments": "{}" }));
    // Calls in its own format, with no thoughts before them.
    let demanded = chat(
        json!({ "tools": tools(), "tool_choice": "required", "parallel_tool_calls": false, "max_tokens": 2000 }),
    );
    let quiet = with(&|config| config.reasoning_parser = Some("none".into()));
    let said = ask(&quiet, demanded);
    let call = &said["tool_calls"][0]["function"];
    assert!(["now", "weather"].contains(&call["name"].as_str().unwrap()), "{said}");
    serde_json::from_str::<Value>(call["arguments"].as_str().unwrap()).unwrap();
    let off = with(&|config| config.tool_call_parser = Some("none".into()));
    let reply = off.client.post("/v1/chat/completions", &chat(json!({ "tools": tools() })));
    assert_eq!(reply.refused(), (400, Some("tool_choice".into())));
    for bad in ["tool_call_parser", "reasoning_parser"] {
        let mut config = ServerConfig::new("x");
        let field = if bad == "tool_call_parser" {
            &mut config.tool_call_parser
        } else {
            &mut config.reasoning_parser
        };
        *field = Some("klingon".into());
        let error = Server::bind(templated(TEMPLATE), config, "127.0.0.1", 0).err().unwrap();
        assert!(
            matches!(&error, ServeError::Config(m) if m.starts_with(bad) && m.contains("klingon")),
            "{error}"
        );
    }
}

#[test]
fn past_calls_reach_the_template() {
    let s = server();
    let call = json!({ "id": "call_1", "type": "function", "function": { "name": "now", "arguments": "{\"z\": [1]}" } });
    let messages = json!([
        { "role": "user", "content": "q" },
        { "role": "assistant", "content": null, "tool_calls": [call] },
        { "role": "tool", "tool_call_id": "call_1", "content": "noon" },
    ]);
    let answer = s
        .post(
            "/v1/chat/completions",
            &json!({ "messages": messages, "tools": tools(), "max_tokens": 1, "return_token_ids": true }),
        )
        .ok();
    let prompt =
        s.post("/detokenize", &json!({ "tokens": answer["prompt_token_ids"] })).ok()["prompt"].clone();
    let prompt = prompt.as_str().unwrap();
    assert!(
        prompt.contains("<tool_call>{\"name\": \"now\", \"arguments\": {\"z\": [1]}}</tool_call>"),
        "{prompt}"
    );
    assert!(
        prompt.contains("<tool>{\"type\": \"function\", \"function\": {\"name\": \"weather\""),
        "{prompt}"
    );
    assert!(prompt.contains("<|tool|>noon"), "{prompt}");
}
