//! One choice of a response while it is generated, and all of them side by side.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::stream::{self, SelectAll, Stream, StreamExt};

use super::ApiError;
use super::api::Usage;
use super::metrics::Metrics;
use super::writer::{Piece, Writer};
use crate::engine::{Event, Finished, Logprob, Reason, TokenStream};
use crate::error::Error;

/// What a choice yields: its prompt's log-probabilities when asked for, pieces, one end.
#[derive(Debug)]
pub enum Out {
    /// One entry a prompt token.
    Prompt(Vec<Option<Logprob>>),
    /// More text.
    Piece(Piece),
    /// The last text, and why it is the last.
    End(Piece, End),
}

/// How a choice ended.
#[derive(Debug, Clone, Copy)]
pub struct End {
    /// OpenAI's word for why.
    pub reason: &'static str,
    /// Tokens of its prompt.
    pub prompt_tokens: usize,
    /// Of those, found in the cache.
    pub cached_tokens: usize,
    /// Tokens generated.
    pub tokens: usize,
}

/// A choice being generated.
pub struct Choice {
    index: usize,
    /// Which of the request's prompts it continues.
    pub prompt: usize,
    stream: TokenStream,
    writer: Writer,
    metrics: Arc<Metrics>,
    submitted: Instant,
    first: Option<Instant>,
    last: Option<Instant>,
    tokens: usize,
}

impl Choice {
    /// A choice that has been submitted.
    pub fn new(index: usize, prompt: usize, stream: TokenStream, writer: Writer, metrics: Arc<Metrics>) -> Choice {
        Choice { index, prompt, stream, writer, metrics, submitted: Instant::now(), first: None, last: None, tokens: 0 }
    }

    /// The next thing worth telling; an end or an error is the last.
    async fn next(&mut self) -> Result<Out, Error> {
        loop {
            match self.stream.next().await {
                Some(Event::Prompt(all)) => return Ok(Out::Prompt(all)),
                Some(Event::Token(token)) => {
                    self.tokens += 1;
                    let now = Instant::now();
                    match self.last.replace(now) {
                        None => {
                            self.first = Some(now);
                            self.metrics.first_token(now - self.submitted);
                        }
                        Some(last) => self.metrics.next_token(now - last),
                    }
                    let (piece, stopped) = self.writer.push(token)?;
                    if stopped {
                        // The stream is dropped after this, which cancels what the engine would go on to generate.
                        let (prompt_tokens, cached_tokens) = self.stream.prompt_tokens();
                        let end = End { reason: "stop", prompt_tokens, cached_tokens, tokens: self.tokens };
                        let begun = self.first.map_or(Duration::ZERO, |first| first - self.submitted);
                        let total = self.submitted.elapsed();
                        self.metrics.finished("stop", self.tokens, self.stream.queued(), begun, total);
                        return Ok(Out::End(piece, end));
                    }
                    if !piece.is_empty() {
                        return Ok(Out::Piece(piece));
                    }
                }
                Some(Event::Finished(finished)) => return self.end(&finished),
                Some(Event::Failed(error)) => {
                    self.metrics.failed();
                    return Err(error);
                }
                None => return Err(Error::Internal("a stream ended without an end".into())),
            }
        }
    }

    fn end(&mut self, finished: &Finished) -> Result<Out, Error> {
        let (piece, stopped) = self.writer.finish()?;
        let reason = match finished.reason {
            _ if stopped => "stop",
            Reason::Stop => "stop",
            Reason::Length => "length",
        };
        self.metrics.finished(reason, finished.tokens, finished.queued, finished.ttft, finished.total);
        let end = End {
            reason,
            prompt_tokens: finished.prompt_tokens,
            cached_tokens: finished.cached_tokens,
            tokens: finished.tokens,
        };
        Ok(Out::End(piece, end))
    }
}

/// All choices' output as it comes, with the choice's number. An error ends everything: dropping the stream cancels the
/// rest.
pub type Outputs = SelectAll<std::pin::Pin<Box<dyn Stream<Item = (usize, Result<Out, ApiError>)> + Send>>>;

/// Reads all choices at once.
pub fn outputs(choices: Vec<Choice>) -> Outputs {
    let one = |choice: Choice| {
        stream::unfold(Some(choice), |choice| async {
            let mut choice = choice?;
            let out = choice.next().await;
            let index = choice.index;
            let goes_on = matches!(out, Ok(Out::Prompt(_) | Out::Piece(_)));
            Some(((index, out.map_err(ApiError::from)), goes_on.then_some(choice)))
        })
        .boxed()
    };
    stream::select_all(choices.into_iter().map(one))
}

/// Adds up a request's usage. Choices of one prompt share its tokens.
#[derive(Debug, Default)]
pub struct Count {
    usage: Usage,
    prompts: std::collections::BTreeSet<usize>,
}

impl Count {
    /// Adds a choice of `prompt`.
    pub fn add(&mut self, prompt: usize, end: &End) {
        if self.prompts.insert(prompt) {
            self.usage.prompt_tokens += end.prompt_tokens;
            self.usage.prompt_tokens_details.cached_tokens += end.cached_tokens;
        }
        self.usage.completion_tokens += end.tokens;
        self.usage.total_tokens = self.usage.prompt_tokens + self.usage.completion_tokens;
    }

    /// The sum.
    pub fn usage(&self) -> Usage {
        self.usage
    }
}
