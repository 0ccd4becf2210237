//! Which layers have experts, and how those are chosen.

use serde_json::Value;

use super::fields::{Fields, shown};
use super::parse::Family;
use super::{Mlp, Moe, Scoring};
use crate::error::Result;

/// Most experts a layer may have.
const MOST_EXPERTS: usize = 1 << 16;

/// Fields of the experts: understood even where no layer has experts.
const FIELDS: &[&str] = &[
    "moe_intermediate_size",
    "n_group",
    "n_routed_experts",
    "n_shared_experts",
    "norm_topk_prob",
    "num_experts",
    "num_experts_per_tok",
    "num_local_experts",
    "routed_scaling_factor",
    "scoring_func",
    "topk_group",
    "topk_method",
];

/// The MLP of every layer (`layers` of them), and the experts when one of those or the MTP layer has any.
pub(super) fn parse(fields: &Fields<'_>, family: Family, layers: usize, mtp: usize) -> Result<(Vec<Mlp>, Option<Moe>)> {
    let width = fields.required("intermediate_size")?;
    let sparse = match family {
        Family::Llama | Family::LlamaGqla => vec![false; layers],
        _ => sparse_layers(fields, family, layers, mtp)?,
    };
    let mlp: Vec<Mlp> = sparse.iter().map(|&s| if s { Mlp::Sparse } else { Mlp::Dense { width } }).collect();
    let moe = if matches!(family, Family::Llama | Family::LlamaGqla) {
        None
    } else if mlp.contains(&Mlp::Sparse) || mtp > 0 && !fields.is_null("n_routed_experts") {
        Some(moe(fields, family)?)
    } else {
        for name in FIELDS {
            fields.get(name);
        }
        None
    };
    Ok((mlp, moe))
}

/// For each layer whether it has experts, from `mlp_layer_types` or `first_k_dense_replace`; both must agree.
fn sparse_layers(fields: &Fields<'_>, family: Family, layers: usize, mtp: usize) -> Result<Vec<bool>> {
    let first = fields.integer("first_k_dense_replace", 0, super::fields::LARGEST)?;
    let every = fields.integer("moe_layer_freq", 1, super::fields::LARGEST)?;
    let dense_model = fields.is_null("n_routed_experts");
    let counted = |first: usize| -> Vec<bool> {
        (0..layers).map(|i| !dense_model && i >= first && i.is_multiple_of(every.unwrap_or(1))).collect()
    };
    let default = match family {
        Family::DeepseekV2 => 0,
        Family::DeepseekV3 => 3,
        _ => 1,
    };
    let Some(kinds) = fields.list("mlp_layer_types")? else { return Ok(counted(first.unwrap_or(default))) };
    // The MTP layer may have an entry of its own at the end.
    if kinds.len() != layers && kinds.len() != layers + mtp {
        let what = format!("has {} entries for num_hidden_layers = {layers}", kinds.len());
        return Err(fields.error("mlp_layer_types", what));
    }
    let kind = |value: &Value| match value.as_str() {
        Some("dense") => Ok(false),
        Some("sparse") => Ok(true),
        _ => Err(fields.error("mlp_layer_types", format!("has {}, should be dense or sparse", shown(value)))),
    };
    let mut sparse = kinds.iter().map(kind).collect::<Result<Vec<bool>>>()?;
    if sparse[layers..].contains(&false) {
        return Err(fields.error("mlp_layer_types", "says that the MTP layer is dense; only one with experts is known"));
    }
    sparse.truncate(layers);
    if let Some(i) = first.and_then(|first| counted(first).iter().zip(&sparse).position(|(a, b)| a != b)) {
        let what = format!("and first_k_dense_replace disagree about layer {i}; remove the wrong one");
        return Err(fields.error("mlp_layer_types", what));
    }
    if dense_model && sparse.contains(&true) {
        return Err(fields.error("n_routed_experts", "is null, but mlp_layer_types has sparse layers"));
    }
    Ok(sparse)
}

fn moe(fields: &Fields<'_>, family: Family) -> Result<Moe> {
    let v2 = family == Family::DeepseekV2;
    // (experts, top-k, expert width, shared experts, n_group, topk_group, scale) of the class in transformers.
    let (d_experts, d_top, d_width, d_shared, d_groups, d_top_groups, d_scale) = match family {
        Family::DeepseekV2 => (64, None, 1407, 2, None, None, 1.0),
        Family::DeepseekV3 => (256, Some(8), 2048, 1, Some(8), Some(4), 2.5),
        _ => (64, Some(4), 1536, 1, Some(1), Some(1), 1.8),
    };
    let experts = experts(fields)?.unwrap_or(d_experts);
    let missing = |name: &str| fields.error(name, "is missing");
    let top_k = fields.integer("num_experts_per_tok", 1, MOST_EXPERTS)?.or(d_top);
    let top_k = top_k.ok_or_else(|| missing("num_experts_per_tok"))?;
    let width = fields.size("moe_intermediate_size")?.unwrap_or(d_width);
    let shared = match fields.integer("n_shared_experts", 0, MOST_EXPERTS)? {
        None if fields.is_null("n_shared_experts") => 0,
        shared => shared.unwrap_or(d_shared),
    };
    fields.fits("n_shared_experts", &[shared, width])?;

    let scoring = scoring(fields, v2)?;
    let (mut groups, mut top_groups) =
        (fields.size("n_group")?.or(d_groups), fields.size("topk_group")?.or(d_top_groups));
    if scoring == Scoring::SoftmaxGreedy {
        (groups, top_groups) = (Some(1), Some(1)); // the choice is among all experts whatever the fields say
    }
    let groups = groups.ok_or_else(|| missing("n_group"))?;
    let top_groups = top_groups.ok_or_else(|| missing("topk_group"))?;
    if !experts.is_multiple_of(groups) {
        return Err(fields.error("n_group", format!("is {groups}, which does not divide the {experts} experts")));
    }
    if scoring == Scoring::NoAuxTc && experts / groups < 2 {
        let what = format!("is {groups} for {experts} experts: a group is scored by its two best, so it needs two");
        return Err(fields.error("n_group", what));
    }
    if top_groups > groups {
        return Err(fields.error("topk_group", format!("is {top_groups}, more than n_group, {groups}")));
    }
    if top_k > experts / groups * top_groups {
        let among = experts / groups * top_groups;
        return Err(fields.error("num_experts_per_tok", format!("is {top_k}, more than the {among} to choose among")));
    }
    let normalise = fields.flag("norm_topk_prob")?.unwrap_or(!v2);
    if v2 && normalise && top_k > 1 {
        // DeepSeek's own code then leaves out the factor, transformers ignores the field, others do both.
        let what = "is true: implementations of DeepSeek-V2 disagree about its meaning, and no published model has it";
        return Err(fields.error("norm_topk_prob", what));
    }
    let scale = fields.positive("routed_scaling_factor")?.unwrap_or(d_scale) as f32;
    if !scale.is_finite() || scale == 0.0 {
        return Err(fields.error("routed_scaling_factor", "is beyond the range of f32"));
    }
    Ok(Moe { experts, top_k, width, shared_width: shared * width, scoring, groups, top_groups, normalise, scale })
}

/// `n_routed_experts`, or one of the names that transformers maps to it.
fn experts(fields: &Fields<'_>) -> Result<Option<usize>> {
    let mut found: Option<usize> = None;
    for name in ["n_routed_experts", "num_local_experts", "num_experts"] {
        let Some(count) = fields.integer(name, 1, MOST_EXPERTS)? else { continue };
        if let Some(first) = found.filter(|&first| first != count) {
            return Err(fields.error(name, format!("is {count}, but n_routed_experts is {first}")));
        }
        found = Some(count);
    }
    Ok(found)
}

fn scoring(fields: &Fields<'_>, v2: bool) -> Result<Scoring> {
    let function = if v2 { "softmax" } else { "sigmoid" };
    if let Some(other) = fields.text("scoring_func")?.filter(|&f| f != function) {
        let what = format!("is {other:?}: this architecture is computed with {function:?}");
        return Err(fields.error("scoring_func", what));
    }
    match (v2, fields.text("topk_method")?) {
        (true, None | Some("greedy")) => Ok(Scoring::SoftmaxGreedy),
        (true, Some("group_limited_greedy")) => Ok(Scoring::SoftmaxGroupLimited),
        (false, None | Some("noaux_tc")) => Ok(Scoring::NoAuxTc),
        (v2, Some(other)) => {
            let known = if v2 { "greedy and group_limited_greedy" } else { "noaux_tc" };
            Err(fields.error("topk_method", format!("is {other:?}: this architecture is computed with {known}")))
        }
    }
}
