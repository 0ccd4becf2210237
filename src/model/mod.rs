//! One model for every architecture: they differ in their projections and in what the cache holds.
//!
//! [`Model::forward`] is the whole step, and [`Model::layer`] one layer, top to bottom, its collectives in sight.

pub mod rope;
pub mod shard;
pub mod weights;

use crate::backend::{AttentionShape, Backend, Batch, Linear, Normed, View};
use crate::cache::Layout;
use crate::checkpoint::Checkpoint;
use crate::config::{Attention, ModelConfig};
use crate::error::Result;
use shard::{Owned, Path};
use weights::{AttentionWeights, Layer, Loader, MlpWeights};

/// Told after each part of the weights has been read: parts done, parts in all.
pub type Progress<'a> = &'a dyn Fn(usize, usize);

/// One rank's weights, caches and activations.
pub struct Model<B: Backend> {
    /// The configuration.
    pub config: ModelConfig,
    /// What this rank owns.
    pub owned: Owned,
    /// What the cache holds for a token in a layer.
    pub layout: Layout,
    shape: AttentionShape,
    embedding: B::Matrix,
    head: Option<B::Matrix>,
    final_norm: B::Vector,
    layers: Vec<Layer<B>>,
    /// One table for all layers, or one a layer where the checkpoint stores frequencies.
    ropes: Vec<B::RopeTable>,
    caches: Vec<B::Cache>,
    act: Activations<B>,
}

/// Preallocated activations of a step, `[max_rows, …]`.
struct Activations<B: Backend> {
    /// Residual stream. `[hidden]`
    x: B::Tensor,
    /// Normed input of the present half-layer. `[hidden]`
    h: B::Tensor,
    /// Output of a half-layer before its all-reduce. `[hidden]`
    partial: B::Tensor,
    /// Projections from the hidden state. `[q_rank + d_c + d_r]`, or as [`weights::AttentionWeights`] says
    down: B::Tensor,
    /// Normed query latent. `[q_rank]`
    q_latent: B::Tensor,
    /// Normed latent on the GQA path. `[d_c]`
    latent: B::Tensor,
    /// Queries before rope. `[heads_local·(d_n+d_r)]`
    q: B::Tensor,
    /// Queries after rope on the GQA path. `[heads_local·(d_n+d_r)]`
    q_turned: B::Tensor,
    /// Keys and values of the GQA path. `[groups_local·(d_n+d_v)]`
    kv: B::Tensor,
    /// Absorbed queries. `[heads_local·(d_c+d_r)]`
    q_absorbed: B::Tensor,
    /// Attention's output in the latent. `[heads_local·d_c]`
    o_latent: B::Tensor,
    /// Attention's output. `[heads_local·d_v]`
    o: B::Tensor,
    /// Gate and up of a dense MLP. `[2·width_local]`
    gate_up: B::Tensor,
    /// Their product. `[width_local]`
    gated: B::Tensor,
    /// Chosen experts.
    routing: Option<B::Routing>,
    /// Hidden states whose logits are wanted. `[hidden]`
    selected: B::Tensor,
}

impl<B: Backend> Model<B> {
    /// Reads this rank's weights and allocates caches of `blocks` blocks and activations for `max_rows` tokens a step
    /// and positions up to `max_context`.
    pub fn load(
        backend: &B,
        checkpoint: &Checkpoint,
        config: &ModelConfig,
        owned: &Owned,
        blocks: usize,
        max_rows: usize,
        max_context: usize,
        progress: Progress,
    ) -> Result<Model<B>> {
        let loader = Loader { backend, checkpoint, model: config, owned };
        let parts = config.layers + 2;
        let embedding = loader.embedding()?;
        let head = loader.head()?;
        let final_norm = loader.vector("model.norm.weight", config.hidden)?;
        progress(1, parts);
        let mut layers = Vec::with_capacity(config.layers);
        for i in 0..config.layers {
            layers.push(loader.layer(i)?);
            progress(i + 2, parts);
        }
        weights::refuse_unclaimed(checkpoint, config)?;
        let layout = Layout::of(config, owned);
        let caches = (0..config.layers).map(|_| backend.cache(layout, blocks)).collect::<Result<_>>()?;
        let shared = rope::frequencies(&config.rope, config.rope_dim());
        let table = |inv_freq: &[f64]| backend.rope_table(&config.rope, inv_freq, shared.magnitude, max_context);
        let ropes = if layers.iter().any(|l| l.inv_freq.is_some()) {
            layers.iter().map(|l| table(l.inv_freq.as_deref().unwrap_or(&shared.inv_freq))).collect::<Result<_>>()?
        } else {
            vec![table(&shared.inv_freq)?]
        };
        let shape = attention_shape(backend, config, owned);
        let act = Activations::new(backend, config, owned, &shape, max_rows)?;
        progress(parts, parts);
        Ok(Model {
            config: config.clone(),
            owned: owned.clone(),
            layout,
            shape,
            embedding,
            head,
            final_norm,
            layers,
            ropes,
            caches,
            act,
        })
    }

    /// Layer `layer` alone (the MTP layer is number `config.layers`), without vocabulary: for work layer by layer, with
    /// [`enter`](Model::enter) and `layer(b, 0)`. Its caches have `blocks` blocks.
    pub fn load_layer(
        backend: &B,
        checkpoint: &Checkpoint,
        config: &ModelConfig,
        owned: &Owned,
        layer: usize,
        blocks: usize,
        max_rows: usize,
        max_context: usize,
    ) -> Result<Model<B>> {
        let loader = Loader { backend, checkpoint, model: config, owned };
        let loaded = loader.layer(layer)?;
        let shared = rope::frequencies(&config.rope, config.rope_dim());
        let inv_freq = loaded.inv_freq.as_deref().unwrap_or(&shared.inv_freq);
        let layout = Layout::of(config, owned);
        let shape = attention_shape(backend, config, owned);
        let vocabulary = [config.vocab, config.hidden];
        let first_row = checkpoint.slice("model.embed_tokens.weight", &vocabulary, 0..1, 0..config.hidden)?;
        Ok(Model {
            config: config.clone(),
            owned: owned.clone(),
            layout,
            embedding: backend.matrix(&[first_row], crate::backend::Reduction::Whole)?,
            head: None,
            final_norm: loader.vector("model.norm.weight", config.hidden)?,
            ropes: vec![backend.rope_table(&config.rope, inv_freq, shared.magnitude, max_context)?],
            caches: vec![backend.cache(layout, blocks)?],
            act: Activations::new(backend, config, owned, &shape, max_rows)?,
            layers: vec![loaded],
            shape,
        })
    }

    /// Begins a step in the middle of the model: `residual` `[rows, hidden]` is the stream before the first layer here.
    pub fn enter(&mut self, b: &mut B, batch: &Batch, residual: &[f32]) -> Result<()> {
        b.begin(batch)?;
        b.write_rows(residual, &mut self.act.x)?;
        b.norm(&self.act.x, &self.layers[0].input_norm, self.config.norm_eps, &mut self.act.h)
    }

    /// Runs one step: embed, layers, last norm, and the head over the batch's wanted rows, for [`logits`](Model::logits)
    /// or, where `choose` is set, for [`best`](Model::best).
    pub fn forward(&mut self, b: &mut B, batch: &Batch, choose: bool) -> Result<()> {
        let first = self.owned.vocab.start;
        b.step(u32::from(choose), batch, |b| {
            self.embed(b)?;
            for i in 0..self.layers.len() {
                self.layer(b, i)?;
            }
            b.select_outputs(&self.act.h, &mut self.act.selected)?;
            b.head(self.head.as_ref().unwrap_or(&self.embedding), &self.act.selected, first, choose)
        })
    }

    /// The residual stream's beginning: embeddings, summed over the ranks' vocabulary rows, and the first norm.
    pub fn embed(&mut self, b: &mut B) -> Result<()> {
        let (a, first, eps) = (&mut self.act, self.owned.vocab.start, self.config.norm_eps);
        let norm = &self.layers[0].input_norm;
        b.embed_all_reduce_norm(&self.embedding, first, &mut a.partial, &mut a.x, norm, eps, &mut a.h)
    }

    /// Layer `i`: its normed input is in `h` and so is the next layer's when it returns.
    pub fn layer(&mut self, b: &mut B, i: usize) -> Result<()> {
        self.attention(b, i)?;
        let next_norm = self.layers.get(i + 1).map_or(&self.final_norm, |l| &l.input_norm);
        let (layer, a, eps) = (&self.layers[i], &mut self.act, self.config.norm_eps);
        let bias = layer.output_bias.as_ref();
        b.all_reduce_add_norm(&mut a.partial, bias, &mut a.x, &layer.post_norm, eps, &mut a.h)?;
        match &layer.mlp {
            MlpWeights::Dense { gate_up, gate_up_bias, down, down_bias, width } => {
                let h = View::new(&a.h, 0, self.config.hidden);
                b.gated(gate_up, gate_up_bias.as_ref(), h, *width, &mut a.gate_up, &mut a.gated)?;
                b.linear(down, None, View::new(&a.gated, 0, *width), &mut a.partial)?;
                b.all_reduce_add_norm(&mut a.partial, down_bias.as_ref(), &mut a.x, next_norm, eps, &mut a.h)
            }
            MlpWeights::Sparse { gate, bias, experts } => {
                let (Some(moe), Some(routing)) = (&self.config.moe, &mut a.routing) else {
                    return Err(crate::Error::Internal("a sparse layer without routing buffers".into()));
                };
                b.route(moe, gate, bias.as_ref(), &a.h, routing)?;
                b.moe_all_reduce_add_norm(experts, routing, &mut a.partial, &mut a.x, next_norm, eps, &mut a.h)
            }
        }
    }

    /// Projections, rope, append, attend, output projection; the sum over the ranks is the caller's.
    fn attention(&mut self, b: &mut B, i: usize) -> Result<()> {
        let (layer, a, s, cache) = (&self.layers[i], &mut self.act, &self.shape, &mut self.caches[i]);
        let rope = self.ropes.get(i).unwrap_or(&self.ropes[0]);
        let q_width = s.heads * (s.nope + s.rope);
        let hidden = View::new(&a.h, 0, self.config.hidden);
        match &layer.attention {
            AttentionWeights::Grouped { qkv, bias } => {
                b.linear(qkv, bias.as_ref(), hidden, &mut a.down)?;
                let q = View::new(&a.down, 0, q_width);
                let kv = View::new(&a.down, q_width, s.groups * (s.nope + s.value));
                b.append_attend_grouped(s, rope, q, kv, None, &mut a.q_turned, cache, &mut a.o)?;
            }
            AttentionWeights::Latent(w) => {
                b.linear(&w.down, w.down_bias.as_ref(), hidden, &mut a.down)?;
                let eps = match &self.config.attention {
                    Attention::Latent(l) => l.latent_norm_eps,
                    Attention::Grouped(_) => self.config.norm_eps,
                };
                let (rank, latents) = match &self.config.attention {
                    Attention::Latent(l) => (l.q_rank.unwrap_or(0), l.q_rank.unwrap_or(q_width)),
                    Attention::Grouped(_) => (0, 0),
                };
                let mut q_latent = View::new(&a.down, 0, rank);
                let mut latent = View::new(&a.down, latents, s.latent);
                let k_rope = View::new(&a.down, latents + s.latent, s.rope);
                let q_norm = w.query.as_ref().and_then(|q| q.0.as_ref());
                let q_normed = q_norm.map(|weight| Normed { x: q_latent, weight, out: &mut a.q_latent });
                match (self.owned.path, &w.kv_norm) {
                    (Path::Absorb, norm) => {
                        b.append_latent(s, rope, (latent, norm.as_ref()), k_rope, q_normed, eps, cache)?;
                    }
                    (Path::Gqa, Some(weight)) => {
                        b.norm_latents(Normed { x: latent, weight, out: &mut a.latent }, q_normed, eps)?;
                        latent = View::new(&a.latent, 0, s.latent);
                    }
                    (Path::Gqa, None) => {}
                }
                if q_norm.is_some() {
                    q_latent = View::new(&a.q_latent, 0, rank);
                }
                match (self.owned.path, &w.query) {
                    (Path::Gqa, Some((_, up))) => {
                        let q = Linear { weight: up, x: q_latent, out: &mut a.q };
                        b.linear_pair(q, Linear { weight: &w.kv_up, x: latent, out: &mut a.kv })?;
                    }
                    (Path::Gqa, None) => b.linear(&w.kv_up, None, latent, &mut a.kv)?,
                    (Path::Absorb, Some((_, up))) => b.linear(up, None, q_latent, &mut a.q)?,
                    (Path::Absorb, None) => {}
                }
                let q = View::new(if w.query.is_some() { &a.q } else { &a.down }, 0, q_width);
                match self.owned.path {
                    Path::Gqa => {
                        let kv = View::new(&a.kv, 0, s.groups * (s.nope + s.value));
                        b.append_attend_grouped(s, rope, q, kv, Some(k_rope), &mut a.q_turned, cache, &mut a.o)?;
                    }
                    Path::Absorb => {
                        b.absorb_query(s, rope, &w.kv_up, q, &mut a.q_absorbed)?;
                        b.attend_absorbed(s, &w.kv_up, &a.q_absorbed, cache, &mut a.o_latent, &mut a.o)?;
                        b.attend_expanded(s, rope, &w.kv_up, q, cache, &mut a.o)?;
                    }
                }
            }
        }
        b.linear(&layer.output, None, View::new(&a.o, 0, s.heads * s.value), &mut a.partial)
    }

    /// This rank's logits of the selected rows, `[outputs, vocab_local]`.
    pub fn logits(&mut self, b: &mut B, logits: &mut Vec<f32>) -> Result<()> {
        b.read_logits(logits)
    }

    /// The best score among this rank's tokens for each selected row, and its token.
    pub fn best(&mut self, b: &mut B, best: &mut Vec<(f32, u32)>) -> Result<()> {
        b.read_best(best)
    }

    /// The residual stream before the next layer, `[rows, hidden]`.
    pub fn residual(&self, b: &B, rows: usize) -> Result<Vec<f32>> {
        b.read(&self.act.x, rows)
    }

    /// The normed input of the next half-layer; after the last layer the hidden state that the head sees.
    pub fn normed(&self, b: &B, rows: usize) -> Result<Vec<f32>> {
        b.read(&self.act.h, rows)
    }

    /// For benchmarks: fills the caches of all layers with made-up values.
    pub fn fill_caches(&mut self, b: &B) -> Result<()> {
        self.caches.iter_mut().enumerate().try_for_each(|(i, cache)| b.fill_cache(cache, i as u64 + 1))
    }

    /// Bytes that the caches of all layers really take on this rank.
    pub fn cache_bytes(&self, b: &B) -> usize {
        self.caches.iter().map(|c| b.cache_bytes(c)).sum()
    }
}

/// The dimensions attention is specialised to on this rank, and whether long chunks expand there.
pub fn attention_shape<B: Backend>(backend: &B, config: &ModelConfig, owned: &Owned) -> AttentionShape {
    let per_group = config.heads() / config.groups();
    let (nope, rope, value, latent) = match &config.attention {
        Attention::Latent(a) => (a.nope, a.rope, a.value, a.kv_rank),
        Attention::Grouped(a) => (a.head_dim, 0, a.head_dim, 0),
    };
    let shape = AttentionShape {
        heads: owned.heads.len(),
        groups: owned.groups.len(),
        first_head_in_group: owned.heads.start - owned.groups.start * per_group,
        heads_per_group: per_group,
        nope,
        rope,
        value,
        latent,
        scale: rope::softmax_scale(config),
        expand: false,
    };
    AttentionShape { expand: owned.path == Path::Absorb && backend.expands(&shape), ..shape }
}

impl<B: Backend> Activations<B> {
    fn new(b: &B, config: &ModelConfig, owned: &Owned, s: &AttentionShape, rows: usize) -> Result<Self> {
        let q = s.heads * (s.nope + s.rope);
        let kv = s.groups * (s.nope + s.value);
        let absorb = owned.path == Path::Absorb;
        let (down, q_rank) = match &config.attention {
            Attention::Latent(a) => (a.q_rank.unwrap_or(q) + a.kv_rank + a.rope, a.q_rank.unwrap_or(0)),
            Attention::Grouped(_) => (q + kv, 0),
        };
        let width = config.mlp.iter().map(|m| match m {
            crate::config::Mlp::Dense { width } => owned.shard.range(*width).len(),
            crate::config::Mlp::Sparse => 0,
        });
        let width = width.max().unwrap_or(0);
        let when = |wanted: bool, cols: usize| b.tensor(if wanted { rows } else { 0 }, cols);
        Ok(Activations {
            x: b.residual(rows, config.hidden)?,
            h: b.tensor(rows, config.hidden)?,
            partial: b.summed(rows, config.hidden)?,
            down: b.tensor(rows, down)?,
            q_latent: when(q_rank > 0, q_rank)?,
            latent: when(!absorb && s.latent > 0, s.latent)?,
            q: when(q_rank > 0, q)?,
            q_turned: when(!absorb, q)?,
            kv: when(!absorb && s.latent > 0, kv)?,
            q_absorbed: when(absorb, s.heads * (s.latent + s.rope))?,
            o_latent: when(absorb, s.heads * s.latent)?,
            o: b.tensor(rows, s.heads * s.value)?,
            gate_up: when(width > 0, 2 * width)?,
            gated: when(width > 0, width)?,
            routing: config.moe.as_ref().map(|moe| b.routing(rows, moe)).transpose()?,
            selected: b.tensor(rows, config.hidden)?,
        })
    }
}
