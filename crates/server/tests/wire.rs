//! Every route by its answers, and every refusal by its status and param.

mod common;

use std::sync::OnceLock;

use common::{Client, Running, tiny};
use serde_json::{Value, json};

/// One server for all tests here that leave it as it is.
fn server() -> Client {
    static SERVER: OnceLock<Running> = OnceLock::new();
    SERVER.get_or_init(|| Running::start(tiny(|_| ()), |_| ())).client
}

fn with(base: &Value, fields: Value) -> Value {
    let mut body = base.clone();
    body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    body
}

/// Seeded sampling of readable text.
fn ascii() -> Value {
    let ids: Vec<u32> = (3 + 32..3 + 127).collect();
    json!({ "seed": 7, "max_tokens": 12, "allowed_token_ids": ids })
}

fn completion(fields: Value) -> Value {
    with(&with(&ascii(), json!({ "prompt": "hello" })), fields)
}

fn chat(fields: Value) -> Value {
    with(&with(&ascii(), json!({ "messages": [{ "role": "user", "content": "q" }] })), fields)
}

#[test]
fn the_small_routes_answer() {
    let s = server();
    assert_eq!((s.get("/health").status, s.get("/health").body.len()), (200, 0));
    assert_eq!(s.get("/ping").status, 200);
    assert_eq!(s.get("/version").ok()["version"], env!("CARGO_PKG_VERSION"));
    assert!(s.get("/load").ok()["server_load"].is_u64());
    let models = s.get("/v1/models").ok();
    assert_eq!(models["data"][0]["id"], "tiny-llama");
    assert_eq!(s.get("/v1/models/tiny-llama").ok(), models["data"][0]);
    assert_eq!(s.get("/v1/models/other").refused(), (404, Some("model".into())));
    assert_eq!(s.get("/nowhere").refused(), (404, None));
    assert_eq!(s.get("/v1/completions").refused(), (405, None));
    for page in ["/", "/docs"] {
        let reply = s.get(page);
        assert!(
            reply.status == 200 && reply.header("content-type").unwrap().starts_with("text/html"),
            "{page}"
        );
    }
}

#[test]
fn a_completion_has_openais_form() {
    let s = server();
    let answer = s.post("/v1/completions", &completion(json!({ "logprobs": 2 }))).ok();
    assert!(answer["id"].as_str().unwrap().starts_with("cmpl-"));
    assert_eq!(answer["object"], "text_completion");
    assert_eq!(answer["model"], "tiny-llama");
    let info = s.get("/debug/config").ok();
    assert_eq!(answer["system_fingerprint"], info["fingerprint"]);
    let choice = &answer["choices"][0];
    assert_eq!(choice["text"].as_str().unwrap().len(), 12);
    assert_eq!((&choice["finish_reason"], &choice["seed"]), (&json!("length"), &json!(7)));
    let logprobs = &choice["logprobs"];
    for column in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(logprobs[column].as_array().unwrap().len(), 12, "{column}");
    }
    assert_eq!(logprobs["text_offset"][3], 3);
    let usage = &answer["usage"];
    assert_eq!(usage["completion_tokens"], 12);
    let total = usage["prompt_tokens"].as_u64().unwrap() + 12;
    assert_eq!(usage["total_tokens"].as_u64(), Some(total));
}

#[test]
fn all_forms_of_a_prompt_are_one() {
    let s = server();
    let tokens = s.post("/tokenize", &json!({ "prompt": "hello" })).ok()["tokens"].clone();
    let ask = |prompt: Value| {
        let answer = s.post("/v1/completions", &completion(json!({ "prompt": prompt, "logprobs": 0 }))).ok();
        let choices = answer["choices"].as_array().unwrap().clone();
        choices.into_iter().map(|c| c["logprobs"]["token_logprobs"].to_string()).collect::<Vec<_>>()
    };
    let text = ask(json!("hello"));
    assert_eq!(ask(tokens.clone()), text);
    assert_eq!(ask(json!(["hello"])), text);
    let two = ask(json!([tokens, [5, 6, 7]]));
    assert_eq!(two[0], text[0]);
    assert_ne!(two[1], text[0], "the control: another prompt has other logprobs");
    assert_eq!(ask(json!(["x", "hello"]))[1], text[0]);
}

#[test]
fn samples_come_prompt_by_prompt() {
    let s = server();
    let body = completion(json!({ "prompt": ["a", "b"], "n": 2, "return_token_ids": true }));
    let answer = s.post("/v1/completions", &body).ok();
    let choices = answer["choices"].as_array().unwrap();
    let indexes: Vec<_> = choices.iter().map(|c| c["index"].as_u64().unwrap()).collect();
    assert_eq!(indexes, [0, 1, 2, 3]);
    assert_eq!(choices[0]["prompt_token_ids"], choices[1]["prompt_token_ids"]);
    assert_ne!(choices[1]["prompt_token_ids"], choices[2]["prompt_token_ids"]);
    assert_ne!(choices[0]["token_ids"], choices[1]["token_ids"]);
}

#[test]
fn echo_scores_the_prompt_with_the_bits_of_decoding() {
    let s = server();
    let answer =
        s.post("/v1/completions", &completion(json!({ "logprobs": 1, "return_token_ids": true }))).ok();
    let choice = &answer["choices"][0];
    let ids = |name: &str| choice[name].as_array().unwrap().clone();
    let all: Vec<Value> = ids("prompt_token_ids").into_iter().chain(ids("token_ids")).collect();
    let body = json!({ "prompt": all, "echo": true, "max_tokens": 0, "logprobs": 1 });
    let scored = s.post("/v1/completions", &body).ok();
    let rows = scored["choices"][0]["logprobs"]["token_logprobs"].as_array().unwrap();
    assert!(rows[0].is_null());
    assert_eq!(rows.len(), all.len());
    let decoded = choice["logprobs"]["token_logprobs"].as_array().unwrap();
    assert_eq!(json!(rows[rows.len() - 12..]).to_string(), json!(decoded).to_string());
    assert!(scored["choices"][0]["text"].as_str().unwrap().starts_with("hello"));
    let events = s.post("/v1/completions", &with(&body, json!({ "stream": true }))).events();
    let streamed = &events[0]["choices"][0];
    assert_eq!((events.len(), &streamed["finish_reason"]), (1, &json!("length")));
    assert_eq!(streamed["logprobs"]["token_logprobs"].to_string(), json!(rows).to_string());
    let rows = s.post("/v1/completions", &completion(json!({ "prompt_logprobs": 1, "max_tokens": 1 }))).ok();
    let rows = rows["choices"][0]["prompt_logprobs"].as_array().unwrap();
    assert!(rows[0].is_null() && rows[1].as_object().unwrap().values().all(|v| v["rank"].is_u64()));
}

#[test]
fn a_stream_adds_up_to_the_answer() {
    let s = server();
    let fields =
        json!({ "n": 2, "prompt": ["a", "bc"], "logprobs": 2, "return_token_ids": true, "echo": true });
    let whole = s.post("/v1/completions", &completion(fields.clone())).ok();
    let stream = json!({ "stream": true, "stream_options": { "include_usage": true } });
    let reply = s.post("/v1/completions", &with(&completion(fields), stream));
    assert!(reply.header("content-type").unwrap().starts_with("text/event-stream"));
    assert!(reply.text().ends_with("\n\ndata: [DONE]\n\n"));
    let events = reply.events();
    let (last, chunks) = events.split_last().unwrap();
    assert_eq!((&last["choices"], &last["usage"]["completion_tokens"]), (&json!([]), &json!(48)));
    for (index, choice) in whole["choices"].as_array().unwrap().iter().enumerate() {
        let mut text = String::new();
        let (mut ids, mut rows, mut offsets) = (Vec::new(), Vec::new(), Vec::new());
        let mut end = Value::Null;
        for chunk in chunks {
            assert!(chunk.get("usage").is_none());
            let part = &chunk["choices"][0];
            if part["index"] != index {
                continue;
            }
            text.push_str(part["text"].as_str().unwrap());
            ids.extend(part["token_ids"].as_array().unwrap().clone());
            let columns = &part["logprobs"];
            rows.extend(columns["token_logprobs"].as_array().cloned().unwrap_or_default());
            offsets.extend(columns["text_offset"].as_array().cloned().unwrap_or_default());
            assert!(end.is_null(), "nothing follows the end");
            end = part["finish_reason"].clone();
        }
        assert_eq!(choice["text"], text);
        assert_eq!(choice["token_ids"], json!(ids));
        assert_eq!(choice["logprobs"]["token_logprobs"].to_string(), json!(rows).to_string());
        assert_eq!(choice["logprobs"]["text_offset"], json!(offsets));
        assert_eq!(choice["finish_reason"], end);
    }
    let every = json!({ "stream": true, "stream_options": { "continuous_usage_stats": true } });
    let events = s.post("/v1/completions", &completion(every)).events();
    assert_eq!(events[0]["usage"]["completion_tokens"], 1);
}

#[test]
fn a_stop_text_ends_the_answer() {
    let s = server();
    let free = s.post("/v1/completions", &completion(json!({}))).ok()["choices"][0]["text"].clone();
    let stop = &free.as_str().unwrap()[5..7];
    let at = free.as_str().unwrap().find(stop).unwrap();
    for stop in [json!(stop), json!(["never there", stop])] {
        let choice =
            s.post("/v1/completions", &completion(json!({ "stop": stop }))).ok()["choices"][0].clone();
        assert_eq!(choice["text"].as_str().unwrap().len(), at);
        assert_eq!(choice["finish_reason"], "stop");
        assert!(choice["stop_reason"].is_string());
    }
    let kept = completion(json!({ "stop": stop, "include_stop_str_in_output": true }));
    let kept = s.post("/v1/completions", &kept).ok()["choices"][0]["text"].clone();
    assert_eq!(kept, free.as_str().unwrap()[..at + stop.len()]);
}

#[test]
fn long_prompts_are_cut_or_refused_and_long_answers_clamped() {
    let s = server();
    let limit = s.get("/v1/models").ok()["data"][0]["max_model_len"].as_u64().unwrap() as usize;
    let prompt: Vec<u32> = (0..limit as u32 + 5).map(|i| 3 + i % 200).collect();
    let reply = s.post("/v1/completions", &json!({ "prompt": prompt }));
    assert_eq!(reply.refused(), (400, Some("prompt".into())));
    let message = reply.json()["error"]["message"].as_str().unwrap().to_owned();
    assert!(message.contains(&format!("maximum context length is {limit} tokens")), "{message}");
    assert_eq!(reply.json()["error"]["code"], "context_length_exceeded");
    let cut = json!({ "prompt": prompt, "truncate_prompt_tokens": 9, "max_tokens": 1 });
    assert_eq!(s.post("/v1/completions", &cut).ok()["usage"]["prompt_tokens"], 9);
    let near = json!({ "prompt": prompt[..limit - 3], "max_tokens": 1000, "ignore_eos": true });
    assert_eq!(s.post("/v1/completions", &near).ok()["usage"]["completion_tokens"], 3);
}

#[test]
fn what_allows_no_token_is_the_callers_mistake() {
    let s = server();
    let body = json!({ "prompt": [1], "allowed_token_ids": [7], "stop_token_ids": [7], "min_tokens": 1, "max_tokens": 2 });
    assert_eq!(s.post("/v1/completions", &body).refused(), (400, Some("allowed_token_ids".to_owned())));
}

#[test]
fn mistakes_name_their_param() {
    let s = server();
    let refused = |path: &str, body: Value, param: &str| {
        let got = s.post(path, &body).refused();
        assert_eq!(got, (400, Some(param.to_owned())), "{body}");
    };
    for (field, value) in [
        ("temperature", json!(2.5)),
        ("temperature", json!("hot")),
        ("temperature", json!(1e300)),
        ("top_p", json!(0)),
        ("top_p", json!(1.01)),
        ("top_k", json!(-2)),
        ("min_p", json!(-0.1)),
        ("presence_penalty", json!(3)),
        ("frequency_penalty", json!(-2.1)),
        ("repetition_penalty", json!(0)),
        ("n", json!(0)),
        ("n", json!(129)),
        ("n", json!(1.5)),
        ("max_tokens", json!(-1)),
        ("max_tokens", json!(4294967296u64)),
        ("min_tokens", json!(13)),
        ("logprobs", json!(21)),
        ("prompt_logprobs", json!(21)),
        ("logit_bias", json!({ "99999999": 1 })),
        ("logit_bias", json!({ "5": 101 })),
        ("stop_token_ids", json!([99999999])),
        ("allowed_token_ids", json!([])),
        ("bad_words", json!([""])),
        ("stop", json!([""])),
        ("stop", json!(5)),
        ("seed", json!("x")),
        ("truncate_prompt_tokens", json!(0)),
        ("prompt", json!("")),
        ("prompt", json!([])),
        ("prompt", json!([[]])),
        ("prompt", json!({})),
        ("prompt", json!([99999999])),
        ("stream", json!("yes")),
        ("stream_options", json!({})),
        ("suffix", json!("x")),
        ("best_of", json!(2)),
        ("priority", json!("high")),
    ] {
        refused("/v1/completions", completion(json!({ field: value })), field);
    }
    refused("/v1/completions", json!({ "max_tokens": 1 }), "prompt");
    refused("/v1/completions", completion(json!({ "prompt": [-1] })), "prompt[0]");
    refused("/v1/completions", completion(json!({ "prompt": [[1], [1, "x"]] })), "prompt[1][1]");
    refused("/v1/completions", completion(json!({ "logit_bias": { "x": 1 } })), "logit_bias");
    for (field, value) in [
        ("messages", json!([])),
        ("messages", json!("hi")),
        ("messages[0]", json!([{ "content": "no role" }])),
        ("messages[0]", json!([{ "role": "user", "content": [{ "type": "image_url", "image_url": {} }] }])),
        ("top_logprobs", json!(2)),
        ("max_completion_tokens", json!("many")),
        ("chat_template", json!("{{ messages }}")),
        ("tool_choice", json!("auto")),
        ("temperature", json!(-1)),
    ] {
        let name = field.split('[').next().unwrap();
        refused("/v1/chat/completions", chat(json!({ name: value })), field);
    }
    let many = chat(json!({ "logprobs": true, "top_logprobs": 21 }));
    refused("/v1/chat/completions", many, "top_logprobs");
    let both = chat(json!({ "add_generation_prompt": true, "continue_final_message": true }));
    refused("/v1/chat/completions", both, "continue_final_message");
    refused("/v1/responses", json!({ "input": 5 }), "input");
    refused("/v1/responses", json!({ "input": [{ "type": "function_call" }] }), "input[0].call_id");
    refused("/v1/responses", json!({ "input": "x", "previous_response_id": "y" }), "previous_response_id");
    refused("/tokenize", json!({}), "prompt");
    refused("/detokenize", json!({ "tokens": [99999999] }), "tokens");
    let unknown = s.post("/v1/completions", &completion(json!({ "model": "gpt" })));
    assert_eq!(unknown.refused(), (404, Some("model".into())));
    let headers = [("X-data-parallel-rank", "7")];
    let body = completion(json!({})).to_string();
    let reply = s.send("POST", "/v1/completions", &headers, body.as_bytes());
    assert_eq!(reply.refused().0, 400);
}

#[test]
fn a_chat_goes_through_the_template() {
    let s = server();
    let body = chat(json!({ "logprobs": true, "top_logprobs": 2, "n": 2, "return_token_ids": true }));
    let answer = s.post("/v1/chat/completions", &body).ok();
    assert_eq!(answer["object"], "chat.completion");
    let rendered = "<|user|>q<|end|><|assistant|>";
    let ids = s.post("/tokenize", &json!({ "prompt": rendered, "add_special_tokens": false })).ok();
    assert_eq!(answer["prompt_token_ids"], ids["tokens"]);
    let messages = json!({ "messages": [{ "role": "user", "content": "q" }], "return_token_strs": true });
    let by_messages = s.post("/tokenize", &messages).ok();
    assert_eq!((&by_messages["tokens"], &by_messages["count"]), (&ids["tokens"], &ids["count"]));
    assert_eq!(by_messages["token_strs"][0], "<|user|>");
    assert_eq!(s.post("/detokenize", &json!({ "tokens": ids["tokens"] })).ok()["prompt"], rendered);
    let choice = &answer["choices"][1];
    assert_eq!(choice["message"]["role"], "assistant");
    assert_eq!(choice["message"]["content"].as_str().unwrap().len(), 12);
    let content = choice["logprobs"]["content"].as_array().unwrap();
    assert_eq!(content.len(), 12);
    assert_eq!(content[0]["top_logprobs"].as_array().unwrap().len(), 2);
    assert_eq!(content[0]["bytes"][0], content[0]["token"].as_str().unwrap().as_bytes()[0]);

    let stream = with(&body, json!({ "stream": true, "stream_options": { "include_usage": true } }));
    let events = s.post("/v1/chat/completions", &stream).events();
    assert_eq!(events.last().unwrap()["usage"], answer["usage"]);
    for index in 0..2 {
        let parts = events.iter().map(|e| &e["choices"][0]).filter(|c| c["index"] == index);
        let parts: Vec<_> = parts.collect();
        assert_eq!(parts[0]["delta"], json!({ "role": "assistant", "content": "" }));
        let text: String = parts.iter().filter_map(|p| p["delta"]["content"].as_str()).collect();
        assert_eq!(answer["choices"][index]["message"]["content"], text);
        let rows: Vec<_> = parts
            .iter()
            .flat_map(|p| p["logprobs"]["content"].as_array().cloned().unwrap_or_default())
            .collect();
        assert_eq!(answer["choices"][index]["logprobs"]["content"].to_string(), json!(rows).to_string());
        assert_eq!(parts.last().unwrap()["finish_reason"], "length");
    }
}

#[test]
fn a_chat_can_go_on_with_its_last_message() {
    let s = server();
    let messages = json!([{ "role": "user", "content": "q" }, { "role": "assistant", "content": "An" }]);
    let ids = s.post("/tokenize", &json!({ "messages": messages, "continue_final_message": true })).ok();
    let text = s.post("/detokenize", &json!({ "tokens": ids["tokens"] })).ok()["prompt"].clone();
    assert_eq!(text, "<|user|>q<|end|><|assistant|>An");
    let answer = s.post(
        "/v1/chat/completions",
        &chat(json!({ "messages": messages, "continue_final_message": true, "return_token_ids": true })),
    );
    assert_eq!(answer.ok()["prompt_token_ids"], ids["tokens"]);
}

#[test]
fn responses_are_the_same_answer_in_another_form() {
    let s = server();
    let body = json!({
        "input": "q", "max_output_tokens": 6, "temperature": 0, "instructions": "i",
        "include": ["message.output_text.logprobs"], "top_logprobs": 1,
    });
    let answer = s.post("/v1/responses", &body).ok();
    assert_eq!((&answer["object"], &answer["status"]), (&json!("response"), &json!("incomplete")));
    assert_eq!(answer["incomplete_details"]["reason"], "max_output_tokens");
    let text = &answer["output"][0]["content"][0];
    let messages = json!([{ "role": "system", "content": "i" }, { "role": "user", "content": "q" }]);
    let same = json!({ "messages": messages, "max_tokens": 6, "temperature": 0, "logprobs": true, "top_logprobs": 1 });
    let same = s.post("/v1/chat/completions", &same).ok()["choices"][0].clone();
    assert_eq!(text["text"], same["message"]["content"]);
    assert_eq!(text["logprobs"].to_string(), same["logprobs"]["content"].to_string());
    assert_eq!(answer["usage"]["output_tokens"], 6);

    let items =
        json!([{ "type": "message", "role": "user", "content": [{ "type": "input_text", "text": "q" }] }]);
    let events = s.post("/v1/responses", &with(&body, json!({ "stream": true, "input": items }))).events();
    let kinds: Vec<_> = events.iter().map(|e| e["type"].as_str().unwrap()).collect();
    assert_eq!(
        &kinds[..4],
        [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added"
        ]
    );
    assert_eq!(*kinds.last().unwrap(), "response.incomplete");
    let numbers: Vec<_> = events.iter().map(|e| e["sequence_number"].as_u64().unwrap()).collect();
    assert_eq!(numbers, (0..events.len() as u64).collect::<Vec<_>>());
    let deltas: String = events.iter().filter_map(|e| e["delta"].as_str()).collect();
    assert_eq!(text["text"], deltas);
    let whole = &events.last().unwrap()["response"]["output"][0]["content"][0];
    assert_eq!(whole["text"], deltas);
    assert_eq!(whole["logprobs"].to_string(), text["logprobs"].to_string());
}

#[test]
fn ids_names_and_seeds_are_the_callers() {
    let s = server();
    let answer = s.post("/v1/completions", &completion(json!({ "request_id": "mine" }))).ok();
    assert_eq!(answer["id"], "cmpl-mine");
    let negative = s.post("/v1/completions", &completion(json!({ "seed": -1 }))).ok();
    let wrapped = s.post("/v1/completions", &completion(json!({ "seed": u64::MAX }))).ok();
    assert_eq!(negative["choices"][0]["text"], wrapped["choices"][0]["text"]);
    let drawn = s.post("/v1/completions", &completion(json!({ "seed": null }))).ok()["choices"][0].clone();
    let again = s.post("/v1/completions", &completion(json!({ "seed": drawn["seed"] }))).ok();
    assert_eq!(again["choices"][0]["text"], drawn["text"], "a drawn seed can be given back");
    let ids =
        completion(json!({ "logprobs": 1, "return_tokens_as_token_ids": true, "return_token_ids": true }));
    let choice = s.post("/v1/completions", &ids).ok()["choices"][0].clone();
    assert_eq!(choice["logprobs"]["tokens"][0], format!("token_id:{}", choice["token_ids"][0]));
}

#[test]
fn without_a_tokenizer_ids_go_in_and_out() {
    let server = Running::start(tiny(|args| args.skip_tokenizer_init = true), |_| ());
    let s = &server.client;
    let body = json!({ "prompt": [5, 6], "max_tokens": 2, "temperature": 0, "return_token_ids": true, "logprobs": 1 });
    let choice = s.post("/v1/completions", &body).ok()["choices"][0].clone();
    assert_eq!(choice["token_ids"].as_array().unwrap().len(), 2);
    assert!(choice["logprobs"]["tokens"][0].as_str().unwrap().starts_with("token_id:"));
    let refused = |path: &str, body: Value| s.post(path, &body).refused();
    assert_eq!(refused("/v1/completions", json!({ "prompt": "x" })), (400, Some("prompt".into())));
    let chat = json!({ "messages": [{ "role": "user", "content": "x" }] });
    assert_eq!(refused("/v1/chat/completions", chat), (400, Some("messages".into())));
    assert_eq!(refused("/detokenize", json!({ "tokens": [5] })), (400, Some("tokens".into())));
    assert_eq!(refused("/v1/completions", json!({ "prompt": [5], "stop": "x" })), (400, Some("stop".into())));
}
