//! From a configuration to a rank that can compute: path, sharding, memory, weights, and the ranks' agreement on them.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::backend::Backend;
use crate::backend::cpu::{CpuBackend, fair_threads};
use crate::cache::{BLOCK, Layout};
use crate::checkpoint::Checkpoint;
use crate::comm::{Communicator, agree};
use crate::config::ModelConfig;
use crate::engine::runner::{Run, Runner};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::model::shard::{Path, Shard};
use crate::plan;

/// Told while weights are read: parts done, parts in all.
pub type LoadProgress = Arc<dyn Fn(usize, usize) + Send + Sync>;

/// Ranks may read their weights at very different speeds: how long they wait for each other before the first step.
const LOADING: Duration = Duration::from_secs(3600);

/// How to start an engine. The same on every rank.
#[derive(Clone)]
pub struct Config {
    /// The checkpoint's directory.
    pub model: PathBuf,
    /// The path, or `None` for the cost model's choice.
    pub path: Option<Path>,
    /// Sequences running at once.
    pub max_sequences: usize,
    /// Requests waiting beside those.
    pub max_waiting: usize,
    /// Tokens a step, prompts' chunks included.
    pub step_tokens: usize,
    /// Whether sequences share the cache of a common prefix.
    pub share_prefixes: bool,
    /// Longest context; `None` takes the model's, as far as the cache goes.
    pub max_context: Option<usize>,
    /// Tokens the cache holds on every rank; `None` takes what memory allows, up to every sequence at full context.
    pub cache_tokens: Option<usize>,
    /// Threads of a CPU rank; `None` shares the host's cores among its ranks.
    pub threads: Option<usize>,
    /// A rank silent for this long in a step ends the job.
    pub watchdog: Duration,
    /// Told while weights are read.
    pub progress: Option<LoadProgress>,
}

impl Config {
    /// Defaults for a checkpoint.
    pub fn new(model: impl Into<PathBuf>) -> Config {
        Config {
            model: model.into(),
            path: None,
            max_sequences: 64,
            max_waiting: 256,
            step_tokens: 512,
            share_prefixes: true,
            max_context: None,
            cache_tokens: None,
            threads: None,
            watchdog: Duration::from_secs(30),
            progress: None,
        }
    }
}

/// What was loaded.
#[derive(Debug, Clone)]
pub struct Info {
    /// The model.
    pub model: ModelConfig,
    /// The decoding path.
    pub path: Path,
    /// Why this path.
    pub path_reason: String,
    /// World size.
    pub world: usize,
    /// What a rank caches.
    pub layout: Layout,
    /// Cache blocks on every rank.
    pub blocks: usize,
    /// Bytes of cache a token takes on each rank, counted from the allocation, all layers.
    pub cache_bytes_per_token: usize,
    /// Tokens a step.
    pub step_tokens: usize,
    /// Longest context, prompt and generation together.
    pub max_context: usize,
    /// The device, in words.
    pub device: String,
}

/// Loads a rank. `comm` is taken once the backend owns it; on an error before that it is still there to abort with.
pub fn load(config: &Config, comm: &mut Option<Box<dyn Communicator>>) -> Result<(Box<dyn Run>, Info)> {
    let Some(c) = comm.as_mut() else {
        return Err(Error::Internal("a rank is loaded once".into()));
    };
    c.set_watchdog(LOADING);
    let shard = Shard { rank: c.rank(), world: c.world() };
    let model = ModelConfig::load(&config.model)?;
    let (path, path_reason) = choose(config, &model, shard.world, c.local().1)?;
    let owned = shard.owned(&model, path)?;
    let layout = Layout::of(&model, &owned);
    let (on_host, max_context, blocks) = {
        let local = c.local().1;
        let wanted_context = config.max_context.unwrap_or(model.max_position).min(model.max_position);
        let blocks = cache_blocks(config, &model, layout, wanted_context, local);
        (local, wanted_context.min(blocks * BLOCK), blocks)
    };
    let checkpoint = Checkpoint::open(&config.model)?;
    agree(&mut **c, "world size", shard.world as u64)?;
    agree(&mut **c, "checkpoint", checkpoint.fingerprint())?;
    agree(&mut **c, "path", path as u64)?;
    agree(&mut **c, "step size", config.step_tokens as u64)?;
    // The smallest cache decides: rank 0 hands out the same blocks everywhere.
    let mut all = vec![0; 8 * shard.world];
    c.all_gather(&(blocks as u64).to_le_bytes(), &mut all)?;
    let least = all.chunks_exact(8).map(|b| u64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]])).min();
    let blocks = least.map_or(blocks, |b| b as usize);
    let max_context = max_context.min(blocks * BLOCK);

    let threads = config.threads.unwrap_or_else(|| fair_threads(on_host));
    let Some(c) = comm.take() else {
        return Err(Error::Internal("a rank is loaded once".into()));
    };
    let mut backend = CpuBackend::new(c, threads)?;
    let progress = |done: usize, of: usize| {
        if let Some(p) = &config.progress {
            p(done, of);
        }
    };
    let rows = config.step_tokens;
    let loaded = Model::load(&backend, &checkpoint, &model, &owned, blocks, rows, max_context, &progress);
    let loaded = match loaded {
        Ok(loaded) => loaded,
        Err(e) => {
            // The caller can no longer reach the communicator, so the other ranks are told here.
            backend.comm().abort(e.exit_code(), &e.to_string());
            return Err(e);
        }
    };
    backend.comm().barrier()?;
    backend.comm().set_watchdog(config.watchdog);
    let cache_bytes_per_token = loaded.cache_bytes(&backend) / (blocks * BLOCK).max(1);
    let info = Info {
        path,
        path_reason,
        world: shard.world,
        layout,
        blocks,
        cache_bytes_per_token,
        step_tokens: config.step_tokens,
        max_context,
        device: format!("CPU, {threads} thread{} a rank", if threads == 1 { "" } else { "s" }),
        model,
    };
    Ok((Box::new(Runner::new(backend, loaded)), info))
}

/// The path asked for, checked against the world size, or the cost model's.
fn choose(config: &Config, model: &ModelConfig, world: usize, on_host: usize) -> Result<(Path, String)> {
    if let Some(path) = config.path {
        crate::model::shard::check(model, path, world)?;
        return Ok((path, "asked for".into()));
    }
    let load = plan::Load { batch: 1, context: model.max_position.min(4096), s_q: 1 };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let hardware = plan::Hardware::cpu_share(cores, on_host, available_memory() as f64 / on_host.max(1) as f64);
    let choice = plan::choose(model, &hardware, world, &load)?;
    Ok((choice.path, choice.reason))
}

/// Blocks of a CPU rank: every sequence at full context, within a quarter of the host's free memory shared by its ranks.
fn cache_blocks(config: &Config, model: &ModelConfig, layout: Layout, context: usize, on_host: usize) -> usize {
    if let Some(tokens) = config.cache_tokens {
        return tokens.div_ceil(BLOCK).max(1);
    }
    let block_bytes = layout.elements() * 4 * BLOCK * model.layers;
    let fits = available_memory() / 4 / on_host.max(1) / block_bytes.max(1);
    (context.div_ceil(BLOCK) * config.max_sequences).min(fits).max(1)
}

/// Bytes the operating system would give without swapping.
fn available_memory() -> usize {
    let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = info.lines().find_map(|l| l.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|l| l.trim().trim_end_matches("kB").trim().parse::<usize>().ok());
    kib.map_or(4 << 30, |kib| kib * 1024)
}
