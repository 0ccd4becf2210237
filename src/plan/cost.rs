//! The cost of one decode step on one rank: a roofline over the weights, one over the cache, and the all-reduces.
//!
//! The slowest rank is counted where widths do not divide evenly. What is left out, because it is small or equal on both
//! paths: activations, norms, sampling, launch overheads, and the draft layer where s_q is 2.

use serde::Serialize;

use super::hardware::Hardware;
use crate::cache::Layout;
use crate::config::{Attention, Mlp, ModelConfig, Moe};
use crate::error::{Error, Result};
use crate::model::shard::{Owned, Path, Shard};

/// Bytes of a stored weight (bf16).
const WEIGHT: f64 = 2.0;
/// The part of memory that weights and cache may take; the rest is the driver's, activations and workspace.
const USABLE: f64 = 0.92;

/// What a step works on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Load {
    /// Sequences in the batch.
    pub batch: usize,
    /// Tokens in each sequence's cache.
    pub context: usize,
    /// Tokens a sequence brings to a step: 1, or 2 with one draft token.
    pub s_q: usize,
}

/// What limits a part of the step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Bound {
    /// Memory bandwidth.
    Memory,
    /// Arithmetic.
    Compute,
}

/// The parts of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Part {
    /// Products with weights.
    Weights,
    /// Attention over the cache.
    Attention,
    /// All-reduces.
    AllReduce,
}

/// Bytes and FLOPs of one part of a step on one rank, and the time each would take alone.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Work {
    /// Bytes read.
    pub bytes: f64,
    /// Floating-point operations, a multiply-add being two.
    pub flops: f64,
    /// FLOP a byte.
    pub intensity: f64,
    /// Seconds to read the bytes.
    pub memory_s: f64,
    /// Seconds to do the arithmetic.
    pub compute_s: f64,
    /// The longer of the two.
    pub bound: Bound,
}

impl Work {
    fn new(bytes: f64, flops: f64, hardware: &Hardware) -> Work {
        let (memory_s, compute_s) = (bytes / hardware.bandwidth, flops / hardware.flops);
        let bound = if compute_s > memory_s { Bound::Compute } else { Bound::Memory };
        Work { bytes, flops, intensity: flops / bytes, memory_s, compute_s, bound }
    }

    /// Seconds, reading and computing at the same time.
    pub fn seconds(&self) -> f64 {
        self.memory_s.max(self.compute_s)
    }
}

/// One path's cost: a decode step on its slowest rank.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PathCost {
    /// The path.
    #[serde(serialize_with = "as_text")]
    pub path: Path,
    /// Elements that a token takes in one layer's cache on one rank.
    pub cache_elements_per_token_per_layer: usize,
    /// Bytes that a token takes in one layer's cache on one rank.
    pub cache_bytes_per_token_per_layer: usize,
    /// Bytes that a token takes in all layers' caches on one rank.
    pub cache_bytes_per_token: usize,
    /// FLOP a byte of attention over the cache.
    pub intensity: f64,
    /// What limits attention over the cache.
    pub bound: Bound,
    /// The step's products with weights.
    pub weights: Work,
    /// The step's attention over the cache.
    pub attention: Work,
    /// Seconds in all-reduces.
    pub all_reduce_s: f64,
    /// Seconds that all the step's bytes take to read.
    pub memory_s: f64,
    /// Seconds that all the step's arithmetic takes.
    pub compute_s: f64,
    /// Seconds of the step: each part at its own bound, one after the other.
    pub step_s: f64,
    /// The part that takes longest.
    pub slowest: Part,
    /// Tokens a second over the batch, one a sequence and step (no draft accepted).
    pub tokens_per_s: f64,
    /// Tokens a second if every draft is accepted: `s_q` a sequence and step.
    pub tokens_per_s_all_accepted: f64,
    /// Bytes of this rank's weights.
    pub weight_bytes: f64,
    /// Cached tokens (batch × context) that fit beside the weights; 0 when the weights alone do not fit.
    pub tokens_fit: u64,
    /// Sequences of the load's context that fit.
    pub batch_fits: u64,
}

impl PathCost {
    /// The load's batch × context fits beside the weights.
    pub fn fits(&self, load: &Load) -> bool {
        self.batch_fits >= load.batch as u64
    }
}

fn as_text<S: serde::Serializer>(path: &Path, to: S) -> std::result::Result<S::Ok, S::Error> {
    to.collect_str(path)
}

/// The cost of a step of `load` for `model` on `path` with `world` ranks of `hardware`.
///
/// # Errors
/// [`Error::Sharding`] where the path cannot run at this world size, [`Error::Usage`] for an empty load or hardware.
pub fn path_cost(model: &ModelConfig, hardware: &Hardware, world: usize, path: Path, load: &Load) -> Result<PathCost> {
    validate(hardware, world, load)?;
    crate::model::shard::check(model, path, world)?;
    let owned = busiest(model, path, world)?;
    let elements = Layout::of(model, &owned).elements();
    let per_layer = elements * hardware.element;
    let per_token = per_layer * model.layers;

    let tally = tally_weights(model, &owned, load.batch * load.s_q);
    let weights = Work::new(tally.read, tally.flops, hardware);
    let attention = attention_work(model, &owned, per_token, load, hardware);
    let all_reduce_s = all_reduce_seconds(model, hardware, world, load);
    let step_s = weights.seconds() + attention.seconds() + all_reduce_s;

    let room = (hardware.memory * USABLE - tally.resident).max(0.0);
    let tokens_fit = (room / per_token as f64) as u64;
    Ok(PathCost {
        path,
        cache_elements_per_token_per_layer: elements,
        cache_bytes_per_token_per_layer: per_layer,
        cache_bytes_per_token: per_token,
        intensity: attention.intensity,
        bound: attention.bound,
        weights,
        attention,
        all_reduce_s,
        memory_s: weights.memory_s + attention.memory_s,
        compute_s: weights.compute_s + attention.compute_s,
        step_s,
        slowest: slowest(weights.seconds(), attention.seconds(), all_reduce_s),
        tokens_per_s: load.batch as f64 / step_s,
        tokens_per_s_all_accepted: (load.batch * load.s_q) as f64 / step_s,
        weight_bytes: tally.resident,
        tokens_fit,
        batch_fits: tokens_fit / load.context as u64,
    })
}

fn validate(hardware: &Hardware, world: usize, load: &Load) -> Result<()> {
    for (name, value) in [("world size", world), ("batch", load.batch), ("context", load.context), ("s_q", load.s_q)] {
        if value == 0 {
            return Err(Error::Usage(format!("{name} is 0: it must be at least 1")));
        }
    }
    let figures = [
        ("bandwidth", hardware.bandwidth),
        ("arithmetic rate", hardware.flops),
        ("memory", hardware.memory),
        ("link rate", hardware.link),
    ];
    for (name, value) in figures {
        if !(value.is_finite() && value > 0.0) {
            return Err(Error::Usage(format!("the {name} of {} is {value}: it must be positive", hardware.name)));
        }
    }
    Ok(())
}

/// The rank with the most groups: on the absorb path a rank's heads may touch one group more than another's.
fn busiest(model: &ModelConfig, path: Path, world: usize) -> Result<Owned> {
    let mut busiest = Shard { rank: 0, world }.owned(model, path)?;
    for rank in 1..world {
        let owned = Shard { rank, world }.owned(model, path)?;
        if owned.groups.len() > busiest.groups.len() {
            busiest = owned;
        }
    }
    Ok(busiest)
}

/// Weights of a rank: what it holds, what a step reads of it, and the arithmetic on it.
#[derive(Default)]
struct Tally {
    resident: f64,
    read: f64,
    flops: f64,
}

impl Tally {
    /// A matrix read whole and multiplied by `rows` rows.
    fn product(&mut self, elements: usize, rows: usize) {
        self.resident += WEIGHT * elements as f64;
        self.read += WEIGHT * elements as f64;
        self.flops += 2.0 * (elements * rows) as f64;
    }
}

fn tally_weights(model: &ModelConfig, owned: &Owned, rows: usize) -> Tally {
    let mut tally = Tally::default();
    let world = owned.shard.world;
    for mlp in &model.mlp {
        tally_attention(&mut tally, model, owned, rows);
        match (mlp, &model.moe) {
            (Mlp::Dense { width }, _) => tally.product(3 * model.hidden * width.div_ceil(world), rows),
            (Mlp::Sparse, Some(moe)) => tally_experts(&mut tally, model.hidden, moe, world, rows),
            // Configurations with sparse layers and no experts are refused when they are read.
            (Mlp::Sparse, None) => {}
        }
    }
    let table = model.hidden * model.vocab.div_ceil(world);
    tally.product(table, rows);
    if !model.tie_embeddings {
        tally.resident += WEIGHT * table as f64;
    }
    // The embedding is not multiplied: a step reads one row of it a token.
    tally.read += WEIGHT * (rows * model.hidden) as f64;
    tally
}

fn tally_attention(tally: &mut Tally, model: &ModelConfig, owned: &Owned, rows: usize) {
    let (hidden, heads, groups) = (model.hidden, owned.heads.len(), owned.groups.len());
    match &model.attention {
        Attention::Grouped(a) => {
            tally.product(hidden * a.head_dim * (heads + 2 * groups), rows); // q, k, v
            tally.product(hidden * a.head_dim * heads, rows); // o
        }
        Attention::Latent(a) => {
            let query = heads * (a.nope + a.rope);
            match a.q_rank {
                Some(rank) => {
                    tally.product(rank * hidden, rows);
                    tally.product(query * rank, rows);
                }
                None => tally.product(query * hidden, rows),
            }
            tally.product((a.kv_rank + a.rope) * hidden, rows);
            tally.product(heads * a.value * hidden, rows);
            // kv_b: the GQA path expands the new tokens once a group, the absorb path multiplies every head's query
            // and output by its group's block.
            let block = (a.nope + a.value) * a.kv_rank;
            tally.product(groups * block, 0);
            let uses = if owned.path == Path::Gqa { groups } else { heads };
            tally.flops += 2.0 * (uses * block * rows) as f64;
        }
    }
}

/// A rank's share of one expert, in elements.
fn expert_elements(hidden: usize, moe: &Moe, world: usize) -> f64 {
    (3 * hidden * moe.width.div_ceil(world)) as f64
}

fn tally_experts(tally: &mut Tally, hidden: usize, moe: &Moe, world: usize, rows: usize) {
    tally.product(hidden * moe.experts, rows); // the router, on every rank
    let expert = expert_elements(hidden, moe, world);
    tally.resident += WEIGHT * expert * moe.experts as f64;
    tally.read += WEIGHT * expert * distinct_experts(moe, rows);
    tally.flops += 2.0 * expert * (rows * moe.top_k) as f64;
    tally.product(3 * hidden * moe.shared_width.div_ceil(world), rows);
}

/// Experts that at least one of `rows` tokens chooses, on average, when routing is balanced.
pub fn distinct_experts(moe: &Moe, rows: usize) -> f64 {
    let experts = moe.experts as f64;
    experts * (1.0 - (1.0 - moe.top_k as f64 / experts).powf(rows as f64))
}

/// The bytes that a rank reads less in a step of `rows` rows when all tokens choose the same experts than when routing is
/// balanced.
pub fn spared_by_same_routing(model: &ModelConfig, world: usize, rows: usize) -> f64 {
    let Some(moe) = &model.moe else { return 0.0 };
    let layers = model.mlp.iter().filter(|m| matches!(m, Mlp::Sparse)).count();
    let experts = distinct_experts(moe, rows) - moe.top_k as f64;
    WEIGHT * expert_elements(model.hidden, moe, world) * layers as f64 * experts
}

fn attention_work(model: &ModelConfig, owned: &Owned, per_token: usize, load: &Load, hardware: &Hardware) -> Work {
    // Multiply-adds of one query token of one head with one cached token: logit and output.
    let width = match (&model.attention, owned.path) {
        (Attention::Grouped(a), _) => 2 * a.head_dim,
        (Attention::Latent(a), Path::Gqa) => a.nope + a.rope + a.value,
        (Attention::Latent(a), Path::Absorb) => 2 * a.kv_rank + a.rope,
    };
    let cached = (load.batch * load.context) as f64;
    let flops = 2.0 * (load.s_q * owned.heads.len() * width * model.layers) as f64 * cached;
    Work::new(per_token as f64 * cached, flops, hardware)
}

/// Two all-reduces a layer and the embedding's, each a fixed latency and a ring's traffic.
fn all_reduce_seconds(model: &ModelConfig, hardware: &Hardware, world: usize, load: &Load) -> f64 {
    if world == 1 {
        return 0.0;
    }
    let bytes = (load.batch * load.s_q * model.hidden * hardware.element) as f64;
    let traffic = 2.0 * (world - 1) as f64 / world as f64 * bytes;
    (2 * model.layers + 1) as f64 * (hardware.latency + traffic / hardware.link)
}

fn slowest(weights: f64, attention: f64, all_reduce: f64) -> Part {
    if all_reduce > weights && all_reduce > attention {
        Part::AllReduce
    } else if attention > weights {
        Part::Attention
    } else {
        Part::Weights
    }
}
