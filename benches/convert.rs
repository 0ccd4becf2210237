//! Where a conversion's time and memory go: `cargo bench --bench convert [-- SAMPLES [METHOD…]]`.
//!
//! One layer of GLM-4.7-Flash's shape (20 heads, 192/64/256, latents of 768 and 512) with made-up weights, converted to
//! four groups of neighbours over SAMPLES (128) windows of 512 tokens, by each METHOD: `pca` (the published one), `aware`
//! and `aware-0` (without the refit). Every part is timed by the clock and by the processors' time, since other work on
//! the machine disturbs the first. `forward` has a layer of 64 experts before that one, and takes the windows through it,
//! as happens between two layers. Each method runs in a process of its own, so that its peak memory is its own.

use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use gqla::backend::cpu::{CpuBackend, fair_threads};
use gqla::comm::one::OneComm;
use gqla::convert::{self, Method, Options, StoredType};
use safetensors::{Dtype, serialize_to_file, tensor::TensorView};
use serde_json::json;

const HIDDEN: usize = 2048;
const HEADS: usize = 20;
const VOCAB: usize = 512;
const LENGTH: usize = 512;
const DENSE: usize = 10_240;
const EXPERTS: usize = 64;
const EXPERT: usize = 1536;

fn main() {
    // cargo passes --bench.
    let args: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let samples: usize = args.first().map_or(128, |n| n.parse().expect("SAMPLES is a number"));
    let methods: Vec<&str> = args.iter().skip(1).map(String::as_str).collect();
    match methods.as_slice() {
        [one] => measure(one, samples),
        [] => alone(&["pca", "aware-0", "aware", "forward"], samples),
        some => alone(some, samples),
    }
}

fn alone(methods: &[&str], samples: usize) {
    let program = std::env::current_exe().expect("the path of this program");
    for method in methods {
        let status = std::process::Command::new(&program).args([&samples.to_string(), *method]).status();
        assert!(status.is_ok_and(|s| s.success()), "{method} failed");
    }
}

/// Seconds of all this process's threads, from the 14th and 15th field of its `stat`, in hundredths.
fn processors() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").expect("a Linux");
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    fields.skip(11).take(2).filter_map(|n| n.parse::<f64>().ok()).sum::<f64>() / 100.0
}

/// Most memory this process has had, in GB.
fn peak() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("a Linux");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|l| l.split_whitespace().next()?.parse::<f64>().ok()).unwrap_or(0.0) * 1024.0 / 1e9
}

fn measure(method: &str, samples: usize) {
    let place = tempfile::tempdir().expect("a temporary directory");
    let (model, text) = (place.path().join("model"), place.path().join("text.u16"));
    let layers = if method == "forward" { 2 } else { 1 };
    make(&model, layers);
    let mut random = Random(1);
    let tokens = (0..samples * LENGTH).flat_map(|_| ((random.next() >> 40) as u16 % VOCAB as u16).to_le_bytes());
    std::fs::write(&text, tokens.collect::<Vec<u8>>()).expect("room for tokens");

    let threads = fair_threads(1);
    rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().expect("no pool before this one");
    let mut options = Options::new(&model, place.path().join("out"), &text);
    (options.groups, options.samples, options.stored) = (Some(4), samples, StoredType::Source);
    (options.method, options.refit) = match method {
        "pca" | "forward" => (Method::Pca, 0),
        "aware-0" => (Method::AttentionAware, 0),
        "aware" => (Method::AttentionAware, 2),
        other => panic!("{other} is no method: pca, aware-0, aware or forward"),
    };
    // The name of each part, and the clock's and the processors' seconds at its beginning.
    let parts = Mutex::new(vec![("reading the text".to_string(), Instant::now(), processors())]);
    let told = |_: usize, _: usize, what: &str| {
        parts.lock().unwrap().push((what.to_string(), Instant::now(), processors()));
    };
    let mut backend = CpuBackend::new(Box::new(OneComm::new()), threads).expect("a CPU");
    convert::convert(&options, &mut backend, Box::new(OneComm::new()), &AtomicBool::new(false), &told)
        .expect("a conversion");
    let mut parts = parts.into_inner().unwrap();
    parts.push(("".into(), Instant::now(), processors()));

    println!("{method}: {} tokens, {layers} layer(s), {threads} threads", samples * LENGTH);
    println!("  {:<32}{:>10}{:>12}", "", "seconds", "processors'");
    let line = |what: &str, clock: f64, work: f64| println!("  {what:<32}{clock:>10.2}{work:>12.2}");
    for pair in parts.windows(2) {
        line(&pair[0].0, (pair[1].1 - pair[0].1).as_secs_f64(), pair[1].2 - pair[0].2);
    }
    let (first, last) = (&parts[0], &parts[parts.len() - 1]);
    line("in all", (last.1 - first.1).as_secs_f64(), last.2 - first.2);
    println!("  peak memory {:.2} GB", peak());
}

/// splitmix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ x >> 31
    }

    /// Even over ±`size`, in bf16.
    fn bf16(&mut self, count: usize, size: f32) -> Vec<u8> {
        let one = |x: u64| half::bf16::from_f32(((x >> 40) as f32 / (1u64 << 23) as f32 - 1.0) * size).to_le_bytes();
        (0..count).flat_map(|_| one(self.next())).collect()
    }
}

/// A checkpoint of one or two layers of GLM-4.7-Flash's shape, the last one dense and the other of experts.
fn make(directory: &Path, layers: usize) {
    std::fs::create_dir_all(directory).expect("a directory");
    let config = json!({
        "architectures": ["Glm4MoeLiteForCausalLM"], "model_type": "glm4_moe_lite", "hidden_size": HIDDEN,
        "intermediate_size": DENSE, "num_hidden_layers": layers, "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS, "q_lora_rank": 768, "kv_lora_rank": 512, "qk_nope_head_dim": 192,
        "qk_rope_head_dim": 64, "v_head_dim": 256, "vocab_size": VOCAB, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "n_routed_experts": EXPERTS, "n_shared_experts": 1,
        "num_experts_per_tok": 4, "moe_intermediate_size": EXPERT, "n_group": 1, "topk_group": 1, "norm_topk_prob": true,
        "routed_scaling_factor": 1.8, "mlp_layer_types": if layers == 2 { vec!["sparse", "dense"] } else { vec!["dense"] }, "attention_bias": false,
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}, "rope_interleave": true,
        "tie_word_embeddings": false, "eos_token_id": 0, "torch_dtype": "bfloat16",
    });
    std::fs::write(directory.join("config.json"), config.to_string()).expect("room for a file");
    let mut random = Random(42);
    let mut tensors: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
    let mut matrix = |name: String, rows: usize, cols: usize| {
        let size = (3.0 / cols as f32).sqrt();
        tensors.push((name, vec![rows, cols], random.bf16(rows * cols, size)));
    };
    matrix("model.embed_tokens.weight".into(), VOCAB, HIDDEN);
    matrix("lm_head.weight".into(), VOCAB, HIDDEN);
    for i in 0..layers {
        let shapes = [
            ("self_attn.q_a_proj", 768, HIDDEN),
            ("self_attn.q_b_proj", HEADS * 256, 768),
            ("self_attn.kv_a_proj_with_mqa", 576, HIDDEN),
            ("self_attn.kv_b_proj", HEADS * 448, 512),
            ("self_attn.o_proj", HIDDEN, HEADS * 256),
        ];
        for (name, rows, cols) in shapes {
            matrix(format!("model.layers.{i}.{name}.weight"), rows, cols);
        }
        let mut mlp = |name: String, width: usize| {
            matrix(format!("model.layers.{i}.mlp.{name}gate_proj.weight"), width, HIDDEN);
            matrix(format!("model.layers.{i}.mlp.{name}up_proj.weight"), width, HIDDEN);
            matrix(format!("model.layers.{i}.mlp.{name}down_proj.weight"), HIDDEN, width);
        };
        if i + 1 == layers {
            mlp(String::new(), DENSE);
        } else {
            (0..EXPERTS).for_each(|e| mlp(format!("experts.{e}."), EXPERT));
            mlp("shared_experts.".into(), EXPERT);
            matrix(format!("model.layers.{i}.mlp.gate.weight"), EXPERTS, HIDDEN);
        }
    }
    let ones = |n: usize| half::bf16::ONE.to_le_bytes().repeat(n);
    let mut norms = vec![("model.norm".to_string(), HIDDEN)];
    for i in 0..layers {
        let of = [
            ("input_layernorm", HIDDEN),
            ("post_attention_layernorm", HIDDEN),
            ("self_attn.q_a_layernorm", 768),
            ("self_attn.kv_a_layernorm", 512),
        ];
        norms.extend(of.map(|(name, n)| (format!("model.layers.{i}.{name}"), n)));
    }
    tensors.extend(norms.into_iter().map(|(name, n)| (format!("{name}.weight"), vec![n], ones(n))));
    let still = vec![0; 4 * EXPERTS];
    let bias =
        (layers == 2).then(|| ("model.layers.0.mlp.gate.e_score_correction_bias", Dtype::F32, vec![EXPERTS], &still));
    let stored = tensors.iter().map(|(name, shape, bytes)| (name.as_str(), Dtype::BF16, shape.clone(), bytes));
    let views = stored
        .chain(bias)
        .map(|(name, dtype, shape, bytes)| (name, TensorView::new(dtype, shape, bytes).expect("bytes of this shape")));
    serialize_to_file(views, None, &directory.join("model.safetensors")).expect("room for weights");
}
