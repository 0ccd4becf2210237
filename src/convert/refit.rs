//! The values' path refitted by least squares: a group's shared projection and every head's output columns, in turn.
//!
//! Attention's output is `Σ_j O_j B_g(j) c̄_j`, where `c̄_j` is head j's mean of the latents under its attention weights.
//! Given the second moments of all `c̄` and their products with the wanted output, both steps are linear: the outputs
//! `O` by a ridge regression over all heads together (heads make good for each other), the projections `B` by
//! preconditioned conjugate gradients. Nothing is trained: two or three rounds reach what many reach.

use faer::Mat;

use super::linalg::{beside, mean_diagonal, ridge, solve_right};
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
    /// `[hidden, n·p]`: what the heads' pooled latents are multiplied by.
    fn map(&self) -> Mat<f64> {
        let maps: Vec<Mat<f64>> = self.output.iter().zip(&self.group_of).map(|(o, g)| o * &self.shared[*g]).collect();
        beside(&maps)
    }

    /// The part of the wanted output's power that is missed.
    pub fn error(&self, m: &Moments) -> f64 {
        let map = self.map();
        let through = &map * &m.pooled;
        let mut sum = 0.0;
        for c in 0..map.ncols() {
            for r in 0..map.nrows() {
                sum += map[(r, c)] * (through[(r, c)] - 2.0 * m.cross[(r, c)]);
            }
        }
        (m.power + sum) / m.power.max(f64::MIN_POSITIVE)
    }

    /// The outputs that fit best, given the projections.
    fn fit_output(&mut self, m: &Moments) -> Result<()> {
        let heads = self.group_of.len();
        let (value, p) = (self.shared[0].nrows(), self.shared[0].ncols());
        // [n·p, n·value] pooled·Zᵀ and [n·value, n·value] Z·pooled·Zᵀ, head by head: Z is block-diagonal.
        let half: Vec<Mat<f64>> = (0..heads)
            .map(|j| m.pooled.as_ref().subcols(j * p, p) * self.shared[self.group_of[j]].transpose())
            .collect();
        let half = beside(&half);
        let mut normal = Mat::zeros(heads * value, heads * value);
        let mut cross = Vec::with_capacity(heads);
        for j in 0..heads {
            let b = &self.shared[self.group_of[j]];
            let rows = b * half.as_ref().subrows(j * p, p);
            normal.as_mut().subrows_mut(j * value, value).copy_from(&rows);
            cross.push(m.cross.as_ref().subcols(j * p, p) * b.transpose());
        }
        // The ridge pulls to the outputs as they are, so that what is exact stays so.
        let old = beside(&self.output);
        let missing = beside(&cross) - &old * &normal;
        ridge(&mut normal, RIDGE);
        let fitted = old + solve_right(&normal, &missing)?;
        self.output = (0..heads).map(|j| fitted.as_ref().subcols(j * value, value).to_owned()).collect();
        Ok(())
    }

    /// The projections that fit better, given the outputs.
    fn fit_shared(&mut self, m: &Moments, groups: &[Vec<usize>]) -> Result<()> {
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
        // The gradient of each projection when the outputs' map times the moments is `through`.
        let gather = |through: &Mat<f64>| -> Vec<Mat<f64>> {
            groups
                .iter()
                .map(|heads| {
                    let mut sum = Mat::zeros(self.shared[0].nrows(), p);
                    for &j in heads {
                        sum += self.output[j].transpose() * through.as_ref().subcols(j * p, p);
                    }
                    sum
                })
                .collect()
        };
        let apply = |shared: &[Mat<f64>]| -> Vec<Mat<f64>> {
            let maps: Vec<Mat<f64>> = self.output.iter().zip(&self.group_of).map(|(o, g)| o * &shared[*g]).collect();
            gather(&(beside(&maps) * &m.pooled))
        };
        let mut x = self.shared.clone();
        let start = apply(&x);
        let mut residual: Vec<Mat<f64>> = gather(&m.cross).iter().zip(&start).map(|(a, b)| a - b).collect();
        let mut z = precondition(&residual);
        let mut direction = z.clone();
        let mut size = dot(&residual, &z);
        let first = size;
        for _ in 0..STEPS {
            if size <= first * 1e-12 || size <= f64::MIN_POSITIVE {
                break;
            }
            let moved = apply(&direction);
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
        if mean_diagonal(&m.pooled) <= 0.0 || self.error(m) < EXACT {
            return Ok(());
        }
        let mut groups = vec![Vec::new(); self.shared.len()];
        self.group_of.iter().enumerate().for_each(|(j, g)| groups[*g].push(j));
        self.fit_output(m)?;
        let mut error = self.error(m);
        for _ in 0..rounds {
            self.fit_shared(m, &groups)?;
            self.fit_output(m)?;
            let before = std::mem::replace(&mut error, self.error(m));
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
