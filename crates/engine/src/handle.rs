use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, mpsc};
use std::time::Duration;

use crate::config::EngineInfo;
use crate::request::{EngineRequest, Event, Failure, SubmitError};
use crate::shared::{Command, EventSink, Inbox, Life, RequestKey, Shared, Submission, Thread};
use crate::sleep::{SleepError, SleepLevel, SleepState, Transition};
use crate::stats::{EngineStats, StepRecord};
use crate::validate::validate;

/// Longest wait of the last handle for the engine's end.
const LAST_WORDS: Duration = Duration::from_secs(10);

/// The door to an engine, from any thread. Clones share the engine; when the last one is gone the engine
/// finishes its live requests and ends. Dropping the last one waits for that, 10 seconds at most.
pub struct EngineHandle {
    shared: Arc<Shared>,
}

/// Whether an engine can serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    /// It takes requests.
    Serving,
    /// It finishes what it has.
    Stopping,
    /// It has ended, for this reason.
    Dead(String),
}

/// What [`EngineHandle::shutdown`] does with live requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shutdown {
    /// They finish; those that have not at the timeout are aborted.
    Finish,
    /// They are aborted.
    Abort,
}

impl EngineHandle {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        shared.handles.fetch_add(1, Ordering::AcqRel);
        Self { shared }
    }

    pub(crate) fn shared(&self) -> &Shared {
        &self.shared
    }

    /// Checks and queues a request. Its events come through the stream; dropping the stream aborts it.
    ///
    /// A slow reader never stalls the engine: events are buffered, and there are at most
    /// `n * (max_tokens + 1) + 3` of them.
    pub fn submit(&self, request: EngineRequest) -> Result<RequestStream, SubmitError> {
        let (sender, events) = mpsc::channel();
        // A send fails only after the stream was dropped, which aborts the request anyway.
        let guard = self.submit_with(request, Box::new(move |event| drop(sender.send(event))))?;
        Ok(RequestStream { events, guard, ended: false })
    }

    /// As [`EngineHandle::submit`], with events handed to `sink` on the engine thread: the door for async
    /// callers (send into an unbounded channel there). Dropping the guard aborts the request.
    pub fn submit_with(&self, request: EngineRequest, sink: EventSink) -> Result<RequestGuard, SubmitError> {
        let info = &self.shared.info;
        let request = validate(request, info)?;
        let at = self.shared.clock.now();
        let mut inbox = self.shared.inbox();
        match &inbox.life {
            Life::Running => {}
            Life::Finishing | Life::Aborting => {
                return Err(SubmitError::Dead("it is shutting down".to_owned()));
            }
            Life::Dead(reason) => return Err(SubmitError::Dead(reason.clone())),
        }
        if inbox.live.contains_key(&request.id) {
            return Err(SubmitError::DuplicateId(request.id));
        }
        if inbox.queued >= info.config.max_queued {
            return Err(SubmitError::QueueFull { limit: info.config.max_queued });
        }
        let key = inbox.new_key();
        let id = request.id.clone();
        inbox.queued += 1;
        inbox.live.insert(id.clone(), key);
        inbox.commands.push_back(Command::Submit(Box::new(Submission { key, request, sink, at })));
        self.shared.announce(inbox);
        Ok(RequestGuard { shared: Arc::clone(&self.shared), id, key })
    }

    /// Aborts the live request `id`: its samples end with [`crate::FinishReason::Abort`]. False if there is none.
    pub fn abort(&self, id: &str) -> bool {
        let mut inbox = self.shared.inbox();
        let Some(&key) = inbox.live.get(id) else { return false };
        inbox.commands.push_back(Command::Abort(key));
        self.shared.announce(inbox);
        true
    }

    /// Aborts every request that is live now.
    pub fn abort_all(&self) {
        let mut inbox = self.shared.inbox();
        let keys: Vec<_> = inbox.live.values().copied().collect();
        inbox.commands.extend(keys.into_iter().map(Command::Abort));
        self.shared.announce(inbox);
    }

    /// No further step starts (one in flight ends); requests are accepted and queue. Levels that give memory back
    /// return once it has been; level 0 at once. An engine that sleeps more deeply than `level` goes on doing so.
    pub fn pause(&self, level: SleepLevel) -> Result<(), SleepError> {
        let transition = self.begin_pause(level)?;
        if level == SleepLevel::Pause { Ok(()) } else { transition.wait() }
    }

    /// Steps start again; after a sleep that gave memory back, once the engine has it again. When that fails
    /// the engine stays asleep.
    pub fn resume(&self) -> Result<(), SleepError> {
        let deep = self.shared.inbox().sleep.is_deep();
        let transition = self.begin_resume();
        if deep { transition.wait() } else { Ok(()) }
    }

    /// [`pause`](Self::pause), not waiting for the engine to follow.
    pub fn begin_pause(&self, level: SleepLevel) -> Result<Transition, SleepError> {
        if level > self.shared.info.deepest_sleep {
            return Err(SleepError::Unsupported(level));
        }
        Ok(self.ask(Some(level)))
    }

    /// [`resume`](Self::resume), not waiting for the engine to follow.
    pub fn begin_resume(&self) -> Transition {
        self.ask(None)
    }

    /// Whether scheduling is paused, at any level.
    pub fn is_paused(&self) -> bool {
        self.shared.inbox().sleep.is_paused()
    }

    /// How the engine sleeps, if it does.
    pub fn sleep_state(&self) -> SleepState {
        self.shared.inbox().sleep.state()
    }

    /// Forgets every cached prefix, before any request that is submitted later.
    pub fn reset_prefix_cache(&self) {
        let mut inbox = self.shared.inbox();
        inbox.commands.push_back(Command::ResetPrefixCache);
        self.shared.announce(inbox);
    }

    /// Counters and gauges. `waiting` is live (also while paused), `running` is as of the step under way, the rest as of
    /// the last one.
    pub fn stats(&self) -> EngineStats {
        let (live, paused) = {
            let inbox = self.shared.inbox();
            (inbox.live.len(), inbox.sleep.is_paused())
        };
        let stats = *self.shared.stats();
        EngineStats { waiting: live.saturating_sub(stats.running), paused, ..stats }
    }

    /// Live requests, running or not: what routing compares.
    pub fn load(&self) -> usize {
        self.shared.inbox().live.len()
    }

    /// Records of the steps after number `since` that are still kept, oldest first.
    pub fn step_stats(&self, since: u64) -> Vec<StepRecord> {
        self.shared.steps().since(since)
    }

    /// The settled configuration.
    pub fn info(&self) -> &EngineInfo {
        &self.shared.info
    }

    /// The `system_fingerprint` of every answer.
    pub fn fingerprint(&self) -> &str {
        &self.shared.info.fingerprint
    }

    /// Whether the engine can serve.
    pub fn health(&self) -> Health {
        match &self.shared.inbox().life {
            Life::Running => Health::Serving,
            Life::Finishing | Life::Aborting => Health::Stopping,
            Life::Dead(reason) => Health::Dead(reason.clone()),
        }
    }

    /// Ends the engine and waits for it; true when it ended within `timeout`, without aborting what `how`
    /// meant to finish. A paused engine does not finish anything: it runs into the timeout.
    ///
    /// After the timeout live requests are aborted, which takes effect when the step in flight ends; that is
    /// not waited for. Only for engines that run on their own thread.
    pub fn shutdown(&self, how: Shutdown, timeout: Duration) -> bool {
        let deadline = self.shared.clock.now().saturating_add(timeout);
        let mut inbox = self.shared.inbox();
        if !matches!(inbox.life, Life::Dead(_)) {
            inbox.life = match how {
                Shutdown::Finish => Life::Finishing,
                Shutdown::Abort => Life::Aborting,
            };
            self.shared.announce(inbox);
            inbox = self.shared.inbox();
        }
        loop {
            if inbox.is_over() {
                return true;
            }
            let now = self.shared.clock.now();
            if now >= deadline {
                inbox.life = Life::Aborting;
                self.shared.announce(inbox);
                return false;
            }
            inbox = self.shared.wait_for(inbox, deadline - now);
        }
    }

    fn ask(&self, wanted: Option<SleepLevel>) -> Transition {
        let mut inbox = self.shared.inbox();
        let number = inbox.sleep.ask(wanted);
        self.shared.announce(inbox);
        Transition::new(Arc::clone(&self.shared), number)
    }
}

impl Clone for EngineHandle {
    fn clone(&self) -> Self {
        Self::new(Arc::clone(&self.shared))
    }
}

impl Drop for EngineHandle {
    /// The last handle waits until the engine has given its memory back: a process that ends meanwhile would take the device's
    /// driver away under it.
    fn drop(&mut self) {
        if self.shared.handles.fetch_sub(1, Ordering::AcqRel) > 1 {
            return;
        }
        let inbox = self.shared.inbox();
        let wait = match inbox.thread {
            Thread::None | Thread::Ended => false,
            Thread::Starting => true,
            Thread::Running(thread) => thread != std::thread::current().id(),
        };
        self.shared.announce(inbox);
        if !wait {
            return;
        }
        let inbox = self.shared.inbox();
        let runs = |inbox: &mut Inbox| !inbox.is_over();
        let waited = self.shared.changed.wait_timeout_while(inbox, LAST_WORDS, runs);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }
}

/// Aborts its request when dropped (nothing happens if that has ended).
pub struct RequestGuard {
    shared: Arc<Shared>,
    id: String,
    key: RequestKey,
}

impl RequestGuard {
    /// The request's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The data-parallel rank of the engine that has it.
    pub fn rank(&self) -> usize {
        self.shared.info.config.rank
    }

    /// Aborts the request now; its events still come, up to [`Event::Done`].
    pub fn abort(&self) {
        self.ask(Command::Abort(self.key));
    }

    /// Ends one sample now, with [`crate::FinishReason::Stop`], for callers that found its end in its text: it costs no
    /// further step, and the others' bits are the same. Nothing happens before its first token or after its end.
    pub fn stop_sample(&self, index: u32) {
        self.ask(Command::StopSample { key: self.key, index });
    }

    /// Puts a command about the request into the inbox, if it lives.
    fn ask(&self, command: Command) {
        let mut inbox = self.shared.inbox();
        if inbox.live.get(&self.id) == Some(&self.key) {
            inbox.commands.push_back(command);
            self.shared.announce(inbox);
        }
    }
}

impl Drop for RequestGuard {
    fn drop(&mut self) {
        self.abort();
    }
}

/// What [`RequestStream::try_recv`] found.
#[derive(Clone, Debug, PartialEq)]
pub enum TryEvent {
    /// The next event.
    Ready(Event),
    /// None yet.
    Pending,
    /// The last event was taken before.
    Ended,
}

/// The events of one request, up to [`Event::Done`] or [`Event::Failed`]. Dropping it aborts the request.
pub struct RequestStream {
    events: mpsc::Receiver<Event>,
    guard: RequestGuard,
    ended: bool,
}

impl RequestStream {
    /// The request's id.
    pub fn id(&self) -> &str {
        self.guard.id()
    }

    /// Waits for the next event; `None` after the last one.
    pub fn recv(&mut self) -> Option<Event> {
        if self.ended {
            return None;
        }
        let event = self
            .events
            .recv()
            .unwrap_or_else(|_| Event::Failed(Failure::Engine("the engine is gone".to_owned())));
        Some(self.note(event))
    }

    /// The next event if there is one.
    pub fn try_recv(&mut self) -> TryEvent {
        if self.ended {
            return TryEvent::Ended;
        }
        match self.events.try_recv() {
            Ok(event) => TryEvent::Ready(self.note(event)),
            Err(mpsc::TryRecvError::Empty) => TryEvent::Pending,
            Err(mpsc::TryRecvError::Disconnected) => {
                TryEvent::Ready(self.note(Event::Failed(Failure::Engine("the engine is gone".to_owned()))))
            }
        }
    }

    /// Aborts the request; its events still come, up to [`Event::Done`].
    pub fn abort(&self) {
        self.guard.abort();
    }

    /// Ends one sample, see [`RequestGuard::stop_sample`].
    pub fn stop_sample(&self, index: u32) {
        self.guard.stop_sample(index);
    }

    fn note(&mut self, event: Event) -> Event {
        self.ended = matches!(event, Event::Done(_) | Event::Failed(_));
        event
    }
}

impl Iterator for RequestStream {
    type Item = Event;

    fn next(&mut self) -> Option<Event> {
        self.recv()
    }
}
