//! Sleeping and waking, on a runner that notes what was asked of it.

mod common;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::*};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bitfast_engine::{
    Engine, EngineHandle, Event, Failure, Health, RestoreError, Runner, RunnerError, RunnerInfo, Shutdown,
    SleepError, SleepLevel, SleepState, Step, StepInputs, StepOutputs, SystemClock, VirtualClock,
};
use common::*;

const SOON: Duration = Duration::from_secs(60);

/// What a runner was asked for, how many wake-ups are still to fail, and whether its device is lost.
#[derive(Clone, Default)]
struct Notes {
    calls: Arc<Mutex<Vec<String>>>,
    failures: Arc<AtomicUsize>,
    lost: Arc<AtomicBool>,
}

impl Notes {
    fn push(&self, call: impl Into<String>) {
        self.calls.lock().unwrap().push(call.into());
    }

    fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.calls.lock().unwrap())
    }
}

/// Counts like [`Counting`], and must not run while its memory is gone.
struct Sleeper {
    notes: Notes,
    released: Option<SleepLevel>,
}

impl Runner for Sleeper {
    fn info(&self) -> RunnerInfo {
        Counting.info()
    }

    fn execute(&mut self, step: &StepInputs<'_>) -> Result<StepOutputs, RunnerError> {
        assert_eq!(self.released, None, "a step without memory");
        Counting.execute(step)
    }

    fn deepest_sleep(&self) -> SleepLevel {
        SleepLevel::DropWeights
    }

    fn release(&mut self, level: SleepLevel) {
        assert!(self.released < Some(level), "released {level:?} after {:?}", self.released);
        self.notes.push(format!("release {}", level.number()));
        self.released = Some(level);
    }

    fn restore(&mut self) -> Result<(), RestoreError> {
        self.notes.push("restore");
        if self.notes.lost.load(Acquire) {
            return Err(RestoreError::Lost("the card fell off".to_owned()));
        }
        if self.notes.failures.fetch_update(AcqRel, Acquire, |n| n.checked_sub(1)).is_ok() {
            return Err(RestoreError::Unreadable("told to fail".to_owned()));
        }
        self.released = None;
        Ok(())
    }
}

fn sleeper() -> (Engine<Sleeper>, EngineHandle, Notes) {
    let notes = Notes::default();
    let runner = Sleeper { notes: notes.clone(), released: None };
    let engine = Engine::new(runner, config(), Arc::new(VirtualClock::new())).unwrap();
    let handle = engine.handle();
    (engine, handle, notes)
}

fn spawned() -> (EngineHandle, Notes) {
    let notes = Notes::default();
    let runner = Sleeper { notes: notes.clone(), released: None };
    let engine = Engine::new(runner, config(), Arc::new(SystemClock::new())).unwrap();
    (engine.spawn().unwrap(), notes)
}

fn run_dry(engine: &mut Engine<Sleeper>) {
    while let Step::Ran(_) = engine.step() {
        engine.check();
    }
}

fn asleep(level: SleepLevel) -> SleepState {
    SleepState::Asleep { level, failed_wake: None }
}

#[test]
fn running_requests_go_back_in_line_and_end_as_if_nothing_had_been() {
    for level in [SleepLevel::Pause, SleepLevel::OffloadWeights, SleepLevel::DropWeights] {
        let (mut engine, handle, notes) = sleeper();
        let mut stream = handle.submit(request("a", [1, 2, 3], max_tokens(6))).unwrap();
        engine.step();
        engine.step();
        assert_eq!((handle.stats().running, handle.stats().kv_blocks_used), (1, 1));
        let transition = handle.begin_pause(level).unwrap();
        assert_eq!(engine.step(), Step::Idle);
        transition.wait().unwrap();
        engine.check();
        assert_eq!(handle.sleep_state(), asleep(level));
        let deep = usize::from(level > SleepLevel::Pause);
        assert_eq!((handle.stats().running, handle.stats().waiting), (1 - deep, deep));
        assert_eq!(handle.stats().kv_blocks_used, 1 - deep);
        // Accepted, and queues.
        let mut late = handle.submit(request("b", [9], max_tokens(2))).unwrap();
        assert_eq!(engine.step(), Step::Idle);
        assert_eq!(handle.stats().waiting, 1 + deep);
        let transition = handle.begin_resume();
        run_dry(&mut engine);
        transition.wait().unwrap();
        assert_eq!(handle.sleep_state(), SleepState::Awake);
        let events = ready(&mut stream);
        assert_eq!(tokens(&events, 0), [4, 5, 6, 7, 8, 9]);
        let Some(Event::Done(metrics)) = events.last() else { panic!("{events:?}") };
        assert_eq!(metrics.preemptions, deep as u32);
        assert_eq!(tokens(&ready(&mut late), 0), [10, 11]);
        let calls = match level {
            SleepLevel::Pause => vec![],
            level => vec![format!("release {}", level.number()), "restore".to_owned()],
        };
        assert_eq!(notes.take(), calls);
    }
}

#[test]
fn deeper_sleep_releases_more_and_lighter_sleep_restores_nothing() {
    let (mut engine, handle, notes) = sleeper();
    let go = |level: Option<SleepLevel>, engine: &mut Engine<Sleeper>| {
        let transition = match level {
            Some(level) => handle.begin_pause(level).unwrap(),
            None => handle.begin_resume(),
        };
        engine.step();
        transition.wait().unwrap();
        handle.sleep_state()
    };
    let (pause, offload, drop) = (SleepLevel::Pause, SleepLevel::OffloadWeights, SleepLevel::DropWeights);
    assert_eq!(go(None, &mut engine), SleepState::Awake, "waking up without a sleep");
    assert_eq!(go(Some(offload), &mut engine), asleep(offload));
    assert_eq!(go(Some(offload), &mut engine), asleep(offload));
    assert_eq!(go(Some(pause), &mut engine), asleep(offload));
    assert_eq!(notes.take(), ["release 1"]);
    assert_eq!(go(Some(drop), &mut engine), asleep(drop));
    assert_eq!(go(Some(offload), &mut engine), asleep(drop));
    assert_eq!(go(None, &mut engine), SleepState::Awake);
    assert_eq!(go(None, &mut engine), SleepState::Awake);
    assert_eq!(notes.take(), ["release 2", "restore"]);
    for _ in 0..3 {
        go(Some(drop), &mut engine);
        go(None, &mut engine);
    }
    assert_eq!(notes.take().len(), 6);
}

#[test]
fn of_wishes_at_once_the_last_one_counts() {
    let (mut engine, handle, notes) = sleeper();
    let wishes = [
        handle.begin_pause(SleepLevel::DropWeights).unwrap(),
        handle.begin_resume(),
        handle.begin_pause(SleepLevel::OffloadWeights).unwrap(),
        handle.begin_resume(),
    ];
    let mut stream = handle.submit(request("a", [1], max_tokens(1))).unwrap();
    run_dry(&mut engine);
    wishes.into_iter().for_each(|wish| wish.wait().unwrap());
    assert_eq!(tokens(&ready(&mut stream), 0), [2]);
    assert!(notes.take().is_empty(), "the engine never slept");
}

#[test]
fn a_failed_wake_leaves_the_engine_asleep_with_the_reason() {
    let (mut engine, handle, notes) = sleeper();
    notes.failures.store(2, Release);
    let mut stream = handle.submit(request("a", [1], max_tokens(3))).unwrap();
    engine.step();
    let _ = handle.begin_pause(SleepLevel::DropWeights).unwrap();
    engine.step();
    let reason = RestoreError::Unreadable("told to fail".to_owned());
    for _ in 0..2 {
        let transition = handle.begin_resume();
        assert_eq!(engine.step(), Step::Idle);
        engine.check();
        assert_eq!(transition.wait(), Err(SleepError::Wake(reason.clone())));
        let level = SleepLevel::DropWeights;
        assert_eq!(handle.sleep_state(), SleepState::Asleep { level, failed_wake: Some(reason.clone()) });
        assert_eq!((handle.is_paused(), handle.health()), (true, Health::Serving));
    }
    let transition = handle.begin_resume();
    run_dry(&mut engine);
    transition.wait().unwrap();
    assert_eq!(handle.sleep_state(), SleepState::Awake);
    assert_eq!(tokens(&ready(&mut stream), 0), [2, 3, 4]);
    assert_eq!(notes.take(), ["release 2", "restore", "restore", "restore"]);
}

#[test]
fn a_device_that_is_lost_while_the_engine_sleeps_ends_every_request() {
    let (mut engine, handle, notes) = sleeper();
    notes.lost.store(true, Release);
    let mut streams = vec![handle.submit(request("a", [1], max_tokens(3))).unwrap()];
    engine.step();
    let _ = handle.begin_pause(SleepLevel::DropWeights).unwrap();
    engine.step();
    streams.push(handle.submit(request("b", [2], max_tokens(3))).unwrap());
    let transition = handle.begin_resume();
    assert_eq!(engine.step(), Step::Ended);
    let reason = "the card fell off".to_owned();
    assert_eq!(transition.wait(), Err(SleepError::Dead(reason.clone())));
    assert_eq!(handle.health(), Health::Dead(reason.clone()));
    for mut stream in streams {
        let last = ready(&mut stream).pop().expect("an end");
        assert!(matches!(&last, Event::Failed(Failure::Engine(why)) if *why == reason), "{last:?}");
    }
    assert!(handle.submit(request("c", [3], max_tokens(3))).is_err());
}

#[test]
fn an_engine_on_its_thread_sleeps_and_wakes_while_clients_come_and_go() {
    let (handle, notes) = spawned();
    let clients: Vec<_> = (0..4)
        .map(|i| {
            let handle = handle.clone();
            std::thread::spawn(move || {
                for j in 0..40 {
                    let stream = handle.submit(request(&format!("{i}.{j}"), [i], max_tokens(9))).unwrap();
                    let events: Vec<_> = stream.collect();
                    assert_eq!(tokens(&events, 0), (i + 1..i + 10).collect::<Vec<_>>());
                }
            })
        })
        .collect();
    for round in 0..20 {
        let level = SleepLevel::from_number(round % 3).unwrap();
        handle.pause(level).unwrap();
        assert_eq!(handle.sleep_state(), asleep(level));
        handle.resume().unwrap();
        assert!(!handle.is_paused());
    }
    clients.into_iter().for_each(|client| client.join().unwrap());
    // Of twenty rounds, seven were mere pauses.
    assert_eq!(notes.take().len(), 2 * 13);
    assert!(handle.shutdown(Shutdown::Finish, SOON));
    assert_eq!(handle.resume(), Ok(()), "nothing to wake");
    let error = handle.pause(SleepLevel::DropWeights).unwrap_err();
    assert_eq!(error, SleepError::Dead("it was shut down".to_owned()));
}

#[test]
fn an_engine_that_sleeps_can_be_shut_down() {
    for level in [SleepLevel::Pause, SleepLevel::DropWeights] {
        let (handle, _) = spawned();
        handle.pause(level).unwrap();
        let mut stream = handle.submit(request("a", [1], max_tokens(3))).unwrap();
        // It finishes nothing in its sleep, so there is nothing to wait for.
        assert!(!handle.shutdown(Shutdown::Finish, Duration::ZERO));
        assert!(handle.shutdown(Shutdown::Abort, SOON));
        assert!(stream.by_ref().any(|event| matches!(event, Event::Finished { .. })));
        assert!(matches!(handle.health(), Health::Dead(_)));
    }
}

#[test]
fn an_engine_that_sleeps_without_handles_ends() {
    let (mut engine, handle, _) = sleeper();
    let mut stream = handle.submit(request("a", [1], max_tokens(3))).unwrap();
    engine.step();
    let _ = handle.begin_pause(SleepLevel::OffloadWeights).unwrap();
    engine.step();
    drop(handle);
    assert_eq!(engine.step(), Step::Ended);
    assert!(matches!(ready(&mut stream).last(), Some(Event::Failed(_))));
}

#[test]
fn a_level_that_the_device_lacks_is_refused_and_changes_nothing() {
    let (mut engine, handle) = engine(config());
    let error = handle.pause(SleepLevel::OffloadWeights).unwrap_err();
    assert_eq!(error.to_string(), "sleep level 1 is not supported on this device");
    assert_eq!(handle.sleep_state(), SleepState::Awake);
    let mut stream = handle.submit(request("a", [1], max_tokens(1))).unwrap();
    settle(&mut engine);
    assert_eq!(tokens(&ready(&mut stream), 0), [2]);
    assert_eq!(SleepLevel::from_number(3), None);
}
