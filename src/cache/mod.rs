//! The paged KV cache: what a block holds ([`Layout`]), and which blocks are free ([`Pool`](pool::Pool)).

pub mod pool;

use crate::config::{Attention, ModelConfig};
use crate::model::shard::{Owned, Path};

/// Tokens a block holds.
pub const BLOCK: usize = 64;

/// What one rank caches for a token in one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// Keys and values of the rank's groups, and the shared rope key once: `groups·(nope+value)+rope` elements.
    Grouped {
        /// Groups on this rank, G/W.
        groups: usize,
        /// Width of a key without its rope part, d_n (Llama: the whole head).
        nope: usize,
        /// Width of the shared rope key, d_r (Llama: 0).
        rope: usize,
        /// Width of a value, d_v.
        value: usize,
    },
    /// The normed latent and the rope key: `latent+rope` elements.
    Latent {
        /// d_c.
        latent: usize,
        /// d_r.
        rope: usize,
    },
}

impl Layout {
    /// The layout of `model` for one rank.
    pub fn of(model: &ModelConfig, owned: &Owned) -> Layout {
        match (&model.attention, owned.path) {
            (Attention::Grouped(a), _) => {
                Layout::Grouped { groups: owned.groups.len(), nope: a.head_dim, rope: 0, value: a.head_dim }
            }
            (Attention::Latent(a), Path::Gqa) => {
                Layout::Grouped { groups: owned.groups.len(), nope: a.nope, rope: a.rope, value: a.value }
            }
            (Attention::Latent(a), Path::Absorb) => Layout::Latent { latent: a.kv_rank, rope: a.rope },
        }
    }

    /// Elements a token takes in one layer on this rank.
    pub fn elements(&self) -> usize {
        match *self {
            Layout::Grouped { groups, nope, rope, value } => groups * (nope + value) + rope,
            Layout::Latent { latent, rope } => latent + rope,
        }
    }
}
