//! Answers of `/v1/responses`, and their streams event by event.

use serde_json::{Value, json};

/// Without what differs between two answers: ids, which must be of the right kind and unlike each other, and the time.
#[track_caller]
pub fn nameless(answer: &Value) -> Value {
    let mut answer = answer.clone();
    let mut seen = Vec::new();
    let mut take = |of: &mut Value, field: &str, prefix: &str| {
        let id = of.as_object_mut().unwrap().shift_remove(field).unwrap();
        assert!(id.as_str().unwrap().starts_with(prefix), "{field}: {id}");
        assert!(!seen.contains(&id), "{id} twice");
        seen.push(id);
    };
    take(&mut answer, "id", "resp_");
    for item in answer["output"].as_array_mut().unwrap() {
        match item["type"].as_str().unwrap() {
            "message" => take(item, "id", "msg_"),
            "reasoning" => take(item, "id", "rs_"),
            "function_call" => {
                take(item, "id", "fc_");
                take(item, "call_id", "call_");
            }
            other => panic!("an item of type {other}"),
        }
    }
    for field in ["created_at", "usage"] {
        // The prefix cache knows the prompt the second time.
        answer.as_object_mut().unwrap().shift_remove(field).unwrap();
    }
    answer
}

/// Follows a stream, and checks that each event is in its place. The answer that it ends with.
#[track_caller]
pub fn told(events: &[Value]) -> Value {
    for (number, event) in events.iter().enumerate() {
        assert_eq!(event["sequence_number"], number);
    }
    let kinds: Vec<_> = events.iter().map(|event| event["type"].as_str().unwrap()).collect();
    let [first, second, middle @ .., last] = events else { panic!("too few: {kinds:?}") };
    assert_eq!(kinds[..2], ["response.created", "response.in_progress"]);
    for begun in [first, second] {
        let response = &begun["response"];
        assert_eq!((&response["status"], &response["output"]), (&json!("in_progress"), &json!([])));
        assert_eq!(response["id"], last["response"]["id"]);
    }
    let answer = &last["response"];
    assert_eq!(last["type"], format!("response.{}", answer["status"].as_str().unwrap()));
    let mut done = Vec::new();
    let mut rest = middle;
    while !rest.is_empty() {
        let (item, after) = item(rest, done.len());
        done.push(item);
        rest = after;
    }
    assert_eq!(answer["output"].to_string(), json!(done).to_string());
    answer.clone()
}

/// The item that the first events tell completely, and the events after it.
#[track_caller]
fn item(events: &[Value], index: usize) -> (Value, &[Value]) {
    let added = &events[0];
    assert_eq!(
        (&added["type"], &added["output_index"]),
        (&json!("response.output_item.added"), &json!(index))
    );
    let empty = &added["item"];
    assert_eq!(empty["status"], "in_progress");
    let family = match empty["type"].as_str().unwrap() {
        "message" => "output_text",
        "reasoning" => "reasoning_text",
        "function_call" => "function_call_arguments",
        other => panic!("an item of type {other}"),
    };
    let has_part = family != "function_call_arguments";
    let mut rest = &events[1..];
    let mut next = |kind: &str| {
        let (event, after) = rest.split_first().expect("an item ends");
        if event["type"] != kind {
            return None;
        }
        rest = after;
        if kind != "response.output_item.done" {
            assert_eq!(event["item_id"], empty["id"], "{event}");
            let content_index = if has_part { json!(0) } else { Value::Null };
            assert_eq!(event["content_index"], content_index, "{event}");
        }
        assert_eq!(event["output_index"], index, "{event}");
        Some(event)
    };
    let mut whole = empty.clone();
    let mut logprobs = Vec::new();
    let mut text = String::new();
    if has_part {
        assert_eq!(empty["content"], json!([]));
        let part = &next("response.content_part.added").expect("a part")["part"];
        assert_eq!((&part["type"], &part["text"]), (&json!(family), &json!("")));
        whole["content"] = json!([part]);
    } else {
        assert_eq!(empty["arguments"], "");
    }
    while let Some(event) = next(&format!("response.{family}.delta")) {
        text.push_str(event["delta"].as_str().unwrap());
        logprobs.extend(event["logprobs"].as_array().cloned().unwrap_or_default());
    }
    let end = next(&format!("response.{family}.done")).expect("the text's end");
    if has_part {
        assert_eq!(end["text"], text);
        whole["content"][0]["text"] = text.into();
        if family == "output_text" {
            assert_eq!(end["logprobs"].to_string(), json!(logprobs).to_string());
            whole["content"][0]["logprobs"] = logprobs.into();
        }
        let part = &next("response.content_part.done").expect("the part's end")["part"];
        assert_eq!(part.to_string(), whole["content"][0].to_string());
    } else {
        assert_eq!((&end["arguments"], &end["name"]), (&json!(text), &empty["name"]));
        whole["arguments"] = text.into();
    }
    let done = next("response.output_item.done").expect("the item's end")["item"].clone();
    assert_ne!(done["status"], "in_progress");
    whole["status"] = done["status"].clone();
    assert_eq!(done.to_string(), whole.to_string());
    (done, rest)
}
