//! Pause, queue, resume and look inside: Bitfast's `/debug` endpoints and vLLM's own names for them.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use bitfast_llm::SleepLevel;
use serde_json::{Value, json};

use crate::api::control::{BatchInfo, DebugConfig, Status, StepStat, StepStats};
use crate::error::{ApiError, ErrorBody};
use crate::extract::Params;
use crate::state::AppState;

type Shared = State<Arc<AppState>>;
type Answer<T> = Result<Json<T>, ApiError>;

/// Pause scheduling; at levels 1 and 2 release memory too.
#[utoipa::path(
    post, path = "/debug/sleep", tag = "Control", params(("level" = Option<u8>, Query, description = "0, 1 or 2")),
    responses((status = 200, body = Status), (status = 400, body = ErrorBody))
)]
pub(crate) async fn sleep(state: Shared, params: Params) -> Answer<Status> {
    let level = level(&params, SleepLevel::Pause)?;
    pause(&state, level).await?;
    let number = u8::try_from(level.number()).ok();
    Ok(Json(Status { level: number, ..Status::of("sleeping") }))
}

/// Schedule again.
#[utoipa::path(
    post, path = "/debug/wake_up", tag = "Control",
    responses((status = 200, body = Status), (status = 500, body = ErrorBody))
)]
pub(crate) async fn wake_up(state: Shared) -> Answer<Status> {
    resume(&state).await?;
    Ok(Json(Status::of("awake")))
}

/// Count the requests under way.
#[utoipa::path(get, path = "/debug/batch_info", tag = "Control", responses((status = 200, body = BatchInfo)))]
pub(crate) async fn batch_info(state: Shared) -> Json<BatchInfo> {
    let stats = state.llm.fleet().stats();
    Json(BatchInfo { num_running: stats.running, num_waiting: stats.waiting })
}

/// Show the settled configuration.
#[utoipa::path(get, path = "/debug/config", tag = "Control", responses((status = 200, body = DebugConfig)))]
pub(crate) async fn config(state: Shared) -> Json<DebugConfig> {
    Json(settled(&state))
}

/// Forget every cached prefix.
#[utoipa::path(post, path = "/debug/reset_prefix_cache", tag = "Control", responses((status = 200, body = Status)))]
pub(crate) async fn reset_prefix_cache(state: Shared) -> Json<Status> {
    state.llm.fleet().reset_prefix_cache();
    Json(Status::of("reset"))
}

/// Show the steps after a number.
#[utoipa::path(
    get, path = "/debug/step_stats", tag = "Control",
    params(("since" = Option<u64>, Query, description = "Number of the last step that is known")),
    responses((status = 200, body = StepStats), (status = 400, body = ErrorBody))
)]
pub(crate) async fn step_stats(state: Shared, params: Params) -> Answer<StepStats> {
    let since = params.get("since")?.unwrap_or(0);
    let by_rank = state.llm.fleet().step_stats(since).into_iter().enumerate();
    let steps = by_rank.flat_map(|(engine, records)| {
        records.into_iter().map(move |record| StepStat {
            engine,
            id: record.id,
            start_ms: 1e3 * record.start.as_secs_f64(),
            wall_ms: 1e3 * record.duration.as_secs_f64(),
            device_ms: 1e3 * record.execute.as_secs_f64(),
            prefill_tokens: record.prefill_tokens,
            decode_tokens: record.decode_tokens,
            batch_size: record.seqs,
            num_waiting: record.waiting,
        })
    });
    Ok(Json(StepStats { steps: steps.collect() }))
}

/// vLLM's `/sleep`: its default is level 1.
pub(crate) async fn vllm_sleep(state: Shared, params: Params) -> Result<StatusCode, ApiError> {
    // Both are read before anything is aborted.
    let (mode, level) = (Mode::of(&params)?, level(&params, SleepLevel::OffloadWeights)?);
    mode.prepare(&state);
    pause(&state, level).await?;
    Ok(StatusCode::OK)
}

/// vLLM's `/wake_up`; its tags name parts of one wake-up, which is done whole.
pub(crate) async fn vllm_wake_up(state: Shared) -> Result<StatusCode, ApiError> {
    resume(&state).await?;
    Ok(StatusCode::OK)
}

/// vLLM's `/is_sleeping`.
pub(crate) async fn is_sleeping(state: Shared) -> Json<Value> {
    Json(json!({ "is_sleeping": state.llm.fleet().is_paused() }))
}

/// vLLM's `/is_paused`.
pub(crate) async fn is_paused(state: Shared) -> Json<Value> {
    Json(json!({ "is_paused": state.llm.fleet().is_paused() }))
}

/// vLLM's `/pause`.
pub(crate) async fn vllm_pause(state: Shared, params: Params) -> Answer<Status> {
    Mode::of(&params)?.prepare(&state);
    pause(&state, SleepLevel::Pause).await?;
    Ok(Json(Status::of("paused")))
}

/// vLLM's `/resume`.
pub(crate) async fn vllm_resume(state: Shared) -> Answer<Status> {
    resume(&state).await?;
    Ok(Json(Status::of("resumed")))
}

/// vLLM's `/reset_prefix_cache`.
pub(crate) async fn vllm_reset_prefix_cache(state: Shared) -> StatusCode {
    state.llm.fleet().reset_prefix_cache();
    StatusCode::OK
}

/// vLLM's `/server_info`.
pub(crate) async fn server_info(state: Shared) -> Json<Value> {
    let config = settled(&state);
    let parallel = json!({
        "data_parallel_size": config.data_parallel_size,
        "tensor_parallel_size": config.tensor_parallel_size,
        "pipeline_parallel_size": config.pipeline_parallel_size,
        "world_size": config.world_size,
    });
    let scheduler = json!({
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
    });
    let model = json!({ "model": config.model, "max_model_len": config.max_model_len });
    Json(json!({
        "vllm_config": { "parallel_config": parallel, "scheduler_config": scheduler, "model_config": model },
        "bitfast_config": config,
    }))
}

/// What happens to live requests at a pause: vLLM's `mode`.
enum Mode {
    /// They stay, and go on at the wake-up. The default here: nothing accepted is lost unasked.
    Keep,
    /// They are aborted.
    Abort,
}

impl Mode {
    fn of(params: &Params) -> Result<Self, ApiError> {
        match params.text("mode") {
            None | Some("keep") => Ok(Self::Keep),
            Some("abort") => Ok(Self::Abort),
            Some(mode) => Err(ApiError::invalid("mode", format!("mode: {mode:?} is neither keep nor abort"))),
        }
    }

    fn prepare(self, state: &AppState) {
        match self {
            Self::Keep => {}
            Self::Abort => state.llm.fleet().abort_all(),
        }
    }
}

/// How deep to sleep.
fn level(params: &Params, default: SleepLevel) -> Result<SleepLevel, ApiError> {
    match params.get::<u8>("level")? {
        None => Ok(default),
        Some(0) => Ok(SleepLevel::Pause),
        Some(1) => Ok(SleepLevel::OffloadWeights),
        Some(2) => Ok(SleepLevel::DropWeights),
        Some(other) => Err(ApiError::invalid("level", format!("level: must be 0, 1 or 2, got {other}"))),
    }
}

/// Deep sleep moves weights, and waits for the step in flight: not on a thread that serves.
async fn pause(state: &Arc<AppState>, level: SleepLevel) -> Result<(), ApiError> {
    let fleet = state.llm.fleet().clone();
    aside(move || fleet.pause(level)).await
}

async fn resume(state: &Arc<AppState>) -> Result<(), ApiError> {
    let fleet = state.llm.fleet().clone();
    aside(move || fleet.resume()).await
}

async fn aside(work: impl FnOnce() -> bitfast_llm::Result<()> + Send + 'static) -> Result<(), ApiError> {
    let done = tokio::task::spawn_blocking(work).await;
    let failed = |_| Err(bitfast_llm::Error::Engine("the change of state failed".to_owned()));
    Ok(done.unwrap_or_else(failed)?)
}

/// The configuration in force.
pub(crate) fn settled(state: &AppState) -> DebugConfig {
    let fleet = state.llm.fleet();
    let info = fleet.info();
    DebugConfig {
        version: env!("CARGO_PKG_VERSION"),
        model: state.llm.model().to_owned(),
        data_parallel_size: fleet.size(),
        tensor_parallel_size: 1,
        pipeline_parallel_size: 1,
        world_size: fleet.size(),
        max_num_seqs: info.config.max_num_seqs,
        max_num_batched_tokens: info.config.max_num_batched_tokens,
        max_model_len: info.max_model_len,
        max_num_queued_reqs: info.config.max_queued,
        kv_cache_tokens: fleet.kv_cache_tokens(),
        block_size: info.block_size,
        vocab_size: info.vocab_size,
        enable_prefix_caching: info.config.prefix_caching,
        enable_chunked_prefill: info.config.chunked_prefill,
        numerics_class: info.class.name(),
        batch_invariant: info.batch_invariant,
        fingerprint: info.fingerprint.clone(),
        device: info.device.clone(),
    }
}
