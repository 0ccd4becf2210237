//! What is asked of the engine, and what comes back.

use std::time::Duration;

use crate::error::{Error, Result};

/// A prompt and how to continue it.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Token ids, at least one.
    pub prompt: Vec<u32>,
    /// Tokens to generate at most; 0 only scores the prompt.
    pub max_tokens: usize,
    /// Tokens before which no end-of-sequence or stop token is sampled.
    pub min_tokens: usize,
    /// How the next token is drawn.
    pub sampling: Sampling,
    /// Tokens that end the generation beside the model's own.
    pub stop_tokens: Vec<u32>,
    /// Go on past the model's end-of-sequence tokens.
    pub ignore_eos: bool,
    /// Report each token's log-probability and this many of the best.
    pub logprobs: Option<usize>,
    /// The same for the prompt's tokens.
    pub prompt_logprobs: Option<usize>,
}

/// How the next token is drawn from the logits.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// 0 takes the largest logit.
    pub temperature: f32,
    /// Keep this many of the best; 0 keeps all.
    pub top_k: usize,
    /// Keep the best whose probabilities first sum to this.
    pub top_p: f32,
    /// Keep those at least this fraction as probable as the best.
    pub min_p: f32,
    /// Divides (or multiplies, when negative) the logits of tokens seen in prompt or text; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted from the logits of tokens in the text so far.
    pub presence_penalty: f32,
    /// Subtracted from the logits of tokens in the text so far, times their count.
    pub frequency_penalty: f32,
    /// Added to single logits.
    pub logit_bias: Vec<(u32, f32)>,
    /// The same seed and request give the same tokens. Without one the engine draws a seed.
    pub seed: Option<u64>,
}

impl Sampling {
    /// Whether some tokens are left out for being improbable.
    pub fn truncates(&self) -> bool {
        self.top_k > 0 || self.top_p < 1.0 || self.min_p > 0.0
    }
}

impl Default for Sampling {
    fn default() -> Sampling {
        Sampling {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: vec![],
            seed: None,
        }
    }
}

impl Default for Request {
    fn default() -> Request {
        Request {
            prompt: vec![],
            max_tokens: 16,
            min_tokens: 0,
            sampling: Sampling::default(),
            stop_tokens: vec![],
            ignore_eos: false,
            logprobs: None,
            prompt_logprobs: None,
        }
    }
}

/// What a stream yields: tokens, then exactly one `Finished` or `Failed`, then nothing.
#[derive(Debug, Clone)]
pub enum Event {
    /// The prompt's log-probabilities, when asked for: one entry a prompt token, the first `None`.
    Prompt(Vec<Option<Logprob>>),
    /// The next token.
    Token(Token),
    /// The end.
    Finished(Finished),
    /// The engine failed; the text so far stands.
    Failed(Error),
}

/// A generated token.
#[derive(Debug, Clone, PartialEq)]
pub struct Token {
    /// Its id.
    pub id: u32,
    /// Its log-probability, when asked for.
    pub logprob: Option<Logprob>,
}

/// A token's log-probability under the model (before temperature and truncation), and the best alternatives'.
#[derive(Debug, Clone, PartialEq)]
pub struct Logprob {
    /// The token.
    pub id: u32,
    /// Its natural log-probability.
    pub logprob: f32,
    /// Its rank among all tokens, 0 the most probable.
    pub rank: usize,
    /// The most probable tokens, best first.
    pub top: Vec<(u32, f32)>,
}

/// How a generation ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Finished {
    /// Why.
    pub reason: Reason,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Of those, found in the cache.
    pub cached_tokens: usize,
    /// Tokens generated.
    pub tokens: usize,
    /// From submission to the first step.
    pub queued: Duration,
    /// From submission to the first token.
    pub ttft: Duration,
    /// From submission to the end.
    pub total: Duration,
}

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// A stop token or the model's end of sequence.
    Stop,
    /// `max_tokens`, or the context is full.
    Length,
}

impl Request {
    /// Refuses what cannot be served by a model of `vocab` tokens with room for `max_context`, naming field and bound.
    pub fn validate(&self, vocab: usize, max_context: usize) -> Result<()> {
        let refuse = |what: String| Err(Error::Request(what));
        let s = &self.sampling;
        if self.prompt.is_empty() {
            return refuse("prompt is empty: give at least one token".into());
        }
        if let Some(t) = self.prompt.iter().find(|t| **t as usize >= vocab) {
            return refuse(format!("prompt: token {t} is not in the vocabulary of {vocab}"));
        }
        if self.prompt.len() > max_context {
            return refuse(format!(
                "prompt has {} tokens; at most {max_context} fit in the context",
                self.prompt.len()
            ));
        }
        if self.prompt.len().saturating_add(self.max_tokens) > max_context {
            return refuse(format!(
                "prompt of {} tokens and max_tokens {} exceed the context of {max_context} tokens",
                self.prompt.len(),
                self.max_tokens
            ));
        }
        let within = |name: &str, value: f32, low: f32, high: f32| {
            if value.is_finite() && (low..=high).contains(&value) {
                Ok(())
            } else {
                Err(Error::Request(format!("{name} is {value}: must be between {low} and {high}")))
            }
        };
        within("temperature", s.temperature, 0.0, 100.0)?;
        within("top_p", s.top_p, f32::MIN_POSITIVE, 1.0)?;
        within("min_p", s.min_p, 0.0, 1.0)?;
        within("repetition_penalty", s.repetition_penalty, 0.01, 100.0)?;
        within("presence_penalty", s.presence_penalty, -100.0, 100.0)?;
        within("frequency_penalty", s.frequency_penalty, -100.0, 100.0)?;
        for (id, bias) in &s.logit_bias {
            if *id as usize >= vocab {
                return refuse(format!("logit_bias: token {id} is not in the vocabulary of {vocab}"));
            }
            within("logit_bias", *bias, -100.0, 100.0)?;
        }
        for id in &self.stop_tokens {
            if *id as usize >= vocab {
                return refuse(format!("stop token {id} is not in the vocabulary of {vocab}"));
            }
        }
        Ok(())
    }

    /// Whether seed and temperature alone decide, so that the device can choose and no logits need to travel.
    pub fn device_chooses(&self) -> bool {
        let s = &self.sampling;
        (s.temperature == 0.0 || !s.truncates())
            && s.repetition_penalty == 1.0
            && s.presence_penalty == 0.0
            && s.frequency_penalty == 0.0
            && s.logit_bias.is_empty()
            && self.logprobs.is_none()
            && self.prompt_logprobs.is_none()
            && self.min_tokens == 0
    }
}
