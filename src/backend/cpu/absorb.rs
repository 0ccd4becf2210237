//! The absorbing products: queries into the latent space, latent outputs back out, a group's block of weights at a
//! time, read once for all heads of the group.

use super::Workers;
use super::attention::weigh;
use super::buffer::{Data, Matrix, Shared};
use super::linear::{Input, Outputs, Product};
use super::simd::{Element, Isa, Kernel, Simd};
use crate::backend::AttentionShape;

/// Columns of the latent that a task of [`absorb_query`] takes.
const COLUMNS: usize = 256;

pub(super) fn check(shape: &AttentionShape, kv_up: &Matrix) {
    assert_eq!((kv_up.rows, kv_up.cols), (shape.groups * (shape.nope + shape.value), shape.latent));
    assert_eq!(kv_up.segments, 1, "kv_b is split by group, never by latent column");
}

/// See [`Backend::absorb_query`](crate::backend::Backend::absorb_query),
/// but for the rope parts, which are left as they are. `q(row)` is `[heads·(nope+rope)]`, of each of `rows`.
pub(super) fn absorb_query<'a>(
    workers: &Workers,
    isa: Isa,
    shape: &AttentionShape,
    kv_up: &Matrix,
    rows: &[usize],
    q: impl Fn(usize) -> &'a [f32] + Sync,
    out: &mut [f32],
) {
    check(shape, kv_up);
    let (q_width, out_width) = (shape.nope + shape.rope, shape.latent + shape.rope);
    assert!(rows.iter().all(|row| (row + 1) * shape.heads * out_width <= out.len()));
    let pieces = shape.latent.div_ceil(COLUMNS);
    let out = Shared::new(out);
    let work = rows.len() * shape.heads * shape.nope * shape.latent;
    workers.run(shape.groups * pieces, work, |task| {
        let (group, first) = (task / pieces, task % pieces * COLUMNS);
        let width = COLUMNS.min(shape.latent - first);
        let (mut from, mut to) = (Vec::new(), Vec::new());
        for &row in rows {
            for head in shape.heads_of(group) {
                let at = row * shape.heads + head;
                from.push(q(row)[head * q_width..][..shape.nope].as_ptr());
                // SAFETY: this query's columns from `first` on are this task's.
                to.push(unsafe { out.slice(at * out_width + first, width) }.as_mut_ptr());
            }
        }
        let block = group * (shape.nope + shape.value) * shape.latent + first..kv_up.rows * kv_up.cols;
        let (stride, count) = (shape.latent, shape.nope);
        match &kv_up.data {
            Data::Bf16(w) => isa.run(Weigh { from, to, rows: &w[block], stride, width, count }),
            Data::F32(w) => isa.run(Weigh { from, to, rows: &w[block], stride, width, count }),
        }
    });
}

/// `to[i] = Σ_j from[i][j]·rows[j]`. `from` are `count` long, `to` `width`.
struct Weigh<'a, E> {
    from: Vec<*const f32>,
    to: Vec<*mut f32>,
    rows: &'a [E],
    stride: usize,
    width: usize,
    count: usize,
}

impl<E: Element> Kernel for Weigh<'_, E> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        assert!(self.count == 0 || self.rows.len() >= (self.count - 1) * self.stride + self.width);
        let rows = self.rows.as_ptr();
        let mut i = 0;
        while i < self.from.len() {
            // SAFETY: sources and targets are as long as the caller says, rows as checked.
            unsafe {
                if S::WIDE && i + 4 <= self.from.len() {
                    let from = [self.from[i], self.from[i + 1], self.from[i + 2], self.from[i + 3]];
                    let to = [self.to[i], self.to[i + 1], self.to[i + 2], self.to[i + 3]];
                    weigh(s, from, rows, self.stride, self.width, self.count, [None; 4], to);
                    i += 4;
                } else {
                    weigh(s, [self.from[i]], rows, self.stride, self.width, self.count, [None], [self.to[i]]);
                    i += 1;
                }
            }
        }
    }
}

/// See [`Backend::absorb_output`](crate::backend::Backend::absorb_output).
pub(super) fn absorb_output(
    workers: &Workers,
    isa: Isa,
    shape: &AttentionShape,
    kv_up: &Matrix,
    rows: &[usize],
    latent: &[f32],
    out: &mut [f32],
) {
    check(shape, kv_up);
    let end = rows.iter().max().map_or(0, |row| (row + 1) * shape.heads);
    assert!(latent.len() >= end * shape.latent && out.len() >= end * shape.value);
    let out = Shared::new(out);
    for group in 0..shape.groups {
        let queries = || rows.iter().flat_map(|row| shape.heads_of(group).map(move |head| row * shape.heads + head));
        let offsets: Vec<usize> = queries().map(|at| at * shape.latent).collect();
        let targets: Vec<usize> = queries().map(|at| at * shape.value).collect();
        let first = group * (shape.nope + shape.value) + shape.nope;
        let product = Product {
            x: Input { data: latent, offsets: &offsets },
            weights: kv_up,
            outputs: Outputs { first, count: shape.value },
            bias: None,
            out,
            targets: &targets,
        };
        // SAFETY: each query has its own output, and groups follow one another.
        unsafe { product.compute(workers, isa) };
    }
}
