//! The values' path refitted by least squares: a group's shared projection and every head's output columns, in turn.
//!
//! Attention's output is `Σ_j O_j B_g(j) c̄_j`, where `c̄_j` is head j's mean of the latents under its attention weights.
//! Given the second moments of all `c̄` and their products with the wanted output, both steps are linear: the outputs
//! `O` by a ridge regression over all heads together (heads make good for each other), the projections `B` by
//! preconditioned conjugate gradients. Nothing is trained: two or three rounds reach what many reach.

use faer::Mat;
use rayon::prelude::*;

use super::linalg::{beside, mean_diagonal, ridge, solve_right, stack};
use crate::error::Result;

/// Part of the mean diagonal added in the regression of the outputs.
const RIDGE: f64 = 1e-4;
/// Conjugate-gradient steps a round.
const STEPS: usize = 12;
/// Part of the output's power below which a missing part is rounding.
const EXACT: f64 = 1e-6;

/// What a refit needs of the calibration, for some heads `0..n` of pooled width p.
pub struct Moments {
    /// `E[c̄ c̄ᵀ]` of all heads' pooled latents, `[n·p, n·p]`.
    pub pooled: Mat<f64>,
    /// `E[y c̄ᵀ]` with the wanted output y, `[hidden, n·p]`.
    pub cross: Mat<f64>,
    /// `E|y|²`.
    pub power: f64,
}

/// The values' path: one projection a group, output columns a head.
#[derive(Clone)]
pub struct Values {
    /// The group of each head.
    pub group_of: Vec<usize>,
    /// `[value, p]` a group.
    pub shared: Vec<Mat<f64>>,
    /// `[hidden, value]` a head.
    pub output: Vec<Mat<f64>>,
}

impl Values {
    /// `OᵀO` of all heads, `[n·value, n·value]`.
    fn products(&self) -> Mat<f64> {
        let outputs = beside(&self.output);
        outputs.transpose() * &outputs
    }

    /// Half the gradient of the squared output by the projections, for projections `shared`:
    /// `Σ_{j in g} Σ_i O_jᵀ O_i B_g(i) E[c̄_i c̄_jᵀ]`, `[value, p]` a group.
    fn through(&self, shared: &[Mat<f64>], products: &Mat<f64>, m: &Moments) -> Vec<Mat<f64>> {
        let (value, p) = (shared[0].nrows(), shared[0].ncols());
        let of_head = |j: usize| -> Mat<f64> {
            let mut all = Mat::zeros(self.group_of.len() * value, p);
            for (i, g) in self.group_of.iter().enumerate() {
                let block = &shared[*g] * m.pooled.as_ref().submatrix(i * p, j * p, p, p);
                all.as_mut().subrows_mut(i * value, value).copy_from(&block);
            }
            products.as_ref().subrows(j * value, value) * &all
        };
        self.by_group((0..self.group_of.len()).into_par_iter().map(of_head).collect())
    }

    /// The same of the wanted output: `Σ_{j in g} O_jᵀ E[y c̄_jᵀ]`.
    fn wanted(&self, m: &Moments) -> Vec<Mat<f64>> {
        let p = self.shared[0].ncols();
        let of_head = |(j, o): (usize, &Mat<f64>)| o.transpose() * m.cross.as_ref().subcols(j * p, p);
        self.by_group(self.output.par_iter().enumerate().map(of_head).collect())
    }

    fn by_group(&self, of_heads: Vec<Mat<f64>>) -> Vec<Mat<f64>> {
        let mut sums = vec![Mat::zeros(self.shared[0].nrows(), self.shared[0].ncols()); self.shared.len()];
        self.group_of.iter().zip(&of_heads).for_each(|(g, x)| sums[*g] += x);
        sums
    }

    /// The part of the wanted output's power that is missed.
    fn error(&self, products: &Mat<f64>, m: &Moments) -> f64 {
        let made = dot(&self.shared, &self.through(&self.shared, products, m));
        (m.power + made - 2.0 * dot(&self.shared, &self.wanted(m))) / m.power.max(f64::MIN_POSITIVE)
    }

    /// The outputs that fit best, given the projections.
    fn fit_output(&mut self, m: &Moments) -> Result<()> {
        let heads = self.group_of.len();
        let (value, p) = (self.shared[0].nrows(), self.shared[0].ncols());
        let own = |j: usize| &self.shared[self.group_of[j]];
        // [n·value, n·value]: E of all values' products, a column of blocks at a time.
        let column = |j: usize| -> Mat<f64> {
            let half = m.pooled.as_ref().subcols(j * p, p) * own(j).transpose();
            stack(&(0..heads).map(|i| own(i) * half.as_ref().subrows(i * p, p)).collect::<Vec<_>>())
        };
        let mut normal = beside(&(0..heads).into_par_iter().map(column).collect::<Vec<_>>());
        let cross: Vec<Mat<f64>> =
            (0..heads).into_par_iter().map(|j| m.cross.as_ref().subcols(j * p, p) * own(j).transpose()).collect();
        // The ridge pulls to the outputs as they are, so that what is exact stays so.
        let old = beside(&self.output);
        let missing = beside(&cross) - &old * &normal;
        ridge(&mut normal, RIDGE);
        let fitted = old + solve_right(&normal, &missing)?;
        self.output = (0..heads).map(|j| fitted.as_ref().subcols(j * value, value).to_owned()).collect();
        Ok(())
    }

    /// The projections that fit better, given the outputs and their products.
    fn fit_shared(&mut self, m: &Moments, groups: &[Vec<usize>], products: &Mat<f64>) -> Result<()> {
        let p = self.shared[0].ncols();
        let block = |j: usize| m.pooled.as_ref().submatrix(j * p, j * p, p, p);
        let mut left = Vec::new();
        let mut right = Vec::new();
        for heads in groups {
            let mut outputs = Mat::<f64>::zeros(self.shared[0].nrows(), self.shared[0].nrows());
            let mut moment = Mat::<f64>::zeros(p, p);
            for &j in heads {
                outputs += self.output[j].transpose() * &self.output[j];
                moment += block(j);
            }
            let ratio = 1.0 / heads.len() as f64;
            (0..p).for_each(|c| (0..p).for_each(|r| moment[(r, c)] *= ratio));
            ridge(&mut outputs, 1e-8);
            ridge(&mut moment, 1e-5);
            left.push(inverse(&outputs)?);
            right.push(inverse(&moment)?);
        }
        let precondition =
            |r: &[Mat<f64>]| -> Vec<Mat<f64>> { (0..r.len()).map(|g| &left[g] * &r[g] * &right[g]).collect() };
        let mut x = self.shared.clone();
        let start = self.through(&x, products, m);
        let mut residual: Vec<Mat<f64>> = self.wanted(m).iter().zip(&start).map(|(a, b)| a - b).collect();
        let mut z = precondition(&residual);
        let mut direction = z.clone();
        let mut size = dot(&residual, &z);
        let first = size;
        for _ in 0..STEPS {
            if size <= first * 1e-12 || size <= f64::MIN_POSITIVE {
                break;
            }
            let moved = self.through(&direction, products, m);
            let curvature = dot(&direction, &moved);
            if curvature <= 0.0 {
                break;
            }
            add(&mut x, size / curvature, &direction);
            add(&mut residual, -size / curvature, &moved);
            z = precondition(&residual);
            let next = dot(&residual, &z);
            for (d, z) in direction.iter_mut().zip(&z) {
                *d = z + faer::Scale(next / size) * &*d;
            }
            size = next;
        }
        self.shared = x;
        Ok(())
    }

    /// Fits outputs and projections in turn, until a round gains less than half a percent.
    pub fn refit(&mut self, m: &Moments, rounds: usize) -> Result<()> {
        // Nothing to gain, or less than the rounding of the moments: what is exact stays exact.
        if mean_diagonal(&m.pooled) <= 0.0 || self.error(&self.products(), m) < EXACT {
            return Ok(());
        }
        let mut groups = vec![Vec::new(); self.shared.len()];
        self.group_of.iter().enumerate().for_each(|(j, g)| groups[*g].push(j));
        self.fit_output(m)?;
        let mut products = self.products();
        let mut error = self.error(&products, m);
        for _ in 0..rounds {
            self.fit_shared(m, &groups, &products)?;
            self.fit_output(m)?;
            products = self.products();
            let before = std::mem::replace(&mut error, self.error(&products, m));
            if error > 0.995 * before {
                break;
            }
        }
        Ok(())
    }
}

fn inverse(m: &Mat<f64>) -> Result<Mat<f64>> {
    solve_right(m, &Mat::identity(m.nrows(), m.ncols()))
}

fn dot(a: &[Mat<f64>], b: &[Mat<f64>]) -> f64 {
    let of = |(a, b): (&Mat<f64>, &Mat<f64>)| -> f64 {
        (0..a.ncols()).map(|c| (0..a.nrows()).map(|r| a[(r, c)] * b[(r, c)]).sum::<f64>()).sum()
    };
    a.iter().zip(b).map(of).sum()
}

fn add(to: &mut [Mat<f64>], factor: f64, what: &[Mat<f64>]) {
    for (to, what) in to.iter_mut().zip(what) {
        *to += faer::Scale(factor) * what;
    }
}
