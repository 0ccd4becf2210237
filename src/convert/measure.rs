//! Sums over the calibration: second moments of whatever a layer computes, over samples in parallel and over ranks.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use faer::linalg::matmul::matmul;
use faer::linalg::matmul::triangular::{self, BlockStructure};
use faer::{Accum, Mat, MatMut, MatRef, get_global_parallelism};
use rayon::prelude::*;

use super::attention::norm;
use super::hidden::Hidden;
use crate::comm::Communicator;
use crate::error::{Error, Result};

/// This rank's samples at the input of one layer.
pub struct Samples<'a> {
    /// Residual streams.
    pub hidden: &'a Hidden,
    /// This rank's samples.
    pub count: usize,
    /// Tokens of all ranks' samples.
    pub tokens: usize,
    /// The layer's input norm and its eps.
    pub norm: (&'a [f32], f32),
    /// Token weights, mean 1, for each of this rank's samples.
    pub weights: Option<&'a [Vec<f32>]>,
    /// The ranks that share the calibration.
    pub comm: &'a Mutex<Box<dyn Communicator>>,
    /// Set by ctrl-C.
    pub stop: &'a AtomicBool,
}

/// Rows that one sample adds to a [`Gram`]. They are already multiplied by the root of their weights.
pub struct Part {
    /// `[length, width]`
    pub rows: Vec<f32>,
    /// `[length, cross]`, empty where no products are wanted.
    pub cross: Vec<f32>,
}

/// Sums of products over the calibration, divided by its tokens.
pub struct Gram {
    /// `E[x xᵀ]`
    pub second: Mat<f64>,
    /// `E[y xᵀ]`, `[cross, width]`
    pub cross: Mat<f64>,
    /// `E[x]` (of the rows as given).
    pub mean: Vec<f64>,
    /// `E|y|²`
    pub power: f64,
}

impl Samples<'_> {
    /// The normed input of sample `i`, `[length, hidden]`.
    pub fn input(&self, i: usize) -> Result<Vec<f32>> {
        let mut h = self.hidden.read(i)?;
        norm(&mut h, self.norm.0, self.norm.1);
        Ok(h)
    }

    /// Multiplies row t by the root of sample `i`'s weight of token t.
    pub fn weigh(&self, i: usize, rows: &mut [f32], width: usize) {
        if let Some(weights) = self.weights {
            for (row, w) in rows.chunks_exact_mut(width).zip(&weights[i]) {
                let w = w.sqrt();
                row.iter_mut().for_each(|x| *x *= w);
            }
        }
    }

    /// Calls `work` with the index and the normed input of each sample, several at a time, and `merge` with its
    /// results in order.
    pub fn each<T: Send>(
        &self,
        work: impl Fn(usize, &[f32]) -> Result<T> + Sync,
        mut merge: impl FnMut(Vec<T>) -> Result<()>,
    ) -> Result<()> {
        let together = rayon::current_num_threads().clamp(2, 16);
        for first in (0..self.count).step_by(together) {
            if self.stop.load(Ordering::Relaxed) {
                return Err(Error::Interrupted);
            }
            let some = first..(first + together).min(self.count);
            let done = some.into_par_iter().map(|i| work(i, &self.input(i)?)).collect::<Result<Vec<T>>>()?;
            merge(done)?;
        }
        Ok(())
    }

    /// Second moments of rows of `width` elements, and their products with `cross` others.
    pub fn gram(
        &self,
        width: usize,
        cross: usize,
        work: impl Fn(usize, &[f32]) -> Result<Part> + Sync,
    ) -> Result<Gram> {
        let mut second = Mat::<f64>::zeros(width, width);
        let mut products = Mat::<f64>::zeros(cross, width);
        let mut mean = vec![0f64; width + 1];
        let mut sum = Mat::<f32>::zeros(width, width);
        let mut partial = Mat::<f32>::zeros(cross, width);
        self.each(work, |parts| {
            // One product over the samples together, in f32; the sums over all of them are f64.
            let rows: Vec<f32> = parts.iter().flat_map(|p| p.rows.iter().copied()).collect();
            let other: Vec<f32> = parts.iter().flat_map(|p| p.cross.iter().copied()).collect();
            let count = rows.len() / width;
            let view = MatRef::from_row_major_slice(&rows, count, width);
            triangular::matmul(
                sum.as_mut(),
                BlockStructure::TriangularLower,
                Accum::Replace,
                view.transpose(),
                BlockStructure::Rectangular,
                view,
                BlockStructure::Rectangular,
                1.0f32,
                get_global_parallelism(),
            );
            for c in 0..width {
                for r in c..width {
                    second[(r, c)] += f64::from(sum[(r, c)]);
                }
            }
            for row in rows.chunks_exact(width) {
                row.iter().zip(&mut mean).for_each(|(x, m)| *m += f64::from(*x));
            }
            if cross > 0 {
                let other_view = MatRef::from_row_major_slice(&other, count, cross);
                let to: MatMut<'_, f32> = partial.as_mut();
                matmul(to, Accum::Replace, other_view.transpose(), view, 1.0f32, get_global_parallelism());
                for c in 0..width {
                    for r in 0..cross {
                        products[(r, c)] += f64::from(partial[(r, c)]);
                    }
                }
                mean[width] += other.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>();
            }
            Ok(())
        })?;
        self.sum_matrix(&mut second)?;
        self.sum_matrix(&mut products)?;
        self.sum(&mut mean)?;
        let scale = 1.0 / self.tokens as f64;
        for c in 0..width {
            for r in c..width {
                second[(r, c)] *= scale;
                second[(c, r)] = second[(r, c)];
            }
            (0..cross).for_each(|r| products[(r, c)] *= scale);
        }
        mean.iter_mut().for_each(|m| *m *= scale);
        let power = mean.pop().unwrap_or(0.0);
        Ok(Gram { second, cross: products, mean, power })
    }

    fn sum_matrix(&self, m: &mut Mat<f64>) -> Result<()> {
        for c in 0..m.ncols() {
            if let Some(column) = m.as_mut().col_mut(c).try_as_col_major_mut() {
                self.sum(column.as_slice_mut())?;
            }
        }
        Ok(())
    }

    /// Sums `values` over the ranks, in rank order: every rank gets the same bits.
    pub fn sum(&self, values: &mut [f64]) -> Result<()> {
        sum_over_ranks(self.comm, values)
    }
}

/// Sums `values` over the ranks, in rank order.
pub fn sum_over_ranks(comm: &Mutex<Box<dyn Communicator>>, values: &mut [f64]) -> Result<()> {
    let mut comm = comm.lock().unwrap_or_else(PoisonError::into_inner);
    let world = comm.world();
    if world == 1 || values.is_empty() {
        return Ok(());
    }
    let mine: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let mut all = vec![0; mine.len() * world];
    comm.all_gather(&mine, &mut all)?;
    values.fill(0.0);
    for rank in all.chunks_exact(mine.len()) {
        let (words, _) = rank.as_chunks::<8>();
        values.iter_mut().zip(words).for_each(|(v, w)| *v += f64::from_le_bytes(*w));
    }
    Ok(())
}

impl Gram {
    /// The centred covariance, divided by N−1 of `tokens`; `mean` and `second` are of the same rows.
    pub fn covariance(&self, tokens: usize) -> Mat<f64> {
        let scale = tokens as f64 / (tokens.max(2) - 1) as f64;
        Mat::from_fn(self.second.nrows(), self.second.ncols(), |r, c| {
            (self.second[(r, c)] - self.mean[r] * self.mean[c]) * scale
        })
    }
}
