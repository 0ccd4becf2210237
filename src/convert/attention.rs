//! One layer's attention on the host in f32: what conversions measure (queries, keys, attention's weights), which the
//! backend's fused operations do not show.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};

use super::linalg::{Rows, exp, largest, product, sum};
use crate::checkpoint::Checkpoint;
use crate::config::{Attention, Grouped, Latent, ModelConfig};
use crate::error::Result;
use crate::model::rope;

/// Rows of queries taken together: only the keys before the last of them are looked at.
const BLOCK: usize = 64;

/// The rotation of some columns of each head.
#[derive(Debug, Clone, PartialEq)]
pub struct Rotation {
    /// Radians a position, one a pair.
    pub inv_freq: Vec<f64>,
    /// Multiplies cos and sin.
    pub magnitude: f64,
    /// Pairs are (2i, 2i+1), not (i, i + half).
    pub interleave: bool,
}

impl Rotation {
    /// Turns the last `2·inv_freq.len()` elements of every `width` of `row`, which stands at `position`.
    fn turn(&self, row: &mut [f32], width: usize, position: usize) {
        let half = self.inv_freq.len();
        for (i, f) in self.inv_freq.iter().enumerate() {
            let (sin, cos) = (position as f64 * f).sin_cos();
            let (sin, cos) = ((sin * self.magnitude) as f32, (cos * self.magnitude) as f32);
            let (a, b) = if self.interleave { (2 * i, 2 * i + 1) } else { (i, i + half) };
            for head in row.chunks_exact_mut(width) {
                let rotated = &mut head[width - 2 * half..];
                let (x, y) = (rotated[a], rotated[b]);
                rotated[a] = x * cos - y * sin;
                rotated[b] = y * cos + x * sin;
            }
        }
    }
}

/// One sample's queries and keys, rotated, and the rows that attention pools.
pub struct Projected {
    /// Tokens.
    pub length: usize,
    /// `[length, heads·width]`
    pub q: Vec<f32>,
    /// `[length, groups·width]`
    pub k: Vec<f32>,
    /// What values are a linear map of: the latent, or the hidden state. `[length, pool_width]`
    pub pool: Vec<f32>,
    /// Width of a head's query and key.
    pub width: usize,
    /// Query heads, and heads a key.
    pub heads: (usize, usize),
    /// Multiplies the logits.
    pub scale: f32,
}

impl Projected {
    /// For each block of query rows: the rows, and head `head`'s attention weights of them, `[rows, last row + 1]`.
    pub fn weights(&self, head: usize, mut visit: impl FnMut(std::ops::Range<usize>, &[f32])) {
        let (heads, per_key) = self.heads;
        let (w, groups) = (self.width, heads / per_key);
        let rows_of = |data, count: usize, at: usize, rows: std::ops::Range<usize>| {
            MatRef::from_row_major_slice(data, self.length, count * w)
                .subcols(at * w, w)
                .subrows(rows.start, rows.len())
        };
        let mut logits = vec![0.0; BLOCK * self.length];
        for first in (0..self.length).step_by(BLOCK) {
            let rows = first..(first + BLOCK).min(self.length);
            let logits = &mut logits[..rows.len() * rows.end];
            matmul(
                MatMut::from_row_major_slice_mut(logits, rows.len(), rows.end),
                Accum::Replace,
                rows_of(&self.q, heads, head, rows.clone()),
                rows_of(&self.k, groups, head / per_key, 0..rows.end).transpose(),
                self.scale,
                Par::Seq,
            );
            for (row, logits) in rows.clone().zip(logits.chunks_exact_mut(rows.end)) {
                softmax(&mut logits[..row + 1]);
                logits[row + 1..].fill(0.0);
            }
            visit(rows, logits);
        }
    }

    /// Attention's mean of `values` `[length, cols]` for one head, `[length, cols]`.
    pub fn pooled(&self, head: usize, values: &[f32], cols: usize) -> Vec<f32> {
        let mut out = vec![0.0; self.length * cols];
        self.weights(head, |rows, weights| {
            matmul(
                MatMut::from_row_major_slice_mut(&mut out[rows.start * cols..rows.end * cols], rows.len(), cols),
                Accum::Replace,
                MatRef::from_row_major_slice(weights, rows.len(), rows.end),
                MatRef::from_row_major_slice(&values[..rows.end * cols], rows.end, cols),
                1.0f32,
                Par::Seq,
            );
        });
        out
    }
}

fn softmax(row: &mut [f32]) {
    let most = largest(row);
    row.iter_mut().for_each(|x| *x = exp(*x - most));
    let scale = 1.0 / sum(row);
    row.iter_mut().for_each(|x| *x *= scale);
}

/// `x·weight/rms(x)` of every row.
pub fn norm(x: &mut [f32], weight: &[f32], eps: f32) {
    for row in x.chunks_exact_mut(weight.len()) {
        let mean = row.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>() / row.len() as f64;
        let scale = 1.0 / (mean as f32 + eps).sqrt();
        row.iter_mut().zip(weight).for_each(|(v, w)| *v = *v * scale * w);
    }
}

/// Adds a bias to every row.
fn add_bias(x: &mut [f32], bias: Option<&Vec<f32>>) {
    if let Some(bias) = bias {
        for row in x.chunks_exact_mut(bias.len()) {
            row.iter_mut().zip(bias).for_each(|(v, b)| *v += b);
        }
    }
}

/// A whole tensor `[rows, cols]`.
pub fn tensor(checkpoint: &Checkpoint, name: &str, rows: usize, cols: usize) -> Result<Rows> {
    let slice = checkpoint.slice(name, &[rows, cols], 0..rows, 0..cols)?;
    let mut out = Rows::zeros(rows, cols);
    for r in 0..rows {
        slice.read_f32(r, &mut out.data[r * cols..(r + 1) * cols]);
    }
    Ok(out)
}

/// A vector, where the checkpoint has it.
fn optional(checkpoint: &Checkpoint, name: &str, length: usize) -> Result<Option<Vec<f32>>> {
    checkpoint.has(name, false).then(|| checkpoint.vector(name, length)).transpose()
}

/// From the hidden state to the query latent.
#[derive(Clone)]
pub struct QueryDown {
    /// q_a_proj, `[q_rank, hidden]`.
    weight: Rows,
    /// Its bias.
    bias: Option<Vec<f32>>,
    /// q_a_layernorm.
    norm: Option<Vec<f32>>,
}

/// Latent attention of one layer (SPEC.md section 1), before or after a conversion.
#[derive(Clone)]
pub struct LatentLayer {
    /// Its dimensions.
    pub shape: Latent,
    /// The way to the query latent; absent without one.
    pub q_down: Option<QueryDown>,
    /// q_b_proj or q_proj, `[heads·(nope+rope), q_rank or hidden]`.
    pub q_up: Rows,
    /// q_proj's bias.
    pub q_bias: Option<Vec<f32>>,
    /// kv_a_proj_with_mqa, `[latent+rope, hidden]`.
    pub kv_down: Rows,
    /// Its bias.
    pub kv_bias: Option<Vec<f32>>,
    /// kv_a_layernorm.
    pub kv_norm: Option<Vec<f32>>,
    /// kv_b_proj, `[groups·(nope+value), latent]`.
    pub kv_up: Rows,
    /// o_proj, `[hidden, heads·value]`.
    pub output: Rows,
    /// The rotation of the rope parts.
    pub rotation: Rotation,
    /// The softmax scale.
    pub scale: f32,
}

impl LatentLayer {
    /// Reads layer `i`.
    pub fn read(checkpoint: &Checkpoint, config: &ModelConfig, a: &Latent, i: usize) -> Result<LatentLayer> {
        let at = |name: &str| format!("model.layers.{i}.self_attn.{name}");
        let (hidden, width) = (config.hidden, a.nope + a.rope);
        let q_norm = |rank| a.latent_norm.then(|| checkpoint.vector(&at("q_a_layernorm.weight"), rank)).transpose();
        let (q_down, q_up, q_bias) = match a.q_rank {
            Some(rank) => {
                let down = QueryDown {
                    weight: tensor(checkpoint, &at("q_a_proj.weight"), rank, hidden)?,
                    bias: optional(checkpoint, &at("q_a_proj.bias"), rank)?,
                    norm: q_norm(rank)?,
                };
                (Some(down), tensor(checkpoint, &at("q_b_proj.weight"), a.heads * width, rank)?, None)
            }
            None => (
                None,
                tensor(checkpoint, &at("q_proj.weight"), a.heads * width, hidden)?,
                optional(checkpoint, &at("q_proj.bias"), a.heads * width)?,
            ),
        };
        let shared = rope::frequencies(&config.rope, a.rope);
        let inv_freq = match a.stored_inv_freq {
            true => checkpoint.vector(&at("rope_inv_freq"), a.rope / 2)?.into_iter().map(f64::from).collect(),
            false => shared.inv_freq,
        };
        Ok(LatentLayer {
            shape: a.clone(),
            q_down,
            q_up,
            q_bias,
            kv_down: tensor(checkpoint, &at("kv_a_proj_with_mqa.weight"), a.kv_rank + a.rope, hidden)?,
            kv_bias: optional(checkpoint, &at("kv_a_proj_with_mqa.bias"), a.kv_rank + a.rope)?,
            kv_norm: a.latent_norm.then(|| checkpoint.vector(&at("kv_a_layernorm.weight"), a.kv_rank)).transpose()?,
            kv_up: tensor(checkpoint, &at("kv_b_proj.weight"), a.groups * (a.nope + a.value), a.kv_rank)?,
            output: tensor(checkpoint, &at("o_proj.weight"), hidden, a.heads * a.value)?,
            rotation: Rotation { inv_freq, magnitude: shared.magnitude, interleave: config.rope.interleave },
            scale: rope::softmax_scale(config),
        })
    }

    /// What queries are projected from: the normed query latent, or the hidden state itself. `[length, q_rank]`
    pub fn query_input(&self, h: &[f32]) -> Vec<f32> {
        match &self.q_down {
            None => h.to_vec(),
            Some(down) => {
                let mut q = product(h, down.weight.cols, &down.weight);
                add_bias(&mut q, down.bias.as_ref());
                if let Some(weight) = &down.norm {
                    norm(&mut q, weight, self.shape.latent_norm_eps);
                }
                q
            }
        }
    }

    /// The normed latent `[length, latent]` and the rope key before its rotation `[length, rope]`.
    pub fn latent(&self, h: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let a = &self.shape;
        let mut down = product(h, self.kv_down.cols, &self.kv_down);
        add_bias(&mut down, self.kv_bias.as_ref());
        let (mut latent, mut key) = (Vec::new(), Vec::new());
        for row in down.chunks_exact(a.kv_rank + a.rope) {
            latent.extend(&row[..a.kv_rank]);
            key.extend(&row[a.kv_rank..]);
        }
        if let Some(weight) = &self.kv_norm {
            norm(&mut latent, weight, a.latent_norm_eps);
        }
        (latent, key)
    }

    /// The K rows of group `g`, `[nope, latent]`.
    pub fn key_rows(&self, g: usize) -> std::ops::Range<usize> {
        let block = self.shape.nope + self.shape.value;
        g * block..g * block + self.shape.nope
    }

    /// The V rows of group `g`, `[value, latent]`.
    pub fn value_rows(&self, g: usize) -> std::ops::Range<usize> {
        let block = self.shape.nope + self.shape.value;
        g * block + self.shape.nope..(g + 1) * block
    }

    /// Queries and keys of one sample from its normed hidden states `[length, hidden]`.
    pub fn project(&self, h: &[f32]) -> Projected {
        let a = &self.shape;
        let (length, width) = (h.len() / self.kv_down.cols, a.nope + a.rope);
        let mut q = product(&self.query_input(h), self.q_up.cols, &self.q_up);
        add_bias(&mut q, self.q_bias.as_ref());
        let (latent, key) = self.latent(h);
        let up = product(&latent, a.kv_rank, &self.kv_up);
        let mut k = vec![0.0; length * a.groups * width];
        let block = a.nope + a.value;
        for (t, row) in k.chunks_exact_mut(a.groups * width).enumerate() {
            for (g, head) in row.chunks_exact_mut(width).enumerate() {
                head[..a.nope].copy_from_slice(&up[(t * a.groups + g) * block..][..a.nope]);
                head[a.nope..].copy_from_slice(&key[t * a.rope..(t + 1) * a.rope]);
            }
            self.rotation.turn(row, width, t);
        }
        for (t, row) in q.chunks_exact_mut(a.heads * width).enumerate() {
            self.rotation.turn(row, width, t);
        }
        Projected { length, q, k, pool: latent, width, heads: (a.heads, a.heads / a.groups), scale: self.scale }
    }
}

/// Llama's attention of one layer.
pub struct GroupedLayer {
    /// Its dimensions.
    pub shape: Grouped,
    /// `[heads·d, hidden]`
    pub q: Rows,
    /// `[groups·d, hidden]`
    pub k: Rows,
    /// `[groups·d, hidden]`
    pub v: Rows,
    /// Biases of q, k and v.
    pub bias: Option<[Vec<f32>; 3]>,
    /// `[hidden, heads·d]`
    pub output: Rows,
    /// The rotation of whole heads.
    pub rotation: Rotation,
    /// The softmax scale.
    pub scale: f32,
}

impl GroupedLayer {
    /// Reads layer `i`.
    pub fn read(checkpoint: &Checkpoint, config: &ModelConfig, a: &Grouped, i: usize) -> Result<GroupedLayer> {
        let at = |which: &str, kind: &str| format!("model.layers.{i}.self_attn.{which}_proj.{kind}");
        let (hidden, d) = (config.hidden, a.head_dim);
        let weight = |which: &str, heads: usize| tensor(checkpoint, &at(which, "weight"), heads * d, hidden);
        let bias = |which: &str, heads: usize| checkpoint.vector(&at(which, "bias"), heads * d);
        let shared = rope::frequencies(&config.rope, d);
        Ok(GroupedLayer {
            shape: a.clone(),
            q: weight("q", a.heads)?,
            k: weight("k", a.groups)?,
            v: weight("v", a.groups)?,
            bias: match a.bias {
                true => Some([bias("q", a.heads)?, bias("k", a.groups)?, bias("v", a.groups)?]),
                false => None,
            },
            output: tensor(checkpoint, &at("o", "weight"), hidden, a.heads * d)?,
            rotation: Rotation {
                inv_freq: shared.inv_freq,
                magnitude: shared.magnitude,
                interleave: config.rope.interleave,
            },
            scale: rope::softmax_scale(config),
        })
    }

    /// Queries and keys of one sample from its normed hidden states, which are also what attention pools.
    pub fn project(&self, h: &[f32]) -> Projected {
        let (a, hidden) = (&self.shape, self.q.cols);
        let turned = |weight: &Rows, bias: Option<&Vec<f32>>, heads: usize| {
            let mut rows = product(h, hidden, weight);
            add_bias(&mut rows, bias);
            for (t, row) in rows.chunks_exact_mut(heads * a.head_dim).enumerate() {
                self.rotation.turn(row, a.head_dim, t);
            }
            rows
        };
        Projected {
            length: h.len() / hidden,
            q: turned(&self.q, self.bias.as_ref().map(|b| &b[0]), a.heads),
            k: turned(&self.k, self.bias.as_ref().map(|b| &b[1]), a.groups),
            pool: h.to_vec(),
            width: a.head_dim,
            heads: (a.heads, a.heads / a.groups),
            scale: self.scale,
        }
    }
}

/// The attention of either kind.
pub enum HostAttention {
    /// MLA.
    Latent(LatentLayer),
    /// Llama's.
    Grouped(GroupedLayer),
}

impl HostAttention {
    /// Reads layer `i`.
    pub fn read(checkpoint: &Checkpoint, config: &ModelConfig, i: usize) -> Result<HostAttention> {
        Ok(match &config.attention {
            Attention::Latent(a) => HostAttention::Latent(LatentLayer::read(checkpoint, config, a, i)?),
            Attention::Grouped(a) => HostAttention::Grouped(GroupedLayer::read(checkpoint, config, a, i)?),
        })
    }
}
