//! Conversions of the bundled checkpoints: what is exact is exact, the better method is better, and the output is an
//! ordinary checkpoint that appears whole or not at all. Small calibrations: docs/conversion.md has the full figures.

#[path = "common/model.rs"]
mod model;

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use faer::Mat;
use faer::prelude::SolveLstsq;
use gqla::backend::cpu::CpuBackend;
use gqla::cache::Layout;
use gqla::checkpoint::Checkpoint;
use gqla::comm::one::OneComm;
use gqla::comm::{Communicator, threads};
use gqla::config::{Attention, ModelConfig};
use gqla::convert::{self, Figures, Grouping, Method, Options, Report, RopeMode, StoredType, Weights};
use gqla::engine::Config;
use gqla::error::{Error, Result};
use gqla::model::shard::{Path as DecodePath, Shard};
use safetensors::tensor::TensorView;
use tempfile::TempDir;

/// Eight windows of 256 tokens, measured on two of held-out text.
fn options(name: &str, out: PathBuf) -> Options {
    let mut options = Options::new(model::checkpoint(name).0, out, model::at("tests/data/calibration.u16"));
    (options.samples, options.length, options.stored) = (8, 256, StoredType::F32);
    (options.evaluate, options.evaluate_windows) = (Some(model::at("tests/data/held-out.u16")), Some(2));
    options
}

fn on(comm: Box<dyn Communicator>, options: &Options) -> Result<Report> {
    let mut backend = CpuBackend::new(Box::new(OneComm::new()), 2).unwrap();
    convert::convert(options, &mut backend, comm, &AtomicBool::new(false), &|_, _, _| ())
}

fn run(options: &Options) -> Result<Report> {
    on(Box::new(OneComm::new()), options)
}

fn figures(options: &Options) -> Figures {
    run(options).unwrap().figures.unwrap()
}

fn prompt() -> Vec<u32> {
    let bytes = std::fs::read(model::at("tests/data/held-out.u16")).unwrap();
    bytes.chunks_exact(2).take(200).map(|b| u32::from(u16::from_le_bytes([b[0], b[1]]))).collect()
}

/// Logits of a held-out passage, in a world of `world` threads.
fn logits(directory: &Path, path: DecodePath, world: usize) -> Vec<f32> {
    let mut config = Config::new(directory);
    (config.path, config.threads, config.step_tokens) = (Some(path), Some(1), 64);
    (config.max_sequences, config.max_context) = (1, Some(256));
    model::logits(&config, world, &[prompt()]).remove(0)
}

fn assert_near(a: &[f32], b: &[f32], tolerance: f32, what: &str) {
    let (error, size) = model::difference(a, b);
    assert!(error <= tolerance * (1.0 + size), "{what}: {error} of {size}");
}

fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn refusal(options: &Options) -> String {
    match run(options) {
        Err(error) => {
            assert_eq!(error.exit_code(), 2, "{error}");
            error.to_string()
        }
        Ok(_) => panic!("was not refused"),
    }
}

#[test]
fn as_many_groups_as_heads_lose_nothing() {
    let place = TempDir::new().unwrap();
    let mut options = options("tiny-glm-mla", place.path().join("out"));
    for method in [Method::Pca, Method::AttentionAware] {
        (options.groups, options.method, options.stored) = (Some(16), method, StoredType::Source);
        let _ = std::fs::remove_dir_all(&options.out);
        assert!(figures(&options).kl.abs() < 1e-9);
        let before = logits(&options.model, DecodePath::Gqa, 1);
        assert_near(&logits(&options.out, DecodePath::Gqa, 1), &before, 1e-4, "G = h");
    }
}

#[test]
fn the_better_method_halves_the_published_ones_divergence() {
    let place = TempDir::new().unwrap();
    for (groups, grouping) in [(8, Grouping::Neighbor), (2, Grouping::Similarity)] {
        let divergence = |method| {
            let mut options = options("tiny-glm-mla", place.path().join(format!("{groups}-{method:?}")));
            (options.groups, options.grouping, options.method) = (Some(groups), grouping, method);
            options.evaluate_windows = Some(4);
            figures(&options).kl
        };
        let (published, aware) = (divergence(Method::Pca), divergence(Method::AttentionAware));
        assert!(published > 0.005, "G = {groups}: {published} is too good for the published method");
        assert!(aware <= 0.5 * published, "G = {groups}: {aware} against {published}");
    }
}

#[test]
fn a_converted_mla_model_runs_on_both_paths_and_several_ranks() {
    let place = TempDir::new().unwrap();
    let mut options = options("tiny-glm-gqla", place.path().join("out"));
    (options.groups, options.weights, options.evaluate) = (Some(4), Weights::Nll, None);
    options.shard_bytes = 4_000_000;
    run(&options).unwrap();
    let config = ModelConfig::load(&options.out).unwrap();
    assert_eq!((config.architecture.as_str(), config.groups()), ("Glm4MoeLiteGQLAForCausalLM", 4));
    let gqa = logits(&options.out, DecodePath::Gqa, 1);
    assert_near(&logits(&options.out, DecodePath::Absorb, 1), &gqa, 1e-4, "absorb path");
    for world in [2, 4] {
        assert_near(&logits(&options.out, DecodePath::Gqa, world), &gqa, 1e-4, "GQA path on ranks");
    }
    // The MTP layer is layer 4; its shared projections have 4 groups of 32 + 32 rows like the others'.
    let (old, new) = (Checkpoint::open(&options.model).unwrap(), Checkpoint::open(&options.out).unwrap());
    let name = "model.layers.4.self_attn.kv_b_proj.weight";
    assert_eq!(new.raw(name).unwrap().1, [4 * 64, 128]);
    assert_eq!(old.raw(name).unwrap().1, [8 * 64, 128]);
    let mut expected: Vec<&str> = old.names();
    expected.sort_unstable();
    assert_eq!(new.names(), expected);
    // An ordinary checkpoint: shards and index, tokenizer, configuration, what was done; nothing of the run itself.
    let files = names(&options.out);
    for file in ["config.json", "gqla_meta.json", "modeling.py", "tokenizer.json", "generation_config.json"] {
        assert!(files.contains(&file.to_string()), "{file} is not among {files:?}");
    }
    let shards = files.iter().filter(|f| f.ends_with(".safetensors")).count();
    assert!(shards >= 3, "{files:?}");
    assert!(!files.iter().any(|f| f.ends_with(".part") || f == "mtp"), "{files:?}");
    assert_eq!(names(place.path()), ["out"]);
}

#[test]
fn llama_with_all_of_rope_and_full_rank_stays_itself() {
    let place = TempDir::new().unwrap();
    let before = logits(&model::checkpoint("tiny-llama-gqa").0, DecodePath::Gqa, 1);
    for (i, rope) in [RopeMode::Adaptive, RopeMode::Published { fold: 1 }].into_iter().enumerate() {
        let mut options = options("tiny-llama-gqa", place.path().join(format!("{i}")));
        (options.rope, options.rope_dim, options.latent_rank) = (rope, Some(256), Some(256));
        (options.evaluate, options.samples) = (None, 4);
        run(&options).unwrap();
        assert_near(&logits(&options.out, DecodePath::Gqa, 1), &before, 1e-5, "GQA path");
        assert_near(&logits(&options.out, DecodePath::Absorb, 1), &before, 1e-5, "absorb path");
    }
}

/// tiny-llama-gqa's logits, computed here in f64, with the RoPE of a partial-rope model: of each frequency one component
/// over the KV heads turns (`directions[layer]` `[frequencies][KV heads]`, unit vectors), the others stand still.
fn partial_rope_logits(directory: &Path, directions: &[Vec<Vec<f64>>]) -> Vec<f32> {
    let (config, checkpoint) = (ModelConfig::load(directory).unwrap(), Checkpoint::open(directory).unwrap());
    let Attention::Grouped(a) = &config.attention else { panic!() };
    let (d, half, per) = (a.head_dim, a.head_dim / 2, a.heads / a.groups);
    let matrix = |name: &str, rows: usize, cols: usize| -> Vec<Vec<f64>> {
        let slice = checkpoint.slice(name, &[rows, cols], 0..rows, 0..cols).unwrap();
        let row = |r| {
            let mut row = vec![0f32; cols];
            slice.read_f32(r, &mut row);
            row.into_iter().map(f64::from).collect()
        };
        (0..rows).map(row).collect()
    };
    let times = |w: &[Vec<f64>], x: &[f64]| -> Vec<f64> {
        w.iter().map(|row| row.iter().zip(x).map(|(a, b)| a * b).sum()).collect()
    };
    let norm = |x: &[f64], name: &str| -> Vec<f64> {
        let weight = checkpoint.vector(name, config.hidden).unwrap();
        let scale = (x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64 + f64::from(config.norm_eps)).powf(-0.5);
        x.iter().zip(weight).map(|(v, w)| v * scale * f64::from(w)).collect()
    };
    let embedding = matrix("model.embed_tokens.weight", config.vocab, config.hidden);
    let mut x: Vec<Vec<f64>> = prompt().iter().map(|t| embedding[*t as usize].clone()).collect();
    for (i, directions) in directions.iter().enumerate() {
        let at = |name: &str| format!("model.layers.{i}.{name}.weight");
        let weight = |name: &str, rows: usize, cols: usize| matrix(&at(name), rows, cols);
        let (q_map, o_map) = (
            weight("self_attn.q_proj", a.heads * d, config.hidden),
            weight("self_attn.o_proj", config.hidden, a.heads * d),
        );
        let [k_map, v_map] = ["k", "v"].map(|n| weight(&format!("self_attn.{n}_proj"), a.groups * d, config.hidden));
        let h: Vec<Vec<f64>> = x.iter().map(|x| norm(x, &at("input_layernorm"))).collect();
        let [q, k, v] = [&q_map, &k_map, &v_map].map(|w| h.iter().map(|h| times(w, h)).collect::<Vec<_>>());
        for t in 0..x.len() {
            let mut attended = vec![0.0; a.heads * d];
            for j in 0..a.heads {
                let g = j / per;
                let logit = |s: usize| -> f64 {
                    let mut sum = 0.0;
                    for f in 0..half {
                        let (u, angle) = (&directions[f], (t - s) as f64 * 1e4f64.powf(-2.0 * f as f64 / d as f64));
                        let (q_re, q_im) = (q[t][j * d + f], q[t][j * d + half + f]);
                        // The shared key, and what is left of the head's own without it.
                        let shared = |part: usize| (0..a.groups).map(|g| u[g] * k[s][g * d + part + f]).sum::<f64>();
                        let (re, im) = (shared(0), shared(half));
                        let (own_re, own_im) = (k[s][g * d + f] - u[g] * re, k[s][g * d + half + f] - u[g] * im);
                        let (sin, cos) = angle.sin_cos();
                        let turned = q_re * (re * cos + im * sin) + q_im * (im * cos - re * sin);
                        sum += u[g] * turned + q_re * own_re + q_im * own_im;
                    }
                    sum / (d as f64).sqrt()
                };
                let logits: Vec<f64> = (0..=t).map(logit).collect();
                let most = logits.iter().copied().fold(f64::MIN, f64::max);
                let weights: Vec<f64> = logits.iter().map(|l| (l - most).exp()).collect();
                let total: f64 = weights.iter().sum();
                for (s, w) in weights.iter().enumerate() {
                    for c in 0..d {
                        attended[j * d + c] += w / total * v[s][g * d + c];
                    }
                }
            }
            x[t].iter_mut().zip(times(&o_map, &attended)).for_each(|(x, y)| *x += y);
        }
        let width = checkpoint.raw(&at("mlp.gate_proj")).unwrap().1[0];
        let [gate, up] = ["gate", "up"].map(|n| weight(&format!("mlp.{n}_proj"), width, config.hidden));
        let down = weight("mlp.down_proj", config.hidden, width);
        for x in &mut x {
            let h = norm(x, &at("post_attention_layernorm"));
            let gated = times(&gate, &h).into_iter().zip(times(&up, &h)).map(|(g, u)| g / (1.0 + (-g).exp()) * u);
            let out = times(&down, &gated.collect::<Vec<_>>());
            x.iter_mut().zip(out).for_each(|(x, y)| *x += y);
        }
    }
    let head = matrix("lm_head.weight", config.vocab, config.hidden);
    x.iter().flat_map(|x| times(&head, &norm(x, "model.norm.weight"))).map(|l| l as f32).collect()
}

/// The unit vectors `u` over KV heads with which a converted layer's shared rope key is `Σ_g u_g k_g`, by frequency.
fn kept_directions(original: &Path, converted: &Path) -> Vec<Vec<Vec<f64>>> {
    let (config, old) = (ModelConfig::load(original).unwrap(), Checkpoint::open(original).unwrap());
    let (made, new) = (ModelConfig::load(converted).unwrap(), Checkpoint::open(converted).unwrap());
    let (Attention::Grouped(a), Attention::Latent(l)) = (&config.attention, &made.attention) else { panic!() };
    let (d, half, hidden) = (a.head_dim, a.head_dim / 2, config.hidden);
    let layer = |i: usize| {
        let at = |name: &str| format!("model.layers.{i}.self_attn.{name}.weight");
        let rows = |c: &Checkpoint, name: &str, count: usize| -> Vec<f32> {
            let slice = c.slice(&at(name), &[count, hidden], 0..count, 0..hidden).unwrap();
            let mut out = vec![0.0; count * hidden];
            (0..count).for_each(|r| slice.read_f32(r, &mut out[r * hidden..(r + 1) * hidden]));
            out
        };
        let k = rows(&old, "k_proj", a.groups * d);
        let shared = rows(&new, "kv_a_proj_with_mqa", l.kv_rank + l.rope);
        let direction = |f: usize| {
            // Least squares over the real and imaginary rows of this frequency.
            let row = |g: usize, c: usize| k[(g * d + if c < hidden { f } else { half + f }) * hidden + c % hidden];
            let keys = Mat::from_fn(2 * hidden, a.groups, |c, g| f64::from(row(g, c)));
            let key = |c: usize| shared[(l.kv_rank + if c < hidden { f } else { half + f }) * hidden + c % hidden];
            let key = Mat::from_fn(2 * hidden, 1, |c, _| f64::from(key(c)));
            let u = keys.qr().solve_lstsq(key);
            let u: Vec<f64> = (0..a.groups).map(|g| u[(g, 0)]).collect();
            assert!((u.iter().map(|x| x * x).sum::<f64>() - 1.0).abs() < 1e-4, "{u:?}");
            u
        };
        (0..half).map(direction).collect()
    };
    (0..config.layers).map(layer).collect()
}

#[test]
fn llama_at_full_rank_with_partial_rope_is_the_partial_rope_model() {
    let place = TempDir::new().unwrap();
    let mut options = options("tiny-llama-gqa", place.path().join("out"));
    // One component of each of the head's 16 frequencies turns, and the latent has every dimension of its input.
    (options.rope, options.rope_dim) = (RopeMode::Published { fold: 1 }, Some(32));
    (options.latent_rank, options.evaluate) = (Some(256), None);
    run(&options).unwrap();
    let expected = partial_rope_logits(&options.model, &kept_directions(&options.model, &options.out));
    for path in [DecodePath::Gqa, DecodePath::Absorb] {
        assert_near(&logits(&options.out, path, 1), &expected, 1e-4, "partial RoPE");
    }
    // It is another model than the original.
    let original = logits(&options.model, DecodePath::Gqa, 1);
    assert!(model::difference(&original, &expected).0 > 0.1);
}

/// tiny-llama-gqa with random biases everywhere and its embeddings tied.
fn biased_llama(directory: &Path) {
    let source = model::checkpoint("tiny-llama-gqa").0;
    std::fs::create_dir(directory).unwrap();
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        std::fs::copy(source.join(name), directory.join(name)).unwrap();
    }
    let mut config: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(source.join("config.json")).unwrap()).unwrap();
    for field in ["attention_bias", "mlp_bias", "tie_word_embeddings"] {
        config[field] = true.into();
    }
    std::fs::write(directory.join("config.json"), config.to_string()).unwrap();
    let checkpoint = Checkpoint::open(&source).unwrap();
    let mut tensors: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
    let mut state = 1u32;
    for name in checkpoint.names().into_iter().filter(|n| *n != "lm_head.weight") {
        let (dtype, shape, bytes) = checkpoint.raw(name).unwrap();
        assert_eq!(dtype, "BF16");
        tensors.push((name.into(), shape.into(), bytes.into()));
        if let Some(stem) = name.strip_suffix("_proj.weight") {
            let bias = (0..shape[0]).flat_map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                half::bf16::from_f32((state >> 8) as f32 / (1 << 24) as f32 * 0.4 - 0.2).to_le_bytes()
            });
            tensors.push((format!("{stem}_proj.bias"), vec![shape[0]], bias.collect()));
        }
    }
    let views = tensors.iter().map(|(name, shape, bytes)| {
        (name.as_str(), TensorView::new(safetensors::Dtype::BF16, shape.clone(), bytes).unwrap())
    });
    safetensors::serialize_to_file(views, None, &directory.join("model.safetensors")).unwrap();
}

#[test]
fn llama_with_biases_and_tied_embeddings_is_converted() {
    let place = TempDir::new().unwrap();
    let model = place.path().join("model");
    biased_llama(&model);
    let before = logits(&model, DecodePath::Gqa, 1);
    let mut options = options("tiny-llama-gqa", place.path().join("whole"));
    (options.model, options.rope_dim, options.latent_rank) = (model, Some(256), Some(257));
    (options.evaluate, options.samples) = (None, 4);
    run(&options).unwrap();
    for path in [DecodePath::Gqa, DecodePath::Absorb] {
        assert_near(&logits(&options.out, path, 1), &before, 1e-4, "whole");
    }
    let made = Checkpoint::open(&options.out).unwrap();
    assert!(!made.has("lm_head.weight", false) && made.has("model.layers.0.self_attn.o_proj.bias", false));
    assert!(!made.has("model.layers.0.self_attn.k_proj.bias", false));

    // With a part of the cache, and in fewer groups.
    let mut options = self::options("tiny-llama-gqa", place.path().join("part"));
    options.model = place.path().join("model");
    (options.cache_elements, options.rope_dim, options.groups) = (Some(208), Some(80), Some(4));
    let figures = figures(&options);
    assert!(figures.kl.is_finite() && figures.perplexity_after < 2.0 * figures.perplexity_before, "{figures:?}");
    let gqa = logits(&options.out, DecodePath::Gqa, 4);
    assert_near(&logits(&options.out, DecodePath::Absorb, 1), &gqa, 1e-4, "paths");
}

/// Tokens below 512, for checkpoints with no tokenizer.
fn random_tokens(file: &Path) {
    let mut state = 7u32;
    let tokens = (0..16 * 256).flat_map(|_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        ((state >> 16) as u16 % 512).to_le_bytes()
    });
    std::fs::write(file, tokens.collect::<Vec<u8>>()).unwrap();
}

#[test]
fn deepseek_and_models_without_a_query_latent_are_converted() {
    let place = TempDir::new().unwrap();
    let text = place.path().join("text.u16");
    random_tokens(&text);
    let tokens: Vec<u32> = (0..100).map(|i| i * 37 % 512).collect();
    let logits = |directory: &Path, path, world| {
        let mut config = Config::new(directory);
        (config.path, config.threads, config.step_tokens) = (Some(path), Some(1), 64);
        (config.max_sequences, config.max_context) = (1, Some(256));
        model::logits(&config, world, std::slice::from_ref(&tokens)).remove(0)
    };
    // Of each: its groups, what it becomes, and fewer groups with which it is tried.
    for (name, groups, made, fewer) in [
        ("deepseek-v3-mla", 8, "DeepseekV3GQLAForCausalLM", 4),
        ("oddheads-yarn-moe", 4, "Glm4MoeLiteGQLAForCausalLM", 2),
    ] {
        let mut options = options(name, place.path().join(format!("{name}-same")));
        (options.calibration, options.evaluate) = (text.clone(), Some(text.clone()));
        (options.groups, options.samples, options.stored) = (Some(groups), 16, StoredType::Source);
        assert!(figures(&options).kl.abs() < 1e-9);
        let before = logits(&options.model, DecodePath::Gqa, 1);
        assert_near(&logits(&options.out, DecodePath::Gqa, 1), &before, 1e-4, "as it was");

        (options.groups, options.stored) = (Some(fewer), StoredType::F32);
        let mut divergence = [0.0; 2];
        for (method, kl) in [Method::Pca, Method::AttentionAware].into_iter().zip(&mut divergence) {
            (options.method, options.out) = (method, place.path().join(format!("{name}-{method:?}")));
            *kl = figures(&options).kl;
            let config = ModelConfig::load(&options.out).unwrap();
            assert_eq!((config.architecture.as_str(), config.groups()), (made, fewer));
            let gqa = logits(&options.out, DecodePath::Gqa, 1);
            assert_near(&logits(&options.out, DecodePath::Absorb, 1), &gqa, 1e-4, "absorb path");
            assert_near(&logits(&options.out, DecodePath::Gqa, fewer), &gqa, 1e-4, "GQA path on ranks");
        }
        // Random weights have little to share: the better method still loses less.
        assert!(divergence[0] > 0.0 && divergence[1] < divergence[0], "{name}: {divergence:?}");
    }
}

#[test]
fn llama_at_a_quarter_of_its_cache_keeps_most_of_itself() {
    let place = TempDir::new().unwrap();
    let mut options = options("tiny-llama-gqa", place.path().join("adaptive"));
    options.cache_elements = Some(144);
    let report = run(&options).unwrap();
    let figures = report.figures.unwrap();
    assert!(figures.kl < 0.2 && figures.perplexity_after < 1.2 * figures.perplexity_before, "{figures:?}");
    // The splits shown add up, the one taken is the one predicted best, and the caches are as large as was said.
    assert!(report.choices.len() > 5);
    assert!(report.choices.iter().all(|c| c.rope + c.latent == 144));
    assert!(report.choices.windows(2).all(|pair| pair[0].predicted <= pair[1].predicted));
    let config = ModelConfig::load(&options.out).unwrap();
    let best = report.choices[0];
    for (world, elements) in [1, 2, 4, 8].into_iter().zip(best.grouped) {
        let owned = Shard { rank: 0, world }.owned(&config, DecodePath::Gqa).unwrap();
        assert_eq!(Layout::of(&config, &owned).elements(), elements);
    }
    let owned = Shard::ONE.owned(&config, DecodePath::Absorb).unwrap();
    assert_eq!(Layout::of(&config, &owned).elements(), 144);
    let gqa = logits(&options.out, DecodePath::Gqa, 2);
    assert_near(&logits(&options.out, DecodePath::Absorb, 2), &gqa, 1e-4, "paths");

    let mut published = self::options("tiny-llama-gqa", place.path().join("published"));
    published.rope = RopeMode::Published { fold: 4 };
    let worse = self::figures(&published);
    assert!(worse.kl > 3.0 * figures.kl, "{worse:?} against {figures:?}");
}

#[test]
fn ranks_that_share_the_calibration_find_the_same() {
    let place = TempDir::new().unwrap();
    let alone = {
        let mut options = options("tiny-glm-mla", place.path().join("alone"));
        options.groups = Some(4);
        figures(&options)
    };
    let mut together = options("tiny-glm-mla", place.path().join("together"));
    // With everything on disk, too.
    (together.groups, together.spill) = (Some(4), 0);
    let together = &together;
    let reports: Vec<Report> = std::thread::scope(|scope| {
        let ranks: Vec<_> =
            threads::world(2).into_iter().map(|c| scope.spawn(move || on(Box::new(c), together).unwrap())).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    });
    let shared = reports[0].figures.unwrap();
    assert!((shared.kl - alone.kl).abs() < 0.02 * alone.kl, "{shared:?} against {alone:?}");
    assert_eq!(names(place.path()), ["alone", "together"]);
}

#[test]
fn nothing_is_left_of_a_conversion_that_is_interrupted_and_resume_goes_on() {
    let place = TempDir::new().unwrap();
    let mut options = options("tiny-glm-mla", place.path().join("out"));
    (options.groups, options.evaluate, options.samples) = (Some(8), None, 4);
    // Interrupted as the third layer begins.
    let interrupted = |options: &Options| {
        let mut backend = CpuBackend::new(Box::new(OneComm::new()), 2).unwrap();
        let stop = AtomicBool::new(false);
        let progress = |done: usize, _: usize, _: &str| {
            if done == 2 {
                stop.store(true, std::sync::atomic::Ordering::Relaxed);
            }
        };
        let done = convert::convert(options, &mut backend, Box::new(OneComm::new()), &stop, &progress);
        assert!(matches!(done, Err(Error::Interrupted)));
    };
    interrupted(&options);
    assert!(names(place.path()).is_empty());

    options.resume = true;
    interrupted(&options);
    assert_eq!(names(place.path()), ["out.converting"]);
    let first = place.path().join("out.converting/layer-00000.part");
    let made = std::fs::metadata(&first).unwrap().modified().unwrap();
    let mut other = options.clone();
    other.seed = 1;
    assert!(refusal(&other).contains("other settings"));
    let kept = std::fs::metadata(&first).unwrap().modified().unwrap();
    assert_eq!(made, kept);
    run(&options).unwrap();
    assert_eq!(names(place.path()), ["out"]);

    let straight = Options { out: place.path().join("straight"), resume: false, ..options.clone() };
    run(&straight).unwrap();
    let file = "model-00001-of-00001.safetensors";
    let read = |o: &Options| std::fs::read(o.out.join(file)).unwrap();
    assert!(read(&options) == read(&straight), "a resumed conversion differs from a straight one");
}

#[test]
fn what_cannot_be_converted_is_refused_with_the_remedy() {
    let place = TempDir::new().unwrap();
    let base = |name: &str| options(name, place.path().join("out"));
    let mla = |change: &dyn Fn(&mut Options)| {
        let mut options = base("tiny-glm-mla");
        options.groups = Some(8);
        change(&mut options);
        refusal(&options)
    };
    assert!(mla(&|o| o.groups = Some(3)).contains("use one of 1, 2, 4, 8, 16"));
    assert!(mla(&|o| o.groups = None).contains("--groups is missing"));
    assert!(mla(&|o| o.samples = 1).contains("too few"));
    assert!(mla(&|o| o.samples = 100_000).contains("a longer file"));
    assert!(mla(&|o| o.latent_rank = Some(64)).contains("--latent-rank"));
    assert!(mla(&|o| o.calibration = model::at("Cargo.toml")).contains(".jsonl"));
    let strange = place.path().join("strange.u16");
    std::fs::write(&strange, [0xff, 0xff].repeat(4096)).unwrap();
    assert!(mla(&|o| o.calibration.clone_from(&strange)).contains("another tokenizer"));
    // The calibration's own tokens under other numbers, as another tokenizer might have made them.
    let own = std::fs::read(model::at("tests/data/calibration.u16")).unwrap();
    let other = own.as_chunks::<2>().0.iter().flat_map(|b| ((u16::from_le_bytes(*b) + 1000) % 4096).to_le_bytes());
    std::fs::write(&strange, other.collect::<Vec<u8>>()).unwrap();
    assert!(mla(&|o| o.calibration.clone_from(&strange)).contains("makes only"));
    std::fs::remove_file(&strange).unwrap();
    // Text for which the tokenizer has no words.
    let strange = place.path().join("strange.txt");
    std::fs::write(&strange, "\u{1}\u{7f}\u{3}".repeat(20_000)).unwrap();
    assert!(mla(&|o| o.calibration.clone_from(&strange)).contains("not made for such text"));
    std::fs::write(&strange, "def f():\n    pass\n").unwrap();
    assert!(mla(&|o| o.calibration.clone_from(&strange)).contains("give a longer file"));
    std::fs::remove_file(&strange).unwrap();
    let strange = place.path().join("strange.jsonl");
    std::fs::write(&strange, "{\"text\": \"a\"}\n{\"txt\": \"b\"}\n").unwrap();
    assert!(mla(&|o| o.calibration.clone_from(&strange)).contains("line 2"));
    std::fs::remove_file(&strange).unwrap();
    let llama = |change: &dyn Fn(&mut Options)| {
        let mut options = base("tiny-llama-gqa");
        change(&mut options);
        refusal(&options)
    };
    assert!(llama(&|o| o.groups = Some(16)).contains("only 8 KV heads"));
    assert!(llama(&|o| (o.rope_dim, o.latent_rank) = (Some(15), Some(64))).contains("even"));
    assert!(llama(&|o| o.rope = RopeMode::Published { fold: 3 }).contains("--fold"));
    std::fs::create_dir(place.path().join("out")).unwrap();
    assert!(mla(&|_| ()).contains("already exists"));
    assert_eq!(names(place.path()), ["out"]);
}

#[test]
fn text_is_read_with_the_models_tokenizer() {
    let place = TempDir::new().unwrap();
    let text = std::fs::read_to_string(model::at("src/convert/mod.rs")).unwrap();
    let (plain, lines) = (place.path().join("text.txt"), place.path().join("text.jsonl"));
    std::fs::write(&plain, &text).unwrap();
    std::fs::write(&lines, format!("{}\n", serde_json::json!({"text": text}))).unwrap();
    let directory = model::checkpoint("tiny-glm-mla").0;
    let config = ModelConfig::load(&directory).unwrap();
    let read = |file: &Path| convert::calibration::read(file, &directory, &config, Some(2), 512, 42).unwrap().windows;
    assert_eq!(read(&plain), read(&lines));
    let tokenizer = tokenizers::Tokenizer::from_file(directory.join("tokenizer.json")).unwrap();
    assert!(text.starts_with(&tokenizer.decode(&read(&plain).concat(), false).unwrap()[..400]));
}
