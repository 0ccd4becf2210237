//! Products with the weights: which kernel takes one of so many rows, and its launch.

use super::kernels::{Launch, arguments, source};
use super::matmul::Product;
use super::stream::{self, Cut, TensorMap};
use super::{CudaBackend, Matrix, Operand, Vector};
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
        let a = Gemv(
            weight.memory.at(),
            x.at,
            bias.map_or(0, |b| b.memory.at()),
            out.at,
            columns as i32,
            weight.cols as i32,
            rows as i32,
            x.stride as i32,
            out.stride as i32,
        );
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
        let w = TensorMap::of(weight.memory.at(), [weight.rows, weight.cols], weight.cols, cut.columns)?;
        let x = TensorMap::of(x.at, [rows, weight.cols], x.stride, height)?;
        let bias = bias.map_or(0, |b| b.memory.at());
        let a = StreamProduct(bias, out.at, columns as i32, weight.cols as i32, rows as i32, out.stride as i32);
        self.kernels.launch(f, Launch::new(cut.grid, threads).shared(shared), arguments![w, x, a])
    }

    /// Whether `stream_product` takes this product.
    pub(super) fn is_streamed(&self, weight: &Matrix, x: Operand, rows: usize) -> bool {
        let aligned = weight.cols.is_multiple_of(8) && x.stride.is_multiple_of(8) && x.at.is_multiple_of(16);
        rows > FEW && rows <= stream::ROWS && self.gpu.sm() == 90 && aligned
    }
}
