//! The routes as one service; no socket is needed to call it.

use std::any::Any;
use std::sync::Arc;

use axum::Router;
use axum::extract::Request;
use axum::http::Uri;
use axum::middleware;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use tower_http::catch_panic::CatchPanicLayer;

use crate::error::{ApiError, ErrorKind};
use crate::routes::{chat, completions, control, misc, responses, tokenize};
use crate::state::AppState;
use crate::{auth, dashboard, openapi, profile};

/// All routes over `state`.
pub(crate) fn app(state: Arc<AppState>) -> Router {
    // What monitors and browsers read without a key shows neither prompts nor answers.
    let open = Router::new()
        .route("/", get(dashboard::page))
        .route("/docs", get(openapi::docs))
        .route("/openapi.json", get(openapi::json))
        .route("/health", get(misc::health))
        .route("/ping", get(misc::ping).post(misc::ping))
        .route("/version", get(misc::version))
        .route("/load", get(misc::load))
        .route("/metrics", get(misc::metrics));
    let guarded = Router::new()
        .route("/v1/completions", post(completions::complete))
        .route("/v1/chat/completions", post(chat::chat))
        .route("/v1/responses", post(responses::respond))
        .route("/v1/models", get(misc::models))
        .route("/v1/models/{*model}", get(misc::model))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .route("/debug/sleep", post(control::sleep))
        .route("/debug/wake_up", post(control::wake_up))
        .route("/debug/batch_info", get(control::batch_info))
        .route("/debug/config", get(control::config))
        .route("/debug/reset_prefix_cache", post(control::reset_prefix_cache))
        .route("/debug/step_stats", get(control::step_stats))
        .route("/debug/profile/start", post(profile::start))
        .route("/debug/profile/stop", post(profile::stop))
        .route("/debug/traces", get(profile::traces))
        .route("/debug/dashboard", get(dashboard::now))
        .route("/debug/traces/{file}", get(profile::trace))
        .merge(vllm_names())
        .route_layer(middleware::from_fn_with_state(Arc::clone(&state), auth::guard));
    open.merge(guarded)
        .fallback(unknown_route)
        .method_not_allowed_fallback(wrong_method)
        .layer(CatchPanicLayer::custom(panicked))
        .with_state(state)
}

/// The names under which vLLM's tools look for the control endpoints.
fn vllm_names() -> Router<Arc<AppState>> {
    Router::new()
        .route("/sleep", post(control::vllm_sleep))
        .route("/wake_up", post(control::vllm_wake_up))
        .route("/is_sleeping", get(control::is_sleeping))
        .route("/pause", post(control::vllm_pause))
        .route("/resume", post(control::vllm_resume))
        .route("/is_paused", get(control::is_paused))
        .route("/start_profile", post(profile::start))
        .route("/stop_profile", post(profile::stop))
        .route("/reset_prefix_cache", post(control::vllm_reset_prefix_cache))
        .route("/server_info", get(control::server_info))
}

async fn unknown_route(uri: Uri) -> ApiError {
    ApiError::new(ErrorKind::NotFound, format!("there is no route {}", uri.path()))
}

async fn wrong_method(request: Request) -> ApiError {
    let message = format!("{} is not for {}", request.uri().path(), request.method());
    ApiError::new(ErrorKind::Method, message)
}

/// A panic is our bug: it is told to the log, and the caller learns no more than that.
fn panicked(_: Box<dyn Any + Send + 'static>) -> Response {
    ApiError::new(ErrorKind::Internal, "internal error").into_response()
}
