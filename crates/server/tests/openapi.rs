//! The OpenAPI document: reviewed as a whole, and the base of hostile requests.

mod common;

use std::path::Path;

use bitfast_testkit::sim::Rng;
use common::{Running, eventually, is_idle, tiny};
use serde_json::{Map, Value, json};

fn server() -> Running {
    Running::start(tiny(|args| args.max_model_len = Some(64)), |_| ())
}

/// Set `UPDATE_SNAPSHOTS=1` to accept a changed document.
#[test]
fn the_document_is_as_reviewed() {
    let document = server().client.get("/openapi.json").ok();
    let text = serde_json::to_string_pretty(&document).unwrap() + "\n";
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/openapi.json");
    if std::env::var_os("UPDATE_SNAPSHOTS").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    let reviewed = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(text == reviewed, "{} differs; UPDATE_SNAPSHOTS=1 accepts it", path.display());
    let names = document["components"]["schemas"].as_object().unwrap();
    let mut missing = Vec::new();
    check_references(&document, names, &mut missing);
    assert!(missing.is_empty(), "schemas without a definition: {missing:?}");
}

fn check_references(value: &Value, names: &Map<String, Value>, missing: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            if let Some(name) = fields.get("$ref").and_then(Value::as_str).and_then(|r| r.rsplit('/').next())
                && !names.contains_key(name)
            {
                missing.push(name.to_owned());
            }
            fields.values().for_each(|value| check_references(value, names, missing));
        }
        Value::Array(items) => items.iter().for_each(|value| check_references(value, names, missing)),
        _ => {}
    }
}

/// Makes values of a schema, and values that it forbids.
struct Fuzzer<'a> {
    schemas: &'a Map<String, Value>,
    rng: Rng,
}

impl Fuzzer<'_> {
    fn hostile(&mut self) -> Value {
        let values = [
            json!(null),
            json!(true),
            json!(-1),
            json!(0),
            json!(1),
            json!(3),
            json!(1.5),
            json!(-0.0),
            json!(1e308),
            json!(5e-324),
            json!(u64::MAX),
            json!(i64::MIN),
            json!(4294967296u64),
            json!(""),
            json!("x"),
            json!("\u{0}\u{feff}\u{202e}\u{10ffff}"),
            json!("{{ 7 * 7 }}{% for x in y %}"),
            json!([]),
            json!([[]]),
            json!([null]),
            json!([1, "x"]),
            json!([1, 2, 3]),
            json!({}),
            json!({ "role": "user" }),
            json!({ "role": "user", "content": "hi" }),
            json!([{ "role": "user", "content": [] }]),
            json!([{ "role": "assistant", "content": null, "tool_calls": [{}] }]),
            json!({ "type": "text" }),
            json!({ "a": { "b": { "c": [{}] } } }),
            json!("y".repeat(5000)),
        ];
        self.rng.pick(&values).clone()
    }

    fn value(&mut self, schema: &Value, depth: usize) -> Value {
        if depth > 6 || self.rng.one_in(8) {
            return self.hostile();
        }
        if let Some(name) = schema["$ref"].as_str().and_then(|r| r.rsplit('/').next()) {
            let schema = self.schemas[name].clone();
            return self.value(&schema, depth + 1);
        }
        for key in ["oneOf", "anyOf"] {
            if let Some(choices) = schema[key].as_array() {
                let choice = self.rng.pick(choices).clone();
                return self.value(&choice, depth + 1);
            }
        }
        if let Some(parts) = schema["allOf"].as_array() {
            let mut fields = Map::new();
            for part in parts {
                if let Value::Object(more) = self.value(part, depth) {
                    fields.extend(more);
                }
            }
            return Value::Object(fields);
        }
        let kind = match &schema["type"] {
            Value::Array(kinds) => self.rng.pick(kinds).as_str().unwrap_or_default().to_owned(),
            kind => kind.as_str().unwrap_or("object").to_owned(),
        };
        match kind.as_str() {
            "boolean" => json!(self.rng.one_in(2)),
            "integer" => json!(self.rng.pick(&[-1i64, 0, 1, 2, 5, 20, 60, 129]).to_owned()),
            "number" => json!(self.rng.pick(&[-2.0f64, 0.0, 1e-6, 0.5, 1.0, 1.9, 2.0, 2.1]).to_owned()),
            "string" => {
                json!(*self.rng.pick(&["a", "none", "user", "text", "hello world", "tiny-llama", "auto"]))
            }
            "array" => (0..self.rng.below(4)).map(|_| self.value(&schema["items"], depth + 1)).collect(),
            "null" => Value::Null,
            _ => self.object(schema, depth),
        }
    }

    fn object(&mut self, schema: &Value, depth: usize) -> Value {
        let mut fields = Map::new();
        let required: Vec<&str> =
            schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        for (name, schema) in schema["properties"].as_object().into_iter().flatten() {
            let wanted =
                if required.contains(&name.as_str()) { !self.rng.one_in(20) } else { self.rng.one_in(8) };
            if wanted {
                fields.insert(name.clone(), self.value(schema, depth + 1));
            }
        }
        Value::Object(fields)
    }

    /// Usable as often as not: most random messages and prompts would be refused before anything else is looked at.
    fn body(&mut self, path: &str, schema: &Value) -> Value {
        let mut body = self.value(schema, 0);
        if let Value::Object(fields) = &mut body
            && !self.rng.one_in(3)
        {
            fields.shift_remove("model");
            let (name, value) = match path {
                "/v1/completions" => ("prompt", json!([4, 5, 6])),
                "/v1/chat/completions" => ("messages", json!([{ "role": "user", "content": "4" }])),
                "/v1/responses" if self.rng.one_in(2) => ("input", self.items()),
                "/v1/responses" => ("input", json!("4")),
                "/tokenize" => {
                    fields.shift_remove("messages");
                    ("prompt", json!("4"))
                }
                _ => return body,
            };
            fields.insert(name.to_owned(), value);
            if ["messages", "input"].contains(&name) && self.rng.one_in(4) {
                self.offer(name == "messages", fields);
            }
        }
        body
    }

    /// A call and its result among messages, with a field here and there that is not as it should be.
    fn items(&mut self) -> Value {
        let mut items = [
            json!({ "role": "user", "content": "4" }),
            json!({ "type": "reasoning", "summary": [] }),
            json!({ "type": "message", "role": "assistant", "content": [{ "type": "output_text", "text": "4" }] }),
            json!({ "type": "function_call", "call_id": "c", "name": "f", "arguments": "{}" }),
            json!({ "type": "function_call_output", "call_id": "c", "output": "4" }),
        ];
        for fields in items.iter_mut().filter_map(Value::as_object_mut) {
            for value in fields.values_mut() {
                if self.rng.one_in(30) {
                    *value = self.hostile();
                }
            }
        }
        items.into_iter().filter(|_| !self.rng.one_in(4)).collect()
    }

    /// Tools and a choice that can be met, more often than not.
    fn offer(&mut self, is_chat: bool, fields: &mut Map<String, Value>) {
        let parameters =
            self.rng.pick(&[json!({}), json!({ "type": "object", "properties": 5 }), json!(5)]).clone();
        let function = json!({ "name": "f", "parameters": parameters });
        let tool = match is_chat {
            true => json!({ "type": "function", "function": function }),
            false => json!({ "type": "function", "name": "f", "parameters": parameters }),
        };
        let hostile = self.hostile();
        let choices = [json!("required"), tool.clone(), json!("auto"), json!("none"), hostile];
        fields.insert("tool_choice".to_owned(), self.rng.pick(&choices).clone());
        fields.insert("tools".to_owned(), json!([tool]));
    }
}

#[test]
fn no_request_that_the_document_suggests_or_forbids_is_a_5xx() {
    let server = server();
    let client = server.client;
    let document = client.get("/openapi.json").ok();
    let mut fuzzer =
        Fuzzer { schemas: document["components"]["schemas"].as_object().unwrap(), rng: Rng::new(2026) };
    let mut statuses = std::collections::BTreeMap::<(String, u16), usize>::new();
    for (path, methods) in document["paths"].as_object().unwrap() {
        for (method, route) in methods.as_object().unwrap() {
            let schema = &route["requestBody"]["content"]["application/json"]["schema"];
            let rounds = if schema.is_null() { 20 } else { 300 };
            for round in 0..rounds {
                let body = if schema.is_null() { json!({}) } else { fuzzer.body(path, schema) };
                let odd =
                    ["1", "0", "-1", "a%00b", "%ff", "..%2f..", "9999999999999999999999", "%F0%9F%98%80"];
                let mut target = path.clone();
                for parameter in route["parameters"].as_array().into_iter().flatten() {
                    let (name, value) = (parameter["name"].as_str().unwrap(), *fuzzer.rng.pick(&odd));
                    match parameter["in"].as_str() {
                        Some("path") => target = target.replace(&format!("{{{name}}}"), value),
                        _ => target.push_str(&format!("?{name}={value}&{name}=&=&%")),
                    }
                }
                let reply = client.send(&method.to_uppercase(), &target, &[], body.to_string().as_bytes());
                assert!(reply.status < 500, "round {round}: {method} {target} {body}: {}", reply.text());
                *statuses.entry((path.clone(), reply.status)).or_default() += 1;
                if path == "/debug/sleep" {
                    client.post("/debug/wake_up", &json!({})).ok();
                }
            }
        }
    }
    for path in ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize"] {
        for status in [200, 400] {
            let seen = statuses.get(&(path.to_owned(), status)).copied().unwrap_or(0);
            assert!(seen > 10, "only {seen} answers of {status} from {path}: {statuses:?}");
        }
    }
    eventually("an idle server", || is_idle(&client));
}
