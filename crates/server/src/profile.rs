//! The profiler's endpoints and the files that it leaves.

use std::path::PathBuf;
use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};

use crate::api::control::{Status, Traces};
use crate::error::{ApiError, ErrorBody, ErrorKind};
use crate::extract::Params;
use crate::state::AppState;

/// What records steps and operations into trace files.
pub(crate) struct Profiler {
    directory: Option<PathBuf>,
}

impl Profiler {
    pub fn new(directory: Option<PathBuf>) -> Self {
        Self { directory }
    }

    /// Begins a recording whose files begin with `prefix`.
    async fn start(&self, state: &Arc<AppState>, prefix: &str) -> Result<(), ApiError> {
        let (fleet, prefix) = (state.llm.fleet().clone(), prefix.to_owned());
        aside(move || fleet.start_profile(&prefix)).await
    }

    /// Ends the recording; its files are complete afterwards.
    async fn stop(&self, state: &Arc<AppState>) -> Result<(), ApiError> {
        let fleet = state.llm.fleet().clone();
        aside(move || fleet.stop_profile().map(drop)).await
    }
}

/// Files are opened and written where that may take its time.
async fn aside(work: impl FnOnce() -> bitfast_llm::Result<()> + Send + 'static) -> Result<(), ApiError> {
    let done = tokio::task::spawn_blocking(work).await;
    let done = done.unwrap_or_else(|e| Err(bitfast_llm::Error::Engine(e.to_string())));
    done.map_err(|error| {
        use bitfast_llm::{Error, ProfileError};
        match &error {
            Error::Profile(ProfileError::Running { .. } | ProfileError::NotRunning) => {
                ApiError::new(ErrorKind::Conflict, error.to_string())
            }
            Error::Profile(ProfileError::Prefix(_)) => ApiError::invalid("prefix", error.to_string()),
            Error::Profile(ProfileError::NoDirectory) => {
                ApiError::new(ErrorKind::NotFound, error.to_string())
            }
            _ => ApiError::new(ErrorKind::Internal, error.to_string()),
        }
    })
}

/// Begin a recording.
#[utoipa::path(
    post, path = "/debug/profile/start", tag = "Control",
    params(("prefix" = Option<String>, Query, description = "1 to 128 of A-Z a-z 0-9 . _ -")),
    responses((status = 200, body = Status), (status = 400, body = ErrorBody), (status = 409, body = ErrorBody))
)]
pub(crate) async fn start(
    State(state): State<Arc<AppState>>,
    params: Params,
) -> Result<Json<Status>, ApiError> {
    let prefix = params.text("prefix").unwrap_or("bitfast");
    state.profiler.start(&state, prefix).await?;
    Ok(Json(Status { prefix: Some(prefix.to_owned()), ..Status::of("profiling") }))
}

/// End the recording.
#[utoipa::path(
    post, path = "/debug/profile/stop", tag = "Control",
    responses((status = 200, body = Status), (status = 409, body = ErrorBody))
)]
pub(crate) async fn stop(State(state): State<Arc<AppState>>) -> Result<Json<Status>, ApiError> {
    state.profiler.stop(&state).await?;
    Ok(Json(Status::of("stopped")))
}

/// List the trace files.
#[utoipa::path(get, path = "/debug/traces", tag = "Control", responses((status = 200, body = Traces)))]
pub(crate) async fn traces(State(state): State<Arc<AppState>>) -> Json<Traces> {
    let Some(directory) = state.profiler.directory.clone() else {
        let error = "no directory is configured: see --profile-dir".to_owned();
        return Json(Traces { traces: Vec::new(), directory: None, error: Some(error) });
    };
    let shown = directory.display().to_string();
    let listed = tokio::task::spawn_blocking(move || list(&directory)).await;
    Json(match listed {
        Ok(Ok(traces)) => Traces { traces, directory: Some(shown), error: None },
        Ok(Err(error)) => {
            Traces { traces: Vec::new(), directory: Some(shown), error: Some(error.to_string()) }
        }
        Err(_) => Traces { traces: Vec::new(), directory: Some(shown), error: Some("cannot be read".into()) },
    })
}

/// Hand out a trace file.
#[utoipa::path(
    get, path = "/debug/traces/{file}", tag = "Control", params(("file" = String, Path, description = "A name")),
    responses((status = 200, description = "The file"), (status = 404, body = ErrorBody))
)]
pub(crate) async fn trace(
    State(state): State<Arc<AppState>>,
    Path(name): Path<String>,
) -> Result<Response, ApiError> {
    let unknown = || ApiError::new(ErrorKind::NotFound, "there is no such trace");
    // The name is decoded here, so an encoded slash is a slash, which no name has.
    let path = match &state.profiler.directory {
        Some(directory) if is_trace_name(&name) => directory.join(&name),
        _ => return Err(unknown()),
    };
    let open = move || {
        // A link could lead outside.
        let is_file = std::fs::symlink_metadata(&path)?.is_file();
        if is_file { std::fs::File::open(path) } else { Err(std::io::ErrorKind::NotFound.into()) }
    };
    let opened = tokio::task::spawn_blocking(open).await;
    let file = opened.ok().and_then(Result::ok).ok_or_else(unknown)?;
    let kind = if name.ends_with(".gz") { "application/gzip" } else { "application/json" };
    let disposition = format!("attachment; filename=\"{name}\"");
    let headers = [(header::CONTENT_TYPE, kind.to_owned()), (header::CONTENT_DISPOSITION, disposition)];
    Ok((headers, Body::new(FileBody::new(file))).into_response())
}

fn is_name_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"._-".contains(&byte)
}

fn is_trace_name(name: &str) -> bool {
    name.bytes().all(is_name_byte)
        && !name.starts_with('.')
        && (name.ends_with(".json") || name.ends_with(".json.gz"))
}

fn list(directory: &std::path::Path) -> std::io::Result<Vec<String>> {
    let mut names = Vec::new();
    let entries = match std::fs::read_dir(directory) {
        // The first recording makes it.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(names),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        if let Some(name) = entry.file_name().to_str().filter(|name| is_trace_name(name))
            && entry.file_type()?.is_file()
        {
            names.push(name.to_owned());
        }
    }
    names.sort();
    Ok(names)
}

/// A file in pieces, read where reading may take its time.
struct FileBody {
    pieces: tokio::sync::mpsc::Receiver<std::io::Result<bytes::Bytes>>,
}

const PIECE_BYTES: usize = 64 << 10;

impl FileBody {
    fn new(mut file: std::fs::File) -> Self {
        let (sender, pieces) = tokio::sync::mpsc::channel(4);
        tokio::task::spawn_blocking(move || {
            loop {
                let mut piece = vec![0; PIECE_BYTES];
                let read = std::io::Read::read(&mut file, &mut piece);
                let end = !matches!(read, Ok(n) if n > 0);
                let piece = read.map(|n| {
                    piece.truncate(n);
                    bytes::Bytes::from(piece)
                });
                if matches!(&piece, Ok(bytes) if bytes.is_empty())
                    || sender.blocking_send(piece).is_err()
                    || end
                {
                    return;
                }
            }
        });
        Self { pieces }
    }
}

impl hyper::body::Body for FileBody {
    type Data = bytes::Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<hyper::body::Frame<bytes::Bytes>, std::io::Error>>> {
        self.pieces.poll_recv(context).map(|piece| piece.map(|piece| piece.map(hyper::body::Frame::data)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_names_of_traces() {
        for good in ["a.json", "decode_ctx1_in2_bs3-7.json.gz", "..a.json".trim_start_matches('.')] {
            assert!(is_trace_name(good), "{good}");
        }
        for bad in ["", ".json", "../a.json", "a/b.json", "a\\b.json", "a.txt", "..", "a\0.json", "ä.json"] {
            assert!(!is_trace_name(bad), "{bad}");
        }
    }
}
