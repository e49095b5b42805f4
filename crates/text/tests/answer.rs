//! Thoughts and tool calls in an answer's text: every format, however the text is cut, and what is malformed.

use bitfast_text::{AnswerParser, AnswerPart, Thinking, ToolFormat, ToolParser};
use proptest::prelude::*;

/// An answer's parts, joined.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Answer {
    reasoning: String,
    content: String,
    calls: Vec<(String, String)>,
    /// The last part was the last call's name or arguments.
    in_call: bool,
}

impl Answer {
    fn take(&mut self, parts: Vec<AnswerPart>) {
        for part in parts {
            let in_call = matches!(part, AnswerPart::Call { .. } | AnswerPart::Arguments { .. });
            let follows = std::mem::replace(&mut self.in_call, in_call);
            match part {
                AnswerPart::Reasoning(text) => {
                    assert!(self.content.is_empty() && self.calls.is_empty(), "a thought after the answer");
                    self.reasoning += &text;
                }
                AnswerPart::Content(text) => self.content += &text,
                AnswerPart::Call { index, name } => {
                    assert_eq!(index as usize, self.calls.len(), "calls come in order");
                    self.calls.push((name, String::new()));
                }
                AnswerPart::Arguments { index, text } => {
                    assert_eq!(index as usize + 1, self.calls.len(), "arguments of the call under way");
                    assert!(follows, "something between a call and its arguments");
                    assert!(!text.is_empty());
                    self.calls[index as usize].1 += &text;
                }
            }
        }
    }
}

const FORMATS: [ToolFormat; 4] =
    [ToolFormat::Hermes, ToolFormat::Llama3Json, ToolFormat::DeepSeekV3, ToolFormat::DeepSeekV31];

fn parser(thinking: Option<Thinking>, format: Option<ToolFormat>) -> AnswerParser {
    AnswerParser::new(thinking, format.map(|format| ToolParser::new(format, ["f", "weather", "get_time"])))
}

fn in_pieces<'a>(mut parser: AnswerParser, pieces: impl IntoIterator<Item = &'a str>) -> Answer {
    let mut answer = Answer::default();
    pieces.into_iter().for_each(|piece| answer.take(parser.push(piece)));
    answer.take(parser.finish());
    Answer { in_call: false, ..answer }
}

fn whole(format: ToolFormat, text: &str) -> Answer {
    in_pieces(parser(None, Some(format)), [text])
}

fn answer(reasoning: &str, content: &str, calls: &[(&str, &str)]) -> Answer {
    let calls = calls.iter().map(|(name, arguments)| ((*name).into(), (*arguments).into())).collect();
    Answer { reasoning: reasoning.into(), content: content.into(), calls, in_call: false }
}

#[test]
fn hermes_calls_among_text() {
    let text = "I look.\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Zü\\\"rich\", \"n\": [1, {}]}}\n\
                </tool_call>\n<tool_call>\n{\"arguments\": {}, \"id\": 7, \"name\": \"f\"}\n</tool_call>\n";
    let expected = [("weather", "{\"city\": \"Zü\\\"rich\", \"n\": [1, {}]}"), ("f", "{}")];
    assert_eq!(whole(ToolFormat::Hermes, text), answer("", "I look.", &expected));
    let one = "<tool_call>{\"name\":\"g\",\"arguments\":{\"a\":1}}</tool_call> Done.";
    assert_eq!(whole(ToolFormat::Hermes, one), answer("", " Done.", &[("g", "{\"a\":1}")]));
    let bare = "<tool_call>{\"name\": \"g\"}";
    assert_eq!(whole(ToolFormat::Hermes, bare), answer("", "", &[("g", "{}")]));
    let text_arguments = "<tool_call>{\"name\": \"g\", \"arguments\": \"{\\\"a\\\": 1}\"}</tool_call>";
    assert_eq!(whole(ToolFormat::Hermes, text_arguments), answer("", "", &[("g", "{\"a\": 1}")]));
    let plain = "No call: <tool_c and < and <tool_call";
    assert_eq!(whole(ToolFormat::Hermes, plain), answer("", plain, &[]));
}

#[test]
fn llama_calls_are_the_whole_answer() {
    for text in [
        "{\"name\": \"weather\", \"parameters\": {\"city\": \"Paris\"}}",
        "<|python_tag|>{\"type\": \"function\", \"name\": \"weather\", \"parameters\": {\"city\": \"Paris\"}}",
        "\n {\"parameters\": {\"city\": \"Paris\"}, \"name\": \"weather\"} ",
    ] {
        assert_eq!(
            whole(ToolFormat::Llama3Json, text),
            answer("", "", &[("weather", "{\"city\": \"Paris\"}")])
        );
    }
    let two = "{\"name\": \"f\", \"parameters\": {}}; {\"name\": \"get_time\", \"arguments\": {\"z\": 1}}";
    assert_eq!(
        whole(ToolFormat::Llama3Json, two),
        answer("", "", &[("f", "{}"), ("get_time", "{\"z\": 1}")])
    );
    // JSON that is an answer, not a call.
    for text in [
        "{\"name\": \"Bob\", \"age\": 3}",
        "{\"name\": \"f\"}",
        "{\"name\": \"unknown\", \"parameters\": {}}",
        "Sure: {\"name\": \"f\", \"parameters\": {}}",
        "{\"city\": ",
        "{}",
        "  ",
    ] {
        assert_eq!(whole(ToolFormat::Llama3Json, text), answer("", text, &[]));
    }
}

#[test]
fn deepseek_calls_in_their_tags() {
    let v3 = "Wait.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{\"city\": \"巴黎\"}\n```\
              <｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>";
    let expected = answer("", "Wait.", &[("weather", "{\"city\": \"巴黎\"}"), ("f", "{}")]);
    assert_eq!(whole(ToolFormat::DeepSeekV3, v3), expected);
    let v31 = "Wait.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{\"city\": \"巴黎\"}<｜tool▁call▁end｜>\
               <｜tool▁call▁begin｜>f<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>";
    assert_eq!(whole(ToolFormat::DeepSeekV31, v31), expected);
    let after = format!("{v31} And more.");
    assert_eq!(whole(ToolFormat::DeepSeekV31, &after).content, "Wait. And more.");
    let cut = &v31[..v31.len() - "<｜tool▁calls▁end｜>".len()];
    assert_eq!(whole(ToolFormat::DeepSeekV31, cut), expected);
}

#[test]
fn malformed_calls_are_text() {
    let hermes = [
        "<tool_call>weather(Paris)</tool_call>",
        "<tool_call>{\"name\": weather}</tool_call>",
        "<tool_call>{\"arguments\": {\"a\": 1}}</tool_call>",
        "<tool_call>{\"name\": \"\", \"arguments\": {}}</tool_call>",
        "<tool_call>{\"name\": \"f\", \"arguments\": [1]}</tool_call>",
        "<tool_call>{\"name\": \"f\", \"name\": \"f\"}</tool_call>",
        "<tool_call>\n{\"nam",
    ];
    let deepseek = [
        "<｜tool▁calls▁begin｜>nothing",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f g<｜tool▁sep｜>{}",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>[]",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>unfinished",
    ];
    for text in hermes {
        assert_eq!(whole(ToolFormat::Hermes, text), answer("", text, &[]));
    }
    for text in deepseek {
        assert_eq!(whole(ToolFormat::DeepSeekV31, text), answer("", text, &[]));
    }
    // Space without end is no fence.
    let spaces = " ".repeat(70);
    let fenced = format!(
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n{spaces}```json\n{{}}\n```<｜tool▁call▁end｜>"
    );
    assert_eq!(whole(ToolFormat::DeepSeekV3, &fenced), answer("", &fenced, &[]));
    let short = fenced.replace(&spaces, "  ");
    assert_eq!(whole(ToolFormat::DeepSeekV3, &short), answer("", "", &[("f", "{}")]));
    // The name was said: what is wrong after it is text, and a later call is one again.
    let late = "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": ?}}</tool_call> \
                <tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call>";
    let expected = answer("", "?}}</tool_call>", &[("f", "{\"a\": "), ("f", "{}")]);
    assert_eq!(whole(ToolFormat::Hermes, late), expected);
}

#[test]
fn thoughts_before_the_answer() {
    let think = |thinking, text: &str| in_pieces(parser(Some(thinking), Some(ToolFormat::Hermes)), [text]);
    let text = "<think>\nHm, 1 < 2.\n</think>\n\nYes.\n";
    assert_eq!(think(Thinking::Tagged, text), answer("Hm, 1 < 2.", "Yes.\n", &[]));
    assert_eq!(think(Thinking::Opened, text), answer("Hm, 1 < 2.", "Yes.\n", &[]));
    assert_eq!(think(Thinking::Opened, "\nHm.</think>Yes."), answer("Hm.", "Yes.", &[]));
    assert_eq!(think(Thinking::Tagged, " No thoughts</think>"), answer("", " No thoughts</think>", &[]));
    assert_eq!(think(Thinking::Tagged, "<think>cut </thi"), answer("cut </thi", "", &[]));
    assert_eq!(think(Thinking::Opened, "cut"), answer("cut", "", &[]));
    assert_eq!(think(Thinking::Tagged, "<think></think>"), answer("", "", &[]));
    assert_eq!(think(Thinking::Tagged, "<thinking"), answer("", "<thinking", &[]));
    let call = "<think>I <tool_call></think>\n<tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call>";
    assert_eq!(think(Thinking::Tagged, call), answer("I <tool_call>", "", &[("f", "{}")]));
    assert_eq!(Thinking::after("<|im_start|>assistant\n<think>\n"), Thinking::Opened);
    assert_eq!(Thinking::after("<|im_start|>assistant\n<think>\n\n</think>\n\n"), Thinking::Tagged);
}

#[test]
fn text_is_held_no_longer_than_needed() {
    let mut parser = parser(Some(Thinking::Tagged), Some(ToolFormat::Hermes));
    let content = |text: &str| vec![AnswerPart::Content(text.into())];
    assert_eq!(parser.push("Hello"), content("Hello"));
    assert_eq!(parser.push(" <tool_"), []);
    assert_eq!(parser.push("box> {"), content(" <tool_box> {"));
    assert_eq!(parser.push("\n<tool_call>{\"name\": \"f\""), []);
    assert_eq!(parser.push(", \"arguments\": "), []);
    let call = AnswerPart::Call { index: 0, name: "f".into() };
    let more = |text: &str| AnswerPart::Arguments { index: 0, text: text.into() };
    assert_eq!(parser.push("{\"a"), [call, more("{\"a")]);
    assert_eq!(parser.push("\": 1}}"), [more("\": 1}")]);
    assert_eq!(parser.push("</tool_call>"), []);
    assert_eq!(parser.finish(), []);
}

/// Texts made of what matters to the parsers, valid or not.
fn texts() -> impl Strategy<Value = String> {
    let pieces = prop::sample::select(vec![
        "<think>",
        "</think>",
        "<tool_call>",
        "</tool_call>",
        "<|python_tag|>",
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁call▁end｜>",
        "<｜tool▁sep｜>",
        "```json\n",
        "\n```",
        "\n",
        " ",
        "function",
        "weather",
        "weather\n",
        "{\"name\": \"f\", \"arguments\": ",
        "{\"name\": \"f\", \"parameters\": ",
        "{\"a\": \"é\\n\"}",
        "{\"a\"",
        "}",
        "{",
        "\"",
        ": 1",
        ",",
        ";",
        "𝄞",
        "<",
        "[1, true]",
        "null",
        "text",
        "{\"name\": \"f\", \"arguments\": {\"x\": [1]}}",
        "{\"arguments\": {}, \"name\": \"weather\"}",
    ]);
    prop::collection::vec(pieces, 0..24).prop_map(|pieces| pieces.concat())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_cut_gives_the_same_answer(text in texts(), cuts in prop::collection::vec(0usize..400, 0..12), mode in 0usize..3) {
        let thinking = [None, Some(Thinking::Tagged), Some(Thinking::Opened)][mode];
        let mut places: Vec<usize> = cuts.into_iter().filter(|at| text.is_char_boundary((*at).min(text.len()))).collect();
        places.extend([0, text.len()]);
        places.retain(|at| *at <= text.len());
        places.sort_unstable();
        let pieces: Vec<&str> = places.windows(2).map(|pair| &text[pair[0]..pair[1]]).collect();
        let chars: Vec<String> = text.chars().map(String::from).collect();
        for format in FORMATS.map(Some).into_iter().chain([None]) {
            let whole = in_pieces(parser(thinking, format), [&*text]);
            prop_assert_eq!(&in_pieces(parser(thinking, format), pieces.clone()), &whole, "{:?}", format);
            prop_assert_eq!(&in_pieces(parser(thinking, format), chars.iter().map(String::as_str)), &whole, "{:?}", format);
        }
    }

    /// Nothing is lost: without thoughts and calls, the content is the text.
    #[test]
    fn text_without_calls_is_content(text in texts()) {
        for format in FORMATS {
            let answer = whole(format, &text);
            if answer.calls.is_empty() && !text.contains("<｜tool▁calls▁end｜>") {
                prop_assert_eq!(&answer.content, &text, "{:?}", format);
            }
        }
    }
}
