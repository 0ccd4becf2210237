//! From a configuration to a rank that can compute: path, sharding, memory, weights, and the ranks' agreement on them.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::backend::Backend;
use crate::backend::cpu::available_memory;
use crate::backend::cuda::GpuInfo;
use crate::cache::{BLOCK, Layout};
use crate::checkpoint::Checkpoint;
use crate::comm::{Communicator, agree};
use crate::config::ModelConfig;
use crate::engine::device::{DeviceOptions, Task, choose as choose_device, least, with_device};
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
    /// The device, and how ranks sum. Its sizes are set from what is below.
    pub device: DeviceOptions,
    /// Part of the device's memory that may be used: of a GPU's, or of what a CPU host has free.
    pub memory_utilization: f64,
    /// For benchmarks: load one rank's shard of this many ranks, without the others.
    pub shard_of: Option<usize>,
    /// Tokens the cache holds on every rank; `None` takes what memory allows, up to every sequence at full context.
    pub cache_tokens: Option<usize>,
    /// Threads of a CPU rank; `None` shares the host's cores among its ranks.
    pub threads: Option<usize>,
    /// A rank silent for this long in a step ends the job.
    pub watchdog: Duration,
    /// Told while weights are read.
    pub progress: Option<LoadProgress>,
}

/// Where a model comes from.
#[derive(Debug, Clone)]
pub enum Source {
    /// A checkpoint's directory.
    Checkpoint(PathBuf),
    /// Made-up weights and cache of a given shape, for benchmarks.
    Dummy(Box<ModelConfig>, Routing),
}

/// Which experts made-up routers choose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Routing {
    /// Every token its own.
    Balanced,
    /// All tokens the same ones.
    Same,
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
            device: DeviceOptions::default(),
            memory_utilization: 0.9,
            shard_of: None,
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
    /// Bytes of a cached element.
    pub element: usize,
    /// Tokens a step.
    pub step_tokens: usize,
    /// Longest context, prompt and generation together.
    pub max_context: usize,
    /// The device, in words.
    pub device: String,
}

/// Loads a rank. `comm` is taken once the device owns it; on an error before that it is still there to abort with.
pub fn load(config: &Config, comm: &mut Option<Box<dyn Communicator>>) -> Result<(Box<dyn Run>, Info)> {
    let Some(c) = comm.as_mut() else {
        return Err(Error::Internal("a rank is loaded once".into()));
    };
    // Ranks may read their weights at very different speeds.
    c.set_watchdog(LOADING);
    let (rank, ranks) = (c.rank(), c.world());
    let shard = Shard { rank, world: config.shard_of.unwrap_or(ranks) };
    let model = match &config.model {
        Source::Checkpoint(directory) => ModelConfig::load(directory)?,
        Source::Dummy(model, _) => (**model).clone(),
    };
    let device = choose_device(&config.device, &mut **c)?;
    let (path, path_reason) = choose(config, &model, shard.world, c.local().1, device.gpu())?;
    let owned = shard.owned(&model, path)?;
    let checkpoint = match &config.model {
        Source::Checkpoint(directory) => Checkpoint::open(directory)?,
        Source::Dummy(_, Routing::Balanced) => Checkpoint::dummy(0),
        Source::Dummy(_, Routing::Same) => Checkpoint::dummy(model.moe.as_ref().map_or(0, |moe| moe.top_k)),
    };
    agree(&mut **c, "world size", ranks as u64)?;
    agree(&mut **c, "checkpoint", checkpoint.fingerprint())?;
    agree(&mut **c, "path", path as u64)?;
    agree(&mut **c, "step size", config.step_tokens as u64)?;
    let max_context = config.max_context.unwrap_or(model.max_position).min(model.max_position);
    let options = DeviceOptions {
        max_rows: config.step_tokens,
        max_sequences: config.max_sequences,
        max_context,
        hidden: model.hidden,
        threads: config.threads,
        watchdog: config.watchdog,
        ..config.device.clone()
    };
    let Some(c) = comm.take() else {
        return Err(Error::Internal("a rank is loaded once".into()));
    };
    with_device(&options, &device, c, Loading { config, model, path_reason, owned, checkpoint, max_context })
}

/// What is known of a rank before its device is.
struct Loading<'a> {
    config: &'a Config,
    model: ModelConfig,
    path_reason: String,
    owned: Owned,
    checkpoint: Checkpoint,
    max_context: usize,
}

impl Task for Loading<'_> {
    type Out = (Box<dyn Run>, Info);

    fn run<B: Backend + 'static>(self, mut backend: B) -> Result<Self::Out> {
        match self.weights(&mut backend) {
            Ok((model, info)) => Ok((Box::new(Runner::new(backend, model)), info)),
            Err(e) => {
                // The caller can no longer reach the communicator, so the other ranks are told here.
                if backend.comm().world() > 1 {
                    backend.comm().abort(e.exit_code(), &e.to_string());
                }
                Err(e)
            }
        }
    }
}

impl Loading<'_> {
    fn weights<B: Backend>(self, backend: &mut B) -> Result<(Model<B>, Info)> {
        let Loading { config, model, path_reason, owned, checkpoint, max_context } = self;
        let wanted = match config.cache_tokens {
            Some(tokens) => tokens.div_ceil(BLOCK).max(1),
            None => max_context.div_ceil(BLOCK) * config.max_sequences,
        };
        let fits = backend.fitting_blocks(&model, &owned, wanted, config.memory_utilization)?;
        if config.cache_tokens.is_some() && fits < wanted {
            let (asked, room) = (wanted * BLOCK, fits * BLOCK);
            return Err(Error::Memory(format!("--cache-tokens {asked} do not fit: there is room for {room} tokens")));
        }
        let blocks = least(backend.comm(), fits)?;
        let max_context = max_context.min(blocks * BLOCK);
        let progress = |done: usize, of: usize| {
            if let Some(p) = &config.progress {
                p(done, of);
            }
        };
        let rows = config.step_tokens;
        let mut loaded = Model::load(backend, &checkpoint, &model, &owned, blocks, rows, max_context, &progress)?;
        if matches!(config.model, Source::Dummy(..)) {
            loaded.fill_caches(backend)?;
        }
        backend.loaded();
        backend.comm().barrier()?;
        backend.comm().set_watchdog(config.watchdog);
        let info = Info {
            path: owned.path,
            path_reason,
            world: backend.comm().world(),
            layout: Layout::of(&model, &owned),
            blocks,
            cache_bytes_per_token: loaded.cache_bytes(backend) / (blocks * BLOCK).max(1),
            element: backend.cache_element(),
            step_tokens: config.step_tokens,
            max_context,
            device: backend.describe(),
            model,
        };
        Ok((loaded, info))
    }
}

/// The path asked for, checked against the world size, or the cost model's.
fn choose(
    config: &Config,
    model: &ModelConfig,
    world: usize,
    on_host: usize,
    gpu: Option<&GpuInfo>,
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
