//! Weights to the GPU: rows are read into one page-locked buffer while the other is on its way. Made-up weights are
//! made there.

use std::cell::RefCell;
use std::sync::Arc;

use rayon::prelude::*;

use super::context::{Event, Gpu, Memory, Pinned, bytes_of};
use super::kernels::{Kernels, Launch, arguments, source};
use crate::checkpoint::{MadeUp, Slice};
use crate::error::{Error, Result};

/// Bytes of one staging buffer.
pub(crate) const STAGE: usize = 32 << 20;

/// A weight matrix `[rows, cols]`, bf16.
pub struct Matrix {
    pub(crate) memory: Memory,
    /// Rows (outputs).
    pub rows: usize,
    /// Columns (inputs).
    pub cols: usize,
}

/// A small vector: norm weights, biases. f32, and bf16 for cuBLASLt's biases.
pub struct Vector {
    pub(crate) memory: Memory,
    pub(crate) bf16: Memory,
    /// Elements.
    pub len: usize,
}

/// Copies weights. Its buffers are let go when loading is over.
pub(crate) struct Loader {
    gpu: Arc<Gpu>,
    stages: RefCell<Option<Stages>>,
}

/// Two buffers by turns.
struct Stages {
    turn: usize,
    buffers: [(Pinned, Event); 2],
}

impl Loader {
    pub fn new(gpu: &Arc<Gpu>) -> Loader {
        Loader { gpu: gpu.clone(), stages: RefCell::new(None) }
    }

    /// Lets the buffers go.
    pub fn finish(&self) {
        self.stages.take();
    }

    /// The rows of `parts`, one under the other.
    pub fn matrix(&self, kernels: &Kernels, parts: &[Slice]) -> Result<Matrix> {
        let cols = parts.first().map_or(0, |p| p.cols());
        let rows: usize = parts.iter().map(|p| p.rows()).sum();
        let memory = Memory::uninit(&self.gpu, rows * cols * 2)?;
        self.rows(kernels, parts, memory.at())?;
        Ok(Matrix { memory, rows, cols })
    }

    /// Writes the rows of `parts` at `to`.
    pub fn rows(&self, kernels: &Kernels, parts: &[Slice], to: u64) -> Result<()> {
        let cols = parts.first().map_or(0, |p| p.cols());
        if let Some(odd) = parts.iter().find(|p| p.cols() != cols) {
            return Err(Error::Internal(format!("stacked slices have {cols} and {} columns", odd.cols())));
        }
        let mut at = to;
        for part in parts {
            match part.made_up() {
                Some(how) => self.make_up(kernels, part, how, at)?,
                None => self.copy(part, at)?,
            }
            at += (part.rows() * cols * 2) as u64;
        }
        Ok(())
    }

    fn copy(&self, part: &Slice, to: u64) -> Result<()> {
        let cols = part.cols();
        if cols == 0 || part.rows() == 0 {
            return Ok(());
        }
        let mut stages = self.stages.borrow_mut();
        if stages.is_none() {
            let stage = || Ok((Pinned::new(&self.gpu, STAGE)?, Event::new(&self.gpu)?));
            *stages = Some(Stages { turn: 0, buffers: [stage()?, stage()?] });
        }
        let Some(Stages { turn, buffers }) = stages.as_mut() else { return Ok(()) };
        let most = (STAGE / 2 / cols).max(1);
        if cols > STAGE / 2 {
            return Err(Error::Internal(format!("a row of {cols} elements does not fit the staging buffer")));
        }
        for first in (0..part.rows()).step_by(most) {
            let count = most.min(part.rows() - first);
            let (pinned, event) = &mut buffers[*turn % 2];
            event.wait()?;
            let out = &mut pinned.slice_mut::<u16>()[..count * cols];
            out.par_chunks_mut(cols).enumerate().for_each(|(i, out)| part.read_bf16(first + i, out));
            self.gpu.upload(to + (first * cols * 2) as u64, bytes_of(out))?;
            event.record()?;
            *turn += 1;
        }
        Ok(())
    }

    fn make_up(&self, kernels: &Kernels, part: &Slice, how: MadeUp, to: u64) -> Result<()> {
        let (rows, cols) = (part.rows(), part.cols());
        match how {
            MadeUp::Noise { seed, row, col } => self.noise(kernels, to, (rows, cols), seed, (row, col), 0.02),
            MadeUp::Constant(value) => {
                #[repr(C)]
                struct Constant(u64, u64, f32);
                let f = kernels.get(&source::DUMMY_WEIGHTS, "dummy_constant", &[])?;
                let constant = Constant(to, (rows * cols) as u64, value);
                kernels.launch(f, Launch::new((rows * cols).div_ceil(256), 256), arguments![constant])
            }
        }
    }

    /// Fills `[rows, cols]` bf16 at `to` with a hash of `seed`, row and column, counted from `first`; mean 0.
    pub fn noise(
        &self,
        kernels: &Kernels,
        to: u64,
        (rows, cols): (usize, usize),
        seed: u64,
        (row, col): (usize, usize),
        deviation: f32,
    ) -> Result<()> {
        #[repr(C)]
        struct Noise(u64, u64, u64, u64, u64, f32);
        let f = kernels.get(&source::DUMMY_WEIGHTS, "dummy_noise", &[])?;
        // A grid has at most 65535 rows.
        for first in (0..rows).step_by(65535) {
            let at = to + (first * cols * 2) as u64;
            let noise = Noise(at, seed, (row + first) as u64, col as u64, cols as u64, deviation / 85f32.sqrt());
            let grid = (cols.div_ceil(1024), (rows - first).min(65535), 1);
            kernels.launch(f, Launch { grid, block: 256, ..Launch::default() }, arguments![noise])?;
        }
        Ok(())
    }

    /// A vector from host memory.
    pub fn vector(&self, data: &[f32]) -> Result<Vector> {
        let memory = Memory::uninit(&self.gpu, data.len() * 4)?;
        let bf16 = Memory::uninit(&self.gpu, data.len() * 2)?;
        let rounded: Vec<u16> = data.iter().map(|&x| half::bf16::from_f32(x).to_bits()).collect();
        self.gpu.upload(memory.at(), bytes_of(data))?;
        self.gpu.upload(bf16.at(), bytes_of(&rounded))?;
        self.gpu.synchronize()?;
        Ok(Vector { memory, bf16, len: data.len() })
    }
}
