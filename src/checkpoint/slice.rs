//! Rows and columns of one tensor, read row by row from the mapped file, or made up.

use std::fmt;
use std::ops::Range;

use half::{bf16, f16};

use super::Dtype;

/// Rows and columns of one tensor, still on disk (or made up, for benchmarks without weights).
#[derive(Clone)]
pub struct Slice<'a> {
    pub(super) source: Source<'a>,
    /// Columns of the whole tensor.
    pub(super) stride: usize,
    pub(super) rows: Range<usize>,
    pub(super) cols: Range<usize>,
}

/// How the elements of a made-up slice come about.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum MadeUp {
    /// A hash of the tensor's name (`seed`), row and column; the slice begins at `row`, `col`. See
    /// `kernels/dummy_weights.cu` for the function.
    Noise {
        /// Hash of the tensor's name.
        seed: u64,
        /// The slice's first row.
        row: usize,
        /// The slice's first column.
        col: usize,
    },
    /// The same value everywhere.
    Constant(f32),
}

/// Where the elements of a whole tensor come from.
#[derive(Clone, Copy)]
pub(super) enum Source<'a> {
    /// Little-endian elements, row by row, perhaps unaligned.
    Mapped { bytes: &'a [u8], dtype: Dtype },
    /// Values near zero, by row and column.
    Noise(Noise),
    /// The same value everywhere.
    Constant(f32),
}

impl fmt::Debug for Slice<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Slice({:?}, rows {:?}, columns {:?} of {})", self.dtype(), self.rows, self.cols, self.stride)
    }
}

impl Slice<'_> {
    /// Rows of the slice.
    pub fn rows(&self) -> usize {
        self.rows.len()
    }

    /// Columns of the slice.
    pub fn cols(&self) -> usize {
        self.cols.len()
    }

    /// The stored type.
    pub fn dtype(&self) -> Dtype {
        match self.source {
            Source::Mapped { dtype, .. } => dtype,
            Source::Noise(_) | Source::Constant(_) => Dtype::Bf16,
        }
    }

    /// Some rows of this slice, counted from its first. Panics when they are not within it.
    pub fn subrows(&self, rows: Range<usize>) -> Self {
        assert!(rows.start <= rows.end && rows.end <= self.rows(), "rows {rows:?} of {self:?}");
        Slice { rows: self.rows.start + rows.start..self.rows.start + rows.end, ..self.clone() }
    }

    /// Row `row` as bf16 bits; exact for bf16, rounded to nearest even otherwise. `out.len() == cols()`.
    pub fn read_bf16(&self, row: usize, out: &mut [u16]) {
        let (row, bytes) = self.row(row, out.len());
        match self.source {
            Source::Mapped { dtype: Dtype::Bf16, .. } => each(bytes, out, u16::from_le_bytes),
            Source::Mapped { dtype: Dtype::F16, .. } => {
                each(bytes, out, |b| bf16::from_f32(f16::from_le_bytes(b).to_f32()).to_bits())
            }
            Source::Mapped { dtype: Dtype::F32, .. } => {
                each(bytes, out, |b| bf16::from_f32(f32::from_le_bytes(b)).to_bits())
            }
            Source::Noise(noise) => noise.fill(row, self.cols.start, out, |bits| bits),
            Source::Constant(value) => out.fill(bf16::from_f32(value).to_bits()),
        }
    }

    /// Row `row` as f32. `out.len() == cols()`.
    pub fn read_f32(&self, row: usize, out: &mut [f32]) {
        let (row, bytes) = self.row(row, out.len());
        match self.source {
            Source::Mapped { dtype: Dtype::Bf16, .. } => each(bytes, out, |b| widen(u16::from_le_bytes(b))),
            Source::Mapped { dtype: Dtype::F16, .. } => each(bytes, out, |b| f16::from_le_bytes(b).to_f32()),
            Source::Mapped { dtype: Dtype::F32, .. } => each(bytes, out, f32::from_le_bytes),
            Source::Noise(noise) => noise.fill(row, self.cols.start, out, widen),
            Source::Constant(value) => out.fill(value),
        }
    }

    /// What the elements are where they are made up: a device can make the same ones itself.
    pub fn made_up(&self) -> Option<MadeUp> {
        match self.source {
            Source::Mapped { .. } => None,
            Source::Noise(noise) => {
                Some(MadeUp::Noise { seed: noise.seed, row: self.rows.start, col: self.cols.start })
            }
            Source::Constant(value) => Some(MadeUp::Constant(value)),
        }
    }

    /// The row's number in the whole tensor, and its bytes within the slice's columns (none when it is made up).
    fn row(&self, row: usize, length: usize) -> (usize, &[u8]) {
        assert!(row < self.rows() && length == self.cols(), "row {row} into {length} elements from {self:?}");
        let row = self.rows.start + row;
        let Source::Mapped { bytes, dtype } = self.source else { return (row, &[]) };
        let at = |col: usize| (row * self.stride + col) * dtype.size();
        (row, &bytes[at(self.cols.start)..at(self.cols.end)])
    }
}

/// bf16 bits as f32, exact.
fn widen(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// Converts elements of `N` bytes one by one.
fn each<const N: usize, T>(bytes: &[u8], out: &mut [T], convert: impl Fn([u8; N]) -> T) {
    let (elements, _) = bytes.as_chunks::<N>();
    for (out, element) in out.iter_mut().zip(elements) {
        *out = convert(*element);
    }
}

/// Deterministic bf16 values that look like weights: mean 0, standard deviation 0.02, sums of four uniform digits.
#[derive(Clone, Copy)]
pub(super) struct Noise {
    seed: u64,
    /// bf16 bits by sum of digits, 0 to 60.
    values: &'static [u16; 61],
}

/// The standard deviation of the sum of four digits of 0 to 15 is √85; their mean is 30.
static VALUES: std::sync::LazyLock<[u16; 61]> = std::sync::LazyLock::new(|| {
    std::array::from_fn(|sum| bf16::from_f32((sum as f32 - 30.0) * (0.02 / 85f32.sqrt())).to_bits())
});

impl Noise {
    /// The values of the tensor called `name`.
    pub(super) fn of(name: &str) -> Noise {
        // FNV-1a: the same on every machine and in every release, unlike the standard library's hash.
        let seed = name.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
        Noise { seed, values: &VALUES }
    }

    /// Columns `first..` of a row. A value depends on name, row and column alone, so slices agree.
    fn fill<T>(&self, row: usize, first: usize, out: &mut [T], convert: impl Fn(u16) -> T) {
        let row = mix(self.seed ^ mix(row as u64));
        let quad = |quad: usize, out: &mut [T], skip: usize| {
            let sums = self.sums(row, quad) >> (16 * skip);
            for (lane, out) in out.iter_mut().enumerate() {
                *out = convert(self.values[(sums >> (16 * lane) & 63) as usize]);
            }
        };
        // Up to the first whole quad of columns, then quads, the last perhaps cut short.
        let head = ((4 - first % 4) % 4).min(out.len());
        let (start, rest) = out.split_at_mut(head);
        quad(first / 4, start, first % 4);
        for (i, out) in rest.chunks_mut(4).enumerate() {
            quad(first.div_ceil(4) + i, out, 0);
        }
    }

    /// Four sums of four digits each, 16 bits apart, for four columns.
    fn sums(&self, row: u64, quad: usize) -> u64 {
        const DIGITS: u64 = 0x0f0f_0f0f_0f0f_0f0f;
        const PAIRS: u64 = 0x00ff_00ff_00ff_00ff;
        let hash = mix(row.wrapping_add((quad as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)));
        let pairs = (hash & DIGITS) + (hash >> 4 & DIGITS);
        (pairs & PAIRS) + (pairs >> 8 & PAIRS)
    }
}

/// The mixing step of splitmix64.
fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
}
