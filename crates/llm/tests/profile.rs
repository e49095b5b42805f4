//! The profiler's files, opened and read: names, nesting, and counts that agree with the step records.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bitfast_llm::{
    EngineArgs, Error, LLM, LoadFormat, ProfileError, Request, SamplingParams, Shutdown, SleepLevel,
    StepRecord,
};
use serde_json::Value;

fn load(dir: Option<&Path>, engines: usize) -> LLM {
    let args = EngineArgs {
        load_format: LoadFormat::Dummy,
        device: bitfast_llm::Device::Cpu,
        data_parallel_size: engines,
        threads: std::num::NonZeroUsize::new(2 * engines),
        profile_dir: dir.map(Path::to_path_buf),
        max_num_batched_tokens: Some(128),
        max_num_seqs: Some(8),
        ..EngineArgs::new("tiny-llama")
    };
    LLM::new(args).unwrap()
}

fn params() -> SamplingParams {
    SamplingParams { max_tokens: Some(5), ignore_eos: true, ..SamplingParams::greedy() }
}

fn work(llm: &LLM) {
    let prompts = (0..6u32).map(|i| (0..70).map(|j| (i * 91 + j * 3) % 250).collect::<Vec<_>>());
    llm.generate(prompts, &params()).unwrap();
}

fn read(file: &Path) -> Value {
    let mut text = String::new();
    flate2::read::GzDecoder::new(std::fs::File::open(file).unwrap()).read_to_string(&mut text).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// A span, in nanoseconds.
#[derive(Clone, Debug)]
struct Span {
    name: String,
    lane: u64,
    start: u64,
    end: u64,
    step: Option<u64>,
}

impl Span {
    fn holds(&self, other: &Span) -> bool {
        self.start <= other.start && other.end <= self.end
    }
}

fn spans(trace: &Value, category: &str) -> Vec<Span> {
    let ns = |v: &Value| (v.as_f64().unwrap() * 1000.0).round() as u64;
    let events = trace["traceEvents"].as_array().unwrap();
    let of_category = events.iter().filter(|e| e["ph"] == "X" && e["cat"] == category);
    of_category
        .map(|e| Span {
            name: e["name"].as_str().unwrap().to_owned(),
            lane: e["tid"].as_u64().unwrap(),
            start: ns(&e["ts"]),
            end: ns(&e["ts"]) + ns(&e["dur"]),
            step: e["args"]["step"].as_u64(),
        })
        .collect()
}

/// The name that a step's span must have.
fn name_of(record: &StepRecord, prefill_seqs: u32) -> String {
    format!(
        "execute_context_{prefill_seqs}({})_generation_{}({})",
        record.prefill_tokens,
        record.seqs - prefill_seqs,
        record.decode_tokens
    )
}

#[test]
fn a_trace_shows_every_step_and_every_op_inside_it() {
    let dir = tempfile::tempdir().unwrap();
    let llm = load(Some(dir.path()), 1);
    work(&llm);
    let before = llm.fleet().stats().steps;
    llm.fleet().start_profile("a.b-c_1").unwrap();
    assert!(llm.fleet().is_profiling());
    work(&llm);
    let files = llm.fleet().stop_profile().unwrap();
    let after = llm.fleet().stats().steps;
    work(&llm);
    assert_eq!(files, [dir.path().join("a.b-c_1.rank0.json.gz")]);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing else is left behind");

    let trace = read(&files[0]);
    let meta = &trace["metadata"];
    assert_eq!(meta["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!((&meta["model"], &meta["rank"]), (&"tiny-llama".into(), &0.into()));
    assert_eq!(meta["device"], llm.info().device);
    assert_eq!(meta["fingerprint"], llm.info().fingerprint);
    assert_eq!((&meta["dropped_op_spans"], &meta["dropped_steps"]), (&0.into(), &0.into()));

    let parts = ["schedule", "execute", "commit"];
    let (parts, steps): (Vec<_>, Vec<_>) =
        spans(&trace, "step").into_iter().partition(|s| parts.contains(&s.name.as_str()));
    let records: BTreeMap<u64, StepRecord> =
        llm.step_stats(before).into_iter().filter(|r| r.id <= after).map(|r| (r.id, r)).collect();
    assert_eq!(steps.iter().map(|s| s.step.unwrap()).collect::<Vec<_>>(), Vec::from_iter(before + 1..=after));
    assert_eq!(parts.len(), 3 * steps.len());
    let ops = spans(&trace, "op");
    for (i, step) in steps.iter().enumerate() {
        let record = &records[&step.step.unwrap()];
        let prefilling = (0..=record.seqs).find(|n| step.name == name_of(record, *n));
        let prefilling = prefilling.unwrap_or_else(|| panic!("{} is no name of {record:?}", step.name));
        assert_eq!(prefilling > 0, record.prefill_tokens > 0, "{}", step.name);
        assert_eq!(step.start, record.start.as_nanos() as u64);
        assert_eq!(step.end, (record.start + record.duration).as_nanos() as u64);
        let mine = &parts[3 * i..3 * i + 3];
        assert!(mine.iter().all(|part| step.holds(part) && part.lane == 0));
        assert!(mine.is_sorted_by(|a, b| a.end <= b.start), "{mine:?}");
        // Each op of the model once on the engine's thread, within `execute`.
        let inside: Vec<&Span> = ops.iter().filter(|op| mine[1].holds(op) && op.lane == 0).collect();
        let names: BTreeSet<&str> = inside.iter().map(|op| op.name.as_str()).collect();
        let wanted = ["embed", "attention layer 0", "attention layer 1", "qkv_prep layer 1", "sample"];
        assert!(wanted.iter().all(|name| names.contains(name)), "{names:?}");
        assert_eq!(inside.iter().filter(|op| op.name == "attention layer 1").count(), 1);
        assert!(inside.is_sorted_by(|a, b| a.end <= b.start), "ops of a thread do not overlap");
    }
    for op in &ops {
        let held = |outer: &&Span| outer.holds(op) && outer.name == "execute";
        assert_eq!(parts.iter().filter(held).count(), 1, "{op:?} is outside of every step");
    }
    let lanes: Vec<&str> = trace["traceEvents"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|e| e["name"] == "thread_name")
        .map(|e| e["args"]["name"].as_str().unwrap())
        .collect();
    assert_eq!(lanes, ["engine thread, CPU thread 0", "CPU thread 1"]);
}

/// On a busy machine the second thread may come too late to every op of so small a model: recordings go on until it came.
#[test]
fn parts_of_the_other_thread_lie_within_their_ops() {
    let dir = tempfile::tempdir().unwrap();
    let llm = load(Some(dir.path()), 1);
    let came = (0..500).find_map(|_| {
        llm.fleet().start_profile("t").unwrap();
        work(&llm);
        let ops = spans(&read(&llm.fleet().stop_profile().unwrap()[0]), "op");
        ops.iter().any(|op| op.lane == 1).then_some(ops)
    });
    let ops = came.expect("the second thread did nothing in 500 recordings");
    for part in ops.iter().filter(|op| op.lane == 1) {
        let op = ops.iter().find(|op| op.lane == 0 && op.holds(part)).unwrap();
        assert_eq!(op.name, part.name);
    }
}

#[test]
fn mistakes_are_typed_and_change_nothing() {
    let none = load(None, 1);
    assert!(matches!(none.fleet().start_profile("x"), Err(Error::Profile(ProfileError::NoDirectory))));
    let dir = tempfile::tempdir().unwrap();
    let llm = load(Some(&dir.path().join("made/on/demand")), 2);
    let fleet = llm.fleet();
    for bad in ["", "a/b", "../a", "..", ".a", "a b", "a\0", "ä", &"x".repeat(129)] {
        let error = fleet.start_profile(bad).unwrap_err();
        assert!(matches!(&error, Error::Profile(ProfileError::Prefix(p)) if p == bad), "{error}");
        assert!(error.is_user_error() && error.to_string().starts_with("prefix: "));
    }
    assert!(matches!(fleet.stop_profile(), Err(Error::Profile(ProfileError::NotRunning))));
    fleet.start_profile(&"x".repeat(128)).unwrap();
    let error = fleet.start_profile("y").unwrap_err();
    assert!(matches!(error, Error::Profile(ProfileError::Running { prefix }) if prefix == "x".repeat(128)));
    assert_eq!(fleet.stop_profile().unwrap().len(), 2);
    // Where it cannot write, it does not begin.
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    let llm = load(Some(&file), 1);
    assert!(matches!(llm.fleet().start_profile("x"), Err(Error::Profile(ProfileError::File { .. }))));
    assert!(!llm.fleet().is_profiling());
}

#[test]
fn every_engine_writes_its_own_file_and_none_is_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let llm = load(Some(dir.path()), 2);
    let mut all: Vec<PathBuf> = Vec::new();
    for round in 1..=2 {
        llm.fleet().start_profile("p").unwrap();
        for rank in 0..2 {
            let request = Request { data_parallel_rank: Some(rank), ..Request::new(vec![1, 2], params()) };
            llm.stream(request).unwrap().finish().unwrap();
        }
        let files = llm.fleet().stop_profile().unwrap();
        for (rank, file) in files.iter().enumerate() {
            let trace = read(file);
            assert_eq!(trace["metadata"]["rank"], rank);
            assert!(trace["traceEvents"].as_array().unwrap().iter().all(|e| e["pid"] == rank));
            assert_eq!(spans(&trace, "step").iter().filter(|s| s.step.is_some()).count(), 5, "round {round}");
        }
        all.extend(files);
    }
    let names: Vec<_> = all.iter().map(|f| f.file_name().unwrap().to_str().unwrap()).collect();
    assert_eq!(names, ["p.rank0.json.gz", "p.rank1.json.gz", "p.rank0-2.json.gz", "p.rank1-2.json.gz"]);
}

#[test]
fn a_recording_ends_whatever_the_engine_does() {
    let dir = tempfile::tempdir().unwrap();
    let llm = load(Some(dir.path()), 1);
    let fleet = llm.fleet();
    // Nothing ran.
    fleet.start_profile("idle").unwrap();
    assert!(spans(&read(&fleet.stop_profile().unwrap()[0]), "step").is_empty());
    // It sleeps in the middle.
    fleet.start_profile("asleep").unwrap();
    work(&llm);
    fleet.pause(SleepLevel::DropWeights).unwrap();
    assert!(!spans(&read(&fleet.stop_profile().unwrap()[0]), "op").is_empty());
    fleet.start_profile("woken").unwrap();
    fleet.resume().unwrap();
    work(&llm);
    assert!(!spans(&read(&fleet.stop_profile().unwrap()[0]), "op").is_empty());
    // It ends: the file is written all the same, and there is no other recording.
    fleet.start_profile("ended").unwrap();
    work(&llm);
    assert!(fleet.shutdown(Shutdown::Finish, Duration::from_secs(60)));
    assert!(!spans(&read(&dir.path().join("ended.rank0.json.gz")), "op").is_empty());
    assert!(matches!(fleet.start_profile("late"), Err(Error::Profile(ProfileError::Dead(_)))));
    assert!(!fleet.is_profiling());
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 4, "no partial file is left");
}

#[test]
fn recording_moves_no_bit() {
    let dir = tempfile::tempdir().unwrap();
    let llm = load(Some(dir.path()), 1);
    let answer = || {
        let params = SamplingParams { logprobs: Some(3), ..params() };
        format!("{:?}", llm.generate([vec![3u32, 1, 4, 1, 5]], &params).unwrap()[0].outputs)
    };
    let truth = answer();
    llm.fleet().start_profile("p").unwrap();
    assert_eq!(answer(), truth);
    llm.fleet().stop_profile().unwrap();
    assert_eq!(answer(), truth);
}
