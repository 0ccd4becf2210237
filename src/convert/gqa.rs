//! GQA → GQLA (SPEC.md 4b and 4c): Llama's keys and values from one latent, with one shared rope key.
//!
//! A pair of a head's dimensions is one complex number, which RoPE turns. Mixing heads within one frequency commutes with
//! it, by any unitary matrix, so a frequency's principal components over heads are as good as its heads. The pairs that
//! lose least when they stop turning lose their RoPE, and stand in for it by its mean over attention's own distances.

use faer::{Mat, c64};
use serde::Serialize;

use super::attention::{GroupedLayer, HostAttention, LatentLayer, Rotation};
use super::linalg::{Rows, eigen, ridge, right_singular, shared_projection, square_root, stack};
use super::measure::{Part, Samples};
use super::mla;
use super::output::Plan;
use crate::config::Latent;
use crate::error::{Error, Result};

/// What keys' errors weigh against values' in the latent: below 1 because softmax forgives what is common to all keys.
const KEY_WEIGHT: f64 = 0.3;

/// How RoPE is concentrated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopeMode {
    /// The published construction over sets of this many adjacent frequencies.
    Published {
        /// Frequencies a set.
        fold: usize,
    },
    /// The pairs that matter, with their own frequencies, and the mean rotation for the others.
    Adaptive,
}

/// One way to split the cache.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Choice {
    /// d_r.
    pub rope: usize,
    /// d_c.
    pub latent: usize,
    /// Sum over layers of the predicted error of attention's output, relative to its power.
    pub predicted: f64,
    /// Elements a token and layer on the absorb path, the same at every W.
    pub absorb: usize,
    /// Elements a token and layer a rank on the GQA path at W = 1, 2, 4, 8 (0 where W does not divide the groups).
    pub grouped: [usize; 4],
}

/// Some complex rows over real inputs: `[rows, in]` each.
#[derive(Clone)]
struct Complex {
    re: Mat<f64>,
    im: Mat<f64>,
}

impl Complex {
    /// Head `j` of `[heads·d, in]`: row f is the pair (f, f + d/2).
    fn head(all: &Mat<f64>, j: usize, d: usize) -> Complex {
        let rows = |first: usize| all.as_ref().subrows(first, d / 2).to_owned();
        Complex { re: rows(j * d), im: rows(j * d + d / 2) }
    }

    /// Real parts, then imaginary ones.
    fn stacked(&self) -> Mat<f64> {
        stack(&[self.re.clone(), self.im.clone()])
    }

    /// Adds `z·other[row]` to row `to`.
    fn add(&mut self, to: usize, z: c64, other: &Complex, row: usize) {
        for c in 0..self.re.ncols() {
            let (x, y) = (other.re[(row, c)], other.im[(row, c)]);
            self.re[(to, c)] += z.re * x - z.im * y;
            self.im[(to, c)] += z.re * y + z.im * x;
        }
    }

    fn zeros(rows: usize, cols: usize) -> Complex {
        Complex { re: Mat::zeros(rows, cols), im: Mat::zeros(rows, cols) }
    }
}

/// What the calibration says of one layer.
struct Seen {
    /// The layer's maps with their biases as a last column, `[heads·d, in]`.
    q: Mat<f64>,
    k: Mat<f64>,
    v: Mat<f64>,
    /// `[hidden, d]` a query head.
    output: Vec<Mat<f64>>,
    /// `E[x xᵀ]`.
    second: Mat<f64>,
    /// The same, each key counted by the attention it gets.
    attended: Mat<f64>,
    /// Mean of `e^{iωΔ}` over attention's distances, by head and frequency.
    turn: Vec<Vec<c64>>,
    /// Mean spread of the output about its mean under attention's weights, by head.
    spread: Vec<f64>,
    /// Mean square of the values' part of the output.
    power: f64,
}

/// Appends a 1 to each row, where the layer has biases.
fn augmented(layer: &GroupedLayer, h: &[f32]) -> (Vec<f32>, usize) {
    let hidden = layer.q.cols;
    match layer.bias {
        None => (h.to_vec(), hidden),
        Some(_) => {
            let rows = h.chunks_exact(hidden).flat_map(|row| row.iter().copied().chain([1.0]));
            (rows.collect(), hidden + 1)
        }
    }
}

fn with_bias(weight: &Rows, bias: Option<&Vec<f32>>) -> Mat<f64> {
    let cols = weight.cols + usize::from(bias.is_some());
    Mat::from_fn(weight.rows(), cols, |r, c| match bias {
        Some(bias) if c == weight.cols => f64::from(bias[r]),
        _ => f64::from(weight.data[r * weight.cols + c]),
    })
}

fn look(layer: &GroupedLayer, samples: &Samples) -> Result<Seen> {
    let a = &layer.shape;
    let (d, per, half) = (a.head_dim, a.heads / a.groups, a.head_dim / 2);
    let bias = |i: usize| layer.bias.as_ref().map(|b| &b[i]);
    let (q, k, v) = (with_bias(&layer.q, bias(0)), with_bias(&layer.k, bias(1)), with_bias(&layer.v, bias(2)));
    let whole = layer.output.whole();
    let output: Vec<Mat<f64>> = (0..a.heads).map(|j| whole.as_ref().subcols(j * d, d).to_owned()).collect();
    let metrics: Vec<Rows> = output.iter().map(|o| Rows::from_mat((o.transpose() * o).as_ref())).collect();

    (samples.told)("attention's weights");
    // What each key gets, the distances, and how far values spread.
    struct One {
        gets: Vec<f32>,
        lags: Vec<f64>,
        spread: Vec<f64>,
    }
    let mut gets = Vec::with_capacity(samples.count);
    let mut lags: Vec<f64> = Vec::new();
    let mut spread = vec![0.0; a.heads];
    samples.each(
        |i, h| {
            let projected = layer.project(h);
            let length = projected.length;
            let mut values = super::linalg::product(h, layer.v.cols, &layer.v);
            if let Some(bias) = bias(2) {
                values.chunks_exact_mut(bias.len()).for_each(|row| row.iter_mut().zip(bias).for_each(|(x, b)| *x += b));
            }
            let token = |t: usize| samples.weights.map_or(1.0, |w| w[i][t]);
            let mut one =
                One { gets: vec![0.0; length], lags: vec![0.0; a.heads * length], spread: vec![0.0; a.heads] };
            for j in 0..a.heads {
                let own: Vec<f32> = values
                    .chunks_exact(a.groups * d)
                    .flat_map(|row| row[j / per * d..(j / per + 1) * d].iter().copied())
                    .collect();
                let size = quadratic(&own, &metrics[j]);
                let pooled = projected.pooled(j, &own, d);
                let pooled = quadratic(&pooled, &metrics[j]);
                projected.weights(j, |rows, weights| {
                    for (t, p) in rows.clone().zip(weights.chunks_exact(rows.end)) {
                        let w = token(t);
                        let mut mean = 0.0;
                        for s in 0..=t {
                            let p = p[s] * w;
                            one.gets[s] += p / a.heads as f32;
                            mean += p * size[s];
                            if s > 0 {
                                // Position 0 takes what attention has no use for; its distance says nothing.
                                one.lags[j * length + t - s] += f64::from(p);
                            }
                        }
                        one.spread[j] += f64::from(mean - w * pooled[t]);
                    }
                });
            }
            Ok(one)
        },
        |some| {
            for one in some {
                gets.push(one.gets);
                lags.resize(one.lags.len(), 0.0);
                lags.iter_mut().zip(&one.lags).for_each(|(a, b)| *a += b);
                spread.iter_mut().zip(&one.spread).for_each(|(a, b)| *a += b);
            }
            Ok(())
        },
    )?;
    samples.sum(&mut lags)?;
    samples.sum(&mut spread)?;
    spread.iter_mut().for_each(|s| *s = (*s / samples.tokens as f64).max(1e-12));
    let length = lags.len() / a.heads;
    let turn = lags
        .chunks_exact(length)
        .map(|lags| {
            let total = lags.iter().sum::<f64>().max(f64::MIN_POSITIVE);
            let mean = |f: f64| {
                let sum = lags.iter().enumerate().fold(c64::new(0.0, 0.0), |sum, (lag, p)| {
                    let (sin, cos) = (f * lag as f64).sin_cos();
                    c64::new(sum.re + p * cos, sum.im + p * sin)
                });
                c64::new(sum.re / total, sum.im / total)
            };
            layer.rotation.inv_freq[..half].iter().map(|f| mean(*f)).collect()
        })
        .collect();

    let cols = k.ncols();
    (samples.told)("moments");
    let second = samples.gram(cols, 0, |i, h| {
        let (mut rows, width) = augmented(layer, h);
        samples.weigh(i, &mut rows, width);
        Ok(Part { rows, cross: vec![] })
    })?;
    let attended = samples.gram(cols, 0, |i, h| {
        let (mut rows, width) = augmented(layer, h);
        for (row, gets) in rows.chunks_exact_mut(width).zip(&gets[i]) {
            let root = gets.sqrt();
            row.iter_mut().for_each(|x| *x *= root);
        }
        Ok(Part { rows, cross: vec![] })
    })?;
    let mut seen = Seen { q, k, v, output, second: second.second, attended: attended.second, turn, spread, power: 0.0 };
    for g in 0..a.groups {
        let v = seen.v.as_ref().subrows(g * d, d).to_owned();
        let moment = &v * &seen.attended * v.transpose();
        seen.power += trace(&(value_metric(&seen, g, per) * moment));
    }
    Ok(seen)
}

/// `xᵀ M x` of every row.
fn quadratic(rows: &[f32], metric: &Rows) -> Vec<f32> {
    let through = super::linalg::product(rows, metric.cols, metric);
    let dots = through.chunks_exact(metric.cols).zip(rows.chunks_exact(metric.cols));
    dots.map(|(a, b)| a.iter().zip(b).map(|(a, b)| a * b).sum()).collect()
}

fn trace(m: &Mat<f64>) -> f64 {
    (0..m.nrows()).map(|i| m[(i, i)]).sum()
}

fn value_metric(seen: &Seen, g: usize, per: usize) -> Mat<f64> {
    let mut sum = Mat::zeros(seen.output[0].ncols(), seen.output[0].ncols());
    for o in &seen.output[g * per..(g + 1) * per] {
        sum += o.transpose() * o;
    }
    sum
}

/// Keys and queries with RoPE kept on some pairs only.
struct Partial {
    /// The shared rope key, `[rope, in]`, halves.
    key: Mat<f64>,
    /// The queries that meet it, `[rope, in]` a head.
    rope_queries: Vec<Mat<f64>>,
    /// Radians a position, `[rope/2]`.
    inv_freq: Vec<f64>,
    /// What is left of each group's key, `[d, in]`.
    rest: Vec<Mat<f64>>,
    /// The queries that meet that, `[d, in]` a head.
    queries: Vec<Mat<f64>>,
    /// Predicted error of attention's output from the RoPE that is dropped.
    lost: f64,
}

/// A pair that may keep its RoPE: a component over heads of one frequency.
struct Pair {
    frequency: usize,
    component: usize,
    loss: f64,
}

/// 4c: the pairs with the largest `λ(1 − |E e^{iωΔ}|²)` keep RoPE, each with its own frequency.
fn adaptive(layer: &GroupedLayer, seen: &Seen, rope: usize) -> Result<Partial> {
    let a = &layer.shape;
    let (d, per, half, cols) = (a.head_dim, a.heads / a.groups, a.head_dim / 2, seen.k.ncols());
    let keys: Vec<Complex> = (0..a.groups).map(|g| Complex::head(&seen.k, g, d)).collect();
    let queries: Vec<Complex> = (0..a.heads).map(|j| Complex::head(&seen.q, j, d)).collect();
    let energy: Vec<Vec<f64>> = queries
        .iter()
        .map(|q| {
            let diagonal = |m: &Mat<f64>| -> Vec<f64> {
                let through = m * &seen.second;
                (0..half).map(|f| (0..cols).map(|c| through[(f, c)] * m[(f, c)]).sum()).collect()
            };
            diagonal(&q.re).into_iter().zip(diagonal(&q.im)).map(|(x, y)| x + y).collect()
        })
        .collect();
    // What a unit of squared logit costs at the output.
    let cost = |j: usize| seen.spread[j] / d as f64;
    let mut vectors = Vec::with_capacity(half);
    let mut scales = Vec::with_capacity(half);
    let mut pairs = Vec::with_capacity(half * a.groups);
    for f in 0..half {
        let scale: Vec<f64> = (0..a.groups)
            .map(|g| (g * per..(g + 1) * per).map(|j| energy[j][f] * cost(j)).sum::<f64>().max(1e-30).sqrt())
            .collect();
        let row = |part: fn(&Complex) -> &Mat<f64>| -> Mat<f64> {
            Mat::from_fn(a.groups, cols, |g, c| part(&keys[g])[(f, c)] * scale[g])
        };
        let (re, im) = (row(|k| &k.re), row(|k| &k.im));
        let (re_m, im_m) = (&re * &seen.attended, &im * &seen.attended);
        let real = &re_m * re.transpose() + &im_m * im.transpose();
        let imaginary = &im_m * re.transpose() - &re_m * im.transpose();
        let hermitian = Mat::from_fn(a.groups, a.groups, |r, c| {
            // Exactly Hermitian, whatever rounding did.
            let (x, y) = (real[(r, c)] + real[(c, r)], imaginary[(r, c)] - imaginary[(c, r)]);
            c64::new(0.5 * x, 0.5 * y)
        });
        let found = hermitian
            .self_adjoint_eigen(faer::Side::Lower)
            .map_err(|_| Error::Internal("an eigendecomposition of keys did not converge".into()))?;
        for c in 0..a.groups {
            let value = found.S()[c].re.max(0.0);
            let loss = (0..a.heads)
                .map(|j| {
                    let g = j / per;
                    let u = found.U()[(g, c)];
                    let m = seen.turn[j][f];
                    let met = energy[j][f] * cost(j) * (u.re * u.re + u.im * u.im) / (scale[g] * scale[g]);
                    0.5 * met * value * (1.0 - m.re * m.re - m.im * m.im).max(0.0)
                })
                .sum();
            pairs.push(Pair { frequency: f, component: c, loss });
        }
        vectors.push(found.U().to_owned());
        scales.push(scale);
    }
    pairs.sort_by(|x, y| y.loss.total_cmp(&x.loss));
    let lost = pairs[rope / 2..].iter().map(|p| p.loss).sum();
    pairs.truncate(rope / 2);
    pairs.sort_by_key(|p| (p.frequency, p.component));

    let mut key = Complex::zeros(rope / 2, cols);
    let mut rope_queries = vec![Complex::zeros(rope / 2, cols); a.heads];
    let mut rest = keys.clone();
    for (i, pair) in pairs.iter().enumerate() {
        let (f, u, scale) = (pair.frequency, &vectors[pair.frequency], &scales[pair.frequency]);
        for g in 0..a.groups {
            let u = u[(g, pair.component)];
            key.add(i, c64::new(u.re * scale[g], -u.im * scale[g]), &keys[g], f);
        }
        for g in 0..a.groups {
            let u = u[(g, pair.component)];
            let back = c64::new(u.re / scale[g], u.im / scale[g]);
            rest[g].add(f, c64::new(-back.re, -back.im), &key, i);
            for j in g * per..(g + 1) * per {
                rope_queries[j].add(i, c64::new(back.re, -back.im), &queries[j], f);
            }
        }
    }
    let attenuated = queries.iter().enumerate().map(|(j, q)| {
        let mut out = Complex::zeros(half, cols);
        (0..half).for_each(|f| out.add(f, seen.turn[j][f], q, f));
        out.stacked()
    });
    Ok(Partial {
        key: key.stacked(),
        rope_queries: rope_queries.iter().map(Complex::stacked).collect(),
        inv_freq: pairs.iter().map(|p| layer.rotation.inv_freq[p.frequency]).collect(),
        rest: rest.iter().map(Complex::stacked).collect(),
        queries: attenuated.collect(),
        lost,
    })
}

/// 4b: in each set of `fold` adjacent frequencies the strongest real components over heads and frequencies keep RoPE,
/// with the frequencies of plain RoPE of dimension `rope`.
fn published(layer: &GroupedLayer, seen: &Seen, rope: usize, fold: usize) -> Result<Partial> {
    let a = &layer.shape;
    let (d, per, half, cols) = (a.head_dim, a.heads / a.groups, a.head_dim / 2, seen.k.ncols());
    let keys: Vec<Complex> = (0..a.groups).map(|g| Complex::head(&seen.k, g, d)).collect();
    let queries: Vec<Complex> = (0..a.heads).map(|j| Complex::head(&seen.q, j, d)).collect();
    let pairs = rope / 2;
    let mut key = Complex::zeros(pairs, cols);
    let mut rope_queries = vec![Complex::zeros(pairs, cols); a.heads];
    let mut rest = keys.clone();
    let mut inv_freq = vec![0.0; pairs];
    for set in 0..half / fold {
        // Pair i turns with frequency i·d/rope, so it comes from the set that holds that one.
        let members: Vec<usize> = (0..pairs).filter(|i| i * half / pairs / fold == set).collect();
        let row = |part: fn(&Complex) -> &Mat<f64>| -> Mat<f64> {
            Mat::from_fn(a.groups * fold, cols, |r, c| part(&keys[r / fold])[(set * fold + r % fold, c)])
        };
        let (re, im) = (row(|k| &k.re), row(|k| &k.im));
        let moment = &re * &seen.second * re.transpose() + &im * &seen.second * im.transpose();
        let (_, vectors) = eigen(&moment)?;
        for (component, &i) in members.iter().enumerate() {
            inv_freq[i] = layer.rotation.inv_freq[i * half / pairs];
            if component >= vectors.ncols() {
                continue;
            }
            for r in 0..a.groups * fold {
                let u = c64::new(vectors[(r, component)], 0.0);
                key.add(i, u, &keys[r / fold], set * fold + r % fold);
            }
            for r in 0..a.groups * fold {
                let (g, f, u) = (r / fold, set * fold + r % fold, vectors[(r, component)]);
                rest[g].add(f, c64::new(-u, 0.0), &key, i);
                for j in g * per..(g + 1) * per {
                    rope_queries[j].add(i, c64::new(u, 0.0), &queries[j], f);
                }
            }
        }
    }
    Ok(Partial {
        key: key.stacked(),
        rope_queries: rope_queries.iter().map(Complex::stacked).collect(),
        inv_freq,
        rest: rest.iter().map(Complex::stacked).collect(),
        queries: queries.iter().map(Complex::stacked).collect(),
        lost: 0.0,
    })
}

/// The metrics in which what is left of the keys, and the values, are projected: of each group, keys first.
fn metrics(layer: &GroupedLayer, seen: &Seen, partial: &Partial) -> Vec<Mat<f64>> {
    let a = &layer.shape;
    let (d, per) = (a.head_dim, a.heads / a.groups);
    let key = |g: usize| {
        let mut sum = Mat::zeros(d, d);
        for j in g * per..(g + 1) * per {
            let q = &partial.queries[j];
            sum += faer::Scale(KEY_WEIGHT * seen.spread[j] / d as f64) * (q * &seen.second * q.transpose());
        }
        sum
    };
    (0..a.groups).map(key).chain((0..a.groups).map(|g| value_metric(seen, g, per))).collect()
}

/// The latent's projection `[latent, in]` and up-projections `[d, latent]` of each group's keys, then values.
fn latent(
    layer: &GroupedLayer,
    seen: &Seen,
    partial: &Partial,
    rank: usize,
    mode: RopeMode,
) -> Result<(Mat<f64>, Vec<Mat<f64>>)> {
    let (groups, d) = (layer.shape.groups, layer.shape.head_dim);
    let values = (0..groups).map(|g| seen.v.as_ref().subrows(g * d, d).to_owned());
    let mut blocks: Vec<Mat<f64>> = partial.rest.iter().cloned().chain(values).collect();
    if mode == RopeMode::Adaptive {
        return shared_projection(&blocks, &metrics(layer, seen, partial), &seen.attended, rank);
    }
    // Balance: the keys' mean column norm becomes the values', and the up-projection undoes it.
    let column_norm = |blocks: &[Mat<f64>]| -> f64 {
        let rows = stack(blocks);
        let through = &rows * &seen.second;
        let norms = (0..rows.nrows()).map(|r| (0..rows.ncols()).map(|c| through[(r, c)] * rows[(r, c)]).sum::<f64>());
        norms.map(|n| n.max(0.0).sqrt()).sum::<f64>() / rows.nrows() as f64
    };
    let (keys, values) = (column_norm(&blocks[..groups]), column_norm(&blocks[groups..]));
    let balance = if keys > 1e-12 * values { values / keys } else { 1.0 };
    for block in &mut blocks[..groups] {
        *block = faer::Scale(balance) * &*block;
    }
    let z = stack(&blocks);
    let moment = &z * &seen.second * z.transpose();
    let (_, vectors) = eigen(&moment)?;
    let there = rank.min(vectors.ncols());
    let leading = vectors.as_ref().subcols(0, there);
    let mut down = Mat::zeros(rank, z.ncols());
    down.as_mut().subrows_mut(0, there).copy_from(leading.transpose() * &z);
    let up = (0..2 * groups).map(|r| {
        let mut up = Mat::zeros(d, rank);
        let scale = if r < groups { 1.0 / balance } else { 1.0 };
        up.as_mut().subcols_mut(0, there).copy_from(faer::Scale(scale) * leading.subrows(r * d, d));
        up
    });
    Ok((down, up.collect()))
}

fn partial(layer: &GroupedLayer, seen: &Seen, rope: usize, mode: RopeMode) -> Result<Partial> {
    match mode {
        RopeMode::Adaptive => adaptive(layer, seen, rope),
        RopeMode::Published { fold } => published(layer, seen, rope, fold),
    }
}

/// The converted layer: n groups, one latent, one rope key.
pub fn convert(layer: &GroupedLayer, teacher: &HostAttention, samples: &Samples, plan: &Plan) -> Result<LatentLayer> {
    let a = &layer.shape;
    let (d, n, rope, rank, hidden) = (a.head_dim, a.groups, plan.rope_dim, plan.latent_rank, layer.q.cols);
    let seen = look(layer, samples)?;
    (samples.told)("projections");
    let partial = partial(layer, &seen, rope, plan.rope)?;
    let (down, up) = latent(layer, &seen, &partial, rank, plan.rope)?;
    // The softmax scale is (d+d_r)^-½ where it was d^-½, and what does not turn misses cos and sin's magnitude.
    let scale = ((d + rope) as f64 / d as f64).sqrt();
    let still = scale * layer.rotation.magnitude * layer.rotation.magnitude;
    let mut q_rows = Vec::with_capacity(2 * a.heads);
    for (still_part, turned) in partial.queries.iter().zip(&partial.rope_queries) {
        q_rows.push(faer::Scale(still) * still_part);
        q_rows.push(faer::Scale(scale) * turned);
    }
    let q = stack(&q_rows);
    let kv = stack(&[down, partial.key.clone()]);
    let mut kv_up = Vec::with_capacity(2 * n);
    for g in 0..n {
        kv_up.push(up[g].clone());
        kv_up.push(up[n + g].clone());
    }
    let weight = |m: &Mat<f64>| Rows::from_mat(m.as_ref().subcols(0, hidden));
    let bias =
        |m: &Mat<f64>| layer.bias.as_ref().map(|_| (0..m.nrows()).map(|r| m[(r, hidden)] as f32).collect::<Vec<f32>>());
    let mut converted = LatentLayer {
        shape: Latent {
            heads: a.heads,
            groups: n,
            nope: d,
            rope,
            value: d,
            kv_rank: rank,
            q_rank: None,
            latent_norm: false,
            latent_norm_eps: 1e-6,
            bias: a.bias,
            stored_inv_freq: plan.stored_inv_freq,
        },
        q_down: None,
        q_up: weight(&q),
        q_bias: bias(&q),
        kv_down: weight(&kv),
        kv_bias: bias(&kv),
        kv_norm: None,
        kv_up: Rows::from_mat(stack(&kv_up).as_ref()),
        output: layer.output.clone(),
        rotation: Rotation {
            inv_freq: partial.inv_freq,
            magnitude: layer.rotation.magnitude,
            interleave: layer.rotation.interleave,
        },
        scale: layer.scale / scale as f32,
    };
    if plan.rope == RopeMode::Adaptive {
        let order: Vec<usize> = (0..a.heads).collect();
        mla::refit(&mut converted, teacher, &order, samples, plan.refit)?;
    }
    Ok(converted)
}

/// The layer with a block of kv_b for every head (G = h), which [`mla::convert`] can then share among fewer groups.
pub fn per_head(layer: &LatentLayer) -> LatentLayer {
    let a = &layer.shape;
    let (block, per) = (a.nope + a.value, a.heads / a.groups);
    let mut out = layer.clone();
    out.shape.groups = a.heads;
    out.kv_up = Rows::zeros(a.heads * block, a.kv_rank);
    for j in 0..a.heads {
        mla::put(&mut out.kv_up, j * block, &layer.kv_up.mat(j / per * block, block));
    }
    out
}

/// For every split of `elements` that is tried, the predicted error of this layer, relative to its output's power.
pub fn survey(layer: &GroupedLayer, samples: &Samples, splits: &[(usize, usize)]) -> Result<Vec<f64>> {
    let seen = look(layer, samples)?;
    let groups = layer.shape.groups;
    let d = layer.shape.head_dim;
    let (root, _) = square_root(&seen.attended)?;
    let mut predicted = Vec::with_capacity(splits.len());
    for &(rope, rank) in splits {
        let partial = adaptive(layer, &seen, rope)?;
        let values = (0..groups).map(|g| seen.v.as_ref().subrows(g * d, d).to_owned());
        let blocks = partial.rest.iter().cloned().chain(values);
        let scaled = blocks.zip(metrics(layer, &seen, &partial)).map(|(block, mut metric)| {
            ridge(&mut metric, 1e-12);
            Ok(square_root(&metric)?.0 * block * &root)
        });
        let (squares, _) = right_singular(&stack(&scaled.collect::<Result<Vec<_>>>()?))?;
        let cut: f64 = squares.iter().skip(rank).map(|s| s.max(0.0)).sum();
        predicted.push((partial.lost * KEY_WEIGHT + cut) / seen.power.max(f64::MIN_POSITIVE));
    }
    Ok(predicted)
}
