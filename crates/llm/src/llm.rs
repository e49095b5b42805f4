use std::ops::ControlFlow;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;

use bitfast_engine::{EngineHandle, EngineInfo, EngineRequest, Event, RequestGuard, StepRecord};
use bitfast_model::GenerationConfig;
use bitfast_text::{
    ChatMessage, ChatTemplate, Encoded, RenderOptions, Thinking, Tokenizer, ToolFormat, UnixTime,
};

use crate::args::EngineArgs;
use crate::assemble::{Assembler, Setup, Step};
use crate::error::{Error, PromptLength, Result};
use crate::fetch::Progress;
use crate::fleet::Fleet;
use crate::load;
use crate::output::RequestOutput;
use crate::params::{Limits, Prepared, SamplingParams};
use crate::request::{Prompt, Request, Stream};
use crate::structured::{Grammars, Structured};

/// A model that answers: its engines (one, unless `data_parallel_size` says otherwise), its tokenizer and its chat
/// template.
///
/// ```
/// use bitfast_llm::{EngineArgs, LLM, LoadFormat, SamplingParams};
///
/// // A tiny model with made-up weights: no file, no network, no tokenizer.
/// let args = EngineArgs { load_format: LoadFormat::Dummy, ..EngineArgs::new("tiny-llama") };
/// let llm = LLM::new(args)?;
/// let params = SamplingParams { max_tokens: Some(4), ignore_eos: true, ..SamplingParams::greedy() };
/// let outputs = llm.generate([vec![1, 2, 3], vec![4, 5]], &params)?;
/// assert_eq!(outputs[0].prompt_token_ids, [1, 2, 3]);
/// assert_eq!(outputs[1].outputs[0].token_ids.len(), 4);
/// // The law: a prompt's answer does not depend on what else is asked.
/// let alone = llm.generate([vec![4, 5]], &params)?;
/// assert_eq!(alone[0].outputs, outputs[1].outputs);
/// # Ok::<(), bitfast_llm::Error>(())
/// ```
pub struct LLM {
    fleet: Fleet,
    tokenizer: Option<Tokenizer>,
    chat_template: Option<ChatTemplate>,
    generation: GenerationConfig,
    model: String,
    next_id: AtomicU64,
    grammars: Grammars,
}

impl LLM {
    /// Loads the model, fetching it first where needed, and starts its engine.
    pub fn new(args: EngineArgs) -> Result<Self> {
        Self::with_progress(args, &mut |_| ())
    }

    /// [`new`](Self::new), telling how fetches and the load go.
    pub fn with_progress(args: EngineArgs, on_progress: &mut dyn FnMut(Progress)) -> Result<Self> {
        let parts = load::load(&args, on_progress)?;
        Ok(Self {
            fleet: parts.fleet,
            tokenizer: parts.tokenizer,
            chat_template: parts.chat_template,
            generation: parts.generation,
            model: args.model,
            next_id: AtomicU64::new(0),
            grammars: Grammars::default(),
        })
    }

    /// Over engines that run already, for tools and tests. They serve the same weights, and are ranked in order.
    ///
    /// # Panics
    /// Without an engine.
    pub fn over(model: impl Into<String>, engines: Vec<EngineHandle>, tokenizer: Option<Tokenizer>) -> Self {
        Self {
            fleet: Fleet::new(engines),
            tokenizer,
            chat_template: None,
            generation: GenerationConfig::default(),
            model: model.into(),
            next_id: AtomicU64::new(0),
            grammars: Grammars::default(),
        }
    }

    /// Completes each prompt; outputs come in the prompts' order. The first mistake in a prompt or parameter
    /// is returned before anything runs on its behalf; what ran already is dropped.
    pub fn generate<P: Into<Prompt>>(
        &self,
        prompts: impl IntoIterator<Item = P>,
        params: &SamplingParams,
    ) -> Result<Vec<RequestOutput>> {
        let mut outputs = Vec::new();
        let mut failure = None;
        let requests = prompts.into_iter().map(|prompt| Request::new(prompt, params.clone()));
        self.run(requests, &mut |index, result| match result {
            Ok(output) => {
                outputs.push((index, output));
                ControlFlow::Continue(())
            }
            Err(error) => {
                failure = Some(error);
                ControlFlow::Break(())
            }
        });
        if let Some(error) = failure {
            return Err(error);
        }
        outputs.sort_by_key(|(index, _)| *index);
        Ok(outputs.into_iter().map(|(_, output)| output).collect())
    }

    /// Answers each conversation through the model's chat template.
    pub fn chat(
        &self,
        conversations: impl IntoIterator<Item = Vec<ChatMessage>>,
        params: &SamplingParams,
    ) -> Result<Vec<RequestOutput>> {
        self.generate(conversations, params)
    }

    /// Scores texts without generating: `prompt_logprobs` holds the log probability of each token given
    /// those before it. The bits are those that sampling the same tokens in decode would report.
    ///
    /// ```
    /// # use bitfast_llm::{EngineArgs, LLM, LoadFormat};
    /// # let args = EngineArgs { load_format: LoadFormat::Dummy, ..EngineArgs::new("tiny-llama") };
    /// # let llm = LLM::new(args)?;
    /// let scores = llm.score([vec![1, 2, 3]])?;
    /// let rows = scores[0].prompt_logprobs.as_ref().unwrap();
    /// assert!(rows[0].is_none() && rows[2].as_ref().unwrap().chosen().1.logprob < 0.0);
    /// # Ok::<(), bitfast_llm::Error>(())
    /// ```
    pub fn score<P: Into<Prompt>>(&self, prompts: impl IntoIterator<Item = P>) -> Result<Vec<RequestOutput>> {
        let params =
            SamplingParams { max_tokens: Some(0), prompt_logprobs: Some(0), ..SamplingParams::greedy() };
        self.generate(prompts, &params)
    }

    /// Starts a request and returns at once; the text comes in chunks.
    ///
    /// ```
    /// # use bitfast_llm::{EngineArgs, LLM, LoadFormat, Request, SamplingParams};
    /// # let args = EngineArgs { load_format: LoadFormat::Dummy, ..EngineArgs::new("tiny-llama") };
    /// # let llm = LLM::new(args)?;
    /// let params = SamplingParams { max_tokens: Some(3), ignore_eos: true, ..SamplingParams::greedy() };
    /// let mut stream = llm.stream(Request::new(vec![1, 2, 3], params))?;
    /// let mut tokens = Vec::new();
    /// for chunk in &mut stream {
    ///     tokens.extend(chunk?.token_ids);
    /// }
    /// assert_eq!(stream.output().outputs[0].token_ids, tokens);
    /// # Ok::<(), bitfast_llm::Error>(())
    /// ```
    pub fn stream(&self, request: Request) -> Result<Stream> {
        let (sender, events) = mpsc::channel();
        // A send fails only after the stream was dropped, which aborts the request anyway.
        let sink = move |event| drop(sender.send(event));
        let (assembler, guard) = self.submit_with(request, Box::new(sink))?;
        Ok(Stream { assembler, events, fleet: self.fleet.clone(), guard: Some(guard) })
    }

    /// The door for servers: events go to `sink` on the engine's thread, the caller feeds them to the
    /// [`Assembler`]. Dropping the guard aborts the request.
    pub fn submit_with(
        &self,
        request: Request,
        sink: Box<dyn FnMut(Event) + Send>,
    ) -> Result<(Assembler, RequestGuard)> {
        let Request { id, prompt, params, data_parallel_rank } = request;
        let prepared = self.prepare(&params)?;
        self.submit(id, prompt, &prepared, data_parallel_rank, sink)
    }

    /// Checks parameters and makes of them what engines and assemblers take: once for all prompts that have them, as bad
    /// words are encoded and stop texts compiled here.
    pub fn prepare(&self, params: &SamplingParams) -> Result<Prepared> {
        let limits = Limits {
            defaults: &self.generation,
            tokenizer: self.tokenizer.as_ref(),
            grammars: &self.grammars,
            vocab_size: self.info().vocab_size,
        };
        let (sampling, text) = params.lower(&limits)?;
        Ok(Prepared {
            sampling,
            text,
            most_tokens: params.most_prompt_tokens(self.info().max_model_len),
            keep_tokens: params.truncate_prompt_tokens.map_or(usize::MAX, |keep| keep as usize),
            priority: params.priority,
            cache_salt: params.cache_salt.clone(),
        })
    }

    /// [`submit_with`](Self::submit_with) for a prompt of token ids and parameters that are ready.
    pub fn submit_prepared(
        &self,
        prompt_token_ids: Vec<u32>,
        prepared: &Prepared,
        data_parallel_rank: Option<usize>,
        sink: Box<dyn FnMut(Event) + Send>,
    ) -> Result<(Assembler, RequestGuard)> {
        self.submit(None, Prompt::Tokens(prompt_token_ids), prepared, data_parallel_rank, sink)
    }

    fn submit(
        &self,
        id: Option<String>,
        prompt: Prompt,
        prepared: &Prepared,
        data_parallel_rank: Option<usize>,
        sink: Box<dyn FnMut(Event) + Send>,
    ) -> Result<(Assembler, RequestGuard)> {
        let number = self.next_id.fetch_add(1, Ordering::Relaxed).to_string();
        let info = self.fleet.info();
        let Prepared { sampling, text, most_tokens, keep_tokens, priority, cache_salt } = prepared.clone();
        let (prompt_text, mut prompt_token_ids) = self.encode(prompt, most_tokens)?;
        prompt_token_ids.drain(..prompt_token_ids.len().saturating_sub(keep_tokens));
        let assembler = Assembler::new(Setup {
            request_id: id.unwrap_or_else(|| number.clone()),
            prompt: prompt_text,
            prompt_token_ids: prompt_token_ids.clone(),
            sampling: &sampling,
            text,
            eos: &info.config.eos_token_ids,
            vocab_size: info.vocab_size,
            tokenizer: self.tokenizer.clone(),
            system_fingerprint: info.fingerprint.clone(),
        });
        let request = EngineRequest { id: number, prompt_token_ids, sampling, priority, cache_salt };
        Ok((assembler, self.fleet.submit_with(request, data_parallel_rank, sink)?))
    }

    /// Compiles a constraint ahead of the requests that have it, and says what is wrong with it. What was compiled
    /// lately is kept, so a server can do this on a thread that may take its time.
    pub fn check_structured(&self, structured: &Structured) -> Result<()> {
        self.grammars.constraint(structured, self.tokenizer.as_ref()).map(drop)
    }

    /// Runs requests, as many at a time as the engine takes, drawing from `requests` as it goes. `on_end` gets
    /// each one's place and result, in the order in which they end; it can break off, which aborts the rest.
    pub fn run(
        &self,
        requests: impl IntoIterator<Item = Request>,
        on_end: &mut dyn FnMut(usize, Result<RequestOutput>) -> ControlFlow<()>,
    ) {
        let config = &self.fleet.info().config;
        // One batch running and one waiting keep an engine busy; more would only hold memory.
        let window = self.fleet.size() * (config.max_num_seqs + config.max_num_seqs.min(config.max_queued));
        let (sender, events) = mpsc::channel::<(usize, Event)>();
        let mut live: std::collections::BTreeMap<usize, (Assembler, RequestGuard)> = Default::default();
        let mut requests = requests.into_iter().enumerate();
        let mut held: Option<(usize, Request)> = None;
        loop {
            while live.len() < window {
                let Some((index, request)) = held.take().or_else(|| requests.next()) else { break };
                let sender = sender.clone();
                let sink = Box::new(move |event| drop(sender.send((index, event))));
                match self.submit_with(request.clone(), sink) {
                    Ok(started) => drop(live.insert(index, started)),
                    // Others use the engines too: wait for one of ours to end.
                    Err(Error::QueueFull { .. }) if !live.is_empty() => {
                        held = Some((index, request));
                        break;
                    }
                    Err(error) => {
                        if on_end(index, Err(error)).is_break() {
                            return;
                        }
                    }
                }
            }
            if live.is_empty() {
                return;
            }
            let (index, event) = events.recv().expect("this function holds a sender");
            let Some((assembler, guard)) = live.get_mut(&index) else { continue };
            let result = match assembler.push(event) {
                Ok(Step::Quiet) => continue,
                Ok(Step::Chunk(chunk)) => {
                    if chunk.ends_by_text() {
                        guard.stop_sample(chunk.index);
                    }
                    continue;
                }
                Ok(Step::Done) => Ok(()),
                Err(error) => Err(error),
            };
            let (assembler, _) = live.remove(&index).expect("it is live");
            if on_end(index, result.map(|()| assembler.into_output())).is_break() {
                return;
            }
        }
    }

    /// Name of the model, as the caller gave it.
    pub fn model(&self) -> &str {
        &self.model
    }

    /// The settled configuration of an engine: limits, numerics class, device, fingerprint.
    pub fn info(&self) -> &EngineInfo {
        self.fleet.info()
    }

    /// The engines, for servers and tools.
    pub fn fleet(&self) -> &Fleet {
        &self.fleet
    }

    /// The first engine: the only one, unless `data_parallel_size` says otherwise. See [`fleet`](Self::fleet).
    pub fn engine(&self) -> &EngineHandle {
        &self.fleet.engines()[0]
    }

    /// The tokenizer, if there is one.
    pub fn tokenizer(&self) -> Option<&Tokenizer> {
        self.tokenizer.as_ref()
    }

    /// The model's recommended sampling parameters.
    pub fn generation_config(&self) -> &GenerationConfig {
        &self.generation
    }

    /// Whether the model has a chat template that can be used.
    pub fn can_chat(&self) -> bool {
        self.template().is_ok()
    }

    /// Records of the first engine's steps after number `since`; [`Fleet::step_stats`] has those of all.
    pub fn step_stats(&self, since: u64) -> Vec<StepRecord> {
        self.engine().step_stats(since)
    }

    /// Forgets every cached prefix.
    pub fn reset_prefix_cache(&self) {
        self.fleet.reset_prefix_cache();
    }

    /// A conversation through the model's chat template. Its special tokens are in the text.
    pub fn render_chat(&self, messages: &[ChatMessage], options: &RenderOptions) -> Result<String> {
        let template = self.template()?;
        template.render(&template.fit_calls(messages), options).map_err(|e| template_error(&e))
    }

    /// How the model writes tool calls, if its chat template shows it.
    pub fn tool_format(&self) -> Option<ToolFormat> {
        self.template().ok().and_then(ToolFormat::of_template)
    }

    /// Whether the model may write thoughts before its answer, by its chat template.
    pub fn may_think(&self) -> bool {
        self.template().is_ok_and(Thinking::in_template)
    }

    /// Token ids of a text; `add_special` adds what the model wants around one. A long text that turns out to have more than
    /// `most` is not read to its end.
    pub fn encode_text(&self, text: &str, add_special: bool, most: usize) -> Result<Vec<u32>> {
        self.encode_named(text, "a text prompt", add_special, most)
    }

    fn encode_named(
        &self,
        text: &str,
        what: &'static str,
        add_special: bool,
        most: usize,
    ) -> Result<Vec<u32>> {
        let tokenizer = self.tokenizer.as_ref().ok_or(Error::NoTokenizer { what })?;
        if text.is_empty() {
            return Err(Error::invalid("prompt", "must not be empty"));
        }
        let encoded = tokenizer.encode_until(text, add_special, most);
        match encoded.map_err(|e| Error::Text { what: "tokenizer", message: e.to_string() })? {
            Encoded::Ids(ids) => Ok(ids),
            Encoded::TooMany(tokens) => Err(Error::PromptTooLong {
                prompt_tokens: PromptLength::AtLeast(tokens),
                max_model_len: most,
            }),
        }
    }

    fn template(&self) -> Result<&ChatTemplate> {
        let own = || match &self.tokenizer {
            None => Err(Error::NoTokenizer { what: "a chat" }),
            Some(t) => t.chat_template().map_err(template_error),
        };
        self.chat_template.as_ref().map_or_else(own, Ok)
    }

    fn render(&self, messages: &[ChatMessage]) -> Result<String> {
        // Some templates print the date.
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let now = now.map_or(0, |since| i64::try_from(since.as_secs()).unwrap_or(0));
        self.render_chat(messages, &RenderOptions::at(UnixTime(now)))
    }

    /// The text (when there is one) and the token ids of a prompt.
    fn encode(&self, prompt: Prompt, most: usize) -> Result<(Option<String>, Vec<u32>)> {
        let encode = |text: String, what: &'static str, add_special: bool| {
            let ids = self.encode_named(&text, what, add_special, most)?;
            Ok((Some(text), ids))
        };
        match prompt {
            Prompt::Text(text) => encode(text, "a text prompt", true),
            Prompt::Tokens(ids) => Ok((None, ids)),
            Prompt::Chat(messages) => {
                if messages.is_empty() {
                    return Err(Error::invalid("messages", "must not be empty"));
                }
                encode(self.render(&messages)?, "a chat", false)
            }
        }
    }
}

fn template_error(error: &bitfast_text::TemplateError) -> Error {
    Error::Text { what: "chat_template", message: error.to_string() }
}
