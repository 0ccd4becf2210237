//! Products with the weights: which kernel takes one of so many rows, or two at once, and its launch.

use super::kernels::{Launch, arguments, source};
use super::matmul::Product;
use super::stream::{self, Cut, Pair, TensorMap};
use super::{CudaBackend, Matrix, Operand, Vector, address};
use crate::backend::Linear;
use crate::error::Result;

/// Rows up to which `gemv` streams a product's weights; where the shape suits it, `stream_product` takes it from more
/// than [`FEW`] rows on.
const SKINNY: usize = 16;
const FEW: usize = 8;

/// The kernels' parameter blocks, field by field as in `kernels/`.
#[repr(C)]
struct Gemv(u64, u64, u64, u64, i32, i32, i32, i32, i32);
#[repr(C)]
struct StreamProduct(u64, u64, i32, i32, i32, i32);

fn gemv(weight: &Matrix, columns: usize, bias: Option<&Vector>, (x, rows): (Operand, usize), out: Operand) -> Gemv {
    Gemv(
        weight.memory.at(),
        x.at,
        bias.map_or(0, |b| b.memory.at()),
        out.at,
        columns as i32,
        weight.cols as i32,
        rows as i32,
        x.stride as i32,
        out.stride as i32,
    )
}

/// The copy engine's maps of the weights, `columns` of a pass, and of the `rows` rows of `x`.
fn maps(weight: &Matrix, x: Operand, rows: usize, columns: usize) -> Result<[TensorMap; 2]> {
    let w = TensorMap::of(weight.memory.at(), [weight.rows, weight.cols], weight.cols, columns)?;
    Ok([w, TensorMap::of(x.at, [rows, weight.cols], x.stride, rows.next_multiple_of(8))?])
}

impl CudaBackend {
    /// `out = x·weightᵀ (+ bias)` for `rows` rows.
    pub(super) fn product(
        &self,
        weight: &Matrix,
        bias: Option<&Vector>,
        x: Operand,
        rows: usize,
        out: Operand,
        f32_out: bool,
    ) -> Result<()> {
        if rows == 0 || weight.rows == 0 {
            return Ok(());
        }
        if self.is_streamed(weight, x, rows) {
            return self.stream(weight, weight.rows, bias, (x, rows), out, false, f32_out);
        }
        if !self.is_skinny(weight, x, rows) {
            let product = Product {
                rows,
                outs: weight.rows,
                depth: weight.cols,
                x_stride: x.stride,
                out_stride: out.stride,
                f32_out,
                bias: bias.is_some(),
            };
            let at = (x.at, weight.memory.at(), bias.map_or(0, |b| b.bf16.at()), out.at);
            return self.matmul.product(product, at, || self.settle());
        }
        self.skinny("gemv", weight, weight.rows, bias, (x, rows), out, f32_out)
    }

    /// A product of few rows by our own kernel: `gemv`, or `gemv_gated` of half as many columns.
    pub(super) fn skinny(
        &self,
        entry: &'static str,
        weight: &Matrix,
        columns: usize,
        bias: Option<&Vector>,
        (x, rows): (Operand, usize),
        out: Operand,
        f32_out: bool,
    ) -> Result<()> {
        let constants = [("ROWS", rows.next_power_of_two() as i64), ("OUT_F32", i64::from(f32_out))];
        let f = self.kernels.get(&source::GEMV, entry, &constants)?;
        let [threads, shared, _] = f.exports();
        let a = gemv(weight, columns, bias, (x, rows), out);
        self.kernels.launch(f, Launch::new(self.gpu.info.multiprocessors, threads).shared(shared), arguments![a])
    }

    /// Whether `gemv` can take this product: few rows, Hopper, and vectors of 16 bytes throughout.
    pub(super) fn is_skinny(&self, weight: &Matrix, x: Operand, rows: usize) -> bool {
        let aligned = weight.cols.is_multiple_of(32) && x.stride.is_multiple_of(8) && x.at.is_multiple_of(16);
        rows <= SKINNY && self.gpu.sm() >= 90 && aligned
    }

    /// A product of some more rows by our own kernel; `gated` of half as many columns.
    pub(super) fn stream(
        &self,
        weight: &Matrix,
        columns: usize,
        bias: Option<&Vector>,
        (x, rows): (Operand, usize),
        out: Operand,
        gated: bool,
        f32_out: bool,
    ) -> Result<()> {
        let height = rows.next_multiple_of(8);
        let cut = Cut::of(columns, weight.cols, height, gated, self.gpu.info.multiprocessors);
        let constants = [
            ("ROWS", height as i64),
            ("COLUMNS", cut.columns as i64),
            ("PASSES", cut.passes as i64),
            ("SPLIT", cut.split as i64),
            ("GATED", i64::from(gated)),
            ("OUT_F32", i64::from(f32_out)),
        ];
        let f = self.kernels.get(&source::STREAM_PRODUCT, "stream_product", &constants)?;
        let [threads, shared, _] = f.exports();
        let [w, x] = maps(weight, x, rows, cut.columns)?;
        let bias = bias.map_or(0, |b| b.memory.at());
        let a = StreamProduct(bias, out.at, columns as i32, weight.cols as i32, rows as i32, out.stride as i32);
        self.kernels.launch(f, Launch::new(cut.grid, threads).shared(shared), arguments![w, x, a])
    }

    /// Enqueues two products in one launch and says true, or enqueues nothing where two launches are faster.
    pub(super) fn product_pair(&self, pair: [&Linear<CudaBackend>; 2], rows: usize) -> Result<bool> {
        let multiprocessors = self.gpu.info.multiprocessors;
        let weights = pair.map(|l| l.weight);
        let xs = pair.map(|l| Operand { at: address(&l.x), stride: l.x.tensor.cols });
        let outs = pair.map(|l| Operand { at: l.out.at(), stride: l.out.cols });
        let shapes = weights.map(|w| (w.rows, w.cols));
        if rows == 0 || shapes.iter().any(|s| s.0 == 0) {
            return Ok(false);
        }
        if (0..2).all(|i| self.is_streamed(weights[i], xs[i], rows)) {
            let height = rows.next_multiple_of(8);
            let Some(Pair { columns, grids }) = Pair::of(shapes, height, multiprocessors) else { return Ok(false) };
            let constants = [("ROWS", height as i64), ("COLUMNS", columns as i64), ("PASSES", 1), ("PAIR", 1)];
            let f = self.kernels.get(&source::STREAM_PRODUCT, "stream_pair", &constants)?;
            let [threads, shared, _] = f.exports();
            let [w, x] = maps(weights[0], xs[0], rows, columns)?;
            let [w2, x2] = maps(weights[1], xs[1], rows, columns)?;
            let [a, a2] = [0, 1].map(|i| {
                let ((n, k), out) = (shapes[i], outs[i]);
                StreamProduct(0, out.at, n as i32, k as i32, rows as i32, out.stride as i32)
            });
            let (launch, ctas) = (Launch::new(grids[0] + grids[1], threads).shared(shared), grids[0] as i32);
            self.kernels.launch(f, launch, arguments![w, x, a, w2, x2, a2, ctas])?;
            return Ok(true);
        }
        // With up to 4 rows tiles are half as high, and nothing is gained (W = 2 of GLM-4.7-Flash on an H200: 1 row 0.4 %
        // slower, 8 rows 1.6 % faster).
        if !(5..=FEW).contains(&rows) || multiprocessors < 2 || !(0..2).all(|i| self.is_skinny(weights[i], xs[i], rows))
        {
            return Ok(false);
        }
        let constants = [("ROWS", FEW as i64), ("PAIR", 1)];
        let f = self.kernels.get(&source::GEMV, "gemv_pair", &constants)?;
        let [threads, shared, _] = f.exports();
        let [a, b] = [0, 1].map(|i| gemv(weights[i], shapes[i].0, None, (xs[i], rows), outs[i]));
        // Shares of the multiprocessors as the weights' bytes are.
        let [first, second] = shapes.map(|(n, k)| n * k);
        let ctas = (multiprocessors * first).div_ceil(first + second).clamp(1, multiprocessors - 1) as u32;
        self.kernels.launch(f, Launch::new(multiprocessors, threads).shared(shared), arguments![a, b, ctas])?;
        Ok(true)
    }

    /// Whether `stream_product` takes this product.
    pub(super) fn is_streamed(&self, weight: &Matrix, x: Operand, rows: usize) -> bool {
        let aligned = weight.cols.is_multiple_of(8) && x.stride.is_multiple_of(8) && x.at.is_multiple_of(16);
        rows > FEW && rows <= stream::ROWS && self.gpu.sm() == 90 && aligned
    }
}
