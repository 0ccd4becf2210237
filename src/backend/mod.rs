//! What a model needs of the device that computes it: about a dozen fused operations on preallocated buffers.
//!
//! Shapes: `rows` are the tokens of the step. A tensor is `[max_rows, cols]`, row-major, and its first `rows` rows are
//! live. Weights are `[out, in]` as on disk. The CPU backend ([`cpu`]) is the oracle of the others.

pub mod cpu;
pub mod cuda;
pub mod draw;

use std::ops::Range;
use std::time::Duration;

use crate::cache::Layout;
use crate::checkpoint::Slice;
use crate::config::{ModelConfig, Moe, Rope};
use crate::error::Result;
use crate::model::shard::Owned;
pub use draw::Draw;

/// A token word with this bit names an output row of the step before: the token chosen there.
pub const FROM: u32 = 1 << 31;

/// Rows of one sequence up to which a step decodes it.
pub const DECODE_ROWS: usize = 4;

/// The tokens of one step, the same on every rank. Rows of one sequence are consecutive.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Batch {
    /// Token ids, `[rows]`; or, where the backend [`overlaps`](Backend::overlaps) steps, [`FROM`] and a row.
    pub tokens: Vec<u32>,
    /// Position of each token in its sequence, `[rows]`.
    pub positions: Vec<u32>,
    /// The sequences, in row order.
    pub spans: Vec<Span>,
    /// Rows whose logits are wanted, ascending.
    pub outputs: Vec<u32>,
    /// How their tokens are chosen, `[outputs]`; empty takes the largest logit of each.
    pub draws: Vec<Draw>,
}

/// A sequence's part of a [`Batch`]. Its rows are at positions `context - rows .. context`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Span {
    /// First row of the batch.
    pub first: usize,
    /// Rows of the batch (1 in decode, a chunk in prefill).
    pub rows: usize,
    /// Tokens in the cache once this step's are appended.
    pub context: usize,
    /// The sequence's block table; block `i` holds positions `i·BLOCK .. (i+1)·BLOCK`.
    pub blocks: Vec<u32>,
}

impl Batch {
    /// Tokens in this step.
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }
}

/// Some columns of a tensor.
#[derive(Debug)]
pub struct View<'a, T> {
    /// The tensor.
    pub tensor: &'a T,
    /// First column.
    pub first: usize,
    /// Columns.
    pub width: usize,
}

impl<'a, T> View<'a, T> {
    /// Columns `first .. first + width` of `tensor`.
    pub fn new(tensor: &'a T, first: usize, width: usize) -> Self {
        View { tensor, first, width }
    }
}

impl<T> Clone for View<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for View<'_, T> {}

/// Columns of a tensor that are normed on their way to another.
pub struct Normed<'a, B: Backend> {
    /// What is normed.
    pub x: View<'a, B::Tensor>,
    /// The norm's weight. `[x.width]`
    pub weight: &'a B::Vector,
    /// `rmsnorm(x)·weight`. `[rows, x.width]`
    pub out: &'a mut B::Tensor,
}

/// A product of its own input: `out = x·weightᵀ`.
pub struct Linear<'a, B: Backend> {
    /// `[out, x.width]`
    pub weight: &'a B::Matrix,
    /// What is multiplied.
    pub x: View<'a, B::Tensor>,
    /// `[rows, out]`
    pub out: &'a mut B::Tensor,
}

/// How the reduction of a product is split over the ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reduction {
    /// Every rank has the whole input: nothing is summed over ranks.
    Whole,
    /// The input's columns are split over the ranks: the result is this rank's partial sum.
    Split,
}

/// The gated experts of one layer, this rank's columns.
pub struct ExpertSlices<'a> {
    /// Per expert: gate and up, `[2·width_local, hidden]`, gate rows first.
    pub gate_up: Vec<Vec<Slice<'a>>>,
    /// Per expert: down, `[hidden, width_local]`.
    pub down: Vec<Vec<Slice<'a>>>,
}

/// Dimensions that attention is specialised to, on this rank.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// Query heads on this rank.
    pub heads: usize,
    /// Groups on this rank (those the heads belong to).
    pub groups: usize,
    /// Heads of this rank's first group that other ranks have (0 unless the absorb path splits a group).
    pub first_head_in_group: usize,
    /// Heads a group in the whole model.
    pub heads_per_group: usize,
    /// d_n (Llama: the head).
    pub nope: usize,
    /// d_r of the shared rope key (Llama: 0).
    pub rope: usize,
    /// d_v.
    pub value: usize,
    /// d_c (Llama: 0).
    pub latent: usize,
    /// Multiplies the logits before softmax.
    pub scale: f32,
    /// Absorb path: long chunks may be [expanded](AttentionShape::expands).
    pub expand: bool,
}

impl AttentionShape {
    /// The local group of local head `j`.
    pub fn group_of(&self, j: usize) -> usize {
        (self.first_head_in_group + j) / self.heads_per_group
    }

    /// The local heads of a local group.
    pub fn heads_of(&self, group: usize) -> Range<usize> {
        let edge = |g: usize| (g * self.heads_per_group).saturating_sub(self.first_head_in_group).min(self.heads);
        edge(group)..edge(group + 1)
    }

    /// Whether the last `rows` of `context` tokens attend in GQA form on the absorb path, over keys and values that are
    /// expanded from the cached latents for this once. Decode never does; a chunk does where that takes fewer
    /// multiply-adds.
    pub fn expands(&self, rows: usize, context: usize) -> bool {
        if !self.expand || rows <= DECODE_ROWS {
            return false;
        }
        // A token's or a query's product with W_UK and W_UV, and the keys that a row sees on average.
        let (product, keys) = (self.latent * (self.nope + self.value), context - rows / 2);
        let absorbed = rows * self.heads * (product + keys * (2 * self.latent + self.rope));
        let expanded =
            context * self.groups * product + rows * self.heads * keys * (self.nope + self.rope + self.value);
        expanded < absorbed
    }
}

/// Bytes of its device's memory that a rank will take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// Weights, norms, tables.
    pub weights: usize,
    /// Layers, each with a cache.
    pub layers: usize,
    /// One block of a layer's cache.
    pub block: usize,
    /// Activations, inputs and results of a step, libraries' workspaces, kernels.
    pub workspace: usize,
    /// The part of the workspace that comes with the first steps.
    pub later: usize,
}

/// What a device and its links do, as measured on it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rates {
    /// Memory bandwidth of a large copy, read and written, bytes/s.
    pub bandwidth: f64,
    /// A large product in bf16, FLOP/s.
    pub flops: f64,
    /// Memory, bytes.
    pub memory: f64,
    /// Seconds of the sum of one row with the norm that follows, and the bytes/s of a large sum in one direction.
    pub sums: Option<(f64, f64)>,
}

/// A device and its operations, for one rank. Every `&mut` tensor is written in its first `rows` rows of the current
/// batch ([`begin`](Backend::begin)).
pub trait Backend: Send + Sized {
    /// `[max_rows, cols]` activations: f32 on CPUs, bf16 on GPUs.
    type Tensor: Send;
    /// A weight matrix `[out, in]`.
    type Matrix: Send;
    /// A small f32 vector: norm weights, biases.
    type Vector: Send;
    /// One layer's paged cache.
    type Cache: Send;
    /// Experts of one layer.
    type Experts: Send;
    /// Chosen experts and their weights, `[max_rows, top_k]`.
    type Routing: Send;
    /// Tables of cos and sin.
    type RopeTable: Send;

    // Loading.

    /// Zeroed activations for `rows` tokens.
    fn tensor(&self, rows: usize, cols: usize) -> Result<Self::Tensor>;
    /// The same for the residual stream, which a backend of 16-bit activations keeps in 32 bits.
    fn residual(&self, rows: usize, cols: usize) -> Result<Self::Tensor> {
        self.tensor(rows, cols)
    }
    /// The same for partial sums that [`all_reduce_add_norm`](Backend::all_reduce_add_norm) takes. All ranks make theirs
    /// in the same order.
    fn summed(&self, rows: usize, cols: usize) -> Result<Self::Tensor> {
        self.tensor(rows, cols)
    }
    /// The rows of `parts`, one under the other, `[Σ out, in]`.
    fn matrix(&self, parts: &[Slice], reduction: Reduction) -> Result<Self::Matrix>;
    /// A vector from host memory.
    fn vector(&self, data: &[f32]) -> Result<Self::Vector>;
    /// An empty cache of `blocks` blocks.
    fn cache(&self, layout: Layout, blocks: usize) -> Result<Self::Cache>;
    /// Bytes a cache really takes.
    fn cache_bytes(&self, cache: &Self::Cache) -> usize;
    /// Experts in the device's form.
    fn experts(&self, slices: &ExpertSlices, moe: &Moe) -> Result<Self::Experts>;
    /// Room for the routing of `rows` tokens.
    fn routing(&self, rows: usize, moe: &Moe) -> Result<Self::Routing>;
    /// cos and sin of `positions` positions for the pairs' frequencies `inv_freq` `[dim/2]`, multiplied by `magnitude`.
    fn rope_table(&self, rope: &Rope, inv_freq: &[f64], magnitude: f64, positions: usize) -> Result<Self::RopeTable>;

    /// Loading is over: what only loading needs can go.
    fn loaded(&mut self) {}

    // A step.

    /// Computes a step: `body` enqueues its operations. `program` numbers what `body` does: two steps with the same
    /// program and equally many sequences, rows each and outputs enqueue the same operations on the same tensors, so
    /// that a device may record them once and replay them.
    fn step<F: FnMut(&mut Self) -> Result<()>>(&mut self, program: u32, batch: &Batch, mut body: F) -> Result<()> {
        let _ = program;
        self.begin(batch)?;
        body(self)
    }
    /// Takes the step's tokens, positions and block tables; everything until the next `begin` is about them.
    fn begin(&mut self, batch: &Batch) -> Result<()>;
    /// `out[r] = table[token - first]` where this rank has the row, else 0: a partial sum over the ranks. `[rows, hidden]`
    fn embed(&self, table: &Self::Matrix, first: usize, out: &mut Self::Tensor) -> Result<()>;
    /// `out = rmsnorm(x)·weight`. `[rows, hidden]`
    fn norm(&self, x: &Self::Tensor, weight: &Self::Vector, eps: f32, out: &mut Self::Tensor) -> Result<()>;
    /// The residual stream's beginning: [`embed`](Backend::embed) into `x`, its sum over the ranks, and
    /// `out = rmsnorm(x)·weight`. What is in `partial` afterwards is the backend's affair.
    fn embed_all_reduce_norm(
        &mut self,
        table: &Self::Matrix,
        first: usize,
        _partial: &mut Self::Tensor,
        x: &mut Self::Tensor,
        weight: &Self::Vector,
        eps: f32,
        out: &mut Self::Tensor,
    ) -> Result<()> {
        self.embed(table, first, x)?;
        self.all_reduce(x)?;
        self.norm(x, weight, eps, out)
    }
    /// Sums `x` over the ranks.
    fn all_reduce(&mut self, x: &mut Self::Tensor) -> Result<()>;
    /// Sums `partial` over the ranks, adds it and the bias to the residual `x`, and norms:
    /// `x += Σ partial (+ bias); out = rmsnorm(x)·weight`.
    fn all_reduce_add_norm(
        &mut self,
        partial: &mut Self::Tensor,
        bias: Option<&Self::Vector>,
        x: &mut Self::Tensor,
        weight: &Self::Vector,
        eps: f32,
        out: &mut Self::Tensor,
    ) -> Result<()>;
    /// `out = x·weightᵀ (+ bias)`. `[rows, out]`
    fn linear(
        &self,
        weight: &Self::Matrix,
        bias: Option<&Self::Vector>,
        x: View<Self::Tensor>,
        out: &mut Self::Tensor,
    ) -> Result<()>;
    /// Two products of which neither needs the other, in one launch where that is faster.
    fn linear_pair(&self, first: Linear<Self>, second: Linear<Self>) -> Result<()> {
        self.linear(first.weight, None, first.x, first.out)?;
        self.linear(second.weight, None, second.x, second.out)
    }
    /// GQA path. The norms of the latent and, where there is one, of the query latent.
    fn norm_latents(&self, latent: Normed<Self>, q: Option<Normed<Self>>, eps: f32) -> Result<()>;
    /// GQA path. Rotates queries into `q_out` and appends keys, values and the rope key to the cache.
    /// `q` `[rows, heads·(nope+rope)]`; `kv` `[rows, groups·(nope+value)]`, group-major, K then V; `k_rope` `[rows, rope]`.
    /// Without a shared rope key (`k_rope` is `None`) the whole of each query and key turns.
    fn rope_append_grouped(
        &self,
        shape: &AttentionShape,
        rope: &Self::RopeTable,
        q: View<Self::Tensor>,
        kv: View<Self::Tensor>,
        k_rope: Option<View<Self::Tensor>>,
        q_out: &mut Self::Tensor,
        cache: &mut Self::Cache,
    ) -> Result<()>;
    /// Absorb path. Appends the latent `[rows, latent]`, normed where a weight is given, and the turned rope key
    /// `[rows, rope]` to the cache, and norms the query latent where there is one.
    fn append_latent(
        &self,
        shape: &AttentionShape,
        rope: &Self::RopeTable,
        latent: (View<Self::Tensor>, Option<&Self::Vector>),
        k_rope: View<Self::Tensor>,
        q: Option<Normed<Self>>,
        eps: f32,
        cache: &mut Self::Cache,
    ) -> Result<()>;
    /// Causal attention over the cached groups. `q` `[rows, heads·(nope+rope)]` → `out` `[rows, heads·value]`
    fn attend_grouped(
        &self,
        shape: &AttentionShape,
        q: &Self::Tensor,
        cache: &Self::Cache,
        out: &mut Self::Tensor,
    ) -> Result<()>;
    /// [`rope_append_grouped`](Backend::rope_append_grouped), then [`attend_grouped`](Backend::attend_grouped).
    /// `q_turned` may hold what stands between.
    fn append_attend_grouped(
        &self,
        shape: &AttentionShape,
        rope: &Self::RopeTable,
        q: View<Self::Tensor>,
        kv: View<Self::Tensor>,
        k_rope: Option<View<Self::Tensor>>,
        q_turned: &mut Self::Tensor,
        cache: &mut Self::Cache,
        out: &mut Self::Tensor,
    ) -> Result<()> {
        self.rope_append_grouped(shape, rope, q, kv, k_rope, q_turned, cache)?;
        self.attend_grouped(shape, q_turned, cache, out)
    }
    /// `q_n ↦ W_UKᵀ q_n`, batched over groups: `q` `[rows, heads·(nope+rope)]` → `out` `[rows, heads·(latent+rope)]`,
    /// the rope parts turned. `kv_up` is kv_b's rows of the rank's groups, `[groups·(nope+value), latent]`. Like the
    /// next three it leaves out the rows of sequences that [`attend_expanded`](Backend::attend_expanded) takes.
    fn absorb_query(
        &self,
        shape: &AttentionShape,
        rope: &Self::RopeTable,
        kv_up: &Self::Matrix,
        q: View<Self::Tensor>,
        out: &mut Self::Tensor,
    ) -> Result<()>;
    /// Causal attention over the cached latents. `q` `[rows, heads·(latent+rope)]` → `out` `[rows, heads·latent]`
    fn attend_latent(
        &self,
        shape: &AttentionShape,
        q: &Self::Tensor,
        cache: &Self::Cache,
        out: &mut Self::Tensor,
    ) -> Result<()>;
    /// `o ↦ W_UV o`, batched over groups: `latent` `[rows, heads·latent]` → `out` `[rows, heads·value]`.
    fn absorb_output(
        &self,
        shape: &AttentionShape,
        kv_up: &Self::Matrix,
        latent: &Self::Tensor,
        out: &mut Self::Tensor,
    ) -> Result<()>;
    /// [`attend_latent`](Backend::attend_latent), then [`absorb_output`](Backend::absorb_output): `q`
    /// `[rows, heads·(latent+rope)]` → `out` `[rows, heads·value]`. `latent` may hold what stands between.
    fn attend_absorbed(
        &self,
        shape: &AttentionShape,
        kv_up: &Self::Matrix,
        q: &Self::Tensor,
        cache: &Self::Cache,
        latent: &mut Self::Tensor,
        out: &mut Self::Tensor,
    ) -> Result<()> {
        self.attend_latent(shape, q, cache, latent)?;
        self.absorb_output(shape, kv_up, latent, out)
    }
    /// Whether a model lets long chunks [expand](AttentionShape::expands) here: where it is fast, and where a row's bits
    /// need not be the same however a prompt is cut into chunks.
    fn expands(&self, shape: &AttentionShape) -> bool {
        let _ = shape;
        false
    }
    /// The same for the rows of sequences that the shape [expands](AttentionShape::expands), and for no others, in GQA
    /// form: `W_UK c` and `W_UV c` of their cached latents are made for the purpose. `q` `[rows, heads·(nope+rope)]`,
    /// not turned yet → `out` `[rows, heads·value]`.
    fn attend_expanded(
        &mut self,
        shape: &AttentionShape,
        rope: &Self::RopeTable,
        kv_up: &Self::Matrix,
        q: View<Self::Tensor>,
        cache: &Self::Cache,
        out: &mut Self::Tensor,
    ) -> Result<()>;
    /// `out = silu(gate)·up`: `gate_up` `[rows, 2·width]`, gate first → `out` `[rows, width]`
    fn silu_mul(&self, gate_up: &Self::Tensor, width: usize, out: &mut Self::Tensor) -> Result<()>;
    /// The first half of a gated MLP: `out = silu(gate)·up` of `x·gate_upᵀ (+ bias)`; `gate_up` may hold what stands
    /// between. `weight` `[2·width, in]`, gate rows first → `out` `[rows, width]`
    fn gated(
        &self,
        weight: &Self::Matrix,
        bias: Option<&Self::Vector>,
        x: View<Self::Tensor>,
        width: usize,
        gate_up: &mut Self::Tensor,
        out: &mut Self::Tensor,
    ) -> Result<()> {
        self.linear(weight, bias, x, gate_up)?;
        self.silu_mul(gate_up, width, out)
    }
    /// Scores every expert in f32 and chooses. `x` `[rows, hidden]`, `gate` `[experts, hidden]`, `bias` `[experts]`.
    fn route(
        &self,
        moe: &Moe,
        gate: &Self::Matrix,
        bias: Option<&Self::Vector>,
        x: &Self::Tensor,
        routing: &mut Self::Routing,
    ) -> Result<()>;
    /// `out = Σ_k w_k·down_e(silu(gate_e x)·up_e x)` over the chosen experts, plus the shared one (the last of
    /// `experts`, unscaled) where the model has it: this rank's partial sum. `[rows, hidden]`
    fn moe(
        &mut self,
        experts: &Self::Experts,
        routing: &Self::Routing,
        x: &Self::Tensor,
        out: &mut Self::Tensor,
    ) -> Result<()>;
    /// [`moe`](Backend::moe) of `h` and [`all_reduce_add_norm`](Backend::all_reduce_add_norm) back into `h`; what is in
    /// `partial` afterwards is the backend's affair.
    fn moe_all_reduce_add_norm(
        &mut self,
        experts: &Self::Experts,
        routing: &Self::Routing,
        partial: &mut Self::Tensor,
        x: &mut Self::Tensor,
        weight: &Self::Vector,
        eps: f32,
        h: &mut Self::Tensor,
    ) -> Result<()> {
        self.moe(experts, routing, h, partial)?;
        self.all_reduce_add_norm(partial, None, x, weight, eps, h)
    }
    /// The rows of `x` that the batch wants logits of. `[outputs, hidden]`
    fn select_outputs(&self, x: &Self::Tensor, out: &mut Self::Tensor) -> Result<()>;
    /// Computes this rank's logits of the selected rows, `[outputs, vocab_local]`, or where `choose` is set only what
    /// [`read_best`](Backend::read_best) gives, and [`read_tokens`](Backend::read_tokens) where steps overlap. `first`
    /// is the token of row 0 of `head`.
    fn head(&mut self, head: &Self::Matrix, x: &Self::Tensor, first: usize, choose: bool) -> Result<()>;
    /// The logits that [`head`](Backend::head) computed, f32 on the host: `[outputs, vocab_local]`.
    fn read_logits(&mut self, logits: &mut Vec<f32>) -> Result<()>;
    /// For each selected row, the best score among this rank's tokens and its token, as [`Draw`] has it, after a
    /// [`head`](Backend::head) with `choose`.
    fn read_best(&mut self, best: &mut Vec<(f32, u32)>) -> Result<()>;

    // Steps that overlap.

    /// Whether [`step`](Backend::step) only enqueues, choosing the tokens of all ranks on the device, so that the next
    /// step may be begun, and name them, before anyone has read them. At most two steps are under way.
    fn overlaps(&self) -> bool {
        false
    }
    /// Waits for the last step, or with `behind` for the one before it, and gives the tokens that it chose for its first
    /// `count` output rows.
    fn read_tokens(&mut self, behind: bool, count: usize, tokens: &mut Vec<u32>) -> Result<()> {
        let _ = (behind, count);
        tokens.clear();
        Err(crate::error::Error::Internal("this backend's steps do not overlap".into()))
    }
    /// On a worker: returns when everything enqueued is done or rank 0 has spoken again; an error if meanwhile the device
    /// or another rank fails.
    fn watch(&mut self) -> Result<()> {
        Ok(())
    }
    /// For benchmarks: the device's own time of the last step, or of the one before it, once it is done.
    fn step_time(&self, behind: bool) -> Result<Option<Duration>> {
        let _ = behind;
        Ok(None)
    }

    /// Copies the first `rows` rows to the host as f32 (tests, hidden states).
    fn read(&self, x: &Self::Tensor, rows: usize) -> Result<Vec<f32>>;
    /// Replaces the first rows by `[rows, cols]` values from the host (conversions, which go layer by layer).
    fn write_rows(&self, values: &[f32], x: &mut Self::Tensor) -> Result<()>;
    /// What this rank will take of its device's memory, before it does; `None` where that is the host's.
    fn budget(&self, model: &ModelConfig, owned: &Owned) -> Result<Option<Budget>> {
        let _ = (model, owned);
        Ok(None)
    }
    /// What a budget's caches of `blocks` blocks take.
    fn budget_cache(&self, budget: &Budget, blocks: usize) -> usize {
        budget.layers * budget.block * blocks
    }
    /// What the device's driver says this rank has taken; 0 where it is the host's memory.
    fn memory_taken(&self) -> Result<usize> {
        Ok(0)
    }
    /// Blocks of the cache that fit beside the weights in `utilization` (0 to 1) of the memory there is; `wanted` at most.
    fn fitting_blocks(&self, model: &ModelConfig, owned: &Owned, wanted: usize, utilization: f64) -> Result<usize>;
    /// Waits until everything enqueued is done.
    fn synchronize(&mut self) -> Result<()>;
    /// The device, in words.
    fn describe(&self) -> String;
    /// Bytes of a cached element.
    fn cache_element(&self) -> usize;
    /// For benchmarks: fills a cache with made-up values, which depend on `seed`.
    fn fill_cache(&self, cache: &mut Self::Cache, seed: u64) -> Result<()>;
    /// For benchmarks: activations of made-up values.
    fn noise_tensor(&self, rows: usize, cols: usize, seed: u64) -> Result<Self::Tensor>;
    /// For benchmarks: the device's memory bandwidth in bytes a second, measured now: a large copy, bytes read and written
    /// (GPU), or a large read (CPU).
    fn bandwidth(&mut self) -> Result<f64>;
    /// Measures rank 0's device and, with several ranks, their sums of rows of `hidden`. Every rank calls it, and rank 0's
    /// figures count. `None` where there is nothing to measure with.
    fn rates(&mut self, hidden: usize) -> Result<Option<Rates>> {
        let _ = hidden;
        Ok(None)
    }
    /// How ranks sum, in words.
    fn sums(&self) -> String {
        "host memory".into()
    }
    /// Time spent waiting in all-reduces since the last call; `None` where they are part of what the device computes.
    fn reduce_time(&mut self) -> Option<Duration>;
    /// The communicator that the control plane also uses.
    fn comm(&mut self) -> &mut dyn crate::comm::Communicator;
    /// Gives the communicator back when the device is done with.
    fn into_comm(self) -> Box<dyn crate::comm::Communicator>;
}
