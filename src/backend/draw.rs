//! How a token is chosen from logits: the largest of `logit + temperature · noise`.
//!
//! The noise of every token is Gumbel's, so the choice is a draw from the softmax of `logit / temperature`, exactly, and
//! needs no sum over the vocabulary: ranks compare their best, as for the largest logit, which is temperature 0. The
//! noise depends on nothing but key and token, and is made of additions and multiplications that round the same way
//! everywhere: `kernels/choose.cu` gets the same bits.

/// How the token of one output row is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Draw {
    /// What the noise depends on beside the token.
    pub key: u64,
    /// 0 takes the largest logit.
    pub temperature: f32,
}

/// No noise is larger: that of the smallest exponential, 2⁻³³.
const LARGEST: f32 = 22.9;

impl Draw {
    /// The draw of a request's `index`-th token.
    pub fn new(seed: u64, index: u64, temperature: f32) -> Draw {
        // Twice, because seeds may differ by what two indices do.
        Draw { key: bits(bits(seed, 0), index), temperature }
    }

    /// What is compared among tokens.
    pub fn score(&self, token: u32, logit: f32) -> f32 {
        if self.temperature == 0.0 { logit } else { logit + self.temperature * noise(self.key, token) }
    }

    /// The best of tokens `first..` with these logits, and its score; ties go to the lower token, and NaN never wins.
    pub fn best(&self, first: u32, logits: &[f32]) -> (f32, u32) {
        let mut best = (f32::NEG_INFINITY, first);
        for (token, &logit) in (first..).zip(logits) {
            if logit > best.0 {
                best = (logit, token);
            }
        }
        if self.temperature == 0.0 {
            return best;
        }
        // What the largest logit scores is a bound that most tokens cannot reach, whatever their noise.
        let bound = self.score(best.1, best.0);
        let most = self.temperature * LARGEST;
        best.0 = f32::NEG_INFINITY;
        for (token, &logit) in (first..).zip(logits) {
            if logit + most >= bound {
                let score = self.score(token, logit);
                if score > best.0 {
                    best = (score, token);
                }
            }
        }
        best
    }
}

/// The `index`-th of `seed`'s random words: SplitMix64's output function on a counter.
pub fn bits(seed: u64, index: u64) -> u64 {
    let mut z = seed.wrapping_add((index.wrapping_add(1)).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// The noise of a token.
pub fn noise(key: u64, token: u32) -> f32 {
    gumbel((bits(key, u64::from(token)) >> 32) as u32)
}

/// Gumbel's distribution: −ln of the exponential variable −ln(1 − v), where v is `k + ½` in units of 2⁻³².
fn gumbel(k: u32) -> f32 {
    // Where 1 − v is nearly 1, its distance from 1 is taken from v itself, which is not rounded.
    let (mut f, mut e) = split((!k) as f32 + 0.5);
    e -= 32.0;
    if e == 0.0 {
        f = (k as f32 + 0.5) * -2.328_306_4e-10;
    }
    let (f, e) = split(-ln(f, e));
    -ln(f, e)
}

/// `x` as `(1 + f)·2^e` with 1 + f from √½ to √2.
fn split(x: f32) -> (f32, f32) {
    const ROOT: u32 = 0x3f35_04f3;
    let bits = x.to_bits().wrapping_sub(ROOT);
    let m = f32::from_bits((bits & 0x007f_ffff) + ROOT);
    (m - 1.0, ((bits as i32) >> 23) as f32)
}

/// ln((1 + f)·2^e), as Cephes computes it.
fn ln(f: f32, e: f32) -> f32 {
    const P: [f32; 9] = [
        7.037_683_6e-2,
        -1.151_461e-1,
        1.167_699_9e-1,
        -1.242_014_1e-1,
        1.424_932_3e-1,
        -1.666_805_8e-1,
        2.000_071_5e-1,
        -2.499_999_4e-1,
        3.333_333e-1,
    ];
    let z = f * f;
    let p = P[1..].iter().fold(P[0], |p, c| p * f + c);
    let y = f * z * p + e * -2.121_944_4e-4 - 0.5 * z;
    f + y + e * 0.693_359_4
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_is_gumbels_to_single_precision() {
        let (mut sum, mut squares, mut largest) = (0f64, 0f64, f32::NEG_INFINITY);
        let count = 1 << 20;
        for token in 0..count {
            let key = bits(7, u64::from(token) / 1000);
            let k = (bits(key, u64::from(token)) >> 32) as u32;
            let v = (f64::from(k) + 0.5) / 2f64.powi(32);
            let exact = -(-(-v).ln_1p()).ln();
            let g = noise(key, token);
            assert!((f64::from(g) - exact).abs() < 4e-7 * (1.0 + exact.abs()), "{g}, exactly {exact}, of {k}");
            sum += f64::from(g);
            squares += f64::from(g) * f64::from(g);
            largest = largest.max(g);
        }
        let mean = sum / f64::from(count);
        let variance = squares / f64::from(count) - mean * mean;
        assert!((mean - 0.577_215_66).abs() < 0.006, "mean {mean}");
        assert!((variance - 1.644_934).abs() < 0.03, "variance {variance}");
        assert!(largest < LARGEST);
    }

    #[test]
    fn the_extremes_are_finite_and_in_order() {
        assert!(gumbel(0) < LARGEST && gumbel(0) > 22.8, "{}", gumbel(0));
        assert!(gumbel(u32::MAX) > -3.2 && gumbel(u32::MAX) < -3.1, "{}", gumbel(u32::MAX));
        let steps: Vec<f32> = (0..=255).map(|i| gumbel(i << 24)).collect();
        assert!(steps.windows(2).all(|w| w[0] > w[1]));
    }

    #[test]
    fn the_bound_leaves_out_no_winner() {
        for seed in 0..400 {
            let logits: Vec<f32> = (0..300).map(|i| (bits(seed, i) >> 40) as f32 / 1e6 * 3.0).collect();
            let draw = Draw::new(seed, 3, [0.2, 1.0, 5.0][seed as usize % 3]);
            let mut want = (f32::NEG_INFINITY, 0);
            for (token, &l) in (50..).zip(&logits) {
                if draw.score(token, l) > want.0 {
                    want = (draw.score(token, l), token);
                }
            }
            assert_eq!(draw.best(50, &logits), want);
        }
    }
}
