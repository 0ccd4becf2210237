//! Configurations as checkpoints write them: every spelling is read, everything else is refused by name.

use std::path::{Path, PathBuf};

use gqla::config::{Attention, Grouped, Latent, Mlp, ModelConfig, Moe, Rope, RopeScaling, Scoring};
use proptest::prelude::*;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).into()
}

#[test]
fn the_bundled_checkpoints_are_read() {
    let gqla = ModelConfig::load(&root().join("checkpoints/tiny-glm-gqla")).unwrap();
    assert_eq!((gqla.heads(), gqla.groups(), gqla.rope_dim(), gqla.mtp_layers), (16, 8, 16, 1));
    assert_eq!(gqla.mlp, [Mlp::Dense { width: 512 }, Mlp::Sparse, Mlp::Sparse, Mlp::Sparse]);
    assert_eq!((gqla.bos, gqla.eos.as_slice()), (Some(1), &[0][..]));
    let mla = ModelConfig::load(&root().join("checkpoints/tiny-glm-mla")).unwrap();
    assert_eq!((mla.heads(), mla.groups(), mla.moe), (16, 16, None));
    let llama = ModelConfig::load(&root().join("checkpoints/tiny-llama-gqa")).unwrap();
    assert_eq!((llama.heads(), llama.groups(), llama.rope_dim()), (16, 8, 32));
    assert!(!llama.rope.interleave);
}

#[test]
fn the_fixtures_are_read() {
    let load = |name: &str| ModelConfig::load(&root().join("tests/data/fixtures").join(name)).unwrap();
    let odd = load("oddheads-yarn-moe");
    assert_eq!((odd.heads(), odd.groups(), odd.rope.interleave), (24, 4, false));
    let Attention::Latent(latent) = &odd.attention else { panic!("not latent") };
    assert_eq!(latent.q_rank, None);
    let RopeScaling::Yarn { factor, original, mscale, attention_factor, truncate, .. } = odd.rope.scaling else {
        panic!("not yarn")
    };
    assert_eq!((factor, original, mscale, attention_factor, truncate), (4.0, 128.0, 1.0, None, true));
    let moe = odd.moe.unwrap();
    assert_eq!((moe.scoring, moe.groups, moe.top_groups, moe.scale), (Scoring::NoAuxTc, 2, 1, 1.8));
    let v3 = load("deepseek-v3-mla");
    assert_eq!((v3.mlp.len(), v3.mlp[0], v3.mlp[1]), (3, Mlp::Dense { width: 256 }, Mlp::Sparse));
    assert_eq!((v3.mtp_layers, v3.rope.interleave), (1, true));
    assert_eq!(load("realhead-h32g8").moe, None);
}

// ---- configurations as they are published

const LLAMA_3_8B: &str = r#"{
  "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 128000,
  "eos_token_id": 128001, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
  "intermediate_size": 14336, "max_position_embeddings": 8192, "model_type": "llama", "num_attention_heads": 32,
  "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": null,
  "rope_theta": 500000.0, "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.40.0.dev0",
  "use_cache": true, "vocab_size": 128256
}"#;

const LLAMA_31_8B: &str = r#"{
  "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 128000,
  "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
  "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": false, "model_type": "llama",
  "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1,
  "rms_norm_eps": 1e-05,
  "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192, "rope_type": "llama3"},
  "rope_theta": 500000.0, "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.42.3",
  "use_cache": true, "vocab_size": 128256
}"#;

const DEEPSEEK_V2_LITE: &str = r#"{
  "architectures": ["DeepseekV2ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config", "AutoModel": "modeling_deepseek.DeepseekV2Model",
    "AutoModelForCausalLM": "modeling_deepseek.DeepseekV2ForCausalLM"},
  "aux_loss_alpha": 0.001, "bos_token_id": 100000, "eos_token_id": 100001, "first_k_dense_replace": 1,
  "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 10944, "kv_lora_rank": 512,
  "max_position_embeddings": 163840, "model_type": "deepseek_v2", "moe_intermediate_size": 1408, "moe_layer_freq": 1,
  "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": false, "num_attention_heads": 16,
  "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16, "pretraining_tp": 1, "q_lora_rank": null,
  "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
  "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 4096, "type": "yarn"},
  "rope_theta": 10000, "routed_scaling_factor": 1.0, "scoring_func": "softmax", "seq_aux": true,
  "tie_word_embeddings": false, "topk_group": 1, "topk_method": "greedy", "torch_dtype": "bfloat16",
  "transformers_version": "4.33.1", "use_cache": true, "v_head_dim": 128, "vocab_size": 102400
}"#;

/// Without the fp8 quantisation of the published file.
const DEEPSEEK_V3: &str = r#"{
  "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config", "AutoModel": "modeling_deepseek.DeepseekV3Model",
    "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"},
  "aux_loss_alpha": 0.001, "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3,
  "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512,
  "max_position_embeddings": 163840, "model_type": "deepseek_v3", "moe_intermediate_size": 2048, "moe_layer_freq": 1,
  "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": true, "num_attention_heads": 128,
  "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1,
  "pretraining_tp": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
  "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096, "type": "yarn"},
  "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "seq_aux": true,
  "tie_word_embeddings": false, "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16",
  "transformers_version": "4.33.1", "use_cache": true, "v_head_dim": 128, "vocab_size": 129280
}"#;

const GLM_47_FLASH: &str = r#"{
  "architectures": ["Glm4MoeLiteForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "pad_token_id": 154820,
  "eos_token_id": [154820, 154827, 154829], "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 10240,
  "max_position_embeddings": 202752, "model_type": "glm4_moe_lite", "moe_intermediate_size": 1536,
  "topk_method": "noaux_tc", "norm_topk_prob": true, "num_attention_heads": 20, "n_group": 1, "topk_group": 1,
  "n_routed_experts": 64, "n_shared_experts": 1, "routed_scaling_factor": 1.8, "num_experts_per_tok": 4,
  "first_k_dense_replace": 1, "num_hidden_layers": 47, "num_key_value_heads": 20, "num_nextn_predict_layers": 1,
  "partial_rotary_factor": 1.0, "rms_norm_eps": 1e-05, "rope_scaling": null, "rope_theta": 1000000,
  "tie_word_embeddings": false, "dtype": "bfloat16", "transformers_version": "5.0.0rc0", "q_lora_rank": 768,
  "kv_lora_rank": 512, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "v_head_dim": 256, "vocab_size": 154880
}"#;

/// A Llama converted to a latent.
const LLAMA_GQLA: &str = r#"{
  "architectures": ["LlamaGQLAForCausalLM"], "attention_bias": false, "hidden_act": "silu", "hidden_size": 4096,
  "intermediate_size": 14336, "max_position_embeddings": 8192, "model_type": "llama", "num_attention_heads": 32,
  "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "head_dim": 128,
  "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_latent_layernorm": false,
  "tie_word_embeddings": false, "torch_dtype": "bfloat16", "vocab_size": 128256, "eos_token_id": 128001
}"#;

const PUBLISHED: [&str; 6] = [LLAMA_3_8B, LLAMA_31_8B, DEEPSEEK_V2_LITE, DEEPSEEK_V3, GLM_47_FLASH, LLAMA_GQLA];

fn parse(config: &str) -> gqla::Result<ModelConfig> {
    ModelConfig::from_json(config, None, Path::new("DIR/config.json"))
}

fn read(config: &str) -> ModelConfig {
    parse(config).unwrap_or_else(|error| panic!("{error}"))
}

/// `config` with fields set, or removed where the value is empty.
fn with(config: &str, changes: &[(&str, &str)]) -> String {
    let mut object: serde_json::Map<String, serde_json::Value> = serde_json::from_str(config).unwrap();
    for (name, value) in changes {
        match *value {
            "" => drop(object.remove(*name).unwrap_or_else(|| panic!("{name} is not there to be removed"))),
            value => drop(object.insert(name.to_string(), serde_json::from_str(value).unwrap())),
        }
    }
    serde_json::to_string(&object).unwrap()
}

/// The field and the words with which a changed configuration is refused.
fn refused(config: &str, changes: &[(&str, &str)]) -> (String, String) {
    match parse(&with(config, changes)) {
        Err(error @ gqla::Error::Config { .. }) => {
            assert!(error.to_string().starts_with("DIR/config.json: "), "{error}");
            let gqla::Error::Config { field, what, .. } = error else { unreachable!() };
            (field, what)
        }
        Err(other) => panic!("{changes:?}: {other}"),
        Ok(_) => panic!("{changes:?} was accepted"),
    }
}

fn latent(config: &ModelConfig) -> &Latent {
    match &config.attention {
        Attention::Latent(latent) => latent,
        Attention::Grouped(_) => panic!("not latent"),
    }
}

#[test]
fn llama_as_published() {
    let llama = read(LLAMA_3_8B);
    assert_eq!(llama.attention, Attention::Grouped(Grouped { heads: 32, groups: 8, head_dim: 128, bias: false }));
    assert_eq!(llama.rope, Rope { theta: 5e5, interleave: false, scaling: RopeScaling::Default });
    assert_eq!((llama.hidden, llama.layers, llama.vocab, llama.max_position), (4096, 32, 128_256, 8192));
    assert_eq!((llama.norm_eps, llama.bos, llama.eos), (1e-5, Some(128_000), vec![128_001]));
    assert_eq!(llama.mlp, [Mlp::Dense { width: 14336 }; 32]);
    let llama = read(LLAMA_31_8B);
    assert_eq!(llama.rope.scaling, RopeScaling::Llama3 { factor: 8.0, low: 1.0, high: 4.0, original: 8192.0 });
    assert_eq!(llama.eos, [128_001, 128_008, 128_009]);
}

#[test]
fn deepseek_v2_lite_as_published() {
    let v2 = read(DEEPSEEK_V2_LITE);
    let expected = Latent {
        heads: 16,
        groups: 16,
        nope: 128,
        rope: 64,
        value: 128,
        kv_rank: 512,
        q_rank: None,
        latent_norm: true,
        latent_norm_eps: 1e-6,
        bias: false,
        stored_inv_freq: false,
    };
    assert_eq!(*latent(&v2), expected);
    assert_eq!((v2.layers, v2.mlp[0], v2.mlp[1], v2.mtp_layers), (27, Mlp::Dense { width: 10944 }, Mlp::Sparse, 0));
    let moe = Moe {
        experts: 64,
        top_k: 6,
        width: 1408,
        shared_width: 2816,
        scoring: Scoring::SoftmaxGreedy,
        groups: 1,
        top_groups: 1,
        normalise: false,
        scale: 1.0,
    };
    assert_eq!(v2.moe, Some(moe));
    let yarn = RopeScaling::Yarn {
        factor: 40.0,
        original: 4096.0,
        beta_fast: 32.0,
        beta_slow: 1.0,
        mscale: 0.707,
        mscale_all_dim: 0.707,
        attention_factor: None,
        truncate: true,
    };
    assert_eq!(v2.rope, Rope { theta: 1e4, interleave: true, scaling: yarn });
    let limited = [("topk_method", "\"group_limited_greedy\""), ("n_group", "8"), ("topk_group", "3")];
    let moe = read(&with(DEEPSEEK_V2_LITE, &limited)).moe.unwrap();
    assert_eq!((moe.scoring, moe.groups, moe.top_groups), (Scoring::SoftmaxGroupLimited, 8, 3));
    assert_eq!(
        latent(&read(&with(DEEPSEEK_V2_LITE, &[("q_lora_rank", "")]))).q_rank,
        Some(1536),
        "the class's default"
    );
}

#[test]
fn deepseek_v3_as_published_but_for_fp8() {
    let v3 = read(DEEPSEEK_V3);
    assert_eq!((v3.heads(), v3.groups(), latent(&v3).q_rank, v3.mtp_layers), (128, 128, Some(1536), 1));
    assert_eq!(v3.mlp.iter().filter(|mlp| **mlp == Mlp::Sparse).count(), 58);
    let moe = v3.moe.unwrap();
    assert_eq!((moe.experts, moe.top_k, moe.groups, moe.top_groups, moe.normalise), (256, 8, 8, 4, true));
    assert_eq!((moe.scoring, moe.scale, moe.shared_width), (Scoring::NoAuxTc, 2.5, 2048));
    let fp8 =
        r#"{"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}"#;
    let (field, what) = refused(DEEPSEEK_V3, &[("quantization_config", fp8)]);
    assert!(field == "quantization_config" && what.contains("fp8") && what.contains("bfloat16"), "{what}");
}

#[test]
fn glm_as_published_and_converted() {
    let glm = read(GLM_47_FLASH);
    assert_eq!((latent(&glm).nope, latent(&glm).rope, latent(&glm).value), (192, 64, 256));
    assert_eq!(
        (glm.rope.theta, glm.rope.interleave, glm.norm_eps, latent(&glm).latent_norm_eps),
        (1e6, true, 1e-5, 1e-6)
    );
    assert_eq!((glm.eos.as_slice(), glm.bos), (&[154_820, 154_827, 154_829][..], None));
    let named =
        |name: &str| with(GLM_47_FLASH, &[("architectures", &format!("[\"{name}\"]")), ("num_key_value_heads", "4")]);
    for name in ["Glm4MoeLiteGQLAForCausalLM", "Glm4MoeLiteGQLAAbsorbForCausalLM"] {
        let converted = read(&named(name));
        assert_eq!((converted.groups(), converted.architecture.as_str()), (4, name));
    }
    for stem in ["DeepseekV2", "DeepseekV3"] {
        for form in ["GQLA", "GQLAAbsorb"] {
            let config = if stem == "DeepseekV2" { DEEPSEEK_V2_LITE } else { DEEPSEEK_V3 };
            let name = format!("[\"{stem}{form}ForCausalLM\"]");
            assert_eq!(read(&with(config, &[("architectures", &name), ("num_key_value_heads", "8")])).groups(), 8);
        }
    }
}

#[test]
fn a_converted_llama_has_a_latent_without_norms() {
    let converted = read(LLAMA_GQLA);
    let latent = latent(&converted);
    assert_eq!((latent.heads, latent.groups, latent.kv_rank, latent.q_rank), (32, 8, 512, None));
    assert!(!latent.latent_norm && !converted.rope.interleave && !latent.stored_inv_freq);
    assert_eq!((converted.mlp.len(), converted.moe), (32, None));
    let more =
        [("stored_inv_freq", "true"), ("architectures", "[\"LlamaGQLAAbsorbForCausalLM\"]"), ("mlp_bias", "true")];
    let more = read(&with(LLAMA_GQLA, &more));
    assert!(more.mlp_bias && matches!(more.attention, Attention::Latent(Latent { stored_inv_freq: true, .. })));
    assert_eq!(refused(LLAMA_GQLA, &[("q_lora_rank", "96")]).0, "q_lora_rank");
    assert_eq!(refused(LLAMA_GQLA, &[("kv_lora_rank", "")]).0, "kv_lora_rank");
}

// ---- spellings of the same

#[test]
fn every_spelling_means_the_same() {
    let same = |config: &str, changes: &[(&str, &str)]| {
        assert_eq!(read(config), read(&with(config, changes)), "{changes:?}");
    };
    let yarn = r#"{"beta_fast": 32.0, "beta_slow": 1.0, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "rope_theta": 10000.0, "rope_type": "yarn", "attention_factor": null}"#;
    same(DEEPSEEK_V3, &[("rope_theta", ""), ("rope_scaling", ""), ("rope_parameters", yarn)]);
    same(DEEPSEEK_V3, &[("rope_theta", ""), ("rope_scaling", yarn)]);
    same(DEEPSEEK_V3, &[("rope_scaling", yarn), ("rope_parameters", yarn)]);
    let plain = r#"{"rope_theta": 1000000, "rope_type": "default", "partial_rotary_factor": 1.0}"#;
    same(GLM_47_FLASH, &[("rope_theta", ""), ("rope_scaling", ""), ("rope_parameters", plain)]);
    let layers = format!("[\"dense\"{}]", ",\"sparse\"".repeat(46));
    same(GLM_47_FLASH, &[("first_k_dense_replace", ""), ("mlp_layer_types", &layers)]);
    same(GLM_47_FLASH, &[("mlp_layer_types", &layers)]);
    let with_mtp = format!("[\"dense\"{}]", ",\"sparse\"".repeat(47));
    same(GLM_47_FLASH, &[("mlp_layer_types", &with_mtp)]);
    same(GLM_47_FLASH, &[("first_k_dense_replace", "")]);
    same(GLM_47_FLASH, &[("dtype", ""), ("torch_dtype", "\"float16\"")]);
    same(LLAMA_3_8B, &[("eos_token_id", "[128001, 128001]")]);
    same(LLAMA_3_8B, &[("head_dim", "128"), ("rope_scaling", "{\"type\": \"default\"}")]);
    same(LLAMA_3_8B, &[("architectures", "[\"LlamaForCausalLM\", \"LlamaForCausalLM\"]")]);
    same(LLAMA_3_8B, &[("mlp_bias", "null"), ("attention_bias", ""), ("tie_word_embeddings", ""), ("hidden_act", "")]);
    same(
        DEEPSEEK_V3,
        &[("num_key_value_heads", ""), ("rope_interleave", "true"), ("head_dim", "64"), ("qk_head_dim", "192")],
    );
    same(DEEPSEEK_V3, &[("n_group", ""), ("topk_group", ""), ("norm_topk_prob", ""), ("routed_scaling_factor", "")]);
    same(DEEPSEEK_V3, &[("scoring_func", ""), ("topk_method", ""), ("moe_layer_freq", ""), ("n_shared_experts", "")]);
    assert!(!read(&with(DEEPSEEK_V3, &[("rope_interleave", "false")])).rope.interleave);
}

#[test]
fn eos_is_the_union_of_both_files() {
    let tokens = |config: &str, generation: &str| {
        let config = ModelConfig::from_json(config, Some(generation), Path::new("DIR/config.json")).unwrap();
        (config.bos, config.eos)
    };
    let generation = r#"{"bos_token_id": 7, "eos_token_id": [128009, 128001], "temperature": 0.6, "unheard_of": 1}"#;
    assert_eq!(tokens(LLAMA_3_8B, generation), (Some(128_000), vec![128_001, 128_009]));
    let none = with(LLAMA_3_8B, &[("eos_token_id", "null"), ("bos_token_id", "")]);
    assert_eq!(tokens(&none, generation), (Some(7), vec![128_001, 128_009]));
    assert_eq!(tokens(&none, "{}"), (None, vec![]), "null says that there is none");
    assert_eq!(read(&with(LLAMA_3_8B, &[("eos_token_id", "")])).eos, [2], "the class's default");
    for bad in ["[", "3", r#"{"eos_token_id": "x"}"#, r#"{"eos_token_id": -1}"#, r#"{"eos_token_id": 4294967296}"#] {
        let error = ModelConfig::from_json(LLAMA_3_8B, Some(bad), Path::new("DIR/config.json")).unwrap_err();
        assert!(error.to_string().starts_with("DIR/generation_config.json: "), "{error}");
    }
}

// ---- refusals

#[test]
fn what_would_change_the_maths_is_refused_by_name() {
    for (config, name, value, words) in [
        (LLAMA_3_8B, "architectures", "[\"MistralForCausalLM\"]", "MistralForCausalLM"),
        (LLAMA_3_8B, "architectures", "[\"LlamaAbsorbForCausalLM\"]", "LlamaAbsorbForCausalLM"),
        (LLAMA_3_8B, "architectures", "[\"LlamaForCausalLM\", \"MistralForCausalLM\"]", "both"),
        (LLAMA_3_8B, "architectures", "[]", "missing"),
        (LLAMA_3_8B, "architectures", "null", "missing"),
        (LLAMA_3_8B, "architectures", "[3]", "3"),
        (LLAMA_3_8B, "hidden_act", "\"gelu\"", "gelu"),
        (LLAMA_3_8B, "sliding_window", "4096", "4096"),
        (LLAMA_3_8B, "use_sliding_window", "true", "sliding"),
        (LLAMA_3_8B, "layer_types", "[\"sliding_attention\"]", "sliding_attention"),
        (LLAMA_3_8B, "final_logit_softcapping", "30.0", "30.0"),
        (LLAMA_3_8B, "logits_scaling", "8", "8"),
        (LLAMA_3_8B, "residual_multiplier", "0.22", "0.22"),
        (LLAMA_3_8B, "attention_multiplier", "0.1", "0.1"),
        (LLAMA_3_8B, "partial_rotary_factor", "0.5", "0.5"),
        (LLAMA_3_8B, "use_qk_norm", "true", "true"),
        (LLAMA_3_8B, "rope_interleave", "true", "halves"),
        (LLAMA_3_8B, "n_routed_experts", "8", "unknown field"),
        (LLAMA_3_8B, "something_new", "1", "remove it from the file"),
        (LLAMA_3_8B, "something_off", "false", "remove it from the file"),
        (LLAMA_3_8B, "torch_dtype", "\"float8_e4m3fn\"", "bfloat16"),
        (DEEPSEEK_V3, "mlp_bias", "true", "Llama"),
        (DEEPSEEK_V3, "scoring_func", "\"softmax\"", "sigmoid"),
        (DEEPSEEK_V3, "topk_method", "\"greedy\"", "noaux_tc"),
        (DEEPSEEK_V3, "num_key_value_heads", "8", "GQLAForCausalLM"),
        (DEEPSEEK_V3, "num_nextn_predict_layers", "2", "2"),
        (DEEPSEEK_V3, "index_topk", "2048", "2048"),
        (DEEPSEEK_V2_LITE, "scoring_func", "\"sigmoid\"", "softmax"),
        (DEEPSEEK_V2_LITE, "topk_method", "\"noaux_tc\"", "greedy"),
        (DEEPSEEK_V2_LITE, "norm_topk_prob", "true", "disagree"),
    ] {
        let (field, what) = refused(config, &[(name, value)]);
        assert_eq!(field, name);
        assert!(what.contains(words), "{name}: {what}");
    }
    for (name, value) in
        [("sliding_window", "null"), ("logits_scaling", "1.0"), ("_private", "3"), ("something_new", "null")]
    {
        assert_eq!(read(LLAMA_3_8B), read(&with(LLAMA_3_8B, &[(name, value)])), "{name}");
    }
    assert_eq!(read(LLAMA_3_8B), read(&with(LLAMA_3_8B, &[("sliding_window", "9"), ("use_sliding_window", "false")])));
}

#[test]
fn rope_fields_are_refused_by_name() {
    let yarn = r#""rope_type": "yarn", "factor": 4"#;
    let llama3 =
        r#""rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "original_max_position_embeddings": 8192"#;
    for (scaling, field) in [
        (r#"{"rope_type": "longrope", "factor": 4}"#.into(), "rope_scaling.rope_type"),
        (r#"{"type": "linear", "factor": 4}"#.into(), "rope_scaling.type"),
        (r#"{"type": "dynamic", "rope_type": "yarn"}"#.into(), "rope_scaling.rope_type"),
        (r#"{"type": "yarn"}"#.into(), "rope_scaling.factor"),
        (r#"{"type": "yarn", "factor": 0.5}"#.into(), "rope_scaling.factor"),
        (r#"{"factor": 2}"#.into(), "rope_scaling.factor"),
        (format!("{{{yarn}, \"beta_fast\": 0.5}}"), "rope_scaling.beta_fast"),
        (format!("{{{yarn}, \"mscale\": -1}}"), "rope_scaling.mscale"),
        (format!("{{{yarn}, \"truncate\": 1}}"), "rope_scaling.truncate"),
        (format!("{{{yarn}, \"finetuned\": true}}"), "rope_scaling.finetuned"),
        (format!("{{{yarn}, \"rope_theta\": 3}}"), "rope_scaling.rope_theta"),
        (format!("{{{yarn}, \"partial_rotary_factor\": 0.5}}"), "rope_scaling.partial_rotary_factor"),
        (format!("{{{llama3}}}"), "rope_scaling.high_freq_factor"),
        (format!("{{{llama3}, \"high_freq_factor\": 1}}"), "rope_scaling.high_freq_factor"),
        (r#"{"full_attention": {"rope_type": "default"}}"#.into(), "rope_scaling.full_attention"),
        ("[]".into(), "rope_scaling"),
    ] {
        assert_eq!(refused(LLAMA_3_8B, &[("rope_scaling", &scaling)]).0, field, "{scaling}");
    }
    assert_eq!(refused(LLAMA_3_8B, &[("rope_theta", "0")]).0, "rope_theta");
    let contradiction =
        [("rope_scaling", "{\"type\":\"yarn\",\"factor\":2}"), ("rope_parameters", "{\"rope_type\":\"default\"}")];
    assert_eq!(refused(LLAMA_3_8B, &contradiction).0, "rope_scaling");
    let full = format!("{{{yarn}, \"truncate\": false, \"attention_factor\": 1.5}}");
    let RopeScaling::Yarn { original, attention_factor, truncate, .. } =
        read(&with(LLAMA_3_8B, &[("rope_scaling", &full)])).rope.scaling
    else {
        panic!("not yarn")
    };
    assert_eq!((original, attention_factor, truncate), (8192.0, Some(1.5), false));
}

#[test]
fn contradictions_and_senseless_sizes_are_refused_by_name() {
    for (config, name, value, field) in [
        (LLAMA_3_8B, "hidden_size", "", "hidden_size"),
        (LLAMA_3_8B, "hidden_size", "0", "hidden_size"),
        (LLAMA_3_8B, "hidden_size", "-4", "hidden_size"),
        (LLAMA_3_8B, "hidden_size", "4096.5", "hidden_size"),
        (LLAMA_3_8B, "hidden_size", "\"4096\"", "hidden_size"),
        (LLAMA_3_8B, "hidden_size", "18446744073709551615", "hidden_size"),
        (LLAMA_3_8B, "hidden_size", "1e300", "hidden_size"),
        (LLAMA_3_8B, "vocab_size", "0", "vocab_size"),
        (LLAMA_3_8B, "num_hidden_layers", "1000000000", "num_hidden_layers"),
        (LLAMA_3_8B, "num_attention_heads", "16777216", "num_attention_heads"),
        (LLAMA_3_8B, "num_attention_heads", "24", "num_attention_heads"),
        (LLAMA_3_8B, "num_key_value_heads", "5", "num_key_value_heads"),
        (LLAMA_3_8B, "num_key_value_heads", "64", "num_key_value_heads"),
        (LLAMA_3_8B, "head_dim", "127", "head_dim"),
        (LLAMA_3_8B, "rms_norm_eps", "0", "rms_norm_eps"),
        (LLAMA_3_8B, "rms_norm_eps", "1e-300", "rms_norm_eps"),
        (LLAMA_3_8B, "tie_word_embeddings", "1", "tie_word_embeddings"),
        (LLAMA_3_8B, "bos_token_id", "[1, 2]", "bos_token_id"),
        (DEEPSEEK_V3, "qk_rope_head_dim", "63", "qk_rope_head_dim"),
        (DEEPSEEK_V3, "qk_head_dim", "128", "qk_head_dim"),
        (DEEPSEEK_V3, "head_dim", "100", "head_dim"),
        (DEEPSEEK_V3, "v_head_dim", "16777216", "num_attention_heads"),
        (DEEPSEEK_V3, "n_group", "7", "n_group"),
        (DEEPSEEK_V3, "n_group", "256", "n_group"),
        (DEEPSEEK_V3, "topk_group", "9", "topk_group"),
        (DEEPSEEK_V3, "topk_group", "0", "topk_group"),
        (DEEPSEEK_V3, "num_experts_per_tok", "129", "num_experts_per_tok"),
        (DEEPSEEK_V3, "routed_scaling_factor", "1e-60", "routed_scaling_factor"),
        (DEEPSEEK_V3, "num_local_experts", "8", "num_local_experts"),
        (DEEPSEEK_V3, "mlp_layer_types", "[\"dense\"]", "mlp_layer_types"),
        (GLM_47_FLASH, "mlp_layer_types", "[3]", "mlp_layer_types"),
        (DEEPSEEK_V2_LITE, "num_experts_per_tok", "", "num_experts_per_tok"),
    ] {
        assert_eq!(refused(config, &[(name, value)]).0, field, "{name} = {value}");
    }
    let wide = [("n_shared_experts", "65536"), ("moe_intermediate_size", "1048576")];
    assert_eq!(refused(DEEPSEEK_V3, &wide).0, "n_shared_experts");
    let layers = |first: &str, last: &str| format!("[\"{first}\"{},\"{last}\"]", ",\"sparse\"".repeat(46));
    assert!(refused(GLM_47_FLASH, &[("mlp_layer_types", &layers("sparse", "sparse"))]).1.contains("layer 0"));
    assert!(refused(GLM_47_FLASH, &[("mlp_layer_types", &layers("dense", "dense"))]).1.contains("MTP"));
    assert!(refused(GLM_47_FLASH, &[("mlp_layer_types", &layers("dense", "other"))]).1.contains("other"));
}

#[test]
fn broken_json_is_refused_with_the_file() {
    for text in ["", "{", "[]", "null", "{\"hidden_size\": 1, \"hidden_size\": 2}", "\u{feff}{}", "{} {}"] {
        let error = parse(text).unwrap_err().to_string();
        assert!(error.starts_with("DIR/config.json: "), "{error}");
    }
    assert!(parse("{\"a\": {\"b\": 1, \"b\": 2}}").unwrap_err().to_string().contains("\"b\" stands there twice"));
    parse(&"[".repeat(100_000)).unwrap_err();
    let absent = ModelConfig::load(Path::new("no/such/directory")).unwrap_err().to_string();
    assert!(absent.contains("no/such/directory/config.json"), "{absent}");
}

fn any_value() -> impl Strategy<Value = serde_json::Value> {
    use serde_json::{Value, json};
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        (0u64..300).prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(|v| json!(v)),
        (0u32..25).prop_map(|bits| json!(1u64 << bits)),
        "[a-z_]{0,9}".prop_map(Value::from),
        Just(json!("yarn")),
    ];
    leaf.prop_recursive(3, 12, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec(("[a-z_]{1,9}", inner), 0..4)
                .prop_map(|pairs| Value::Object(pairs.into_iter().collect())),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    /// Any values in place of the real ones: refused or read, never a panic, and what is read makes sense.
    #[test]
    fn no_value_of_a_field_panics(which in 0usize..6, changes in prop::collection::vec((any::<prop::sample::Index>(), any_value()), 1..4)) {
        let mut config: serde_json::Map<String, serde_json::Value> = serde_json::from_str(PUBLISHED[which]).unwrap();
        let names: Vec<String> = config.keys().cloned().collect();
        for (index, value) in changes {
            let name = index.get(&names).clone();
            match (config.get_mut(&name).and_then(|old| old.as_object_mut()), value) {
                // Sometimes a field within rope_scaling.
                (Some(inner), value) if !value.is_object() && !inner.is_empty() => {
                    let names: Vec<String> = inner.keys().cloned().collect();
                    inner.insert(index.get(&names).clone(), value);
                }
                (_, value) => drop(config.insert(name, value)),
            }
        }
        if let Ok(read) = parse(&serde_json::to_string(&config).unwrap()) {
            prop_assert!(read.heads() % read.groups() == 0 && read.rope_dim() % 2 == 0);
            prop_assert_eq!(read.mlp.len(), read.layers);
            prop_assert_eq!(read.mlp.contains(&Mlp::Sparse) && read.moe.is_none(), false);
        }
    }

    #[test]
    fn no_text_panics(which in 0usize..6, at in any::<prop::sample::Index>(), byte in any::<u8>(), cut in any::<bool>()) {
        let mut text = PUBLISHED[which].as_bytes().to_vec();
        let at = at.index(text.len());
        text[at] = byte;
        if cut {
            text.truncate(at);
        }
        let text = String::from_utf8_lossy(&text);
        let accepted = parse(&text).is_ok();
        prop_assert!(!(cut && accepted));
        let _ = ModelConfig::from_json(PUBLISHED[which], Some(&text), Path::new("DIR/config.json"));
    }
}
