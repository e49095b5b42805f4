//! The engine as a service: its handle, its thread, its end.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, mpsc};
use std::time::Duration;

use bitfast_engine::{
    Engine, EngineConfig, EngineError, EngineHandle, Event, Failure, FinishReason, Health, Runner,
    RunnerError, RunnerInfo, Shutdown, SleepLevel, Step, StepInputs, StepOutputs, SubmitError, SystemClock,
    TryEvent, VirtualClock,
};
use common::*;

const SOON: Duration = Duration::from_secs(60);

fn spawn() -> bitfast_engine::EngineHandle {
    Engine::new(Counting, config(), Arc::new(SystemClock::new())).unwrap().spawn().unwrap()
}

#[test]
fn requests_from_many_threads_are_served() {
    let handle = spawn();
    let clients: Vec<_> = (0..8)
        .map(|i| {
            let handle = handle.clone();
            std::thread::spawn(move || {
                for j in 0..20 {
                    let stream = handle.submit(request(&format!("{i}.{j}"), [i], max_tokens(5))).unwrap();
                    let events: Vec<_> = stream.collect();
                    assert_eq!(tokens(&events, 0), (i + 1..i + 6).collect::<Vec<_>>());
                }
            })
        })
        .collect();
    for client in clients {
        client.join().unwrap();
    }
    assert_eq!(handle.stats().generation_tokens, 8 * 20 * 5);
    assert!(handle.shutdown(Shutdown::Finish, SOON));
    assert_eq!(handle.health(), Health::Dead("it was shut down".to_owned()));
    let error = handle.submit(request("late", [1], max_tokens(1))).map(drop).unwrap_err();
    assert_eq!(error, SubmitError::Dead("it was shut down".to_owned()));
}

#[test]
fn a_failing_runner_fails_everything_with_the_reason() {
    for (token, reason) in [(FAILS, "told to fail"), (PANICS, "told to panic")] {
        let handle = spawn();
        handle.pause(SleepLevel::Pause).unwrap();
        let streams: Vec<_> = [1, token]
            .iter()
            .map(|t| handle.submit(request(&t.to_string(), [*t], max_tokens(60))).unwrap())
            .collect();
        handle.resume().unwrap();
        for stream in streams {
            let Some(Event::Failed(Failure::Engine(message))) = stream.last() else { panic!("no failure") };
            assert!(message.contains(reason), "{message}");
        }
        let Health::Dead(message) = handle.health() else { panic!("it lives") };
        assert!(message.contains(reason), "{message}");
        let error = handle.submit(request("late", [1], max_tokens(1))).map(drop).unwrap_err();
        assert!(matches!(error, SubmitError::Dead(message) if message.contains(reason)));
    }
}

/// A sink must not panic. One that does, and does so again when it is told of the end, ends the engine and nothing else.
#[test]
fn a_sink_that_panics_ends_the_engine_and_all_others_are_told() {
    let handle = spawn();
    handle.pause(SleepLevel::Pause).unwrap();
    let bad = |event| assert!(matches!(event, Event::Started { .. }), "told to panic");
    let _bad = handle.submit_with(request("bad", [1], max_tokens(9)), Box::new(bad)).unwrap();
    // A sender of our own: a sink that is dropped untold would go unnoticed.
    let (sender, events) = mpsc::channel();
    let ours = sender.clone();
    let good = move |event| drop(ours.send(event));
    let _good = handle.submit_with(request("good", [1], max_tokens(9)), Box::new(good)).unwrap();
    handle.resume().unwrap();
    let last = std::iter::from_fn(|| events.recv_timeout(SOON).ok());
    let failed = last.into_iter().find(|event| !matches!(event, Event::Started { .. } | Event::Token { .. }));
    let Some(Event::Failed(Failure::Engine(message))) = failed else { panic!("{failed:?}") };
    assert!(message.contains("told to panic"), "{message}");
    assert!(handle.shutdown(Shutdown::Finish, SOON), "its thread has ended");
}

#[test]
fn a_request_behind_a_sink_that_panics_is_told() {
    let (engine, handle) = engine(config());
    let bad = handle
        .submit_with(request("bad", [1], max_tokens(9)), Box::new(|_| panic!("told to panic")))
        .unwrap();
    bad.abort();
    let (sender, events) = mpsc::channel();
    let ours = sender.clone();
    let good = move |event| drop(ours.send(event));
    let _good = handle.submit_with(request("good", [1], max_tokens(9)), Box::new(good)).unwrap();
    // All three are taken in at once.
    engine.run();
    assert!(matches!(events.try_recv(), Ok(Event::Failed(Failure::Engine(_)))));
}

#[test]
fn dropping_the_stream_aborts() {
    let (mut engine, handle) = engine(config());
    let dropped = handle.submit(request("dropped", [1], max_tokens(50))).unwrap();
    let mut kept = handle.submit(request("kept", [1], max_tokens(3))).unwrap();
    engine.step();
    assert_eq!(handle.stats().running, 2);
    drop(dropped);
    engine.step();
    engine.check();
    assert_eq!((handle.stats().running, handle.stats().finished_abort), (1, 1));
    settle(&mut engine);
    assert_eq!(tokens(&ready(&mut kept), 0), [2, 3, 4]);
    assert_eq!(engine.scheduler().stats().blocks_used, 0);
}

/// A guard is about its own request, not about a later one of the same name.
#[test]
fn an_old_guard_leaves_a_namesake_alone() {
    let (mut engine, handle) = engine(config());
    let mut old = handle.submit(request("r", [1], max_tokens(1))).unwrap();
    settle(&mut engine);
    assert!(matches!(ready(&mut old).last(), Some(Event::Done(_))));
    let mut new = handle.submit(request("r", [5], max_tokens(3))).unwrap();
    old.abort();
    drop(old);
    settle(&mut engine);
    assert_eq!(tokens(&ready(&mut new), 0), [6, 7, 8]);
}

/// A runner with room for half of its model's longest sequence.
struct Few;

impl Runner for Few {
    fn info(&self) -> RunnerInfo {
        RunnerInfo { num_blocks: 8, ..Counting.info() }
    }

    fn execute(&mut self, step: &StepInputs<'_>) -> Result<StepOutputs, RunnerError> {
        Counting.execute(step)
    }
}

#[test]
fn the_longest_sequence_is_one_that_the_cache_holds() {
    let mut engine = Engine::new(Few, config(), Arc::new(VirtualClock::new())).unwrap();
    let handle = engine.handle();
    assert_eq!((handle.info().max_model_len, handle.info().kv_cache_tokens()), (32, 32));
    let error = handle.submit(request("long", 0..32, max_tokens(1))).map(drop).unwrap_err();
    assert_eq!(error, SubmitError::PromptTooLong { prompt_tokens: 32, max_model_len: 32 });
    let mut stream = handle.submit(request("r", 0..30, max_tokens(9))).unwrap();
    while let Step::Ran(_) = engine.step() {}
    assert_eq!(tokens(&ready(&mut stream), 0), [30, 31]);
}

/// A prompt of one token is a prompt all the same.
#[test]
fn records_tell_prompts_from_decodes() {
    let (mut engine, handle) = engine(config());
    let _stream = handle.submit(request("r", [1], max_tokens(2))).unwrap();
    let rows = |step| match step {
        Step::Ran(record) => (record.prefill_tokens, record.decode_tokens),
        other => panic!("{other:?}"),
    };
    assert_eq!([rows(engine.step()), rows(engine.step())], [(1, 0), (0, 1)]);
}

#[test]
fn aborting_by_id_ends_the_samples() {
    let (mut engine, handle) = engine(config());
    let mut stream = handle.submit(request("a", [1], max_tokens(50))).unwrap();
    engine.step();
    assert!(handle.abort("a") && !handle.abort("b"));
    engine.step();
    let events = ready(&mut stream);
    let end = Event::Finished { index: 0, reason: FinishReason::Abort, stop_token: None };
    assert_eq!(events[events.len() - 2], end);
    assert!(!handle.abort("a"));
    assert_eq!(stream.try_recv(), TryEvent::Ended);
    // Aborted before it started: no start, but an end.
    let mut stream = handle.submit(request("a", [1], max_tokens(50))).unwrap();
    stream.abort();
    engine.step();
    assert_eq!(ready(&mut stream)[0], end);
}

#[test]
fn a_paused_engine_queues() {
    let (mut engine, handle) = engine(config());
    handle.pause(SleepLevel::Pause).unwrap();
    assert!(handle.pause(SleepLevel::DropWeights).is_err());
    let mut stream = handle.submit(request("a", [1], max_tokens(2))).unwrap();
    assert_eq!((engine.step(), handle.is_paused()), (Step::Idle, true));
    assert_eq!((handle.stats().waiting, handle.stats().running), (1, 0));
    handle.resume().unwrap();
    settle(&mut engine);
    assert_eq!(tokens(&ready(&mut stream), 0), [2, 3]);
}

/// What came before a wake-up is in the first step after it, however the threads run.
/// Also when it comes after the look at the inbox: here, while an abort is told.
#[test]
fn a_pause_holds_for_the_step_that_is_about_to_begin() {
    let (mut engine, handle) = engine(config());
    let pauses = handle.clone();
    let sink = move |_| drop(pauses.begin_pause(SleepLevel::Pause));
    let aborted = handle.submit_with(request("aborted", [1], max_tokens(9)), Box::new(sink)).unwrap();
    aborted.abort();
    let mut stream = handle.submit(request("r", [1], max_tokens(1))).unwrap();
    assert_eq!(engine.step(), Step::Idle);
    assert!(handle.is_paused() && ready(&mut stream).is_empty());
    let _ = handle.begin_resume();
    settle(&mut engine);
    assert_eq!(tokens(&ready(&mut stream), 0), [2]);
}

#[test]
fn a_wake_up_does_not_overtake_requests() {
    let handle = spawn();
    for round in 0..300 {
        handle.pause(SleepLevel::Pause).unwrap();
        let since = handle.stats().steps;
        let streams: Vec<_> = (0..4)
            .map(|i| handle.submit(request(&format!("{round}.{i}"), [i], max_tokens(2))).unwrap())
            .collect();
        handle.resume().unwrap();
        streams.into_iter().for_each(|stream| assert_eq!(tokens(&stream.collect::<Vec<_>>(), 0).len(), 2));
        let steps = handle.step_stats(since);
        assert_eq!(steps[0].seqs, 4, "round {round}: {steps:?}");
    }
}

#[test]
fn the_queue_is_bounded_and_ids_are_unique() {
    let (mut engine, handle) = engine(EngineConfig { max_queued: 2, ..config() });
    let _a = handle.submit(request("a", [1], max_tokens(9))).unwrap();
    let error = handle.submit(request("a", [1], max_tokens(9))).map(drop).unwrap_err();
    assert_eq!(error, SubmitError::DuplicateId("a".to_owned()));
    let _b = handle.submit(request("b", [1], max_tokens(9))).unwrap();
    let error = handle.submit(request("c", [1], max_tokens(9))).map(drop).unwrap_err();
    assert_eq!(error, SubmitError::QueueFull { limit: 2 });
    engine.step();
    let _c = handle.submit(request("c", [1], max_tokens(9))).unwrap();
}

#[test]
fn prefix_hits_and_resets_show() {
    let (mut engine, handle) = engine(config());
    let mut cached = |id: &str| {
        let mut stream = handle.submit(request(id, 0..9, max_tokens(1))).unwrap();
        settle(&mut engine);
        match ready(&mut stream)[0] {
            Event::Started { cached_tokens, .. } => cached_tokens,
            ref event => panic!("{event:?}"),
        }
    };
    assert_eq!((cached("a"), cached("b")), (0, 8));
    handle.reset_prefix_cache();
    assert_eq!((cached("c"), cached("d")), (0, 8));
    let stats = handle.stats();
    assert_eq!((stats.prefix_queries, stats.prefix_hits, stats.prompt_tokens), (36, 16, 36));
}

#[test]
fn steps_are_recorded_in_a_bounded_ring() {
    let (mut engine, handle) = engine(EngineConfig { step_records: 3, ..config() });
    let _stream = handle.submit(request("a", 0..5, max_tokens(6))).unwrap();
    settle(&mut engine);
    let records = handle.step_stats(0);
    assert_eq!(records.iter().map(|r| r.id).collect::<Vec<_>>(), [4, 5, 6]);
    assert_eq!((records[0].prefill_tokens, records[0].decode_tokens, records[0].seqs), (0, 1, 1));
    assert_eq!(handle.step_stats(5).len(), 1);
    assert!(handle.step_stats(6).is_empty());
}

/// Who times a request by its steps reads the records when it has ended.
#[test]
fn a_request_ends_after_the_record_of_its_last_step() {
    for tokens in [1, 3] {
        let (mut engine, handle) = engine(config());
        let (records, seen) = std::sync::mpsc::channel();
        let reader = handle.clone();
        let sink = Box::new(move |event: Event| {
            if let Event::Done(_) = event {
                records.send(reader.step_stats(0).len()).unwrap();
            }
        });
        let _guard = handle.submit_with(request("a", 0..5, max_tokens(tokens)), sink).unwrap();
        settle(&mut engine);
        assert_eq!(seen.try_recv(), Ok(tokens as usize));
    }
}

#[test]
fn shutting_down_finishes_or_aborts() {
    let handle = spawn();
    let stream = handle.submit(request("a", [1], max_tokens(60))).unwrap();
    assert!(handle.shutdown(Shutdown::Finish, SOON));
    assert_eq!(tokens(&stream.collect::<Vec<_>>(), 0).len(), 60);

    let handle = spawn();
    handle.pause(SleepLevel::Pause).unwrap();
    let stream = handle.submit(request("a", [1], max_tokens(60))).unwrap();
    assert!(!handle.shutdown(Shutdown::Finish, Duration::ZERO), "a paused engine finishes nothing");
    assert!(matches!(stream.last(), Some(Event::Done(_))));
}

#[test]
fn the_thread_ends_with_its_last_handle() {
    let handle = spawn();
    let (ended, wait) = mpsc::channel::<()>();
    let guard = handle
        .submit_with(
            request("a", [1], max_tokens(5)),
            // Dropped with the request, at the latest with the engine.
            Box::new(move |_| {
                let _keep = &ended;
            }),
        )
        .unwrap();
    drop(handle);
    assert_eq!(wait.recv_timeout(SOON), Err(mpsc::RecvTimeoutError::Disconnected));
    drop(guard);
}

#[test]
fn an_engine_that_is_dropped_fails_its_requests() {
    let (engine, handle) = engine(config());
    let mut stream = handle.submit(request("a", [1], max_tokens(5))).unwrap();
    drop(engine);
    assert_eq!(stream.recv(), Some(Event::Failed(Failure::Engine("it was dropped".to_owned()))));
    assert_eq!(stream.recv(), None);
}

#[test]
fn limits_beyond_the_runner_are_refused() {
    let clock = Arc::new(SystemClock::new());
    let config = EngineConfig { max_num_batched_tokens: 17, ..config() };
    let error = Engine::new(Counting, config, clock).map(drop).unwrap_err();
    assert!(matches!(error, EngineError::BeyondRunner { name: "max_num_batched_tokens", .. }), "{error}");
}

#[test]
fn the_fingerprint_has_its_form() {
    let (_engine, handle) = engine(config());
    assert_eq!(handle.fingerprint(), "bitfast-v1-portable-abababababababab");
}

/// Notes what the figures are while it computes: (running, waiting).
struct Asking {
    handle: Arc<OnceLock<EngineHandle>>,
    seen: Arc<Mutex<Vec<(usize, usize)>>>,
}

impl Runner for Asking {
    fn info(&self) -> RunnerInfo {
        Counting.info()
    }

    fn execute(&mut self, step: &StepInputs<'_>) -> Result<StepOutputs, RunnerError> {
        let stats = self.handle.get().unwrap().stats();
        self.seen.lock().unwrap().push((stats.running, stats.waiting));
        Counting.execute(step)
    }
}

#[test]
fn figures_are_true_during_a_step() {
    let (handle, seen) = (Arc::default(), Arc::default());
    let runner = Asking { handle: Arc::clone(&handle), seen: Arc::clone(&seen) };
    let clock = Arc::new(VirtualClock::new());
    let mut engine = Engine::new(runner, EngineConfig { max_num_seqs: 2, ..config() }, clock).unwrap();
    assert!(handle.set(engine.handle()).is_ok());
    let streams: Vec<_> = (0..3)
        .map(|i| handle.get().unwrap().submit(request(&i.to_string(), [i], max_tokens(1))).unwrap())
        .collect();
    while let Step::Ran(_) = engine.step() {}
    assert_eq!(*seen.lock().unwrap(), [(2, 1), (1, 0)]);
    drop(streams);
}

/// Takes its time to give its memory back.
struct SlowToGo(Arc<AtomicBool>);

impl Runner for SlowToGo {
    fn info(&self) -> RunnerInfo {
        Counting.info()
    }

    fn execute(&mut self, step: &StepInputs<'_>) -> Result<StepOutputs, RunnerError> {
        Counting.execute(step)
    }
}

impl Drop for SlowToGo {
    fn drop(&mut self) {
        std::thread::sleep(Duration::from_millis(50));
        self.0.store(true, Ordering::SeqCst);
    }
}

#[test]
fn who_ends_an_engine_waits_until_its_memory_is_given_back() {
    let spawn = || {
        let gone = Arc::new(AtomicBool::new(false));
        let runner = SlowToGo(Arc::clone(&gone));
        let engine = Engine::new(runner, config(), Arc::new(SystemClock::new())).unwrap();
        (engine.spawn().unwrap(), gone)
    };
    let (handle, gone) = spawn();
    drop(handle.clone());
    assert!(!gone.load(Ordering::SeqCst), "a clone is no end");
    drop(handle);
    assert!(gone.load(Ordering::SeqCst), "after the last handle");
    let (handle, gone) = spawn();
    assert!(handle.shutdown(Shutdown::Abort, SOON));
    assert!(gone.load(Ordering::SeqCst), "after the shutdown");
}
