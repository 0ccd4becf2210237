//! What a rank will take of its GPU's memory, before anything is loaded.

use super::context::{Gpu, GpuInfo};
use super::expand;
use super::step;
use super::{CudaOptions, cache_bytes};
use crate::backend::Budget;
use crate::cache::{BLOCK, Layout};
use crate::config::{Attention, Mlp, ModelConfig};
use crate::error::{Error, Result};
use crate::model::shard::{Owned, Path};

/// Allocations as the driver makes them: large ones in pages of their own, small ones side by side.
#[derive(Default)]
struct Pages {
    whole: usize,
    shared: usize,
}

impl Pages {
    const PAGE: usize = 2 << 20;

    fn add(&mut self, bytes: usize) {
        if bytes >= Pages::PAGE {
            self.whole += bytes.next_multiple_of(Pages::PAGE);
        } else {
            self.shared += bytes.next_multiple_of(512);
        }
    }

    /// A matrix in bf16.
    fn matrix(&mut self, rows: usize, cols: usize) {
        self.add(rows * cols * 2);
    }

    /// A vector, which is kept in f32 and bf16.
    fn vector(&mut self, len: usize) {
        self.add(len * 4);
        self.add(len * 2);
    }

    fn bytes(&self) -> usize {
        self.whole + self.shared.next_multiple_of(Pages::PAGE)
    }
}

/// The bytes of `model` on one rank, from shapes alone; `taken` is what the rank has of the GPU already.
pub fn predict(model: &ModelConfig, owned: &Owned, options: &CudaOptions, gpu: &GpuInfo, taken: usize) -> Budget {
    let later = later(model, owned, options, gpu);
    Budget {
        weights: weights(model, owned, options),
        layers: model.layers,
        block: cache_bytes(Layout::of(model, owned), 1),
        workspace: taken + activations(model, owned, options) + later,
        later,
    }
}

fn weights(model: &ModelConfig, owned: &Owned, options: &CudaOptions) -> usize {
    let (hidden, heads, groups) = (model.hidden, owned.heads.len(), owned.groups.len());
    let mut pages = Pages::default();
    for _ in 0..if model.tie_embeddings { 1 } else { 2 } {
        pages.matrix(owned.vocab.len(), hidden);
    }
    pages.vector(hidden);
    for mlp in &model.mlp {
        pages.vector(hidden);
        pages.vector(hidden);
        match &model.attention {
            Attention::Latent(a) => {
                let q = heads * (a.nope + a.rope);
                pages.matrix(a.q_rank.unwrap_or(q) + a.kv_rank + a.rope, hidden);
                if let Some(rank) = a.q_rank {
                    pages.matrix(q, rank);
                    pages.vector(rank);
                }
                pages.vector(a.kv_rank);
                pages.matrix(groups * (a.nope + a.value), a.kv_rank);
                pages.matrix(hidden, heads * a.value);
            }
            Attention::Grouped(a) => {
                pages.matrix((heads + 2 * groups) * a.head_dim, hidden);
                pages.matrix(hidden, heads * a.head_dim);
            }
        }
        match (mlp, &model.moe) {
            (Mlp::Dense { width }, _) => gated(&mut pages, 1, owned.shard.range(*width).len(), hidden),
            (Mlp::Sparse, Some(moe)) => {
                pages.matrix(moe.experts, hidden);
                pages.vector(moe.experts);
                gated(&mut pages, moe.experts, owned.shard.range(moe.width).len(), hidden);
                gated(&mut pages, 1, owned.shard.range(moe.shared_width).len(), hidden);
            }
            // Configurations with sparse layers and no experts are refused when they are read.
            (Mlp::Sparse, None) => {}
        }
    }
    let ropes = if matches!(&model.attention, Attention::Latent(a) if a.stored_inv_freq) { model.layers } else { 1 };
    for _ in 0..2 * ropes {
        pages.add(options.max_context * model.rope_dim() * 2);
    }
    pages.bytes()
}

/// Gate and up, and down, of `count` MLPs side by side.
fn gated(pages: &mut Pages, count: usize, width: usize, hidden: usize) {
    pages.matrix(count * 2 * width, hidden);
    pages.matrix(count * hidden, width);
}

/// Activations of `max_rows` rows.
fn activations(model: &ModelConfig, owned: &Owned, options: &CudaOptions) -> usize {
    let (hidden, heads, groups) = (model.hidden, owned.heads.len(), owned.groups.len());
    let rows = options.max_rows.max(step::bucket(options.max_sequences));
    let mut pages = Pages::default();
    let mut tensors = |columns: &[usize]| columns.iter().for_each(|c| pages.matrix(rows, *c));
    tensors(&[2 * hidden, hidden, hidden, hidden]);
    match &model.attention {
        Attention::Latent(a) => {
            let q = heads * (a.nope + a.rope);
            tensors(&[a.q_rank.unwrap_or(q) + a.kv_rank + a.rope, heads * a.value]);
            if let Some(rank) = a.q_rank {
                tensors(&[rank, q]);
            }
            match owned.path {
                Path::Gqa => tensors(&[a.kv_rank, q, groups * (a.nope + a.value)]),
                Path::Absorb => tensors(&[heads * (a.kv_rank + a.rope), heads * a.kv_rank]),
            }
        }
        Attention::Grouped(a) => {
            tensors(&[(heads + 2 * groups) * a.head_dim, heads * a.head_dim, heads * a.head_dim]);
        }
    }
    let dense = model.mlp.iter().map(|mlp| match mlp {
        Mlp::Dense { width } => owned.shard.range(*width).len(),
        Mlp::Sparse => 0,
    });
    if let Some(width) = dense.max().filter(|w| *w > 0) {
        tensors(&[2 * width, width]);
    }
    if let Some(moe) = &model.moe {
        let slots = moe.top_k + usize::from(moe.shared_width > 0);
        tensors(&[2 * moe.top_k, 2 * moe.top_k, 2 * moe.experts, 2 * slots, slots]);
    }
    pages.bytes()
}

/// What grows with the first steps: partial results of split attention, a decode step's logits, the experts' rows of a
/// full step, and on the absorb path what long chunks expand. Kernels and graphs take next to nothing beside them.
fn later(model: &ModelConfig, owned: &Owned, options: &CudaOptions, gpu: &GpuInfo) -> usize {
    let sequences = step::bucket(options.max_sequences);
    let width = match &model.attention {
        Attention::Latent(a) if owned.path == Path::Absorb => a.kv_rank,
        Attention::Latent(a) => a.value,
        Attention::Grouped(a) => a.head_dim,
    };
    let mut pages = Pages::default();
    // Hopper's own kernels have one CTA a multiprocessor, the portable ones up to four.
    let ctas = if gpu.capability == (9, 0) && width.is_multiple_of(64) { 1 } else { 4 };
    pages.add((sequences + ctas * gpu.multiprocessors) * owned.heads.len() * (width + 1) * 4);
    pages.add(sequences * owned.vocab.len() * 4);
    if let (Attention::Latent(a), Path::Absorb) = (&model.attention, owned.path) {
        let (latents, kv) = expand::bytes(owned.groups.len(), a.nope + a.value, a.kv_rank, options.max_context);
        pages.add(latents);
        pages.add(kv);
    }
    if let Some(moe) = &model.moe {
        let slots = moe.top_k + usize::from(moe.shared_width > 0);
        let width = owned.shard.range(moe.width).len().max(owned.shard.range(moe.shared_width).len());
        pages.add(options.max_rows.max(sequences) * slots * (2 * width + 4 * model.hidden));
    }
    pages.bytes()
}

/// The caches of all layers, `blocks` blocks each.
pub fn cache(budget: &Budget, blocks: usize) -> usize {
    let mut pages = Pages::default();
    (0..budget.layers).for_each(|_| pages.add(budget.block * blocks));
    pages.bytes()
}

/// Cache blocks that fit on `gpu` when `utilization` (0 to 1) of its memory may be used; `wanted` at most.
///
/// # Errors
/// [`Error::Memory`] when not even one block fits, with the figure that would.
pub fn blocks(budget: &Budget, gpu: &Gpu, utilization: f64, wanted: usize) -> Result<usize> {
    let (free, total) = gpu.memory()?;
    fit(budget, gpu.taken()?, (free, total), utilization, wanted)
        .map_err(|what| Error::Memory(format!("GPU {}: {what}", gpu.info.ordinal)))
}

/// As [`blocks`], from figures alone: `taken` bytes of the workspace are no longer free.
fn fit(
    budget: &Budget,
    taken: usize,
    (free, total): (usize, usize),
    utilization: f64,
    wanted: usize,
) -> std::result::Result<usize, String> {
    // What others have is not ours to use.
    let usable = free.saturating_sub((total as f64 * (1.0 - utilization)) as usize);
    let fixed = budget.weights + budget.workspace.saturating_sub(taken);
    let rounding = if budget.block * wanted >= Pages::PAGE { budget.layers * Pages::PAGE } else { 0 };
    let room = usable.saturating_sub(fixed);
    let block = (budget.block * budget.layers).max(1);
    let fits = (room.saturating_sub(rounding) / block).max(usize::from(room >= cache(budget, 1)));
    if fits >= 1 {
        return Ok(fits.min(wanted));
    }
    let mib = |bytes: usize| bytes.div_ceil(1 << 20);
    let least = fixed + cache(budget, 1);
    let remedy = if least <= free {
        let part = (total - free + least) as f64 / total as f64;
        format!("--gpu-memory-utilization {:.2} would do", (part * 100.0).ceil() / 100.0)
    } else {
        format!("use more ranks, a smaller --step-tokens, or a GPU with {} MiB free", mib(least))
    };
    Err(format!(
        "the weights take {} MiB, workspaces {} MiB more and one block of {BLOCK} tokens {} KiB, {} MiB in all; {} MiB of \
         {} MiB are free, {} MiB of them to use at --gpu-memory-utilization {utilization}: {remedy}",
        mib(budget.weights),
        mib(budget.workspace.saturating_sub(taken)),
        block >> 10,
        mib(least),
        mib(free),
        mib(total),
        mib(usable),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: usize = 1 << 30;
    const BUDGET: Budget = Budget { weights: 16 * GIB, layers: 32, block: 256 << 10, workspace: GIB, later: 0 };

    #[test]
    fn the_cache_takes_what_is_left_and_no_more() {
        for (free, utilization) in [(79 * GIB, 0.9), (40 * GIB, 0.9), (79 * GIB, 0.5), (79 * GIB, 1.0)] {
            let blocks = fit(&BUDGET, 0, (free, 80 * GIB), utilization, usize::MAX >> 40).unwrap();
            let all = BUDGET.weights + BUDGET.workspace + cache(&BUDGET, blocks);
            let usable = free - (80.0 * GIB as f64 * (1.0 - utilization)) as usize;
            assert!(all <= usable && all + 96 * (1 << 20) > usable, "{blocks} blocks: {all} of {usable}");
        }
        assert_eq!(fit(&BUDGET, 0, (79 * GIB, 80 * GIB), 0.9, 100), Ok(100));
    }

    #[test]
    fn too_little_memory_is_refused_with_a_figure_that_fits() {
        let refused = fit(&BUDGET, 0, (79 * GIB, 80 * GIB), 0.2, 100).unwrap_err();
        let part = refused.split("--gpu-memory-utilization ").last().unwrap().split(' ').next().unwrap();
        assert!(fit(&BUDGET, 0, (79 * GIB, 80 * GIB), part.parse().unwrap(), 100).is_ok(), "{refused}");
        let refused = fit(&BUDGET, 0, (15 * GIB, 16 * GIB), 1.0, 100).unwrap_err();
        let mib: usize = refused.split("a GPU with ").last().unwrap().split(' ').next().unwrap().parse().unwrap();
        assert!(fit(&BUDGET, 0, (mib << 20, mib << 20), 1.0, 100).is_ok(), "{refused}");
        assert!(fit(&BUDGET, 0, ((mib << 20) - (4 << 20), mib << 20), 1.0, 100).is_err());
    }
}
