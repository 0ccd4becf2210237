//! The CPU backend against transformers' float32 outputs: logits, greedy tokens, perplexity.

#[path = "common/model.rs"]
mod model;

use gqla::comm::one::OneComm;
use gqla::engine::scorer::Scorer;
use gqla::engine::{Engine, Event, Reason, Request};
use gqla::model::shard::Path;

/// Every checkpoint with every path that it has.
fn cases() -> Vec<(&'static str, Path)> {
    let mut cases = vec![("tiny-llama-gqa", Path::Gqa)];
    for name in model::LATENT.into_iter().chain(model::FIXTURES) {
        cases.extend([(name, Path::Gqa), (name, Path::Absorb)]);
    }
    cases
}

#[test]
fn logits_match_the_reference() {
    for (name, path) in cases() {
        let prompts = model::lists(&model::golden(name)["prompts"]);
        let ours = model::logits(&model::config(name, Some(path)), 1, &prompts);
        for (i, (rows, golden)) in model::golden_logits(name).iter().enumerate() {
            let vocab = golden.len() / rows;
            let (error, size) = model::difference(&ours[i][ours[i].len() - rows * vocab..], golden);
            assert!(error <= 1e-4 * (1.0 + size), "{name} {path} prompt {i}: {error} of {size}");
        }
    }
}

#[test]
fn greedy_tokens_match_up_to_the_first_close_choice() {
    for (name, path) in cases() {
        let golden = model::golden(name);
        let engine = Engine::start(model::config(name, Some(path)), Box::new(OneComm::new())).unwrap();
        // All prompts at once: they share steps.
        let length = golden["greedy"][0]["tokens"].as_array().unwrap().len();
        let streams: Vec<_> = model::lists(&golden["prompts"])
            .into_iter()
            .map(|prompt| {
                let request = Request { prompt, max_tokens: length, ignore_eos: true, ..Request::default() };
                engine.try_submit(request).unwrap()
            })
            .collect();
        for (i, mut stream) in streams.into_iter().enumerate() {
            let mut tokens: Vec<u64> = vec![];
            while let Some(event) = stream.next_blocking() {
                match event {
                    Event::Token(t) => tokens.push(u64::from(t.id)),
                    Event::Finished(f) => assert_eq!((f.reason, f.tokens), (Reason::Length, length)),
                    other => panic!("{name} {path} prompt {i}: {other:?}"),
                }
            }
            let theirs = &golden["greedy"][i];
            let expected: Vec<u64> = serde_json::from_value(theirs["tokens"].clone()).unwrap();
            let margins: Vec<f64> = serde_json::from_value(theirs["margins"].clone()).unwrap();
            let sure = margins.iter().position(|m| *m < 0.01).unwrap_or(margins.len()).min(expected.len());
            assert_eq!(tokens[..sure], expected[..sure], "{name} {path} prompt {i}");
        }
        engine.shutdown().unwrap();
    }
}

#[test]
fn perplexity_matches_the_reference() {
    let text = std::fs::read(model::at("tests/data/held-out.u16")).unwrap();
    let tokens: Vec<u32> = text.chunks_exact(2).map(|b| u32::from(u16::from_le_bytes([b[0], b[1]]))).collect();
    for name in ["tiny-glm-gqla", "tiny-glm-mla", "tiny-llama-gqa"] {
        let mut config = model::config(name, None);
        (config.step_tokens, config.threads) = (512, None);
        let mut scorer = Scorer::start(&config, Box::new(OneComm::new())).unwrap();
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
        let expected = model::golden(name)["held_out_ppl_200x512_fp32"].as_f64().unwrap();
        let perplexity = (nll / f64::from(count)).exp();
        assert!((perplexity / expected - 1.0).abs() < 1e-3, "{name}: {perplexity}, reference {expected}");
    }
}
