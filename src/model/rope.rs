//! Frequencies of the rotary embedding, and what they do to the softmax scale (SPEC.md section 1).

use crate::config::{Attention, ModelConfig, Rope, RopeScaling};

/// What every layer's RoPE shares.
#[derive(Debug, Clone, PartialEq)]
pub struct Frequencies {
    /// Radians a position, one a pair, `[dim/2]`.
    pub inv_freq: Vec<f64>,
    /// Multiplies cos and sin.
    pub magnitude: f64,
    /// Multiplies the softmax scale.
    pub scale: f64,
}

/// YaRN's growth of attention: `0.1·a·ln(factor)+1`, and 1 where nothing is stretched.
fn mscale(factor: f64, a: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * a * factor.ln() + 1.0 }
}

/// The frequencies of `dim` rotated elements.
pub fn frequencies(rope: &Rope, dim: usize) -> Frequencies {
    let plain: Vec<f64> = (0..dim / 2).map(|i| rope.theta.powf(-((2 * i) as f64) / dim as f64)).collect();
    match rope.scaling {
        RopeScaling::Default => Frequencies { inv_freq: plain, magnitude: 1.0, scale: 1.0 },
        RopeScaling::Llama3 { factor, low, high, original } => {
            let smoothed = |f: f64| {
                let wave = 2.0 * std::f64::consts::PI / f;
                if wave < original / high {
                    f
                } else if wave > original / low {
                    f / factor
                } else {
                    let smooth = (original / wave - low) / (high - low);
                    (1.0 - smooth) * f / factor + smooth * f
                }
            };
            Frequencies { inv_freq: plain.into_iter().map(smoothed).collect(), magnitude: 1.0, scale: 1.0 }
        }
        RopeScaling::Yarn {
            factor,
            original,
            beta_fast,
            beta_slow,
            mscale: m,
            mscale_all_dim: all,
            attention_factor,
            truncate,
        } => {
            // The pair that makes `turns` turns over the original context.
            let corner = |turns: f64| {
                dim as f64 * (original / (turns * 2.0 * std::f64::consts::PI)).ln() / (2.0 * rope.theta.ln())
            };
            let (mut low, mut high) = (corner(beta_fast), corner(beta_slow));
            if truncate {
                (low, high) = (low.floor(), high.ceil());
            }
            let (low, high) = (low.max(0.0), high.min(dim as f64 - 1.0));
            let ramp = |i: usize| ((i as f64 - low) / (high - low).max(1e-3)).clamp(0.0, 1.0);
            let inv_freq = plain.iter().enumerate().map(|(i, f)| f * (1.0 - ramp(i)) + f / factor * ramp(i)).collect();
            let magnitude = attention_factor.unwrap_or_else(|| {
                if m != 0.0 && all != 0.0 { mscale(factor, m) / mscale(factor, all) } else { mscale(factor, 1.0) }
            });
            let scale = if all != 0.0 { mscale(factor, all).powi(2) } else { 1.0 };
            Frequencies { inv_freq, magnitude, scale }
        }
    }
}

/// The softmax scale: `(d_n+d_r)^-½` (Llama: `d^-½`), times YaRN's factor.
pub fn softmax_scale(model: &ModelConfig) -> f32 {
    let width = match &model.attention {
        Attention::Latent(a) => a.nope + a.rope,
        Attention::Grouped(a) => a.head_dim,
    };
    ((width as f64).powf(-0.5) * frequencies(&model.rope, model.rope_dim()).scale) as f32
}
