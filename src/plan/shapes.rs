//! Models by name, so that planning needs no checkpoint. Dimensions are SPEC.md's table; weights are counted in bf16.

use crate::config::{Attention, Grouped, Latent, Mlp, ModelConfig, Moe, Rope, RopeScaling, Scoring};

/// The names [`named`] knows.
pub const NAMES: [&str; 7] = [
    "llama-3-8b",
    "llama-3-8b-gqla",
    "deepseek-v2-lite",
    "deepseek-v3",
    "deepseek-v3-gqla",
    "glm-4.7-flash",
    "glm-4.7-flash-gqla",
];

/// The model called `name`, if it is one of [`NAMES`].
pub fn named(name: &str) -> Option<ModelConfig> {
    Some(match name.to_ascii_lowercase().as_str() {
        "llama-3-8b" => llama_3_8b(),
        "llama-3-8b-gqla" => llama_3_8b_gqla(),
        "deepseek-v2-lite" => deepseek_v2_lite(),
        "deepseek-v3" => deepseek_v3(128),
        "deepseek-v3-gqla" => deepseek_v3(8),
        "glm-4.7-flash" => glm_4_7_flash(20),
        "glm-4.7-flash-gqla" => glm_4_7_flash(4),
        _ => return None,
    })
}

/// LLaMA-3-8B as published.
fn llama_3_8b() -> ModelConfig {
    ModelConfig {
        architecture: "LlamaForCausalLM".to_string(),
        hidden: 4096,
        layers: 32,
        vocab: 128256,
        attention: Attention::Grouped(Grouped { heads: 32, groups: 8, head_dim: 128, bias: false }),
        rope: Rope { theta: 5e5, interleave: false, scaling: RopeScaling::Default },
        mlp: vec![Mlp::Dense { width: 14336 }; 32],
        moe: None,
        mlp_bias: false,
        norm_eps: 1e-5,
        tie_embeddings: false,
        max_position: 8192,
        bos: Some(128000),
        eos: vec![128001],
        mtp_layers: 0,
    }
}

/// LLaMA-3-8B converted to GQLA (SPEC.md 4b): d_c 512, one rope key of 64, eight groups.
fn llama_3_8b_gqla() -> ModelConfig {
    let attention = Latent { q_rank: None, latent_norm: false, ..latent(32, 8, 128, 64, 128) };
    ModelConfig {
        architecture: "LlamaGQLAForCausalLM".to_string(),
        attention: Attention::Latent(attention),
        ..llama_3_8b()
    }
}

/// DeepSeek-V2-Lite.
fn deepseek_v2_lite() -> ModelConfig {
    ModelConfig {
        architecture: "DeepseekV2ForCausalLM".to_string(),
        hidden: 2048,
        layers: 27,
        vocab: 102400,
        attention: Attention::Latent(Latent { q_rank: None, ..latent(16, 16, 128, 64, 128) }),
        rope: Rope { theta: 1e4, interleave: true, scaling: yarn40(0.707) },
        mlp: dense_then_sparse(1, 10944, 27),
        moe: Some(Moe {
            experts: 64,
            top_k: 6,
            width: 1408,
            shared_width: 2 * 1408,
            scoring: Scoring::SoftmaxGreedy,
            groups: 1,
            top_groups: 1,
            normalise: false,
            scale: 1.0,
        }),
        mlp_bias: false,
        norm_eps: 1e-6,
        tie_embeddings: false,
        max_position: 163840,
        bos: Some(100000),
        eos: vec![100001],
        mtp_layers: 0,
    }
}

/// DeepSeek-V3 with `groups` groups: 128 is the published MLA, 8 the canonical GQLA shape.
fn deepseek_v3(groups: usize) -> ModelConfig {
    ModelConfig {
        architecture: if groups == 128 { "DeepseekV3ForCausalLM" } else { "DeepseekV3GQLAForCausalLM" }.to_string(),
        hidden: 7168,
        layers: 61,
        vocab: 129280,
        attention: Attention::Latent(Latent { q_rank: Some(1536), ..latent(128, groups, 128, 64, 128) }),
        rope: Rope { theta: 1e4, interleave: true, scaling: yarn40(1.0) },
        mlp: dense_then_sparse(3, 18432, 61),
        moe: Some(Moe {
            experts: 256,
            top_k: 8,
            width: 2048,
            shared_width: 2048,
            scoring: Scoring::NoAuxTc,
            groups: 8,
            top_groups: 4,
            normalise: true,
            scale: 2.5,
        }),
        mlp_bias: false,
        norm_eps: 1e-6,
        tie_embeddings: false,
        max_position: 163840,
        bos: Some(0),
        eos: vec![1],
        mtp_layers: 1,
    }
}

/// GLM-4.7-Flash with `groups` groups: 20 is the published MLA, 4 its GQLA conversion.
fn glm_4_7_flash(groups: usize) -> ModelConfig {
    ModelConfig {
        architecture: if groups == 20 { "Glm4MoeLiteForCausalLM" } else { "Glm4MoeLiteGQLAForCausalLM" }.to_string(),
        hidden: 2048,
        layers: 47,
        vocab: 154880,
        attention: Attention::Latent(Latent { q_rank: Some(768), ..latent(20, groups, 192, 64, 256) }),
        rope: Rope { theta: 1e6, interleave: true, scaling: RopeScaling::Default },
        mlp: dense_then_sparse(1, 10240, 47),
        moe: Some(Moe {
            experts: 64,
            top_k: 4,
            width: 1536,
            shared_width: 1536,
            scoring: Scoring::NoAuxTc,
            groups: 1,
            top_groups: 1,
            normalise: true,
            scale: 1.8,
        }),
        mlp_bias: false,
        norm_eps: 1e-5,
        tie_embeddings: false,
        max_position: 202752,
        bos: None,
        eos: vec![154820, 154827, 154829],
        mtp_layers: 1,
    }
}

/// Latent attention with d_c = 512, as all of these have.
fn latent(heads: usize, groups: usize, nope: usize, rope: usize, value: usize) -> Latent {
    Latent {
        heads,
        groups,
        nope,
        rope,
        value,
        kv_rank: 512,
        q_rank: None,
        latent_norm: true,
        latent_norm_eps: 1e-6,
        bias: false,
        stored_inv_freq: false,
    }
}

fn dense_then_sparse(dense: usize, width: usize, layers: usize) -> Vec<Mlp> {
    (0..layers).map(|i| if i < dense { Mlp::Dense { width } } else { Mlp::Sparse }).collect()
}

fn yarn40(mscale: f64) -> RopeScaling {
    RopeScaling::Yarn {
        factor: 40.0,
        original: 4096.0,
        beta_fast: 32.0,
        beta_slow: 1.0,
        mscale,
        mscale_all_dim: mscale,
        attention_factor: None,
        truncate: true,
    }
}
