//! What this GPU and its links do, measured: what the cost model plans with.

use std::time::Instant;

use super::CudaBackend;
use super::context::{Gpu, Memory};
use super::matmul::Product;
use crate::backend::{Backend, Batch, Rates, Span};
use crate::comm::nccl::Element;
use crate::error::Result;

/// Rows, columns and depth of the product that is timed: 1.1 TFLOP.
const SIDE: usize = 8192;
/// Elements of the sum that the links are measured with.
const LARGE: usize = 32 << 20;
/// Dependent sums of one row in a graph.
const CALLS: usize = 64;
const REPEATS: usize = 5;

impl CudaBackend {
    /// Measures. Every rank calls it; the GPU itself is rank 0's alone to measure, for ranks may share one.
    pub(crate) fn measure(&mut self, hidden: usize) -> Result<Rates> {
        let (bandwidth, flops) = match self.comm.rank() {
            0 => (self.bandwidth()?, self.product_rate()?),
            _ => (0.0, 0.0),
        };
        let sums = if self.reduce.waits() { Some((self.small_sum(hidden)?, self.link()?)) } else { None };
        Ok(Rates { bandwidth, flops, memory: self.gpu.memory()?.1 as f64, sums })
    }

    /// FLOP/s of a large product.
    fn product_rate(&self) -> Result<f64> {
        let matrix = || -> Result<Memory> {
            let memory = Memory::uninit(&self.gpu, SIDE * SIDE * 2)?;
            self.loader.noise(&self.kernels, memory.at(), (SIDE, SIDE), 1, (0, 0), 1.0)?;
            Ok(memory)
        };
        let (x, w, out) = (matrix()?, matrix()?, Memory::uninit(&self.gpu, SIDE * SIDE * 2)?);
        let (x_stride, out_stride) = (SIDE, SIDE);
        let p = Product { rows: SIDE, outs: SIDE, depth: SIDE, x_stride, out_stride, f32_out: false, bias: false };
        let seconds =
            fastest(&self.gpu, || self.matmul.product(p, (x.at(), w.at(), 0, out.at()), || self.gpu.synchronize()))?;
        Ok(2.0 * (SIDE * SIDE * SIDE) as f64 / seconds)
    }

    /// Seconds of the sum of one row, the residual and the norm, as a layer has them.
    fn small_sum(&mut self, hidden: usize) -> Result<f64> {
        let span = Span { first: 0, rows: 1, context: 1, blocks: vec![0] };
        self.begin(&Batch { tokens: vec![0], positions: vec![0], spans: vec![span], ..Batch::default() })?;
        let weight = self.vector(&vec![1.0; hidden])?;
        let (mut partial, mut x, mut h) = (self.summed(1, hidden)?, self.residual(1, hidden)?, self.tensor(1, hidden)?);
        let mut times = self.time(REPEATS, |b| {
            (0..CALLS).try_for_each(|_| b.all_reduce_add_norm(&mut partial, None, &mut x, &weight, 1e-5, &mut h))
        })?;
        times.sort_unstable_by(f64::total_cmp);
        Ok(times[times.len() / 2] / CALLS as f64)
    }

    /// Bytes a second in one direction while all ranks sum.
    fn link(&mut self) -> Result<f64> {
        let memory = Memory::new(&self.gpu, LARGE * 2)?;
        let mut best = f64::INFINITY;
        for i in 0..REPEATS + 1 {
            self.comm.barrier()?;
            let began = Instant::now();
            self.reduce.all_reduce(&self.gpu, &mut *self.comm, memory.at(), LARGE, Element::Bf16)?;
            self.synchronize()?;
            if i > 0 {
                best = best.min(began.elapsed().as_secs_f64());
            }
        }
        let world = self.comm.world() as f64;
        Ok(2.0 * (world - 1.0) / world * (LARGE * 2) as f64 / best)
    }
}

/// Seconds of the fastest of some runs.
fn fastest(gpu: &Gpu, mut run: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut best = f64::INFINITY;
    for i in 0..REPEATS + 1 {
        let milliseconds = gpu.time(&mut run)?;
        if i > 0 {
            best = best.min(f64::from(milliseconds) * 1e-3);
        }
    }
    Ok(best)
}
