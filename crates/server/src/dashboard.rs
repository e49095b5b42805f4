//! The page at `/`, and the figures that it shows.

mod recent;

use std::sync::{Arc, OnceLock};

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderValue, header};
use axum::response::{Html, IntoResponse, Response};
use bitfast_llm::{Health, SleepState};
use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::api::control::DebugConfig;
use crate::routes::control::settled;
use crate::state::AppState;

pub(crate) use recent::Recent;

/// All of it: style, script, no other file.
const PAGE: &str = include_str!("dashboard/index.html");

/// The page. Its one style and one script are allowed by their hashes, and nothing else runs in it.
pub(crate) async fn page() -> Response {
    static POLICY: OnceLock<HeaderValue> = OnceLock::new();
    let policy = POLICY.get_or_init(|| HeaderValue::from_str(&policy(PAGE)).expect("base64 is ASCII"));
    let headers = [
        (header::CONTENT_SECURITY_POLICY, policy.clone()),
        (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
        (header::REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
    ];
    (headers, Html(PAGE)).into_response()
}

/// What the page shows now. It has no text of prompts or answers.
#[derive(Serialize)]
pub(crate) struct Now {
    /// `serving`, `stopping` or `dead`.
    health: &'static str,
    /// 0, 1 or 2 while paused.
    sleep_level: Option<u64>,
    /// Of the server.
    uptime_ms: f64,
    running: usize,
    waiting: usize,
    /// [0, 1]
    kv_usage: f64,
    prompt_tokens: u64,
    generation_tokens: u64,
    #[serde(flatten)]
    recent: recent::Shown,
    config: Config,
}

#[derive(Serialize)]
struct Config {
    #[serde(flatten)]
    settled: DebugConfig,
    /// Whether text can be sent.
    tokenizer: bool,
}

/// Show what the page at `/` shows.
#[utoipa::path(
    get, path = "/debug/dashboard", tag = "Control",
    responses((status = 200, description = "Figures of now, and the last requests without what they said", body = Object))
)]
pub(crate) async fn now(state: State<Arc<AppState>>) -> Json<Now> {
    let fleet = state.llm.fleet();
    let stats = fleet.stats();
    Json(Now {
        health: match fleet.health() {
            Health::Serving => "serving",
            Health::Stopping => "stopping",
            Health::Dead(_) => "dead",
        },
        sleep_level: match fleet.sleep_state() {
            SleepState::Awake => None,
            SleepState::Asleep { level, .. } => Some(level.number()),
        },
        uptime_ms: state.metrics.recent.uptime().as_secs_f64() * 1e3,
        running: stats.running,
        waiting: stats.waiting,
        kv_usage: stats.kv_usage(),
        prompt_tokens: stats.prompt_tokens,
        generation_tokens: stats.generation_tokens,
        recent: state.metrics.recent.shown(),
        config: Config { settled: settled(&state), tokenizer: state.llm.tokenizer().is_some() },
    })
}

/// The content security policy of a page with one style and one script.
fn policy(page: &str) -> String {
    let hash = |tag: &str| {
        let inside =
            page.split_once(&format!("<{tag}>")).and_then(|(_, rest)| rest.split_once(&format!("</{tag}>")));
        let (inside, _) = inside.unwrap_or_else(|| panic!("the page has no {tag}"));
        base64(&Sha256::digest(inside.as_bytes()))
    };
    format!(
        "default-src 'none'; connect-src 'self'; img-src data:; style-src 'sha256-{}'; script-src 'sha256-{}'; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        hash("style"),
        hash("script")
    )
}

/// RFC 4648, with padding.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let bits = group.iter().chain([&0, &0]).take(3).fold(0u32, |bits, byte| bits << 8 | u32::from(*byte));
        for digit in 0..4 {
            let index = bits >> (18 - 6 * digit) & 63;
            text.push(if digit > group.len() { '=' } else { char::from(DIGITS[index as usize]) });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_of_the_rfc() {
        for (bytes, text) in
            [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")]
        {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
    }

    #[test]
    fn the_page_needs_nothing_but_itself() {
        for foreign in ["http://", "src=", "@import", "url(", " onclick", " style=", "innerHTML", "eval("] {
            // The name space of SVG is no address to load from.
            let page = PAGE.replace("http://www.w3.org/2000/svg", "");
            assert!(!page.contains(foreign), "{foreign}");
        }
        assert_eq!(PAGE.matches("<script").count() + PAGE.matches("<style").count(), 2);
        assert!(policy(PAGE).contains("script-src 'sha256-"));
    }
}
