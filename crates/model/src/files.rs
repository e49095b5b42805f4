use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::weights::SafetensorsSource;
use crate::{
    ConfigError, DummySource, GenerationConfig, Gguf, GgufSource, LoadError, ModelConfig, WeightSource,
};

/// How weights are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum LoadFormat {
    /// GGUF for a `.gguf` file, safetensors for a folder.
    #[default]
    Auto,
    /// A folder with `config.json` and safetensors.
    Safetensors,
    /// A GGUF file.
    Gguf,
    /// Random weights; needs a config only.
    Dummy,
}

/// A model on disk, opened: all headers are checked, no weight has been read.
pub struct ModelFiles {
    /// What the model is.
    pub config: ModelConfig,
    /// The maker's sampling defaults; empty when there are none.
    pub generation: GenerationConfig,
    /// Its weights.
    pub source: Box<dyn WeightSource>,
    /// The GGUF file, if it is one: its metadata has the tokenizer and the chat template.
    pub gguf: Option<Arc<Gguf>>,
}

impl ModelFiles {
    /// Opens a folder or a GGUF file. With [`LoadFormat::Dummy`], `path` may also be a GGUF file or a folder with
    /// nothing but `config.json`, or the name of a built-in config.
    pub fn open(path: &Path, format: LoadFormat) -> Result<Self, LoadError> {
        let not_a_model =
            |problem: &str| LoadError::NotAModel { path: path.to_owned(), problem: problem.into() };
        if !path.exists() {
            return match (format, path.to_str()) {
                (LoadFormat::Dummy, Some(name)) => Ok(Self::dummy(ModelConfig::built_in(name)?)),
                _ => Err(not_a_model("no such file or folder")),
            };
        }
        match (format, path.is_dir()) {
            (LoadFormat::Auto | LoadFormat::Safetensors, true) => Self::open_folder(path),
            (LoadFormat::Auto | LoadFormat::Gguf, false) => Self::open_gguf(path),
            (LoadFormat::Dummy, true) => {
                let (config, generation) = folder_configs(path)?;
                Ok(Self { generation, ..Self::dummy(config) })
            }
            (LoadFormat::Dummy, false) => {
                let files = Self::open_gguf(path)?;
                Ok(Self { source: Box::new(DummySource::new(&files.config)), ..files })
            }
            (LoadFormat::Safetensors, false) => {
                Err(not_a_model("a safetensors model is a folder, this is a file"))
            }
            (LoadFormat::Gguf, true) => Err(not_a_model("a GGUF model is a file, this is a folder")),
        }
    }

    /// Random weights for `config`.
    pub fn dummy(config: ModelConfig) -> Self {
        let source = Box::new(DummySource::new(&config));
        Self { config, generation: GenerationConfig::default(), source, gguf: None }
    }

    fn open_folder(folder: &Path) -> Result<Self, LoadError> {
        let (config, generation) = folder_configs(folder)?;
        let source = Box::new(SafetensorsSource::open(folder)?);
        Ok(Self { config, generation, source, gguf: None })
    }

    fn open_gguf(path: &Path) -> Result<Self, LoadError> {
        let gguf = Arc::new(Gguf::open(path)?);
        let config = ModelConfig::from_gguf(&gguf)?;
        let source = Box::new(GgufSource::new(gguf.clone(), &config));
        Ok(Self { config, generation: GenerationConfig::default(), source, gguf: Some(gguf) })
    }

    /// Tokens that end a text: the maker's generation defaults if they name any, else the config's.
    pub fn eos_token_ids(&self) -> &[u32] {
        match self.generation.eos_token_ids.is_empty() {
            true => &self.config.eos_token_ids,
            false => &self.generation.eos_token_ids,
        }
    }
}

/// `config.json`, and `generation_config.json` if it is there.
fn folder_configs(folder: &Path) -> Result<(ModelConfig, GenerationConfig), LoadError> {
    let config = folder.join("config.json");
    if !config.is_file() {
        let problem = "a model folder has a config.json, this one has none".to_owned();
        return Err(LoadError::NotAModel { path: folder.to_owned(), problem });
    }
    let text = |path: &PathBuf| {
        std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.clone(), source })
    };
    let config = ModelConfig::from_hf_json(&config.display().to_string(), &text(&config)?)?;
    let generation = folder.join("generation_config.json");
    let generation = match generation.is_file() {
        true => GenerationConfig::from_json(&generation.display().to_string(), &text(&generation)?)?,
        false => GenerationConfig::default(),
    };
    Ok((config, generation))
}
