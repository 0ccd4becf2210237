//! The coordinator over HTTP, in OpenAI's wire format.
//!
//! A user of the engine like any other: [`router`] makes an axum router of an engine, to be served by [`serve`], by
//! `gqla serve`, or nested in another program's router.

mod access;
pub mod api;
mod chat;
mod choice;
mod completions;
mod error;
mod extract;
mod listener;
mod metrics;
mod openapi;
mod other;
mod sse;
mod submit;
pub mod template;
mod writer;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::routing::{get, post};

use crate::engine::{Engine, Event, Request};
use crate::error::{Error, Result};
use crate::text::Tokenizer;
pub use error::ApiError;
pub use listener::serve;
use metrics::Metrics;
pub use openapi::document;
use template::Template;

/// What a request may ask for. Beyond it the answer is 400, or 413 for the body's size.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Bytes of a request's body.
    pub body: usize,
    /// Tokens of a prompt.
    pub prompt_tokens: usize,
    /// Tokens to generate.
    pub max_tokens: usize,
    /// Prompts of one request.
    pub prompts: usize,
    /// Choices of one prompt.
    pub n: usize,
    /// Stop strings, and stop token ids.
    pub stops: usize,
    /// Bytes of one stop string.
    pub stop_bytes: usize,
    /// Entries of a logit bias.
    pub logit_bias: usize,
    /// Alternatives of a log-probability.
    pub logprobs: usize,
    /// Messages of a chat.
    pub messages: usize,
    /// Work a chat template may do, in template instructions.
    pub template_work: u64,
    /// Bytes a chat template may write.
    pub template_bytes: usize,
    /// How long a body may take to arrive.
    pub body_time: Duration,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            body: 2 << 20,
            prompt_tokens: usize::MAX,
            max_tokens: usize::MAX,
            prompts: 64,
            n: 16,
            stops: 16,
            stop_bytes: 256,
            logit_bias: 1024,
            logprobs: 20,
            messages: 1024,
            template_work: 2_000_000,
            template_bytes: 2 << 20,
            body_time: Duration::from_secs(30),
        }
    }
}

/// How to serve.
#[derive(Debug, Clone)]
pub struct Options {
    /// The checkpoint's directory: its tokenizer and its chat template.
    pub model: PathBuf,
    /// The model's name in requests; `None` takes the directory's.
    pub name: Option<String>,
    /// Every route but `/health` wants this key, as `Authorization: Bearer KEY` or as a Basic password.
    pub api_key: Option<String>,
    /// Bounds.
    pub limits: Limits,
    /// Write a line a request to the `gqla::access` log.
    pub access_log: bool,
}

impl Options {
    /// Defaults for a checkpoint.
    pub fn new(model: impl Into<PathBuf>) -> Options {
        Options { model: model.into(), name: None, api_key: None, limits: Limits::default(), access_log: true }
    }
}

/// What the handlers share.
struct Server {
    engine: Engine,
    tokenizer: Arc<Tokenizer>,
    template: Option<Template>,
    name: String,
    created: u64,
    key: Option<String>,
    limits: Limits,
    metrics: Arc<Metrics>,
    access_log: bool,
}

type Shared = Arc<Server>;

/// The routes over `engine`. Fails when the checkpoint's tokenizer or chat template cannot be read.
pub fn router(engine: Engine, options: Options) -> Result<Router> {
    let tokenizer = Arc::new(Tokenizer::load(&options.model, &engine.info().model)?);
    let template = Template::load(&options.model)?;
    let directory = options.model.canonicalize().unwrap_or_else(|_| options.model.clone());
    let name = options.name.unwrap_or_else(|| directory.file_name().unwrap_or_default().to_string_lossy().into_owned());
    let server = Arc::new(Server {
        metrics: Arc::new(Metrics::new(engine.info())),
        engine,
        tokenizer,
        template,
        name,
        created: now(),
        key: options.api_key.filter(|k| !k.is_empty()),
        limits: options.limits,
        access_log: options.access_log,
    });
    let routes = Router::new()
        .route("/", get(other::page))
        .route("/v1/completions", post(completions::create))
        .route("/v1/chat/completions", post(chat::create))
        .route("/v1/models", get(other::models))
        .route("/v1/models/{model}", get(other::model))
        .route("/tokenize", post(other::tokenize))
        .route("/detokenize", post(other::detokenize))
        .route("/health", get(other::health))
        .route("/ready", get(other::ready))
        .route("/metrics", get(other::metrics))
        .route("/openapi.json", get(openapi::serve))
        .method_not_allowed_fallback(error::method_not_allowed)
        .fallback(error::not_found)
        .layer(axum::middleware::from_fn_with_state(Arc::clone(&server), access::guard))
        .layer(tower_http::catch_panic::CatchPanicLayer::custom(error::panicked))
        .with_state(server);
    Ok(routes)
}

/// Computes one token, so that `/ready` has a real step to go by.
pub fn warm_up(engine: &Engine) -> Result<()> {
    let request = Request { prompt: vec![0], max_tokens: 1, ..Request::default() };
    let mut stream = engine.try_submit(request).map_err(|e| Error::Stopped(e.to_string()))?;
    while let Some(event) = stream.next_blocking() {
        if let Event::Failed(error) = event {
            return Err(error);
        }
    }
    Ok(())
}

/// Seconds since 1970.
fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// A fresh id, `prefix` before it.
fn fresh_id(prefix: &str) -> String {
    use std::hash::BuildHasher;
    let draw = || std::collections::hash_map::RandomState::new().hash_one(prefix);
    format!("{prefix}-{:016x}{:08x}", draw(), draw() as u32)
}
