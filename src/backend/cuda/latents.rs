//! Launches of the absorb path beside attention: the products with kv_b, and latents normed and appended.

use super::kernels::{Launch, arguments, source};
use super::{Cache, CudaBackend, Matrix, Operand, RopeTable, Tensor, Vector, address, expect};
use crate::backend::{AttentionShape, Normed, View};
use crate::error::Result;

/// The kernels' parameter blocks, field by field as in `kernels/`.
#[repr(C)]
struct AbsorbProduct([u64; 6], [i32; 5]);
#[repr(C)]
struct Latents {
    tensors: [u64; 7],
    step: [u64; 6],
    strides: [i32; 5],
    max_blocks: i32,
    eps: f32,
}

impl CudaBackend {
    /// `absorb_query`, which needs the angles, or `absorb_output`, into `columns` columns a head.
    pub(super) fn absorb(
        &self,
        entry: &'static str,
        shape: &AttentionShape,
        rope: Option<&RopeTable>,
        kv_up: &Matrix,
        x: Operand,
        out: &Tensor,
        columns: usize,
    ) -> Result<()> {
        for rows in self.inputs.rows_of(|rows, context| !shape.expands(rows, context)) {
            let pairs = rows.len() * shape.heads.min(shape.heads_per_group);
            let tile = product_tile(pairs * shape.groups, rope.is_some());
            let constants = absorb_constants(shape, rope.is_some_and(|r| r.interleave), tile);
            let f = self.kernels.get(&source::ABSORB_PRODUCT, entry, &constants)?;
            let (cos, sin) = rope.map_or((0, 0), |r| (r.cos.at(), r.sin.at()));
            let from = |at: u64, bytes: usize| at + (rows.start * bytes) as u64;
            let (x_at, out_at) = (from(x.at, 2 * x.stride), from(out.at(), 2 * out.cols));
            let positions = from(self.inputs.positions(), 4);
            let a = AbsorbProduct(
                [kv_up.memory.at(), x_at, out_at, cos, sin, positions],
                [x.stride, rows.len(), shape.heads, shape.heads_per_group, shape.first_head_in_group].map(|n| n as i32),
            );
            let [query, output, _] = f.exports();
            let shared = if rope.is_some() { query } else { output };
            let grid = (columns.div_ceil(64), pairs.div_ceil(tile), shape.groups);
            self.kernels.launch(f, Launch { grid, block: 128, shared, ..Launch::default() }, arguments![a])?;
        }
        Ok(())
    }

    /// The norms of both latents, and where `append` has them the cache and what else goes there.
    pub(super) fn latents(
        &self,
        (latent, weight): (View<Tensor>, Option<&Vector>),
        out: Option<&Tensor>,
        q: Option<Normed<Self>>,
        eps: f32,
        append: Option<(&RopeTable, View<Tensor>, &Cache)>,
    ) -> Result<()> {
        let normed = |x: &View<Tensor>, w: &Vector, out: &Tensor| x.width == w.len && out.cols >= x.width;
        let widths = || format!("norms of latents of {} columns and another", latent.width);
        expect(out.is_none_or(|out| weight.is_some_and(|w| normed(&latent, w, out))), widths)?;
        expect(q.as_ref().is_none_or(|q| normed(&q.x, q.weight, q.out)), widths)?;
        expect(weight.is_none_or(|w| w.len == latent.width), widths)?;
        let q_width = q.as_ref().map_or(0, |q| q.x.width);
        let (rope, k_rope, cache) = match append {
            Some((rope, key, cache)) => (Some(rope), Some(key), Some(cache)),
            None => (None, None, None),
        };
        let k_rope_width = k_rope.as_ref().map_or(0, |k| k.width);
        let constants = latent_constants(q_width, latent.width, k_rope_width, rope.is_some_and(|r| r.interleave));
        let entry = if append.is_some() { "append_latent" } else { "norm_latents" };
        let f = self.kernels.get(&source::APPEND_LATENT, entry, &constants)?;
        let weight = weight.map_or(0, |w| w.memory.at());
        let (key, key_stride) = k_rope.map_or((0, 0), |k| (address(&k), k.tensor.cols));
        let (q_x, q_x_stride) = q.as_ref().map_or((0, 0), |q| (address(&q.x), q.x.tensor.cols));
        let (q_out, q_stride) = q.as_ref().map_or((0, 0), |q| (q.out.at(), q.out.cols));
        let q_weight = q.as_ref().map_or(0, |q| q.weight.memory.at());
        let a = Latents {
            tensors: [address(&latent), key, q_x, weight, q_weight, out.map_or(0, Tensor::at), q_out],
            step: [
                rope.map_or(0, |r| r.cos.at()),
                rope.map_or(0, |r| r.sin.at()),
                self.inputs.positions(),
                self.inputs.row_seq(),
                self.inputs.tables(0),
                cache.map_or(0, |c| c.memory.at()),
            ],
            strides: [latent.tensor.cols, key_stride, q_x_stride, out.map_or(0, |o| o.cols), q_stride]
                .map(|n| n as i32),
            max_blocks: self.inputs.max_blocks as i32,
            eps,
        };
        let parts = 1 + usize::from(append.is_some()) + usize::from(q.is_some());
        let launch = Launch { grid: (self.rows(), parts, 1), block: f.exports()[0], ..Launch::default() };
        self.kernels.launch(f, launch, arguments![a])
    }
}

/// (row, head) pairs of a CTA of the absorbing products, of `pairs` in all: of few pairs more CTAs, of many fewer that read
/// the same weights.
fn product_tile(pairs: usize, query: bool) -> usize {
    match pairs {
        ..=1024 => 16,
        ..=8192 if !query => 32,
        _ => 64,
    }
}

/// The constants of the absorbing products.
pub fn absorb_constants(shape: &AttentionShape, interleave: bool, tile: usize) -> [(&'static str, i64); 6] {
    let dims = [("DN", shape.nope), ("DR", shape.rope), ("DC", shape.latent), ("DV", shape.value)];
    let [dn, dr, dc, dv] = dims.map(|(name, dim)| (name, dim as i64));
    [dn, dr, dc, dv, ("INTERLEAVE", i64::from(interleave)), ("TILE", tile as i64)]
}

/// The constants of the latents' norms and append, for latents of these widths.
pub fn latent_constants(q: usize, latent: usize, rope: usize, interleave: bool) -> [(&'static str, i64); 4] {
    [("Q", q as i64), ("DC", latent as i64), ("DR", rope as i64), ("INTERLEAVE", i64::from(interleave))]
}
