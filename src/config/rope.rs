//! The rotary embedding's fields, in both spellings: `rope_theta` with `rope_scaling`, or `rope_parameters`.

use super::fields::Fields;
use super::{Rope, RopeScaling};
use crate::error::Result;

/// transformers' default base.
const THETA: f64 = 10_000.0;

/// `interleave` is the architecture's default.
pub(super) fn parse(fields: &Fields<'_>, interleave: bool, max_position: usize) -> Result<Rope> {
    let parameters = fields.object("rope_parameters", "rope_parameters.")?;
    let scaling = fields.object("rope_scaling", "rope_scaling.")?;
    let top_theta = fields.positive("rope_theta")?;
    let top_original = fields.positive("original_max_position_embeddings")?;
    let mut rope = Rope {
        theta: top_theta.unwrap_or(THETA),
        interleave: fields.flag("rope_interleave")?.unwrap_or(interleave),
        scaling: RopeScaling::Default,
    };
    let mut first: Option<Rope> = None;
    for part in [parameters, scaling].into_iter().flatten() {
        let theta = part.positive("rope_theta")?;
        if let (Some(inner), Some(outer)) = (theta, top_theta)
            && inner != outer
        {
            return Err(part.error("rope_theta", format!("is {inner}, but rope_theta beside it is {outer}")));
        }
        rope.theta = theta.unwrap_or(rope.theta);
        rope.scaling = one_scaling(&part, top_original.unwrap_or(max_position as f64))?;
        if let Some(first) = first.as_ref().filter(|first| **first != rope) {
            let what = format!("says {rope:?}, but rope_parameters says {first:?}; remove one of the two");
            return Err(fields.error("rope_scaling", what));
        }
        first = Some(rope.clone());
    }
    Ok(rope)
}

/// One object of rope fields; `original` stands in for `original_max_position_embeddings`.
fn one_scaling(fields: &Fields<'_>, original: f64) -> Result<RopeScaling> {
    let (new, old) = (fields.text("rope_type")?, fields.text("type")?);
    if let (Some(new), Some(old)) = (new, old)
        && new != old
    {
        return Err(fields.error("rope_type", format!("is {new:?}, but type is {old:?}")));
    }
    if let Some(part) = fields.number("partial_rotary_factor")?.filter(|&part| part != 1.0) {
        return Err(fields.error("partial_rotary_factor", format!("is {part}: only 1 is computed here")));
    }
    let scaling = match new.or(old).unwrap_or("default") {
        "default" => {
            // Written beside the type by some tools, and without meaning for it.
            fields.get("original_max_position_embeddings");
            if let Some(factor) = fields.number("factor")?.filter(|&factor| factor != 1.0) {
                return Err(fields.error("factor", format!("is {factor}, but rope_type is \"default\"")));
            }
            RopeScaling::Default
        }
        "llama3" => llama3(fields)?,
        "yarn" => yarn(fields, original)?,
        other => {
            let what = format!("{other:?} is not computed here: only default, llama3 and yarn are");
            return Err(fields.error(if new.is_some() { "rope_type" } else { "type" }, what));
        }
    };
    match fields.unread().into_iter().find(|(_, value)| !value.is_null()) {
        Some((name, value)) => Err(fields.error(
            name,
            format!("is {}: unknown for this rope_type, and it may change the rotation", super::fields::shown(value)),
        )),
        None => Ok(scaling),
    }
}

fn needed(fields: &Fields<'_>, name: &str) -> Result<f64> {
    fields.positive(name)?.ok_or_else(|| fields.error(name, "is missing"))
}

fn factor(fields: &Fields<'_>) -> Result<f64> {
    match needed(fields, "factor")? {
        factor if factor < 1.0 => Err(fields.error("factor", format!("is {factor}, should be 1 or more"))),
        factor => Ok(factor),
    }
}

fn llama3(fields: &Fields<'_>) -> Result<RopeScaling> {
    let (low, high) = (needed(fields, "low_freq_factor")?, needed(fields, "high_freq_factor")?);
    if high <= low {
        return Err(fields.error("high_freq_factor", format!("is {high}, should be above low_freq_factor, {low}")));
    }
    let original = needed(fields, "original_max_position_embeddings")?;
    Ok(RopeScaling::Llama3 { factor: factor(fields)?, low, high, original })
}

fn yarn(fields: &Fields<'_>, original: f64) -> Result<RopeScaling> {
    let beta_fast = fields.positive("beta_fast")?.unwrap_or(32.0);
    let beta_slow = fields.positive("beta_slow")?.unwrap_or(1.0);
    if beta_fast < beta_slow {
        return Err(fields.error("beta_fast", format!("is {beta_fast}, should not be below beta_slow, {beta_slow}")));
    }
    let not_negative = |name: &str| match fields.number(name)?.unwrap_or(0.0) {
        v if v < 0.0 => Err(fields.error(name, format!("is {v}, should not be negative"))),
        v => Ok(v),
    };
    Ok(RopeScaling::Yarn {
        factor: factor(fields)?,
        original: fields.positive("original_max_position_embeddings")?.unwrap_or(original),
        beta_fast,
        beta_slow,
        mscale: not_negative("mscale")?,
        mscale_all_dim: not_negative("mscale_all_dim")?,
        attention_factor: fields.positive("attention_factor")?,
        truncate: fields.flag("truncate")?.unwrap_or(true),
    })
}
