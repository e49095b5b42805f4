//! The key that opens the guarded routes.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use crate::error::{ApiError, ErrorKind};
use crate::state::AppState;

/// Lets a request through that has a key, where keys are set.
pub(crate) async fn guard(State(state): State<Arc<AppState>>, request: Request, next: Next) -> Response {
    if state.keys.is_empty() || has_key(&state.keys, request.headers()) {
        return next.run(request).await;
    }
    let message = "no or wrong API key: send the header `Authorization: Bearer KEY`";
    ApiError::new(ErrorKind::Unauthorized, message).into_response()
}

/// Compares hashes, all of them: the time does not tell where or with which key a guess differs.
fn has_key(keys: &[blake3::Hash], headers: &HeaderMap) -> bool {
    let given = headers.get(header::AUTHORIZATION).map(|value| value.as_bytes());
    let Some((scheme, key)) = given.and_then(|value| value.split_at_checked(7)) else { return false };
    let hash = blake3::hash(key);
    let known = keys.iter().fold(false, |known, key| known | (*key == hash));
    scheme.eq_ignore_ascii_case(b"bearer ") & known
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_keys_open() {
        let keys = [blake3::hash(b"secret"), blake3::hash(b"other")];
        let opens = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::AUTHORIZATION, value.parse().unwrap());
            has_key(&keys, &headers)
        };
        assert!(opens("Bearer secret") && opens("bearer other"));
        for wrong in
            ["", "secret", "Bearer ", "Bearer secre", "Bearer secrets", "Basic secret", "Bearer  secret"]
        {
            assert!(!opens(wrong), "{wrong:?}");
        }
        assert!(!has_key(&keys, &HeaderMap::new()));
    }
}
