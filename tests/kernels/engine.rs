//! The engine on GPUs, from tokens to text: perplexity, greedy text, several ranks.

use gqla::backend::cuda::{AllReduce, available};
use gqla::comm::one::OneComm;
use gqla::engine::device::Device;
use gqla::engine::scorer::Scorer;
use gqla::engine::setup::Config;
use gqla::engine::{Engine, Event, Request, Sampling};
use gqla::model::shard::Path;

#[path = "../common/model.rs"]
pub mod common;

/// The trained checkpoints with their paths.
const CASES: [(&str, Path); 5] = [
    ("tiny-glm-gqla", Path::Gqa),
    ("tiny-glm-gqla", Path::Absorb),
    ("tiny-glm-mla", Path::Gqa),
    ("tiny-glm-mla", Path::Absorb),
    ("tiny-llama-gqa", Path::Gqa),
];

fn config(name: &str, path: Path) -> Config {
    let mut config = common::config(name, Some(path));
    config.device.device = Device::Cuda;
    config.step_tokens = 512;
    config
}

/// The held-out text in windows of 512 tokens.
fn windows(count: usize) -> Vec<Vec<u32>> {
    let text = std::fs::read(common::at("tests/data/held-out.u16")).unwrap();
    let tokens: Vec<u32> = text.chunks_exact(2).map(|b| u32::from(u16::from_le_bytes([b[0], b[1]]))).collect();
    tokens.chunks_exact(512).take(count).map(<[u32]>::to_vec).collect()
}

/// Log-probabilities in f64.
fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let most = logits.iter().fold(f32::MIN, |a, &b| a.max(b));
    let sum: f64 = logits.iter().map(|l| f64::from(l - most).exp()).sum();
    logits.iter().map(|l| f64::from(l - most) - sum.ln()).collect()
}

#[test]
fn perplexity_is_the_float32_figure_to_half_a_percent() {
    if let Err(e) = available() {
        return eprintln!("NOT RUN for lack of a GPU: {e}");
    }
    let (count, windows) = (200, windows(200));
    assert_eq!(windows.len(), count);
    for (name, path) in CASES {
        let mut scorer = Scorer::start(&config(name, path), Box::new(OneComm::new())).unwrap();
        let (mut nll, mut count) = (0f64, 0);
        for window in &windows {
            scorer
                .logits(window, |position, logits| {
                    if let Some(next) = window.get(position + 1) {
                        nll -= log_softmax(logits)[*next as usize];
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

/// float32 is the CPU backend's, which `tests/reference.rs` holds to transformers' within 1e-4.
#[test]
fn distributions_are_within_2e_3_nats_of_float32s() {
    if let Err(e) = available() {
        return eprintln!("NOT RUN for lack of a GPU: {e}");
    }
    for (name, path) in CASES {
        let mut exact = config(name, path);
        (exact.device.device, exact.threads) = (Device::Cpu, None);
        let mut cpu = Scorer::start(&exact, Box::new(OneComm::new())).unwrap();
        let mut gpu = Scorer::start(&config(name, path), Box::new(OneComm::new())).unwrap();
        let (mut sum, mut count) = (0f64, 0);
        for window in windows(8) {
            let (mut exact, mut ours) = (vec![], vec![]);
            cpu.logits(&window, |_, logits| exact.push(log_softmax(logits))).unwrap();
            gpu.logits(&window, |_, logits| ours.push(log_softmax(logits))).unwrap();
            assert_eq!(exact.len(), ours.len());
            for (p, q) in exact.iter().zip(&ours) {
                sum += p.iter().zip(q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>();
                count += 1;
            }
        }
        cpu.finish().unwrap();
        gpu.finish().unwrap();
        let kl = sum / f64::from(count);
        eprintln!("{name} on the {path} path: KL to float32 {kl:.2e} nats a token over {count} tokens");
        assert!(kl < 2e-3, "{name} {path}: {kl}");
    }
}

#[test]
fn logits_of_real_head_sizes_are_within_2_percent_of_the_references() {
    if let Err(e) = available() {
        return eprintln!("NOT RUN for lack of a GPU: {e}");
    }
    let name = "realhead-h32g8";
    let prompts = common::lists(&common::golden(name)["prompts"]);
    for path in [Path::Gqa, Path::Absorb] {
        let ours = common::logits(&config(name, path), 1, &prompts);
        for (i, (rows, golden)) in common::golden_logits(name).iter().enumerate() {
            let vocab = golden.len() / rows;
            let (error, size) = common::difference(&ours[i][ours[i].len() - rows * vocab..], golden);
            eprintln!("{name} on the {path} path, prompt {i}: {:.1e} of the largest logit", error / size);
            assert!(error < 2e-2 * size, "{name} {path} prompt {i}: {error} of {size}");
        }
    }
}

/// Continuations of all of `name`'s prompts at once, on `world` ranks, each with a seed of its own.
fn continued(name: &str, config: Config, world: usize, like: &Request) -> Vec<Vec<u64>> {
    let engine = Engine::start_threads(config, world).unwrap();
    let streams: Vec<_> = common::lists(&common::golden(name)["prompts"])
        .into_iter()
        .enumerate()
        .map(|(i, prompt)| {
            let mut request = Request { prompt, max_tokens: 48, ignore_eos: true, ..like.clone() };
            request.sampling.seed = Some(7 + i as u64);
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

/// Both paths, one rank and two, four and eight ranks on shared GPUs: all give float32's text wherever float32 is sure of
/// it, and so the same one.
#[test]
fn greedy_text_is_float32s_on_both_paths_and_at_every_world_size() {
    let gpus = match available() {
        Ok(gpus) => gpus.len(),
        Err(e) => return eprintln!("NOT RUN for lack of a GPU: {e}"),
    };
    for (name, path) in [("tiny-glm-gqla", Path::Gqa), ("tiny-glm-gqla", Path::Absorb), ("tiny-llama-gqa", Path::Gqa)] {
        let golden = common::golden(name);
        let mut alone = vec![];
        let mut ways: Vec<_> =
            [(1, false), (2, gpus < 2), (4, true), (8, true)].map(|(w, share)| (w, share, AllReduce::Auto)).into();
        if gpus >= 2 {
            ways.extend([(2, false, AllReduce::Nccl), (2, false, AllReduce::OneShot)]);
        }
        for (world, share, all_reduce) in ways {
            let mut config = config(name, path);
            (config.device.share_gpus, config.device.all_reduce) = (share, all_reduce);
            let all = continued(name, config, world, &Request::default());
            let (mut same, mut sure, mut whole) = (0, 0, 0);
            for (i, tokens) in all.iter().enumerate() {
                let theirs = &golden["greedy"][i];
                let expected: Vec<u64> = serde_json::from_value(theirs["tokens"].clone()).unwrap();
                let margins: Vec<f64> = serde_json::from_value(theirs["margins"].clone()).unwrap();
                let upto = margins.iter().position(|m| *m < 0.25).unwrap_or(margins.len());
                let upto = upto.min(expected.len()).min(tokens.len());
                assert_eq!(tokens.len(), 48);
                assert_eq!(
                    tokens[..upto],
                    expected[..upto],
                    "{name}, {path} path, {world} ranks, {all_reduce:?}, prompt {i}"
                );
                sure += upto;
                whole += tokens.len();
                same += alone
                    .get(i)
                    .map_or(tokens.len(), |one: &Vec<u64>| one.iter().zip(tokens).take_while(|(a, b)| a == b).count());
            }
            let how = if share { " on shared GPUs" } else { "" };
            eprintln!("{name}, {path} path, {world} ranks{how}: {same} of {whole} tokens as one rank's, {sure} sure");
            assert!(sure > 0);
            if world == 1 {
                alone = all;
            }
        }
    }
}

#[test]
fn the_gpus_choose_what_the_host_would() {
    let gpus = match available() {
        Ok(gpus) => gpus.len(),
        Err(e) => return eprintln!("NOT RUN for lack of a GPU: {e}"),
    };
    let name = "tiny-glm-gqla";
    let sampling = Sampling { temperature: 0.9, ..Sampling::default() };
    let by_gpu = Request { sampling, ..Request::default() };
    // Log-probabilities bring the logits to rank 0, which then chooses.
    let by_host = Request { logprobs: Some(0), ..by_gpu.clone() };
    let mut ways = vec![(1, AllReduce::Auto)];
    if gpus >= 2 {
        ways.extend([(2, AllReduce::Nccl), (2, AllReduce::OneShot)]);
    }
    for (world, all_reduce) in ways {
        let mut config = config(name, Path::Gqa);
        config.device.all_reduce = all_reduce;
        let chosen = continued(name, config.clone(), world, &by_gpu);
        let again = continued(name, config.clone(), world, &by_gpu);
        let host = continued(name, config, world, &by_host);
        assert_eq!(chosen, again, "{world} ranks, {all_reduce:?}");
        assert_eq!(chosen, host, "{world} ranks, {all_reduce:?}");
        assert!(chosen.windows(2).any(|w| w[0] != w[1]) && chosen.iter().all(|c| c.len() == 48));
    }
}
