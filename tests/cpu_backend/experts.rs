//! The router's choice and the experts' sum.

use gqla::backend::cpu::simd::Isa;
use gqla::backend::cpu::{CpuBackend, Experts, HostRows, Routing};
use gqla::backend::{Backend, Reduction};
use gqla::comm::tree_sum;
use gqla::config::{Moe, Scoring};

use crate::support::*;

fn moe_config(random: &mut Random) -> Moe {
    Moe {
        experts: 12,
        top_k: 1 + random.below(4),
        width: random.pick(&[8, 24, 40, 64, 13]),
        shared_width: random.pick(&[0, 16, 48, 7]),
        scoring: Scoring::NoAuxTc,
        groups: 1,
        top_groups: 1,
        normalise: random.coin(),
        scale: 1.8,
    }
}

/// Routes tokens whose router products are exactly `logits` `[rows, experts]`.
fn route(moe: &Moe, bias: Option<&Vec<f32>>, logits: &[f32]) -> Vec<(Vec<u32>, Vec<f32>)> {
    let n = logits.len() / moe.experts;
    // One-hot inputs pick the gate's columns.
    let gate: Vec<f32> = (0..moe.experts).flat_map(|e| (0..n).map(move |r| logits[r * moe.experts + e])).collect();
    let hot: Vec<f32> = (0..n * n).map(|i| if i / n == i % n { 1.0 } else { 0.0 }).collect();
    let mut results = Vec::new();
    for mut b in variants() {
        b.begin(&rows(n)).unwrap();
        let gate = b.matrix_of(&[HostRows::F32(&gate, n)], Reduction::Whole).unwrap();
        let mut routing = b.routing(n, moe).unwrap();
        b.route(moe, &gate, bias, &tensor(&b, &hot, n), &mut routing).unwrap();
        results.push((0..n).map(|r| (routing.row(r).0.to_vec(), routing.row(r).1.to_vec())).collect::<Vec<_>>());
    }
    assert!(results.iter().all(|r| *r == results[0]));
    results.swap_remove(0)
}

/// SPEC.md section 2 in f64.
fn naive_choice(moe: &Moe, bias: Option<&Vec<f32>>, logits: &[f32]) -> (Vec<u32>, Vec<f64>) {
    let mut scores: Vec<f64> = logits.iter().map(|&l| l as f64).collect();
    if moe.scoring == Scoring::NoAuxTc {
        scores.iter_mut().for_each(|s| *s = 1.0 / (1.0 + (-*s).exp()));
    } else {
        let sum: f64 = scores.iter().map(|s| s.exp()).sum();
        scores.iter_mut().for_each(|s| *s = s.exp() / sum);
    }
    let mut choice = scores.clone();
    if moe.scoring == Scoring::NoAuxTc {
        choice.iter_mut().zip(bias.into_iter().flatten()).for_each(|(c, b)| *c += *b as f64);
    }
    let descending = |values: &[f64]| {
        let mut order: Vec<usize> = (0..values.len()).collect();
        order.sort_by(|&a, &b| values[b].total_cmp(&values[a]).then(a.cmp(&b)));
        order
    };
    if moe.scoring != Scoring::SoftmaxGreedy {
        let size = moe.experts / moe.groups;
        let best = if moe.scoring == Scoring::NoAuxTc { 2 } else { 1 };
        let group_scores: Vec<f64> =
            choice.chunks(size).map(|g| descending(g).iter().take(best).map(|&i| g[i]).sum()).collect();
        for &group in &descending(&group_scores)[moe.top_groups..] {
            choice[group * size..][..size].fill(f64::NEG_INFINITY);
        }
    }
    let chosen: Vec<usize> = descending(&choice)[..moe.top_k].to_vec();
    let mut weights: Vec<f64> = chosen.iter().map(|&e| scores[e]).collect();
    let sum = if moe.normalise { weights.iter().sum::<f64>() + 1e-20 } else { 1.0 };
    weights.iter_mut().for_each(|w| *w *= moe.scale as f64 / sum);
    (chosen.iter().map(|&e| e as u32).collect(), weights)
}

#[test]
fn every_way_of_routing_chooses_as_the_spec_says() {
    let mut random = Random::new();
    for scoring in [Scoring::NoAuxTc, Scoring::SoftmaxGreedy, Scoring::SoftmaxGroupLimited] {
        for (groups, top_groups) in [(1, 1), (4, 2), (3, 1), (4, 4)] {
            let moe = Moe { scoring, groups, top_groups, top_k: 1 + random.below(3), ..moe_config(&mut random) };
            let bias = (scoring == Scoring::NoAuxTc).then(|| random.floats(moe.experts));
            let logits: Vec<f32> = random.floats(17 * moe.experts).iter().map(|l| l * 4.0).collect();
            for ((chosen, weights), logits) in
                route(&moe, bias.as_ref(), &logits).iter().zip(logits.chunks(moe.experts))
            {
                let want = naive_choice(&moe, bias.as_ref(), logits);
                assert_eq!(*chosen, want.0, "{moe:?}");
                close(weights, &want.1, 1e-6);
            }
        }
    }
}

#[test]
fn ties_go_to_the_lower_expert_and_group() {
    let mut random = Random::new();
    for scoring in [Scoring::NoAuxTc, Scoring::SoftmaxGreedy, Scoring::SoftmaxGroupLimited] {
        let moe = Moe { scoring, groups: 4, top_groups: 2, top_k: 3, ..moe_config(&mut random) };
        // Groups of three: {0,5,1} {5,0,1} {1,5,0} {1,1,1}: three groups score alike.
        let logits = [0.0, 5.0, 1.0, 5.0, 0.0, 1.0, 1.0, 5.0, 0.0, 1.0, 1.0, 1.0];
        let expected = if scoring == Scoring::SoftmaxGreedy { [1, 3, 7] } else { [1, 3, 2] };
        assert_eq!(route(&moe, None, &logits)[0].0, expected, "{scoring:?}");
        assert_eq!(route(&moe, None, &[2.0; 12])[0].0, [0, 1, 2], "{scoring:?}");
    }
}

/// Weights of experts, the shared one last.
struct Layer {
    moe: Moe,
    hidden: usize,
    gate_up: Vec<Weight>,
    down: Vec<Weight>,
    gate: Weight,
}

impl Layer {
    fn random(random: &mut Random, moe: Moe, hidden: usize) -> Layer {
        let widths: Vec<usize> = std::iter::repeat_n(moe.width, moe.experts)
            .chain((moe.shared_width > 0).then_some(moe.shared_width))
            .collect();
        Layer {
            gate_up: widths.iter().map(|w| Weight::random(random, 2 * w, hidden)).collect(),
            down: widths.iter().map(|&w| Weight::random(random, hidden, w)).collect(),
            gate: Weight::random(random, moe.experts, hidden),
            moe,
            hidden,
        }
    }

    /// What rank `rank` of `world` holds.
    fn experts(&self, b: &CpuBackend, rank: usize, world: usize) -> Experts {
        let range = |w: usize| w * rank / world..w * (rank + 1) / world;
        let mut gate_up = Vec::new();
        let mut down = Vec::new();
        for (g, d) in self.gate_up.iter().zip(&self.down) {
            let mine = range(d.cols);
            gate_up.push([
                g.part(mine.clone(), 0..self.hidden),
                g.part(d.cols + mine.start..d.cols + mine.end, 0..self.hidden),
            ]);
            down.push(d.part(0..self.hidden, mine));
        }
        let gate_up: Vec<Vec<HostRows>> = gate_up.iter().map(|g| g.iter().map(Weight::host).collect()).collect();
        let down: Vec<Vec<HostRows>> = down.iter().map(|d| vec![d.host()]).collect();
        let local = Moe {
            width: range(self.moe.width).len(),
            shared_width: range(self.moe.shared_width).len(),
            ..self.moe.clone()
        };
        b.experts_of(&gate_up, &down, &local).unwrap()
    }

    fn run(&self, b: &mut CpuBackend, experts: &Experts, x: &[f32]) -> (Vec<f32>, Routing) {
        let n = x.len() / self.hidden;
        b.begin(&rows(n)).unwrap();
        let x = tensor(b, x, self.hidden);
        let mut routing = b.routing(n, &self.moe).unwrap();
        b.route(&self.moe, &self.gate.matrix(b, Reduction::Whole), None, &x, &mut routing).unwrap();
        let mut out = tensor(b, &vec![f32::NAN; n * self.hidden], self.hidden);
        b.moe(experts, &routing, &x, &mut out).unwrap();
        (b.read(&out, n).unwrap(), routing)
    }

    fn mlp(&self, e: usize, x: &[f32]) -> Vec<f64> {
        let width = self.down[e].cols;
        let act: Vec<f64> = (0..width)
            .map(|i| {
                let (gate, up) = (dot(x, self.gate_up[e].row(i)), dot(x, self.gate_up[e].row(width + i)));
                gate / (1.0 + (-gate).exp()) * up
            })
            .collect();
        (0..self.hidden).map(|h| self.down[e].row(h).iter().zip(&act).map(|(&w, a)| w as f64 * a).sum()).collect()
    }
}

#[test]
fn the_experts_sum_is_weighted_and_the_shared_one_is_not() {
    let mut random = Random::new();
    for _ in 0..8 {
        let moe = moe_config(&mut random);
        let layer = Layer::random(&mut random, moe, 37);
        let n = random.pick(&[1, 2, 9, 230]);
        let x = random.floats(n * 37);
        let mut b = backend();
        let experts = layer.experts(&b, 0, 1);
        let (out, routing) = layer.run(&mut b, &experts, &x);
        let mut want = Vec::new();
        for (r, x) in x.chunks(37).enumerate() {
            let mut sum = vec![0.0; 37];
            let (chosen, weights) = routing.row(r);
            let shared = (layer.moe.shared_width > 0).then_some((layer.moe.experts, 1.0));
            let all = chosen.iter().zip(weights).map(|(&e, &w)| (e as usize, w as f64));
            for (e, w) in all.chain(shared) {
                sum.iter_mut().zip(layer.mlp(e, x)).for_each(|(s, y)| *s += w * y);
            }
            want.extend(sum);
        }
        close(&out, &want, 3e-6);
    }
}

#[test]
fn a_token_does_not_depend_on_the_others() {
    let mut random = Random::new();
    for _ in 0..4 {
        let moe = moe_config(&mut random);
        let layer = Layer::random(&mut random, moe, 50);
        let x = random.floats(120 * 50);
        let mut b = backend();
        let experts = layer.experts(&b, 0, 1);
        let (together, _) = layer.run(&mut b, &experts, &x);
        let mut first = 0;
        while first < 120 {
            let some = (1 + random.below(30)).min(120 - first);
            let (apart, _) = layer.run(&mut b, &experts, &x[first * 50..][..some * 50]);
            assert_eq!(bits(&apart), bits(&together[first * 50..][..some * 50]));
            first += some;
        }
    }
}

#[test]
fn world_sizes_instruction_sets_and_threads_give_the_same_bits() {
    let mut random = Random::new();
    for _ in 0..4 {
        let moe = Moe {
            width: random.pick(&[8, 24, 64]),
            shared_width: random.pick(&[0, 16, 40]),
            ..moe_config(&mut random)
        };
        let layer = Layer::random(&mut random, moe, 41);
        let n = random.pick(&[1, 7, 33]);
        let x = random.floats(n * 41);
        let results: Vec<_> = variants()
            .iter_mut()
            .map(|b| {
                let experts = layer.experts(b, 0, 1);
                bits(&layer.run(b, &experts, &x).0)
            })
            .collect();
        assert!(results.iter().all(|r| *r == results[0]));
        for world in [2, 4, 8] {
            let mut parts = Vec::new();
            for rank in 0..world {
                let mut b = backend_of(Isa::detect(), 2, world);
                let experts = layer.experts(&b, rank, world);
                parts.extend(layer.run(&mut b, &experts, &x).0);
            }
            let mut sum = vec![0.0; n * 41];
            tree_sum(&mut parts, n * 41, &mut sum);
            assert_eq!(bits(&sum), results[0], "{world} ranks, {:?}", layer.moe);
        }
    }
}
