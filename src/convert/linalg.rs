//! The linear algebra of conversions: f64 matrices by faer, all cores.

use faer::linalg::matmul::matmul;
use faer::prelude::Solve;
use faer::{Accum, Mat, MatMut, MatRef, Par, Side};

use crate::error::{Error, Result};

/// A row-major f32 matrix: weights, and rows of activations.
#[derive(Debug, Clone, PartialEq)]
pub struct Rows {
    /// Columns.
    pub cols: usize,
    /// `[rows, cols]`
    pub data: Vec<f32>,
}

impl Rows {
    /// Zeroes.
    pub fn zeros(rows: usize, cols: usize) -> Rows {
        Rows { cols, data: vec![0.0; rows * cols] }
    }

    /// Rounded from an f64 matrix.
    pub fn from_mat(m: MatRef<'_, f64>) -> Rows {
        let mut data = Vec::with_capacity(m.nrows() * m.ncols());
        for r in 0..m.nrows() {
            data.extend((0..m.ncols()).map(|c| m[(r, c)] as f32));
        }
        Rows { cols: m.ncols(), data }
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.data.len() / self.cols.max(1)
    }

    /// One row.
    pub fn row(&self, r: usize) -> &[f32] {
        &self.data[r * self.cols..(r + 1) * self.cols]
    }

    /// As faer sees it.
    pub fn view(&self) -> MatRef<'_, f32> {
        MatRef::from_row_major_slice(&self.data, self.rows(), self.cols)
    }

    /// Some rows as an f64 matrix.
    pub fn mat(&self, first: usize, count: usize) -> Mat<f64> {
        Mat::from_fn(count, self.cols, |r, c| f64::from(self.data[(first + r) * self.cols + c]))
    }

    /// All of it as an f64 matrix.
    pub fn whole(&self) -> Mat<f64> {
        self.mat(0, self.rows())
    }
}

/// e^x within two units in the last place, for x up to 88 (below −87 it stays at e^−87): no branch and no call, so that loops over it
/// are vectorised.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // Adding and taking away 1.5·2^23 rounds to a whole number.
    const ROUND: f32 = 12_582_912.0;
    let x = x.clamp(-87.0, 88.0);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let p = 1.0 / 5040.0;
    let p = p * r + 1.0 / 720.0;
    let p = p * r + 1.0 / 120.0;
    let p = p * r + 1.0 / 24.0;
    let p = p * r + 1.0 / 6.0;
    let p = p * r + 0.5;
    let p = p * r * r + r + 1.0;
    let power = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32).wrapping_add(127) << 23;
    p * f32::from_bits(power as u32)
}

/// The sum, over sixteen lanes at once.
pub fn sum(x: &[f32]) -> f32 {
    let (chunks, rest) = x.as_chunks::<16>();
    let mut lanes = [0f32; 16];
    for chunk in chunks {
        lanes.iter_mut().zip(chunk).for_each(|(l, x)| *l += x);
    }
    lanes.iter().sum::<f32>() + rest.iter().sum::<f32>()
}

/// The largest element, over sixteen lanes at once.
pub fn largest(x: &[f32]) -> f32 {
    let (chunks, rest) = x.as_chunks::<16>();
    let mut lanes = [f32::NEG_INFINITY; 16];
    for chunk in chunks {
        lanes.iter_mut().zip(chunk).for_each(|(l, x)| *l = if *x > *l { *x } else { *l });
    }
    lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max)
}

/// `x·wᵀ` of row-major f32, on this thread alone (samples are what runs in parallel).
pub fn product(x: &[f32], width: usize, w: &Rows) -> Vec<f32> {
    let rows = x.len() / width;
    let mut out = vec![0.0; rows * w.rows()];
    matmul(
        MatMut::from_row_major_slice_mut(&mut out, rows, w.rows()),
        Accum::Replace,
        MatRef::from_row_major_slice(x, rows, width),
        w.view().transpose(),
        1.0f32,
        Par::Seq,
    );
    out
}

/// The blocks one under the other.
pub fn stack(blocks: &[Mat<f64>]) -> Mat<f64> {
    let cols = blocks.first().map_or(0, |b| b.ncols());
    let mut out = Mat::zeros(blocks.iter().map(|b| b.nrows()).sum(), cols);
    let mut at = 0;
    for b in blocks {
        out.as_mut().subrows_mut(at, b.nrows()).copy_from(b);
        at += b.nrows();
    }
    out
}

/// The blocks side by side.
pub fn beside(blocks: &[Mat<f64>]) -> Mat<f64> {
    let rows = blocks.first().map_or(0, |b| b.nrows());
    let mut out = Mat::zeros(rows, blocks.iter().map(|b| b.ncols()).sum());
    let mut at = 0;
    for b in blocks {
        out.as_mut().subcols_mut(at, b.ncols()).copy_from(b);
        at += b.ncols();
    }
    out
}

/// Mean of the diagonal.
pub fn mean_diagonal(m: &Mat<f64>) -> f64 {
    (0..m.nrows()).map(|i| m[(i, i)]).sum::<f64>() / m.nrows().max(1) as f64
}

/// Adds `part` of the mean diagonal to the diagonal, and a little where everything is zero.
pub fn ridge(m: &mut Mat<f64>, part: f64) {
    let add = (part * mean_diagonal(m)).max(f64::MIN_POSITIVE);
    for i in 0..m.nrows() {
        m[(i, i)] += add;
    }
}

/// Eigenvalues, descending, and eigenvectors as columns of a symmetric matrix.
pub fn eigen(m: &Mat<f64>) -> Result<(Vec<f64>, Mat<f64>)> {
    let failed = || Error::Internal("an eigendecomposition did not converge: are there NaNs in the weights?".into());
    let found = m.self_adjoint_eigen(Side::Lower).map_err(|_| failed())?;
    let (values, vectors, n) = (found.S(), found.U(), m.nrows());
    let descending = (0..n).map(|i| values[n - 1 - i]).collect();
    Ok((descending, Mat::from_fn(n, n, |r, c| vectors[(r, n - 1 - c)])))
}

/// The square root of a positive semidefinite matrix and its inverse; eigenvalues below 1e-10 of the largest count as
/// that much.
pub fn square_root(m: &Mat<f64>) -> Result<(Mat<f64>, Mat<f64>)> {
    let (values, vectors) = eigen(m)?;
    let floor = values.first().copied().unwrap_or(0.0).max(f64::MIN_POSITIVE * 1e12) * 1e-10;
    let scaled = |power: f64| {
        Mat::from_fn(m.nrows(), m.ncols(), |r, c| vectors[(r, c)] * values[c].max(floor).powf(power))
            * vectors.transpose()
    };
    Ok((scaled(0.5), scaled(-0.5)))
}

/// `x` with `x·m = b`, for a symmetric positive definite `m`.
pub fn solve_right(m: &Mat<f64>, b: &Mat<f64>) -> Result<Mat<f64>> {
    let factor = m.llt(Side::Lower).map_err(|_| {
        Error::Internal("a normal matrix is not positive definite: are there NaNs in the weights?".into())
    })?;
    Ok(factor.solve(b.transpose().to_owned()).transpose().to_owned())
}

/// The sum of singular values, by the Gram matrix of the smaller side.
pub fn nuclear_norm(m: &Mat<f64>) -> Result<f64> {
    let values = m.singular_values().map_err(|_| Error::Internal("singular values did not converge".into()))?;
    Ok(values.iter().sum())
}

/// Squares of the singular values, descending, and right singular vectors as columns, by the smaller Gram matrix.
/// Vectors whose value is 1e-14 of the largest are left out.
pub fn right_singular(z: &Mat<f64>) -> Result<(Vec<f64>, Mat<f64>)> {
    if z.nrows() >= z.ncols() {
        return eigen(&(z.transpose() * z));
    }
    let (values, left) = eigen(&(z * z.transpose()))?;
    let floor = values.first().copied().unwrap_or(0.0) * 1e-14;
    let count = values.iter().take_while(|v| **v > floor && **v > 0.0).count();
    let through = z.transpose() * left.as_ref().subcols(0, count);
    let vectors = Mat::from_fn(z.ncols(), count, |r, c| through[(r, c)] / values[c].sqrt());
    Ok((values, vectors))
}

/// The best shared projection of rank `rank`: minimises `Σ_r ‖L_r (W_r − A_r B) C^½‖²` over `B` `[rank, in]` and one
/// `A_r` `[d_r, rank]` a block, where `L_rᵀL_r` is block r's output metric and `C` the inputs' second moment.
pub fn shared_projection(
    blocks: &[Mat<f64>],
    metrics: &[Mat<f64>],
    moment: &Mat<f64>,
    rank: usize,
) -> Result<(Mat<f64>, Vec<Mat<f64>>)> {
    let (root, inverse) = square_root(moment)?;
    let roots = metrics.iter().map(square_root).collect::<Result<Vec<_>>>()?;
    let scaled: Vec<Mat<f64>> = blocks.iter().zip(&roots).map(|(w, (l, _))| l * w * &root).collect();
    let z = stack(&scaled);
    let (_, vectors) = right_singular(&z)?;
    let rank_there = rank.min(vectors.ncols());
    let leading = vectors.as_ref().subcols(0, rank_there);
    let mut shared = Mat::zeros(rank, moment.ncols());
    shared.as_mut().subrows_mut(0, rank_there).copy_from(leading.transpose() * &inverse);
    let mut maps = Vec::with_capacity(blocks.len());
    for (s, (_, back)) in scaled.iter().zip(&roots) {
        let mut map = Mat::zeros(back.nrows(), rank);
        map.as_mut().subcols_mut(0, rank_there).copy_from(back * (s * leading));
        maps.push(map);
    }
    // An orthonormal basis of the same rows: what is rounded to f32 or bf16 is then well conditioned.
    let factors = shared.transpose().to_owned().qr();
    let (basis, triangle) = (factors.compute_thin_Q(), factors.thin_R().to_owned());
    if rank <= moment.ncols() {
        maps.iter_mut().for_each(|map| *map = &*map * triangle.transpose());
        shared = basis.transpose().to_owned();
    }
    Ok((shared, maps))
}

#[cfg(test)]
mod tests {
    use super::exp;

    #[test]
    fn exp_is_e_to_the_x() {
        for i in -86_000..=88_000 {
            let x = i as f32 / 1000.0;
            let (ours, exact) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((ours - exact).abs() <= 3e-7 * exact, "e^{x}: {ours} against {exact}");
        }
        assert!(exp(-1e30) < 1e-37 && exp(0.0) == 1.0);
    }
}
