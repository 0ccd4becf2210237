//! Two backends side by side, fresh random inputs that bf16 holds exactly, and comparisons.

use std::time::{SystemTime, UNIX_EPOCH};

use gqla::backend::cpu::{self, CpuBackend, HostRows};
use gqla::backend::cuda::{self, CudaBackend, CudaOptions, available};
use gqla::backend::{Backend, Batch, Reduction, Span};
use gqla::cache::BLOCK;
use gqla::comm::one::OneComm;

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

    /// The same sequence for the same seed.
    pub fn seeded(seed: u64) -> Random {
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

    /// −1..1, as bf16 has it.
    pub fn float(&mut self) -> f32 {
        half::bf16::from_f32((self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0).to_f32()
    }

    pub fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.float()).collect()
    }

    /// A step of sequences with these (rows, context), their blocks shuffled, every row an output.
    pub fn batch(&mut self, spans: &[(usize, usize)]) -> Batch {
        let each: Vec<usize> = spans.iter().map(|s| s.1.div_ceil(BLOCK)).collect();
        let total: usize = each.iter().sum();
        let mut free: Vec<u32> = (0..total as u32 + 3).collect();
        for i in (1..free.len()).rev() {
            free.swap(i, self.below(i + 1));
        }
        let mut batch = Batch::default();
        for (&(rows, context), blocks) in spans.iter().zip(each) {
            let first = batch.rows();
            batch.positions.extend((context - rows..context).map(|p| p as u32));
            batch.tokens.extend((0..rows).map(|_| self.below(50) as u32));
            batch.spans.push(Span { first, rows, context, blocks: free.drain(..blocks).collect() });
        }
        batch.outputs = (0..batch.rows() as u32).collect();
        batch
    }
}

/// The GPU and its oracle.
pub struct Pair {
    pub gpu: CudaBackend,
    pub cpu: CpuBackend,
    pub random: Random,
}

/// Whether to try few and small cases only, for tools under which kernels run a hundred times slower.
pub fn small() -> bool {
    std::env::var_os("GQLA_TEST_SMALL").is_some()
}

/// Every case, or of many only a few.
pub fn cases<T>(all: Vec<T>, few: &[usize]) -> Vec<T> {
    if !small() {
        return all;
    }
    all.into_iter().enumerate().filter(|(i, _)| few.contains(i)).map(|(_, case)| case).collect()
}

/// Options of the tests' backends.
pub fn options() -> CudaOptions {
    CudaOptions { max_rows: 700, max_sequences: 64, max_context: 4096, ..CudaOptions::default() }
}

/// A GPU and a CPU backend, or nothing (said on stderr) where there is no GPU.
pub fn pair() -> Option<Pair> {
    if let Err(e) = available() {
        eprintln!("NOT RUN for lack of a GPU: {e}");
        return None;
    }
    let gpu = CudaBackend::new(Box::new(OneComm::new()), options()).unwrap();
    let cpu = CpuBackend::new(Box::new(OneComm::new()), 16).unwrap();
    Some(Pair { gpu, cpu, random: Random::new() })
}

impl Pair {
    pub fn begin(&mut self, batch: &Batch) {
        self.gpu.begin(batch).unwrap();
        self.cpu.begin(batch).unwrap();
    }

    /// The same activations on both.
    pub fn tensors(&self, values: &[f32], cols: usize) -> (cuda::Tensor, cpu::Tensor) {
        let rows = values.len() / cols;
        let mut g = self.gpu.tensor(rows, cols).unwrap();
        self.gpu.poison_tensor(&mut g, 0xff).unwrap();
        self.gpu.write(&mut g, values).unwrap();
        let mut c = self.cpu.tensor(rows, cols).unwrap();
        c.data_mut().copy_from_slice(values);
        (g, c)
    }

    /// Room for results; the GPU's is full of NaN.
    pub fn outputs(&self, rows: usize, cols: usize) -> (cuda::Tensor, cpu::Tensor) {
        let mut g = self.gpu.tensor(rows, cols).unwrap();
        self.gpu.poison_tensor(&mut g, 0xff).unwrap();
        (g, self.cpu.tensor(rows, cols).unwrap())
    }

    /// The same weights on both.
    pub fn matrices(&self, values: &[f32], cols: usize) -> (cuda::Matrix, cpu::Matrix) {
        let g = self.gpu.matrix_of(values, cols).unwrap();
        let bits: Vec<u16> = values.iter().map(|&v| half::bf16::from_f32(v).to_bits()).collect();
        let c = self.cpu.matrix_of(&[HostRows::Bf16(&bits, cols)], Reduction::Whole).unwrap();
        (g, c)
    }

    /// Compares `rows` rows of results: ‖gpu − cpu‖ / ‖cpu‖ below `bound`, every value written.
    pub fn same(&self, what: &str, (g, c): (&cuda::Tensor, &cpu::Tensor), rows: usize, bound: f64) {
        close(what, &self.gpu.read(g, rows).unwrap(), &self.cpu.read(c, rows).unwrap(), bound);
    }
}

/// ‖a − b‖ / ‖b‖ below `bound`, over all and for the worst 64th; NaN never passes.
pub fn close(what: &str, a: &[f32], b: &[f32], bound: f64) {
    assert_eq!(a.len(), b.len(), "{what}");
    if let Some(i) = a.iter().position(|x| !x.is_finite()) {
        panic!("{what}: value {i} of {} is {}, should be {}", a.len(), a[i], b[i]);
    }
    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
    let all = norm(&mut b.iter().map(|&x| f64::from(x))).max(1e-6);
    let error = norm(&mut a.iter().zip(b).map(|(&x, &y)| f64::from(x) - f64::from(y))) / all;
    assert!(error < bound, "{what}: relative error {error:.2e}, should be below {bound:.0e}");
    let part = a.len().div_ceil(64).max(16);
    for (i, (x, y)) in a.chunks(part).zip(b.chunks(part)).enumerate() {
        let size = norm(&mut y.iter().map(|&v| f64::from(v))).max(0.1 * all * (y.len() as f64 / b.len() as f64).sqrt());
        let error = norm(&mut x.iter().zip(y).map(|(&x, &y)| f64::from(x) - f64::from(y))) / size;
        assert!(error < 6.0 * bound, "{what}: relative error {error:.2e} in values from {} on", i * part);
    }
}

/// How many rows of `cols` values are within `bound` of the reference's. For models with experts:
/// where two experts score nearly alike, bf16 may choose the other one, and such a row is another model's.
pub fn rows_within(what: &str, a: &[f32], b: &[f32], cols: usize, bound: f64) -> usize {
    row_errors(what, a, b, cols).into_iter().filter(|&e| e < bound).count()
}

/// At least `part` of the rows of `cols` values are within `bound`.
pub fn rows_close(what: &str, a: &[f32], b: &[f32], cols: usize, bound: f64, part: f64) {
    let errors = row_errors(what, a, b, cols);
    let good = errors.iter().filter(|&&e| e < bound).count();
    assert!(
        good as f64 >= part * errors.len() as f64,
        "{what}: {good} of {} rows are within {bound:.0e}: {errors:.2?}",
        errors.len()
    );
}

/// Each row's relative error.
fn row_errors(what: &str, a: &[f32], b: &[f32], cols: usize) -> Vec<f64> {
    assert_eq!(a.len(), b.len(), "{what}");
    assert!(a.iter().all(|x| x.is_finite()), "{what}: values that are not finite");
    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
    a.chunks(cols)
        .zip(b.chunks(cols))
        .map(|(a, b)| {
            let size = norm(&mut b.iter().map(|&y| f64::from(y)));
            norm(&mut a.iter().zip(b).map(|(&x, &y)| f64::from(x) - f64::from(y))) / size
        })
        .collect()
}
