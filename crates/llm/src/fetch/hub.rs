//! Models of the Hugging Face hub, in the cache that other tools share (`HF_HOME`).

use std::path::{Path, PathBuf};

use hf_hub::api::Progress as HubProgress;
use hf_hub::api::sync::{ApiBuilder, ApiError};
use hf_hub::{Cache, Repo, RepoType};

use super::{Activity, ModelFiles, OnProgress, Progress, user_cache_dir};
use crate::args::LoadFormat;
use crate::env;
use crate::error::{Error, Result};

/// Small files that a model may have next to its weights.
const SIDE_FILES: &[&str] = &[
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
];

/// True for `org/name` in the hub's alphabet.
pub fn is_id(name: &str) -> bool {
    let ok = |part: &str| {
        !part.is_empty()
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
            && !part.starts_with(['.', '-'])
    };
    name.split_once('/').is_some_and(|(org, rest)| ok(org) && ok(rest))
}

/// The folder of the model's snapshot, missing files fetched first.
pub fn fetch(
    id: &str,
    revision: Option<&str>,
    format: LoadFormat,
    progress: OnProgress<'_>,
) -> Result<ModelFiles> {
    let hub = Hub::from_env()?;
    let folder = hub.snapshot(id, revision.unwrap_or("main"), format, progress)?;
    match only_gguf(&folder) {
        Some(gguf) => Ok(ModelFiles::Gguf(gguf)),
        None => Ok(ModelFiles::Folder(folder)),
    }
}

struct Hub {
    cache: PathBuf,
    endpoint: Option<String>,
    token: Option<String>,
    offline: bool,
}

impl Hub {
    fn from_env() -> Result<Self> {
        let home = match env::HF_HOME.get() {
            Some((_, home)) => PathBuf::from(home),
            None => user_cache_dir("huggingface", env::HF_HOME.names[0])?,
        };
        let saved_token = || std::fs::read_to_string(home.join("token")).ok().map(|t| t.trim().to_string());
        Ok(Self {
            token: env::HF_TOKEN.get().map(|(_, t)| t).or_else(saved_token).filter(|t| !t.is_empty()),
            cache: home.join("hub"),
            endpoint: env::HF_ENDPOINT.get().map(|(_, e)| e.trim_end_matches('/').to_string()),
            offline: env::HF_HUB_OFFLINE.flag()?.unwrap_or(false),
        })
    }

    fn snapshot(
        &self,
        id: &str,
        revision: &str,
        format: LoadFormat,
        progress: OnProgress<'_>,
    ) -> Result<PathBuf> {
        let cached = self.cached_snapshot(id, revision);
        if self.offline {
            return cached.ok_or_else(|| Error::Fetch {
                what: id.into(),
                message: format!(
                    "{} is set and revision {revision} is not in {}",
                    env::HF_HUB_OFFLINE.names[0],
                    self.cache.display()
                ),
            });
        }
        let failed = |e: ApiError| self.explain(id, revision, e);
        let mut builder = ApiBuilder::new()
            .with_progress(false)
            .with_cache_dir(self.cache.clone())
            .with_token(self.token.clone());
        if let Some(endpoint) = &self.endpoint {
            builder = builder.with_endpoint(endpoint.clone());
        }
        let api = builder.build().map_err(failed)?;
        let repo = |rev: &str| Repo::with_revision(id.into(), RepoType::Model, rev.into());
        let info = match api.repo(repo(revision)).info() {
            Ok(info) => info,
            // Unreachable hub: what is cached for this revision is as good as it was when it was fetched.
            Err(ApiError::RequestError(e)) if cached.is_some() && status(&e.to_string()).is_none() => {
                return Ok(cached.expect("checked"));
            }
            Err(e) => return Err(failed(e)),
        };
        if info.sha.is_empty() || !info.sha.bytes().all(|b| b.is_ascii_alphanumeric()) {
            let message = format!("the hub names a commit {:?}, which is none", info.sha);
            return Err(Error::Fetch { what: id.into(), message });
        }
        // All files of one commit, even when the branch moves meanwhile.
        let folder = self.repo_folder(id).join("snapshots").join(&info.sha);
        let pinned = api.repo(repo(&info.sha));
        let names: Vec<_> = info.siblings.into_iter().map(|s| s.rfilename).collect();
        for name in wanted(&names, format).map_err(|m| Error::UnknownModel { name: id.into(), message: m })? {
            if !folder.join(&name).exists() {
                pinned
                    .download_with_progress(&name, Report { on: &mut *progress, seen: 0 })
                    .map_err(failed)?;
            }
        }
        Cache::new(self.cache.clone())
            .repo(repo(revision))
            .create_ref(&info.sha)
            .map_err(|e| Error::file(&self.cache, e))?;
        Ok(folder)
    }

    fn repo_folder(&self, id: &str) -> PathBuf {
        self.cache.join(format!("models--{}", id.replace('/', "--")))
    }

    /// The snapshot that `revision` stood for when it was last fetched.
    fn cached_snapshot(&self, id: &str, revision: &str) -> Option<PathBuf> {
        let repo = self.repo_folder(id);
        let named = std::fs::read_to_string(repo.join("refs").join(revision)).ok();
        let commit = named.as_deref().map(str::trim).unwrap_or(revision);
        Some(repo.join("snapshots").join(commit)).filter(|p| p.is_dir())
    }

    fn explain(&self, id: &str, revision: &str, error: ApiError) -> Error {
        let text = error.to_string();
        let hint = match status(&text) {
            Some(404) => {
                let message = format!("the hub has no such model or revision ({revision})");
                return Error::UnknownModel { name: id.into(), message };
            }
            Some(401 | 403) => "; the model is gated or private: set HF_TOKEN",
            _ => "; is there a network? A model folder or .gguf file needs none",
        };
        Error::Fetch { what: id.into(), message: format!("{text}{hint}") }
    }
}

/// The files to fetch out of those a repository has.
fn wanted(names: &[String], format: LoadFormat) -> Result<Vec<String>, String> {
    let top = |n: &&String| !n.contains('/');
    let with = |suffix: &'static str| names.iter().filter(top).filter(move |n| n.ends_with(suffix));
    let safetensors: Vec<_> = with(".safetensors").filter(|n| n.starts_with("model")).cloned().collect();
    let gguf: Vec<_> = with(".gguf").cloned().collect();
    let weights = match format {
        LoadFormat::Dummy => Vec::new(),
        LoadFormat::Auto | LoadFormat::Safetensors if !safetensors.is_empty() => safetensors,
        LoadFormat::Auto | LoadFormat::Gguf if gguf.len() == 1 => gguf,
        LoadFormat::Auto | LoadFormat::Gguf if gguf.len() > 1 => {
            return Err(format!("has {} GGUF files; download one and name the file", gguf.len()));
        }
        _ => return Err("has no weights in a known format (model*.safetensors, .gguf)".into()),
    };
    let side = SIDE_FILES.iter().filter(|f| names.iter().any(|n| n == *f)).map(|f| f.to_string());
    Ok(side.chain(weights).collect())
}

/// The GGUF file of a snapshot without safetensors.
fn only_gguf(folder: &Path) -> Option<PathBuf> {
    let files: Vec<_> = std::fs::read_dir(folder).ok()?.flatten().map(|e| e.path()).collect();
    let has = |ext: &str| files.iter().find(|p| p.extension().is_some_and(|e| e == ext)).cloned();
    if has("safetensors").is_some() { None } else { has("gguf") }
}

/// The HTTP status in the words of an error of the hub's client; other numbers are those of files, ports and commits.
fn status(error: &str) -> Option<u16> {
    let (_, rest) = error.split_once("http status: ")?;
    rest.get(..3)?.parse().ok()
}

struct Report<'a> {
    on: OnProgress<'a>,
    seen: u64,
}

impl HubProgress for Report<'_> {
    fn init(&mut self, size: usize, filename: &str) {
        (self.on)(Progress::Start {
            activity: Activity::Fetch,
            what: filename.into(),
            total: Some(size as u64),
        });
    }
    fn update(&mut self, size: usize) {
        self.seen += size as u64;
        (self.on)(Progress::Bytes(self.seen));
    }
    fn finish(&mut self) {
        (self.on)(Progress::Done);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids() {
        for good in ["Qwen/Qwen3-0.6B", "meta-llama/Llama-3.2-1B", "a/b"] {
            assert!(is_id(good), "{good}");
        }
        for bad in ["", "/", "a", "a/", "/b", "a/b/c", "../b", "a/..", "a b/c", "a/-b"] {
            assert!(!is_id(bad), "{bad}");
        }
    }

    #[test]
    fn a_status_is_no_other_number() {
        assert_eq!(status("request error: http status: 404"), Some(404));
        assert_eq!(status("Too many retries: request error: http status: 503"), Some(503));
        assert_eq!(status("Lock acquisition failed: /cache/blobs/4044030.lock"), None);
        assert_eq!(status("request error: io: Connection refused (127.0.0.1:40404)"), None);
    }

    #[test]
    fn wanted_files() {
        let names = |list: &[&str]| list.iter().map(|s| s.to_string()).collect::<Vec<_>>();
        let repo = names(&[
            "README.md",
            "config.json",
            "tokenizer.json",
            "model.safetensors",
            "consolidated.safetensors",
            "original/model.safetensors",
            "x.gguf",
        ]);
        assert_eq!(
            wanted(&repo, LoadFormat::Auto).unwrap(),
            names(&["config.json", "tokenizer.json", "model.safetensors"])
        );
        assert_eq!(wanted(&repo, LoadFormat::Dummy).unwrap(), names(&["config.json", "tokenizer.json"]));
        assert!(wanted(&repo, LoadFormat::Gguf).unwrap().contains(&"x.gguf".to_string()));
        assert!(wanted(&names(&["config.json"]), LoadFormat::Auto).is_err());
        assert!(wanted(&names(&["a.gguf", "b.gguf"]), LoadFormat::Auto).unwrap_err().contains("2 GGUF"));
    }

    #[test]
    fn offline_uses_the_snapshot_of_the_ref_or_says_what_is_missing() {
        let home = tempfile::tempdir().unwrap();
        let hub = Hub { cache: home.path().into(), endpoint: None, token: None, offline: true };
        let err = hub.snapshot("org/m", "main", LoadFormat::Auto, &mut |_| ()).unwrap_err().to_string();
        assert!(err.contains("HF_HUB_OFFLINE") && err.contains("org/m"), "{err}");
        let repo = home.path().join("models--org--m");
        std::fs::create_dir_all(repo.join("snapshots/abc")).unwrap();
        std::fs::create_dir_all(repo.join("refs")).unwrap();
        std::fs::write(repo.join("refs/main"), "abc\n").unwrap();
        let folder = hub.snapshot("org/m", "main", LoadFormat::Auto, &mut |_| ()).unwrap();
        assert_eq!(folder, repo.join("snapshots/abc"));
    }
}
