//! From a configuration to a rank that can compute: path, sharding, memory, weights, and the ranks' agreement on them.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::backend::cpu::available_memory;
use crate::backend::{Backend, Budget};
use crate::cache::{BLOCK, Layout};
use crate::checkpoint::Checkpoint;
use crate::comm::{Communicator, agree};
use crate::config::ModelConfig;
use crate::engine::device::{Chosen, DeviceOptions, Task, choose as choose_device, least, with_device};
use crate::engine::runner::{Run, Runner};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::model::shard::{Path, Shard};
use crate::plan;

/// Told while weights are read: parts done, parts in all.
pub type LoadProgress = Arc<dyn Fn(usize, usize) + Send + Sync>;

/// Told, on rank 0, what a user should know while a model is loaded: one line each.
pub type Note = Arc<dyn Fn(&str) + Send + Sync>;

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
    /// Told which device computes where it is not the one hoped for, and what memory is taken.
    pub note: Option<Note>,
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
            note: None,
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
    let path = without_measuring(config, &model, shard.world)?;
    let device = choose_device(&config.device, &mut **c)?;
    let checkpoint = match &config.model {
        Source::Checkpoint(directory) => Checkpoint::open(directory)?,
        Source::Dummy(_, Routing::Balanced) => Checkpoint::dummy(0),
        Source::Dummy(_, Routing::Same) => Checkpoint::dummy(model.moe.as_ref().map_or(0, |moe| moe.top_k)),
    };
    agree(&mut **c, "world size", ranks as u64)?;
    agree(&mut **c, "checkpoint", checkpoint.fingerprint())?;
    agree(&mut **c, "step size", config.step_tokens as u64)?;
    if let Chosen::Cpu(Some(why)) = &device {
        config.tell(&format!("computing on the CPU: {why}"));
    }
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
    with_device(&options, &device, c, Loading { config, model, shard, path, checkpoint, max_context })
}

/// What is known of a rank before its device is.
struct Loading<'a> {
    config: &'a Config,
    model: ModelConfig,
    shard: Shard,
    /// The path and its reason, where they need no measuring.
    path: Option<(Path, String)>,
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
        let Loading { config, model, shard, path, checkpoint, max_context } = self;
        let (path, path_reason) = match path {
            Some(path) => path,
            None => measured_choice(config, backend, &model, shard.world)?,
        };
        agree(backend.comm(), "path", path as u64)?;
        let owned = shard.owned(&model, path)?;
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
        let planned = match backend.budget(&model, &owned)? {
            Some(budget) => Some(tell_plan(config, backend, &budget, blocks)?),
            None => None,
        };
        let rows = config.step_tokens;
        let began = Instant::now();
        let mut loaded = Model::load(backend, &checkpoint, &model, &owned, blocks, rows, max_context, &progress)?;
        if matches!(config.model, Source::Dummy(..)) {
            loaded.fill_caches(backend)?;
        }
        backend.loaded();
        backend.synchronize()?;
        backend.comm().barrier()?;
        if let Some(planned) = planned {
            tell_taken(config, backend, &planned, began.elapsed())?;
        }
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

/// Bytes of one rank, as planned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Planned {
    weights: usize,
    cache: usize,
    workspace: usize,
    later: usize,
}

impl Planned {
    fn total(&self) -> usize {
        self.weights + self.cache + self.workspace
    }
}

impl std::fmt::Display for Planned {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (weights, cache, workspace) = (gib(self.weights), gib(self.cache), gib(self.workspace));
        write!(f, "{weights} of weights, {cache} of cache, {workspace} of workspace: {} in all", gib(self.total()))
    }
}

fn gib(bytes: usize) -> String {
    format!("{:.2} GiB", bytes as f64 / (1u64 << 30) as f64)
}

impl Config {
    fn tell(&self, line: &str) {
        if let Some(note) = &self.note {
            note(line);
        }
    }
}

/// Says what every rank is going to take of its device's memory: one line where all ranks take the same.
fn tell_plan<B: Backend>(config: &Config, backend: &mut B, budget: &Budget, blocks: usize) -> Result<Planned> {
    let cache = backend.budget_cache(budget, blocks);
    let Budget { weights, workspace, later, .. } = *budget;
    let mine = Planned { weights, cache, workspace, later };
    let all = gather(backend.comm(), [weights, cache, workspace])?;
    let shown = |&[weights, cache, workspace]: &[usize; 3]| Planned { weights, cache, workspace, later }.to_string();
    let tokens = blocks * BLOCK;
    let lines: Vec<String> = all.iter().map(shown).collect();
    match lines.as_slice() {
        [first, rest @ ..] if rest.iter().all(|line| line == first) => {
            let each = if rest.is_empty() { "" } else { " on each rank" };
            config.tell(&format!("memory{each}: {first} (cache for {tokens} tokens)"));
        }
        _ => {
            for (rank, line) in lines.iter().enumerate() {
                config.tell(&format!("memory on rank {rank}: {line} (cache for {tokens} tokens)"));
            }
        }
    }
    Ok(mine)
}

/// Says what the ranks have taken by their drivers' count, beside the plan without what the first steps add.
fn tell_taken<B: Backend>(config: &Config, backend: &mut B, planned: &Planned, took: Duration) -> Result<()> {
    let (plan, taken) = (planned.total() - planned.later, backend.memory_taken()?);
    let all = gather(backend.comm(), [plan, taken])?;
    let off = |&[plan, taken]: &[usize; 2]| taken as f64 / plan.max(1) as f64 - 1.0;
    let Some(worst) = all.iter().max_by(|a, b| off(a).abs().total_cmp(&off(b).abs())) else { return Ok(()) };
    let (seconds, rate) = (took.as_secs_f64(), planned.weights as f64 / took.as_secs_f64() / 1e9);
    let counted = match worst[1] {
        0 => String::new(),
        taken => format!(
            "the driver counts {} now ({:+.1} % of the plan), and the first steps add {}; ",
            gib(taken),
            off(worst) * 100.0,
            gib(planned.later)
        ),
    };
    config.tell(&format!("memory: {counted}weights loaded in {seconds:.2} s, {rate:.2} GB/s a rank"));
    Ok(())
}

/// Every rank's numbers, by rank.
fn gather<const N: usize>(comm: &mut dyn Communicator, mine: [usize; N]) -> Result<Vec<[usize; N]>> {
    let bytes: Vec<u8> = mine.iter().flat_map(|n| (*n as u64).to_le_bytes()).collect();
    let mut all = vec![0; bytes.len() * comm.world()];
    comm.all_gather(&bytes, &mut all)?;
    let mut numbers = all.as_chunks::<8>().0.iter().map(|bytes| u64::from_le_bytes(*bytes) as usize);
    Ok((0..comm.world()).map(|_| std::array::from_fn(|_| numbers.next().unwrap_or(0))).collect())
}

/// The path asked for, or the only one that can run: what needs no figures. Errors name the world sizes that work.
fn without_measuring(config: &Config, model: &ModelConfig, world: usize) -> Result<Option<(Path, String)>> {
    if let Some(path) = config.path {
        crate::model::shard::check(model, path, world)?;
        return Ok(Some((path, "asked for".into())));
    }
    let any = plan::Hardware::cpu(1e12, 1e15, 1e15);
    let choice = plan::choose(model, &any, world, &load_of(config, model))?;
    Ok((choice.costs.len() == 1).then_some((choice.path, choice.reason)))
}

/// The cost model's choice from what this device was measured to do; rank 0's figures count for all ranks.
fn measured_choice<B: Backend>(
    config: &Config,
    backend: &mut B,
    model: &ModelConfig,
    world: usize,
) -> Result<(Path, String)> {
    let rates = backend.rates(model.hidden)?;
    let (measured, hardware) = match rates {
        Some(rates) => (true, plan::Hardware::measured(&backend.describe(), &rates)),
        None => {
            let ranks = backend.comm().local().1;
            let cores = std::thread::available_parallelism().map_or(1, usize::from);
            let memory = available_memory() as f64 / ranks.max(1) as f64;
            (false, plan::Hardware::cpu_share(cores, ranks, memory))
        }
    };
    let mut figures = vec![];
    for figure in [hardware.bandwidth, hardware.flops, hardware.memory, hardware.link, hardware.latency] {
        figures.extend(figure.to_le_bytes());
    }
    backend.comm().broadcast(&mut figures, Some(LOADING))?;
    let figure = |i: usize| figures.as_chunks::<8>().0.get(i).map_or(0.0, |bytes| f64::from_le_bytes(*bytes));
    let [bandwidth, flops, memory, link, latency] = std::array::from_fn(figure);
    let hardware = plan::Hardware { bandwidth, flops, memory, link, latency, ..hardware };
    let choice = plan::choose(model, &hardware, world, &load_of(config, model))?;
    let mut reason = choice.reason;
    if measured {
        let (bandwidth, flops) = (bandwidth / 1e12, flops / 1e12);
        reason.push_str(&format!("; measured here: {bandwidth:.2} TB/s, {flops:.0} TFLOP/s"));
    }
    Ok((choice.path, reason))
}

/// The step that a path is chosen for.
fn load_of(config: &Config, model: &ModelConfig) -> plan::Load {
    plan::Load { batch: config.max_sequences, context: model.max_position.min(4096), s_q: 1 }
}
