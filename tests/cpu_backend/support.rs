//! Fresh random inputs, a world that is only claimed, and comparisons.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use gqla::backend::cpu::simd::Isa;
use gqla::backend::cpu::{CpuBackend, HostRows, Matrix, Tensor};
use gqla::backend::{Backend, Batch, Reduction, Span};
use gqla::cache::BLOCK;
use gqla::comm::Communicator;
use gqla::error::Result;

/// SplitMix64, seeded from the clock; the seed is printed, and shown when a test fails.
pub struct Random(u64);

impl Random {
    /// `GQLA_TEST_SEED` repeats a run.
    pub fn new() -> Random {
        let seed = match std::env::var("GQLA_TEST_SEED") {
            Ok(text) => text.parse().expect("GQLA_TEST_SEED is a number"),
            Err(_) => SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64,
        };
        eprintln!("GQLA_TEST_SEED={seed}");
        Random(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// `0..n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    pub fn coin(&mut self) -> bool {
        self.below(2) == 1
    }

    /// −1..1.
    pub fn float(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.float()).collect()
    }

    pub fn shuffled(&mut self, n: usize) -> Vec<u32> {
        let mut all: Vec<u32> = (0..n as u32).collect();
        for i in (1..n).rev() {
            all.swap(i, self.below(i + 1));
        }
        all
    }
}

/// Rank 0 of a world that is not there: sums are left as they are.
pub struct Claimed(pub usize);

impl Communicator for Claimed {
    fn rank(&self) -> usize {
        0
    }
    fn world(&self) -> usize {
        self.0
    }
    fn local(&self) -> (usize, usize) {
        (0, self.0)
    }
    fn all_reduce(&mut self, _: &mut [f32]) -> Result<()> {
        Ok(())
    }
    fn all_gather(&mut self, mine: &[u8], all: &mut [u8]) -> Result<()> {
        all.chunks_mut(mine.len().max(1)).for_each(|part| part.copy_from_slice(mine));
        Ok(())
    }
    fn broadcast(&mut self, _: &mut Vec<u8>, _: Option<Duration>) -> Result<()> {
        Ok(())
    }
    fn arrived(&mut self) -> Result<bool> {
        Ok(true)
    }
    fn barrier(&mut self) -> Result<()> {
        Ok(())
    }
    fn set_watchdog(&mut self, _: Duration) {}
    fn finish(self: Box<Self>) -> Result<()> {
        Ok(())
    }
    fn abort(&mut self, code: i32, why: &str) {
        panic!("abort {code}: {why}");
    }
}

/// One of `world` ranks.
pub fn backend_of(isa: Isa, threads: usize, world: usize) -> CpuBackend {
    CpuBackend::with_isa(Box::new(Claimed(world)), threads, isa).unwrap()
}

pub fn backend() -> CpuBackend {
    backend_of(Isa::detect(), 2, 1)
}

/// Every instruction set of the machine, with one thread and with three.
pub fn variants() -> Vec<CpuBackend> {
    Isa::available().into_iter().flat_map(|isa| [backend_of(isa, 1, 1), backend_of(isa, 3, 1)]).collect()
}

/// A sequence of its own for each of `rows` rows.
pub fn rows(n: usize) -> Batch {
    let spans = (0..n).map(|first| Span { first, rows: 1, context: 1, blocks: vec![0] }).collect();
    Batch { tokens: vec![0; n], positions: vec![0; n], spans, ..Batch::default() }
}

/// Rows of sequences: `(rows, context, blocks)` each.
pub fn spans(sequences: &[(usize, usize, Vec<u32>)]) -> Batch {
    let mut batch = Batch::default();
    for (rows, context, blocks) in sequences {
        let first = batch.rows();
        batch.tokens.extend((0..*rows).map(|i| i as u32));
        batch.positions.extend((context - rows..*context).map(|p| p as u32));
        batch.spans.push(Span { first, rows: *rows, context: *context, blocks: blocks.clone() });
    }
    batch
}

pub fn blocks_for(tokens: usize) -> usize {
    tokens.div_ceil(BLOCK)
}

/// A tensor that holds `data`; rows beyond it are NaN.
pub fn tensor(b: &CpuBackend, data: &[f32], cols: usize) -> Tensor {
    let rows = data.len() / cols;
    let mut t = b.tensor(rows + 2, cols).unwrap();
    t.data_mut().fill(f32::NAN);
    t.data_mut()[..data.len()].copy_from_slice(data);
    t
}

/// A weight and its values in f64, whichever type it is kept in.
pub struct Weight {
    pub bf16: Option<Vec<u16>>,
    pub f32: Vec<f32>,
    pub cols: usize,
}

impl Weight {
    pub fn random(random: &mut Random, rows: usize, cols: usize) -> Weight {
        let values = random.floats(rows * cols);
        if random.coin() {
            let bits: Vec<u16> = values.iter().map(|v| (v.to_bits() >> 16) as u16).collect();
            let f32 = bits.iter().map(|&b| f32::from_bits((b as u32) << 16)).collect();
            Weight { bf16: Some(bits), f32, cols }
        } else {
            Weight { bf16: None, f32: values, cols }
        }
    }

    pub fn rows(&self) -> usize {
        self.f32.len() / self.cols
    }

    pub fn host(&self) -> HostRows<'_> {
        match &self.bf16 {
            Some(bits) => HostRows::Bf16(bits, self.cols),
            None => HostRows::F32(&self.f32, self.cols),
        }
    }

    pub fn matrix(&self, b: &CpuBackend, reduction: Reduction) -> Matrix {
        b.matrix_of(&[self.host()], reduction).unwrap()
    }

    /// Rows and columns of it, a rank's part.
    pub fn part(&self, rows: std::ops::Range<usize>, cols: std::ops::Range<usize>) -> Weight {
        fn cut<T: Copy>(all: &[T], width: usize, rows: std::ops::Range<usize>, cols: std::ops::Range<usize>) -> Vec<T> {
            rows.flat_map(|r| all[r * width..][cols.clone()].to_vec()).collect()
        }
        Weight {
            bf16: self.bf16.as_ref().map(|b| cut(b, self.cols, rows.clone(), cols.clone())),
            f32: cut(&self.f32, self.cols, rows, cols.clone()),
            cols: cols.len(),
        }
    }

    pub fn row(&self, r: usize) -> &[f32] {
        &self.f32[r * self.cols..][..self.cols]
    }
}

pub fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| a as f64 * b as f64).sum()
}

pub fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|v| v.to_bits()).collect()
}

/// `|got − want| <= tolerance·(1 + max|want|)` everywhere.
pub fn close(got: &[f32], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len());
    let bound = tolerance * (1.0 + want.iter().fold(0.0, |m: f64, w| m.max(w.abs())));
    for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
        assert!((g as f64 - w).abs() <= bound, "element {i}: {g} and not {w}, more than {bound:e} away");
    }
}
