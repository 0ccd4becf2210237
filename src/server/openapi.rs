//! The description of the routes, for programs.

use axum::extract::State;
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::{IntoResponses, Modify, OpenApi};

use super::error::ErrorBody;
use super::{Shared, chat, completions, other};

/// What any route may answer.
#[derive(IntoResponses)]
#[allow(dead_code, reason = "only describes")]
pub enum Always {
    /// The API key is missing or wrong
    #[response(status = 401)]
    Key(#[to_schema] ErrorBody),
    /// A defect of the server
    #[response(status = 500)]
    Defect(#[to_schema] ErrorBody),
}

/// Why a body may be refused.
#[derive(IntoResponses)]
#[allow(dead_code, reason = "only describes")]
pub enum BadBody {
    /// The request cannot be served as asked
    #[response(status = 400)]
    Bad(#[to_schema] ErrorBody),
    /// The body took too long to arrive
    #[response(status = 408)]
    Slow(#[to_schema] ErrorBody),
    /// The body is too large
    #[response(status = 413)]
    Large(#[to_schema] ErrorBody),
    /// The body is not JSON
    #[response(status = 415)]
    Media(#[to_schema] ErrorBody),
}

/// Why a generation may be refused.
#[derive(IntoResponses)]
#[allow(dead_code, reason = "only describes")]
pub enum Refused {
    /// There is no such model
    #[response(status = 404)]
    Model(#[to_schema] ErrorBody),
    /// The queue is full; `Retry-After` says when to try again
    #[response(status = 429)]
    Full(#[to_schema] ErrorBody),
    /// Shutting down, or a rank is lost
    #[response(status = 503)]
    Stopped(#[to_schema] ErrorBody),
}

#[derive(OpenApi)]
#[openapi(
    info(title = "gqla", description = "Text from a language model, in OpenAI's wire format."),
    paths(
        completions::create, chat::create, other::models, other::model, other::tokenize, other::detokenize,
        other::health, other::ready, other::metrics, other::page, serve,
    ),
    components(schemas(ErrorBody)),
    security(("key" = [])),
    modifiers(&Key),
)]
struct Description;

struct Key;

impl Modify for Key {
    fn modify(&self, description: &mut utoipa::openapi::OpenApi) {
        let scheme = SecurityScheme::Http(HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build());
        description.components.get_or_insert_default().add_security_scheme("key", scheme);
    }
}

/// The description of the routes.
pub fn document() -> utoipa::openapi::OpenApi {
    Description::openapi()
}

/// This description. A server without a key asks for none.
#[utoipa::path(get, path = "/openapi.json", tag = "State", responses((status = 200, body = Object), Always))]
pub async fn serve(State(server): State<Shared>) -> axum::Json<utoipa::openapi::OpenApi> {
    let mut description = document();
    if server.key.is_none() {
        description.security = None;
        if let Some(components) = &mut description.components {
            components.security_schemes.clear();
        }
    }
    axum::Json(description)
}
