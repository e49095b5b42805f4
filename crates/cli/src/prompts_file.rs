//! Files of prompts and of answers, as JSON Lines.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{BufRead, BufReader, Read, Seek, Write};
use std::path::{Path, PathBuf};

use bitfast::{ChatMessage, Prompt, Request, RequestOutput, SamplingParams};
use serde_json::{Map, Value};

use crate::exit::{Exit, Outcome};

/// One line of a prompts file.
#[derive(Debug, PartialEq)]
pub struct PromptLine {
    /// From 1.
    pub line: usize,
    /// The line's `id`, else its number.
    pub id: String,
    /// What to ask.
    pub request: Request,
}

/// Reads all prompts; the error names the first bad line. `defaults` are the sampling parameters of lines
/// that do not say otherwise.
pub fn read(path: &Path, defaults: &SamplingParams) -> Outcome<Vec<PromptLine>> {
    let at_file = |e: &dyn std::fmt::Display| Exit::User(format!("{}: {e}", path.display()));
    let file = File::open(path).map_err(|e| at_file(&e))?;
    let mut lines = Vec::new();
    let mut seen = BTreeMap::new();
    for (index, text) in BufReader::new(file).lines().enumerate() {
        let line = index + 1;
        let at_line = |e: String| Exit::User(format!("{}:{line}: {e}", path.display()));
        let text = text.map_err(|e| at_line(e.to_string()))?;
        if text.trim().is_empty() {
            continue;
        }
        let parsed = parse(&text, line, defaults).map_err(at_line)?;
        if let Some(first) = seen.insert(parsed.id.clone(), line) {
            return Err(at_line(format!("id {:?} is already that of line {first}", parsed.id)));
        }
        lines.push(parsed);
    }
    if lines.is_empty() {
        return Err(at_file(&"no prompts in it"));
    }
    Ok(lines)
}

fn parse(text: &str, line: usize, defaults: &SamplingParams) -> Result<PromptLine, String> {
    let value: Value = serde_json::from_str(text).map_err(|e| format!("not JSON: {e}"))?;
    let Value::Object(mut map) = value else { return Err("expected a JSON object".into()) };
    let id = match map.remove("id") {
        None | Some(Value::Null) => line.to_string(),
        Some(Value::String(id)) => id,
        Some(Value::Number(id)) => id.to_string(),
        Some(other) => return Err(format!("id: expected a string or a number, got {other}")),
    };
    let prompt = prompt(&mut map)?;
    // The line's fields replace the defaults' ones; names are checked by the parameters themselves.
    let Ok(Value::Object(mut params)) = serde_json::to_value(defaults) else {
        unreachable!("parameters are a JSON object")
    };
    params.extend(map);
    let params: SamplingParams = serde_json::from_value(Value::Object(params)).map_err(|e| e.to_string())?;
    Ok(PromptLine { line, id: id.clone(), request: Request { id: Some(id), ..Request::new(prompt, params) } })
}

fn prompt(map: &mut Map<String, Value>) -> Result<Prompt, String> {
    let names = ["prompt", "prompt_token_ids", "messages"];
    let mut given = names.into_iter().filter_map(|name| Some((name, map.remove(name)?)));
    let (name, value) =
        given.next().ok_or("expected one of \"prompt\", \"prompt_token_ids\", \"messages\"")?;
    if let Some((other, _)) = given.next() {
        return Err(format!("{name:?} and {other:?} exclude each other"));
    }
    let wrong = |e: serde_json::Error| format!("{name}: {e}");
    Ok(match name {
        "prompt" => Prompt::Text(serde_json::from_value(value).map_err(wrong)?),
        "prompt_token_ids" => Prompt::Tokens(serde_json::from_value(value).map_err(wrong)?),
        _ => Prompt::Chat(serde_json::from_value::<Vec<ChatMessage>>(value).map_err(wrong)?),
    })
}

/// How the line of an answer begins.
const ANSWER_START: &[u8] = br#"{"request_id":"#;

/// The file that answers are appended to, held by one process at a time.
#[derive(Debug)]
pub struct Answers {
    file: File,
    path: PathBuf,
    done: BTreeMap<String, Answered>,
}

/// What is known of an answer.
#[derive(Debug)]
struct Answered {
    fingerprint: String,
    /// Of the prompt's text, where it was one.
    text: Option<u64>,
    /// Of the prompt's token ids.
    ids: u64,
}

impl Answers {
    /// Opens or creates it, gathers what is answered already and cuts off a half-written answer at the end; a file that has anything
    /// else in it stays as it is.
    pub fn open(path: &Path) -> Outcome<Self> {
        let at = |e: &dyn std::fmt::Display| Exit::User(format!("{}: {e}", path.display()));
        // Before it is opened: that waits for the other end of a pipe.
        if path.metadata().is_ok_and(|found| !found.is_file()) {
            return Err(at(&"not a file; answers are read again to resume"));
        }
        let mut options = OpenOptions::new();
        let mut file = options.read(true).append(true).create(true).open(path).map_err(|e| at(&e))?;
        file.try_lock().map_err(|_| at(&"another run is writing to it"))?;
        let mut text = Vec::new();
        file.read_to_end(&mut text).map_err(|e| at(&e))?;
        let complete = text.iter().rposition(|b| *b == b'\n').map_or(0, |end| end + 1);
        let mut done = BTreeMap::new();
        for (index, line) in text[..complete].split(|b| *b == b'\n').enumerate() {
            if line.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            let entry = answered(line).ok_or_else(|| {
                Exit::User(format!("{}:{}: not an answer of bitfast", path.display(), index + 1))
            })?;
            done.insert(entry.0, entry.1);
        }
        let partial = &text[complete..];
        if !partial.starts_with(&ANSWER_START[..ANSWER_START.len().min(partial.len())]) {
            return Err(at(&"its last line is not an answer of bitfast"));
        }
        file.set_len(complete as u64).and_then(|()| file.rewind()).map_err(|e| at(&e))?;
        Ok(Self { file, path: path.to_path_buf(), done })
    }

    /// Ids that need not be asked again.
    pub fn done(&self) -> BTreeSet<&str> {
        self.done.keys().map(String::as_str).collect()
    }

    /// Refuses to take the answer to one prompt for that to another one with its id. (A chat's text is known to the model
    /// only, and is not looked at.)
    pub fn check_prompts(&self, lines: &[PromptLine]) -> Outcome {
        let is_other = |line: &&PromptLine| {
            let Some(answered) = self.done.get(&line.id) else { return false };
            match &line.request.prompt {
                Prompt::Text(text) => answered.text != Some(digest(text)),
                Prompt::Tokens(ids) => {
                    line.request.params.truncate_prompt_tokens.is_none() && answered.ids != digest(ids)
                }
                Prompt::Chat(_) => false,
            }
        };
        match lines.iter().find(is_other) {
            None => Ok(()),
            Some(line) => Err(Exit::User(format!(
                "{}: the answer to {:?} is one to another prompt than that of line {}; choose another output file",
                self.path.display(),
                line.id,
                line.line
            ))),
        }
    }

    /// Refuses to mix answers of different bits in one file.
    pub fn check_fingerprint(&self, ours: &str) -> Outcome {
        match self.done.iter().find(|(_, theirs)| theirs.fingerprint != ours) {
            None => Ok(()),
            Some((id, Answered { fingerprint, .. })) => Err(Exit::User(format!(
                "{}: the answer to {id:?} has system_fingerprint {fingerprint}, this model's is {ours}; choose another \
                 output file",
                self.path.display()
            ))),
        }
    }

    /// Appends one answer as one write: an interruption leaves at most one partial line.
    pub fn append(&mut self, output: &RequestOutput) -> Outcome {
        let mut line = serde_json::to_vec(output).expect("outputs are plain data");
        line.push(b'\n');
        self.file.write_all(&line).map_err(|e| Exit::User(format!("{}: {e}", self.path.display())))
    }
}

/// Id of an answer, and the rest.
fn answered(line: &[u8]) -> Option<(String, Answered)> {
    let value: Value = serde_json::from_slice(line).ok()?;
    let field = |name: &str| value.get(name)?.as_str().map(str::to_string);
    let ids = value["prompt_token_ids"].as_array().into_iter().flatten();
    let ids: Vec<u32> = ids.filter_map(|id| u32::try_from(id.as_u64()?).ok()).collect();
    let fingerprint = field("system_fingerprint")?;
    let text = field("prompt").map(|text| digest(&text));
    Some((field("request_id")?, Answered { fingerprint, text, ids: digest(&ids) }))
}

/// For comparisons within this process.
fn digest(value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(outcome: Outcome<impl std::fmt::Debug>) -> String {
        match outcome {
            Err(Exit::User(message)) => message,
            other => panic!("expected a user error, got {other:?}"),
        }
    }

    fn file(text: &str) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.jsonl");
        std::fs::write(&path, text).unwrap();
        (dir, path)
    }

    #[test]
    fn lines_take_the_defaults_and_their_own_fields() {
        let (_dir, path) = file(concat!(
            r#"{"prompt": "a", "temperature": 0.5, "stop": "x"}"#,
            "\n\n",
            r#"{"id": 7, "prompt_token_ids": [1, 2]}"#,
            "\n",
            r#"{"id": "c", "messages": [{"role": "user", "content": "hi"}]}"#
        ));
        let defaults = SamplingParams { max_tokens: Some(9), ..SamplingParams::greedy() };
        let lines = read(&path, &defaults).unwrap();
        let ids: Vec<_> = lines.iter().map(|l| (l.line, l.id.as_str())).collect();
        assert_eq!(ids, [(1, "1"), (3, "7"), (4, "c")]);
        let params = &lines[0].request.params;
        assert_eq!((params.temperature, params.max_tokens), (Some(0.5), Some(9)));
        assert_eq!(params.stop, ["x"]);
        assert_eq!(lines[1].request.prompt, Prompt::Tokens(vec![1, 2]));
        assert_eq!(lines[1].request.params, defaults);
        assert!(matches!(&lines[2].request.prompt, Prompt::Chat(m) if m.len() == 1));
    }

    #[test]
    fn bad_lines_are_named() {
        for (text, culprit) in [
            ("{\"prompt\": \"a\"}\n{\"prompt\"", "p.jsonl:2: not JSON"),
            ("[1]", "p.jsonl:1: expected a JSON object"),
            ("{\"id\": \"x\"}", "p.jsonl:1: expected one of"),
            ("{\"prompt\": \"a\", \"messages\": []}", "exclude each other"),
            ("{\"prompt\": \"a\", \"temprature\": 1}", "temprature"),
            ("{\"prompt\": 3}", "p.jsonl:1: prompt:"),
            ("{\"prompt\": \"a\", \"top_k\": \"many\"}", "p.jsonl:1: "),
            ("{\"id\": \"1\", \"prompt\": \"a\"}\n{\"id\": 1, \"prompt\": \"b\"}", "already that of line 1"),
            ("\n", "no prompts"),
        ] {
            let (_dir, path) = file(text);
            let got = message(read(&path, &SamplingParams::default()));
            assert!(got.contains(culprit), "{text}: {got}");
        }
        assert!(
            message(read(Path::new("/no/such.jsonl"), &SamplingParams::default())).contains("/no/such.jsonl")
        );
    }

    #[test]
    fn answers_resume_after_a_half_written_line() {
        let good = r#"{"request_id":"a","system_fingerprint":"f"}"#;
        let (_dir, path) = file(&format!("{good}\n{{\"request_id\":\"b\",\"sys"));
        let answers = Answers::open(&path).unwrap();
        assert_eq!(answers.done().into_iter().collect::<Vec<_>>(), ["a"]);
        answers.check_fingerprint("f").unwrap();
        assert!(message(answers.check_fingerprint("g")).contains("system_fingerprint f"));
        assert!(message(Answers::open(&path)).contains("another run"));
        drop(answers);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), format!("{good}\n"));
    }

    #[test]
    fn an_answer_is_one_to_its_prompt() {
        let answer = |id: &str, prompt: &str, ids: &str| {
            format!(
                "{{\"request_id\":\"{id}\",\"prompt\":{prompt},\"prompt_token_ids\":{ids},\"system_fingerprint\":\"f\"}}\n"
            )
        };
        let all =
            answer("1", "\"a\"", "[7]") + &answer("2", "null", "[1,2]") + &answer("3", "\"<user>a\"", "[5]");
        let (_dir, path) = file(&all);
        let answers = Answers::open(&path).unwrap();
        let check = |lines: &str| {
            let (_dir, path) = file(lines);
            answers.check_prompts(&read(&path, &SamplingParams::default()).unwrap())
        };
        let chat = r#"{"messages": [{"role": "user", "content": "b"}]}"#;
        check(&format!("{{\"prompt\": \"a\"}}\n{{\"prompt_token_ids\": [1, 2]}}\n{chat}\n{chat}")).unwrap();
        for other in [r#"{"prompt": "b"}"#, r#"{"prompt_token_ids": [1]}"#, r#"{"prompt": "a", "id": 2}"#] {
            let told = message(check(other));
            assert!(told.contains("is one to another prompt than that of line 1"), "{other}: {told}");
        }
        let cut = r#"{"prompt_token_ids": [0, 1, 2], "id": 2, "truncate_prompt_tokens": 2}"#;
        check(cut).unwrap();
    }

    #[test]
    fn other_files_are_not_taken_for_answers() {
        let (_dir, path) = file("{\"request_id\":\"a\"}\nhello\n");
        assert!(message(Answers::open(&path)).contains("p.jsonl:1: not an answer"));
        assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), 2, "it is left alone");
        assert!(message(Answers::open(Path::new("/no/such/dir/x.jsonl"))).contains("/no/such/dir/x.jsonl"));
    }

    #[test]
    fn a_file_of_something_else_stays_as_it_is() {
        let (dir, path) = file("");
        for text in
            ["notes, in one line", "{\"prompt\": \"a\"}\n{\"prompt\": \"b\"}", "{\"request\": 1}", "\u{0}"]
        {
            std::fs::write(&path, text).unwrap();
            assert!(message(Answers::open(&path)).contains("not an answer of bitfast"));
            assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
        }
        // What an answer may begin with goes.
        for text in ["", "{", "{\"request_id\":\"1\",\"pro"] {
            std::fs::write(&path, text).unwrap();
            assert!(Answers::open(&path).unwrap().done().is_empty());
            assert_eq!(std::fs::read_to_string(&path).unwrap(), "");
        }
        assert!(message(Answers::open(dir.path())).contains("not a file"));
        #[cfg(unix)]
        assert!(message(Answers::open(Path::new("/dev/null"))).contains("not a file"));
    }
}
