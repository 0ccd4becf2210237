//! `POST /v1/completions`.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt;
use serde_json::{Value, json};

use super::api::{Completion, CompletionChoice, CompletionLogprobs, CompletionRequest, Prompt};
use super::choice::{Count, End, Out, Outputs, outputs};
use super::extract::Json;
use super::sse::{self, Chunks, Events};
use super::submit::{self, Order};
use super::writer::Piece;
use super::{ApiError, Server, Shared, fresh_id, now};
use crate::engine::Logprob;
use crate::text::Tokenizer;

/// Continue prompts.
///
/// With `stream` the answer is server-sent events: chunks of the same form, then `[DONE]`.
#[utoipa::path(post, path = "/v1/completions", request_body = CompletionRequest, tag = "OpenAI",
    responses((status = 200, description = "The choices, or their chunks", content(
        (Completion = "application/json"), (String = "text/event-stream"))), super::openapi::Always,
        super::openapi::BadBody, super::openapi::Refused))]
pub async fn create(
    State(server): State<Shared>,
    Json(request): Json<CompletionRequest>,
) -> Result<Response, ApiError> {
    submit::early(&server)?;
    let common = &request.common;
    submit::check_model(&server, common.model.as_deref())?;
    let refuse = |field: &'static str, what: &str| Err(ApiError::field(field, format!("{field}: {what}")));
    if request.suffix.as_deref().is_some_and(|s| !s.is_empty()) {
        return refuse("suffix", "is not supported: leave it out");
    }
    if request.best_of.is_some_and(|best| best != common.n.unwrap_or(1)) {
        return refuse("best_of", "must be n: choices are not ranked");
    }
    let (stream, echo) = (common.stream.unwrap_or(false), request.echo.unwrap_or(false));
    if stream && (common.prompt_logprobs.is_some() || (echo && request.logprobs.is_some())) {
        return refuse("stream", "cannot be used with log-probabilities of the prompt");
    }
    // An echoed prompt's log-probabilities come with the text's.
    let wants = if echo { request.logprobs } else { None };
    let max_tokens = Some(request.max_tokens.unwrap_or(16));
    let prompt_logprobs = common.prompt_logprobs.max(wants);
    submit::check(&server, common, max_tokens, request.logprobs, prompt_logprobs)?;
    let prompts = prompts(&server, &request, max_tokens).await?;
    let echoed: Vec<String> = if echo { prompts.iter().map(|p| text(&server, p)).collect() } else { vec![] };
    let order = Order {
        max_tokens,
        logprobs: request.logprobs,
        prompt_logprobs,
        offsets: echoed.iter().map(|e| e.chars().count()).collect(),
        prompts,
    };
    let choices = submit::submit(&server, common, &order)?;
    let reply = Reply {
        id: fresh_id("cmpl"),
        created: now(),
        of_choice: choices.iter().map(|c| c.prompt).collect(),
        prompts: order.prompts,
        echoed,
        echo_logprobs: wants.is_some(),
        prompt_logprobs: common.prompt_logprobs,
        logprobs: request.logprobs.is_some(),
        server,
    };
    if stream {
        let usage = common.stream_options.as_ref().and_then(|o| o.include_usage).unwrap_or(false);
        let begun = vec![false; reply.of_choice.len()];
        return sse::respond(choices, Stream { reply, begun, count: Count::default(), usage }).await;
    }
    reply.whole(outputs(choices)).await
}

/// The prompts' token ids. Long texts are tokenised beside the server's threads.
async fn prompts(
    server: &Shared,
    request: &CompletionRequest,
    max_tokens: Option<usize>,
) -> Result<Vec<Vec<u32>>, ApiError> {
    if let Prompt::Texts(texts) = &request.prompt {
        submit::check_prompts(server, texts.len())?;
    }
    let (server, special) = (Arc::clone(server), request.add_special_tokens.unwrap_or(true));
    let encode = move |text: &str| -> Result<Vec<u32>, ApiError> {
        submit::check_text(&server, text, max_tokens)?;
        let ids = if special { server.tokenizer.encode(text) } else { server.tokenizer.encode_plain(text) };
        ids.map_err(|e| ApiError::from(e).about("prompt"))
    };
    let prompts = match request.prompt.clone() {
        Prompt::Ids(ids) => vec![ids],
        Prompt::IdLists(lists) => lists,
        Prompt::Text(text) if text.len() < 4096 => vec![encode(&text)?],
        Prompt::Text(text) => beside(move || Ok(vec![encode(&text)?])).await?,
        Prompt::Texts(texts) => beside(move || texts.iter().map(|t| encode(t)).collect()).await?,
    };
    if prompts.is_empty() { Err(ApiError::field("prompt", "prompt is empty")) } else { Ok(prompts) }
}

/// Runs `work` on a thread where it may take long.
pub async fn beside<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let lost = |_| ApiError::new(axum::http::StatusCode::INTERNAL_SERVER_ERROR, "internal error: a thread panicked");
    tokio::task::spawn_blocking(work).await.map_err(lost)?
}

fn text(server: &Server, ids: &[u32]) -> String {
    server.tokenizer.decode(ids).unwrap_or_default()
}

/// What is the same in every part of a response.
struct Reply {
    server: Shared,
    id: String,
    created: u64,
    prompts: Vec<Vec<u32>>,
    /// Each prompt's text, when wanted.
    echoed: Vec<String>,
    /// Which prompt a choice continues.
    of_choice: Vec<usize>,
    logprobs: bool,
    echo_logprobs: bool,
    prompt_logprobs: Option<usize>,
}

/// A choice so far.
#[derive(Default)]
struct Sofar {
    prompt: Option<Vec<Option<Logprob>>>,
    piece: Piece,
    end: Option<End>,
}

impl Reply {
    /// One JSON object once everything is there.
    async fn whole(self, mut outputs: Outputs) -> Result<Response, ApiError> {
        let mut sofar: Vec<Sofar> = self.of_choice.iter().map(|_| Sofar::default()).collect();
        while let Some((index, out)) = outputs.next().await {
            let choice = &mut sofar[index];
            match out? {
                Out::Prompt(all) => choice.prompt = Some(all),
                Out::Piece(piece) => choice.piece.append(piece),
                Out::End(piece, end) => {
                    choice.piece.append(piece);
                    choice.end = Some(end);
                }
            }
        }
        let mut count = Count::default();
        let choices = sofar.into_iter().enumerate().map(|(index, choice)| {
            if let Some(end) = &choice.end {
                count.add(self.of_choice[index], end);
            }
            self.choice(index, choice)
        });
        let choices = choices.collect();
        let body = self.completion(choices, Some(count.usage()));
        Ok(axum::Json(body).into_response())
    }

    fn completion(&self, choices: Vec<CompletionChoice>, usage: Option<super::api::Usage>) -> Completion {
        Completion {
            id: self.id.clone(),
            object: "text_completion",
            created: self.created,
            model: self.server.name.clone(),
            choices,
            usage,
        }
    }

    fn choice(&self, index: usize, choice: Sofar) -> CompletionChoice {
        let prompt = self.of_choice[index];
        let tokenizer = &self.server.tokenizer;
        let (mut text, mut logprobs) = (String::new(), CompletionLogprobs::default());
        if let Some(echo) = self.echoed.get(prompt) {
            text.push_str(echo);
            if self.echo_logprobs {
                let all = choice.prompt.as_deref().unwrap_or(&[]);
                prompt_entries(tokenizer, &self.prompts[prompt], all, &mut logprobs);
            }
        }
        text.push_str(&choice.piece.text);
        for (logprob, offset) in &choice.piece.tokens {
            entry(tokenizer, logprob.id, Some(logprob), *offset, &mut logprobs);
        }
        let whole = choice.end.is_some() || !logprobs.tokens.is_empty();
        CompletionChoice {
            index,
            text,
            logprobs: (self.logprobs && whole).then_some(logprobs),
            finish_reason: choice.end.map(|e| e.reason),
            prompt_logprobs: self.prompt_logprobs.map(|_| by_id(tokenizer, choice.prompt.as_deref().unwrap_or(&[]))),
        }
    }
}

/// A response in parts.
struct Stream {
    reply: Reply,
    /// Choices that have sent something: the first part has the echoed prompt.
    begun: Vec<bool>,
    count: Count,
    usage: bool,
}

impl Chunks for Stream {
    fn chunk(&mut self, index: usize, out: Out, events: &mut Events) {
        let mut choice = Sofar::default();
        match out {
            Out::Prompt(_) => return,
            Out::Piece(piece) => choice.piece = piece,
            Out::End(piece, end) => {
                self.count.add(self.reply.of_choice[index], &end);
                (choice.piece, choice.end) = (piece, Some(end));
            }
        }
        let mut part = self.reply.choice(index, choice);
        if std::mem::replace(&mut self.begun[index], true) {
            part.text.drain(..self.reply.echoed.get(self.reply.of_choice[index]).map_or(0, String::len));
        }
        events.push(&self.reply.completion(vec![part], None));
    }

    fn end(&mut self, events: &mut Events) {
        if self.usage {
            events.push(&self.reply.completion(vec![], Some(self.count.usage())));
        }
    }
}

/// The echoed prompt's tokens.
fn prompt_entries(tokenizer: &Tokenizer, ids: &[u32], all: &[Option<Logprob>], out: &mut CompletionLogprobs) {
    let mut offset = 0;
    let mut detokenizer = tokenizer.detokenizer();
    for (i, id) in ids.iter().enumerate() {
        entry(tokenizer, *id, all.get(i).and_then(Option::as_ref), offset, out);
        offset += detokenizer.push(*id).map_or(0, |t| t.chars().count());
    }
}

fn entry(tokenizer: &Tokenizer, id: u32, logprob: Option<&Logprob>, offset: usize, out: &mut CompletionLogprobs) {
    out.tokens.push(token_text(tokenizer, id));
    out.token_logprobs.push(logprob.map(|l| finite(l.logprob)));
    out.text_offset.push(offset);
    out.top_logprobs.push(logprob.map(|l| {
        // As OpenAI does, the token itself is there even when it is not among the best.
        let own = (l.id, l.logprob);
        l.top.iter().chain([&own]).map(|(id, p)| (token_text(tokenizer, *id), finite(*p))).collect()
    }));
}

/// A token's text; bytes that are no text as OpenAI writes them.
pub fn token_text(tokenizer: &Tokenizer, id: u32) -> String {
    match String::from_utf8(tokenizer.token_bytes(id)) {
        Ok(text) => text,
        Err(e) => e.into_bytes().iter().fold("bytes:".into(), |s, b| s + &format!("\\x{b:02x}")),
    }
}

/// JSON has no infinity: what is as good as impossible is the least number that OpenAI writes.
pub fn finite(p: f32) -> f32 {
    if p.is_finite() { p } else { -9999.0 }
}

/// vLLM's form of a prompt's log-probabilities: an object by token id for every token but the first.
pub fn by_id(tokenizer: &Tokenizer, all: &[Option<Logprob>]) -> Value {
    let one = |l: &Logprob| {
        let about = |id: u32, p: f32, rank: usize| {
            (id.to_string(), json!({"logprob": finite(p), "rank": rank, "decoded_token": token_text(tokenizer, id)}))
        };
        let mut map: BTreeMap<String, Value> =
            l.top.iter().enumerate().map(|(i, (id, p))| about(*id, *p, i + 1)).collect();
        map.extend([about(l.id, l.logprob, l.rank + 1)]);
        json!(map)
    };
    all.iter().map(|l| l.as_ref().map_or(Value::Null, one)).collect()
}
