//! The page at `/`.

use axum::response::Html;

/// The page.
pub(crate) async fn page() -> Html<&'static str> {
    Html("<!doctype html><title>Bitfast</title><p>Bitfast is serving. See <a href=\"/docs\">/docs</a>.</p>")
}
