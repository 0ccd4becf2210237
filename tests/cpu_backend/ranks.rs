//! A layer's MLPs as ranks compute them: slices of a real checkpoint, sums over a world of threads.

use std::path::PathBuf;

use gqla::backend::cpu::{CpuBackend, Tensor};
use gqla::backend::{Backend, ExpertSlices, Reduction, View};
use gqla::checkpoint::{Checkpoint, Slice};
use gqla::comm::threads::world;
use gqla::config::{Mlp, ModelConfig, Moe};
use gqla::model::shard::Shard;

use crate::support::*;

fn directory() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("checkpoints/tiny-glm-gqla")
}

/// One gated MLP's slices for a rank: gate and up, and down.
fn mlp<'a>(
    checkpoint: &'a Checkpoint,
    name: &str,
    hidden: usize,
    width: usize,
    shard: Shard,
) -> (Vec<Slice<'a>>, Vec<Slice<'a>>) {
    let mine = shard.range(width);
    let row = |part: &str| {
        checkpoint.slice(&format!("{name}.{part}.weight"), &[width, hidden], mine.clone(), 0..hidden).unwrap()
    };
    let down =
        checkpoint.slice(&format!("{name}.down_proj.weight"), &[hidden, width], 0..hidden, mine.clone()).unwrap();
    (vec![row("gate_proj"), row("up_proj")], vec![down])
}

/// Runs the dense MLP of one layer and the experts of another, each summed over the ranks.
fn rank(b: &mut CpuBackend, model: &ModelConfig, shard: Shard, x: &[f32]) -> Vec<f32> {
    let checkpoint = Checkpoint::open(&directory()).unwrap();
    let (hidden, n) = (model.hidden, x.len() / model.hidden);
    let layer = |wanted: fn(&Mlp) -> bool| model.mlp.iter().position(wanted).unwrap();
    b.begin(&rows(n)).unwrap();
    let ones = b.vector(&vec![1.0; hidden]).unwrap();
    let mut residual = tensor(b, x, hidden);
    let mut partial = b.tensor(n, hidden).unwrap();
    let mut out = b.tensor(n, hidden).unwrap();

    let dense = layer(|m| matches!(m, Mlp::Dense { .. }));
    let Mlp::Dense { width } = model.mlp[dense] else { unreachable!() };
    let (gate_up, down) = mlp(&checkpoint, &format!("model.layers.{dense}.mlp"), hidden, width, shard);
    let (gate_up, down) = (b.matrix(&gate_up, Reduction::Whole).unwrap(), b.matrix(&down, Reduction::Split).unwrap());
    let local = shard.range(width).len();
    let (mut wide, mut act) = (b.tensor(n, 2 * local).unwrap(), b.tensor(n, local).unwrap());
    b.linear(&gate_up, None, View::new(&residual, 0, hidden), &mut wide).unwrap();
    b.silu_mul(&wide, local, &mut act).unwrap();
    b.linear(&down, None, View::new(&act, 0, local), &mut partial).unwrap();
    b.all_reduce_add_norm(&mut partial, None, &mut residual, &ones, 1e-5, &mut out).unwrap();

    let sparse = layer(|m| *m == Mlp::Sparse);
    experts(b, model, &checkpoint, &format!("model.layers.{sparse}.mlp"), shard, &out, &mut partial);
    let mut last = b.tensor(n, hidden).unwrap();
    b.all_reduce_add_norm(&mut partial, None, &mut residual, &ones, 1e-5, &mut last).unwrap();
    [b.read(&residual, n).unwrap(), b.read(&last, n).unwrap()].concat()
}

fn experts(
    b: &mut CpuBackend,
    model: &ModelConfig,
    checkpoint: &Checkpoint,
    name: &str,
    shard: Shard,
    x: &Tensor,
    out: &mut Tensor,
) {
    let (hidden, moe) = (model.hidden, model.moe.as_ref().unwrap());
    let each = (0..moe.experts).map(|e| (format!("{name}.experts.{e}"), moe.width));
    let all = each.chain((moe.shared_width > 0).then(|| (format!("{name}.shared_experts"), moe.shared_width)));
    let (gate_up, down) = all.map(|(name, width)| mlp(checkpoint, &name, hidden, width, shard)).unzip();
    let local =
        Moe { width: shard.range(moe.width).len(), shared_width: shard.range(moe.shared_width).len(), ..moe.clone() };
    let experts = b.experts(&ExpertSlices { gate_up, down }, &local).unwrap();
    let gate =
        checkpoint.slice(&format!("{name}.gate.weight"), &[moe.experts, hidden], 0..moe.experts, 0..hidden).unwrap();
    let gate = b.matrix(&[gate], Reduction::Whole).unwrap();
    let bias = checkpoint.vector(&format!("{name}.gate.e_score_correction_bias"), moe.experts).unwrap();
    let mut routing = b.routing(x.rows(), moe).unwrap();
    b.route(moe, &gate, Some(&bias), x, &mut routing).unwrap();
    b.moe(&experts, &routing, x, out).unwrap();
}

#[test]
fn a_world_of_threads_gives_the_bits_of_one_rank() {
    let mut random = Random::new();
    let model = ModelConfig::load(&directory()).unwrap();
    let x = random.floats(7 * model.hidden);
    let run = |size: usize| -> Vec<Vec<u32>> {
        std::thread::scope(|scope| {
            let ranks: Vec<_> = world(size)
                .into_iter()
                .enumerate()
                .map(|(at, comm)| {
                    let (model, x) = (&model, &x);
                    scope.spawn(move || {
                        let mut b = CpuBackend::new(Box::new(comm), 1).unwrap();
                        bits(&rank(&mut b, model, Shard { rank: at, world: size }, x))
                    })
                })
                .collect();
            ranks.into_iter().map(|r| r.join().unwrap()).collect()
        })
    };
    let one = run(1).remove(0);
    for size in [2, 4, 8] {
        for (at, result) in run(size).into_iter().enumerate() {
            assert!(result == one, "rank {at} of {size} differs");
        }
    }
}
