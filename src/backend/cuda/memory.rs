//! What a rank will take of its GPU's memory, before anything is loaded.

use super::context::Gpu;
use super::matmul::WORKSPACE;
use super::step::{self, Inputs};
use super::{CudaOptions, cache_bytes};
use crate::cache::{BLOCK, Layout};
use crate::config::{Attention, Mlp, ModelConfig};
use crate::error::{Error, Result};
use crate::model::shard::{Owned, Path};

/// Bytes on one rank's GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// Weights, norms, tables.
    pub weights: usize,
    /// One block of the cache, in all layers.
    pub block: usize,
    /// Activations, workspaces, the step's inputs, and what the driver and the libraries take.
    pub workspace: usize,
}

/// What the context, the kernels, cuBLASLt and NCCL take beside our allocations, as seen on an H200.
const LIBRARIES: usize = 600 << 20;

/// Predicts the bytes of `model` on one rank, from shapes alone.
pub fn predict(model: &ModelConfig, owned: &Owned, options: &CudaOptions) -> Budget {
    let (hidden, heads, groups) = (model.hidden, owned.heads.len(), owned.groups.len());
    let rows = options.max_rows.max(step::bucket(options.max_sequences));
    let absorb = owned.path == Path::Absorb;
    // Elements of a layer's attention weights; columns of its activations; width of a head's query and output.
    let (weights, columns, out_width) = match &model.attention {
        Attention::Latent(a) => {
            let q = heads * (a.nope + a.rope);
            let kv = groups * (a.nope + a.value);
            let down = a.q_rank.unwrap_or(q) + a.kv_rank + a.rope;
            let q_up = a.q_rank.map_or(0, |r| q * r + r);
            let weights = down * hidden + q_up + kv * a.kv_rank + a.kv_rank + hidden * heads * a.value;
            let through = if absorb { heads * (2 * a.kv_rank + a.rope) } else { kv };
            let latents = a.q_rank.map_or(0, |r| r + q) + a.kv_rank;
            let columns = down + latents + q + through + heads * a.value;
            (weights, columns, if absorb { a.kv_rank } else { a.value })
        }
        Attention::Grouped(a) => {
            let qkv = (heads + 2 * groups) * a.head_dim;
            (qkv * hidden + hidden * heads * a.head_dim, qkv + 2 * heads * a.head_dim, a.head_dim)
        }
    };
    let mut elements = model.layers * weights + owned.vocab.len() * hidden * if model.tie_embeddings { 1 } else { 2 };
    let (mut widest, mut sparse) = (0, false);
    for mlp in &model.mlp {
        match mlp {
            Mlp::Dense { width } => {
                let width = owned.shard.range(*width).len();
                widest = widest.max(width);
                elements += 3 * width * hidden;
            }
            Mlp::Sparse => {
                sparse = true;
                let Some(moe) = &model.moe else { continue };
                let width =
                    moe.experts * owned.shard.range(moe.width).len() + owned.shard.range(moe.shared_width).len();
                elements += 3 * width * hidden + moe.experts * hidden;
            }
        }
    }
    let norms = (model.layers * 2 + 1) * hidden * 6;
    let ropes = if matches!(&model.attention, Attention::Latent(a) if a.stored_inv_freq) { model.layers } else { 1 };
    let tables = ropes * options.max_context * model.rope_dim() * 4;
    let mut activations = rows * (2 * (columns + 3 * hidden + 3 * widest) + 4 * hidden);
    if let (true, Some(moe)) = (sparse, &model.moe) {
        let slots = moe.top_k + usize::from(moe.shared_width > 0);
        let width = owned.shard.range(moe.width).len().max(owned.shard.range(moe.shared_width).len());
        activations += rows * slots * (2 * width + 4 * hidden) + rows * (moe.experts + 2 * moe.top_k) * 4;
    }
    // Partial results of split attention, and a decode step's logits.
    let parts = (step::bucket(options.max_sequences) + 4 * 132) * heads * (out_width + 1) * 4;
    let logits = step::bucket(options.max_sequences) * owned.vocab.len() * 4;
    let inputs = Inputs::bytes(options.max_rows, options.max_sequences, options.max_context);
    let layout = Layout::of(model, owned);
    Budget {
        weights: elements * 2 + norms + tables,
        block: model.layers * cache_bytes(layout, 1),
        workspace: activations + parts + logits + inputs + WORKSPACE + LIBRARIES,
    }
}

impl Budget {
    /// Cache blocks that fit on `gpu` when `utilization` (0 to 1) of its memory may be used; `wanted` at most.
    ///
    /// # Errors
    /// [`Error::Memory`] when not even one sequence of BLOCK tokens fits, with the utilization or the ranks that would.
    pub fn blocks(&self, gpu: &Gpu, utilization: f64, wanted: usize) -> Result<usize> {
        let (free, total) = gpu.memory()?;
        let usable = ((total as f64 * utilization) as usize).min(free);
        let fixed = self.weights + self.workspace;
        let fits = usable.saturating_sub(fixed) / self.block.max(1);
        if fits >= 1 {
            return Ok(fits.min(wanted));
        }
        let mib = |bytes: usize| bytes.div_ceil(1 << 20);
        Err(Error::Memory(format!(
            "GPU {} has {} MiB to use ({} MiB of {} MiB free, --gpu-memory-utilization {utilization}); the weights take {} \
             MiB, workspaces {} MiB and one block of {BLOCK} tokens {} KiB, {} MiB in all: use more ranks, a smaller \
             --step-tokens, or a GPU with {} MiB free",
            gpu.info.ordinal,
            mib(usable),
            mib(free),
            mib(total),
            mib(self.weights),
            mib(self.workspace),
            self.block >> 10,
            mib(fixed + self.block),
            mib(fixed + self.block)
        )))
    }
}
