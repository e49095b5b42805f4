//! What a constrained row costs: compiling, a text's state, and a mask and a step a token.
//!
//! `grammar_cost FOLDER...`: folders with a `tokenizer.json`. Each text is walked through its grammar 20 times.

use std::path::Path;
use std::time::{Duration, Instant};

use bitfast_text::{Completeness, Grammar, GrammarCompiler, Tokenizer};
use serde_json::json;

fn main() {
    let schema = json!({
        "type": "object",
        "properties": {
            "name": { "type": "string" },
            "age": { "type": "integer", "minimum": 0, "maximum": 120 },
            "address": { "type": "object", "properties": { "city": { "type": "string" }, "zip": { "type": "string" } }, "required": ["city"] },
            "tags": { "type": "array", "items": { "enum": ["one", "two", "three"] }, "maxItems": 5 }
        },
        "required": ["name", "age", "address", "tags"]
    });
    let text = "{\"name\": \"Ada Lovelace of London\", \"age\": 36, \"address\": {\"city\": \"London, near the river\", \
                \"zip\": \"W1\"}, \"tags\": [\"one\", \"three\"]}";
    let cases = [
        ("schema", Grammar::JsonSchema(schema), text),
        ("object", Grammar::JsonObject, text),
        (
            "regex",
            Grammar::Regex("[A-Z][a-z]+( [a-z]+){3,12}\\.".into()),
            "The quick brown fox jumps over the lazy dog.",
        ),
        ("choice", Grammar::Choice(vec!["yes".into(), "no".into()]), "yes"),
    ];
    for folder in std::env::args().skip(1) {
        let tokenizer = Tokenizer::from_dir(Path::new(&folder)).expect("a tokenizer");
        let begin = Instant::now();
        let compiler = GrammarCompiler::new(&tokenizer).expect("a vocabulary");
        println!("{folder}: {} tokens, sorted in {:.0?}", tokenizer.vocab_size(), begin.elapsed());
        for (name, grammar, text) in &cases {
            cost(name, grammar, text, &tokenizer, &compiler);
        }
    }
}

fn cost(name: &str, grammar: &Grammar, text: &str, tokenizer: &Tokenizer, compiler: &GrammarCompiler) {
    let begin = Instant::now();
    let compiled = compiler.compile(grammar).expect("a grammar");
    let compile = begin.elapsed();
    let (mut starts, mut masks, mut steps) = (Vec::new(), Vec::new(), Vec::new());
    let mut words = vec![0; tokenizer.vocab_size().div_ceil(32)];
    for _ in 0..20 {
        let begin = Instant::now();
        let mut matcher = compiled.matcher();
        starts.push(begin.elapsed());
        let mut rest = text;
        while !rest.is_empty() {
            words.fill(0);
            let begin = Instant::now();
            let completeness = matcher.allowed(&mut words).expect("within limits");
            masks.push(begin.elapsed());
            assert_ne!(completeness, Completeness::Final, "{rest:?} is left");
            // The longest allowed token that the text goes on with.
            let allowed = |id: &u32| words[*id as usize / 32] >> (id % 32) & 1 == 1;
            let fits = |id: &u32| {
                tokenizer.token_bytes(*id).is_some_and(|b| !b.is_empty() && rest.as_bytes().starts_with(b))
            };
            let ids = (0..tokenizer.vocab_size() as u32).filter(allowed).filter(fits);
            let token =
                ids.max_by_key(|id| tokenizer.token_bytes(*id).map_or(0, <[u8]>::len)).expect("a token");
            rest = &rest[tokenizer.token_bytes(token).map_or(0, <[u8]>::len)..];
            let begin = Instant::now();
            matcher.accept(token).expect("it was allowed");
            steps.push(begin.elapsed());
        }
    }
    println!(
        "  {name}: compile {compile:.1?}; state {:.1?}; mask {:.1?} median, {:.1?} p99 of {}; step {:.1?} median",
        at(&mut starts, 0.5),
        at(&mut masks, 0.5),
        at(&mut masks, 0.99),
        masks.len(),
        at(&mut steps, 0.5),
    );
}

fn at(times: &mut [Duration], quantile: f64) -> Duration {
    times.sort();
    times[((times.len() - 1) as f64 * quantile) as usize]
}
