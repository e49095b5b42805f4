//! The server under check: what it can do, and how it is asked alone.

use std::sync::Mutex;
use std::sync::atomic::AtomicBool;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::Value;

use super::crowd::ask_for;
use crate::client::{Answer, Ask, Asked, Client, Prompt, TokenLogprob};
use crate::error::{Error, Result};
use crate::iterations::{Control, Dialect, LastSteps, Sleeper, metric, served_model};
use crate::random::Random;

/// How prompts are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// English words.
    Text,
    /// Ids that every vocabulary has, for servers without a tokenizer.
    Tokens,
}

/// One prompt.
#[derive(Clone, Debug, PartialEq)]
pub enum One {
    /// A text.
    Text(String),
    /// Token ids.
    Tokens(Vec<u32>),
}

impl From<One> for Prompt {
    fn from(one: One) -> Self {
        match one {
            One::Text(text) => Self::Text(text),
            One::Tokens(ids) => Self::Tokens(ids),
        }
    }
}

/// What a server takes and tells, found out by asking.
#[derive(Clone, Debug)]
pub struct Abilities {
    pub kind: Kind,
    /// Takes `ignore_eos`.
    pub ignore_eos: bool,
    /// Takes `return_token_ids`, and tells them.
    pub token_ids: bool,
    /// Takes this value of `logprobs`, and tells them.
    pub logprobs: Option<u32>,
    /// Takes several prompts in one request.
    pub lists: bool,
    pub streams: bool,
    /// Why it takes no `seed`; `None` where it does.
    pub no_seed: Option<String>,
}

/// How cached prefixes are forgotten.
enum Reset {
    Bitfast,
    /// POST there.
    Route(&'static str),
    /// Not at all, but requests with a `cache_salt` of their own find nothing.
    Salt,
    Never,
}

/// Whether a prompt has to be computed anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fresh {
    /// The cache was reset.
    Reset,
    /// Its `cache_salt` is new.
    Salted,
    /// It may be in the cache.
    Unknown,
}

/// A server under check.
pub struct Probe {
    pub client: Client,
    pub model: String,
    pub can: Abilities,
    seed: u64,
    /// Of this run: prompts that no earlier run has left in a cache.
    pub run: u64,
    /// Of a prompt's text, rounded up.
    tokens_per_word: usize,
    reset: Reset,
    pub(super) control: Option<Control>,
    pub(super) sleeper: Sleeper,
    pub(super) last_steps: Mutex<LastSteps>,
    /// The server was paused and did not report what queued.
    pub(super) queue_is_hidden: AtomicBool,
    /// Most tokens of a step, where told.
    pub step_budget: Option<usize>,
    /// Most tokens of prompt and answer, where told.
    pub max_len: Option<usize>,
    /// Tells equal from unequal numerics, where told.
    pub fingerprint: Option<String>,
}

const WORDS: &[&str] = &[
    "the", "river", "light", "under", "seven", "stones", "a", "garden", "where", "old", "letters", "were",
    "found", "by", "chance", "and", "nobody", "knew", "why", "music", "began", "again", "after", "winter",
    "with", "blue", "paper", "on", "tables", "of", "glass", "while", "every", "train", "left", "station",
    "early", "to", "mountain", "roads", "that", "turned", "slowly", "into", "fields", "full", "children",
    "reading", "about", "distant", "islands", "she", "wrote", "numbers", "from", "memory", "before",
    "morning", "rain", "stopped", "his", "clock", "at", "noon",
];

/// Ids that every vocabulary has.
const SMALL_VOCAB: u32 = 250;
/// Candidates whose log probabilities are asked for: the most of OpenAI's API, else the least.
const LOGPROBS: [u32; 2] = [5, 1];
/// Words of the prompts that abilities are asked with.
const SMALL: usize = 6;
/// Tokens of a prompt that is surely worth a cache's block.
const SALTED: usize = 100;

impl Probe {
    /// Finds out what the server can do.
    pub async fn new(client: Client, model: Option<&str>, seed: u64, sleeper: Sleeper) -> Result<Self> {
        let model = match model {
            Some(model) => model.to_string(),
            None => served_model(&client).await?,
        };
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut probe = Self {
            client,
            model,
            can: Abilities {
                kind: Kind::Text,
                ignore_eos: false,
                token_ids: false,
                logprobs: None,
                lists: false,
                streams: false,
                no_seed: None,
            },
            seed,
            run: since.as_nanos() as u64,
            tokens_per_word: 1,
            reset: Reset::Never,
            control: None,
            sleeper,
            last_steps: Mutex::default(),
            queue_is_hidden: AtomicBool::new(false),
            step_budget: None,
            max_len: None,
            fingerprint: None,
        };
        probe.find_control().await?;
        probe.find_abilities().await?;
        probe.find_reset().await?;
        probe.new_steps().await?;
        Ok(probe)
    }

    async fn find_control(&mut self) -> Result {
        if let Ok((control, config, _)) = Control::detect(self.client.clone()).await
            && control.dialect == Dialect::Bitfast
        {
            let size = |name: &str| config.all[name].as_u64().map(|n| n as usize);
            self.step_budget = size("max_num_batched_tokens");
            self.max_len = size("max_model_len");
            self.fingerprint = config.fingerprint;
            self.control = Some(control);
        }
        if self.max_len.is_none()
            && let Ok(models) = self.client.get("/v1/models").await
            && let Ok(list) = models.json()
        {
            self.max_len = list.pointer("/data/0/max_model_len").and_then(Value::as_u64).map(|n| n as usize);
        }
        Ok(())
    }

    /// Adds one parameter after the other: strict servers refuse those that they do not know.
    async fn find_abilities(&mut self) -> Result {
        let asked = match self.taken(&self.small()).await? {
            Ok(asked) => asked,
            Err(refusal) => {
                self.can.kind = Kind::Tokens;
                self.taken(&self.small()).await?.map_err(|_| refusal)?
            }
        };
        self.fingerprint = asked.fingerprint.clone().or(self.fingerprint.take());
        if let (Kind::Text, Some(usage)) = (self.can.kind, asked.usage) {
            self.tokens_per_word = usage.prompt_tokens.div_ceil(SMALL as u64).clamp(1, 64) as usize;
        }
        self.can.ignore_eos = self.taken(&self.small().with("ignore_eos", true)).await?.is_ok();
        let ids = self.taken(&self.small().with("return_token_ids", true)).await?;
        self.can.token_ids = ids.is_ok_and(|a| a.answers.iter().all(|a| a.token_ids.is_some()));
        for count in LOGPROBS {
            let told = |a: &Answer| a.logprobs.as_ref().is_some_and(|l| !l.is_empty());
            let taken = self.taken(&self.small().with("logprobs", count)).await?;
            if taken.is_ok_and(|a| a.answers.iter().all(told)) {
                self.can.logprobs = Some(count);
                break;
            }
        }
        let pair = self.list_ask(&[self.prompt(3, 1), self.prompt(4, 2)], 1);
        self.can.lists = self.taken(&pair).await?.is_ok_and(|asked| asked.answers.len() == 2);
        self.can.streams = match self.client.stream_all(&self.small()).await {
            Ok(_) => true,
            Err(error) if is_refusal(&error) => false,
            Err(error) => return Err(error),
        };
        let seeded = self.small().with("temperature", 1.0).with("seed", 7);
        self.can.no_seed = self.taken(&seeded).await?.err().map(|e| e.to_string());
        Ok(())
    }

    async fn find_reset(&mut self) -> Result {
        if self.control.is_some() {
            self.reset = Reset::Bitfast;
            return Ok(());
        }
        // vLLM's and SGLang's.
        for route in ["/reset_prefix_cache", "/flush_cache"] {
            if self.client.post(route, "").await?.status == 200 {
                self.reset = Reset::Route(route);
                return Ok(());
            }
        }
        // Many servers take unknown parameters and heed none: the count of cached tokens tells.
        let mut cached = Vec::new();
        for salt in ["a", "a", "b"] {
            let ask = self.ask(self.prompt(SALTED, self.run), 1);
            match self.taken(&ask.with("cache_salt", format!("{}-{salt}", self.run))).await? {
                Ok(asked) => cached.push(asked.usage.and_then(|u| u.cached_tokens()).unwrap_or(0)),
                Err(_) => return Ok(()),
            }
        }
        if cached[1] > 0 && cached[2] == 0 {
            self.reset = Reset::Salt;
        }
        Ok(())
    }

    /// Asks from now on only for what another server can do too.
    pub fn restrict(&mut self, other: &Abilities) {
        let can = &mut self.can;
        if can.kind != other.kind {
            can.kind = Kind::Tokens;
        }
        can.ignore_eos &= other.ignore_eos;
        can.token_ids &= other.token_ids;
        can.logprobs = can.logprobs.min(other.logprobs);
        can.no_seed = can.no_seed.take().or(other.no_seed.clone());
    }

    fn small(&self) -> Ask {
        self.ask(self.prompt(SMALL, 0), 2)
    }

    /// The answer, or that the server does not take such a request.
    pub async fn taken(&self, ask: &Ask) -> Result<Result<Asked>> {
        match self.client.complete(ask).await {
            Ok(asked) => Ok(Ok(asked)),
            Err(error) if is_refusal(&error) => Ok(Err(error)),
            Err(error) => Err(error),
        }
    }

    /// Whether batches are made by pausing the server.
    pub fn can_pause(&self) -> bool {
        self.control.is_some()
    }

    /// A prompt of about so many tokens, and at most half of the context; `stream` tells prompts apart.
    pub fn prompt(&self, len: usize, stream: u64) -> One {
        let mut random = Random::new(self.seed, stream);
        let len = self.possible(len);
        match self.can.kind {
            Kind::Text => {
                let count = (len / self.tokens_per_word).max(1);
                let words: Vec<&str> =
                    (0..count).map(|_| WORDS[random.below(WORDS.len() as u64) as usize]).collect();
                One::Text(words.join(" "))
            }
            Kind::Tokens => One::Tokens(ids(len, &mut random)),
        }
    }

    /// A prompt's length, as far as the context allows.
    pub fn possible(&self, len: usize) -> usize {
        len.min(self.max_len.map_or(usize::MAX, |limit| limit / 2)).max(1)
    }

    /// A prompt whose answer can follow it token by token: of ids where the server tells those of its answers.
    pub fn scored_prompt(&self, len: usize, stream: u64) -> One {
        if !self.can.token_ids {
            return self.prompt(len, stream);
        }
        One::Tokens(ids(len, &mut Random::new(self.seed, stream)))
    }

    /// A greedy request.
    pub fn ask(&self, prompt: One, max_tokens: u32) -> Ask {
        self.finish(Ask::new(&self.model, prompt.into(), max_tokens))
    }

    /// One request with several prompts.
    pub fn list_ask(&self, prompts: &[One], max_tokens: u32) -> Ask {
        let text = |one: &One| match one {
            One::Text(text) => text.clone(),
            One::Tokens(_) => unreachable!("prompts of a server are of one kind"),
        };
        let ids = |one: &One| match one {
            One::Tokens(ids) => ids.clone(),
            One::Text(_) => unreachable!("prompts of a server are of one kind"),
        };
        let prompt = match self.can.kind {
            Kind::Text => Prompt::Texts(prompts.iter().map(text).collect()),
            Kind::Tokens => Prompt::TokenLists(prompts.iter().map(ids).collect()),
        };
        self.finish(Ask::new(&self.model, prompt, max_tokens))
    }

    fn finish(&self, mut ask: Ask) -> Ask {
        if let Some(count) = self.can.logprobs {
            ask = ask.with("logprobs", count);
        }
        if self.can.ignore_eos {
            ask = ask.with("ignore_eos", true);
        }
        if self.can.token_ids { ask.with("return_token_ids", true) } else { ask }
    }

    /// Asks while nothing else of ours runs, in the way in which crowds are asked: streamed where that is possible.
    pub async fn alone(&self, ask: &Ask) -> Result<Answer> {
        let (asked, _) = ask_for(&self.client, ask, self.can.streams).await?;
        Ok(asked.one()?.clone())
    }

    /// Asks for a whole answer while nothing else of ours runs.
    pub async fn whole(&self, ask: &Ask) -> Result<Answer> {
        Ok(self.client.complete(ask).await?.one()?.clone())
    }

    /// Has prompts computed anew, as far as the server allows: by forgetting cached prefixes, or by a parameter that
    /// the request gets; `number` tells such requests apart.
    pub async fn fresh(&self, ask: Ask, number: usize) -> Result<(Ask, Fresh)> {
        match &self.reset {
            Reset::Salt => Ok((ask.with("cache_salt", format!("{}-{number}", self.run)), Fresh::Salted)),
            _ if self.reset_cache().await? => Ok((ask, Fresh::Reset)),
            _ => Ok((ask, Fresh::Unknown)),
        }
    }

    /// Whether it forgets cached prefixes when it is told to.
    pub fn forgets(&self) -> bool {
        matches!(self.reset, Reset::Bitfast | Reset::Route(_))
    }

    /// Forgets cached prefixes; false where the server cannot.
    pub async fn reset_cache(&self) -> Result<bool> {
        match (&self.reset, &self.control) {
            (Reset::Bitfast, Some(control)) => control.reset_prefix_cache().await.map(|()| true),
            (Reset::Route(route), _) => {
                let reply = self.client.post(route, "").await?;
                if reply.status == 200 { Ok(true) } else { Err(reply.refusal()) }
            }
            _ => Ok(false),
        }
    }

    /// Prompt tokens that the server has found in its cache so far, by vLLM's or SGLang's metrics.
    pub async fn cache_hits(&self) -> Result<Option<u64>> {
        let reply = self.client.get("/metrics").await?;
        let text = String::from_utf8_lossy(&reply.body);
        let names = ["vllm:prefix_cache_hits_total", "vllm:prefix_cache_hits", "sglang:cached_tokens_total"];
        Ok(names.iter().filter(|_| reply.status == 200).find_map(|name| metric(&text, name)))
    }

    /// Decodes an answer, and scores prompt and answer as one prompt.
    pub async fn score(&self, prompt: &One, max_tokens: u32) -> Result<Scored> {
        // Texts of parts of characters are alike: ids where the server writes tokens as such.
        let as_ids = |ask: Ask| match self.can.token_ids {
            true => ask.with("return_tokens_as_token_ids", true),
            false => ask,
        };
        let decoded = self.whole(&as_ids(self.ask(prompt.clone(), max_tokens))).await?;
        let whole = match (prompt, &decoded.token_ids) {
            (One::Text(text), _) => One::Text(format!("{text}{}", decoded.text)),
            (One::Tokens(ids), Some(answer)) => One::Tokens([&ids[..], answer].concat()),
            (One::Tokens(_), None) => return Ok(Scored::Cannot("the server tells no token ids".into())),
        };
        // Some servers do not take 0.
        let count = decoded.logprobs.as_ref().map_or(0, Vec::len);
        let mut refusal = String::new();
        for max_tokens in [0, 1] {
            let ask = as_ids(self.ask(whole.clone(), max_tokens)).with("echo", true);
            match self.taken(&ask).await? {
                Ok(asked) => match &asked.one()?.logprobs {
                    Some(scored) if scored.len() > count => return Ok(Scored::of(decoded, scored)),
                    _ => refusal = "nothing came of the prompt".to_string(),
                },
                Err(error) => refusal = error.to_string(),
            }
        }
        if let Some(scored) = self.prompt_logprobs(&whole).await? {
            return Ok(Scored::of(decoded, &scored));
        }
        Ok(Scored::Cannot(format!("prompts cannot be scored with echo ({refusal}) nor by prompt_logprobs")))
    }

    /// Log probabilities of a prompt's tokens in vLLM's way; `None` where the server has no such thing.
    async fn prompt_logprobs(&self, prompt: &One) -> Result<Option<Vec<TokenLogprob>>> {
        let One::Tokens(ids) = prompt else { return Ok(None) };
        let body = serde_json::json!({
            "model": self.model, "prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 1
        });
        let reply = self.client.post("/v1/completions", body.to_string()).await?;
        if reply.status != 200 {
            let error = reply.refusal();
            return if is_refusal(&error) { Ok(None) } else { Err(error) };
        }
        let answer = reply.json()?;
        let Some(rows) = answer.pointer("/choices/0/prompt_logprobs").and_then(Value::as_array) else {
            return Ok(None);
        };
        let logprob = |(id, row): (&u32, &Value)| TokenLogprob {
            token: format!("token_id:{id}"),
            logprob: row[id.to_string()]["logprob"].as_f64().map(|v| v as f32),
            top: Default::default(),
        };
        Ok(Some(ids.iter().zip(rows).map(logprob).collect()))
    }
}

/// An answer as it was decoded and as it was scored.
pub enum Scored {
    /// The same tokens.
    Both(Answer, Answer),
    /// As a prompt the text is cut into other tokens.
    Retokenized,
    /// The server has no way.
    Cannot(String),
}

impl Scored {
    fn of(decoded: Answer, scored: &[TokenLogprob]) -> Self {
        let Some(left) = decoded.logprobs else { return Self::Cannot("no log probabilities came".into()) };
        let same = |right: &[TokenLogprob]| left.iter().zip(right).all(|(a, b)| a.token == b.token);
        // A server that could not score without generating may have one token more.
        let tails = [scored.len(), scored.len().saturating_sub(1)].into_iter();
        let mut tails = tails.filter_map(|end| scored[..end].get(end.checked_sub(left.len())?..));
        let Some(right) = tails.find(|right| same(right)) else { return Self::Retokenized };
        // Which further candidates are told differs from decoding to scoring.
        let only = |logprobs: &[TokenLogprob]| Answer {
            logprobs: Some(
                logprobs.iter().map(|l| TokenLogprob { top: Default::default(), ..l.clone() }).collect(),
            ),
            ..Answer::default()
        };
        Self::Both(only(&left), only(right))
    }
}

fn ids(len: usize, random: &mut Random) -> Vec<u32> {
    (0..len).map(|_| random.below(u64::from(SMALL_VOCAB)) as u32).collect()
}

/// Whether a server lists a model of this name.
pub async fn serves(client: &Client, name: &str) -> Result<bool> {
    let list = client.get("/v1/models").await?.json()?;
    let models = list["data"].as_array().map_or(&[][..], Vec::as_slice);
    Ok(models.iter().any(|model| model["id"] == name))
}

/// Whether a server says that it does not take such a request.
pub fn is_refusal(error: &Error) -> bool {
    matches!(error.status(), Some(400 | 422 | 501))
}
