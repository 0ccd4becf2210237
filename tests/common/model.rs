//! Running checkpoints in tests: a world of threads in this process, and the reference outputs.
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::path::{Path, PathBuf};

use gqla::comm::threads;
use gqla::engine::device::Device;
use gqla::engine::scorer::Scorer;
use gqla::engine::{self, Config};
use gqla::model::shard;

/// The bundled checkpoints with latent attention, by name.
pub const LATENT: [&str; 2] = ["tiny-glm-gqla", "tiny-glm-mla"];
/// The random-weight checkpoints of other shapes.
pub const FIXTURES: [&str; 3] = ["realhead-h32g8", "oddheads-yarn-moe", "deepseek-v3-mla"];

/// A path inside the repository.
pub fn at(relative: &str) -> PathBuf {
    let built = Path::new(env!("CARGO_MANIFEST_DIR"));
    // A carried test runs in the root of another copy of the repository.
    if built.exists() { built.join(relative) } else { relative.into() }
}

/// The directory of a bundled checkpoint or fixture, and its reference outputs (.safetensors, .json).
pub fn checkpoint(name: &str) -> (PathBuf, PathBuf, PathBuf) {
    if FIXTURES.contains(&name) {
        let d = at(&format!("tests/data/fixtures/{name}"));
        (d.clone(), d.join("golden.safetensors"), d.join("golden.json"))
    } else {
        let golden = at("tests/data/golden");
        let named = |ending: &str| golden.join(format!("{name}.{ending}"));
        (at(&format!("checkpoints/{name}")), named("safetensors"), named("json"))
    }
}

/// The reference's JSON.
pub fn golden(name: &str) -> serde_json::Value {
    serde_json::from_str(&std::fs::read_to_string(checkpoint(name).2).unwrap()).unwrap()
}

/// Lists of token ids in the reference's JSON.
pub fn lists(value: &serde_json::Value) -> Vec<Vec<u32>> {
    serde_json::from_value(value.clone()).unwrap()
}

/// The last `[rows, vocab]` logits of each prompt in the reference, `(rows, values)`.
pub fn golden_logits(name: &str) -> Vec<(usize, Vec<f32>)> {
    let bytes = std::fs::read(checkpoint(name).1).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let prompts = lists(&golden(name)["prompts"]).len();
    (0..prompts)
        .map(|i| {
            let t = file.tensor(&format!("logits.{i}")).unwrap();
            assert_eq!(t.dtype(), safetensors::Dtype::F32);
            let values = t.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
            (t.shape()[0], values)
        })
        .collect()
}

/// A configuration for small models: short chunks, so that prompts of a few hundred tokens take several.
pub fn config(name: &str, path: Option<shard::Path>) -> Config {
    let mut config = Config::new(checkpoint(name).0);
    config.path = path;
    config.step_tokens = 96;
    config.cache_tokens = Some(2048);
    config.max_sequences = 8;
    config.threads = Some(1);
    config.device.device = Device::Cpu;
    config
}

/// All logits `[len, vocab]` of each token list, at a world of `world` threads.
pub fn logits(config: &Config, world: usize, prompts: &[Vec<u32>]) -> Vec<Vec<f32>> {
    let mut ends = threads::world(world).into_iter();
    let first = ends.next().unwrap();
    let workers: Vec<_> = ends
        .map(|end| {
            let config = config.clone();
            std::thread::spawn(move || engine::run_worker(config, Box::new(end)))
        })
        .collect();
    let mut scorer = Scorer::start(config, Box::new(first)).unwrap();
    let mut all = vec![];
    for prompt in prompts {
        let mut rows = vec![];
        scorer.logits(prompt, |_, l| rows.extend_from_slice(l)).unwrap();
        all.push(rows);
    }
    scorer.finish().unwrap();
    for worker in workers {
        worker.join().unwrap().unwrap();
    }
    all
}

/// The largest |a - b|, and the largest |b|. Both must be finite.
pub fn difference(a: &[f32], b: &[f32]) -> (f32, f32) {
    assert_eq!(a.len(), b.len());
    let (mut error, mut size) = (0f32, 0f32);
    for (x, y) in a.iter().zip(b) {
        assert!(x.is_finite() && y.is_finite());
        error = error.max((x - y).abs());
        size = size.max(y.abs());
    }
    (error, size)
}
