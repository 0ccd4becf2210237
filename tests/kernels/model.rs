//! Whole steps of the bundled checkpoints: the GPU against the CPU, and recorded steps against the same steps run.

use gqla::backend::cpu::CpuBackend;
use gqla::backend::cuda::{CudaBackend, CudaOptions, available};
use gqla::backend::{Backend, Batch, Span};
use gqla::cache::BLOCK;
use gqla::checkpoint::Checkpoint;
use gqla::comm::one::OneComm;
use gqla::config::ModelConfig;
use gqla::model::Model;
use gqla::model::shard::{Path, Shard};

use crate::engine::common;
use crate::support::*;

const CONTEXT: usize = 512;

fn load<B: Backend>(b: &B, name: &str, path: Path) -> Model<B> {
    load_shard(b, name, path, Shard::ONE)
}

/// One rank of a bundled checkpoint or fixture.
pub fn load_shard<B: Backend>(b: &B, name: &str, path: Path, shard: Shard) -> Model<B> {
    let directory = common::checkpoint(name).0;
    let config = ModelConfig::load(&directory).unwrap();
    let owned = shard.owned(&config, path).unwrap();
    let checkpoint = Checkpoint::open(&directory).unwrap();
    Model::load(b, &checkpoint, &config, &owned, 64, 128, CONTEXT, &|_, _| ()).unwrap()
}

/// A sequence's part of a step: tokens at positions `from..`, in blocks of its own.
fn add(batch: &mut Batch, sequence: usize, from: usize, tokens: &[u32], outputs: bool) {
    let first = batch.rows();
    let context = from + tokens.len();
    batch.tokens.extend(tokens);
    batch.positions.extend((from..context).map(|p| p as u32));
    let blocks = (0..context.div_ceil(BLOCK)).map(|b| (b * 7 + sequence) as u32).collect();
    batch.spans.push(Span { first, rows: tokens.len(), context, blocks });
    if outputs {
        batch.outputs.extend(first as u32..batch.rows() as u32);
    }
}

/// Prompts, then decode steps of a growing number of sequences on the tokens that the CPU finds best.
pub fn steps(random: &mut Random, vocab: usize) -> Vec<Batch> {
    let mut token = || random.below(vocab) as u32;
    let lengths = [70, 5, 64, 33, 1];
    let mut all = vec![];
    for (s, &n) in lengths.iter().enumerate() {
        let mut batch = Batch::default();
        let tokens: Vec<u32> = (0..n).map(|_| token()).collect();
        add(&mut batch, s, 0, &tokens, true);
        all.push(batch);
    }
    for step in 0..6 {
        let mut batch = Batch::default();
        for (s, &n) in lengths.iter().enumerate().take([5, 5, 3, 3, 5, 1][step]) {
            add(&mut batch, s, n + step, &[token()], true);
        }
        all.push(batch);
    }
    // Two rows a sequence, then decode and prefill together.
    let mut batch = Batch::default();
    for (s, &n) in lengths.iter().enumerate().take(3) {
        add(&mut batch, s, n + 6, &[token(), token()], true);
    }
    all.push(batch);
    let mut batch = Batch::default();
    add(&mut batch, 0, lengths[0] + 8, &[token()], true);
    add(&mut batch, 5, 0, &(0..40).map(|_| token()).collect::<Vec<_>>(), true);
    all.push(batch);
    all
}

#[test]
fn steps_of_checkpoints_agree_with_the_cpu_and_recorded_ones_with_those_that_ran() {
    if let Err(e) = available() {
        return eprintln!("NOT RUN for lack of a GPU: {e}");
    }
    let mut random = Random::new();
    for (name, path) in [
        ("tiny-glm-gqla", Path::Gqa),
        ("tiny-glm-gqla", Path::Absorb),
        ("tiny-llama-gqa", Path::Gqa),
        ("realhead-h32g8", Path::Gqa),
        ("realhead-h32g8", Path::Absorb),
        ("oddheads-yarn-moe", Path::Absorb),
        ("deepseek-v3-mla", Path::Gqa),
    ] {
        let options = CudaOptions { max_rows: 128, max_sequences: 8, max_context: CONTEXT, ..CudaOptions::default() };
        let eager = CudaOptions { graphs: false, ..options.clone() };
        let mut gpu = CudaBackend::new(Box::new(OneComm::new()), options).unwrap();
        let mut plain = CudaBackend::new(Box::new(OneComm::new()), eager).unwrap();
        let mut cpu = CpuBackend::new(Box::new(OneComm::new()), 16).unwrap();
        let mut on_gpu = load(&gpu, name, path);
        let mut on_plain = load(&plain, name, path);
        let mut on_cpu = load(&cpu, name, path);
        let (mut agreed, mut rows, mut close) = (0, 0, 0);
        for (i, batch) in steps(&mut random, on_cpu.config.vocab).iter().enumerate() {
            let (mut g, mut e, mut c) = (vec![], vec![], vec![]);
            let mut best = vec![];
            on_gpu.forward(&mut gpu, batch, i % 2 == 0).unwrap();
            on_gpu.logits(&mut gpu, &mut g).unwrap();
            on_plain.forward(&mut plain, batch, true).unwrap();
            on_plain.logits(&mut plain, &mut e).unwrap();
            on_cpu.forward(&mut cpu, batch, false).unwrap();
            on_cpu.logits(&mut cpu, &mut c).unwrap();
            let what = format!("{name} on the {path} path, step {i}");
            let vocab = on_cpu.config.vocab;
            close += rows_within(&what, &e, &c, vocab, 0.06);
            // Padding rows are not in the way: the same kernels, the same bits.
            rows_close(&format!("{what}, recorded"), &g, &e, vocab, 0.02, 0.9);
            on_plain.best(&mut plain, &mut best).unwrap();
            for (row, best) in c.chunks(on_cpu.config.vocab).zip(&best) {
                rows += 1;
                let top = row.iter().fold(f32::MIN, |a, &b| a.max(b));
                agreed += usize::from(row[best.1 as usize] >= top - 0.25);
            }
        }
        // The bundled checkpoints are trained; the fixtures' weights are random.
        let tenths = if name.starts_with("tiny") { 9 } else { 5 };
        assert!(close * 10 >= rows * tenths, "{name} on the {path} path: {close} of {rows} rows are within 6e-2");
        assert!(agreed * 10 >= rows * tenths, "{name} on the {path} path: {agreed} of {rows} best tokens");
        assert!(gpu.replays() > 0, "no step was replayed");
        assert_eq!(plain.replays(), 0);
    }
}
