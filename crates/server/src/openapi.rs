//! The OpenAPI document, made from the types, and a page that shows it.

use axum::Json;
use axum::response::Html;
use utoipa::openapi::schema::AllOfBuilder;
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityScheme};
use utoipa::openapi::{OpenApi as Document, Ref, RefOr, Schema};
use utoipa::{Modify, OpenApi, PartialSchema, ToSchema};

use crate::api::chat::ChatFields;
use crate::api::common::CommonFields;
use crate::api::completions::CompletionFields;
use crate::routes::{chat, completions, control, misc, responses, tokenize};

/// What `/v1/completions` reads: two views of one body.
pub(crate) struct CompletionRequest;

/// What `/v1/chat/completions` reads: two views of one body.
pub(crate) struct ChatRequest;

/// Declares `$name` as all fields of `$own` and the common ones.
macro_rules! joined_schema {
    ($name:ty, $own:ty) => {
        impl PartialSchema for $name {
            fn schema() -> RefOr<Schema> {
                let part = |name: &str| RefOr::<Schema>::Ref(Ref::from_schema_name(name));
                let both = AllOfBuilder::new().item(part(&<$own>::name())).item(part(&CommonFields::name()));
                RefOr::T(Schema::AllOf(both.build()))
            }
        }

        impl ToSchema for $name {
            fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
                schemas.push((<$own>::name().into_owned(), <$own>::schema()));
                schemas.push((CommonFields::name().into_owned(), CommonFields::schema()));
                <$own>::schemas(schemas);
                CommonFields::schemas(schemas);
            }
        }
    };
}

joined_schema!(CompletionRequest, CompletionFields);
joined_schema!(ChatRequest, ChatFields);

#[derive(OpenApi)]
#[openapi(
    info(title = "Bitfast", description = "Batch-invariant inference behind the OpenAI API."),
    paths(
        completions::complete, chat::chat, responses::respond, misc::models, misc::model,
        tokenize::tokenize, tokenize::detokenize,
        misc::health, misc::ping, misc::version, misc::load, misc::metrics,
        control::sleep, control::wake_up, control::batch_info, control::config, control::reset_prefix_cache,
        control::step_stats, crate::profile::start, crate::profile::stop, crate::profile::traces,
        crate::profile::trace, crate::dashboard::now,
    ),
    modifiers(&Keys)
)]
struct Api;

/// Names the key that guards most routes.
struct Keys;

impl Modify for Keys {
    fn modify(&self, document: &mut Document) {
        let scheme = SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer));
        document.components.get_or_insert_default().add_security_scheme("api_key", scheme);
    }
}

/// The document.
pub(crate) fn document() -> Document {
    Api::openapi()
}

/// `/openapi.json`.
pub(crate) async fn json() -> Json<Document> {
    Json(document())
}

/// `/docs`.
pub(crate) async fn docs() -> Html<&'static str> {
    Html(include_str!("docs.html"))
}
