//! A runner that computes behind the host: a step's events are told while the next one runs, all of them and in their order.

#[allow(dead_code, reason = "the other test binaries use the rest")]
mod common;

use std::sync::{Arc, Mutex};

use bitfast_engine::{
    Engine, EngineConfig, EngineRequest, Event, FinishReason, Runner, RunnerError, RunnerInfo, Step,
    StepInputs, StepOutputs, VirtualClock,
};
use common::*;

type Log = Arc<Mutex<Vec<String>>>;

struct Behind(Log);

impl Runner for Behind {
    fn info(&self) -> RunnerInfo {
        Counting.info()
    }

    fn runs_behind(&self) -> bool {
        true
    }

    fn execute(&mut self, _: &StepInputs<'_>) -> Result<StepOutputs, RunnerError> {
        unreachable!("the engine gives the runner something to do meanwhile")
    }

    fn execute_and(
        &mut self,
        step: &StepInputs<'_>,
        meanwhile: &mut dyn FnMut(),
    ) -> Result<StepOutputs, RunnerError> {
        self.0.lock().unwrap().push("queued".to_owned());
        meanwhile();
        self.0.lock().unwrap().push("computed".to_owned());
        Counting.execute(step)
    }
}

fn engine(log: &Log) -> (Engine<Behind>, bitfast_engine::EngineHandle) {
    let engine = Engine::new(Behind(Arc::clone(log)), config(), Arc::new(VirtualClock::new())).unwrap();
    let handle = engine.handle();
    (engine, handle)
}

#[test]
fn events_are_told_while_the_next_step_runs() {
    let log = Log::default();
    let (mut engine, handle) = engine(&log);
    let told = Arc::clone(&log);
    let sink = move |event: Event| {
        let name = match event {
            Event::Started { .. } => "started".to_owned(),
            Event::Token { token, .. } => token.to_string(),
            Event::Finished { .. } => "finished".to_owned(),
            Event::Done(_) => "done".to_owned(),
            other => panic!("{other:?}"),
        };
        told.lock().unwrap().push(name);
    };
    let _guard = handle.submit_with(request("a", [1], max_tokens(2)), Box::new(sink)).unwrap();
    while let Step::Ran(_) = engine.step() {
        engine.check();
    }
    let expected = ["queued", "started", "computed", "queued", "2", "computed", "3", "finished", "done"];
    assert_eq!(*log.lock().unwrap(), expected);
}

#[test]
fn all_requests_end_as_on_a_runner_that_does_not() {
    let events = |request: &dyn Fn() -> Vec<EngineRequest>, behind: bool| -> Vec<Vec<Event>> {
        fn all<R: Runner>(mut engine: Engine<R>, requests: Vec<EngineRequest>) -> Vec<Vec<Event>> {
            let handle = engine.handle();
            let mut streams: Vec<_> = requests.into_iter().map(|r| handle.submit(r).unwrap()).collect();
            handle.abort("aborted");
            while let Step::Ran(_) = engine.step() {}
            streams.iter_mut().map(ready).collect()
        }
        let config = EngineConfig { prefix_caching: false, ..config() };
        let clock = Arc::new(VirtualClock::new());
        match behind {
            true => all(Engine::new(Behind(Log::default()), config, clock).unwrap(), request()),
            false => all(Engine::new(Counting, config, clock).unwrap(), request()),
        }
    };
    let requests = || {
        let ids = ["a", "aborted", "long", "nan", "eos"];
        let first = [1, 2, 3, NAN - 3, EOS - 7];
        let requests = ids.iter().zip(first).map(|(id, token)| request(id, [token; 9], max_tokens(20)));
        requests.collect()
    };
    let (ours, theirs) = (events(&requests, true), events(&requests, false));
    assert_eq!(ours, theirs);
    assert!(ours[1].iter().any(|e| matches!(e, Event::Finished { reason: FinishReason::Abort, .. })));
    assert!(ours.iter().all(|events| matches!(events.last(), Some(Event::Done(_) | Event::Failed(_)))));
}

#[test]
fn an_engine_that_dies_has_told_everything_before() {
    let (mut engine, handle) = engine(&Log::default());
    let mut stream = handle.submit(request("a", [1], max_tokens(20))).unwrap();
    assert!(matches!(engine.step(), Step::Ran(_)));
    let _fatal = handle.submit(request("b", [FAILS], max_tokens(20))).unwrap();
    assert_eq!(engine.step(), Step::Ended);
    let events = ready(&mut stream);
    assert_eq!(tokens(&events, 0), [2]);
    assert!(matches!(events.last(), Some(Event::Failed(_))), "{events:?}");
}

/// Events that wait behind the one that a sink panics at are told all the same.
#[test]
fn a_sink_that_panics_swallows_no_events_of_others() {
    let engine = Engine::new(Behind(Log::default()), config(), Arc::new(VirtualClock::new())).unwrap();
    let handle = engine.handle();
    let bad = |event| assert!(matches!(event, Event::Started { .. }), "told to panic");
    let _bad = handle.submit_with(request("bad", [1], max_tokens(9)), Box::new(bad)).unwrap();
    // It is over in the step whose events the other one panics at.
    let (sender, events) = std::sync::mpsc::channel();
    let good = move |event| drop(sender.send(event));
    let _good = handle.submit_with(request("good", [1], max_tokens(1)), Box::new(good)).unwrap();
    engine.run();
    let events: Vec<Event> = events.iter().collect();
    assert_eq!(tokens(&events, 0), [2]);
    assert!(matches!(events.last(), Some(Event::Done(_))), "{events:?}");
}
