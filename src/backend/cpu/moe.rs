//! Mixture of experts: the router's choice, and the experts' MLPs, each expert's weights read once a step.
//!
//! A token's result is the sum over its experts in ascending order, the shared one last, whatever else is in the
//! batch. The down projections' reduction is cut into the same pieces as any split matrix ([`linear`](super::linear)):
//! experts are summed within a piece, then the pieces as a tree.

use super::Workers;
use super::buffer::{Matrix, Shared};
use super::linear::{Input, Outputs, Product, ROW_BLOCK, dots, tree};
use super::ops::{ExpSum, Sigmoid, SiluMul};
use super::simd::Isa;
use crate::config::{Moe, Scoring};
use crate::error::{Error, Result};

/// Outputs a task takes.
const STRIP: usize = 32;

/// The experts of one layer, this rank's columns.
pub struct Experts {
    pub(super) routed: Mlps,
    /// The shared experts, one MLP.
    pub(super) shared: Option<Mlps>,
    /// Pieces of the down projections' reduction.
    pub(super) segments: usize,
    pub(super) hidden: usize,
}

/// Gated MLPs of one width, one under the other.
pub(super) struct Mlps {
    /// `[count·2·width, hidden]`, each gate then up.
    pub gate_up: Matrix,
    /// `[count·hidden, width]`.
    pub down: Matrix,
    pub count: usize,
    pub width: usize,
}

impl Experts {
    /// Checks the shapes; `canonical` is the pieces a rank has of a split reduction.
    pub(super) fn new(routed: Mlps, shared: Option<Mlps>, canonical: usize) -> Result<Experts> {
        let hidden = routed.gate_up.cols;
        for m in std::iter::once(&routed).chain(&shared) {
            let expected = (m.count * 2 * m.width, hidden, m.count * hidden);
            let found = (m.gate_up.rows, m.gate_up.cols, m.down.rows);
            if found != expected || m.down.cols != m.width {
                return Err(Error::Internal(format!(
                    "experts: gate and up are [{}, {}], down [{}, {}] for {} of width {}",
                    m.gate_up.rows, m.gate_up.cols, m.down.rows, m.down.cols, m.count, m.width
                )));
            }
        }
        let divides = |m: &Mlps| m.width.is_multiple_of(canonical);
        let all = divides(&routed) && shared.as_ref().is_none_or(divides);
        Ok(Experts { routed, shared, segments: if all { canonical } else { 1 }, hidden })
    }

    /// Bytes of the weights.
    pub fn bytes(&self) -> usize {
        std::iter::once(&self.routed).chain(&self.shared).map(|m| m.gate_up.bytes() + m.down.bytes()).sum()
    }
}

/// Chosen experts and their weights, `[rows, top_k]`, best first.
pub struct Routing {
    pub(super) top_k: usize,
    pub(super) experts: Vec<u32>,
    pub(super) weights: Vec<f32>,
}

impl Routing {
    pub(super) fn new(rows: usize, moe: &Moe) -> Routing {
        Routing { top_k: moe.top_k, experts: vec![0; rows * moe.top_k], weights: vec![0.0; rows * moe.top_k] }
    }

    /// The experts of `row`, best first, and their weights.
    pub fn row(&self, row: usize) -> (&[u32], &[f32]) {
        let at = row * self.top_k..(row + 1) * self.top_k;
        (&self.experts[at.clone()], &self.weights[at])
    }

    /// Chooses for `rows` tokens; `x` `[rows, hidden]`, `gate` `[experts, hidden]`.
    pub(super) fn choose(
        &mut self,
        workers: &Workers,
        isa: Isa,
        moe: &Moe,
        gate: &Matrix,
        bias: Option<&[f32]>,
        x: &[f32],
        rows: usize,
    ) {
        let experts = moe.experts;
        assert_eq!(gate.rows, experts);
        assert!(bias.is_none_or(|b| b.len() == experts) && self.experts.len() >= rows * self.top_k);
        assert!(
            moe.top_k == self.top_k && moe.top_k <= experts && moe.groups > 0 && experts.is_multiple_of(moe.groups)
        );
        let mut scores = vec![0.0; rows * experts];
        let offsets: Vec<usize> = (0..rows).map(|r| r * gate.cols).collect();
        let targets: Vec<usize> = (0..rows).map(|r| r * experts).collect();
        let product = Product {
            x: Input { data: x, offsets: &offsets },
            weights: gate,
            outputs: Outputs { first: 0, count: experts },
            bias: None,
            out: Shared::new(&mut scores),
            targets: &targets,
        };
        // SAFETY: a row of scores each.
        unsafe { product.compute(workers, isa) };
        let (chosen, weights) = (Shared::new(&mut self.experts), Shared::new(&mut self.weights));
        let scores = Shared::new(&mut scores);
        workers.run(rows, rows * experts * 32, |r| {
            // SAFETY: each row is one task's.
            let (scores, chosen, weights) = unsafe {
                (
                    scores.slice(r * experts, experts),
                    chosen.slice(r * moe.top_k, moe.top_k),
                    weights.slice(r * moe.top_k, moe.top_k),
                )
            };
            choose(isa, moe, bias, scores, chosen, weights);
        });
    }
}

/// SPEC.md section 2: one token's choice from the router's products.
fn choose(isa: Isa, moe: &Moe, bias: Option<&[f32]>, scores: &mut [f32], chosen: &mut [u32], weights: &mut [f32]) {
    match moe.scoring {
        Scoring::NoAuxTc => isa.run(Sigmoid(scores)),
        Scoring::SoftmaxGreedy | Scoring::SoftmaxGroupLimited => {
            let shift = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let sum = isa.run(ExpSum { x: scores, shift });
            scores.iter_mut().for_each(|s| *s /= sum);
        }
    }
    let mut choice = scores.to_vec();
    if let (Scoring::NoAuxTc, Some(bias)) = (moe.scoring, bias) {
        choice.iter_mut().zip(bias).for_each(|(c, b)| *c += b);
    }
    if moe.scoring != Scoring::SoftmaxGreedy && moe.top_groups < moe.groups {
        mask_groups(moe, &mut choice);
    }
    for (expert, weight) in chosen.iter_mut().zip(weights.iter_mut()) {
        let best = take_best(&mut choice);
        *expert = best as u32;
        *weight = scores[best];
    }
    if moe.normalise {
        let sum: f32 = weights.iter().sum::<f32>() + 1e-20;
        weights.iter_mut().for_each(|w| *w /= sum);
    }
    weights.iter_mut().for_each(|w| *w *= moe.scale);
}

/// Leaves the best `top_groups` groups: scored by their two best experts (noaux_tc) or their best.
fn mask_groups(moe: &Moe, choice: &mut [f32]) {
    let size = choice.len() / moe.groups;
    let best_of = |group: &[f32]| {
        let (mut first, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
        for &x in group {
            if x > first {
                (first, second) = (x, first);
            } else if x > second {
                second = x;
            }
        }
        if moe.scoring == Scoring::NoAuxTc && group.len() > 1 { first + second } else { first }
    };
    let mut scores: Vec<f32> = choice.chunks(size).map(best_of).collect();
    let mut kept = vec![false; moe.groups];
    for _ in 0..moe.top_groups {
        kept[take_best(&mut scores)] = true;
    }
    for (group, _) in choice.chunks_mut(size).zip(kept).filter(|(_, kept)| !kept) {
        group.fill(f32::NEG_INFINITY);
    }
}

/// The index of the largest, the lowest of equals; it is marked as taken (NaN, which compares with nothing).
fn take_best(values: &mut [f32]) -> usize {
    let untaken = |v: &f32| !v.is_nan();
    let mut best = values.iter().position(untaken).unwrap_or(0);
    for (i, &v) in values.iter().enumerate() {
        if v > values[best] {
            best = i;
        }
    }
    values[best] = f32::NAN;
    best
}

/// One MLP at work on some rows.
struct Active<'a> {
    mlps: &'a Mlps,
    /// Which of `mlps`.
    index: usize,
    /// Rows of the batch.
    rows: Vec<u32>,
    /// Their weights; `None` is unscaled.
    weights: Option<Vec<f32>>,
    /// Where its activations start, `[rows, width]`.
    start: usize,
}

/// The MLPs that have work, in the order their results are summed.
fn active<'a>(experts: &'a Experts, routing: &Routing, rows: usize) -> (Vec<Active<'a>>, usize) {
    let mut lists: Vec<(Vec<u32>, Vec<f32>)> = vec![Default::default(); experts.routed.count];
    for row in 0..rows {
        let (chosen, weights) = routing.row(row);
        for (&e, &w) in chosen.iter().zip(weights) {
            lists[e as usize].0.push(row as u32);
            lists[e as usize].1.push(w);
        }
    }
    let mut all = Vec::new();
    let mut start = 0;
    for (index, (rows, weights)) in lists.into_iter().enumerate().filter(|(_, l)| !l.0.is_empty()) {
        let len = rows.len() * experts.routed.width;
        all.push(Active { mlps: &experts.routed, index, rows, weights: Some(weights), start });
        start += len;
    }
    if let Some(mlps) = &experts.shared {
        all.push(Active { mlps, index: 0, rows: (0..rows as u32).collect(), weights: None, start });
        start += rows * mlps.width;
    }
    (all, start)
}

/// See [`Backend::moe`](crate::backend::Backend::moe). `hold` keeps the activations between calls.
pub(super) fn moe(
    workers: &Workers,
    isa: Isa,
    experts: &Experts,
    routing: &Routing,
    rows: usize,
    x: &[f32],
    hold: &mut Vec<f32>,
    out: &mut [f32],
) {
    assert!(x.len() >= rows * experts.hidden && out.len() >= rows * experts.hidden);
    assert!(routing.experts.len() >= rows * routing.top_k);
    let (active, size) = active(experts, routing, rows);
    if hold.len() < size {
        hold.resize(size, 0.0);
    }
    gate_up(workers, isa, &active, x, experts.hidden, hold);
    down(workers, isa, experts, &active, hold, rows, out);
}

/// `hold = silu(gate x)·up x` of every active MLP.
fn gate_up(workers: &Workers, isa: Isa, active: &[Active], x: &[f32], hidden: usize, hold: &mut [f32]) {
    let tasks: Vec<(&Active, usize)> =
        active.iter().flat_map(|a| (0..a.mlps.width).step_by(STRIP).map(move |n| (a, n))).collect();
    let work = active.iter().map(|a| a.rows.len() * a.mlps.width * 2 * hidden).sum();
    let hold = Shared::new(hold);
    workers.run(tasks.len(), work, |task| {
        let (a, first) = tasks[task];
        let width = a.mlps.width;
        let count = STRIP.min(width - first);
        let top = a.index * 2 * width + first;
        let mut gates = Vec::new();
        for (block, rows) in a.rows.chunks(ROW_BLOCK).enumerate() {
            let offsets: Vec<usize> = rows.iter().map(|&r| r as usize * hidden).collect();
            let x = Input { data: x, offsets: &offsets };
            dots(isa, x, &a.mlps.gate_up, Outputs { first: top, count }, 1, |dots| {
                gates.clear();
                gates.extend_from_slice(dots);
            });
            dots(isa, x, &a.mlps.gate_up, Outputs { first: top + width, count }, 1, |ups| {
                for (i, (gate, up)) in gates.chunks(count).zip(ups.chunks(count)).enumerate() {
                    let row = block * ROW_BLOCK + i;
                    // SAFETY: these columns of this MLP's activations are this task's.
                    let out = unsafe { hold.slice(a.start + row * width + first, count) };
                    isa.run(SiluMul { gate, up, out });
                }
            });
        }
    });
}

/// `out = Σ weight·down hold` over the active MLPs, in their order within each piece, then over the pieces.
fn down(workers: &Workers, isa: Isa, experts: &Experts, active: &[Active], hold: &[f32], rows: usize, out: &mut [f32]) {
    let (hidden, segments) = (experts.hidden, experts.segments);
    let work = active.iter().map(|a| a.rows.len() * a.mlps.width * hidden).sum();
    let out = Shared::new(out);
    workers.run(hidden.div_ceil(STRIP), work, |task| {
        let first = task * STRIP;
        let count = STRIP.min(hidden - first);
        let mut sums = vec![0f32; segments * rows * count];
        for a in active {
            let outputs = Outputs { first: a.index * hidden + first, count };
            for (block, part) in a.rows.chunks(ROW_BLOCK).enumerate() {
                let first_row = block * ROW_BLOCK;
                let offsets: Vec<usize> = (0..part.len()).map(|i| a.start + (first_row + i) * a.mlps.width).collect();
                dots(isa, Input { data: hold, offsets: &offsets }, &a.mlps.down, outputs, segments, |dots| {
                    for (i, dots) in dots.chunks(count).enumerate() {
                        let (segment, i) = (i / part.len(), i % part.len());
                        let sums = &mut sums[(segment * rows + part[i] as usize) * count..][..count];
                        match &a.weights {
                            Some(w) => sums.iter_mut().zip(dots).for_each(|(s, d)| *s += w[first_row + i] * d),
                            None => sums.iter_mut().zip(dots).for_each(|(s, d)| *s += d),
                        }
                    }
                });
            }
        }
        tree(&mut sums, rows * count, segments);
        for r in 0..rows {
            // SAFETY: these columns are this task's.
            unsafe { out.slice(r * hidden + first, count) }.copy_from_slice(&sums[r * count..][..count]);
        }
    });
}
