//! Rotary embedding.

use super::Workers;
use super::buffer::Shared;

/// cos and sin of every position and pair, taken in f64.
pub struct RopeTable {
    /// `[positions, half]`.
    cos: Vec<f32>,
    /// `[positions, half]`.
    sin: Vec<f32>,
    half: usize,
    interleave: bool,
}

impl RopeTable {
    pub(super) fn new(
        workers: &Workers,
        interleave: bool,
        inv_freq: &[f64],
        magnitude: f64,
        positions: usize,
    ) -> RopeTable {
        let half = inv_freq.len();
        let (mut cos, mut sin) = (vec![0.0; positions * half], vec![0.0; positions * half]);
        let (cos_out, sin_out) = (Shared::new(&mut cos), Shared::new(&mut sin));
        workers.run(positions, positions * half * 64, |p| {
            // SAFETY: each position is one task's.
            let (cos, sin) = unsafe { (cos_out.slice(p * half, half), sin_out.slice(p * half, half)) };
            for i in 0..half {
                let (s, c) = (p as f64 * inv_freq[i]).sin_cos();
                cos[i] = (c * magnitude) as f32;
                sin[i] = (s * magnitude) as f32;
            }
        });
        RopeTable { cos, sin, half, interleave }
    }

    /// Width that turns.
    pub(super) fn dim(&self) -> usize {
        2 * self.half
    }

    /// Positions there are angles for.
    pub(super) fn positions(&self) -> usize {
        self.cos.len().checked_div(self.half).unwrap_or(usize::MAX)
    }

    /// Turns `x` `[dim]` by the angles of `position`. Each element stays where it is: pairs are (2i, 2i+1) or
    /// (i, i + dim/2).
    pub(super) fn rotate(&self, position: usize, x: &[f32], out: &mut [f32]) {
        let at = position * self.half..(position + 1) * self.half;
        let (cos, sin) = (&self.cos[at.clone()], &self.sin[at]);
        if self.interleave {
            let pairs = x.chunks_exact(2).zip(out.chunks_exact_mut(2));
            for ((pair, out), (c, s)) in pairs.zip(cos.iter().zip(sin)) {
                out[0] = pair[0] * c - pair[1] * s;
                out[1] = pair[1] * c + pair[0] * s;
            }
        } else {
            let (x0, x1) = x.split_at(self.half);
            let (out0, out1) = out.split_at_mut(self.half);
            for i in 0..self.half {
                out0[i] = x0[i] * cos[i] - x1[i] * sin[i];
                out1[i] = x1[i] * cos[i] + x0[i] * sin[i];
            }
        }
    }
}
