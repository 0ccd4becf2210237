//! `POST /v1/chat/completions`.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt;
use serde_json::Value;

use super::api::{
    Answer, ChatChoice, ChatChunk, ChatCompletion, ChatLogprob, ChatLogprobs, ChatRequest, ChunkChoice, Content, Delta,
    Message, TopLogprob, Usage,
};
use super::choice::{Count, End, Out, Outputs, outputs};
use super::completions::{beside, by_id, finite, token_text};
use super::extract::Json;
use super::sse::{self, Chunks, Events};
use super::submit::{self, Order};
use super::template::{self, Bounds};
use super::writer::Piece;
use super::{ApiError, Server, Shared, fresh_id, now};
use crate::engine::Logprob;

/// Answer a conversation.
///
/// With `stream` the answer is server-sent events: `chat.completion.chunk` objects, then `[DONE]`.
#[utoipa::path(post, path = "/v1/chat/completions", request_body = ChatRequest, tag = "OpenAI",
    responses((status = 200, description = "The choices, or their chunks", content(
        (ChatCompletion = "application/json"), (String = "text/event-stream"))), super::openapi::Always,
        super::openapi::BadBody, super::openapi::Refused))]
pub async fn create(State(server): State<Shared>, Json(request): Json<ChatRequest>) -> Result<Response, ApiError> {
    submit::early(&server)?;
    let common = &request.common;
    submit::check_model(&server, common.model.as_deref())?;
    let refuse = |field: &'static str, what: &str| Err(ApiError::field(field, format!("{field}: {what}")));
    if request.tools.as_ref().is_some_and(|t| !t.is_empty()) {
        return refuse("tools", "is not supported: leave it out");
    }
    if request.response_format.as_ref().is_some_and(|f| f.kind != "text") {
        return refuse("response_format", "only {\"type\": \"text\"} is supported");
    }
    let stream = common.stream.unwrap_or(false);
    if stream && common.prompt_logprobs.is_some() {
        return refuse("stream", "cannot be used with log-probabilities of the prompt");
    }
    let max_tokens = request.max_completion_tokens.or(request.max_tokens);
    if max_tokens == Some(0) {
        return refuse("max_tokens", "must be at least 1");
    }
    let logprobs = request.logprobs.unwrap_or(false);
    if request.top_logprobs.is_some_and(|t| t > 0) && !logprobs {
        return refuse("top_logprobs", "needs logprobs: true");
    }
    let wanted = logprobs.then_some(request.top_logprobs.unwrap_or(0));
    submit::check(&server, common, max_tokens, wanted, common.prompt_logprobs)?;
    let prompt = prompt(
        &server,
        request.messages.clone(),
        request.add_generation_prompt.unwrap_or(true),
        request.chat_template_kwargs.clone().unwrap_or_default(),
        move |server, text| submit::check_text(server, text, max_tokens),
    )
    .await?;
    let order = Order {
        prompts: vec![prompt],
        max_tokens,
        logprobs: wanted,
        prompt_logprobs: common.prompt_logprobs,
        offsets: vec![],
    };
    let choices = submit::submit(&server, common, &order)?;
    let reply = Reply {
        id: fresh_id("chatcmpl"),
        created: now(),
        choices: choices.len(),
        logprobs,
        prompt_logprobs: common.prompt_logprobs.is_some(),
        server,
    };
    if stream {
        let usage = common.stream_options.as_ref().and_then(|o| o.include_usage).unwrap_or(false);
        return sse::respond(choices, Stream { reply, count: Count::default(), usage }).await;
    }
    reply.whole(outputs(choices)).await
}

/// The conversation's token ids, by the checkpoint's template, once `check` has seen its text.
pub async fn prompt(
    server: &Shared,
    messages: Vec<Message>,
    add_generation_prompt: bool,
    extra: BTreeMap<String, Value>,
    check: impl FnOnce(&Server, &str) -> Result<(), ApiError> + Send + 'static,
) -> Result<Vec<u32>, ApiError> {
    if server.template.is_none() {
        let what = "this checkpoint has no chat template (chat_template in tokenizer_config.json, or \
                    chat_template.jinja): use /v1/completions";
        return Err(ApiError::field("messages", what).code("no_chat_template"));
    }
    let most = server.limits.messages;
    if messages.is_empty() || messages.len() > most {
        let what = format!("messages: {}; at least 1 and at most {most}", messages.len());
        return Err(ApiError::field("messages", what));
    }
    let messages = messages.into_iter().map(plain).collect::<Result<Vec<_>, _>>()?;
    let server: Arc<Server> = Arc::clone(server);
    beside(move || {
        let Some(template) = &server.template else { return Ok(vec![]) };
        let bounds = Bounds { work: server.limits.template_work, bytes: server.limits.template_bytes };
        let about = |e| ApiError::from(e).about("messages");
        let text = template.render(&messages, add_generation_prompt, &extra, bounds).map_err(about)?;
        check(&server, &text)?;
        server.tokenizer.encode_plain(&text).map_err(about)
    })
    .await
}

/// A message's text: its parts one after the other.
fn plain(message: Message) -> Result<template::Message, ApiError> {
    let content = match message.content {
        None => String::new(),
        Some(Content::Text(text)) => text,
        Some(Content::Parts(parts)) => {
            let text = parts.into_iter().map(|part| match (part.kind.as_str(), part.text) {
                ("text", Some(text)) => Ok(text),
                (kind, _) => {
                    let what = format!("messages: a part of type {kind:?} is not supported: send text");
                    Err(ApiError::field("messages", what))
                }
            });
            text.collect::<Result<Vec<_>, _>>()?.join("\n")
        }
    };
    Ok(template::Message { role: message.role, content, name: message.name })
}

/// What is the same in every part of a response.
struct Reply {
    server: Shared,
    id: String,
    created: u64,
    choices: usize,
    logprobs: bool,
    prompt_logprobs: bool,
}

impl Reply {
    /// One JSON object once everything is there.
    async fn whole(self, mut outputs: Outputs) -> Result<Response, ApiError> {
        type Sofar = (Option<Vec<Option<Logprob>>>, Piece, Option<End>);
        let mut sofar: Vec<Sofar> = (0..self.choices).map(|_| Default::default()).collect();
        let mut count = Count::default();
        while let Some((index, out)) = outputs.next().await {
            let choice = &mut sofar[index];
            match out? {
                Out::Prompt(all) => choice.0 = Some(all),
                Out::Piece(piece) => choice.1.append(piece),
                Out::End(piece, end) => {
                    choice.1.append(piece);
                    choice.2 = Some(end);
                    count.add(0, &end);
                }
            }
        }
        let choices = sofar.into_iter().enumerate().map(|(index, (prompt, piece, end))| ChatChoice {
            index,
            logprobs: self.logprobs(&piece, true),
            message: Answer { role: "assistant", content: piece.text, refusal: None },
            finish_reason: end.map(|e| e.reason),
            prompt_logprobs: self.prompt_logprobs.then(|| by_id(&self.server.tokenizer, &prompt.unwrap_or_default())),
        });
        let body = ChatCompletion {
            choices: choices.collect(),
            id: self.id,
            object: "chat.completion",
            created: self.created,
            model: self.server.name.clone(),
            usage: count.usage(),
        };
        Ok(axum::Json(body).into_response())
    }

    fn logprobs(&self, piece: &Piece, whole: bool) -> Option<ChatLogprobs> {
        let tokenizer = &self.server.tokenizer;
        let top = |(id, p): &(u32, f32)| TopLogprob {
            token: token_text(tokenizer, *id),
            logprob: finite(*p),
            bytes: tokenizer.token_bytes(*id),
        };
        let content = piece.tokens.iter().map(|(l, _)| ChatLogprob {
            token: token_text(tokenizer, l.id),
            logprob: finite(l.logprob),
            bytes: tokenizer.token_bytes(l.id),
            top_logprobs: l.top.iter().map(top).collect(),
        });
        (self.logprobs && (whole || !piece.tokens.is_empty())).then(|| ChatLogprobs { content: content.collect() })
    }

    fn chunk(&self, choices: Vec<ChunkChoice>, usage: Option<Usage>) -> ChatChunk {
        ChatChunk {
            id: self.id.clone(),
            object: "chat.completion.chunk",
            created: self.created,
            model: self.server.name.clone(),
            choices,
            usage,
        }
    }
}

/// A response in parts.
struct Stream {
    reply: Reply,
    count: Count,
    usage: bool,
}

impl Chunks for Stream {
    fn begin(&mut self, events: &mut Events) {
        for index in 0..self.reply.choices {
            let delta = Delta { role: Some("assistant"), content: Some(String::new()) };
            events
                .push(&self.reply.chunk(vec![ChunkChoice { index, delta, logprobs: None, finish_reason: None }], None));
        }
    }

    fn chunk(&mut self, index: usize, out: Out, events: &mut Events) {
        let (piece, end) = match out {
            Out::Prompt(_) => return,
            Out::Piece(piece) => (piece, None),
            Out::End(piece, end) => {
                self.count.add(0, &end);
                (piece, Some(end))
            }
        };
        let choice = ChunkChoice {
            index,
            logprobs: self.reply.logprobs(&piece, false),
            delta: Delta { role: None, content: Some(piece.text).filter(|t| !t.is_empty()) },
            finish_reason: end.map(|e| e.reason),
        };
        events.push(&self.reply.chunk(vec![choice], None));
    }

    fn end(&mut self, events: &mut Events) {
        if self.usage {
            events.push(&self.reply.chunk(vec![], Some(self.count.usage())));
        }
    }
}
