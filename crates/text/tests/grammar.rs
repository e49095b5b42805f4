//! Grammars over a small byte-level vocabulary: whatever a random walk of allowed tokens writes is valid, in any
//! tokens; what cannot be compiled is refused in bounded time.

use bitfast_text::{
    AnswerParser, AnswerPart, Completeness, GgufVocab, Grammar, GrammarCompiler, GrammarError, GrammarFault,
    GrammarMatcher, SpecialTokens, Thinking, Tokenizer, ToolFormat, ToolParser,
};
use serde_json::{Value, json};

const EOS: u32 = 0;

/// Every byte in GPT-2's alphabet, a few tokens of several bytes that cross the borders of JSON, and `</s>`.
fn tokenizer() -> Tokenizer {
    let mut next = 256;
    let byte = |b: u8, next: &mut u32| match b {
        b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => b as char,
        _ => {
            *next += 1;
            char::from_u32(*next - 1).unwrap()
        }
    };
    let mut tokens = vec!["</s>".to_owned()];
    tokens.extend((0..=255).map(|b| byte(b, &mut next).to_string()));
    let long = [
        "{\"", "\":", "\",\"", "\"}", "true", "fal", "se", "12", "id", "Ġ\"", "}}", "Ã©", "red", "gre", "en",
    ];
    tokens.extend(long.map(str::to_owned));
    let mut token_types = vec![1; tokens.len()];
    token_types[0] = 3;
    let vocab = GgufVocab {
        model: "gpt2".into(),
        tokens,
        merges: vec!["{ \"".into(), "i d".into(), "\" :".into()],
        token_types,
        pre: Some("gpt-2".into()),
        eos_ids: vec![EOS],
        ..GgufVocab::default()
    };
    Tokenizer::from_gguf(vocab).unwrap()
}

fn allowed(matcher: &mut GrammarMatcher, vocab: usize) -> Result<(Vec<u32>, Completeness), GrammarFault> {
    let mut words = vec![0; vocab.div_ceil(32)];
    let completeness = matcher.allowed(&mut words)?;
    let ids = (0..vocab as u32).filter(|id| words[*id as usize / 32] >> (id % 32) & 1 == 1).collect();
    Ok((ids, completeness))
}

/// A walk of allowed tokens up to a complete text.
fn walk(grammar: &Grammar, tokenizer: &Tokenizer, compiler: &GrammarCompiler, seed: u64) -> String {
    let mut matcher = compiler.compile(grammar).unwrap_or_else(|e| panic!("{grammar:?}: {e}")).matcher();
    let mut state = seed;
    let mut ids = Vec::new();
    for step in 0.. {
        assert!(step < 2000, "{grammar:?} has no end");
        let (choices, completeness) = allowed(&mut matcher, tokenizer.vocab_size()).unwrap();
        assert!(!choices.contains(&EOS), "the end is not a token of the text");
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let drawn = (mixed >> 33) as usize;
        if completeness != Completeness::Partial && (choices.is_empty() || drawn.is_multiple_of(3)) {
            break;
        }
        let token = choices[drawn / 4 % choices.len()];
        ids.push(token);
        if matcher.accept(token).unwrap() == Completeness::Final {
            break;
        }
    }
    tokenizer.decode(&ids, SpecialTokens::Show)
}

fn person() -> Value {
    json!({
        "type": "object",
        "properties": {
            "name": { "type": "string", "maxLength": 8 },
            "age": { "type": "integer", "minimum": 0, "maximum": 120 },
            "tags": { "type": "array", "items": { "enum": ["a", "é", "c d"] }, "maxItems": 3 },
            "next": { "$ref": "#/$defs/leaf" }
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": false,
        "$defs": { "leaf": { "type": ["boolean", "null"] } }
    })
}

#[test]
fn every_walk_through_a_schema_is_valid_json() {
    let tokenizer = tokenizer();
    let compiler = GrammarCompiler::new(&tokenizer).unwrap();
    let grammar = Grammar::JsonSchema(person());
    let mut texts = Vec::new();
    for seed in 0..40 {
        let text = walk(&grammar, &tokenizer, &compiler, seed);
        let value: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{text}: {e}"));
        assert!(value["name"].as_str().unwrap().chars().count() <= 8, "{text}");
        assert!(value["age"].as_u64().unwrap() <= 120, "{text}");
        let tags = value["tags"].as_array().unwrap();
        assert!(
            tags.len() <= 3 && tags.iter().all(|t| ["a", "é", "c d"].contains(&t.as_str().unwrap())),
            "{text}"
        );
        assert!(value.get("next").is_none_or(|next| next.is_boolean() || next.is_null()), "{text}");
        texts.push(text);
    }
    texts.sort();
    texts.dedup();
    assert!(texts.len() > 30, "the grammar leaves the choice: {texts:?}");
}

#[test]
fn objects_regexes_choices_and_lark() {
    let tokenizer = tokenizer();
    let compiler = GrammarCompiler::new(&tokenizer).unwrap();
    let choices = ["red", "redder", "green \"x\"", "é\n"];
    let choice = Grammar::Choice(choices.map(str::to_owned).to_vec());
    let mut seen = Vec::new();
    for seed in 0..40 {
        let text = walk(&choice, &tokenizer, &compiler, seed);
        assert!(choices.contains(&&*text), "{text:?}");
        seen.push(text);
        let text = walk(&Grammar::Regex(r"([0-9]{3}-){2}[a-f]+".into()), &tokenizer, &compiler, seed);
        let (digits, letters) = text.rsplit_once('-').unwrap();
        assert!(
            digits.len() == 7 && digits.split('-').all(|d| d.len() == 3 && d.parse::<u16>().is_ok()),
            "{text}"
        );
        assert!(!letters.is_empty() && letters.bytes().all(|b| b.is_ascii_hexdigit()), "{text}");
        let sums = "start: n (\"+\" n)*\nn: /[0-9]{1,2}/".to_owned();
        let text = walk(&Grammar::Lark(sums), &tokenizer, &compiler, seed);
        assert!(text.split('+').all(|n| n.parse::<u8>().is_ok()), "{text}");
    }
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), choices.len(), "{seen:?}");
}

#[test]
fn any_object_starts_like_one() {
    let tokenizer = tokenizer();
    let compiler = GrammarCompiler::new(&tokenizer).unwrap();
    let mut matcher = compiler.compile(&Grammar::JsonObject).unwrap().matcher();
    for (text, last) in [("{\"id\":12", Completeness::Partial), ("}", Completeness::Final)] {
        let mut completeness = Completeness::Partial;
        for token in tokenizer.encode(text, false).unwrap() {
            assert!(allowed(&mut matcher, 300).unwrap().0.contains(&token), "{text} at {token}");
            completeness = matcher.accept(token).unwrap();
        }
        assert_eq!(completeness, last, "{text}");
    }
    assert_eq!(allowed(&mut matcher, 300).unwrap(), (vec![], Completeness::Final));
}

#[test]
fn a_mask_depends_on_its_own_text_alone() {
    let tokenizer = tokenizer();
    let compiler = GrammarCompiler::new(&tokenizer).unwrap();
    let grammar = Grammar::JsonSchema(person());
    let alone: Vec<String> = (0..6).map(|seed| walk(&grammar, &tokenizer, &compiler, seed)).collect();
    let compiled = compiler.compile(&grammar).unwrap();
    // The same text through two matchers, one of them among others that are elsewhere.
    for text in &alone {
        let mut others: Vec<_> = (0..4).map(|_| compiled.matcher()).collect();
        let (mut a, mut b) = (
            compiled.matcher(),
            GrammarCompiler::new(&tokenizer).unwrap().compile(&grammar).unwrap().matcher(),
        );
        for (i, token) in tokenizer.encode(text, false).unwrap().into_iter().enumerate() {
            let other = &mut others[i % 4];
            if let Some(any) = allowed(other, 300).unwrap().0.first() {
                other.accept(*any).unwrap();
            }
            let (from_a, from_b) = (allowed(&mut a, 300).unwrap(), allowed(&mut b, 300).unwrap());
            assert_eq!(from_a, from_b, "{text} at token {i}");
            if !from_a.0.contains(&token) {
                break; // forced texts come in one way of cutting only
            }
            assert_eq!(a.accept(token).unwrap(), b.accept(token).unwrap());
        }
    }
}

#[test]
fn a_token_that_is_not_allowed_is_a_fault_and_not_a_panic() {
    let tokenizer = tokenizer();
    let compiler = GrammarCompiler::new(&tokenizer).unwrap();
    let mut matcher = compiler.compile(&Grammar::JsonObject).unwrap().matcher();
    assert!(matcher.accept(tokenizer.encode("x", false).unwrap()[0]).is_err());
    assert!(matcher.allowed(&mut [0; 16]).is_err());
}

#[test]
fn hostile_vocabularies_leave_tokens_out_or_are_refused() {
    let with = |more: &mut dyn Iterator<Item = String>| {
        let tokens: Vec<String> = ["a", "b"].into_iter().map(str::to_owned).chain(more).collect();
        let vocab = GgufVocab { model: "gpt2".into(), tokens, ..GgufVocab::default() };
        let tokenizer = Tokenizer::from_gguf(vocab).unwrap();
        (GrammarCompiler::new(&tokenizer), tokenizer.vocab_size())
    };
    let (compiler, vocab) = with(&mut [3, 1023, 1024, 4096].map(|n| "a".repeat(n)).into_iter());
    let mut matcher = compiler.unwrap().compile(&Grammar::Regex("a*".into())).unwrap().matcher();
    assert_eq!(allowed(&mut matcher, vocab).unwrap().0, [0, 2, 3]);
    let (refused, _) = with(&mut (0..4300).map(|i| format!("{i:04}") + &"a".repeat(990)));
    assert!(matches!(refused, Err(GrammarError::Invalid(message)) if message.contains("vocabulary")));
}

#[test]
fn bad_and_hostile_grammars_are_refused() {
    let tokenizer = tokenizer();
    let compiler = GrammarCompiler::new(&tokenizer).unwrap();
    let nested = |open: &str, close: &str, n: usize| open.repeat(n) + &close.repeat(n);
    let mut deep = json!({ "type": "object" });
    for _ in 0..120 {
        deep = json!({ "type": "object", "properties": { "x": deep } });
    }
    let bad = [
        Grammar::Regex("(".into()),
        Grammar::Regex(nested("(", ")", 50_000)),
        Grammar::Regex("x".repeat(300 << 10)),
        Grammar::Lark(String::new()),
        Grammar::Lark("start: nothing".into()),
        Grammar::Lark("start: start".into()),
        Grammar::Lark(format!("start: {}", nested("(", ")", 2000))),
        Grammar::Lark("root ::= \"a\"".into()),
        Grammar::JsonSchema(json!([])),
        Grammar::JsonSchema(json!({ "type": "strong" })),
        Grammar::JsonSchema(json!({ "$ref": "https://example.com/schema.json" })),
        Grammar::JsonSchema(json!({ "$ref": "#/nowhere" })),
        Grammar::JsonSchema(json!({ "type": "integer", "minimum": 5, "maximum": 4 })),
        Grammar::JsonSchema(deep),
        Grammar::Choice(vec![]),
        Grammar::Choice(vec![String::new()]),
        Grammar::Choice(vec!["x".into(); 5000]),
    ];
    for grammar in bad {
        let error = compiler.compile(&grammar).err();
        let shown: String = format!("{grammar:?}").chars().take(80).collect();
        let error = error.unwrap_or_else(|| panic!("{shown} was taken"));
        assert!(error.to_string().len() < 600, "{shown}: {error}");
    }
    assert_eq!(compiler.compile(&Grammar::Choice(vec![])).unwrap_err(), GrammarError::Choices);
    let after = Grammar::Choice(vec![]).after_thoughts(Thinking::Tagged);
    assert_eq!(after.unwrap_err(), GrammarError::Choices);
}

/// Small to write, large to follow: each is refused, faults, or goes on, within the limits of every step.
#[test]
fn costly_grammars_end() {
    let tokenizer = tokenizer();
    let compiler = GrammarCompiler::new(&tokenizer).unwrap();
    let any_of = |n: usize| -> Value {
        let forms = (0..n)
            .map(|i| json!({ "type": "object", "properties": { format!("k{i}"): { "type": "string" } } }));
        json!({ "anyOf": forms.collect::<Vec<_>>() })
    };
    let mut doubling = json!({ "type": "string" });
    for i in 0..9 {
        doubling = json!({ "type": "object", "properties": {
            format!("a{i}"): doubling, format!("b{i}"): doubling }, "required": [format!("a{i}")] });
    }
    let costly = [
        Grammar::Regex("a{1000000000}".into()),
        Grammar::Regex("((((((a{1,99}){1,99}){1,99}){1,99}){1,99}){1,99})".into()),
        Grammar::Regex("(a|aa|aaa|b)*(a?){200}a{200}".into()),
        Grammar::Regex("(.*a.{20}b|.*b.{25}c)+".into()),
        Grammar::Regex("(?i)(x|y|\\p{L}){100}\\w+(?-u:.)*".into()),
        Grammar::Regex(format!(
            "({})*z",
            (0..300).map(|i| format!("a{{{i}}}b")).collect::<Vec<_>>().join("|")
        )),
        Grammar::Lark("start: a a a a a a\na: \"x\" | a a | \"\"".into()),
        Grammar::Lark("start: a\na: a a a | /x/ | \"x\" a \"x\"?".into()),
        Grammar::JsonSchema(json!({ "type": "string", "pattern": "(a{1,500}){1,500}(b{1,500}){1,500}" })),
        Grammar::JsonSchema(json!({ "type": "array", "minItems": 1_000_000_000, "items": {} })),
        Grammar::JsonSchema(json!({ "type": "array", "maxItems": 100_000, "items": { "type": "null" } })),
        Grammar::JsonSchema(json!({ "type": "string", "minLength": 4_000_000_000u64 })),
        Grammar::JsonSchema(json!({ "type": "number", "multipleOf": 1e-30, "minimum": 1e300 })),
        Grammar::JsonSchema(json!({ "enum": (0..20_000).map(|i| format!("word{i}")).collect::<Vec<_>>() })),
        Grammar::JsonSchema(any_of(300)),
        Grammar::JsonSchema(json!({ "allOf": [any_of(40), any_of(40)] })),
        Grammar::JsonSchema(doubling),
        Grammar::JsonSchema(json!({ "$ref": "#" })),
        Grammar::JsonSchema(
            json!({ "$defs": { "a": { "anyOf": [{ "$ref": "#/$defs/a" }, { "type": "null" }] } }, "$ref": "#/$defs/a" }),
        ),
    ];
    let mut taken = 0;
    for grammar in costly {
        let shown: String = format!("{grammar:?}").chars().take(80).collect();
        match compiler.compile(&grammar) {
            Ok(compiled) => {
                taken += 1;
                follow(compiled.matcher(), tokenizer.vocab_size());
            }
            Err(error) => assert!(error.to_string().len() < 600, "{shown}: {error}"),
        }
    }
    assert!(taken > 10, "most are valid: {taken}");
}

/// Some steps, up to a fault or the end.
fn follow(mut matcher: GrammarMatcher, vocab: usize) {
    for step in 0..60 {
        let Ok((choices, _)) = allowed(&mut matcher, vocab) else { return };
        let Some(token) = choices.get(step * 7 % choices.len().max(1)) else { return };
        if matcher.accept(*token).is_err() {
            return;
        }
    }
}

/// Whether the whole text, in the model's own tokens, is what the grammar allows.
fn accepts(grammar: &Grammar, compiler: &GrammarCompiler, text: &str) -> bool {
    let compiled = compiler.compile(grammar).unwrap_or_else(|e| panic!("{grammar:?}: {e}"));
    let mut matcher = compiled.matcher();
    let mut completeness = Completeness::Partial;
    for byte in text.bytes() {
        // Byte by byte: a forced text may come in one way of cutting only, but that way begins with its bytes.
        let token = u32::from(byte) + 1;
        let Ok(next) = matcher.accept(token) else { return false };
        completeness = next;
    }
    completeness != Completeness::Partial
}

#[test]
fn calls_and_answers_after_thoughts() {
    let tokenizer = tokenizer();
    let compiler = GrammarCompiler::new(&tokenizer).unwrap();
    let city =
        json!({ "type": "object", "properties": { "city": { "type": "string" } }, "required": ["city"] });
    let tools =
        [("weather".to_owned(), city), ("now".to_owned(), json!({ "type": "object", "properties": {} }))];
    let cases = [
        (
            ToolFormat::Hermes,
            "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Paris\"}}\n</tool_call>",
            "\n<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>",
            "",
        ),
        (
            ToolFormat::Llama3Json,
            "{\"name\": \"weather\", \"parameters\": {\"city\": \"Paris\"}}",
            "; {\"name\": \"now\", \"parameters\": {}}",
            "",
        ),
        (
            ToolFormat::DeepSeekV3,
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{\"city\": \"Paris\"}\n```<｜tool▁call▁end｜>",
            "\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜>",
            "<｜tool▁calls▁end｜>",
        ),
        (
            ToolFormat::DeepSeekV31,
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{\"city\": \"Paris\"}<｜tool▁call▁end｜>",
            "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜>",
            "<｜tool▁calls▁end｜>",
        ),
    ];
    for (format, first, second, end) in cases {
        let accepts =
            |many, thinking, text: &str| accepts(&format.grammar(&tools, many, thinking), &compiler, text);
        let (one, two) = (format!("{first}{end}"), format!("{first}{second}{end}"));
        assert!(accepts(false, None, &one), "{format}: {one}");
        assert!(!accepts(false, None, &two), "{format}: one call only");
        assert!(accepts(true, None, &one) && accepts(true, None, &two), "{format}: {two}");
        assert!(!accepts(true, None, "Hello"), "{format}");
        assert!(!accepts(true, None, &one.replace("Paris\"", "Paris\", \"x\"")), "{format}");
        let thought = format!("<think>\nWell < 3.\n</think>\n\n{one}");
        assert!(
            accepts(false, Some(Thinking::Tagged), &thought) && accepts(false, Some(Thinking::Tagged), &one)
        );
        assert!(
            accepts(false, Some(Thinking::Opened), &thought["<think>".len()..])
                && !accepts(false, None, &thought)
        );
        // What the grammar forces, the parser reads.
        let mut parser = AnswerParser::new(None, Some(ToolParser::new(format, ["weather", "now"])));
        let mut parts = parser.push(&two);
        parts.extend(parser.finish());
        let call = |index, name: &str| AnswerPart::Call { index, name: name.into() };
        let arguments = |index, text: &str| AnswerPart::Arguments { index, text: text.into() };
        assert_eq!(
            parts,
            [call(0, "weather"), arguments(0, "{\"city\": \"Paris\"}"), call(1, "now"), arguments(1, "{}")]
        );
    }
    let forms = [
        (Grammar::JsonObject, "{\"a\": 1}"),
        (Grammar::JsonSchema(json!({ "type": "boolean" })), "true"),
        (Grammar::Regex("a+/b".into()), "aa/b"),
        (Grammar::Choice(vec!["yes".into(), "no".into()]), "no"),
    ];
    for (grammar, text) in forms {
        let opened = grammar.clone().after_thoughts(Thinking::Opened).unwrap();
        assert!(accepts(&opened, &compiler, &format!("Hm. true? </think>\n{text}")), "{grammar:?}");
        assert!(!accepts(&opened, &compiler, "Hm. true? </think>\n?"), "{grammar:?}");
        assert!(accepts(&grammar.after_thoughts(Thinking::Tagged).unwrap(), &compiler, text));
    }
}
