use super::tags::{Found, TagFinder};
use crate::chat::ChatTemplate;

/// Where a model's thoughts begin: between `<think>` and `</think>`, as Qwen3 and DeepSeek-R1 write them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Thinking {
    /// The prompt ended inside of the thoughts; the text goes on with them.
    Opened,
    /// The text begins with `<think>`, or has no thoughts.
    Tagged,
}

/// `<think>`.
pub(super) const OPEN: &str = "<think>";
/// `</think>`.
pub(super) const CLOSE: &str = "</think>";

impl Thinking {
    /// After a prompt, for a model that thinks.
    pub fn after(prompt: &str) -> Self {
        if prompt.trim_end().ends_with(OPEN) { Self::Opened } else { Self::Tagged }
    }

    /// Whether a model with this chat template may write thoughts in these tags.
    pub fn in_template(template: &ChatTemplate) -> bool {
        template.source().contains(CLOSE)
    }
}

/// What a piece of text added.
#[derive(Debug, Default)]
pub(super) struct Thought {
    pub reasoning: String,
    pub content: String,
}

#[derive(Debug)]
pub(super) struct ThoughtParser {
    state: State,
    /// White space that is left out when a tag follows.
    space: String,
}

#[derive(Debug)]
enum State {
    /// Up to the first character that is not white space: does it begin with a tag?
    Start(TagFinder),
    /// In the thoughts; `begun` once they have a character other than white space.
    Inside { finder: TagFinder, begun: bool },
    /// After the thoughts, before the answer's first character.
    Between,
    /// In the answer.
    Outside,
}

impl ThoughtParser {
    pub fn new(thinking: Thinking) -> Self {
        let state = match thinking {
            Thinking::Opened => State::inside(),
            Thinking::Tagged => State::Start(TagFinder::new(&[OPEN])),
        };
        Self { state, space: String::new() }
    }

    pub fn push(&mut self, text: &str) -> Thought {
        let mut said = Thought::default();
        for (at, c) in text.char_indices() {
            if matches!(self.state, State::Outside) {
                said.content.push_str(&text[at..]);
                break;
            }
            self.step(c, &mut said);
        }
        said
    }

    pub fn finish(&mut self) -> Thought {
        let mut said = Thought::default();
        match &mut self.state {
            State::Start(finder) => said.content = std::mem::take(&mut self.space) + &finder.finish(),
            State::Inside { finder, .. } => {
                let rest = finder.finish();
                self.thought(&rest, &mut said);
            }
            State::Between | State::Outside => {}
        }
        self.state = State::Outside;
        said
    }

    fn step(&mut self, c: char, said: &mut Thought) {
        match &mut self.state {
            State::Start(finder) => match finder.push(c) {
                Found::Nothing => {}
                Found::Tag(..) => {
                    self.space.clear();
                    self.state = State::inside();
                }
                Found::Text(text) if text.trim().is_empty() => self.space.push_str(&text),
                Found::Text(text) => {
                    let held = finder.finish();
                    said.content = std::mem::take(&mut self.space) + &text + &held;
                    self.state = State::Outside;
                }
            },
            State::Inside { finder, .. } => match finder.push(c) {
                Found::Nothing => {}
                Found::Text(text) => self.thought(&text, said),
                Found::Tag(text, CLOSE) => {
                    self.thought(&text, said);
                    self.space.clear();
                    self.state = State::Between;
                }
                // The prompt opened the thoughts, and the model did it again.
                Found::Tag(text, open) => {
                    let again = matches!(self.state, State::Inside { begun: false, .. });
                    let shown = if again { text } else { text + open };
                    self.thought(&shown, said);
                }
            },
            State::Between if c.is_whitespace() => {}
            State::Between | State::Outside => {
                said.content.push(c);
                self.state = State::Outside;
            }
        }
    }

    /// More thoughts, without the white space at both ends.
    fn thought(&mut self, text: &str, said: &mut Thought) {
        let State::Inside { begun, .. } = &mut self.state else { return };
        for c in text.chars() {
            if c.is_whitespace() {
                self.space.push(c);
                continue;
            }
            if *begun {
                said.reasoning.push_str(&self.space);
            }
            *begun = true;
            self.space.clear();
            said.reasoning.push(c);
        }
    }
}

impl State {
    fn inside() -> Self {
        Self::Inside { finder: TagFinder::new(&[OPEN, CLOSE]), begun: false }
    }
}

/// The rule `start` of a grammar whose answer is the rule `body`, after thoughts if there are to be any.
pub(crate) fn start(thinking: Option<Thinking>) -> String {
    let thoughts = "thoughts[suffix=\"</think>\"]: /(?s:.*)/\nspace: /[ \\n\\r\\t]*/\n";
    match thinking {
        None => "start: body\n".to_owned(),
        Some(Thinking::Opened) => format!("start: thoughts space body\n{thoughts}"),
        Some(Thinking::Tagged) => format!("start: body | \"<think>\" thoughts space body\n{thoughts}"),
    }
}
