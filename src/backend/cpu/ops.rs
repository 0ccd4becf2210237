//! Small operations on rows: norms, the gate's activation, sums, the machine's read bandwidth.

use super::Workers;
use super::buffer::{Buffer, Shared};
use super::simd::{Isa, Kernel, LANES, Simd};
use crate::error::Result;

/// `out = x / √(mean(x²) + eps) · weight`, of one row. The slices are equally long.
pub(super) struct RmsNorm<'a> {
    pub x: &'a [f32],
    pub weight: &'a [f32],
    pub eps: f32,
    pub out: &'a mut [f32],
}

impl Kernel for RmsNorm<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let n = self.x.len();
        assert!(self.weight.len() == n && self.out.len() == n);
        let mut squares = s.zero();
        for i in (0..n).step_by(LANES) {
            // SAFETY: i < n.
            let x = unsafe { load(s, self.x, i) };
            squares = s.fma(x, x, squares);
        }
        let scale = s.splat(1.0 / (s.sum(squares) / n as f32 + self.eps).sqrt());
        for i in (0..n).step_by(LANES) {
            // SAFETY: i < n, and the slices are equally long.
            unsafe {
                let y = s.mul(s.mul(load(s, self.x, i), scale), load(s, self.weight, i));
                store(s, self.out, i, y);
            }
        }
    }
}

/// `out = gate / (1 + e^-gate) · up`. The slices are equally long.
pub(super) struct SiluMul<'a> {
    pub gate: &'a [f32],
    pub up: &'a [f32],
    pub out: &'a mut [f32],
}

impl Kernel for SiluMul<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let n = self.gate.len();
        assert!(self.up.len() == n && self.out.len() == n);
        let one = s.splat(1.0);
        for i in (0..n).step_by(LANES) {
            // SAFETY: i < n, and the slices are equally long.
            unsafe {
                let gate = load(s, self.gate, i);
                let silu = s.div(gate, s.add(one, s.exp(s.sub(s.zero(), gate))));
                store(s, self.out, i, s.mul(silu, load(s, self.up, i)));
            }
        }
    }
}

/// `x = e^(x − shift)`; the sum in lanes, then folded.
pub(super) struct ExpSum<'a> {
    pub x: &'a mut [f32],
    pub shift: f32,
}

impl Kernel for ExpSum<'_> {
    type Out = f32;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let n = self.x.len();
        let mut sum = s.zero();
        for i in (0..n).step_by(LANES) {
            // SAFETY: i < n.
            unsafe {
                let e = s.exp(s.sub(load(s, self.x, i), s.splat(self.shift)));
                sum = s.add(sum, s.first(e, LANES.min(n - i), s.zero()));
                store(s, self.x, i, e);
            }
        }
        s.sum(sum)
    }
}

/// `x = 1 / (1 + e^-x)`.
pub(super) struct Sigmoid<'a>(pub &'a mut [f32]);

impl Kernel for Sigmoid<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let one = s.splat(1.0);
        for i in (0..self.0.len()).step_by(LANES) {
            // SAFETY: i < n.
            unsafe {
                let x = load(s, self.0, i);
                store(s, self.0, i, s.div(one, s.add(one, s.exp(s.sub(s.zero(), x)))));
            }
        }
    }
}

/// Up to 16 elements from `i`, zeroes beyond the end.
///
/// # Safety
/// `i < x.len()`.
#[inline(always)]
unsafe fn load<S: Simd>(s: S, x: &[f32], i: usize) -> S::V {
    // SAFETY: reads no further than the end.
    unsafe {
        let p = x.as_ptr().add(i);
        if i + LANES <= x.len() { s.load(p) } else { s.load_first(p, x.len() - i) }
    }
}

/// Up to 16 elements from `i`, no further than the end.
///
/// # Safety
/// `i < x.len()`.
#[inline(always)]
unsafe fn store<S: Simd>(s: S, x: &mut [f32], i: usize, v: S::V) {
    // SAFETY: writes no further than the end.
    unsafe {
        let p = x.as_mut_ptr().add(i);
        if i + LANES <= x.len() { s.store(p, v) } else { s.store_first(p, x.len() - i, v) }
    }
}

/// Bytes a second that `threads` threads read from a buffer of `bytes` (take several times the last-level cache):
/// the best of five passes. The yardstick of batch-1 decoding.
pub fn read_bandwidth(threads: usize, bytes: usize) -> Result<f64> {
    const CHUNK: usize = 1 << 18;
    let workers = Workers::new(threads)?;
    let isa = Isa::detect();
    let mut buffer = Buffer::<f32>::new(bytes.div_ceil(4).next_multiple_of(CHUNK))?;
    let chunks = buffer.len() / CHUNK;
    let shared = Shared::new(&mut buffer);
    // SAFETY: each chunk is one task's.
    workers.run(chunks, usize::MAX, |i| unsafe { shared.slice(i * CHUNK, CHUNK) }.fill(1.0));
    let mut sums = vec![0f32; chunks];
    let mut best = f64::INFINITY;
    for _ in 0..5 {
        let shared = Shared::new(&mut sums);
        let start = std::time::Instant::now();
        workers.run(chunks, usize::MAX, |i| {
            // SAFETY: each sum is one task's.
            let sum = unsafe { shared.slice(i, 1) };
            sum[0] = isa.run(Read(&buffer[i * CHUNK..][..CHUNK]));
        });
        best = best.min(start.elapsed().as_secs_f64());
    }
    assert!(sums.iter().all(|&s| s == CHUNK as f32), "a read buffer held something else than was written");
    Ok((buffer.len() * 4) as f64 / best)
}

/// Reads a slice of whole 8-vector runs.
struct Read<'a>(&'a [f32]);

impl Kernel for Read<'_> {
    type Out = f32;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let mut sums = [s.zero(); 8];
        for run in self.0.chunks_exact(8 * LANES) {
            for (i, sum) in sums.iter_mut().enumerate() {
                // SAFETY: a run has 8·16 elements.
                *sum = s.add(*sum, unsafe { s.load(run.as_ptr().add(i * LANES)) });
            }
        }
        let mut sum = 0.0;
        for v in sums {
            sum += s.sum(v);
        }
        sum
    }
}
