//! Checks of what comes from outside: every mistake names its parameter.

use crate::config::{EngineInfo, MAX_LOGIT_BIAS, MAX_SAMPLES, MAX_WORDS};
use crate::request::{EngineRequest, InvalidParam, SamplingParams, SubmitError};

/// Checks `request` against the model and the limits, and clamps `max_tokens` to the context.
pub(crate) fn validate(mut request: EngineRequest, info: &EngineInfo) -> Result<EngineRequest, SubmitError> {
    let prompt_tokens = request.prompt_token_ids.len();
    if prompt_tokens == 0 {
        return Err(invalid("prompt", "must have at least one token".to_owned()).into());
    }
    // A request that only scores needs no room for a token of its own.
    let room = info.max_model_len.saturating_sub(prompt_tokens);
    if prompt_tokens > info.max_model_len || (room == 0 && request.sampling.max_tokens > 0) {
        return Err(SubmitError::PromptTooLong { prompt_tokens, max_model_len: info.max_model_len });
    }
    check_tokens("prompt", &request.prompt_token_ids, info)?;
    check_sampling(&request.sampling, info)?;
    let max_tokens = request.sampling.max_tokens.min(u32::try_from(room).unwrap_or(u32::MAX));
    request.sampling.max_tokens = max_tokens;
    let needed_tokens = prompt_tokens + max_tokens as usize;
    if needed_tokens > info.kv_cache_tokens() {
        return Err(SubmitError::NeverFits { needed_tokens, cache_tokens: info.kv_cache_tokens() });
    }
    Ok(request)
}

fn check_sampling(p: &SamplingParams, info: &EngineInfo) -> Result<(), InvalidParam> {
    if p.n == 0 || p.n > MAX_SAMPLES {
        return Err(invalid("n", format!("must be in [1, {MAX_SAMPLES}], got {}", p.n)));
    }
    within("temperature", p.temperature, 0.0, 2.0)?;
    within("top_p", p.top_p, 0.0, 1.0)?;
    if p.top_p == 0.0 {
        return Err(invalid("top_p", "must be in (0, 1], got 0".to_owned()));
    }
    if p.top_k < -1 {
        return Err(invalid("top_k", format!("must be -1 or 0 (all) or at least 1, got {}", p.top_k)));
    }
    within("min_p", p.min_p, 0.0, 1.0)?;
    within("presence_penalty", p.presence_penalty, -2.0, 2.0)?;
    within("frequency_penalty", p.frequency_penalty, -2.0, 2.0)?;
    within("repetition_penalty", p.repetition_penalty, 0.0, 2.0)?;
    if p.repetition_penalty == 0.0 {
        return Err(invalid("repetition_penalty", "must be in (0, 2], got 0".to_owned()));
    }
    if p.min_tokens > p.max_tokens {
        let message = format!("must not exceed max_tokens ({}), got {}", p.max_tokens, p.min_tokens);
        return Err(invalid("min_tokens", message));
    }
    let limit = info.config.max_logprobs;
    for (param, value) in [("logprobs", p.logprobs), ("prompt_logprobs", p.prompt_logprobs)] {
        if let Some(value) = value.filter(|v| *v > limit) {
            return Err(invalid(param, format!("must be at most {limit}, got {value}")));
        }
    }
    check_token_sets(p, info)
}

fn check_token_sets(p: &SamplingParams, info: &EngineInfo) -> Result<(), InvalidParam> {
    at_most("stop_token_ids", p.stop_token_ids.len(), MAX_WORDS)?;
    check_tokens("stop_token_ids", &p.stop_token_ids, info)?;
    at_most("logit_bias", p.logit_bias.len(), MAX_LOGIT_BIAS)?;
    for (&token, &bias) in &p.logit_bias {
        check_tokens("logit_bias", &[token], info)?;
        within("logit_bias", bias, -100.0, 100.0)?;
    }
    at_most("bad_words", p.bad_words.len(), MAX_WORDS)?;
    for word in &p.bad_words {
        if word.is_empty() {
            return Err(invalid("bad_words", "a bad word must have at least one token".to_owned()));
        }
        check_tokens("bad_words", word, info)?;
    }
    let Some(mask) = &p.allowed_token_ids else { return Ok(()) };
    let mut allowed = mask.0.iter().enumerate().filter(|(_, word)| **word != 0).map(|(i, word)| (i, *word));
    let Some(last) = allowed.next_back() else {
        return Err(invalid("allowed_token_ids", "must allow at least one token".to_owned()));
    };
    let highest = last.0 as u64 * 32 + u64::from(last.1.ilog2());
    if highest >= info.vocab_size as u64 {
        return Err(out_of_vocab("allowed_token_ids", highest, info));
    }
    Ok(())
}

fn invalid(param: &'static str, message: String) -> InvalidParam {
    InvalidParam { param, message }
}

/// NaN is outside every range.
fn within(param: &'static str, value: f32, low: f32, high: f32) -> Result<(), InvalidParam> {
    if (low..=high).contains(&value) {
        return Ok(());
    }
    Err(invalid(param, format!("must be in [{low}, {high}], got {value}")))
}

fn at_most(param: &'static str, len: usize, limit: usize) -> Result<(), InvalidParam> {
    if len <= limit {
        return Ok(());
    }
    Err(invalid(param, format!("must have at most {limit} entries, got {len}")))
}

fn check_tokens(param: &'static str, tokens: &[u32], info: &EngineInfo) -> Result<(), InvalidParam> {
    match tokens.iter().find(|t| **t as usize >= info.vocab_size) {
        None => Ok(()),
        Some(&token) => Err(out_of_vocab(param, u64::from(token), info)),
    }
}

fn out_of_vocab(param: &'static str, token: u64, info: &EngineInfo) -> InvalidParam {
    invalid(param, format!("token id {token} is not in the vocabulary of {} tokens", info.vocab_size))
}
