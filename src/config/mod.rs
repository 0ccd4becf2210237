//! The model's configuration, as this runtime computes with it: parsed once, validated once.
//!
//! [`ModelConfig::load`] reads a Hugging Face `config.json` in any of the spellings that SPEC.md lists and refuses,
//! by name, whatever would change the maths without being computed here.

mod experts;
mod fields;
pub(crate) mod json;
mod parse;
mod policy;
mod rope;

use std::path::Path;

use crate::error::Result;

/// Everything about a model that is not a weight.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// The name under `architectures`.
    pub architecture: String,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Decoder layers, without the MTP layer.
    pub layers: usize,
    /// Rows of the embedding and of the head.
    pub vocab: usize,
    /// The attention of every layer.
    pub attention: Attention,
    /// The rotary embedding.
    pub rope: Rope,
    /// One entry a layer.
    pub mlp: Vec<Mlp>,
    /// The experts, when any layer has them.
    pub moe: Option<Moe>,
    /// Biases on gate, up and down of the dense MLP (Llama's `mlp_bias`).
    pub mlp_bias: bool,
    /// eps of the RMSNorms of the residual stream.
    pub norm_eps: f32,
    /// The head is the embedding.
    pub tie_embeddings: bool,
    /// Longest context the model was made for, in tokens.
    pub max_position: usize,
    /// Beginning of sequence, when there is one.
    pub bos: Option<u32>,
    /// Tokens that end a generation (configuration and generation_config.json together).
    pub eos: Vec<u32>,
    /// MTP layers in the checkpoint (0 or 1); left unread unless asked for.
    pub mtp_layers: usize,
}

/// How queries, keys and values come about, and what can be cached.
#[derive(Debug, Clone, PartialEq)]
pub enum Attention {
    /// GQLA, and MLA as the case `groups == heads`: keys and values come from a latent.
    Latent(Latent),
    /// Llama's GQA: keys and values straight from the projections.
    Grouped(Grouped),
}

/// Dimensions of latent attention (SPEC.md section 1).
#[derive(Debug, Clone, PartialEq)]
pub struct Latent {
    /// Query heads, h.
    pub heads: usize,
    /// Groups, G; `heads` for MLA.
    pub groups: usize,
    /// d_n = qk_nope_head_dim.
    pub nope: usize,
    /// d_r = qk_rope_head_dim.
    pub rope: usize,
    /// d_v = v_head_dim.
    pub value: usize,
    /// d_c = kv_lora_rank.
    pub kv_rank: usize,
    /// q_lora_rank; `None` when queries are projected from the hidden state directly.
    pub q_rank: Option<usize>,
    /// The latent and the query latent pass an RMSNorm (false for models converted from GQA).
    pub latent_norm: bool,
    /// eps of those RMSNorms: 1e-6 in transformers whatever `rms_norm_eps` says.
    pub latent_norm_eps: f32,
    /// q_a_proj, kv_a_proj_with_mqa and o_proj have biases (`attention_bias`). For `LlamaGQLAForCausalLM`: o_proj.
    pub bias: bool,
    /// Each layer stores its own `self_attn.rope_inv_freq` `[d_r/2]` (adaptive conversion, SPEC.md 4c).
    pub stored_inv_freq: bool,
}

/// Dimensions of Llama's attention.
#[derive(Debug, Clone, PartialEq)]
pub struct Grouped {
    /// Query heads.
    pub heads: usize,
    /// KV heads.
    pub groups: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// q, k, v and o have biases (`attention_bias`).
    pub bias: bool,
}

/// The rotary embedding (SPEC.md section 1).
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// Rotate pairs (2i, 2i+1) rather than (i, i + d/2).
    pub interleave: bool,
    /// How frequencies are changed for long contexts.
    pub scaling: RopeScaling,
}

/// `rope_type`.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Frequencies as they are.
    Default,
    /// Llama 3.1's smoothing.
    Llama3 {
        /// `factor`.
        factor: f64,
        /// `low_freq_factor`.
        low: f64,
        /// `high_freq_factor`.
        high: f64,
        /// `original_max_position_embeddings`.
        original: f64,
    },
    /// YaRN.
    Yarn {
        /// `factor`.
        factor: f64,
        /// `original_max_position_embeddings`.
        original: f64,
        /// `beta_fast`.
        beta_fast: f64,
        /// `beta_slow`.
        beta_slow: f64,
        /// `mscale`, 0 when absent.
        mscale: f64,
        /// `mscale_all_dim`, 0 when absent.
        mscale_all_dim: f64,
        /// `attention_factor`, when the configuration gives one.
        attention_factor: Option<f64>,
        /// `truncate`: corner frequencies are rounded outwards to whole indices (the default).
        truncate: bool,
    },
}

/// A layer's MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mlp {
    /// One gated MLP of this width.
    Dense {
        /// `intermediate_size`.
        width: usize,
    },
    /// Routed experts and shared ones: [`Moe`].
    Sparse,
}

/// Mixture of experts (SPEC.md section 2).
#[derive(Debug, Clone, PartialEq)]
pub struct Moe {
    /// Routed experts.
    pub experts: usize,
    /// Experts a token.
    pub top_k: usize,
    /// Width of one expert.
    pub width: usize,
    /// Width of the shared MLP (`moe_intermediate_size · n_shared_experts`), 0 without one.
    pub shared_width: usize,
    /// How experts are scored and chosen.
    pub scoring: Scoring,
    /// `n_group`.
    pub groups: usize,
    /// `topk_group`.
    pub top_groups: usize,
    /// Divide the chosen weights by their sum.
    pub normalise: bool,
    /// `routed_scaling_factor`.
    pub scale: f32,
}

/// How experts are scored and chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scoring {
    /// DeepSeek-V3 and GLM: sigmoid, `e_score_correction_bias` in the choice, a group scored by its two best.
    NoAuxTc,
    /// DeepSeek-V2 `greedy`: softmax, the best of all.
    SoftmaxGreedy,
    /// DeepSeek-V2 `group_limited_greedy`: softmax, a group scored by its best.
    SoftmaxGroupLimited,
}

impl ModelConfig {
    /// Reads and validates `config.json` and `generation_config.json` of the checkpoint in `directory`.
    pub fn load(directory: &Path) -> Result<ModelConfig> {
        parse::load(directory)
    }

    /// The same from the texts themselves; `file` names the configuration in errors.
    pub fn from_json(config: &str, generation: Option<&str>, file: &Path) -> Result<ModelConfig> {
        parse::from_json(config, generation, file)
    }

    /// Query heads h.
    pub fn heads(&self) -> usize {
        match &self.attention {
            Attention::Latent(a) => a.heads,
            Attention::Grouped(a) => a.heads,
        }
    }

    /// Groups G (KV heads).
    pub fn groups(&self) -> usize {
        match &self.attention {
            Attention::Latent(a) => a.groups,
            Attention::Grouped(a) => a.groups,
        }
    }

    /// Width that RoPE rotates: d_r, or Llama's whole head.
    pub fn rope_dim(&self) -> usize {
        match &self.attention {
            Attention::Latent(a) => a.rope,
            Attention::Grouped(a) => a.head_dim,
        }
    }
}
