//! What happens to the fields that the parser does not compute with.
//!
//! Three kinds: those that cannot change the logits (training, bookkeeping, sampling) are passed over; those that do
//! change them may only have the value that leaves the maths alone; every other field is refused by name, because a
//! field that nobody knows may change the maths.

use serde_json::{Value, json};

use super::fields::{Fields, shown};
use crate::error::Result;

/// Fields of published configurations that do not change what a forward pass computes.
const HARMLESS: &[&str] = &[
    // bookkeeping
    "architectures",
    "attn_implementation",
    "auto_map",
    "finetuning_task",
    "gradient_checkpointing",
    "id2label",
    "is_decoder",
    "keys_to_ignore_at_inference",
    "label2id",
    "library_name",
    "license",
    "max_model_len",
    "model_max_length",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "output_scores",
    "prefix",
    "problem_type",
    "return_dict",
    "return_dict_in_generate",
    "task_specific_params",
    "tf_legacy_loss",
    "tokenizer_class",
    "torchscript",
    "transformers_version",
    "transformers_weights",
    "transformers.js_config",
    "unsloth_fixed",
    "unsloth_version",
    "use_bfloat16",
    "use_cache",
    // how work was split when training or serving; the result is the same
    "chunk_size_feed_forward",
    "ep_size",
    "pretraining_tp",
    // training
    "attention_dropout",
    "aux_loss_alpha",
    "bias_update_speed",
    "dropout",
    "embd_pdrop",
    "embedding_dropout",
    "hidden_dropout",
    "initializer_range",
    "resid_pdrop",
    "router_aux_loss_coef",
    "router_z_loss_coef",
    "seq_aux",
    // tokens that a decoder does not act on, and sampling defaults of old configurations
    "bad_words_ids",
    "begin_suppress_tokens",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "length_penalty",
    "max_length",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "pad_token_id",
    "remove_invalid_values",
    "repetition_penalty",
    "sep_token_id",
    "suppress_tokens",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
    "unk_token_id",
];

const DEQUANTISE: &str = "quantised weights are not read: save the checkpoint in bfloat16, float16 or float32";

/// Refuses, by name, fields that would change the maths and that nothing here computes.
pub(super) fn check(fields: &Fields<'_>) -> Result<()> {
    quantisation(fields)?;
    sliding_window(fields)?;
    for (name, allowed) in neutral() {
        if let Some(value) = fields.get(name).filter(|value| !allowed.iter().any(|a| same(a, value))) {
            let values: Vec<String> = allowed.iter().map(shown).chain(["absent".into()]).collect();
            let what =
                format!("is {}, which this runtime does not compute; it must be {}", shown(value), values.join(" or "));
            return Err(fields.error(name, what));
        }
    }
    for (name, value) in fields.unread() {
        // A leading underscore marks a field as private to the program that wrote it; null says that it is not used.
        if !value.is_null() && !name.starts_with('_') && !HARMLESS.contains(&name) {
            let what = format!(
                "is {}: this runtime does not know the field for this architecture, and an unknown field may change \
                 what the model computes; remove it from the file if it does not",
                shown(value)
            );
            return Err(fields.error(name, what));
        }
    }
    Ok(())
}

/// Fields that change the maths, each with the values that leave it alone.
fn neutral() -> Vec<(&'static str, Vec<Value>)> {
    let off = || vec![json!(false)];
    let one = || vec![json!(1)];
    vec![
        ("add_cross_attention", off()),
        ("alibi", off()),
        ("attention_chunk_size", vec![]),
        ("attention_multiplier", vec![]),
        ("attention_out_bias", off()),
        ("attn_logit_softcapping", vec![]),
        ("cross_attention_hidden_size", vec![]),
        ("embedding_multiplier", one()),
        ("final_logit_softcapping", vec![]),
        ("index_head_dim", vec![]),
        ("index_n_heads", vec![]),
        ("index_topk", vec![]),
        ("is_encoder_decoder", off()),
        ("logit_scale", one()),
        ("logit_softcapping", vec![]),
        ("logits_scaling", one()),
        ("no_rope_layers", vec![json!([])]),
        ("partial_rotary_factor", one()),
        ("pruned_heads", vec![json!({})]),
        ("qk_norm", off()),
        ("qkv_bias", off()),
        ("query_pre_attn_scalar", vec![]),
        ("residual_multiplier", one()),
        ("rotary_pct", one()),
        ("scale_emb", one()),
        ("tie_encoder_decoder", off()),
        ("use_qk_norm", off()),
    ]
}

fn quantisation(fields: &Fields<'_>) -> Result<()> {
    for name in ["quantization_config", "compression_config"] {
        if let Some(value) = fields.get(name) {
            let method = value.get("quant_method").and_then(Value::as_str).map_or(String::new(), |m| format!(" ({m})"));
            return Err(fields.error(name, format!("is set{method}: {DEQUANTISE}")));
        }
    }
    Ok(())
}

fn sliding_window(fields: &Fields<'_>) -> Result<()> {
    let off = fields.flag("use_sliding_window")? == Some(false);
    for name in ["sliding_window", "sliding_window_pattern", "max_window_layers"] {
        if let Some(value) = fields.get(name).filter(|_| !off) {
            let what = format!("is {}: sliding-window attention is not computed here", shown(value));
            return Err(fields.error(name, what));
        }
    }
    if fields.flag("use_sliding_window")? == Some(true) {
        return Err(fields.error("use_sliding_window", "is true: sliding-window attention is not computed here"));
    }
    let kinds = fields.list("layer_types")?.unwrap_or_default();
    match kinds.iter().find(|kind| kind.as_str() != Some("full_attention")) {
        Some(kind) => {
            Err(fields.error("layer_types", format!("has {}: only full_attention is computed here", shown(kind))))
        }
        None => Ok(()),
    }
}

/// Equality in which 1 and 1.0 are the same number.
fn same(a: &Value, b: &Value) -> bool {
    match (a.as_f64(), b.as_f64()) {
        (Some(a), Some(b)) => a == b,
        _ => a == b,
    }
}
