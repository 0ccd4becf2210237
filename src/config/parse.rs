//! Reading `config.json`: the architecture, its dimensions and their consistency.

use std::path::Path;

use serde_json::Value;

use super::fields::{Fields, LARGEST, shown};
use super::{Attention, Grouped, Latent, ModelConfig, experts, json, policy, rope};
use crate::error::{Error, Result};

/// Largest configuration file that is read, in bytes.
const LARGEST_FILE: u64 = 16 << 20;
/// Most decoder layers.
const MOST_LAYERS: usize = 1 << 14;
/// eps of the latent norms in transformers, whatever `rms_norm_eps` says.
const LATENT_NORM_EPS: f32 = 1e-6;

/// Architectures that differ in their defaults and in what they compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    /// Llama with its own GQA.
    Llama,
    /// Llama converted to a latent.
    LlamaGqla,
    DeepseekV2,
    DeepseekV3,
    Glm4MoeLite,
}

/// Defaults of a family's class in transformers.
struct Defaults {
    max_position: usize,
    norm_eps: f64,
    eos: u32,
    /// kv_lora_rank, q_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim.
    latent: Option<(usize, usize, usize, usize, usize)>,
}

impl Family {
    fn defaults(self) -> Defaults {
        let (max_position, norm_eps, eos, latent) = match self {
            Family::Llama | Family::LlamaGqla => (2048, 1e-6, 2, None),
            Family::DeepseekV2 => (2048, 1e-6, 2, Some((512, 1536, 128, 64, 128))),
            Family::DeepseekV3 => (4096, 1e-6, 1, Some((512, 1536, 128, 64, 128))),
            Family::Glm4MoeLite => (202_752, 1e-5, 1, Some((512, 768, 192, 64, 256))),
        };
        Defaults { max_position, norm_eps, eos, latent }
    }
}

/// The family of an architecture's name, and whether its groups may be fewer than its heads.
fn family(architecture: &str) -> Option<(Family, bool)> {
    let stem = architecture.strip_suffix("ForCausalLM")?;
    let stem = stem.strip_suffix("Absorb").filter(|stem| stem.ends_with("GQLA")).unwrap_or(stem);
    Some(match stem {
        "Llama" => (Family::Llama, true),
        "LlamaGQLA" => (Family::LlamaGqla, true),
        "DeepseekV2" => (Family::DeepseekV2, false),
        "DeepseekV2GQLA" => (Family::DeepseekV2, true),
        "DeepseekV3" => (Family::DeepseekV3, false),
        "DeepseekV3GQLA" => (Family::DeepseekV3, true),
        "Glm4MoeLite" => (Family::Glm4MoeLite, false),
        "Glm4MoeLiteGQLA" => (Family::Glm4MoeLite, true),
        _ => return None,
    })
}

pub(super) fn load(directory: &Path) -> Result<ModelConfig> {
    let file = directory.join("config.json");
    let Some(config) = text(&file)? else {
        let what = "there is no such file: --model wants a Hugging Face directory with config.json and safetensors";
        return Err(Error::checkpoint(file, what));
    };
    let generation = text(&directory.join("generation_config.json"))?;
    from_json(&config, generation.as_deref(), &file)
}

/// A small text file; `None` when there is none.
fn text(file: &Path) -> Result<Option<String>> {
    match std::fs::metadata(file) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io(file, e)),
        Ok(meta) if !meta.is_file() => return Err(Error::checkpoint(file, "is not a regular file")),
        Ok(meta) if meta.len() > LARGEST_FILE => {
            let what = format!("has {} bytes, more than the {LARGEST_FILE} that a configuration may have", meta.len());
            return Err(Error::checkpoint(file, what));
        }
        Ok(_) => {}
    }
    std::fs::read_to_string(file).map(Some).map_err(|e| Error::io(file, e))
}

pub(super) fn from_json(config: &str, generation: Option<&str>, file: &Path) -> Result<ModelConfig> {
    let config = object(config, file)?;
    let fields = Fields::new(&config, file, "");
    let architecture = architecture(&fields)?;
    let Some((family, grouped)) = family(&architecture) else {
        let what = format!(
            "{architecture:?} is not computed here: LlamaForCausalLM, DeepseekV2ForCausalLM, DeepseekV3ForCausalLM, \
             Glm4MoeLiteForCausalLM and their …GQLAForCausalLM and …GQLAAbsorbForCausalLM forms are"
        );
        return Err(fields.error("architectures", what));
    };
    let defaults = family.defaults();

    let hidden = fields.required("hidden_size")?;
    let vocab = fields.required("vocab_size")?;
    let layers = fields.integer("num_hidden_layers", 1, MOST_LAYERS)?;
    let layers = layers.ok_or_else(|| fields.error("num_hidden_layers", "is missing"))?;
    let max_position = fields.integer("max_position_embeddings", 1, 1 << 40)?.unwrap_or(defaults.max_position);
    let attention = match family {
        Family::Llama => Attention::Grouped(grouped_attention(&fields, hidden)?),
        _ => Attention::Latent(latent_attention(&fields, family, &defaults, grouped)?),
    };
    let llama = matches!(family, Family::Llama | Family::LlamaGqla);
    let mtp_layers = if llama { 0 } else { mtp(&fields)? };
    let (mlp, moe) = experts::parse(&fields, family, layers, mtp_layers)?;
    let rope = rope::parse(&fields, !llama, max_position)?;
    if family == Family::Llama && rope.interleave {
        return Err(fields.error("rope_interleave", "is true, but LlamaForCausalLM rotates halves"));
    }
    let mlp_bias = fields.flag("mlp_bias")?.unwrap_or(false);
    if mlp_bias && !llama {
        return Err(fields.error("mlp_bias", "is true: biases of the MLP are computed for Llama only"));
    }
    let norm_eps = fields.positive("rms_norm_eps")?.unwrap_or(defaults.norm_eps) as f32;
    if !(f32::MIN_POSITIVE..=1.0).contains(&norm_eps) {
        return Err(fields.error("rms_norm_eps", format!("is {norm_eps}, should be between 0 and 1")));
    }
    if let Some(act) = fields.text("hidden_act")?.filter(|&act| act != "silu" && act != "swish") {
        return Err(fields.error("hidden_act", format!("is {act:?}: only silu is computed here")));
    }
    stored_types(&fields)?;
    let tie_embeddings = fields.flag("tie_word_embeddings")?.unwrap_or(false);
    let (bos, eos) = special_tokens(&fields, generation, file, &defaults)?;
    policy::check(&fields)?;
    Ok(ModelConfig {
        architecture,
        hidden,
        layers,
        vocab,
        attention,
        rope,
        mlp,
        moe,
        mlp_bias,
        norm_eps,
        tie_embeddings,
        max_position,
        bos,
        eos,
        mtp_layers,
    })
}

fn object(text: &str, file: &Path) -> Result<serde_json::Map<String, Value>> {
    match json::parse(text.as_bytes()) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(other) => Err(Error::checkpoint(file, format!("holds {} where a JSON object should be", shown(&other)))),
        Err(what) => Err(Error::checkpoint(file, format!("is not valid JSON: {what}"))),
    }
}

/// The one architecture; a repeated name counts once.
fn architecture(fields: &Fields<'_>) -> Result<String> {
    let missing =
        || fields.error("architectures", "is missing: it names the model class, as in [\"LlamaForCausalLM\"]");
    let list = fields.list("architectures")?.ok_or_else(missing)?;
    let first = list.first().ok_or_else(missing)?;
    if let Some(other) = list.iter().find(|other| *other != first) {
        let what = format!("names both {} and {}; leave the one that the weights are for", shown(first), shown(other));
        return Err(fields.error("architectures", what));
    }
    let name = first.as_str().ok_or_else(|| fields.error("architectures", format!("holds {}", shown(first))))?;
    Ok(name.to_owned())
}

/// `num_key_value_heads`, which must divide `heads`.
fn groups(fields: &Fields<'_>, heads: usize) -> Result<usize> {
    let groups = fields.size("num_key_value_heads")?.unwrap_or(heads);
    if !heads.is_multiple_of(groups) {
        let what = format!("is {groups}, which does not divide num_attention_heads, {heads}");
        return Err(fields.error("num_key_value_heads", what));
    }
    Ok(groups)
}

fn even(fields: &Fields<'_>, name: &str, dimension: usize) -> Result<()> {
    match dimension % 2 {
        0 => Ok(()),
        _ => Err(fields.error(name, format!("is {dimension}, but RoPE rotates pairs: it must be even"))),
    }
}

fn grouped_attention(fields: &Fields<'_>, hidden: usize) -> Result<Grouped> {
    let heads = fields.required("num_attention_heads")?;
    let groups = groups(fields, heads)?;
    let head_dim = match fields.size("head_dim")? {
        Some(head_dim) => head_dim,
        None if hidden.is_multiple_of(heads) => hidden / heads,
        None => {
            let what = format!("is {heads}, which does not divide hidden_size, {hidden}, and there is no head_dim");
            return Err(fields.error("num_attention_heads", what));
        }
    };
    even(fields, "head_dim", head_dim)?;
    fields.fits("head_dim", &[heads, head_dim])?;
    Ok(Grouped { heads, groups, head_dim, bias: fields.flag("attention_bias")?.unwrap_or(false) })
}

fn latent_attention(fields: &Fields<'_>, family: Family, defaults: &Defaults, grouped: bool) -> Result<Latent> {
    let heads = fields.required("num_attention_heads")?;
    let groups = groups(fields, heads)?;
    if groups != heads && !grouped {
        let what = format!(
            "is {groups} for {heads} heads, but this architecture is MLA, where every head has its own keys and values; \
             a converted model is named …GQLAForCausalLM"
        );
        return Err(fields.error("num_key_value_heads", what));
    }
    let size = |name: &str, default: Option<usize>| match fields.size(name)?.or(default) {
        Some(size) => Ok(size),
        None => Err(fields.error(name, "is missing")),
    };
    let default = defaults.latent;
    let kv_rank = size("kv_lora_rank", default.map(|d| d.0))?;
    let nope = size("qk_nope_head_dim", default.map(|d| d.2))?;
    let rope = size("qk_rope_head_dim", default.map(|d| d.3))?;
    let value = size("v_head_dim", default.map(|d| d.4))?;
    // null says that there is no query latent; an absent field has the class's default.
    let q_rank = match fields.size("q_lora_rank")? {
        None if fields.is_null("q_lora_rank") => None,
        given => given.or(default.map(|d| d.1)),
    };
    if let (Family::LlamaGqla, Some(rank)) = (family, q_rank) {
        let what = format!("is {rank}, but a converted Llama projects its queries directly: it must be null or absent");
        return Err(fields.error("q_lora_rank", what));
    }
    even(fields, "qk_rope_head_dim", rope)?;
    fields.fits("num_attention_heads", &[heads, nope + rope])?;
    fields.fits("num_attention_heads", &[heads, value])?;
    fields.fits("num_key_value_heads", &[groups, nope + value])?;
    if let Some(whole) = fields.size("qk_head_dim")?.filter(|&whole| whole != nope + rope) {
        let what = format!("is {whole}, but qk_nope_head_dim + qk_rope_head_dim is {}", nope + rope);
        return Err(fields.error("qk_head_dim", what));
    }
    // transformers writes the rope part here, other tools the whole; a converted Llama may keep the original's.
    let head_dims: &[usize] =
        if family == Family::LlamaGqla { &[rope, nope, value, nope + rope] } else { &[rope, nope + rope] };
    if let Some(other) = fields.size("head_dim")?.filter(|other| !head_dims.contains(other)) {
        let what = format!("is {other}, which is none of this model's head dimensions, {head_dims:?}");
        return Err(fields.error("head_dim", what));
    }
    Ok(Latent {
        heads,
        groups,
        nope,
        rope,
        value,
        kv_rank,
        q_rank,
        latent_norm: fields.flag("qk_latent_layernorm")?.unwrap_or(true),
        latent_norm_eps: LATENT_NORM_EPS,
        bias: fields.flag("attention_bias")?.unwrap_or(false),
        stored_inv_freq: fields.flag("stored_inv_freq")?.unwrap_or(false),
    })
}

fn mtp(fields: &Fields<'_>) -> Result<usize> {
    match fields.integer("num_nextn_predict_layers", 0, LARGEST)?.unwrap_or(0) {
        count @ 0..=1 => Ok(count),
        count => Err(fields.error("num_nextn_predict_layers", format!("is {count}: at most one MTP layer is known"))),
    }
}

/// `torch_dtype` or `dtype`. Tensors say their own type, so only a type that cannot be read matters.
fn stored_types(fields: &Fields<'_>) -> Result<()> {
    for name in ["torch_dtype", "dtype"] {
        let Some(dtype) = fields.text(name)? else { continue };
        if !["bfloat16", "float16", "float32", "auto"].contains(&dtype.trim_start_matches("torch.")) {
            let what =
                format!("is {dtype:?}: weights are read as bfloat16, float16 or float32; save them as one of those");
            return Err(fields.error(name, what));
        }
    }
    Ok(())
}

/// bos, and every eos of the two files; the class's default eos when neither file has the field.
fn special_tokens(
    fields: &Fields<'_>,
    generation: Option<&str>,
    file: &Path,
    defaults: &Defaults,
) -> Result<(Option<u32>, Vec<u32>)> {
    let bos_of = |fields: &Fields<'_>| match fields.tokens("bos_token_id")? {
        Some(ids) if ids.len() > 1 => Err(fields.error("bos_token_id", "is a list: a sequence begins with one token")),
        ids => Ok(ids.and_then(|ids| ids.first().copied())),
    };
    let mut bos = bos_of(fields)?;
    let mut written = fields.written("eos_token_id").is_some();
    let mut eos = fields.tokens("eos_token_id")?.unwrap_or_default();
    if let Some(text) = generation {
        let file = file.with_file_name("generation_config.json");
        let map = object(text, &file)?;
        let generation = Fields::new(&map, &file, "");
        bos = bos.or(bos_of(&generation)?);
        written |= generation.written("eos_token_id").is_some();
        eos.extend(generation.tokens("eos_token_id")?.unwrap_or_default());
    }
    if !written {
        eos.push(defaults.eos);
    }
    eos.sort_unstable();
    eos.dedup();
    Ok((bos, eos))
}
