//! `/v1/responses` with tools and thoughts: its streams event by event, and each answer against that of a chat. The model
//! writes noise, so what it says is said by constraints.

mod common;

use std::sync::OnceLock;

use bitfast_server::ServerConfig;
use common::narration::{nameless, told};
use common::{Client, Running, TEMPLATE, merged, templated};
use serde_json::{Value, json};

fn start(change: impl FnOnce(&mut ServerConfig)) -> Running {
    Running::start(templated(TEMPLATE), change)
}

/// It has thoughts, which a request for an effort opens, and shows the ids of calls.
fn server() -> Client {
    static SERVER: OnceLock<Running> = OnceLock::new();
    let template = TEMPLATE
        .replace("{% if think %}", "{% if reasoning_effort %}")
        .replace("{{ m.content }}", "{{ m.tool_call_id }}{{ m.content }}")
        .replace("<tool_call>{", "{{ c.id }}<tool_call>{");
    let template = template + "{# </think> #}";
    SERVER.get_or_init(|| Running::start(templated(&template), |_| ())).client
}

fn tools() -> Value {
    let city = json!({
        "type": "object", "properties": { "city": { "enum": ["Paris", "Bern"] } }, "required": ["city"],
        "additionalProperties": false,
    });
    json!([
        { "type": "function", "name": "weather", "description": "d", "parameters": city, "strict": true },
        { "type": "function", "name": "now" },
    ])
}

fn asking(fields: Value) -> Value {
    merged(&[json!({ "input": "q", "seed": 3, "max_output_tokens": 700 }), fields])
}

/// For an answer that says exactly this.
fn saying(text: &str, fields: Value) -> Value {
    let grammar = format!("start: {}", Value::from(text));
    merged(&[asking(fields), json!({ "structured_outputs": { "grammar": grammar } })])
}

/// The same request to a chat.
fn as_chat(body: &Value) -> Value {
    let mut chat = serde_json::Map::new();
    for (name, value) in body.as_object().unwrap() {
        let nest = |tool: &Value| {
            let mut function = tool.clone();
            function.as_object_mut().unwrap().shift_remove("type");
            json!({ "type": "function", "function": function })
        };
        let (name, value) = match name.as_str() {
            "input" => ("messages", json!([{ "role": "user", "content": value }])),
            "max_output_tokens" => ("max_tokens", value.clone()),
            "tools" => ("tools", value.as_array().unwrap().iter().map(nest).collect()),
            "tool_choice" if value.is_object() => ("tool_choice", nest(value)),
            "reasoning" => ("reasoning_effort", value["effort"].clone()),
            name => (name, value.clone()),
        };
        chat.insert(name.to_owned(), value);
    }
    chat.into()
}

/// The answer's items, the same whole, streamed, and to a chat.
#[track_caller]
fn items(s: &Client, body: &Value) -> Vec<Value> {
    let whole = s.post("/v1/responses", body).ok();
    let reply = s.post("/v1/responses", &merged(&[body.clone(), json!({ "stream": true })]));
    assert_eq!(reply.status, 200, "{}", reply.text());
    let streamed = told(&reply.events());
    assert_eq!(nameless(&whole), nameless(&streamed));
    let chat = s.post("/v1/chat/completions", &as_chat(body)).ok();
    let items = whole["output"].as_array().unwrap().clone();
    let texts = |kind: &str| -> String {
        let of_kind = items.iter().filter(|item| item["type"] == kind);
        of_kind.map(|item| item["content"][0]["text"].as_str().unwrap()).collect()
    };
    let said = &chat["choices"][0]["message"];
    assert_eq!(said["content"].as_str().unwrap_or_default(), texts("message"));
    let thought = said.get("reasoning_content").and_then(Value::as_str).unwrap_or_default();
    assert_eq!(thought, texts("reasoning"));
    let calls: Vec<_> = items.iter().filter(|item| item["type"] == "function_call").collect();
    let same: Vec<_> = said["tool_calls"].as_array().into_iter().flatten().collect();
    assert_eq!(calls.len(), same.len(), "{said}");
    for (call, same) in calls.into_iter().zip(same) {
        let function = json!({ "name": call["name"], "arguments": call["arguments"] });
        assert_eq!(function, same["function"]);
    }
    assert_eq!(whole["usage"]["output_tokens"], chat["usage"]["completion_tokens"]);
    assert_eq!(whole["usage"]["input_tokens"], chat["usage"]["prompt_tokens"]);
    items
}

/// Types, texts and status of items.
fn shape(items: &[Value]) -> Vec<(&str, &str, &str)> {
    items.iter().map(of).collect()
}

fn of(item: &Value) -> (&str, &str, &str) {
    let text = match item["type"].as_str() {
        Some("function_call") => &item["arguments"],
        _ => &item["content"][0]["text"],
    };
    (item["type"].as_str().unwrap(), text.as_str().unwrap(), item["status"].as_str().unwrap())
}

const WEATHER: &str = "{\"city\": \"Zürich\"}";

#[test]
fn calls_are_items_among_messages_in_the_models_order() {
    let s = &server();
    let call = format!("<tool_call>\n{{\"name\": \"weather\", \"arguments\": {WEATHER}}}\n</tool_call>");
    let now = "<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>";
    let text = format!("I look. {call}\n{now} Done. {now}");
    let with_tools = json!({ "tools": tools() });
    let got = items(s, &saying(&text, with_tools.clone()));
    let message = |text| ("message", text, "completed");
    let called = |arguments| ("function_call", arguments, "completed");
    assert_eq!(
        shape(&got),
        [message("I look."), called(WEATHER), called("{}"), message(" Done."), called("{}")]
    );
    assert_eq!((&got[1]["name"], &got[2]["name"]), (&json!("weather"), &json!("now")));
    // Calls alone are no message.
    assert_eq!(shape(&items(s, &saying(now, with_tools.clone()))), [called("{}")]);
    // One at most, when that was asked for.
    let one =
        items(s, &saying(&text, merged(&[with_tools.clone(), json!({ "parallel_tool_calls": false })])));
    assert_eq!(shape(&one), [message("I look."), called(WEATHER), message(" Done.")]);
    // Without tools, or with none wanted, it is text, and so is what only looks like a call.
    for fields in [json!({}), json!({ "tools": tools(), "tool_choice": "none" })] {
        assert_eq!(shape(&items(s, &saying(&text, fields))), [message(&text)]);
    }
    let broken = "<tool_call>{\"name\": weather}</tool_call>";
    assert_eq!(shape(&items(s, &saying(broken, with_tools))), [message(broken)]);
    // What could become a call is none at the end.
    let held = "Yes. <tool_c";
    assert_eq!(shape(&items(s, &saying(held, json!({ "tools": tools() })))), [message(held)]);
    // Nothing at all is a message too.
    assert_eq!(shape(&items(s, &saying("", json!({})))), [message("")]);
}

#[test]
fn thoughts_are_an_item_before_the_answer() {
    let s = &server();
    let got = items(s, &saying("<think>\nHm.\n</think>\n\nYes.", json!({})));
    let thought = |text| ("reasoning", text, "completed");
    assert_eq!(shape(&got), [thought("Hm."), ("message", "Yes.", "completed")]);
    assert_eq!(got[0]["summary"], json!([]));
    // The template opened the thoughts.
    let think = json!({ "reasoning": { "effort": "high" }, "tools": tools() });
    let text = "Hm.</think><tool_call>{\"name\": \"now\", \"arguments\": {}}</tool_call>";
    let got = items(s, &saying(text, think.clone()));
    assert_eq!(shape(&got), [thought("Hm."), ("function_call", "{}", "completed")]);
    assert_eq!(shape(&items(s, &saying("Only thoughts", think))), [thought("Only thoughts")]);
}

#[test]
fn what_breaks_off_is_incomplete() {
    let s = &server();
    let text = format!("Ah. <tool_call>{{\"name\": \"weather\", \"arguments\": {WEATHER}}}</tool_call> and");
    let cut =
        |tokens: usize| items(s, &saying(&text, json!({ "tools": tools(), "max_output_tokens": tokens })));
    let in_arguments = text.find("Zür").unwrap();
    let got = cut(in_arguments);
    assert_eq!(got[1]["status"], "incomplete", "{got:?}");
    assert_eq!(got[0]["status"], "completed");
    assert!(WEATHER.starts_with(got[1]["arguments"].as_str().unwrap()), "{got:?}");
    // Its arguments are whole, though the answer is not.
    assert_eq!(cut(text.len() - "and".len())[1]["status"], "completed");
    assert_eq!(cut(2)[0]["status"], "incomplete");
    let body = saying(&text, json!({ "tools": tools(), "max_output_tokens": in_arguments }));
    let answer = s.post("/v1/responses", &body).ok();
    assert_eq!(answer["incomplete_details"], json!({ "reason": "max_output_tokens" }));
}

#[test]
fn calls_that_are_demanded_are_made_in_each_dialect() {
    for dialect in ["hermes", "llama3_json", "deepseek_v3", "deepseek_v31"] {
        let server = start(|config| config.tool_call_parser = Some(dialect.into()));
        let s = &server.client;
        let is_call = |item: &Value| {
            let arguments: Value = serde_json::from_str(item["arguments"].as_str().unwrap()).unwrap();
            match item["name"].as_str().unwrap() {
                "weather" => {
                    assert!(["Paris", "Bern"].contains(&arguments["city"].as_str().unwrap()), "{item}")
                }
                name => assert!(name == "now" && arguments.is_object(), "{item}"),
            }
            assert_eq!((&item["type"], &item["status"]), (&json!("function_call"), &json!("completed")));
        };
        let named = json!({ "type": "function", "name": "weather" });
        let got = items(s, &asking(json!({ "tools": tools(), "tool_choice": named })));
        assert_eq!((got.len(), &got[0]["name"]), (1, &json!("weather")), "{dialect}: {got:?}");
        is_call(&got[0]);
        // Whatever it likes would be long.
        let mut closed = tools();
        closed[1]["parameters"] = json!({ "type": "object", "additionalProperties": false });
        let required = json!({
            "tools": closed, "tool_choice": "required", "parallel_tool_calls": false, "max_output_tokens": 2000,
        });
        let got = items(s, &asking(required));
        assert_eq!(got.len(), 1, "{dialect}: {got:?}");
        is_call(&got[0]);
        // Calls that it makes as it likes.
        let call = match dialect {
            "hermes" => "<tool_call>{\"name\": \"now\", \"arguments\": {\"a\": 1}}</tool_call>",
            "llama3_json" => "{\"name\": \"now\", \"parameters\": {\"a\": 1}}",
            "deepseek_v3" => {
                "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{\"a\": 1}\n```\
                 <｜tool▁call▁end｜><｜tool▁calls▁end｜>"
            }
            _ => {
                "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{\"a\": 1}<｜tool▁call▁end｜>\
                 <｜tool▁calls▁end｜>"
            }
        };
        let got = items(s, &saying(call, json!({ "tools": tools(), "tool_choice": "auto" })));
        assert_eq!(shape(&got), [("function_call", "{\"a\": 1}", "completed")], "{dialect}");
    }
}

#[test]
fn logprobs_are_those_of_a_messages_own_tokens() {
    let s = &server();
    let text = "<think>Hm.</think>\n\nYes <tool_call>{\"name\": \"now\", \"arguments\": {}}</tool_call>\nNo";
    let asked = json!({ "tools": tools(), "include": ["message.output_text.logprobs"], "top_logprobs": 1 });
    let body = saying(text, asked);
    let answer = s.post("/v1/responses", &body).ok();
    let streamed = told(&s.post("/v1/responses", &merged(&[body, json!({ "stream": true })])).events());
    assert_eq!(nameless(&answer).to_string(), nameless(&streamed).to_string());
    let messages = answer["output"].as_array().unwrap().iter().filter(|item| item["type"] == "message");
    let tokens = messages.map(|item| {
        let rows = item["content"][0]["logprobs"].as_array().unwrap();
        rows.iter().map(|row| row["token"].as_str().unwrap()).collect::<String>()
    });
    assert_eq!(tokens.collect::<Vec<_>>(), ["Yes", "\nNo"]);
    // Where all is one text, they are those of a chat, with the end's.
    let own = json!({ "include": ["message.output_text.logprobs"], "top_logprobs": 1 });
    let plain =
        merged(&[asking(own), json!({ "structured_outputs": { "grammar": "start: \"Yes\" /[ab]*/" } })]);
    let text = &s.post("/v1/responses", &plain).ok()["output"][0]["content"][0];
    let chat = merged(&[as_chat(&plain), json!({ "logprobs": true })]);
    let same = &s.post("/v1/chat/completions", &chat).ok()["choices"][0]["logprobs"]["content"];
    assert_eq!(text["logprobs"].to_string(), same.to_string());
    assert_eq!(same.as_array().unwrap().len(), text["text"].as_str().unwrap().len() + 1);
}

#[test]
fn what_is_in_force_is_told() {
    let s = &server();
    let told = |fields: Value| {
        let answer = s.post("/v1/responses", &saying("x", fields.clone())).ok();
        assert_eq!(answer["metadata"], fields.get("metadata").cloned().unwrap_or(json!({})));
        ["tools", "tool_choice", "parallel_tool_calls"].map(|field| answer[field].clone())
    };
    told(json!({ "metadata": { "z": "1", "a": "é\n" } }));
    for none in [json!({}), json!({ "tool_choice": "auto" }), json!({ "tools": [], "tool_choice": "none" })] {
        assert_eq!(told(none), [json!([]), json!("none"), json!(true)]);
    }
    assert_eq!(told(json!({ "tools": tools() })), [tools(), json!("auto"), json!(true)]);
    let named = json!({ "type": "function", "name": "weather" });
    let fields = json!({ "tools": tools(), "tool_choice": named, "parallel_tool_calls": false });
    assert_eq!(told(fields), [tools(), named, json!(false)]);
    for choice in ["none", "required"] {
        assert_eq!(told(json!({ "tools": tools(), "tool_choice": choice }))[1], choice);
    }
}

#[test]
fn two_turns_are_rendered_as_a_chats() {
    let s = &server();
    let call = |id: &str, city: &str| {
        json!({ "type": "function_call", "id": "fc_1", "call_id": id, "name": "weather",
            "arguments": format!("{{\"city\": \"{city}\"}}"), "status": "completed" })
    };
    let output =
        |id: &str, output: Value| json!({ "type": "function_call_output", "call_id": id, "output": output });
    let input = |last: &str| {
        json!([
            { "role": "user", "content": "q" },
            { "type": "reasoning", "id": "rs_1", "summary": [], "content": [{ "type": "reasoning_text", "text": "Hm." }] },
            { "type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
              "content": [{ "type": "output_text", "text": "I look.", "annotations": [], "logprobs": [] }] },
            call("call_1", "Paris"),
            { "type": "reasoning", "summary": [] },
            call("call_2", "Bern"),
            output("call_1", json!("rain")),
            output("call_2", json!([{ "type": "input_text", "text": last }])),
            call("call_3", "Bern"),
            output("call_3", json!("snow")),
        ])
    };
    let call = |id: &str, city: &str| {
        let function = json!({ "name": "weather", "arguments": format!("{{\"city\": \"{city}\"}}") });
        json!({ "id": id, "type": "function", "function": function })
    };
    let messages = json!([
        { "role": "system", "content": "i" },
        { "role": "user", "content": "q" },
        { "role": "assistant", "content": "I look.", "tool_calls": [call("call_1", "Paris"), call("call_2", "Bern")] },
        { "role": "tool", "tool_call_id": "call_1", "content": "rain" },
        { "role": "tool", "tool_call_id": "call_2", "content": "sun" },
        { "role": "assistant", "content": null, "tool_calls": [call("call_3", "Bern")] },
        { "role": "tool", "tool_call_id": "call_3", "content": "snow" },
    ]);
    let common = json!({ "seed": 3, "temperature": 1, "top_logprobs": 5 });
    let chat = as_chat(&merged(&[common.clone(), json!({ "tools": tools(), "max_output_tokens": 40 })]));
    let chat = merged(&[chat, json!({ "messages": messages, "logprobs": true, "return_token_ids": true })]);
    let same = s.post("/v1/chat/completions", &chat).ok();
    let rendered = s.post("/detokenize", &json!({ "tokens": same["prompt_token_ids"] })).ok();
    let rendered = rendered["prompt"].as_str().unwrap();
    assert!(rendered.contains("<|tool|>call_1rain<|end|><|tool|>call_2sun<|end|>"), "{rendered}");
    let ask = |last: &str| {
        let own = json!({ "input": input(last), "instructions": "i", "tools": tools(), "max_output_tokens": 40,
            "include": ["message.output_text.logprobs"] });
        let answer = s.post("/v1/responses", &merged(&[common.clone(), own])).ok();
        let text = &answer["output"][0]["content"][0];
        (text["text"].clone(), text["logprobs"].to_string(), answer["usage"]["input_tokens"].clone())
    };
    // The bits of 40 tokens' best five say that the prompts' tokens are equal.
    let choice = &same["choices"][0];
    let wanted = (
        choice["message"]["content"].clone(),
        choice["logprobs"]["content"].to_string(),
        same["usage"]["prompt_tokens"].clone(),
    );
    assert_eq!(ask("sun"), wanted);
    let other = ask("sum");
    assert_eq!(other.2, wanted.2);
    assert_ne!(other.1, wanted.1, "the control: another output has other logprobs");
}

#[test]
fn an_answer_can_be_sent_back() {
    let s = &server();
    let text = "<think>Hm.</think>I look. <tool_call>{\"name\": \"now\", \"arguments\": {}}</tool_call>";
    let got = items(s, &saying(text, json!({ "tools": tools() })));
    assert_eq!(got.len(), 3);
    let mut input = vec![json!({ "role": "user", "content": "q" })];
    input.extend(got.clone());
    input.push(json!({ "type": "function_call_output", "call_id": got[2]["call_id"], "output": "noon" }));
    let answer = s.post("/v1/responses", &asking(json!({ "input": input, "tools": tools() }))).ok();
    let call = json!({ "id": got[2]["call_id"], "type": "function", "function": { "name": "now", "arguments": "{}" } });
    let messages = json!([
        { "role": "user", "content": "q" },
        { "role": "assistant", "content": "I look.", "tool_calls": [call] },
        { "role": "tool", "tool_call_id": got[2]["call_id"], "content": "noon" },
    ]);
    let same = as_chat(&json!({ "tools": tools() }));
    let ids = s.post("/tokenize", &merged(&[same, json!({ "messages": messages })])).ok();
    assert_eq!(answer["usage"]["input_tokens"], ids["count"]);
}

#[test]
fn malformed_requests_are_refused_by_name() {
    let s = &server();
    let refused = |fields: Value, param: &str| {
        let reply = s.post("/v1/responses", &asking(fields.clone()));
        assert_eq!(reply.refused(), (400, Some(param.to_owned())), "{fields}: {}", reply.text());
        let message = reply.json()["error"]["message"].as_str().unwrap().to_owned();
        assert!(message.starts_with(param), "{message}");
        message
    };
    let tool = |fields: Value| json!({ "tools": [tools()[0], merged(&[tools()[1].clone(), fields])] });
    let message = refused(tool(json!({ "type": "web_search" })), "tools[1].type");
    assert!(message.contains("web_search"), "{message}");
    refused(tool(json!({ "type": null })), "tools[1].type");
    refused(json!({ "tools": [5] }), "tools[0].type");
    refused(tool(json!({ "name": "a b" })), "tools[1].name");
    refused(tool(json!({ "name": null })), "tools[1].name");
    refused(json!({ "tools": [{ "type": "function", "function": { "name": "nested" } }] }), "tools[0].name");
    refused(tool(json!({ "parameters": [] })), "tools[1].parameters");
    let bad = tool(json!({ "parameters": { "type": "object", "properties": 5 } }));
    refused(merged(&[bad, json!({ "tool_choice": "required" })]), "tools");
    refused(json!({ "tools": vec![tools()[0].clone(); 129] }), "tools");
    refused(json!({ "tool_choice": "required" }), "tool_choice");
    for choice in [
        json!("sometimes"),
        json!(5),
        json!({ "type": "function", "name": "x" }),
        json!({ "type": "function", "function": { "name": "now" } }),
    ] {
        refused(json!({ "tools": tools(), "tool_choice": choice }), "tool_choice");
    }
    let allowed =
        json!({ "type": "allowed_tools", "mode": "auto", "tools": [{ "type": "function", "name": "now" }] });
    let message = refused(json!({ "tools": tools(), "tool_choice": allowed }), "tool_choice");
    assert!(message.contains("allowed_tools"), "{message}");
    refused(json!({ "tools": tools(), "parallel_tool_calls": "yes" }), "parallel_tool_calls");
    let item = |item: Value, param: &str| {
        refused(json!({ "input": [{ "role": "user", "content": "q" }, item] }), &format!("input[1]{param}"));
    };
    let call = json!({ "type": "function_call", "call_id": "c", "name": "now", "arguments": "{}" });
    let output = json!({ "type": "function_call_output", "call_id": "c", "output": "x" });
    for field in ["call_id", "name", "arguments"] {
        item(merged(&[call.clone(), json!({ field: null })]), &format!(".{field}"));
        item(merged(&[call.clone(), json!({ field: {} })]), &format!(".{field}"));
    }
    item(merged(&[output.clone(), json!({ "call_id": 5 })]), ".call_id");
    for odd in [Value::Null, json!(5), json!({ "type": "input_text", "text": "x" })] {
        item(merged(&[output.clone(), json!({ "output": odd })]), ".output");
    }
    let parts = json!([{ "type": "input_text", "text": "x" }, { "type": "input_image", "image_url": "x" }]);
    item(merged(&[output, json!({ "output": parts })]), ".output[1]");
    item(json!("q"), "");
    item(json!({ "type": "item_reference", "id": "x" }), ".type");
    item(json!({ "type": 5 }), ".type");
    item(json!({ "content": "q" }), ".role");
    item(json!({ "role": "user", "content": 5 }), ".content");
    item(json!({ "role": "user", "content": [{ "type": "input_image" }] }), ".content[0]");
    refused(json!({ "input": [{ "type": "reasoning", "summary": [] }] }), "input");
    refused(json!({ "text": { "format": { "type": "xml" } } }), "text.format");
    let both =
        json!({ "text": { "format": { "type": "json_object" } }, "structured_outputs": { "regex": "a" } });
    refused(both, "structured_outputs");
    let off = start(|config| config.tool_call_parser = Some("none".into()));
    let reply = off.client.post("/v1/responses", &asking(json!({ "tools": tools() })));
    assert_eq!(reply.refused(), (400, Some("tool_choice".into())));
}

#[test]
fn formats_hold() {
    let s = &server();
    let schema = json!({ "type": "object", "properties": { "n": { "enum": [1, 2] } }, "required": ["n"], "additionalProperties": false });
    let format = json!({ "format": { "type": "json_schema", "name": "x", "schema": schema } });
    let answer = s.post("/v1/responses", &asking(json!({ "text": format, "seed": 2 }))).ok();
    let last = answer["output"].as_array().unwrap().last().unwrap();
    if answer["status"] == "completed" {
        let text = last["content"][0]["text"].as_str().unwrap();
        let value: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{text}: {e}"));
        assert!([1, 2].contains(&value["n"].as_i64().unwrap()), "{text}");
    }
    assert!(!answer["output"].to_string().contains("think>"), "{answer}");
}
