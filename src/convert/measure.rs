//! Sums over the calibration: second moments of whatever a layer computes, over samples in parallel and over ranks.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use faer::linalg::matmul::matmul;
use faer::linalg::matmul::triangular::{self, BlockStructure};
use faer::{Accum, Mat, MatRef, Par, get_global_parallelism};
use rayon::prelude::*;

use super::attention::norm;
use super::hidden::Hidden;
use crate::comm::Communicator;
use crate::error::{Error, Result};

/// Widest second moment that each thread may hold a part of.
const NARROW: usize = 1024;

/// Elements of a matrix that ranks exchange at once.
const EXCHANGED: usize = 1 << 20;

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
    /// Told what is done with the samples now.
    pub told: &'a (dyn Fn(&str) + Sync),
}

/// Rows that one sample adds to a [`Gram`]. They are already multiplied by the root of their weights.
pub struct Part {
    /// `[length, width]`
    pub rows: Vec<f32>,
    /// `[length, cross]`, empty where no products are wanted.
    pub cross: Vec<f32>,
}

/// A sample's products with itself (the lower half) and with `cross`.
type Products = (Mat<f32>, Mat<f32>);

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
        // Products within a sample are f32 and the sums over samples f64, so that neither the threads nor the ranks that
        // share the samples make a difference. Narrow products run beside each other, wide ones on all threads.
        let narrow = width <= NARROW;
        let products_of = |part: &Part, own: &mut Mat<f32>, with: &mut Mat<f32>, par: Par| {
            let count = part.rows.len() / width;
            let rows = MatRef::from_row_major_slice(&part.rows, count, width);
            triangular::matmul(
                own.as_mut(),
                BlockStructure::TriangularLower,
                Accum::Replace,
                rows.transpose(),
                BlockStructure::Rectangular,
                rows,
                BlockStructure::Rectangular,
                1.0f32,
                par,
            );
            if cross > 0 {
                let other = MatRef::from_row_major_slice(&part.cross, count, cross);
                matmul(with.as_mut(), Accum::Replace, other.transpose(), rows, 1.0f32, par);
            }
        };
        let room = || (Mat::<f32>::zeros(width, width), Mat::<f32>::zeros(cross, width));
        let one = |i: usize, h: &[f32]| -> Result<(Part, Option<Products>)> {
            let part = work(i, h)?;
            let made = narrow.then(|| {
                let (mut own, mut with) = room();
                products_of(&part, &mut own, &mut with, Par::Seq);
                (own, with)
            });
            Ok((part, made))
        };
        let mut wide = if narrow { None } else { Some(room()) };
        self.each(one, |parts| {
            for (part, made) in parts {
                if let Some((own, with)) = &mut wide {
                    products_of(&part, own, with, get_global_parallelism());
                }
                if let Some((own, with)) = made.as_ref().or(wide.as_ref()) {
                    add(&mut second, own, true);
                    add(&mut products, with, false);
                }
                for row in part.rows.chunks_exact(width) {
                    row.iter().zip(&mut mean).for_each(|(x, m)| *m += f64::from(*x));
                }
                mean[width] += part.cross.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>();
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

    /// Sums a matrix over the ranks, many columns in one exchange.
    fn sum_matrix(&self, m: &mut Mat<f64>) -> Result<()> {
        if self.comm.lock().unwrap_or_else(PoisonError::into_inner).world() == 1 || m.nrows() == 0 {
            return Ok(());
        }
        let together = (EXCHANGED / m.nrows()).max(1);
        for first in (0..m.ncols()).step_by(together) {
            let columns = first..(first + together).min(m.ncols());
            let mut values = Vec::with_capacity(columns.len() * m.nrows());
            for c in columns.clone() {
                values.extend((0..m.nrows()).map(|r| m[(r, c)]));
            }
            self.sum(&mut values)?;
            for (c, column) in columns.zip(values.chunks_exact(m.nrows())) {
                column.iter().enumerate().for_each(|(r, x)| m[(r, c)] = *x);
            }
        }
        Ok(())
    }

    /// Sums `values` over the ranks, in rank order: every rank gets the same bits.
    pub fn sum(&self, values: &mut [f64]) -> Result<()> {
        sum_over_ranks(self.comm, values)
    }
}

/// Adds `what` to `to`, of `lower` matrices the lower half alone.
fn add(to: &mut Mat<f64>, what: &Mat<f32>, lower: bool) {
    to.as_mut().par_col_iter_mut().zip(what.as_ref().par_col_iter()).enumerate().for_each(|(c, (to, what))| {
        let first = if lower { c } else { 0 };
        if let (Some(to), Some(what)) = (to.try_as_col_major_mut(), what.try_as_col_major()) {
            let pairs = to.as_slice_mut()[first..].iter_mut().zip(&what.as_slice()[first..]);
            pairs.for_each(|(to, what)| *to += f64::from(*what));
        }
    });
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
