//! Server-sent events: a response that goes on.

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use futures_util::{FutureExt, StreamExt};
use serde::Serialize;

use super::ApiError;
use super::choice::{Choice, Out, Outputs, outputs};

/// Makes chunks of what choices yield.
pub trait Chunks: Send + 'static {
    /// What is sent before the first token.
    fn begin(&mut self, _events: &mut Events) {}
    /// What is sent for an output of a choice.
    fn chunk(&mut self, index: usize, out: Out, events: &mut Events);
    /// What is sent when all choices have ended.
    fn end(&mut self, _events: &mut Events) {}
}

/// Events on their way to one write.
#[derive(Default)]
pub struct Events {
    bytes: Vec<u8>,
}

impl Events {
    /// Adds an event of JSON.
    pub fn push(&mut self, body: &impl Serialize) {
        self.bytes.extend_from_slice(b"data: ");
        // Our own types always serialise.
        let _ = serde_json::to_writer(&mut self.bytes, body);
        self.bytes.extend_from_slice(b"\n\n");
    }
}

struct State<C> {
    first: Option<(usize, Result<Out, ApiError>)>,
    outputs: Outputs,
    chunks: C,
    begun: bool,
}

/// A response of events. It begins once there is a first output, so that an error before it has a status of its own;
/// a later one is the last event, and `[DONE]` does not follow it.
pub async fn respond(choices: Vec<Choice>, chunks: impl Chunks) -> Result<Response, ApiError> {
    let mut outputs = outputs(choices);
    let first = outputs.next().await;
    if let Some((_, Err(error))) = first {
        return Err(error);
    }
    let state = State { first, outputs, chunks, begun: false };
    let body = futures_util::stream::unfold(Some(state), |state| async {
        let mut state = state?;
        let mut events = Events::default();
        if !std::mem::replace(&mut state.begun, true) {
            state.chunks.begin(&mut events);
        }
        loop {
            let next = match state.first.take() {
                Some(first) => Some(first),
                // What is there already goes in the same write.
                None => match state.outputs.next().now_or_never() {
                    Some(next) => next,
                    None if !events.bytes.is_empty() => return Some((written(events), Some(state))),
                    None => state.outputs.next().await,
                },
            };
            match next {
                Some((index, Ok(out))) => state.chunks.chunk(index, out, &mut events),
                Some((_, Err(error))) => {
                    events.push(&error.body());
                    return Some((written(events), None));
                }
                None => {
                    state.chunks.end(&mut events);
                    events.bytes.extend_from_slice(b"data: [DONE]\n\n");
                    return Some((written(events), None));
                }
            }
        }
    });
    let mut response = Body::from_stream(body).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // nginx would collect the events otherwise.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    Ok(response)
}

fn written(events: Events) -> Result<Bytes, std::convert::Infallible> {
    Ok(Bytes::from(events.bytes))
}
