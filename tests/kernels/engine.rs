//! The engine on GPUs, from tokens to text: perplexity, greedy text, several ranks.

use gqla::backend::cuda::available;
use gqla::comm::one::OneComm;
use gqla::engine::device::Device;
use gqla::engine::scorer::Scorer;
use gqla::engine::setup::Config;
use gqla::engine::{Engine, Event, Request};
use gqla::model::shard::Path;

#[path = "../common/model.rs"]
mod common;

fn config(name: &str, path: Path) -> Config {
    let mut config = common::config(name, Some(path));
    config.device.device = Device::Cuda;
    config.step_tokens = 512;
    config
}

#[test]
fn perplexity_is_the_float32_figure_to_half_a_percent() {
    if let Err(e) = available() {
        return eprintln!("NOT RUN for lack of a GPU: {e}");
    }
    let text = std::fs::read(common::at("tests/data/held-out.u16")).unwrap();
    let tokens: Vec<u32> = text.chunks_exact(2).map(|b| u32::from(u16::from_le_bytes([b[0], b[1]]))).collect();
    for (name, path) in [("tiny-glm-gqla", Path::Gqa), ("tiny-glm-gqla", Path::Absorb), ("tiny-llama-gqa", Path::Gqa)] {
        let mut scorer = Scorer::start(&config(name, path), Box::new(OneComm::new())).unwrap();
        let (mut nll, mut count) = (0f64, 0);
        for window in tokens.chunks_exact(512).take(200) {
            scorer
                .logits(window, |position, logits| {
                    if let Some(next) = window.get(position + 1) {
                        let sum: f64 = logits.iter().map(|l| f64::from(*l).exp()).sum();
                        nll += sum.ln() - f64::from(logits[*next as usize]);
                        count += 1;
                    }
                })
                .unwrap();
        }
        scorer.finish().unwrap();
        let expected = common::golden(name)["held_out_ppl_200x512_fp32"].as_f64().unwrap();
        let perplexity = (nll / f64::from(count)).exp();
        eprintln!("{name} on the {path} path: perplexity {perplexity:.4}, float32 {expected:.4}");
        assert!((perplexity / expected - 1.0).abs() < 5e-3, "{name} {path}: {perplexity}, reference {expected}");
    }
}

/// Greedy continuations of all prompts at once, on `world` ranks.
fn greedy(mut config: Config, world: usize, share: bool) -> Vec<Vec<u64>> {
    config.device.share_gpus = share;
    let name = "tiny-glm-gqla";
    let golden = common::golden(name);
    let engine = Engine::start_threads(config, world).unwrap();
    let streams: Vec<_> = common::lists(&golden["prompts"])
        .into_iter()
        .map(|prompt| {
            let request = Request { prompt, max_tokens: 24, ignore_eos: true, ..Request::default() };
            engine.try_submit(request).unwrap()
        })
        .collect();
    let all = streams
        .into_iter()
        .map(|mut stream| {
            let mut tokens = vec![];
            while let Some(event) = stream.next_blocking() {
                if let Event::Token(t) = event {
                    tokens.push(u64::from(t.id));
                }
            }
            tokens
        })
        .collect();
    engine.shutdown().unwrap();
    all
}

#[test]
fn greedy_text_is_the_references_where_its_margin_is_wide() {
    let gpus = match available() {
        Ok(gpus) => gpus.len(),
        Err(e) => return eprintln!("NOT RUN for lack of a GPU: {e}"),
    };
    let golden = common::golden("tiny-glm-gqla");
    for path in [Path::Gqa, Path::Absorb] {
        for (world, share) in [(1, false), (2, gpus < 2), (4, true)] {
            let all = greedy(config("tiny-glm-gqla", path), world, share);
            for (i, tokens) in all.iter().enumerate() {
                let theirs = &golden["greedy"][i];
                let expected: Vec<u64> = serde_json::from_value(theirs["tokens"].clone()).unwrap();
                let margins: Vec<f64> = serde_json::from_value(theirs["margins"].clone()).unwrap();
                let sure = margins.iter().position(|m| *m < 0.25).unwrap_or(margins.len());
                let sure = sure.min(expected.len()).min(tokens.len());
                assert!(!tokens.is_empty());
                assert_eq!(tokens[..sure], expected[..sure], "{path} path, {world} ranks, prompt {i}");
            }
        }
    }
}
