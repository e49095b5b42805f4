//! The tests that need a GPU, on a machine that has one: built here, carried there, run by a script that needs a shell only.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

const USAGE: &str =
    "usage: cargo xtask gpu [--shell COMMAND] [--jobs N] [--limit SECONDS] [--sanitizer] [--env NAME=VALUE].. [TEST]..

Builds the GPU tests and the command in release mode, strips them, and packs them with a script into
target/gpu/bundle.tar.gz. With --shell, the bundle goes to that shell's standard input and is unpacked
and run in a temporary folder there; prints a table and fails on any difference:
  cargo xtask gpu --shell \"ssh gpu-host\"
  cargo xtask gpu --shell \"bash -c\"              (this machine)
Without it: copy the bundle, unpack it, run ./run.sh there.
  --jobs       so many tests side by side there (1; 8 fit in 80 GB)
  --limit      a test that takes longer is ended and has failed (1200)
  --sanitizer  also run the small twin tests under compute-sanitizer (memcheck and racecheck)
  --env        set a variable there, such as BITFAST_NVRTC=/path/libnvrtc.so.13
  TEST         only these, such as twin_linear";

/// Test binaries: package and test. Each one's GPU tests are ignored where there is none.
const TESTS: [(&str, &str); 10] = [
    ("bitfast-cuda", "selfcheck"),
    ("bitfast-cuda", "twin_linear"),
    ("bitfast-cuda", "twin_rows"),
    ("bitfast-cuda", "twin_attention"),
    ("bitfast-cuda", "twin_sampler"),
    ("bitfast-cuda", "unconstrained"),
    ("bitfast-testkit", "golden_cuda"),
    ("bitfast-testkit", "law_cuda"),
    ("bitfast-testkit", "law_cuda_breakers"),
    ("bitfast-testkit", "law_cuda_unconstrained"),
];

/// What `cargo xtask gpu` was asked for.
#[derive(Debug, Default)]
struct Args {
    shell: Option<String>,
    jobs: Option<NonZeroUsize>,
    limit: Option<NonZeroUsize>,
    sanitizer: bool,
    env: Vec<String>,
    tests: Vec<String>,
}

/// `cargo xtask gpu`.
pub fn gpu(root: &Path, args: impl Iterator<Item = String>) -> Result<()> {
    let args = parse(args)?;
    let folder = root.join("target/gpu/bundle");
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    fs::create_dir_all(folder.join("fixtures"))?;
    for (name, path) in build(root, &args.tests)? {
        let to = folder.join(name);
        fs::copy(&path, &to).with_context(|| format!("cannot copy {}", path.display()))?;
        // Without it the bundle is larger, nothing else.
        let _ = Command::new("strip").arg(&to).stderr(Stdio::null()).status();
    }
    copy_tree(&root.join("crates/testkit/fixtures"), &folder.join("fixtures"))?;
    let script = folder.join("run.sh");
    fs::write(&script, include_str!("gpu_run.sh"))?;
    make_executable(&script)?;
    let bundle = folder.with_extension("tar.gz");
    pack(&folder, &bundle)?;
    eprintln!("{} ({:.1} MB)", bundle.display(), fs::metadata(&bundle)?.len() as f64 / 1e6);
    match &args.shell {
        Some(shell) => run_there(shell, &bundle, &args),
        None => Ok(()),
    }
}

fn parse(args: impl Iterator<Item = String>) -> Result<Args> {
    let mut parsed = Args::default();
    let mut args = args;
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--shell" => parsed.shell = Some(args.next().context(USAGE)?),
            "--jobs" => parsed.jobs = Some(number(&arg, args.next())?),
            "--limit" => parsed.limit = Some(number(&arg, args.next())?),
            "--env" => parsed.env.push(args.next().context(USAGE)?),
            "--sanitizer" => parsed.sanitizer = true,
            name if TESTS.iter().any(|(_, test)| *test == name) => parsed.tests.push(arg),
            _ => bail!("{arg:?} is no flag and no GPU test\n{USAGE}"),
        }
    }
    if let Some(bad) = parsed.env.iter().find(|e| !e.contains('=') || e.contains('\'')) {
        bail!("--env {bad}: expected NAME=VALUE without quotes");
    }
    Ok(parsed)
}

fn number(flag: &str, value: Option<String>) -> Result<NonZeroUsize> {
    let value = value.context(USAGE)?;
    value.parse().with_context(|| format!("{flag} {value}"))
}

/// Names and paths of the executables.
fn build(root: &Path, only: &[String]) -> Result<BTreeMap<String, PathBuf>> {
    let mut found = BTreeMap::new();
    let wanted = TESTS.iter().filter(|(_, test)| only.is_empty() || only.iter().any(|o| o == test));
    for (package, test) in wanted {
        let line = ["test", "--release", "--no-run", "-p", package, "--test", test];
        found.insert((*test).to_owned(), executable(root, &line)?);
    }
    let line = ["build", "--release", "-p", "bitfast", "--bin", "bitfast"];
    found.insert("bitfast".to_owned(), executable(root, &line)?);
    Ok(found)
}

/// The last executable that cargo names.
fn executable(root: &Path, line: &[&str]) -> Result<PathBuf> {
    eprintln!("$ cargo {}", line.join(" "));
    let mut cargo = Command::new("cargo");
    cargo.args(line).arg("--message-format=json-render-diagnostics").current_dir(root);
    let output = cargo.stderr(Stdio::inherit()).output().context("cannot run cargo")?;
    if !output.status.success() {
        bail!("failed: cargo {}", line.join(" "));
    }
    let text = String::from_utf8(output.stdout).context("cargo's messages")?;
    let path = text.lines().rev().find_map(|message| {
        let (_, rest) = message.split_once("\"executable\":\"")?;
        Some(rest.split_once('"')?.0.replace("\\\\", "\\"))
    });
    Ok(path.with_context(|| format!("cargo {} named no executable", line.join(" ")))?.into())
}

fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    for entry in fs::read_dir(from).with_context(|| from.display().to_string())? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            fs::create_dir_all(&target)?;
            copy_tree(&entry.path(), &target)?;
        } else {
            fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}

fn pack(folder: &Path, bundle: &Path) -> Result<()> {
    let gz = flate2::write::GzEncoder::new(fs::File::create(bundle)?, flate2::Compression::default());
    let mut tar = tar::Builder::new(gz);
    tar.append_dir_all("bitfast-gpu", folder)?;
    tar.into_inner()?.finish()?;
    Ok(())
}

#[cfg(unix)]
fn make_executable(path: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    Ok(fs::set_permissions(path, fs::Permissions::from_mode(0o755))?)
}

#[cfg(not(unix))]
fn make_executable(_: &Path) -> Result<()> {
    Ok(())
}

fn run_there(shell: &str, bundle: &Path, args: &Args) -> Result<()> {
    let env: String = args.env.iter().map(|e| format!("export '{e}'; ")).collect();
    let jobs = args.jobs.map_or(1, NonZeroUsize::get);
    let limit = args.limit.map_or(String::new(), |limit| format!(" --limit {limit}"));
    let sanitizer = if args.sanitizer { " --sanitizer" } else { "" };
    let there = format!(
        "set -e; d=$(mktemp -d); trap 'rm -rf $d' EXIT; cd $d; tar xz; cd bitfast-gpu; {env}./run.sh --jobs {jobs}{limit}{sanitizer}"
    );
    let mut words = shell.split_whitespace();
    let mut command = Command::new(words.next().context(USAGE)?);
    let mut child = command
        .args(words)
        .arg(there)
        .stdin(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {shell}"))?;
    let sent = child.stdin.take().expect("it is piped").write_all(&fs::read(bundle)?);
    let status = child.wait()?;
    if !status.success() {
        bail!("GPU tests: {status}");
    }
    sent.context("sending the bundle")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(words: &[&str]) -> Result<Args> {
        parse(words.iter().map(|w| w.to_string()))
    }

    #[test]
    fn flags_are_read_and_mistakes_named() {
        let words = [
            "--shell",
            "ssh host",
            "--jobs",
            "4",
            "--limit",
            "9",
            "--sanitizer",
            "--env",
            "A=1",
            "twin_rows",
        ];
        let parsed = args(&words).unwrap();
        assert_eq!((parsed.jobs.unwrap().get(), parsed.limit.unwrap().get()), (4, 9));
        assert_eq!((parsed.shell.as_deref(), parsed.sanitizer), (Some("ssh host"), true));
        assert_eq!((parsed.env, parsed.tests), (vec!["A=1".to_owned()], vec!["twin_rows".to_owned()]));
        assert!(args(&["twin_nothing"]).unwrap_err().to_string().contains("\"twin_nothing\""));
        assert!(args(&["--env", "A"]).unwrap_err().to_string().contains("--env A"));
        assert!(args(&["--shell"]).is_err());
        assert!(args(&["--limit", "0"]).unwrap_err().to_string().contains("--limit 0"));
        assert!(args(&["--jobs", "0"]).unwrap_err().to_string().contains("--jobs 0"));
    }

    /// A test that needs a card and is in no bundle would never run.
    #[test]
    fn every_test_that_needs_a_card_is_carried_there() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let mut found = Vec::new();
        for folder in fs::read_dir(root.join("crates")).unwrap() {
            let package = folder.unwrap().path();
            let Ok(tests) = fs::read_dir(package.join("tests")) else { continue };
            for file in tests.map(|file| file.unwrap().path()).filter(|file| file.is_file()) {
                let needs =
                    fs::read_to_string(&file).is_ok_and(|text| text.contains("ignore = \"needs an H100"));
                if needs {
                    let part = |path: &Path| path.file_stem().unwrap().to_str().unwrap().to_owned();
                    found.push((format!("bitfast-{}", part(&package)), part(&file)));
                }
            }
        }
        found.sort();
        let mut carried = TESTS.map(|(package, test)| (package.to_owned(), test.to_owned()));
        carried.sort();
        assert_eq!(found, carried);
    }

    /// The script against binaries that pass, fail and run nothing, and against a command that finds everything equal.
    #[cfg(unix)]
    #[test]
    fn the_script_fails_on_any_difference() {
        let run_within = |seconds: &str, name: &str, body: &str| {
            let dir = tempfile::tempdir().unwrap();
            for (name, text) in [("run.sh", include_str!("gpu_run.sh")), (name, body)] {
                let path = dir.path().join(name);
                fs::write(&path, text).unwrap();
                make_executable(&path).unwrap();
            }
            let mut script = Command::new("./run.sh");
            let output =
                script.args(["--jobs", "2", "--limit", seconds]).current_dir(dir.path()).output().unwrap();
            let said = [output.stdout, output.stderr].concat();
            (output.status.success(), String::from_utf8(said).unwrap())
        };
        let run_with = |name: &str, body: &str| run_within("600", name, body);
        // A test binary with two tests; the second one ends so.
        let run = |second: &str| {
            let list = "case $* in *--list*) echo 'a: test'; echo 'm::b: test'; exit;; esac";
            let ok = "'test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 1 filtered out'";
            run_with("twin_x", &format!("#!/bin/sh\n{list}\ncase $* in *m::b*) {second};; esac\necho {ok}\n"))
        };
        let (ok, table) = run(":");
        assert!(ok && table.contains("twin_x m::b") && table.contains("2 passed, 0 failed"), "{table}");
        let result = "'test result: FAILED. 0 passed; 1 failed; 0 ignored; 0 measured; 1 filtered out'";
        let (ok, table) = run(&format!("echo a difference; echo {result}; exit 101"));
        assert!(!ok && table.contains("a difference") && table.contains("1 passed, 1 failed"), "{table}");
        let (ok, _) = run("exit 139");
        assert!(!ok, "a crash is no pass");
        let (ok, _) =
            run("echo 'test result: ok. 0 passed; 0 failed; 0 ignored; 0 measured; 2 filtered out'; exit");
        assert!(!ok, "nothing run is no pass");
        let (ok, _) = run_with("twin_x", "#!/bin/sh\nexit 127\n");
        assert!(!ok, "a binary that does not start is no pass");
        let hangs = "#!/bin/sh\ncase $* in *--list*) echo 'a: test';; *) exec sleep 600;; esac\n";
        let (ok, table) = run_within("2", "twin_x", hangs);
        assert!(!ok && table.contains("limit of 2 s") && table.contains("0 passed, 1 failed"), "{table}");
        let command = |code: &str| {
            let answer = "a=; for w; do [ \"$a\" = --output ] && echo '{}' > $w; a=$w; done";
            format!("#!/bin/sh\n{answer}\ncase $* in *changed*) exit {code};; esac\n")
        };
        let (ok, table) = run_with("bitfast", &command("1"));
        assert!(ok && table.contains("5 passed, 0 failed"), "{table}");
        let (ok, table) = run_with("bitfast", &command("0"));
        assert!(!ok && table.contains("the change was not noticed"), "{table}");
        // No card: one word of it, no table.
        let (ok, said) =
            run_with("bitfast", "#!/bin/sh\necho 'error: device: no NVIDIA driver' >&2\nexit 2\n");
        assert!(!ok && said == "nothing was run: error: device: no NVIDIA driver\n", "{said}");
        let (ok, said) = run_within("2", "bitfast", "#!/bin/sh\nexec sleep 600\n");
        assert!(!ok && said == "nothing was run: selfcheck did not end within 2 s\n", "{said}");
    }
}
