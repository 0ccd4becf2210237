//! Conversions of the bundled checkpoints: what is exact is exact, the better method is better, and the output is an
//! ordinary checkpoint that appears whole or not at all. Small calibrations: docs/conversion.md has the full figures.

#[path = "common/model.rs"]
mod model;

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use gqla::backend::cpu::CpuBackend;
use gqla::cache::Layout;
use gqla::checkpoint::Checkpoint;
use gqla::comm::one::OneComm;
use gqla::comm::{Communicator, threads};
use gqla::config::ModelConfig;
use gqla::convert::{self, Figures, Grouping, Method, Options, Report, RopeMode, StoredType, Weights};
use gqla::engine::Config;
use gqla::error::{Error, Result};
use gqla::model::shard::{Path as DecodePath, Shard};
use tempfile::TempDir;

/// Eight windows of 256 tokens, measured on two of held-out text.
fn options(name: &str, out: PathBuf) -> Options {
    Options {
        model: model::checkpoint(name).0,
        out,
        groups: None,
        grouping: Grouping::Neighbor,
        weights: Weights::Uniform,
        method: Method::AttentionAware,
        rope: RopeMode::Adaptive,
        rope_dim: None,
        latent_rank: None,
        cache_elements: None,
        calibration: model::at("tests/data/calibration.u16"),
        samples: 8,
        length: 256,
        seed: 42,
        evaluate: Some(model::at("tests/data/held-out.u16")),
        evaluate_windows: Some(2),
        stored: StoredType::F32,
        shard_bytes: 5_000_000_000,
        spill: 1 << 30,
        resume: false,
    }
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
