//! From a configuration to a rank that can compute: path, sharding, memory, weights, and the ranks' agreement on them.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::backend::Backend;
use crate::backend::cpu::{CpuBackend, fair_threads};
use crate::backend::cuda::{self, AllReduce, CudaBackend, CudaOptions};
use crate::cache::{BLOCK, Layout};
use crate::checkpoint::Checkpoint;
use crate::comm::{Communicator, agree};
use crate::config::ModelConfig;
use crate::engine::runner::{Run, Runner};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::model::shard::{Owned, Path, Shard};
use crate::plan;

/// Told while weights are read: parts done, parts in all.
pub type LoadProgress = Arc<dyn Fn(usize, usize) + Send + Sync>;

/// Ranks may read their weights at very different speeds: how long they wait for each other before the first step.
const LOADING: Duration = Duration::from_secs(3600);

/// How to start an engine. The same on every rank.
#[derive(Clone)]
pub struct Config {
    /// Where the model comes from.
    pub model: Source,
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
    /// What computes.
    pub device: Device,
    /// The part of a GPU's memory that may be used, 0 to 1.
    pub gpu_memory_utilization: f64,
    /// Several ranks may share a GPU, summing through host memory.
    pub share_gpus: bool,
    /// How GPUs sum over the ranks.
    pub all_reduce: AllReduce,
}

/// What computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Device {
    /// GPUs where every rank has one, else the CPUs.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// A GPU, or an error.
    Cuda,
}

/// Where a model comes from.
#[derive(Debug, Clone)]
pub enum Source {
    /// A checkpoint's directory.
    Checkpoint(PathBuf),
    /// Made-up weights of a given shape, for benchmarks.
    Dummy(Box<ModelConfig>),
}

impl Config {
    /// Defaults for a checkpoint.
    pub fn new(model: impl Into<PathBuf>) -> Config {
        Config {
            model: Source::Checkpoint(model.into()),
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
            device: Device::Auto,
            gpu_memory_utilization: 0.9,
            share_gpus: false,
            all_reduce: AllReduce::Auto,
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
    let model = match &config.model {
        Source::Checkpoint(directory) => ModelConfig::load(directory)?,
        Source::Dummy(model) => (**model).clone(),
    };
    let (path, path_reason) = choose(config, &model, shard.world, c.local().1)?;
    let owned = shard.owned(&model, path)?;
    let layout = Layout::of(&model, &owned);
    let (on_host, max_context, blocks) = {
        let local = c.local().1;
        let wanted_context = config.max_context.unwrap_or(model.max_position).min(model.max_position);
        let blocks = cache_blocks(config, &model, layout, wanted_context, local);
        (local, wanted_context.min(blocks * BLOCK), blocks)
    };
    let checkpoint = match &config.model {
        Source::Checkpoint(directory) => Checkpoint::open(directory)?,
        Source::Dummy(_) => Checkpoint::dummy(),
    };
    agree(&mut **c, "world size", shard.world as u64)?;
    agree(&mut **c, "checkpoint", checkpoint.fingerprint())?;
    agree(&mut **c, "path", path as u64)?;
    agree(&mut **c, "step size", config.step_tokens as u64)?;
    let Some(c) = comm.take() else {
        return Err(Error::Internal("a rank is loaded once".into()));
    };
    let ready = Ready { config, model, checkpoint, owned, path_reason, context: wanted_context };
    if gpus.is_empty() {
        let threads = config.threads.unwrap_or_else(|| fair_threads(on_host));
        let blocks =
            cache_blocks(config, &ready.model, Layout::of(&ready.model, &ready.owned), wanted_context, on_host);
        let device = format!("CPU, {threads} thread{} a rank", if threads == 1 { "" } else { "s" });
        return ready.load(CpuBackend::new(c, threads)?, blocks, device);
    }
    let options = CudaOptions {
        max_rows: config.step_tokens,
        max_sequences: config.max_sequences,
        max_context: wanted_context,
        share_gpus: config.share_gpus,
        all_reduce: config.all_reduce,
        watchdog: config.watchdog,
        ..CudaOptions::default()
    };
    let wanted = match config.cache_tokens {
        Some(tokens) => tokens.div_ceil(BLOCK).max(1),
        None => wanted_context.div_ceil(BLOCK) * config.max_sequences,
    };
    let budget = cuda::predict(&ready.model, &ready.owned, &options);
    let mut backend = CudaBackend::new(c, options)?;
    let device = backend.describe();
    match budget.blocks(backend.gpu(), config.gpu_memory_utilization, wanted) {
        Ok(blocks) => ready.load(backend, blocks, device),
        Err(e) => {
            backend.comm().abort(e.exit_code(), &e.to_string());
            Err(e)
        }
    }
}

/// A rank that knows what to load.
struct Ready<'a> {
    config: &'a Config,
    model: ModelConfig,
    checkpoint: Checkpoint,
    owned: Owned,
    path_reason: String,
    /// Longest context wanted.
    context: usize,
}

impl Ready<'_> {
    /// Loads the model on `backend`, which has room for `blocks` cache blocks.
    fn load<B: Backend + 'static>(self, mut backend: B, blocks: usize, device: String) -> Result<(Box<dyn Run>, Info)> {
        let result = self.load_on(&mut backend, blocks);
        let (loaded, blocks, max_context) = match result {
            Ok(loaded) => loaded,
            Err(e) => {
                // The caller can no longer reach the communicator, so the other ranks are told here.
                backend.comm().abort(e.exit_code(), &e.to_string());
                return Err(e);
            }
        };
        let info = Info {
            path: self.owned.path,
            path_reason: self.path_reason,
            world: self.owned.shard.world,
            layout: loaded.layout,
            blocks,
            cache_bytes_per_token: loaded.cache_bytes(&backend) / (blocks * BLOCK).max(1),
            step_tokens: self.config.step_tokens,
            max_context,
            device,
            model: self.model,
        };
        Ok((Box::new(Runner::new(backend, loaded)), info))
    }

    fn load_on<B: Backend>(&self, backend: &mut B, blocks: usize) -> Result<(Model<B>, usize, usize)> {
        let blocks = least(backend.comm(), blocks)?;
        let max_context = self.context.min(blocks * BLOCK);
        let progress = |done: usize, of: usize| {
            if let Some(p) = &self.config.progress {
                p(done, of);
            }
        };
        let (model, rows) = (&self.model, self.config.step_tokens);
        let loaded = Model::load(backend, &self.checkpoint, model, &self.owned, blocks, rows, max_context, &progress)?;
        backend.loaded();
        backend.comm().barrier()?;
        backend.comm().set_watchdog(self.config.watchdog);
        Ok((loaded, blocks, max_context))
    }
}

/// The smallest cache decides: rank 0 hands out the same blocks everywhere.
fn least(comm: &mut dyn Communicator, blocks: usize) -> Result<usize> {
    let mut all = vec![0; 8 * comm.world()];
    comm.all_gather(&(blocks as u64).to_le_bytes(), &mut all)?;
    let least = all.chunks_exact(8).map(|b| u64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]])).min();
    Ok(least.map_or(blocks, |b| b as usize))
}

/// The GPUs of this rank's host, or none where the CPU computes. Every rank decides alike.
fn gpus(config: &Config, comm: &mut dyn Communicator) -> Result<Vec<cuda::GpuInfo>> {
    if config.device == Device::Cpu {
        return Ok(vec![]);
    }
    let found = cuda::available();
    if config.device == Device::Cuda {
        return found;
    }
    let (local, _) = comm.local();
    let mine = match &found {
        Ok(gpus) => config.share_gpus || local < gpus.len(),
        Err(_) => false,
    };
    if least(comm, usize::from(mine))? == 1 {
        return found;
    }
    if let (Ok(_), true) | (Err(_), true) = (&found, comm.rank() == 0) {
        let why = found.err().map_or_else(|| "some rank has no GPU of its own".into(), |e| e.to_string());
        tracing::info!("computing on the CPU: {why}");
    }
    Ok(vec![])
}

/// The path asked for, checked against the world size, or the cost model's.
fn choose(
    config: &Config,
    model: &ModelConfig,
    world: usize,
    on_host: usize,
    gpu: Option<&cuda::GpuInfo>,
) -> Result<(Path, String)> {
    if let Some(path) = config.path {
        crate::model::shard::check(model, path, world)?;
        return Ok((path, "asked for".into()));
    }
    let load = plan::Load { batch: 1, context: model.max_position.min(4096), s_q: 1 };
    let hardware = match gpu {
        Some(gpu) => {
            // "NVIDIA H200" is h200; a card the table does not have is reckoned as an H100 would be.
            let known = plan::Hardware::names().find(|n| gpu.name.to_ascii_lowercase().split(' ').any(|w| w == *n));
            plan::Hardware::named(known.unwrap_or("h100"))
                .ok_or_else(|| Error::Internal("the table of cards has no h100".into()))?
        }
        None => {
            let cores = std::thread::available_parallelism().map_or(1, usize::from);
            plan::Hardware::cpu_share(cores, on_host, available_memory() as f64 / on_host.max(1) as f64)
        }
    };
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
