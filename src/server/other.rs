//! The routes that generate nothing.

use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{Html, IntoResponse, Response};

use super::api::{DetokenizeRequest, Detokenized, ModelCard, Models, Status, TokenizeRequest, Tokenized};
use super::completions::beside;
use super::error::ErrorBody;
use super::extract::Json;
use super::openapi::{Always, BadBody};
use super::{ApiError, Server, Shared, chat};

fn card(server: &Server) -> ModelCard {
    ModelCard {
        id: server.name.clone(),
        object: "model",
        created: server.created,
        owned_by: "gqla",
        max_model_len: server.engine.info().max_context,
    }
}

/// The model that is served.
#[utoipa::path(get, path = "/v1/models", tag = "OpenAI",
    responses((status = 200, body = Models), Always))]
pub async fn models(State(server): State<Shared>) -> axum::Json<Models> {
    axum::Json(Models { object: "list", data: vec![card(&server)] })
}

/// One model.
#[utoipa::path(get, path = "/v1/models/{model}", tag = "OpenAI", params(("model" = String, Path, description = "Its name")),
    responses((status = 200, body = ModelCard), (status = 400, body = ErrorBody), (status = 404, body = ErrorBody), Always))]
pub async fn model(
    State(server): State<Shared>,
    name: Result<Path<String>, axum::extract::rejection::PathRejection>,
) -> Result<axum::Json<ModelCard>, ApiError> {
    let Path(name) = name.map_err(|e| ApiError::new(StatusCode::BAD_REQUEST, e.to_string()))?;
    super::submit::check_model(&server, Some(&name))?;
    Ok(axum::Json(card(&server)))
}

/// The tokens of a text, or of a conversation.
#[utoipa::path(post, path = "/tokenize", request_body = TokenizeRequest, tag = "Tokens",
    responses((status = 200, body = Tokenized), Always, BadBody))]
pub async fn tokenize(
    State(server): State<Shared>,
    Json(request): Json<TokenizeRequest>,
) -> Result<axum::Json<Tokenized>, ApiError> {
    let max_model_len = server.engine.info().max_context;
    let tokens = match (request.prompt, request.messages) {
        (Some(text), None) => {
            let special = request.add_special_tokens.unwrap_or(true);
            beside(move || {
                let t = &server.tokenizer;
                Ok(if special { t.encode(&text) } else { t.encode_plain(&text) }?)
            })
            .await?
        }
        (None, Some(messages)) => {
            let begin = request.add_generation_prompt.unwrap_or(true);
            chat::prompt(&server, messages, begin, Default::default(), |_, _| Ok(())).await?
        }
        _ => return Err(ApiError::field("prompt", "give either prompt or messages")),
    };
    Ok(axum::Json(Tokenized { count: tokens.len(), max_model_len, tokens }))
}

/// The text of tokens.
#[utoipa::path(post, path = "/detokenize", request_body = DetokenizeRequest, tag = "Tokens",
    responses((status = 200, body = Detokenized), Always, BadBody))]
pub async fn detokenize(
    State(server): State<Shared>,
    Json(request): Json<DetokenizeRequest>,
) -> Result<axum::Json<Detokenized>, ApiError> {
    let vocab = server.engine.info().model.vocab;
    if let Some(t) = request.tokens.iter().find(|t| **t as usize >= vocab) {
        return Err(ApiError::field("tokens", format!("token {t} is not in the vocabulary of {vocab}")));
    }
    let prompt = beside(move || Ok(server.tokenizer.decode(&request.tokens)?)).await?;
    Ok(axum::Json(Detokenized { prompt }))
}

/// A page to try the model.
#[utoipa::path(get, path = "/", tag = "State",
    responses((status = 200, body = String, content_type = "text/html"), Always))]
pub async fn page() -> Html<&'static str> {
    Html(include_str!("page.html"))
}

/// Whether the process lives. Needs no key.
#[utoipa::path(get, path = "/health", tag = "State", security(()), responses((status = 200, body = Status), (status = 500, body = ErrorBody)))]
pub async fn health() -> axum::Json<Status> {
    axum::Json(Status { status: "ok" })
}

/// Whether requests are served: a step has been computed, and every rank answers.
#[utoipa::path(get, path = "/ready", tag = "State", responses((status = 200, body = Status),
    (status = 503, body = ErrorBody), Always))]
pub async fn ready(State(server): State<Shared>) -> Result<axum::Json<Status>, ApiError> {
    let engine = &server.engine;
    let not = |why: String| Err(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, why).code("not_ready"));
    if let Some(why) = engine.stopped() {
        not(why.to_string())
    } else if engine.draining() {
        not("the server is shutting down".into())
    } else if !engine.answers() {
        not(format!("a rank has not answered for {:.1} s", engine.unanswered().as_secs_f64()))
    } else if engine.stats().steps == 0 {
        not("no step has been computed yet".into())
    } else {
        Ok(axum::Json(Status { status: "ok" }))
    }
}

/// Counters and histograms for Prometheus.
#[utoipa::path(get, path = "/metrics", tag = "State",
    responses((status = 200, body = String, content_type = "text/plain"), Always))]
pub async fn metrics(State(server): State<Shared>) -> Response {
    let text = server.metrics.render(&server.engine.stats(), server.engine.answers());
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response()
}
