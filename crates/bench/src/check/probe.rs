//! The server under check: what it can do, and ways to ask it alone and in crowds.

use std::time::Duration;

use serde_json::Value;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use crate::client::{Answer, Ask, Asked, Client, Prompt};
use crate::error::{Error, Result};
use crate::iterations::{Control, Dialect, LastSteps, Sleeper, served_model};
use crate::random::Random;

/// How prompts are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// English words.
    Text,
    /// Ids below this number, for servers without a tokenizer.
    Tokens(u32),
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

/// A server under check.
pub struct Probe {
    pub client: Client,
    model: String,
    kind: Kind,
    seed: u64,
    /// Of a prompt's text, rounded up.
    tokens_per_word: usize,
    /// Takes `ignore_eos` and `return_token_ids`.
    extras: bool,
    /// Tells the tokens of its answers.
    tells_ids: bool,
    /// Reports log probabilities.
    pub logprobs: bool,
    /// Takes several prompts in one request.
    pub lists: bool,
    control: Option<Control>,
    sleeper: Sleeper,
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
/// Longest wait for a queue; the batch is then let go as it is.
const QUEUE_WAIT: Duration = Duration::from_secs(5);

impl Probe {
    /// Finds out what the server can do.
    pub async fn new(client: Client, model: Option<&str>, seed: u64, sleeper: Sleeper) -> Result<Self> {
        let model = match model {
            Some(model) => model.to_string(),
            None => served_model(&client).await?,
        };
        let mut probe = Self {
            client,
            model,
            kind: Kind::Text,
            seed,
            tokens_per_word: 1,
            extras: true,
            tells_ids: false,
            logprobs: true,
            lists: true,
            control: None,
            sleeper,
            step_budget: None,
            max_len: None,
            fingerprint: None,
        };
        probe.find_extras().await?;
        probe.find_abilities().await?;
        Ok(probe)
    }

    async fn find_extras(&mut self) -> Result {
        if let Ok((control, config, _)) = Control::detect(self.client.clone()).await
            && control.dialect == Dialect::Bitfast
        {
            let size = |name: &str| config.all[name].as_u64().map(|n| n as usize);
            self.step_budget = size("max_num_batched_tokens");
            self.max_len = size("max_model_len");
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

    async fn find_abilities(&mut self) -> Result {
        let mut last = None;
        for (kind, extras) in [
            (Kind::Text, true),
            (Kind::Tokens(SMALL_VOCAB), true),
            (Kind::Text, false),
            (Kind::Tokens(SMALL_VOCAB), false),
        ] {
            (self.kind, self.extras) = (kind, extras);
            match self.client.complete(&self.ask(self.prompt(6, 0), 2)).await {
                Ok(asked) => {
                    self.logprobs = asked.one()?.logprobs.as_ref().is_some_and(|l| !l.is_empty());
                    self.tells_ids = asked.one()?.token_ids.is_some();
                    self.tokens_per_word = match (kind, asked.usage) {
                        (Kind::Text, Some(usage)) => usage.prompt_tokens.div_ceil(6).clamp(1, 64) as usize,
                        _ => 1,
                    };
                    self.fingerprint = asked.fingerprint;
                    last = None;
                    break;
                }
                Err(error) if matches!(error.status(), Some(400 | 422)) => last = Some(error),
                Err(error) => return Err(error),
            }
        }
        if let Some(error) = last {
            return Err(error);
        }
        let pair = self.list_ask(&[self.prompt(3, 1), self.prompt(4, 2)], 1);
        self.lists = match self.client.complete(&pair).await {
            Ok(asked) => asked.answers.len() == 2,
            Err(error) if error.status().is_some_and(|s| s < 500) => false,
            Err(error) => return Err(error),
        };
        Ok(())
    }

    /// Whether batches are made by pausing the server.
    pub fn can_pause(&self) -> bool {
        self.control.is_some()
    }

    /// A prompt of about so many tokens, and at most half of the context; `stream` tells prompts apart.
    pub fn prompt(&self, len: usize, stream: u64) -> One {
        let mut random = Random::new(self.seed, stream);
        let len = len.min(self.max_len.map_or(usize::MAX, |limit| limit / 2)).max(1);
        match self.kind {
            Kind::Text => {
                let count = (len / self.tokens_per_word).max(1);
                let words: Vec<&str> =
                    (0..count).map(|_| WORDS[random.below(WORDS.len() as u64) as usize]).collect();
                One::Text(words.join(" "))
            }
            Kind::Tokens(vocab) => {
                One::Tokens((0..len).map(|_| random.below(u64::from(vocab)) as u32).collect())
            }
        }
    }

    /// A prompt whose answer can follow it token by token: of ids where the server tells those of its answers.
    pub fn scored_prompt(&self, len: usize, stream: u64) -> One {
        if !self.tells_ids {
            return self.prompt(len, stream);
        }
        let mut random = Random::new(self.seed, stream);
        One::Tokens((0..len).map(|_| random.below(u64::from(SMALL_VOCAB)) as u32).collect())
    }

    /// A request whose tokens are written as ids where the server can: texts of parts of characters are alike.
    pub fn scored_ask(&self, prompt: One, max_tokens: u32) -> Ask {
        let ask = self.ask(prompt, max_tokens);
        if self.extras { ask.with("return_tokens_as_token_ids", true) } else { ask }
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
        let prompt = match self.kind {
            Kind::Text => Prompt::Texts(prompts.iter().map(text).collect()),
            Kind::Tokens(_) => Prompt::TokenLists(prompts.iter().map(ids).collect()),
        };
        self.finish(Ask::new(&self.model, prompt, max_tokens))
    }

    fn finish(&self, mut ask: Ask) -> Ask {
        if self.logprobs {
            ask = ask.with("logprobs", 1);
        }
        if self.extras { ask.with("ignore_eos", true).with("return_token_ids", true) } else { ask }
    }

    /// Asks while nothing else of ours runs.
    pub async fn alone(&self, ask: &Ask) -> Result<Answer> {
        Ok(self.client.complete(ask).await?.one()?.clone())
    }

    /// Asks for several answers in one request.
    pub async fn list(&self, prompts: &[One], max_tokens: u32) -> Result<Vec<Answer>> {
        let asked = self.client.complete(&self.list_ask(prompts, max_tokens)).await?;
        if asked.answers.len() != prompts.len() {
            let message = format!("{} choices for {} prompts", asked.answers.len(), prompts.len());
            return Err(Error::answer(&asked.url, message));
        }
        Ok(asked.answers)
    }

    /// Asks all at once. Where the server can be paused they queue in this order and start together.
    pub async fn together(&self, asks: Vec<Ask>) -> Result<Vec<Asked>> {
        let count = asks.len();
        if let Some(control) = &self.control {
            self.sleeper.pause(control).await?;
        }
        let mut running = JoinSet::new();
        for (index, ask) in asks.into_iter().enumerate() {
            let client = self.client.clone();
            running.spawn(async move { (index, client.complete(&ask).await) });
        }
        if let Some(control) = &self.control {
            let deadline = Instant::now() + QUEUE_WAIT;
            while Instant::now() < deadline {
                let info = control.batch_info().await?;
                if info.running + info.waiting >= count as u64 {
                    break;
                }
                sleep(Duration::from_millis(2)).await;
            }
            control.wake_surely().await?;
            self.sleeper.is_awake();
        }
        let mut all = Vec::new();
        while let Some(done) = running.join_next().await {
            let (index, result) = done.expect("a request's task does not panic");
            all.push((index, result?));
        }
        all.sort_by_key(|(index, _)| *index);
        Ok(all.into_iter().map(|(_, asked)| asked).collect())
    }

    /// Forgets cached prefixes; false where the server cannot.
    pub async fn reset_cache(&self) -> Result<bool> {
        match &self.control {
            Some(control) => control.reset_prefix_cache().await.map(|()| true),
            None => Ok(false),
        }
    }

    /// Number of the server's last step, where told.
    pub async fn mark(&self) -> Result<LastSteps> {
        match &self.control {
            Some(control) => control.last_steps().await,
            None => Ok(LastSteps::new()),
        }
    }

    /// The largest batch and the most prompt tokens of a step since a mark, where told.
    pub async fn largest_step(&self, since: &LastSteps) -> Result<Option<(u64, u64)>> {
        let Some(control) = &self.control else { return Ok(None) };
        let steps = control.steps(since).await?;
        let most = |f: fn(&crate::iterations::StepStat) -> u64| steps.iter().map(f).max().unwrap_or(0);
        Ok(Some((most(|s| s.batch_size), most(|s| s.prefill_tokens))))
    }

    /// Log probabilities of a prompt's own tokens.
    pub async fn score(&self, prompt: One) -> Result<Answer> {
        let mut last = None;
        // Some servers do not take 0.
        for max_tokens in [0, 1] {
            let ask = self.scored_ask(prompt.clone(), max_tokens).with("echo", true).with("logprobs", 1);
            match self.client.complete(&ask).await {
                Ok(asked) => return Ok(asked.one()?.clone()),
                Err(error) if matches!(error.status(), Some(400 | 422)) => last = Some(error),
                Err(error) => return Err(error),
            }
        }
        Err(last.expect("it was refused twice"))
    }

    /// `prompt` followed by an answer to it; `None` where the answer's tokens are not known.
    pub fn followed_by(&self, prompt: &One, answer: &Answer) -> Option<One> {
        match prompt {
            One::Text(text) => Some(One::Text(format!("{text}{}", answer.text))),
            One::Tokens(ids) => Some(One::Tokens([&ids[..], answer.token_ids.as_deref()?].concat())),
        }
    }
}
