//! The command on a machine with a GPU, where there is none: `fake/cuda.c` stands in for driver, compiler and cuBLASLt. It computes nothing, so
//! these tests are about all the rest: what is refused in which words, that every call keeps the driver's rules (it aborts where one does not), and
//! that no call that fails is a hang, a panic, or a request without an end. All in the unconstrained mode, since it does not pass the self-check.

#![cfg(target_os = "linux")]

mod common;

use std::io::{BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Output, Stdio};

const MODEL: [&str; 8] = [
    "--model",
    "tiny-llama",
    "--load-format",
    "dummy",
    "--skip-tokenizer-init",
    "--device",
    "cuda",
    "--no-batch-invariant",
];
const SMALL: [&str; 6] =
    ["--kv-cache-memory", "16MiB", "--max-num-seqs", "8", "--max-num-batched-tokens", "256"];

/// A folder with libraries under the names that the loader is asked for.
struct Machine(tempfile::TempDir);

impl Machine {
    fn new() -> Self {
        Self::with(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake/cuda.c"))
    }

    fn with(source: &Path) -> Self {
        let machine = Self(tempfile::tempdir().unwrap());
        let compiler = Command::new("cc")
            .args(["-shared", "-fPIC", "-O1", "-pthread", "-o"])
            .arg(machine.library())
            .arg(source)
            .status();
        assert!(compiler.expect("a C compiler").success());
        machine
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn library(&self) -> PathBuf {
        self.path("libcuda.so.1")
    }

    /// The command there; `fake` is explained in `fake/cuda.c`.
    fn bitfast(&self, fake: &str, args: &[&str]) -> Command {
        let mut command = Command::new("timeout");
        command.args(["--kill-after=5", "60", env!("CARGO_BIN_EXE_bitfast")]).args(args);
        for variable in bitfast::env::ALL.iter().flat_map(|v| v.names) {
            command.env_remove(variable);
        }
        command.env("FAKE_CUDA", fake).env("LD_LIBRARY_PATH", self.0.path());
        command.env("BITFAST_NVRTC", self.library()).env("BITFAST_CUBLASLT", self.library());
        command.env("BITFAST_CACHE", self.path("cache")).env("RUST_BACKTRACE", "0");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Answers `prompts` prompts of four tokens with six tokens each, in `out.jsonl`.
    fn answer(&self, fake: &str, prompts: usize, flags: &[&str]) -> Output {
        self.answer_of(MODEL[1], fake, prompts, flags)
    }

    /// The same of another model.
    fn answer_of(&self, model: &str, fake: &str, prompts: usize, flags: &[&str]) -> Output {
        let line = |i: usize| format!("{{\"prompt_token_ids\": [{}, 1, 2, 3]}}\n", i % 300);
        std::fs::write(self.path("in.jsonl"), (0..prompts).map(line).collect::<String>()).unwrap();
        let mut command = self.bitfast(fake, &["run", "--max-tokens", "6", "--prompts"]);
        command.arg(self.path("in.jsonl")).arg("--output").arg(self.path("out.jsonl"));
        command.args(["--model", model]).args(&MODEL[2..]).args(flags).output().unwrap()
    }

    /// The same from the start; the driver's calls fail as `fake` says, and that is what the command ends with.
    fn fail(&self, fake: &str) -> String {
        let _ = std::fs::remove_file(self.path("out.jsonl"));
        let _ = std::fs::remove_dir_all(self.path("cache"));
        let output = self.answer(fake, 12, &SMALL);
        let said = said(&output);
        assert!(matches!(output.status.code(), Some(1 | 2)), "{fake}: {} {said}", output.status);
        assert!(said.contains("error: ") && !said.contains("panicked"), "{fake}: {said}");
        said
    }
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Ended well, all lines answered.
fn answered(machine: &Machine, output: &Output, prompts: usize) {
    assert_eq!(output.status.code(), Some(0), "{}", said(output));
    let answers = std::fs::read_to_string(machine.path("out.jsonl")).unwrap();
    assert_eq!(answers.lines().filter(|l| l.contains("\"token_ids\":[7,7,7,7,7,7]")).count(), prompts);
}

#[test]
fn a_machine_that_cannot_serve_is_refused_in_words_and_auto_takes_the_cpu() {
    let machine = Machine::new();
    std::fs::write(machine.path("none.c"), "int nothing;\n").unwrap();
    let empty = Machine::with(&machine.path("none.c"));
    let broken = Machine::new();
    std::fs::write(broken.library(), "no library").unwrap();
    let absent: &[(&str, &str)] = &[("BITFAST_NVRTC", "/no/such/libnvrtc.so.13")];
    let other = empty.library().display().to_string();
    let other: &[(&str, &str)] = &[("BITFAST_NVRTC", &other)];
    let usual: &[(&str, &str)] = &[];
    let cases = [
        (&broken, "", "cuda", usual, "no NVIDIA driver: "),
        (&empty, "", "cuda", usual, "the NVIDIA driver is too old: it has no cuInit"),
        (
            &machine,
            "driver=12020",
            "cuda",
            usual,
            "the NVIDIA driver is of CUDA 12.2; 12.4 or newer is needed",
        ),
        (&machine, "nvrtc=12030", "cuda", usual, "NVRTC is of CUDA 12.3; 12.4 or newer is needed"),
        (&machine, "driver=12080", "cuda", usual, "NVRTC is of CUDA 13, the driver of CUDA 12"),
        (&machine, "init=100", "cuda", usual, "no CUDA device 0: the driver sees 0"),
        (&machine, "init=803", "cuda", usual, "cuInit failed: "),
        (&machine, "devices=0", "cuda", usual, "no CUDA device 0: the driver sees 0"),
        (&machine, "devices=2", "cuda:7", usual, "no CUDA device 7: the driver sees 2"),
        (&machine, "cc=80", "cuda", usual, "Fake H100 has compute capability 8.0"),
        (&machine, "cc=89", "cuda", usual, "Fake H100 has compute capability 8.9"),
        (&machine, "cc=100", "cuda", usual, "Fake H100 has compute capability 10.0"),
        (&machine, "", "cuda", absent, "NVRTC not found (/no/such/libnvrtc.so.13"),
        (&machine, "", "cuda", other, "NVRTC is too old: it has no nvrtcVersion"),
        (&machine, "", "cuda", usual, "does not compute what the hopper class is defined by"),
    ];
    for (machine, fake, device, env, message) in cases {
        let run = |device: &str| {
            let mut command = machine.bitfast(fake, &["run", "--max-tokens", "1", "--prompts"]);
            std::fs::write(machine.path("in.jsonl"), "{\"prompt_token_ids\": [1]}\n").unwrap();
            let _ = std::fs::remove_file(machine.path("out.jsonl"));
            command.arg(machine.path("in.jsonl")).arg("--output").arg(machine.path("out.jsonl"));
            command.args(&MODEL[..5]).args(["--device", device]).envs(env.iter().copied());
            command.args(["--threads", "1"]).output().unwrap()
        };
        let output = run(device);
        let words = said(&output);
        assert_eq!(output.status.code(), Some(2), "{message}: {words}");
        assert!(words.contains("error: device: ") && words.contains(message), "{message}: {words}");
        // The same reason, though the self-check's compiler works beside the card's opening.
        let mut check = machine.bitfast(fake, &["selfcheck", "--device", device]);
        let check = check.envs(env.iter().copied()).output().unwrap();
        let differs = String::from_utf8_lossy(&check.stdout).contains("DIFFER");
        assert_eq!(check.status.code(), Some(if differs { 1 } else { 2 }), "{message}: {}", said(&check));
        assert!(differs || said(&check).contains(message), "{message}: {}", said(&check));
        assert_eq!(differs, message.starts_with("does not compute"), "{message}");
        if device == "cuda" {
            let output = run("auto");
            let words = said(&output);
            assert_eq!(output.status.code(), Some(0), "{message}: {words}");
            assert!(words.contains("class portable"), "{words}");
            let quiet = message.starts_with("no ");
            assert_eq!(words.contains("the GPU is left alone: "), !quiet, "{message}: {words}");
        }
    }
}

#[test]
fn a_vocabulary_that_no_sampler_takes_is_refused_at_load() {
    let machine = Machine::new();
    let config = |vocab: usize| {
        let folder = machine.path(&vocab.to_string());
        std::fs::create_dir_all(&folder).unwrap();
        let fields = r#""architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 1024, "tie_word_embeddings": true"#;
        let text = format!("{{{fields}, \"vocab_size\": {vocab}}}");
        std::fs::write(folder.join("config.json"), text).unwrap();
        folder.display().to_string()
    };
    let run = |model: &str| machine.answer_of(model, "", 1, &SMALL);
    let output = run(&config(520_000));
    answered(&machine, &output, 1);
    let output = run(&config(520_001));
    assert_eq!(output.status.code(), Some(2), "{}", said(&output));
    assert!(said(&output).contains("no sampling from more than 520000 tokens"), "{}", said(&output));
}

#[test]
fn auto_takes_a_card_that_serves() {
    let machine = Machine::new();
    std::fs::write(machine.path("in.jsonl"), "{\"prompt_token_ids\": [1, 2, 3]}\n").unwrap();
    let mut command = machine.bitfast("", &["run", "--max-tokens", "6", "--prompts"]);
    command.arg(machine.path("in.jsonl")).arg("--output").arg(machine.path("out.jsonl"));
    let output =
        command.args(&MODEL[..5]).args(["--device", "auto", "--no-batch-invariant"]).args(SMALL).output();
    // Its tokens, which no CPU would choose.
    answered(&machine, &output.unwrap(), 1);
}

#[test]
fn every_call_keeps_the_drivers_rules() {
    let machine = Machine::new();
    for flags in [&[][..], &["--enforce-eager"], &["--max-num-seqs", "8", "--max-num-batched-tokens", "8"]] {
        let _ = std::fs::remove_file(machine.path("out.jsonl"));
        let output = machine.answer("", 30, &[&["--kv-cache-memory", "16MiB"], flags].concat());
        answered(&machine, &output, 30);
    }
    // Nothing is left to do: what the start took is given back by a thread that never ran a step.
    answered(&machine, &machine.answer("", 30, &SMALL), 30);
    // More rows in one step than a grid's second extent has.
    let _ = std::fs::remove_file(machine.path("out.jsonl"));
    let many = [
        "--kv-cache-memory",
        "1GiB",
        "--max-num-seqs",
        "16500",
        "--max-num-batched-tokens",
        "66000",
        "--enforce-eager",
    ];
    answered(&machine, &machine.answer("", 16_500, &many), 16_500);
}

#[test]
fn damaged_kernel_files_are_made_anew() {
    let machine = Machine::new();
    answered(&machine, &machine.answer("", 2, &SMALL), 2);
    let files = || {
        let folder = std::fs::read_dir(machine.path("cache/kernels")).unwrap();
        let mut files: Vec<_> =
            folder.map(|f| f.unwrap().path()).map(|p| (p.clone(), std::fs::read(p).unwrap())).collect();
        files.sort();
        files
    };
    let whole = files();
    assert!(whole.len() > 5, "{}", whole.len());
    for (i, (path, bytes)) in whole.iter().enumerate() {
        std::fs::write(path, &bytes[..[0, 5, bytes.len() - 1][i % 3]]).unwrap();
    }
    std::fs::remove_file(machine.path("out.jsonl")).unwrap();
    answered(&machine, &machine.answer("", 2, &SMALL), 2);
    assert_eq!(files(), whole);
    // A file is where the folder should be.
    std::fs::remove_dir_all(machine.path("cache")).unwrap();
    std::fs::write(machine.path("cache"), "").unwrap();
    std::fs::remove_file(machine.path("out.jsonl")).unwrap();
    answered(&machine, &machine.answer("", 2, &SMALL), 2);
}

#[test]
fn whatever_fails_is_named_at_the_end() {
    let machine = Machine::new();
    let output = machine.answer("count=1", 12, &SMALL);
    answered(&machine, &output, 12);
    let words = said(&output);
    let counts = words.lines().find_map(|line| line.strip_prefix("calls ")).expect("counts");
    let mut counts = counts.split(' ');
    let all: usize = counts.next().unwrap().parse().unwrap();
    // Of each call the first and the one in the middle; those that give back may fail unheard.
    let calls: Vec<&str> = counts.collect();
    for call in calls.chunks(2) {
        let (name, count) = (call[0], call[1].parse::<usize>().unwrap());
        let unheard = ["Free", "Destroy", "Unload"].iter().any(|end| name.contains(end));
        for after in [1, count.div_ceil(2)].into_iter().filter(|_| !unheard) {
            let words = machine.fail(&format!("after={after} fails=700 of={name}"));
            // Kernels are compiled side by side: another one may be the first to say so.
            let failed = format!("{name} failed: ");
            let named = if name.starts_with("nvrtc") { "Program: status 700" } else { &failed };
            assert!(words.contains(named), "{words}");
        }
    }
    // A card that is lost at any moment.
    for after in (1..all * 9 / 10).step_by(all / 40) {
        machine.fail(&format!("after={after} fails=719"));
    }
    // Memory that is asked for later than planned.
    let words = machine.fail("after=30 fails=2 of=cuMemAlloc");
    assert!(words.contains("out of cuda:0 memory: "), "{words}");
}

/// `bitfast serve` there.
struct Server {
    child: Child,
    stderr: BufReader<ChildStderr>,
    address: String,
}

impl Server {
    fn start(machine: &Machine, fake: &str, flags: &[&str]) -> Self {
        let mut command = machine.bitfast(fake, &["serve", "--host", "127.0.0.1", "--port", "0"]);
        let mut child = command.args(MODEL).args(flags).stdout(Stdio::null()).spawn().unwrap();
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        let address = common::listening(&mut stderr);
        Self { child, stderr, address }
    }

    fn send(&self, method: &str, path: &str, body: &str) -> String {
        let mut socket = TcpStream::connect(&self.address).unwrap();
        let head = "HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n";
        write!(socket, "{method} {path} {head}content-length: {}\r\n\r\n{body}", body.len()).unwrap();
        let mut text = String::new();
        socket.read_to_string(&mut text).unwrap();
        text
    }

    fn control(&self, path: &str) {
        let answer = self.send("POST", path, "");
        assert!(answer.starts_with("HTTP/1.1 200"), "{path}: {answer}");
    }

    /// `count` completions at once, every other one streamed; all wait before the first step. What each was answered.
    fn answers(&self, count: usize, tokens: usize, meanwhile: impl FnOnce()) -> Vec<String> {
        self.control("/debug/sleep?level=0");
        self.answers_after(count, tokens, || {
            self.control("/debug/wake_up");
            meanwhile();
        })
    }

    /// The same of a server that sleeps, and is woken by `wake`.
    fn answers_after(&self, count: usize, tokens: usize, wake: impl FnOnce()) -> Vec<String> {
        let ask = |i: usize| {
            let stream = i.is_multiple_of(2);
            let rest = format!("\"max_tokens\": {tokens}, \"ignore_eos\": true, \"stream\": {stream}");
            self.send("POST", "/v1/completions", &format!("{{\"prompt\": [1, 2, {i}], {rest}}}"))
        };
        std::thread::scope(|scope| {
            let asked: Vec<_> = (0..count).map(|i| scope.spawn(move || ask(i))).collect();
            let waiting = format!("}} {count}");
            let all_wait = |metrics: &str| {
                let mut lines = metrics.lines().filter(|l| l.starts_with("vllm:num_requests_waiting{"));
                lines.any(|line| line.trim_end_matches(".0").ends_with(&waiting))
            };
            while !all_wait(&self.send("GET", "/metrics", "")) {
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
            wake();
            asked.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    /// Its exit code and what it said last.
    fn end(mut self) -> (Option<i32>, String) {
        let mut rest = String::new();
        self.stderr.read_to_string(&mut rest).unwrap();
        assert!(!rest.contains("panicked"), "{rest}");
        (self.child.wait().unwrap().code(), rest)
    }
}

#[test]
fn a_lost_card_ends_every_request_of_a_server() {
    let machine = Machine::new();
    let server = Server::start(&machine, "after=400 fails=700 of=cuGraphLaunch", &SMALL);
    // More than run at once: some wait when the card is lost.
    for answer in server.answers(20, 900, || ()) {
        assert!(answer.contains("cuGraphLaunch failed"), "{answer}");
    }
    let (code, rest) = server.end();
    assert_eq!(code, Some(1), "{rest}");
    assert!(rest.contains("cuGraphLaunch failed"), "{rest}");

    // It is lost when a sleeper should take its memory again.
    let allocations = call_count(&machine, "cuMemAlloc");
    let server =
        Server::start(&machine, &format!("after={} fails=700 of=cuMemAlloc", allocations + 5), &SMALL);
    server.control("/debug/sleep?level=2");
    let answers = server.answers_after(5, 9, || {
        let answer = server.send("POST", "/debug/wake_up", "");
        assert!(answer.contains("cuMemAlloc failed") && !answer.starts_with("HTTP/1.1 200"), "{answer}");
    });
    for answer in answers {
        assert!(answer.contains("cuMemAlloc failed"), "{answer}");
    }
    assert_eq!(server.end().0, Some(1));
}

/// How often a start and a few answers make this call.
fn call_count(machine: &Machine, call: &str) -> usize {
    let output = machine.answer("count=1", 1, &SMALL);
    let words = said(&output);
    let counts = words.lines().find_map(|line| line.strip_prefix("calls ")).expect("counts");
    let mut words = counts.split(' ').skip_while(|word| *word != call);
    words.nth(1).expect("it is made").parse().unwrap()
}

#[test]
fn sleep_profiles_and_a_full_cache_keep_the_drivers_rules() {
    let machine = Machine::new();
    let traces = machine.path("traces").display().to_string();
    std::fs::create_dir(&traces).unwrap();
    let full = [
        "--kv-cache-memory",
        "1MiB",
        "--max-num-seqs",
        "8",
        "--max-num-batched-tokens",
        "64",
        "--profile-dir",
    ];
    let server = Server::start(&machine, "", &[&full[..], &[&traces]].concat());
    let paths = [
        "profile/start",
        "sleep?level=1",
        "wake_up",
        "sleep?level=2",
        "wake_up",
        "profile/stop",
        "sleep?level=2",
        "wake_up",
    ];
    let answers =
        server.answers(12, 300, || paths.iter().for_each(|path| server.control(&format!("/debug/{path}"))));
    for answer in answers {
        assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("\"length\""), "{answer}");
    }
    // `timeout` passes the signal on.
    let pid = server.child.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    // It says 124 for a command that ended by the signal that it sent, and else what the command said.
    let (code, rest) = server.end();
    assert!(matches!(code, Some(0 | 124)), "{code:?} {rest}");
    assert!(!rest.contains("FAKE CUDA"), "{rest}");
}
