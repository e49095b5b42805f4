//! Every CUDA kernel, compiled without a GPU: registers, spills, the instructions that speed rests on and a hash of the machine
//! code, compared with `xtask/kernels.txt`. Compiler and disassembler come out of pinned packages, into the cache.
//!
//! Broken is what no change may do: a kernel that does not compile, spills its sums, has its warpgroup products
//! serialised, or lost an instruction that it is there for. All other differences are drift: to be read and blessed.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use crate::models::{Client, Package, fetch_all};

/// The reviewed state.
const SNAPSHOT: &str = "xtask/kernels.txt";
/// What the kernels are made for; all other architectures are tried only.
const ARCH: &str = "sm_90a";
/// Spills of a few addresses around a tile's end cost nothing; more would mean that sums went to local memory.
const MOST_SPILLED_BYTES: u32 = 256;
/// Products of warps and warpgroups, copies by the tensor memory accelerator and in bulk.
const INSTRUCTIONS: [&str; 4] = ["HGMMA", "HMMA", "UBLKCP", "UTMALDG"];
/// Kernels and what they must use.
const PROMISED: [(&str, &[&str]); 7] = [
    ("linear_reference", &["HMMA"]),
    ("linear_few", &["HMMA", "UTMALDG"]),
    ("linear_narrow", &["HGMMA", "UTMALDG"]),
    ("linear_wide", &["HGMMA", "UTMALDG"]),
    ("attention_sliced", &["HMMA"]),
    ("attention_paged", &["HMMA", "UBLKCP"]),
    ("attention_prefill", &["HGMMA", "UBLKCP"]),
];

const TOOLS: [Package; 2] = [
    Package {
        client: Client::PipWheel,
        requirement: "nvidia-cuda-nvrtc==13.0.88",
        sha256: "ad9b6d2ead2435f11cbb6868809d2adeeee302e9bb94bcf0539c7a40d80e8575",
        mebibytes: 86,
        folder: "tools/nvrtc-13.0.88",
        prefix: "nvidia/cu13/lib/",
        wanted: |name| name == "libnvrtc.so.13" || name == "libnvrtc-builtins.so.13.0",
        stands_for_all: None,
    },
    Package {
        client: Client::PipWheel,
        requirement: "nvidia-cuda-nvdisasm==13.2.51",
        sha256: "5a7acf77c55d6d2911ed6155d4d5bc156ffadf9df7a68a89b0c1155f4b13688c",
        mebibytes: 5,
        folder: "tools/nvdisasm-13.2.51",
        prefix: "nvidia/cu13/bin/",
        wanted: |name| name == "nvdisasm",
        stands_for_all: None,
    },
];

/// What becomes of differences from the snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// They fail.
    Compare,
    /// They are listed.
    AllowDrift,
    /// They are written down.
    Bless,
}

impl Mode {
    /// From the command's flags.
    pub fn from_args(mut args: impl Iterator<Item = String>) -> Result<Self> {
        match (args.next().as_deref(), args.next()) {
            (None, _) => Ok(Self::Compare),
            (Some("--allow-drift"), None) => Ok(Self::AllowDrift),
            (Some("--bless"), None) => Ok(Self::Bless),
            (Some(other), _) => bail!("kernels takes --bless or --allow-drift, not {other}"),
        }
    }
}

/// Compiles, compares, or blesses.
pub fn kernels(root: &Path, mode: Mode) -> Result<()> {
    if !cfg!(all(target_os = "linux", target_arch = "x86_64")) {
        eprintln!("kernels: SKIPPED, the pinned compiler is for Linux on x86-64");
        return Ok(());
    }
    let cache = fetch_all(&TOOLS)?;
    let folder = tempfile::tempdir()?;
    let instances = compile(root, &cache.join(TOOLS[0].folder).join("libnvrtc.so.13"), folder.path())?;
    let seen = disassemble(&cache.join(TOOLS[1].folder).join("nvdisasm"), &instances)?;
    let broken = broken(&instances, &seen);
    if !broken.is_empty() {
        bail!("{} kernels are broken:\n{}", broken.len(), broken.join("\n"));
    }
    let (now, path) = (render(&instances, &seen, &code(&instances)?), root.join(SNAPSHOT));
    if mode == Mode::Bless {
        fs::write(&path, now).with_context(|| format!("cannot write {}", path.display()))?;
        eprintln!("{} instances written to {SNAPSHOT}", instances.len());
        return Ok(());
    }
    let drift = differences(&fs::read_to_string(&path).unwrap_or_default(), &now);
    let compiled = instances.iter().filter(|i| i.arch == ARCH).count();
    eprintln!("{compiled} kernels for {ARCH}, {} lines differ from {SNAPSHOT}", drift.len());
    drift.iter().for_each(|line| eprintln!("{line}"));
    if mode == Mode::Compare && !drift.is_empty() {
        bail!("kernels differ from {SNAPSHOT}: `cargo xtask kernels --bless` accepts what is listed above");
    }
    Ok(())
}

/// One kernel on one architecture.
#[derive(Debug)]
struct Instance {
    arch: String,
    /// Name and macros.
    label: String,
    outcome: Result<Compiled, String>,
}

#[derive(Debug)]
struct Compiled {
    registers: u32,
    spilled: u32,
    serialised: bool,
    cubin: PathBuf,
}

impl Instance {
    /// A line of the compiling example.
    fn parse(line: &str) -> Option<Self> {
        let [arch, label, registers, spilled, state, last] =
            line.split('\t').collect::<Vec<_>>().try_into().ok()?;
        let outcome = match state {
            "failed" => Err(last.to_owned()),
            _ => Ok(Compiled {
                registers: registers.parse().ok()?,
                spilled: spilled.parse().ok()?,
                serialised: state == "serialised",
                cubin: last.into(),
            }),
        };
        Some(Self { arch: arch.to_owned(), label: label.to_owned(), outcome })
    }

    fn kernel(&self) -> &str {
        self.label.split(' ').next().unwrap_or_default()
    }
}

fn compile(root: &Path, library: &Path, folder: &Path) -> Result<Vec<Instance>> {
    let words = ["run", "--quiet", "-p", "bitfast-cuda", "--example", "kernels", "--"];
    let output = Command::new("cargo").args(words).args([library, folder]).current_dir(root).output();
    let output = output.context("cannot run cargo")?;
    if !output.status.success() {
        bail!("the example `kernels` of crate cuda failed:\n{}", String::from_utf8_lossy(&output.stderr));
    }
    let text = String::from_utf8(output.stdout).context("its output")?;
    let parse = |line: &str| Instance::parse(line).with_context(|| format!("unexpected line {line:?}"));
    text.lines().map(parse).collect()
}

/// Instructions by label, of all instances of the kernels that something is promised of.
fn disassemble(program: &Path, instances: &[Instance]) -> Result<BTreeMap<String, BTreeSet<&'static str>>> {
    make_executable(program)?;
    let chosen: Vec<(&str, &Path)> = instances
        .iter()
        .filter(|i| i.arch == ARCH && promised(i.kernel()).is_some())
        .filter_map(|i| Some((i.label.as_str(), i.outcome.as_ref().ok()?.cubin.as_path())))
        .collect();
    let (next, found) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let worker = || {
        while let Some((label, cubin)) = chosen.get(next.fetch_add(1, Ordering::Relaxed)) {
            let kinds = instructions(program, cubin).map(|kinds| ((*label).to_owned(), kinds));
            found.lock().unwrap_or_else(PoisonError::into_inner).push(kinds);
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    std::thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(worker))));
    found.into_inner().unwrap_or_else(PoisonError::into_inner).into_iter().collect()
}

fn instructions(program: &Path, cubin: &Path) -> Result<BTreeSet<&'static str>> {
    // Without the analysis of data flow the text is the same, sooner.
    let output = Command::new(program).args(["-c", "-ndf"]).arg(cubin).output();
    let output = output.with_context(|| format!("cannot run {}", program.display()))?;
    if !output.status.success() {
        bail!("nvdisasm failed: {}", String::from_utf8_lossy(&output.stderr));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let names: BTreeSet<&str> = text.split(|c: char| !c.is_ascii_alphanumeric()).collect();
    Ok(INSTRUCTIONS.into_iter().filter(|i| names.contains(i)).collect())
}

#[cfg(unix)]
fn make_executable(program: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let failed = || format!("cannot make {} executable", program.display());
    fs::set_permissions(program, fs::Permissions::from_mode(0o755)).with_context(failed)
}

#[cfg(not(unix))]
fn make_executable(_: &Path) -> Result<()> {
    Ok(())
}

fn promised(kernel: &str) -> Option<&'static [&'static str]> {
    PROMISED.iter().find(|(name, _)| *name == kernel).map(|(_, kinds)| *kinds)
}

/// What must not be, one line each.
fn broken(instances: &[Instance], seen: &BTreeMap<String, BTreeSet<&'static str>>) -> Vec<String> {
    let mut broken = Vec::new();
    for instance in instances.iter().filter(|i| i.arch == ARCH) {
        let label = &instance.label;
        match &instance.outcome {
            Err(complaint) => broken.push(format!("{label}: {complaint}")),
            Ok(c) if c.serialised => broken.push(format!("{label}: its warpgroup products are serialised")),
            Ok(c) if c.spilled > MOST_SPILLED_BYTES => {
                broken.push(format!("{label}: {} bytes of registers are spilled", c.spilled));
            }
            Ok(_) => {}
        }
        if let (Some(promised), Some(seen)) = (promised(instance.kernel()), seen.get(label)) {
            let missing = promised.iter().filter(|i| !seen.contains(*i));
            broken.extend(missing.map(|i| format!("{label}: has no {i}, which it is there for")));
        }
    }
    // A kernel that was renamed, or left the catalogue, takes its promise along.
    let kept = |kernel: &str| seen.keys().any(|label| label.split(' ').next() == Some(kernel));
    broken.extend(
        PROMISED
            .iter()
            .filter(|(kernel, _)| !kept(kernel))
            .map(|(kernel, _)| format!("{kernel}: no instance was looked at")),
    );
    broken
}

/// Of each kernel the number of its instances and the start of a hash of all their cubins, which the compiler gives byte for byte again.
fn code(instances: &[Instance]) -> Result<BTreeMap<String, (usize, String)>> {
    let mut hashers: BTreeMap<&str, (usize, Sha256)> = BTreeMap::new();
    for instance in instances.iter().filter(|i| i.arch == ARCH) {
        let Ok(Compiled { cubin, .. }) = &instance.outcome else { continue };
        let bytes = fs::read(cubin).with_context(|| format!("cannot read {}", cubin.display()))?;
        let (count, hasher) = hashers.entry(instance.kernel()).or_default();
        *count += 1;
        hasher.update((bytes.len() as u64).to_le_bytes());
        hasher.update(&bytes);
    }
    let hex = |hasher: Sha256| hasher.finalize()[..6].iter().map(|b| format!("{b:02x}")).collect();
    Ok(hashers
        .into_iter()
        .map(|(kernel, (count, hasher))| (kernel.to_owned(), (count, hex(hasher))))
        .collect())
}

/// The snapshot's text.
fn render(
    instances: &[Instance],
    seen: &BTreeMap<String, BTreeSet<&'static str>>,
    code: &BTreeMap<String, (usize, String)>,
) -> String {
    let mut text = format!(
        "# Rewritten by `cargo xtask kernels --bless` ({}).\n\
         # {ARCH}: registers a thread, bytes spilled, kernel, and where speed rests on them the instructions\n\
         # {}. Before them a hash of each kernel's machine code, over all its instances.\n\
         # Elsewhere one instance of each kernel is compiled; nobody has run it there.\n",
        TOOLS[0].requirement,
        INSTRUCTIONS.join(" ")
    );
    for (kernel, (count, hash)) in code {
        writeln!(text, "{ARCH} code {hash} {kernel} ({count})").expect("a String grows");
    }
    for Instance { arch, label, outcome } in instances {
        let seen = seen.get(label).filter(|_| arch == ARCH);
        let seen = seen.map_or(String::new(), |kinds| {
            format!(" [{}]", kinds.iter().copied().collect::<Vec<_>>().join(" "))
        });
        let line = match outcome {
            Ok(c) if arch == ARCH => format!("{arch} {:>3} {:>3} {label}{seen}", c.registers, c.spilled),
            Ok(_) => format!("{arch} untested {label}"),
            Err(complaint) => format!("{arch} does not compile: {label}: {}", without_place(complaint)),
        };
        writeln!(text, "{line}").expect("a String grows");
    }
    text
}

/// A complaint without line numbers, which every edit moves.
fn without_place(complaint: &str) -> &str {
    complaint.split_once("error").map_or(complaint, |(_, rest)| rest.trim_start_matches([' ', ':']))
}

/// Lines that are gone (`-`) and lines that are new (`+`).
fn differences(before: &str, now: &str) -> Vec<String> {
    let (old, new): (BTreeSet<&str>, BTreeSet<&str>) = (before.lines().collect(), now.lines().collect());
    let gone = before.lines().filter(|line| !new.contains(line)).map(|line| format!("- {line}"));
    let come = now.lines().filter(|line| !old.contains(line)).map(|line| format!("+ {line}"));
    gone.chain(come).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn instances(text: &str) -> Vec<Instance> {
        text.lines().map(|line| Instance::parse(line).expect(line)).collect()
    }

    const GOOD: &str = "sm_90a\tlinear_wide N=8\t168\t0\t-\t/tmp/0.cubin\nsm_90a\trows_gather D=8\t16\t0\t-\t/tmp/1.cubin\n\
                        sm_80\tlinear_wide N=8\t-\t-\tfailed\tlinear_wide(62): error: no clusters";

    /// What is promised of all other kernels, and `kinds` of the one of [`GOOD`].
    fn seen(kinds: &[&'static str]) -> BTreeMap<String, BTreeSet<&'static str>> {
        let others = PROMISED.iter().filter(|(kernel, _)| *kernel != "linear_wide");
        let others = others.map(|(kernel, all)| (format!("{kernel} N=1"), all.iter().copied().collect()));
        others.chain([("linear_wide N=8".to_owned(), kinds.iter().copied().collect())]).collect()
    }

    #[test]
    fn only_promises_of_our_architecture_can_be_broken() {
        let all = seen(&["HGMMA", "UTMALDG"]);
        assert_eq!(broken(&instances(GOOD), &all), Vec::<String>::new());
        let lost = broken(&instances(GOOD), &seen(&["HGMMA"]));
        assert_eq!(lost, ["linear_wide N=8: has no UTMALDG, which it is there for"]);
        let mut renamed = all.clone();
        let kinds = renamed.remove("linear_wide N=8").unwrap();
        renamed.insert("linear_broad N=8".to_owned(), kinds);
        assert_eq!(broken(&instances(GOOD), &renamed), ["linear_wide: no instance was looked at"]);
        for (bad, words) in [
            ("sm_90a\tk A=1\t-\t-\tfailed\tk(3): error: x", "k A=1: k(3): error: x"),
            ("sm_90a\tk A=1\t255\t300\t-\tf", "k A=1: 300 bytes of registers are spilled"),
            ("sm_90a\tk A=1\t255\t0\tserialised\tf", "k A=1: its warpgroup products are serialised"),
        ] {
            assert_eq!(broken(&instances(bad), &all), [words]);
        }
    }

    #[test]
    fn drift_names_both_lines() {
        let all = seen(&["HGMMA", "UTMALDG"]);
        let code = |hash: &str| [("linear_wide".to_owned(), (1, hash.to_owned()))].into();
        let before = render(&instances(GOOD), &all, &code("ab"));
        assert!(before.contains("sm_90a code ab linear_wide (1)\n"), "{before}");
        assert!(before.contains("sm_90a 168   0 linear_wide N=8 [HGMMA UTMALDG]\n"), "{before}");
        assert!(before.contains("sm_80 does not compile: linear_wide N=8: no clusters\n"), "{before}");
        assert_eq!(differences(&before, &before), Vec::<String>::new());
        let now = render(&instances(&GOOD.replace("\t16\t", "\t18\t")), &all, &code("cd"));
        assert_eq!(
            differences(&before, &now),
            [
                "- sm_90a code ab linear_wide (1)",
                "- sm_90a  16   0 rows_gather D=8",
                "+ sm_90a code cd linear_wide (1)",
                "+ sm_90a  18   0 rows_gather D=8"
            ]
        );
    }

    #[test]
    fn one_byte_changes_the_hash_of_its_kernel_alone() {
        let folder = tempfile::tempdir().unwrap();
        let text = GOOD.replace("/tmp/", &format!("{}/", folder.path().display()));
        let hashes = |last: u8| {
            for (file, byte) in [("0.cubin", last), ("1.cubin", 7)] {
                fs::write(folder.path().join(file), [1, 2, byte]).unwrap();
            }
            code(&instances(&text)).unwrap()
        };
        let (before, now) = (hashes(3), hashes(4));
        assert_eq!((before.len(), before["linear_wide"].0), (2, 1));
        assert_ne!(before["linear_wide"], now["linear_wide"]);
        assert_eq!(before["rows_gather"], now["rows_gather"]);
        fs::remove_file(folder.path().join("1.cubin")).unwrap();
        assert!(code(&instances(&text)).unwrap_err().to_string().contains("1.cubin"));
    }

    #[test]
    fn flags() {
        let mode = |words: &[&str]| Mode::from_args(words.iter().map(ToString::to_string));
        assert_eq!(mode(&[]).unwrap(), Mode::Compare);
        assert_eq!(mode(&["--bless"]).unwrap(), Mode::Bless);
        assert!(mode(&["--bles"]).is_err() && mode(&["--bless", "--allow-drift"]).is_err());
    }
}
