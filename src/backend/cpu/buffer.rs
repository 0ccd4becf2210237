//! Memory: page-aligned buffers, matrices in the checkpoint's type, scratch of a thread, and columns shared by tasks.

use std::cell::RefCell;
use std::marker::PhantomData;

use memmap2::MmapMut;

use super::Workers;
use crate::backend::Reduction;
use crate::checkpoint::{Dtype, Slice};
use crate::error::{Error, Result};

/// Plain numbers for which all-zero bytes are a value.
pub(super) trait Plain: Copy + Send + Sync + 'static {}
impl Plain for f32 {}
impl Plain for u16 {}

/// Zeroed memory that starts on a page, in huge pages where the system has them; untouched pages take no room.
pub(super) struct Buffer<T> {
    map: MmapMut,
    len: usize,
    plain: PhantomData<T>,
}

impl<T: Plain> Buffer<T> {
    /// `len` zeroes.
    pub fn new(len: usize) -> Result<Buffer<T>> {
        let too_big = || Error::Memory(format!("an allocation of {len} elements exceeds the address space"));
        let bytes = len.checked_mul(size_of::<T>()).ok_or_else(too_big)?;
        let map = MmapMut::map_anon(bytes.max(1)).map_err(|e| {
            Error::Memory(format!(
                "cannot allocate {} MiB of host memory: {e}; use more ranks, a smaller cache or a smaller model",
                bytes >> 20
            ))
        })?;
        #[cfg(target_os = "linux")]
        if bytes >= 4 << 20 {
            // Only a hint: kernels without huge pages refuse it.
            let _ = map.advise(memmap2::Advice::HugePage);
        }
        Ok(Buffer { map, len, plain: PhantomData })
    }
}

impl<T: Plain> std::ops::Deref for Buffer<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: the map holds `len` elements, is page-aligned, and any bytes are a value of a Plain type.
        unsafe { std::slice::from_raw_parts(self.map.as_ptr().cast(), self.len) }
    }
}

impl<T: Plain> std::ops::DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.map.as_mut_ptr().cast(), self.len) }
    }
}

/// Activations `[rows, cols]`, f32, row-major.
pub struct Tensor {
    pub(super) data: Buffer<f32>,
    rows: usize,
    cols: usize,
}

impl Tensor {
    pub(super) fn new(rows: usize, cols: usize) -> Result<Tensor> {
        let len = rows.checked_mul(cols).ok_or_else(|| Error::Memory(format!("a [{rows}, {cols}] tensor is too big")));
        Ok(Tensor { data: Buffer::new(len?)?, rows, cols })
    }

    /// Rows there is room for.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// All elements, `[rows, cols]`.
    pub fn data(&self) -> &[f32] {
        &self.data
    }

    /// All elements, `[rows, cols]`.
    pub fn data_mut(&mut self) -> &mut [f32] {
        &mut self.data
    }
}

/// A weight matrix `[rows, cols]` as it is in the checkpoint: bf16, or f32 for f32 and f16.
pub struct Matrix {
    pub(super) data: Data,
    pub(super) rows: usize,
    pub(super) cols: usize,
    /// Canonical pieces of the reduction that this rank has: see [`linear`](super::linear).
    pub(super) segments: usize,
}

pub(super) enum Data {
    Bf16(Buffer<u16>),
    F32(Buffer<f32>),
}

impl Matrix {
    /// Rows (outputs).
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns (inputs).
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes of the elements.
    pub fn bytes(&self) -> usize {
        match &self.data {
            Data::Bf16(d) => d.len() * 2,
            Data::F32(d) => d.len() * 4,
        }
    }

    /// Row `row` as f32.
    pub(super) fn read_row(&self, row: usize, out: &mut [f32]) {
        let range = row * self.cols..(row + 1) * self.cols;
        match &self.data {
            Data::Bf16(d) => {
                for (o, &x) in out.iter_mut().zip(&d[range]) {
                    *o = f32::from_bits((x as u32) << 16);
                }
            }
            Data::F32(d) => out.copy_from_slice(&d[range]),
        }
    }

    /// The rows of `parts`, one under the other, read by all workers.
    pub(super) fn load<R: Rows>(
        workers: &Workers,
        parts: &[&R],
        reduction: Reduction,
        canonical: usize,
    ) -> Result<Matrix> {
        let cols = parts.first().map_or(0, |p| p.cols());
        if let Some(odd) = parts.iter().find(|p| p.cols() != cols) {
            return Err(Error::Internal(format!("stacked slices have {cols} and {} columns", odd.cols())));
        }
        let rows: usize = parts.iter().map(|p| p.rows()).sum();
        let len = rows.checked_mul(cols).ok_or_else(|| Error::Memory(format!("a [{rows}, {cols}] matrix is too big")));
        // (part, row of the part) of each row.
        let index: Vec<(usize, usize)> =
            parts.iter().enumerate().flat_map(|(p, part)| (0..part.rows()).map(move |r| (p, r))).collect();
        let data = if parts.iter().all(|p| p.is_bf16()) {
            let mut data = Buffer::<u16>::new(len?)?;
            fill(workers, &mut data, cols, |row, out| parts[index[row].0].read_bf16(index[row].1, out));
            Data::Bf16(data)
        } else {
            let mut data = Buffer::<f32>::new(len?)?;
            fill(workers, &mut data, cols, |row, out| parts[index[row].0].read_f32(index[row].1, out));
            Data::F32(data)
        };
        let segments = match reduction {
            Reduction::Split if cols.is_multiple_of(canonical) => canonical,
            _ => 1,
        };
        Ok(Matrix { data, rows, cols, segments })
    }
}

/// Calls `read(row, out)` for every row of `data`, in parallel.
fn fill<T: Plain>(workers: &Workers, data: &mut [T], cols: usize, read: impl Fn(usize, &mut [T]) + Sync) {
    let rows = data.len().checked_div(cols).unwrap_or(0);
    let chunk = (1usize << 18).div_ceil(cols.max(1));
    let shared = Shared::new(data);
    workers.run(rows.div_ceil(chunk), rows * cols, |task| {
        for row in task * chunk..((task + 1) * chunk).min(rows) {
            // SAFETY: each row is one task's.
            read(row, unsafe { shared.slice(row * cols, cols) });
        }
    });
}

/// Where a matrix comes from, row by row.
pub trait Rows: Sync {
    /// Rows.
    fn rows(&self) -> usize;
    /// Columns.
    fn cols(&self) -> usize;
    /// Stored as bf16.
    fn is_bf16(&self) -> bool;
    /// Row `row` as bf16 bits; called only where [`is_bf16`](Rows::is_bf16).
    fn read_bf16(&self, row: usize, out: &mut [u16]);
    /// Row `row` as f32.
    fn read_f32(&self, row: usize, out: &mut [f32]);
}

impl Rows for Slice<'_> {
    fn rows(&self) -> usize {
        Slice::rows(self)
    }
    fn cols(&self) -> usize {
        Slice::cols(self)
    }
    fn is_bf16(&self) -> bool {
        self.dtype() == Dtype::Bf16
    }
    fn read_bf16(&self, row: usize, out: &mut [u16]) {
        Slice::read_bf16(self, row, out)
    }
    fn read_f32(&self, row: usize, out: &mut [f32]) {
        Slice::read_f32(self, row, out)
    }
}

/// A matrix in host memory, for embedders, tests and benchmarks.
pub enum HostRows<'a> {
    /// bf16 bits, `[len / cols, cols]`.
    Bf16(&'a [u16], usize),
    /// f32, `[len / cols, cols]`.
    F32(&'a [f32], usize),
}

impl Rows for HostRows<'_> {
    fn rows(&self) -> usize {
        match self {
            HostRows::Bf16(d, cols) => d.len() / cols,
            HostRows::F32(d, cols) => d.len() / cols,
        }
    }
    fn cols(&self) -> usize {
        match self {
            HostRows::Bf16(_, cols) | HostRows::F32(_, cols) => *cols,
        }
    }
    fn is_bf16(&self) -> bool {
        matches!(self, HostRows::Bf16(..))
    }
    fn read_bf16(&self, row: usize, out: &mut [u16]) {
        if let HostRows::Bf16(d, cols) = self {
            out.copy_from_slice(&d[row * cols..(row + 1) * cols]);
        }
    }
    fn read_f32(&self, row: usize, out: &mut [f32]) {
        match self {
            HostRows::F32(d, cols) => out.copy_from_slice(&d[row * cols..(row + 1) * cols]),
            HostRows::Bf16(d, cols) => {
                for (o, &x) in out.iter_mut().zip(&d[row * cols..(row + 1) * cols]) {
                    *o = f32::from_bits((x as u32) << 16);
                }
            }
        }
    }
}

/// A mutable slice that parallel tasks write disjoint parts of.
#[derive(Clone, Copy)]
pub(super) struct Shared<'a, T> {
    start: *mut T,
    len: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: access is through `slice`, whose callers keep concurrent parts disjoint.
unsafe impl<T: Send> Sync for Shared<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub fn new(data: &'a mut [T]) -> Self {
        Shared { start: data.as_mut_ptr(), len: data.len(), borrow: PhantomData }
    }

    /// Elements `first .. first + len`.
    ///
    /// # Safety
    /// No other reference to any of them is alive.
    #[inline]
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn slice(&self, first: usize, len: usize) -> &'a mut [T] {
        assert!(first <= self.len && len <= self.len - first);
        // SAFETY: inside the borrowed slice; the caller keeps parts disjoint.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(first), len) }
    }
}

thread_local! {
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Lends `work` the thread's scratch, one slice of each of `sizes`, each on a 64-byte line. What they hold is
/// whatever was there.
pub(super) fn with_scratch<T, const N: usize>(sizes: [usize; N], work: impl FnOnce([&mut [f32]; N]) -> T) -> T {
    const LINE: usize = 16;
    let total: usize = sizes.iter().map(|s| s.next_multiple_of(LINE)).sum();
    // Taken out rather than borrowed: should scratch ever nest, the inner one is just fresh.
    let mut scratch = SCRATCH.take();
    if scratch.len() < total + LINE {
        scratch = vec![0.0; total + LINE];
    }
    let skip = scratch.as_ptr().align_offset(64).min(LINE);
    let mut rest = &mut scratch[skip..];
    let parts = sizes.map(|size| {
        let (part, tail) = std::mem::take(&mut rest).split_at_mut(size.next_multiple_of(LINE));
        rest = tail;
        &mut part[..size]
    });
    let result = work(parts);
    SCRATCH.set(scratch);
    result
}
