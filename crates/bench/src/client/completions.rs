//! `/v1/completions`: asking, and taking in answers whole or as a stream.

use std::borrow::Cow;
use std::collections::BTreeMap;

use hyper::Method;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tokio::time::Instant;

use super::sse::Events;
use super::{Client, Open, Reply, SHOWN};
use crate::error::{Error, Result};

const ROUTE: &str = "/v1/completions";

/// What is to be completed.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Prompt {
    /// One text.
    Text(String),
    /// One prompt in token ids.
    Tokens(Vec<u32>),
    /// Several texts; answers come in their order.
    Texts(Vec<String>),
    /// Several prompts in token ids.
    TokenLists(Vec<Vec<u32>>),
}

/// A request.
#[derive(Clone, Debug)]
pub struct Ask {
    /// Name of the model, as the server serves it.
    pub model: String,
    /// What is to be completed.
    pub prompt: Prompt,
    /// Tokens to generate.
    pub max_tokens: u32,
    /// Further parameters of the body.
    pub more: Map<String, Value>,
    /// A data-parallel rank to run on.
    pub rank: Option<usize>,
}

impl Ask {
    /// Greedy, with nothing else set.
    pub fn new(model: &str, prompt: Prompt, max_tokens: u32) -> Self {
        let more = Map::from_iter([("temperature".to_string(), json!(0))]);
        Self { model: model.to_string(), prompt, max_tokens, more, rank: None }
    }

    /// With one more parameter, or another value for it.
    pub fn with(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.more.insert(name.to_string(), value.into());
        self
    }

    fn body(&self, stream: bool) -> Vec<u8> {
        #[derive(Serialize)]
        struct Body<'a> {
            model: &'a str,
            prompt: &'a Prompt,
            max_tokens: u32,
            #[serde(skip_serializing_if = "std::ops::Not::not")]
            stream: bool,
            #[serde(skip_serializing_if = "Option::is_none")]
            stream_options: Option<StreamOptions>,
            #[serde(flatten)]
            more: Cow<'a, Map<String, Value>>,
        }
        #[derive(Serialize)]
        struct StreamOptions {
            include_usage: bool,
        }
        let Self { model, prompt, max_tokens, .. } = self;
        let mut more = Cow::Borrowed(&self.more);
        // Servers refuse options of a stream where there is none.
        if !stream && more.contains_key("stream_options") {
            more.to_mut().remove("stream_options");
        }
        let own = more.contains_key("stream_options");
        let stream_options = (stream && !own).then_some(StreamOptions { include_usage: true });
        let body = Body { model, prompt, max_tokens: *max_tokens, stream, stream_options, more };
        serde_json::to_vec(&body).expect("plain data")
    }
}

/// Tokens of a request, as the server counts them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Usage {
    /// Of all prompts.
    #[serde(default)]
    pub prompt_tokens: u64,
    /// Of all answers.
    #[serde(default)]
    pub completion_tokens: u64,
    /// More about the prompts.
    #[serde(default)]
    pub prompt_tokens_details: Option<PromptDetails>,
}

/// More about the prompts' tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct PromptDetails {
    /// Those that were found in the prefix cache.
    #[serde(default)]
    pub cached_tokens: Option<u64>,
}

impl Usage {
    /// Prompt tokens that were found in the prefix cache, where the server says so.
    pub fn cached_tokens(&self) -> Option<u64> {
        self.prompt_tokens_details?.cached_tokens
    }
}

/// Log probability of one token.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprob {
    /// The token, as the server writes it.
    pub token: String,
    /// ln p; `None` for the first token of a prompt.
    pub logprob: Option<f32>,
    /// The best tokens.
    pub top: BTreeMap<String, f32>,
}

/// The answer to one prompt.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Answer {
    /// Its text.
    pub text: String,
    /// Its tokens, where the server tells them.
    pub token_ids: Option<Vec<u32>>,
    /// Log probabilities, where asked for.
    pub logprobs: Option<Vec<TokenLogprob>>,
    /// Why it ended.
    pub finish_reason: Option<String>,
}

/// A piece of a streamed answer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Arrival {
    /// When it came.
    pub at: Instant,
    /// Tokens in it.
    pub tokens: u64,
}

/// All that came back.
#[derive(Clone, Debug)]
pub struct Asked {
    /// By prompt.
    pub answers: Vec<Answer>,
    /// Where the server tells it.
    pub usage: Option<Usage>,
    /// The server's `system_fingerprint`.
    pub fingerprint: Option<String>,
    /// When the request was handed to the connection.
    pub sent: Instant,
    /// When each piece with tokens came; of a stream only.
    pub arrivals: Vec<Arrival>,
    /// Whether the arrivals' tokens were counted by ids or by the server, not guessed as one a piece.
    pub counted: bool,
    /// When the last byte had come.
    pub done: Instant,
    /// What answered.
    pub url: String,
}

impl Asked {
    /// The only answer.
    pub fn one(&self) -> Result<&Answer> {
        match &self.answers[..] {
            [answer] => Ok(answer),
            all => Err(Error::answer(&self.url, format!("{} choices instead of 1", all.len()))),
        }
    }

    /// Tokens generated: the server's count, else what was counted on the way.
    pub fn completion_tokens(&self) -> u64 {
        let counted = || self.arrivals.iter().map(|a| a.tokens).sum();
        self.usage.map_or_else(counted, |u| u.completion_tokens)
    }

    /// Fails unless the server's count of tokens is there and right, and agrees with the pieces.
    pub fn expect_tokens(&self, prompt: u64, completion: u64) -> Result {
        let wrong = |message| Err(Error::answer(&self.url, message));
        let Some(usage) = self.usage else { return wrong("the answer has no usage".to_string()) };
        if usage.prompt_tokens != prompt {
            return wrong(format!("usage says {} prompt tokens, {prompt} were sent", usage.prompt_tokens));
        }
        if usage.completion_tokens != completion {
            let said = usage.completion_tokens;
            return wrong(format!("usage says {said} completion tokens, {completion} were asked for"));
        }
        let came: u64 = self.arrivals.iter().map(|a| a.tokens).sum();
        if self.counted && came != completion {
            return wrong(format!("{came} tokens came, but usage says {completion}"));
        }
        Ok(())
    }
}

impl Client {
    /// Asks and reads the whole answer.
    pub async fn complete(&self, ask: &Ask) -> Result<Asked> {
        let url = self.url(ROUTE);
        let sent = Instant::now();
        let mut open = self.send(Method::POST, ROUTE, ask.body(false).into(), ask.rank).await?;
        let mut body = Vec::new();
        open.read_to_end(&mut body).await?;
        let done = Instant::now();
        let reply = Reply { status: open.status, body: body.into(), url: url.clone() };
        if reply.status != 200 {
            return Err(reply.refusal());
        }
        let parsed: Piece =
            serde_json::from_slice(&reply.body).map_err(|e| unreadable(&url, &reply.body, &e))?;
        let mut asked = Asked {
            answers: Vec::new(),
            usage: None,
            fingerprint: None,
            sent,
            arrivals: Vec::new(),
            counted: false,
            done,
            url,
        };
        parsed.add_to(&mut asked, done)?;
        asked.arrivals.clear();
        if asked.answers.is_empty() {
            return Err(Error::answer(&asked.url, "an answer without choices"));
        }
        Ok(asked)
    }

    /// Asks for a stream. Dropping it closes the connection, by which a server knows that nobody listens.
    pub async fn stream(&self, ask: &Ask) -> Result<Streaming> {
        let url = self.url(ROUTE);
        let sent = Instant::now();
        let mut open = self.send(Method::POST, ROUTE, ask.body(true).into(), ask.rank).await?;
        if open.status != 200 {
            let mut body = Vec::new();
            open.read_to_end(&mut body).await?;
            return Err(Reply { status: open.status, body: body.into(), url }.refusal());
        }
        let asked = Asked {
            answers: Vec::new(),
            usage: None,
            fingerprint: None,
            sent,
            arrivals: Vec::new(),
            counted: true,
            done: sent,
            url,
        };
        Ok(Streaming { open, events: Events::default(), asked, done: false })
    }

    /// Asks for a stream and reads it to its end.
    pub async fn stream_all(&self, ask: &Ask) -> Result<Asked> {
        let mut stream = self.stream(ask).await?;
        while stream.advance().await? {}
        stream.finish()
    }
}

/// An answer that is coming.
pub struct Streaming {
    open: Open,
    events: Events,
    asked: Asked,
    done: bool,
}

impl Streaming {
    /// Waits for bytes and takes them in; false at the end.
    pub async fn advance(&mut self) -> Result<bool> {
        let Some(bytes) = self.open.chunk().await? else { return Ok(false) };
        let now = Instant::now();
        let Self { events, asked, done, .. } = self;
        let mut failure = Ok(());
        let url = asked.url.clone();
        let pushed = events.push(&bytes, |data| {
            if failure.is_err() || *done {
                return;
            }
            if data == b"[DONE]" {
                asked.done = now;
                *done = true;
                return;
            }
            failure = serde_json::from_slice::<Piece>(data)
                .map_err(|e| unreadable(&url, data, &e))
                .and_then(|piece| piece.add_to(asked, now));
        });
        pushed.map_err(|_| Error::answer(&url, "an event without end"))?;
        failure.map(|()| true)
    }

    /// What came so far.
    pub fn so_far(&self) -> &Asked {
        &self.asked
    }

    /// All of it, once [`advance`](Self::advance) gave false.
    pub fn finish(self) -> Result<Asked> {
        if !self.done {
            let how = if self.events.is_cut() { "inside of an event" } else { "without [DONE]" };
            return Err(Error::answer(&self.asked.url, format!("the stream ended {how}")));
        }
        if self.asked.answers.is_empty() {
            return Err(Error::answer(&self.asked.url, "a stream without choices"));
        }
        Ok(self.asked)
    }
}

fn unreadable(url: &str, data: &[u8], error: &serde_json::Error) -> Error {
    let shown: String = String::from_utf8_lossy(data).chars().take(SHOWN).collect();
    Error::answer(url, format!("cannot be read ({error}): {shown}"))
}

/// A whole answer, or an event of a stream.
#[derive(Deserialize)]
struct Piece<'a> {
    #[serde(borrow, default)]
    choices: Vec<Choice<'a>>,
    #[serde(default)]
    usage: Option<Usage>,
    #[serde(borrow, default)]
    system_fingerprint: Option<Cow<'a, str>>,
    #[serde(default)]
    error: Option<Value>,
}

#[derive(Deserialize)]
struct Choice<'a> {
    #[serde(default)]
    index: usize,
    #[serde(borrow, default)]
    text: Cow<'a, str>,
    #[serde(default)]
    token_ids: Option<Vec<u32>>,
    #[serde(default)]
    logprobs: Option<Logprobs>,
    #[serde(borrow, default)]
    finish_reason: Option<Cow<'a, str>>,
}

#[derive(Deserialize)]
struct Logprobs {
    #[serde(default)]
    tokens: Vec<String>,
    #[serde(default)]
    token_logprobs: Vec<Option<f32>>,
    #[serde(default)]
    top_logprobs: Option<Vec<Option<BTreeMap<String, f32>>>>,
}

/// Most prompts in one request: an index beyond is a server's mistake.
const MAX_CHOICES: usize = 1 << 16;

impl Piece<'_> {
    fn add_to(self, asked: &mut Asked, now: Instant) -> Result {
        if let Some(error) = self.error.filter(|e| !e.is_null()) {
            let message =
                error.get("message").and_then(Value::as_str).map_or(error.to_string(), str::to_string);
            return Err(Error::answer(&asked.url, message));
        }
        let before = asked.usage.map_or(0, |u| u.completion_tokens);
        let mut tokens = 0;
        let mut by_ids = true;
        let has_choices = !self.choices.is_empty();
        for choice in self.choices {
            let (count, exact) = choice.add_to(asked)?;
            tokens += count;
            by_ids &= exact;
        }
        if let Some(usage) = self.usage {
            if has_choices && !by_ids {
                // The server counts as it goes.
                tokens = usage.completion_tokens.saturating_sub(before);
                by_ids = true;
            }
            asked.usage = Some(usage);
        }
        if asked.fingerprint.is_none() {
            asked.fingerprint = self.system_fingerprint.map(Cow::into_owned);
        }
        if tokens > 0 {
            asked.arrivals.push(Arrival { at: now, tokens });
            asked.counted &= by_ids;
        }
        Ok(())
    }
}

impl Choice<'_> {
    /// Tokens in it, and whether that is more than a guess.
    fn add_to(self, asked: &mut Asked) -> Result<(u64, bool)> {
        if self.index >= MAX_CHOICES {
            return Err(Error::answer(&asked.url, format!("a choice with index {}", self.index)));
        }
        if asked.answers.len() <= self.index {
            asked.answers.resize_with(self.index + 1, Answer::default);
        }
        let answer = &mut asked.answers[self.index];
        answer.text.push_str(&self.text);
        let mut exact = None;
        if let Some(ids) = self.token_ids {
            exact = Some(ids.len() as u64);
            answer.token_ids.get_or_insert_default().extend(ids);
        }
        if let Some(logprobs) = self.logprobs {
            exact = exact.or(Some(logprobs.tokens.len() as u64));
            logprobs.add_to(answer);
        }
        let ends = self.finish_reason.is_some();
        if let Some(reason) = self.finish_reason {
            answer.finish_reason = Some(reason.into_owned());
        }
        // A last piece without text only tells why it ended.
        let guess = u64::from(!(ends && self.text.is_empty()));
        Ok((exact.unwrap_or(guess), exact.is_some()))
    }
}

impl Logprobs {
    fn add_to(self, answer: &mut Answer) {
        let all = answer.logprobs.get_or_insert_default();
        let mut top = self.top_logprobs.unwrap_or_default().into_iter();
        let mut logprobs = self.token_logprobs.into_iter();
        for token in self.tokens {
            let logprob = logprobs.next().flatten();
            all.push(TokenLogprob { token, logprob, top: top.next().flatten().unwrap_or_default() });
        }
    }
}
