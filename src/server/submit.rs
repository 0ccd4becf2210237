//! From a request's fields to the engine's requests: every bound is checked here or by the engine, by field.

use std::sync::Arc;

use super::api::Common;
use super::choice::Choice;
use super::writer::Writer;
use super::{ApiError, Server};
use crate::engine::{Refused, Request, Sampling};
use crate::error::Error;

/// Prompts and how to continue each.
pub struct Order {
    /// Token ids of each prompt.
    pub prompts: Vec<Vec<u32>>,
    /// Tokens to generate at most; `None` takes what the context leaves.
    pub max_tokens: Option<usize>,
    /// Alternatives of each token.
    pub logprobs: Option<usize>,
    /// Alternatives of each prompt token.
    pub prompt_logprobs: Option<usize>,
    /// Characters that stand before each prompt's text.
    pub offsets: Vec<usize>,
}

/// Refuses when there is no room, before any work is done.
pub fn early(server: &Server) -> Result<(), ApiError> {
    if let Some(why) = server.engine.stopped() {
        return Err(Refused::Stopped(why).into());
    }
    if server.engine.draining() {
        return Err(Refused::Draining.into());
    }
    if server.engine.has_room() { Ok(()) } else { Err(Refused::Full.into()) }
}

/// Whether the model asked for is the one that is here.
pub fn check_model(server: &Server, model: Option<&str>) -> Result<(), ApiError> {
    match model {
        Some(name) if name != server.name => {
            let what = format!("the model {name:?} does not exist: this server has {:?}", server.name);
            Err(ApiError::new(axum::http::StatusCode::NOT_FOUND, what).about("model").code("model_not_found"))
        }
        _ => Ok(()),
    }
}

fn at_most(param: &'static str, have: usize, most: usize) -> Result<(), ApiError> {
    if have <= most { Ok(()) } else { Err(ApiError::field(param, format!("{param}: {have}; at most {most}"))) }
}

/// Refuses by every field but the prompt, so that no text is tokenised in vain.
pub fn check(
    server: &Server,
    common: &Common,
    max_tokens: Option<usize>,
    logprobs: Option<usize>,
    prompt_logprobs: Option<usize>,
) -> Result<(), ApiError> {
    let limits = &server.limits;
    let n = common.n.unwrap_or(1);
    if n == 0 {
        return Err(ApiError::field("n", "n: 0; at least 1"));
    }
    at_most("n", n, limits.n)?;
    at_most("logprobs", logprobs.unwrap_or(0), limits.logprobs)?;
    at_most("prompt_logprobs", prompt_logprobs.unwrap_or(0), limits.logprobs)?;
    at_most("max_tokens", max_tokens.unwrap_or(0), limits.max_tokens)?;
    let stops = common.stop.as_ref().map_or(&[][..], |s| s.list());
    let stop_tokens = common.stop_token_ids.as_deref().unwrap_or(&[]);
    at_most("stop", stops.len(), limits.stops)?;
    at_most("stop_token_ids", stop_tokens.len(), limits.stops)?;
    for stop in stops {
        if stop.is_empty() {
            return Err(ApiError::field("stop", "stop: an empty text would end everything at once"));
        }
        at_most("stop", stop.len(), limits.stop_bytes)?;
    }
    at_most("logit_bias", common.logit_bias.as_ref().map_or(0, |b| b.len()), limits.logit_bias)?;
    // What the engine will refuse whatever the prompt is.
    let any = Request {
        prompt: vec![0],
        max_tokens: 0,
        sampling: sampling(common)?,
        stop_tokens: stop_tokens.to_vec(),
        ..Request::default()
    };
    let info = server.engine.info();
    Ok(any.validate(info.model.vocab, info.max_context)?)
}

/// Refuses too many prompts.
pub fn check_prompts(server: &Server, count: usize) -> Result<(), ApiError> {
    at_most("prompt", count, server.limits.prompts)
}

/// Refuses a text that surely has too many tokens, before it is tokenised.
pub fn check_text(server: &Server, text: &str, max_tokens: Option<usize>) -> Result<(), ApiError> {
    let (limit, context) = (server.limits.prompt_tokens, server.engine.info().max_context);
    let generated = max_tokens.unwrap_or(0);
    let most = limit.min(context.saturating_sub(generated));
    if text.len() <= most {
        return Ok(());
    }
    let least = server.tokenizer.at_least(text, most.saturating_add(1));
    if least <= most {
        return Ok(());
    }
    if least > limit {
        return Err(ApiError::field("prompt", format!("prompt: at least {least}; at most {limit}")));
    }
    let what = if generated == 0 {
        format!("prompt has at least {least} tokens; at most {context} fit in the context")
    } else {
        format!("prompt of at least {least} tokens and max_tokens {generated} exceed the context of {context} tokens")
    };
    Err(ApiError::from(Error::Request(what)))
}

/// Submits every choice of every prompt, or none. What can be is [`check`]ed already.
pub fn submit(server: &Server, common: &Common, order: &Order) -> Result<Vec<Choice>, ApiError> {
    let limits = &server.limits;
    let n = common.n.unwrap_or(1);
    check_prompts(server, order.prompts.len())?;
    // More than the whole queue would be refused for want of room for ever.
    at_most("n", n * order.prompts.len(), server.engine.capacity())?;
    let stops = common.stop.as_ref().map_or(&[][..], |s| s.list());
    let stop_tokens = common.stop_token_ids.as_deref().unwrap_or(&[]);
    let sampling = sampling(common)?;

    let mut choices = Vec::with_capacity(n * order.prompts.len());
    for (p, prompt) in order.prompts.iter().enumerate() {
        at_most("prompt", prompt.len(), limits.prompt_tokens)?;
        let room = server.engine.info().max_context.saturating_sub(prompt.len());
        for i in 0..n {
            let mut sampling = sampling.clone();
            // Choices of one seed must differ, and the first is the one that n = 1 gives.
            sampling.seed = sampling.seed.map(|s| s.wrapping_add((i as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15)));
            let request = Request {
                prompt: prompt.clone(),
                max_tokens: order.max_tokens.unwrap_or(room.max(1)).min(limits.max_tokens),
                min_tokens: common.min_tokens.unwrap_or(0),
                sampling,
                stop_tokens: stop_tokens.to_vec(),
                ignore_eos: common.ignore_eos.unwrap_or(false),
                logprobs: order.logprobs,
                prompt_logprobs: order.prompt_logprobs,
            };
            // Leaving early drops the choices submitted already, which cancels them.
            let stream = server.engine.try_submit(request)?;
            let offset = order.offsets.get(p).copied().unwrap_or(0);
            let writer = Writer::new(Arc::clone(&server.tokenizer), stops.to_vec(), offset);
            choices.push(Choice::new(p * n + i, p, stream, writer, Arc::clone(&server.metrics)));
        }
    }
    Ok(choices)
}

fn sampling(common: &Common) -> Result<Sampling, ApiError> {
    let top_k = match common.top_k.unwrap_or(0) {
        -1 => 0,
        k if k < 0 => return Err(ApiError::field("top_k", format!("top_k: {k}; at least -1"))),
        k => usize::try_from(k).unwrap_or(usize::MAX),
    };
    let mut logit_bias = vec![];
    for (id, bias) in common.logit_bias.iter().flatten() {
        let id = id.parse().map_err(|_| ApiError::field("logit_bias", format!("logit_bias: {id:?} is no token id")))?;
        logit_bias.push((id, *bias));
    }
    Ok(Sampling {
        temperature: common.temperature.unwrap_or(1.0),
        top_k,
        top_p: common.top_p.unwrap_or(1.0),
        min_p: common.min_p.unwrap_or(0.0),
        repetition_penalty: common.repetition_penalty.unwrap_or(1.0),
        presence_penalty: common.presence_penalty.unwrap_or(0.0),
        frequency_penalty: common.frequency_penalty.unwrap_or(0.0),
        logit_bias,
        seed: common.seed.map(|s| s as u64),
    })
}
