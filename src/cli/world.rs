//! What every command that runs a model shares: its flags, the ranks, the loading bar, ctrl-C.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::backend::cuda::AllReduce;
use crate::comm::Communicator;
use crate::engine::device::{Device, DeviceOptions};
use crate::engine::setup::Config;
use crate::engine::{self};
use crate::error::{Error, Result};
use crate::model::shard::Path;

/// The path to decode on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum PathChoice {
    /// The cost model's choice
    Auto,
    /// Cache the keys and values of the rank's groups
    Gqa,
    /// Cache the latent on every rank
    Absorb,
}

/// The device to compute on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum DeviceChoice {
    /// A GPU where there is one, else the CPU
    Auto,
    /// The CPU
    Cpu,
    /// A GPU, or an error
    Cuda,
}

impl From<DeviceChoice> for Device {
    fn from(choice: DeviceChoice) -> Device {
        match choice {
            DeviceChoice::Auto => Device::Auto,
            DeviceChoice::Cpu => Device::Cpu,
            DeviceChoice::Cuda => Device::Cuda,
        }
    }
}

/// How GPUs sum over the ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum AllReduceChoice {
    /// One-shot where it is faster, else NCCL
    Auto,
    /// NCCL
    Nccl,
    /// Every rank pushes to all others, where a step's rows fit
    OneShot,
}

impl From<AllReduceChoice> for AllReduce {
    fn from(choice: AllReduceChoice) -> AllReduce {
        match choice {
            AllReduceChoice::Auto => AllReduce::Auto,
            AllReduceChoice::Nccl => AllReduce::Nccl,
            AllReduceChoice::OneShot => AllReduce::OneShot,
        }
    }
}

/// Flags of every command that runs a model.
#[derive(clap::Args, Debug, Clone)]
pub struct ModelArgs {
    /// The checkpoint: a Hugging Face directory
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// The decoding path
    #[arg(long, value_enum, default_value = "auto")]
    pub path: PathChoice,
    /// The device
    #[arg(long, value_enum, default_value = "auto")]
    pub device: DeviceChoice,
    /// How ranks on GPUs sum
    #[arg(long, value_enum, default_value = "auto")]
    pub all_reduce: AllReduceChoice,
    /// Let several ranks have one GPU and sum through the host's memory: for tests and demonstrations
    #[arg(long)]
    pub share_gpus: bool,
    /// Part of a GPU's memory that weights, workspace and cache may take
    #[arg(long, value_name = "PART", default_value_t = 0.9, value_parser = part)]
    pub gpu_memory_utilization: f64,
    /// Ranks, when not started by mpirun: starts mpirun itself
    #[arg(long, value_name = "W", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub tp: Option<u32>,
    /// Threads of a CPU rank [default: the host's cores shared by its ranks]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub threads: Option<u32>,
    /// Longest context in tokens, prompt and answer together [default: the model's]
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u64).range(1..))]
    pub max_context: Option<u64>,
    /// Tokens the cache of every rank holds [default: as memory allows]
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u64).range(1..))]
    pub cache_tokens: Option<u64>,
    /// Tokens a step computes at most; longer prompts go in chunks
    #[arg(long, value_name = "TOKENS", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub step_tokens: u32,
    /// Seconds after which a rank that does not answer ends the job
    #[arg(long, value_name = "SECONDS", default_value_t = 30.0, value_parser = seconds)]
    pub watchdog: f64,
}

fn part(text: &str) -> std::result::Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value > 0.0 && value <= 1.0 => Ok(value),
        _ => Err("must be above 0 and at most 1".into()),
    }
}

/// A number of seconds on the command line.
pub fn seconds(text: &str) -> std::result::Result<f64, String> {
    let value: f64 = text.parse().map_err(|_| format!("{text:?} is not a number of seconds"))?;
    if (0.1..=86_400.0).contains(&value) { Ok(value) } else { Err("must be between 0.1 and 86400".into()) }
}

impl ModelArgs {
    /// The engine's configuration, with a bar on stderr while weights are read.
    pub fn config(&self) -> Config {
        let mut config = Config::new(&self.model);
        config.path = match self.path {
            PathChoice::Auto => None,
            PathChoice::Gqa => Some(Path::Gqa),
            PathChoice::Absorb => Some(Path::Absorb),
        };
        config.device = DeviceOptions {
            device: self.device.into(),
            all_reduce: self.all_reduce.into(),
            share_gpus: self.share_gpus,
            ..DeviceOptions::default()
        };
        config.memory_utilization = self.gpu_memory_utilization;
        config.threads = self.threads.map(|t| t as usize);
        config.max_context = self.max_context.map(|c| c as usize);
        config.cache_tokens = self.cache_tokens.map(|c| c as usize);
        config.step_tokens = self.step_tokens as usize;
        config.watchdog = Duration::from_secs_f64(self.watchdog);
        config
    }
}

/// Runs `lead` on rank 0 and the worker's loop elsewhere. Outside mpirun this is a world of one, or, with `--tp`, the
/// command started again under mpirun.
pub fn run(
    args: &ModelArgs,
    config: Config,
    lead: impl FnOnce(Config, Box<dyn Communicator>) -> Result<()>,
) -> Result<()> {
    let comm = world(args.tp)?;
    if comm.rank() == 0 {
        let mut config = config;
        config.progress = Some(loading_bar());
        config.note = Some(Arc::new(|line| eprintln!("gqla: {line}")));
        lead(config, comm)
    } else {
        engine::run_worker(config, comm)
    }
}

/// With `--tp` outside mpirun: runs the ranks under an mpirun of this process's, and ends with them. A server's way,
/// which lets it be told to end; every other command becomes mpirun, in [`world`].
pub fn supervise(args: &ModelArgs) -> Result<()> {
    #[cfg(feature = "mpi")]
    if let Some(world) = args.tp.filter(|tp| *tp > 1)
        && crate::comm::launch::launched().is_none()
    {
        std::process::exit(crate::comm::launch::supervise(world as usize)?);
    }
    let _ = args;
    Ok(())
}

/// The ranks: mpirun's, those that `--tp` starts, or this process alone.
#[cfg(feature = "mpi")]
pub fn world(tp: Option<u32>) -> Result<Box<dyn Communicator>> {
    use crate::comm::launch;
    let comm = match tp {
        Some(world) if world > 1 && launch::launched().is_none() => match launch::relaunch(world as usize)? {},
        _ => crate::comm::connect()?,
    };
    agree_on_tp(&*comm, tp)?;
    Ok(comm)
}

/// The ranks: this process alone.
#[cfg(not(feature = "mpi"))]
pub fn world(tp: Option<u32>) -> Result<Box<dyn Communicator>> {
    let comm = crate::comm::connect()?;
    agree_on_tp(&*comm, tp)?;
    Ok(comm)
}

fn agree_on_tp(comm: &dyn Communicator, tp: Option<u32>) -> Result<()> {
    match tp {
        Some(tp) if tp as usize != comm.world() => Err(Error::Usage(format!(
            "--tp {tp} and mpirun's {} ranks disagree: leave --tp out under mpirun, or start mpirun -n {tp}",
            comm.world()
        ))),
        _ => Ok(()),
    }
}

/// A bar over the parts of the weights, on a terminal only.
fn loading_bar() -> engine::setup::LoadProgress {
    let bar = bar(0, "loading");
    Arc::new(move |done, of| {
        bar.set_length(of as u64);
        bar.set_position(done as u64);
        if done == of {
            bar.finish_and_clear();
        }
    })
}

/// A progress bar on stderr; invisible when stderr is not a terminal.
pub fn bar(length: u64, what: &'static str) -> ProgressBar {
    let target =
        if std::io::stderr().is_terminal() { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
    let style = ProgressStyle::with_template("{msg} {bar:30} {pos}/{len} {eta}")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::with_draw_target(Some(length), target).with_style(style).with_message(what)
}

/// From now on ctrl-C (and SIGTERM) ends this process with one line on stderr and exit code 130.
pub fn end_on_interrupt() -> Result<()> {
    use signal_hook::consts::{SIGINT, SIGTERM};
    let mut signals =
        signal_hook::iterator::Signals::new([SIGINT, SIGTERM]).map_err(|e| Error::io("signal handler", e))?;
    let watch = move || {
        if signals.forever().next().is_some() {
            eprintln!("\ngqla: {}", Error::Interrupted);
            std::process::exit(Error::Interrupted.exit_code());
        }
    };
    let spawned = std::thread::Builder::new().name("gqla-signals".into()).spawn(watch);
    spawned.map(drop).map_err(|e| Error::io("signal handler", e))
}
