//! What a rank takes of its GPU, beside what was planned before anything was loaded.

use gqla::backend::cuda::{CudaBackend, CudaOptions, available};
use gqla::backend::{Backend, Batch};
use gqla::checkpoint::Checkpoint;
use gqla::comm::one::OneComm;
use gqla::config::ModelConfig;
use gqla::model::Model;
use gqla::model::shard::{Path, Shard};
use gqla::plan::shapes;

use crate::engine::common;
use crate::support::*;

#[test]
fn the_driver_counts_what_was_planned_to_3_percent() {
    if let Err(e) = available() {
        return eprintln!("NOT RUN for lack of a GPU: {e}");
    }
    let mut random = Random::new();
    for (name, path, tokens) in [
        ("tiny-glm-gqla", Path::Gqa, 64 << 10),
        ("tiny-llama-gqa", Path::Gqa, 64 << 10),
        ("realhead-h32g8", Path::Absorb, 64 << 10),
        ("llama-3-8b", Path::Gqa, 64 << 10),
        ("llama-3-8b-gqla", Path::Absorb, 128 << 10),
        ("deepseek-v2-lite", Path::Absorb, 64 << 10),
    ] {
        let (config, checkpoint) = match shapes::named(name) {
            Some(config) => (config, Checkpoint::dummy(0)),
            None => {
                let directory = common::checkpoint(name).0;
                (ModelConfig::load(&directory).unwrap(), Checkpoint::open(&directory).unwrap())
            }
        };
        let max_context = config.max_position.min(8192);
        let options = CudaOptions { max_rows: 512, max_sequences: 64, max_context, ..CudaOptions::default() };
        let mut b = CudaBackend::new(Box::new(OneComm::new()), options).unwrap();
        let owned = Shard::ONE.owned(&config, path).unwrap();
        let budget = b.budget(&config, &owned).unwrap().unwrap();
        let (free, _) = b.gpu().memory().unwrap();
        let blocks = tokens / 64;
        let planned = budget.weights + b.budget_cache(&budget, blocks) + budget.workspace;
        if planned > free {
            eprintln!("{name}: {} GiB do not fit here", planned >> 30);
            continue;
        }
        let mut model = Model::load(&b, &checkpoint, &config, &owned, blocks, 512, max_context, &|_, _| ()).unwrap();
        b.loaded();
        b.synchronize().unwrap();
        let loaded = b.memory_taken().unwrap();
        let mut logits = vec![];
        let decode: Vec<_> = (0..64).map(|i| (1, 100 + i)).collect();
        for spans in [vec![(512, 512)], decode.clone(), decode[..8].to_vec(), vec![(1, 900)]] {
            // Every step records a graph of its own the first time, and replays it the second.
            let batch = random.batch(&spans);
            let outputs = if spans[0].0 == 1 { batch.outputs.clone() } else { vec![511] };
            let batch = Batch { outputs, ..batch };
            for _ in 0..2 {
                model.forward(&mut b, &batch, false).unwrap();
                model.logits(&mut b, &mut logits).unwrap();
            }
        }
        let taken = b.memory_taken().unwrap();
        let mib = |bytes: usize| bytes as f64 / f64::from(1 << 20);
        let off = |taken: usize, planned: usize| (taken as f64 / planned as f64 - 1.0) * 100.0;
        eprintln!(
            "{name}, {path} path: planned {:.0} MiB, of which {:.0} later; the driver counts {:.0} when loaded ({:+.2} %), \
             {:.0} after the first steps ({:+.2} %)",
            mib(planned),
            mib(budget.later),
            mib(loaded),
            off(loaded, planned - budget.later),
            mib(taken),
            off(taken, planned),
        );
        assert!(off(taken, planned).abs() < 3.0, "{name}: planned {planned} bytes, taken {taken}");
    }
}
