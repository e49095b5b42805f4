//! Requests under way: submission, events, and their way into answers and streams.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use bitfast_llm::{Assembler, Chunk, Event, RequestGuard, RequestOutput, SamplingParams, Step};
use bytes::Bytes;
use futures_core::Stream;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use crate::api::common::Usage;
use crate::error::{ApiError, ErrorKind};
use crate::metrics::RequestTimes;
use crate::sse::Events;
use crate::state::{Admitted, AppState};

/// What one HTTP request asks of the engine: the same parameters for each prompt.
pub(crate) struct Job {
    pub prompts: Vec<Vec<u32>>,
    pub params: SamplingParams,
    /// The data-parallel rank that must answer.
    pub rank: Option<usize>,
}

/// The prompts of one HTTP request under way. Dropping it aborts what is still live.
pub(crate) struct Running {
    state: Arc<AppState>,
    parts: Vec<Part>,
    events: UnboundedReceiver<(usize, Event, Instant)>,
    live: usize,
    _admitted: Admitted,
}

struct Part {
    assembler: Assembler,
    guard: RequestGuard,
    times: RequestTimes,
}

/// What happened to a prompt.
pub(crate) enum Update {
    /// A sample of this prompt went on or ended.
    Chunk(usize, Chunk),
    /// All samples of this prompt have ended.
    Ended,
}

impl Running {
    /// Submits every prompt; a refusal of one takes the others back.
    pub fn start(state: &Arc<AppState>, job: Job) -> Result<Self, ApiError> {
        let admitted = state.admit()?;
        let prepared = state.llm.prepare(&job.params)?;
        // Unbounded: the engine bounds the events of a request, and it must never wait for a reader.
        let (sender, events) = unbounded_channel();
        let mut parts = Vec::with_capacity(job.prompts.len());
        for (index, prompt) in job.prompts.into_iter().enumerate() {
            let sender = sender.clone();
            let sink = Box::new(move |event| drop(sender.send((index, event, Instant::now()))));
            let submitted = state.llm.submit_prepared(prompt, &prepared, job.rank, sink);
            let submitted = submitted.map_err(ApiError::from);
            let (assembler, guard) =
                submitted.map_err(|error| error.renamed("data_parallel_rank", "X-data-parallel-rank"))?;
            let times = RequestTimes::new(guard.rank());
            parts.push(Part { assembler, guard, times });
        }
        let live = parts.len();
        Ok(Self { state: Arc::clone(state), parts, events, live, _admitted: admitted })
    }

    /// The next update; `None` after the last one.
    pub fn poll_update(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Update, ApiError>>> {
        loop {
            if self.live == 0 {
                return Poll::Ready(None);
            }
            let Some((index, event, at)) = ready!(self.events.poll_recv(context)) else {
                self.live = 0;
                return Poll::Ready(Some(Err(failed("the engine is gone"))));
            };
            if let Some(update) = self.take(index, event, at) {
                return Poll::Ready(Some(update));
            }
        }
    }

    /// Waits for the end of everything.
    pub async fn finish(&mut self) -> Result<(), ApiError> {
        self.follow(|_| ()).await
    }

    /// Waits for the end of everything, and shows each chunk on the way.
    pub async fn follow(&mut self, mut seen: impl FnMut(&Chunk)) -> Result<(), ApiError> {
        while let Some(update) = std::future::poll_fn(|context| self.poll_update(context)).await {
            if let Update::Chunk(_, chunk) = update? {
                seen(&chunk);
            }
        }
        Ok(())
    }

    /// What each prompt has given so far, in the order of prompts.
    pub fn outputs(&self) -> impl Iterator<Item = &RequestOutput> {
        self.parts.iter().map(|part| part.assembler.output())
    }

    /// What this prompt has given so far.
    pub fn output(&self, prompt: usize) -> &RequestOutput {
        self.parts[prompt].assembler.output()
    }

    /// Tokens so far.
    pub fn usage(&self) -> Usage {
        let sum = |of: &dyn Fn(&RequestOutput) -> usize| self.outputs().map(of).sum::<usize>() as u64;
        Usage::new(
            sum(&|o| o.prompt_token_ids.len()),
            sum(&|o| o.num_cached_tokens as usize),
            sum(&|o| o.outputs.iter().map(|sample| sample.token_ids.len()).sum()),
        )
    }

    fn take(&mut self, index: usize, event: Event, at: Instant) -> Option<Result<Update, ApiError>> {
        let part = &mut self.parts[index];
        part.times.note(&self.state.metrics, &event, at, part.assembler.output());
        match part.assembler.push(event) {
            Ok(Step::Quiet) => None,
            Ok(Step::Chunk(chunk)) => {
                if chunk.ends_by_text() {
                    part.guard.stop_sample(chunk.index);
                }
                Some(Ok(Update::Chunk(index, chunk)))
            }
            Ok(Step::Done) => {
                self.live -= 1;
                Some(Ok(Update::Ended))
            }
            Err(error) => {
                self.live = 0;
                // What a request allows can leave it no token.
                Some(Err(if error.is_user_error() { error.into() } else { failed(error.to_string()) }))
            }
        }
    }
}

fn failed(message: impl Into<String>) -> ApiError {
    ApiError::new(ErrorKind::Internal, message)
}

/// How a route writes updates as events.
pub(crate) trait Encoder: Send + Unpin + 'static {
    /// Writes what a chunk adds.
    fn chunk(&mut self, running: &Running, prompt: usize, chunk: &Chunk, out: &mut Events);
    /// Writes the end of a stream that went well.
    fn end(&mut self, running: &Running, out: &mut Events);
    /// Writes the end of a stream that failed.
    fn failure(&mut self, error: &ApiError, out: &mut Events) {
        out.data(&error.body());
        out.done();
    }
}

/// Most bytes that are gathered before they go out: what a fast engine makes between two polls goes in one write.
const FRAME_BYTES: usize = 16 << 10;

/// The body of a streamed answer.
pub(crate) struct EventStream<E> {
    running: Running,
    encoder: E,
    events: Events,
    ended: bool,
}

impl<E: Encoder> EventStream<E> {
    pub fn new(running: Running, encoder: E) -> Self {
        Self { running, encoder, events: Events::default(), ended: false }
    }
}

impl<E: Encoder> Stream for EventStream<E> {
    type Item = Result<Bytes, Infallible>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        while !this.ended && this.events.len() < FRAME_BYTES {
            match this.running.poll_update(context) {
                Poll::Ready(Some(Ok(Update::Chunk(prompt, chunk)))) => {
                    this.encoder.chunk(&this.running, prompt, &chunk, &mut this.events);
                }
                Poll::Ready(Some(Ok(Update::Ended))) => {}
                Poll::Ready(Some(Err(error))) => {
                    this.encoder.failure(&error, &mut this.events);
                    this.ended = true;
                }
                Poll::Ready(None) => {
                    this.encoder.end(&this.running, &mut this.events);
                    this.ended = true;
                }
                Poll::Pending => break,
            }
        }
        match (this.events.len(), this.ended) {
            (0, true) => Poll::Ready(None),
            (0, false) => Poll::Pending,
            _ => Poll::Ready(Some(Ok(this.events.take()))),
        }
    }
}
