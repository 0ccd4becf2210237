//! The commands under mpirun: the same logits and text as alone, streamed, with the promised last line.

#[path = "common/mod.rs"]
mod common;
#[path = "common/model.rs"]
mod model;

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use common::{Ended, Job, mpirun};

const GQLA: &str = env!("CARGO_BIN_EXE_gqla");
const LIMIT: Duration = Duration::from_secs(120);

fn run(ranks: usize, arguments: &[&str]) -> Ended {
    let mut command = if ranks == 0 { Command::new(GQLA) } else { mpirun(ranks) };
    if ranks > 0 {
        command.arg(GQLA);
    }
    Job::start(command.args(arguments)).end_within(LIMIT)
}

fn logits(file: &Path) -> Vec<Vec<u8>> {
    let bytes = std::fs::read(file).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    (0..tensors.len()).map(|i| tensors.tensor(&format!("logits.{i}")).unwrap().data().to_vec()).collect()
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

#[test]
fn scored_logits_are_equal_at_every_world_size_and_path() {
    let folder = tempfile::tempdir().unwrap();
    let model = model::checkpoint("tiny-glm-gqla").0;
    let lists = folder.path().join("lists of tokens.json");
    let prompts: Vec<Vec<u32>> = model::lists(&model::golden("tiny-glm-gqla")["prompts"]).into_iter().take(7).collect();
    std::fs::write(&lists, serde_json::to_string(&prompts).unwrap()).unwrap();
    let score = |ranks: usize, path: &str| {
        let out = folder.path().join(format!("{ranks} {path}.safetensors"));
        let (model, lists, file) = (model.to_str().unwrap(), lists.to_str().unwrap(), out.to_str().unwrap());
        let ended = run(ranks, &["score", "--model", model, "--tokens", lists, "--out", file, "--path", path]);
        assert!(ended.status.success() && ended.stdout.is_empty(), "W={ranks} {path}: {}", ended.stderr);
        logits(&out)
    };
    let alone = score(0, "gqa");
    for (golden, ours) in model::golden_logits("tiny-glm-gqla").iter().zip(&alone) {
        let ours = floats(ours);
        let (error, size) = model::difference(&ours[ours.len() - golden.1.len()..], &golden.1);
        assert!(error <= 1e-4 * (1.0 + size));
    }
    for ranks in [1, 2, 4, 8] {
        assert!(score(ranks, "gqa") == alone, "W={ranks}: not the same bits");
        for (ours, theirs) in score(ranks, "absorb").iter().zip(&alone) {
            let (error, size) = model::difference(&floats(ours), &floats(theirs));
            assert!(error <= 1e-5 * (1.0 + size), "W={ranks}: {error} of {size}");
        }
    }
}

#[test]
fn generated_text_is_the_same_with_and_without_mpirun() {
    let model = model::checkpoint("tiny-glm-gqla").0;
    let golden = model::golden("tiny-glm-gqla");
    let prompt = golden["texts"][0].as_str().unwrap();
    let common = ["generate", "--model", model.to_str().unwrap(), "--prompt", prompt, "--max-tokens", "48"];
    let alone = run(0, &common);
    assert!(alone.status.success());
    let expected = golden["greedy"][0]["text"].as_str().unwrap();
    let text = alone.stdout.trim_end_matches('\n');
    assert!(!text.is_empty() && expected.contains(text), "{text:?} is not the beginning of {expected:?}");
    for (ranks, path, bytes) in
        [(2, "gqa", 4 * 4 * (4 * 64 + 16)), (8, "gqa", 4 * 4 * (64 + 16)), (8, "absorb", 4 * 4 * 144)]
    {
        let ended = run(ranks, &[&common[..], &["--path", path]].concat());
        assert_eq!(ended.stdout, alone.stdout, "W={ranks} {path}");
        let line = ended.stderr.lines().last().unwrap();
        for part in [
            format!("path {path} | {ranks} ranks | {bytes} KV bytes a token on each rank | TTFT "),
            " ms | ".to_string(),
            " tokens/s | 48 tokens".to_string(),
        ] {
            assert!(line.contains(&part), "{line:?} lacks {part:?}");
        }
    }
    // Outside mpirun --tp starts it.
    let relaunched = run(0, &[&common[..], &["--tp", "2", "--json"]].concat());
    let report: serde_json::Value = serde_json::from_str(&relaunched.stdout).unwrap();
    assert_eq!((report["world_size"].as_u64(), report["text"].as_str()), (Some(2), Some(text)));
}

#[test]
fn perplexity_is_measured_under_mpirun() {
    let (model, text) = (model::checkpoint("tiny-llama-gqa").0, model::at("tests/data/held-out.u16"));
    let (model, text) = (model.to_str().unwrap(), text.to_str().unwrap());
    let arguments = ["score", "--model", model, "--perplexity", text, "--window", "128", "--windows", "6", "--json"];
    let perplexity = |ranks| {
        let ended = run(ranks, &arguments);
        let report: serde_json::Value = serde_json::from_str(&ended.stdout).unwrap();
        assert_eq!(report["windows"], 6);
        report["perplexity"].as_f64().unwrap()
    };
    let alone = perplexity(0);
    assert!((1.5..50.0).contains(&alone), "{alone}");
    assert_eq!(perplexity(4), alone);
}

#[test]
fn wrong_flags_are_one_line_and_exit_code_2() {
    let model = model::checkpoint("tiny-llama-gqa").0;
    let model = model.to_str().unwrap();
    for (arguments, words) in [
        (vec!["generate", "--model", model, "--prompt", "x", "--temperature", "-1"], "temperature"),
        (vec!["generate", "--model", model, "--prompt", "x", "--top-p", "2"], "top_p"),
        (vec!["generate", "--model", model, "--prompt", "x", "--max-tokens", "99999"], "context"),
        (vec!["generate", "--model", model, "--prompt", "x", "--watchdog", "nan"], "watchdog"),
        (vec!["generate", "--model", model], "--prompt"),
        (vec!["score", "--model", model, "--tokens", "x.json"], "--out"),
    ] {
        let ended = run(0, &arguments);
        assert_eq!(ended.status.code(), Some(2), "{arguments:?}: {}", ended.stderr);
        assert!(ended.stderr.contains(words) && ended.stdout.is_empty(), "{arguments:?}: {}", ended.stderr);
        assert!(!ended.stderr.contains("panicked"), "{}", ended.stderr);
    }
}
