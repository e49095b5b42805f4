//! Health, version, models, load and metrics.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use bitfast_llm::Health;
use serde_json::{Value, json};

use crate::api::common::{ModelCard, ModelList};
use crate::error::{ApiError, ErrorBody, ErrorKind};
use crate::state::AppState;

type Shared = State<Arc<AppState>>;

/// Whether the server can serve: 200, or 503 once an engine has died.
#[utoipa::path(
    get, path = "/health", tag = "Server",
    responses((status = 200, description = "It can serve"), (status = 503, body = ErrorBody))
)]
pub(crate) async fn health(state: Shared) -> Result<StatusCode, ApiError> {
    match state.llm.fleet().health() {
        Health::Serving | Health::Stopping => Ok(StatusCode::OK),
        Health::Dead(reason) => {
            Err(ApiError::new(ErrorKind::Unavailable, format!("the engine is dead: {reason}")))
        }
    }
}

/// Whether the server answers.
#[utoipa::path(get, path = "/ping", tag = "Server", responses((status = 200, description = "It answers")))]
pub(crate) async fn ping(state: Shared) -> Result<StatusCode, ApiError> {
    health(state).await
}

/// The version.
#[utoipa::path(get, path = "/version", tag = "Server", responses((status = 200, body = Object)))]
pub(crate) async fn version() -> Json<Value> {
    Json(json!({ "version": env!("CARGO_PKG_VERSION") }))
}

/// Generating HTTP requests under way.
#[utoipa::path(get, path = "/load", tag = "Server", responses((status = 200, body = Object)))]
pub(crate) async fn load(state: Shared) -> Json<Value> {
    Json(json!({ "server_load": state.in_flight() }))
}

/// The model's names.
#[utoipa::path(get, path = "/v1/models", tag = "OpenAI", responses((status = 200, body = ModelList)))]
pub(crate) async fn models(state: Shared) -> Json<ModelList> {
    let names = state.config.served_model_names.iter();
    Json(ModelList { object: "list", data: names.map(|name| card(&state, name.clone())).collect() })
}

/// One of the model's names.
#[utoipa::path(
    get, path = "/v1/models/{model}", tag = "OpenAI", params(("model" = String, Path, description = "A name")),
    responses((status = 200, body = ModelCard), (status = 404, body = ErrorBody))
)]
pub(crate) async fn model(state: Shared, Path(name): Path<String>) -> Result<Json<ModelCard>, ApiError> {
    Ok(Json(card(&state, state.model_name(Some(&name))?)))
}

fn card(state: &AppState, id: String) -> ModelCard {
    ModelCard {
        id,
        object: "model",
        created: state.started,
        owned_by: "bitfast",
        root: state.llm.model().to_owned(),
        parent: None,
        max_model_len: state.llm.info().max_model_len,
    }
}

/// Figures for Prometheus.
#[utoipa::path(
    get, path = "/metrics", tag = "Server",
    responses((status = 200, description = "Prometheus' text format", body = String, content_type = "text/plain"))
)]
pub(crate) async fn metrics(state: Shared) -> impl IntoResponse {
    let page = state.metrics.render(&state.llm, &state.config.served_model_names[0], state.in_flight());
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], page)
}
