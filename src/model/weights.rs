//! From a checkpoint's names to one rank's weights. Only the rank's rows and columns are read.

use crate::backend::{Backend, ExpertSlices, Reduction};
use crate::checkpoint::{Checkpoint, Slice};
use crate::config::{Attention, Grouped, Latent, Mlp, ModelConfig, Moe, Scoring};
use crate::error::{Error, Result};
use crate::model::shard::Owned;

/// One decoder layer's weights on one rank.
pub struct Layer<B: Backend> {
    /// RMSNorm before attention. `[hidden]`
    pub input_norm: B::Vector,
    /// Projections of attention.
    pub attention: AttentionWeights<B>,
    /// o_proj, the rank's columns. `[hidden, heads_local·value]`
    pub output: B::Matrix,
    /// o_proj's bias.
    pub output_bias: Option<B::Vector>,
    /// RMSNorm before the MLP. `[hidden]`
    pub post_norm: B::Vector,
    /// The MLP.
    pub mlp: MlpWeights<B>,
    /// This layer's own frequencies, where the checkpoint stores them. `[rope/2]`
    pub inv_freq: Option<Vec<f64>>,
}

/// How queries, keys and values are projected.
pub enum AttentionWeights<B: Backend> {
    /// GQLA and MLA.
    Latent(LatentWeights<B>),
    /// Llama: `[heads_local·d + groups_local·2d, hidden]`: q, then K and V group by group.
    Grouped {
        /// The joined projection.
        qkv: B::Matrix,
        /// Its bias.
        bias: Option<B::Vector>,
    },
}

/// Projections of latent attention.
pub struct LatentWeights<B: Backend> {
    /// What is projected from the hidden state: q_a (or, without a query latent, the rank's q), then the latent and the
    /// rope key. `[q_rank + d_c + d_r, hidden]` or `[heads_local·(d_n+d_r) + d_c + d_r, hidden]`
    pub down: B::Matrix,
    /// Its bias.
    pub down_bias: Option<B::Vector>,
    /// The query latent's norm and q_b, the rank's heads. `[q_rank]`, `[heads_local·(d_n+d_r), q_rank]`
    pub query: Option<(Option<B::Vector>, B::Matrix)>,
    /// The latent's norm. `[d_c]`
    pub kv_norm: Option<B::Vector>,
    /// kv_b, the rank's groups. `[groups_local·(d_n+d_v), d_c]`
    pub kv_up: B::Matrix,
}

/// A layer's MLP on one rank.
pub enum MlpWeights<B: Backend> {
    /// `gate_up` `[2·width_local, hidden]`, gate first; `down` `[hidden, width_local]`.
    Dense {
        /// Gate and up.
        gate_up: B::Matrix,
        /// Their bias.
        gate_up_bias: Option<B::Vector>,
        /// Down.
        down: B::Matrix,
        /// Its bias.
        down_bias: Option<B::Vector>,
        /// Columns on this rank.
        width: usize,
    },
    /// Router and experts.
    Sparse {
        /// `[experts, hidden]`
        gate: B::Matrix,
        /// `e_score_correction_bias`, `[experts]`.
        bias: Option<B::Vector>,
        /// The rank's columns of every expert, the shared one last.
        experts: B::Experts,
    },
}

/// Reads weights of one model for one rank.
pub struct Loader<'a, B: Backend> {
    /// The device.
    pub backend: &'a B,
    /// Where they are read from.
    pub checkpoint: &'a Checkpoint,
    /// The model.
    pub model: &'a ModelConfig,
    /// What this rank owns.
    pub owned: &'a Owned,
}

impl<'a, B: Backend> Loader<'a, B> {
    /// The embedding, the rank's vocabulary rows. `[vocab_local, hidden]`
    pub fn embedding(&self) -> Result<B::Matrix> {
        self.vocabulary("model.embed_tokens.weight")
    }

    /// The head, the rank's vocabulary rows; `None` when it is the embedding.
    pub fn head(&self) -> Result<Option<B::Matrix>> {
        if self.model.tie_embeddings {
            // Some tied checkpoints store the copy all the same: naming it claims it.
            if self.checkpoint.has("lm_head.weight", false) {
                self.checkpoint.slice("lm_head.weight", &[self.model.vocab, self.model.hidden], 0..0, 0..0)?;
            }
            return Ok(None);
        }
        self.vocabulary("lm_head.weight").map(Some)
    }

    fn vocabulary(&self, name: &str) -> Result<B::Matrix> {
        let (vocab, hidden) = (self.model.vocab, self.model.hidden);
        let rows = self.checkpoint.slice(name, &[vocab, hidden], self.owned.vocab.clone(), 0..hidden)?;
        self.backend.matrix(&[rows], Reduction::Whole)
    }

    /// A vector of the whole model.
    pub fn vector(&self, name: &str, length: usize) -> Result<B::Vector> {
        self.backend.vector(&self.checkpoint.vector(name, length)?)
    }

    /// Decoder layer `i`.
    pub fn layer(&self, i: usize) -> Result<Layer<B>> {
        let p = format!("model.layers.{i}.");
        let hidden = self.model.hidden;
        let (attention, value, bias) = match &self.model.attention {
            Attention::Latent(a) => (AttentionWeights::Latent(self.latent(&p, a)?), a.value, a.bias),
            Attention::Grouped(a) => (self.grouped(&p, a)?, a.head_dim, a.bias),
        };
        let columns = self.owned.heads.start * value..self.owned.heads.end * value;
        let o_proj = format!("{p}self_attn.o_proj.weight");
        let o_proj = self.checkpoint.slice(&o_proj, &[hidden, self.model.heads() * value], 0..hidden, columns)?;
        let inv_freq = match &self.model.attention {
            Attention::Latent(a) if a.stored_inv_freq => {
                let stored = self.checkpoint.vector(&format!("{p}self_attn.rope_inv_freq"), a.rope / 2)?;
                Some(stored.into_iter().map(f64::from).collect())
            }
            _ => None,
        };
        Ok(Layer {
            input_norm: self.vector(&format!("{p}input_layernorm.weight"), hidden)?,
            attention,
            output: self.backend.matrix(&[o_proj], Reduction::Split)?,
            output_bias: self.whole_bias(&format!("{p}self_attn.o_proj.bias"), bias)?,
            post_norm: self.vector(&format!("{p}post_attention_layernorm.weight"), hidden)?,
            mlp: match self.model.mlp[i.min(self.model.layers - 1)] {
                Mlp::Dense { width } => self.dense(&p, width)?,
                Mlp::Sparse => self.sparse(&p)?,
            },
            inv_freq,
        })
    }

    /// A bias of a row-split product: it is added after the sum over the ranks.
    fn whole_bias(&self, name: &str, present: bool) -> Result<Option<B::Vector>> {
        present.then(|| self.vector(name, self.model.hidden)).transpose()
    }

    fn latent(&self, p: &str, a: &Latent) -> Result<LatentWeights<B>> {
        let (hidden, width) = (self.model.hidden, a.nope + a.rope);
        let at = |name: &str| format!("{p}self_attn.{name}");
        let heads = self.owned.heads.start * width..self.owned.heads.end * width;
        let kv = at("kv_a_proj_with_mqa.weight");
        let kv = self.checkpoint.slice(&kv, &[a.kv_rank + a.rope, hidden], 0..a.kv_rank + a.rope, 0..hidden)?;
        let (first, query) = match a.q_rank {
            Some(rank) => {
                let down = self.checkpoint.slice(&at("q_a_proj.weight"), &[rank, hidden], 0..rank, 0..hidden)?;
                let up = at("q_b_proj.weight");
                let up = self.checkpoint.slice(&up, &[a.heads * width, rank], heads, 0..rank)?;
                let norm = a.latent_norm.then(|| self.vector(&at("q_a_layernorm.weight"), rank)).transpose()?;
                (down, Some((norm, self.backend.matrix(&[up], Reduction::Whole)?)))
            }
            None => {
                let q = self.checkpoint.slice(&at("q_proj.weight"), &[a.heads * width, hidden], heads, 0..hidden)?;
                (q, None)
            }
        };
        let down_bias = if a.bias { self.latent_bias(p, a, first.rows())? } else { None };
        let group = a.nope + a.value;
        let rows = self.owned.groups.start * group..self.owned.groups.end * group;
        let up = self.checkpoint.slice(&at("kv_b_proj.weight"), &[a.groups * group, a.kv_rank], rows, 0..a.kv_rank)?;
        Ok(LatentWeights {
            down: self.backend.matrix(&[first, kv], Reduction::Whole)?,
            down_bias,
            query,
            kv_norm: a.latent_norm.then(|| self.vector(&at("kv_a_layernorm.weight"), a.kv_rank)).transpose()?,
            kv_up: self.backend.matrix(&[up], Reduction::Whole)?,
        })
    }

    /// The joined bias of `down`: q_a_proj's (q_proj has none in this family, except where it is stored) and kv_a's.
    fn latent_bias(&self, p: &str, a: &Latent, first: usize) -> Result<Option<B::Vector>> {
        let width = a.nope + a.rope;
        let mut joined = match a.q_rank {
            Some(rank) => self.checkpoint.vector(&format!("{p}self_attn.q_a_proj.bias"), rank)?,
            None if self.checkpoint.has(&format!("{p}self_attn.q_proj.bias"), false) => {
                let all = self.checkpoint.vector(&format!("{p}self_attn.q_proj.bias"), a.heads * width)?;
                all[self.owned.heads.start * width..self.owned.heads.end * width].to_vec()
            }
            None => vec![0.0; first],
        };
        let kv = format!("{p}self_attn.kv_a_proj_with_mqa.bias");
        if self.checkpoint.has(&kv, a.q_rank.is_some()) {
            joined.extend(self.checkpoint.vector(&kv, a.kv_rank + a.rope)?);
        } else {
            joined.resize(first + a.kv_rank + a.rope, 0.0);
        }
        self.backend.vector(&joined).map(Some)
    }

    fn grouped(&self, p: &str, a: &Grouped) -> Result<AttentionWeights<B>> {
        let (hidden, d) = (self.model.hidden, a.head_dim);
        let name = |which: &str, kind: &str| format!("{p}self_attn.{which}_proj.{kind}");
        let rows = |which: &str, total: usize, first: usize, last: usize| {
            self.checkpoint.slice(&name(which, "weight"), &[total * d, hidden], first * d..last * d, 0..hidden)
        };
        let mut parts = vec![rows("q", a.heads, self.owned.heads.start, self.owned.heads.end)?];
        let mut bias = vec![];
        if a.bias {
            bias = self.checkpoint.vector(&name("q", "bias"), a.heads * d)?
                [self.owned.heads.start * d..self.owned.heads.end * d]
                .to_vec();
        }
        let (k_bias, v_bias) = if a.bias {
            (
                self.checkpoint.vector(&name("k", "bias"), a.groups * d)?,
                self.checkpoint.vector(&name("v", "bias"), a.groups * d)?,
            )
        } else {
            (vec![], vec![])
        };
        for g in self.owned.groups.clone() {
            parts.push(rows("k", a.groups, g, g + 1)?);
            parts.push(rows("v", a.groups, g, g + 1)?);
            if a.bias {
                bias.extend(&k_bias[g * d..(g + 1) * d]);
                bias.extend(&v_bias[g * d..(g + 1) * d]);
            }
        }
        Ok(AttentionWeights::Grouped {
            qkv: self.backend.matrix(&parts, Reduction::Whole)?,
            bias: a.bias.then(|| self.backend.vector(&bias)).transpose()?,
        })
    }

    fn dense(&self, p: &str, width: usize) -> Result<MlpWeights<B>> {
        let (gate, up, down) = self.gated(&format!("{p}mlp."), width)?;
        let mine = self.owned.shard.range(width);
        let bias = |which: &str| self.checkpoint.vector(&format!("{p}mlp.{which}_proj.bias"), width);
        let gate_up_bias = if self.model.mlp_bias {
            let joined = [&bias("gate")?[mine.clone()], &bias("up")?[mine.clone()]].concat();
            Some(self.backend.vector(&joined)?)
        } else {
            None
        };
        Ok(MlpWeights::Dense {
            gate_up: self.backend.matrix(&[gate, up], Reduction::Whole)?,
            gate_up_bias,
            down: self.backend.matrix(&[down], Reduction::Split)?,
            down_bias: self.whole_bias(&format!("{p}mlp.down_proj.bias"), self.model.mlp_bias)?,
            width: mine.len(),
        })
    }

    /// gate, up and down of one gated MLP of `width`: the rank's rows, rows and columns.
    fn gated(&self, p: &str, width: usize) -> Result<(Slice<'a>, Slice<'a>, Slice<'a>)> {
        let (hidden, mine) = (self.model.hidden, self.owned.shard.range(width));
        let row = |which: &str| {
            self.checkpoint.slice(&format!("{p}{which}_proj.weight"), &[width, hidden], mine.clone(), 0..hidden)
        };
        let (gate, up) = (row("gate")?, row("up")?);
        let down = self.checkpoint.slice(&format!("{p}down_proj.weight"), &[hidden, width], 0..hidden, mine.clone())?;
        Ok((gate, up, down))
    }

    fn sparse(&self, p: &str) -> Result<MlpWeights<B>> {
        let Some(moe) = &self.model.moe else {
            return Err(Error::Internal(format!("{p}mlp is sparse and the configuration has no experts")));
        };
        let hidden = self.model.hidden;
        let gate =
            self.checkpoint.slice(&format!("{p}mlp.gate.weight"), &[moe.experts, hidden], 0..moe.experts, 0..hidden)?;
        let bias = match moe.scoring {
            Scoring::NoAuxTc => Some(self.vector(&format!("{p}mlp.gate.e_score_correction_bias"), moe.experts)?),
            _ => None,
        };
        Ok(MlpWeights::Sparse {
            gate: self.backend.matrix(&[gate], Reduction::Whole)?,
            bias,
            experts: self.backend.experts(&self.expert_slices(p, moe)?, moe)?,
        })
    }

    fn expert_slices(&self, p: &str, moe: &Moe) -> Result<ExpertSlices<'a>> {
        let mut slices = ExpertSlices { gate_up: vec![], down: vec![] };
        let mut add = |p: String, width: usize| -> Result<()> {
            let (gate, up, down) = self.gated(&p, width)?;
            slices.gate_up.push(vec![gate, up]);
            slices.down.push(vec![down]);
            Ok(())
        };
        for e in 0..moe.experts {
            add(format!("{p}mlp.experts.{e}."), moe.width)?;
        }
        if moe.shared_width > 0 {
            add(format!("{p}mlp.shared_experts."), moe.shared_width)?;
        }
        Ok(slices)
    }
}

/// Refuses a checkpoint that has tensors nobody asked for, except those that are known to say nothing new: the MTP
/// layer, and tables that follow from the configuration.
pub fn refuse_unclaimed(checkpoint: &Checkpoint, model: &ModelConfig) -> Result<()> {
    let mtp: Vec<String> = (0..model.mtp_layers).map(|i| format!("model.layers.{}.", model.layers + i)).collect();
    let harmless =
        |name: &str| mtp.iter().any(|p| name.starts_with(p.as_str())) || name.ends_with(".rotary_emb.inv_freq");
    match checkpoint.unclaimed().into_iter().find(|name| !harmless(name)) {
        None => Ok(()),
        Some(name) => Err(Error::checkpoint(
            checkpoint.directory(),
            format!(
                "tensor {name} is not part of {} as config.json describes it; leaving it out would change the result",
                model.architecture
            ),
        )),
    }
}
