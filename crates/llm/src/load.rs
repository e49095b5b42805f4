//! From [`EngineArgs`] to a running engine: files, tokenizer, backend, weights, KV cache.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bitfast_engine::OpenWeights;
use bitfast_model::{
    DummySource, GenerationConfig, Gguf, GgufSource, MetaValue, ModelConfig, SafetensorsSource, WeightSource,
};
use bitfast_text::{ChatTemplate, GgufVocab, Tokenizer};

use crate::args::{EngineArgs, LoadFormat};
use crate::error::{Error, Result};
use crate::fetch::{self, ModelFiles, OnProgress};
use crate::fleet::Fleet;
use crate::start;

/// What an [`LLM`](crate::LLM) is made of.
pub(crate) struct Parts {
    pub fleet: Fleet,
    pub tokenizer: Option<Tokenizer>,
    /// The one named by the caller; the tokenizer has the model's own.
    pub chat_template: Option<ChatTemplate>,
    pub generation: GenerationConfig,
}

/// A model on disk, opened and not yet read.
pub(crate) struct Opened {
    pub config: ModelConfig,
    pub weights: Box<dyn WeightSource>,
    pub generation: GenerationConfig,
    /// Opens the same once more.
    pub reopen: Box<OpenWeights>,
}

/// Opens the model's files anew, for engines that dropped their weights in a deep sleep.
fn reopen(args: EngineArgs, files: ModelFiles) -> Box<OpenWeights> {
    Box::new(move || {
        let gguf = match &files {
            ModelFiles::Gguf(path) => Some(Arc::new(Gguf::open(path).map_err(|e| e.to_string())?)),
            ModelFiles::Folder(_) | ModelFiles::Builtin(_) => None,
        };
        let opened = open(&args, &files, gguf.as_ref()).map_err(|e| e.to_string())?;
        Ok((opened.config, opened.weights))
    })
}

/// Finds and opens a model without loading it.
pub(crate) fn find(args: &EngineArgs, on_progress: OnProgress<'_>) -> Result<Opened> {
    let (files, gguf) = locate(args, on_progress)?;
    open(args, &files, gguf.as_ref())
}

fn locate(args: &EngineArgs, on_progress: OnProgress<'_>) -> Result<(ModelFiles, Option<Arc<Gguf>>)> {
    let files = fetch::resolve(&args.model, args.revision.as_deref(), args.load_format, on_progress)?;
    let gguf = match &files {
        ModelFiles::Gguf(path) => Some(Arc::new(
            Gguf::open(path)
                .map_err(|e| Error::BadModel { name: args.model.clone(), message: e.to_string() })?,
        )),
        ModelFiles::Folder(_) | ModelFiles::Builtin(_) => None,
    };
    Ok((files, gguf))
}

/// Finds, opens and loads everything, and starts the engine.
pub(crate) fn load(args: &EngineArgs, on_progress: OnProgress<'_>) -> Result<Parts> {
    args.validate()?;
    let device = start::device(args, &mut *on_progress)?;
    let (files, gguf) = locate(args, &mut *on_progress)?;
    let bad =
        |e: &dyn std::fmt::Display| Error::BadModel { name: args.model.clone(), message: e.to_string() };
    let opened = open(args, &files, gguf.as_ref())?;
    let own_tokenizer = || match (&files, &gguf) {
        (ModelFiles::Folder(dir), _) => Tokenizer::from_dir(dir).map(Some),
        (_, Some(gguf)) => Tokenizer::from_gguf(vocab(gguf)).map(Some),
        (ModelFiles::Builtin(_) | ModelFiles::Gguf(_), None) => Ok(None),
    };
    let tokenizer = match &args.tokenizer {
        _ if args.skip_tokenizer_init => None,
        Some(name) => Some(other_tokenizer(name, &mut *on_progress)?),
        None => own_tokenizer().map_err(|e| {
            bad(&format!("{e} (another can be named as tokenizer; skip_tokenizer_init needs none)"))
        })?,
    };
    let chat_template =
        args.chat_template.as_deref().map(|path| template(path, tokenizer.as_ref())).transpose()?;
    let eos = end_tokens(&opened, tokenizer.as_ref());
    let generation = opened.generation.clone();
    // Files stay mapped no longer than needed: somebody may shorten them.
    drop(gguf);
    let fleet = start::fleet(args, device, opened, eos, on_progress)?;
    Ok(Parts { fleet, tokenizer, chat_template, generation })
}

/// Reads the config and finds the weights.
fn open(args: &EngineArgs, files: &ModelFiles, gguf: Option<&Arc<Gguf>>) -> Result<Opened> {
    let bad =
        |e: &dyn std::fmt::Display| Error::BadModel { name: args.model.clone(), message: e.to_string() };
    let (config, generation) = match (files, gguf) {
        (ModelFiles::Gguf(_) | ModelFiles::Builtin(_), _) if !args.hf_overrides.is_empty() => {
            return Err(Error::invalid("hf_overrides", format!("{} has no config.json", args.model)));
        }
        (_, Some(gguf)) => (ModelConfig::from_gguf(gguf).map_err(|e| bad(&e))?, GenerationConfig::default()),
        (ModelFiles::Folder(dir), None) => {
            let (origin, text) = read(&dir.join("config.json"))?;
            let config = ModelConfig::from_hf_json_with(&origin, &text, &args.hf_overrides);
            let config = config.map_err(|e| bad(&e))?;
            let path = dir.join("generation_config.json");
            let generation = if path.exists() {
                let (origin, text) = read(&path)?;
                GenerationConfig::from_json(&origin, &text).map_err(|e| bad(&e))?
            } else {
                GenerationConfig::default()
            };
            (config, generation)
        }
        (ModelFiles::Builtin(id), None) => {
            (fetch::builtin_config(id).expect("resolved as built in"), GenerationConfig::default())
        }
        (ModelFiles::Gguf(_), None) => unreachable!("a GGUF model comes with its file"),
    };
    let dir = match files {
        ModelFiles::Folder(dir) => Some(dir),
        ModelFiles::Gguf(_) | ModelFiles::Builtin(_) => None,
    };
    let weights: Box<dyn WeightSource> = match (args.load_format, dir, gguf) {
        (LoadFormat::Dummy, _, _) | (_, None, None) => Box::new(DummySource::new(&config)),
        (LoadFormat::Auto | LoadFormat::Gguf, _, Some(gguf)) => {
            Box::new(GgufSource::new(Arc::clone(gguf), &config))
        }
        (LoadFormat::Auto | LoadFormat::Safetensors, Some(dir), None) => {
            Box::new(SafetensorsSource::open(dir).map_err(|e| bad(&e))?)
        }
        (LoadFormat::Safetensors, _, Some(gguf)) => {
            return Err(Error::invalid("load_format", format!("safetensors, but {} is GGUF", gguf.origin())));
        }
        (LoadFormat::Gguf, Some(dir), None) => {
            return Err(Error::invalid("load_format", format!("gguf, but {} is a folder", dir.display())));
        }
    };
    Ok(Opened { config, weights, generation, reopen: reopen(args.clone(), files.clone()) })
}

fn read(path: &Path) -> Result<(String, String)> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::file(path, e))?;
    Ok((path.display().to_string(), text))
}

/// A tokenizer named apart from the model: a folder, a file of one, or a hub id.
fn other_tokenizer(name: &str, on_progress: OnProgress<'_>) -> Result<Tokenizer> {
    let path = Path::new(name);
    let bad = |e: &dyn std::fmt::Display| Error::invalid("tokenizer", format!("{name}: {e}"));
    if path.is_file() && path.extension().is_some_and(|e| e == "gguf") {
        let gguf = Gguf::open(path).map_err(|e| bad(&e))?;
        return Tokenizer::from_gguf(vocab(&gguf)).map_err(|e| bad(&e));
    }
    let dir = if path.is_dir() {
        path.to_path_buf()
    } else if path.file_name().is_some_and(|f| f == "tokenizer.json") && path.is_file() {
        path.parent().map_or_else(PathBuf::new, Path::to_path_buf)
    } else {
        match fetch::resolve_tokenizer(name, on_progress)? {
            ModelFiles::Folder(dir) => dir,
            ModelFiles::Gguf(path) => return other_tokenizer(&path.to_string_lossy(), on_progress),
            ModelFiles::Builtin(_) => return Err(bad(&"a built-in config has no tokenizer")),
        }
    };
    Tokenizer::from_dir(&dir).map_err(|e| bad(&e))
}

fn template(path: &Path, tokenizer: Option<&Tokenizer>) -> Result<ChatTemplate> {
    let source = std::fs::read_to_string(path).map_err(|e| Error::file(path, e))?;
    let tokens = tokenizer.map(|t| t.template_tokens().clone()).unwrap_or_default();
    ChatTemplate::new(&source, tokens).map_err(|e| Error::file(path, e))
}

/// Tokens that end an answer: what any of the model's files says, ascending.
fn end_tokens(opened: &Opened, tokenizer: Option<&Tokenizer>) -> Vec<u32> {
    let vocab_size = opened.config.vocab_size;
    let named = if opened.generation.eos_token_ids.is_empty() {
        &opened.config.eos_token_ids
    } else {
        &opened.generation.eos_token_ids
    };
    let mut ids: Vec<u32> = named.iter().chain(tokenizer.map_or(&[][..], |t| t.eos())).copied().collect();
    ids.retain(|id| (*id as usize) < vocab_size);
    ids.sort_unstable();
    ids.dedup();
    ids
}

/// The tokenizer's part of a GGUF file's metadata.
fn vocab(gguf: &Gguf) -> GgufVocab {
    let meta = gguf.metadata();
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    let strings = |name: &str| meta.strings(&key(name)).map(<[String]>::to_vec).unwrap_or_default();
    let flag = |name: &str| meta.get(&key(name)).and_then(MetaValue::as_bool);
    let value = |name: &str| meta.get(&key(name));
    let scores = value("scores").and_then(MetaValue::as_f64s).unwrap_or_default();
    let types = value("token_type").and_then(MetaValue::as_i64s).unwrap_or_default();
    GgufVocab {
        model: meta.text(&key("model")).unwrap_or_default().to_string(),
        tokens: strings("tokens"),
        merges: strings("merges"),
        scores: scores.iter().map(|s| *s as f32).collect(),
        token_types: types.iter().map(|t| i32::try_from(*t).unwrap_or(0)).collect(),
        pre: meta.text(&key("pre")).map(str::to_string),
        add_bos: flag("add_bos_token"),
        add_eos: flag("add_eos_token"),
        add_space_prefix: flag("add_space_prefix"),
        bos_id: meta.token(&key("bos_token_id")),
        eos_ids: ["eos_token_id", "eot_token_id", "eom_token_id"]
            .iter()
            .filter_map(|n| meta.token(&key(n)))
            .collect(),
        unknown_id: meta.token(&key("unknown_token_id")),
        chat_template: meta.text("tokenizer.chat_template").map(str::to_string),
    }
}
