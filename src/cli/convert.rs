//! `gqla convert`: published checkpoints into GQLA ones.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use comfy_table::{CellAlignment, Table, presets};
use serde_json::json;

use super::world::{self, DeviceChoice};
use crate::backend::Backend;
use crate::backend::cpu::fair_threads;
use crate::cache::Layout;
use crate::comm::Communicator;
use crate::comm::one::OneComm;
use crate::config::{Attention, ModelConfig};
use crate::convert::{self, Choice, Grouping, Method, Options, Report, RopeMode, StoredType, Weights};
use crate::engine::device::{self, Device, DeviceOptions, Task};
use crate::error::{Error, Result};
use crate::model::shard::{Path as DecodePath, Shard};

/// How RoPE is concentrated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Rope {
    /// The pairs that matter keep RoPE, with their own frequencies
    Adaptive,
    /// As published, by --fold
    Published,
}

/// Turn a published checkpoint (Llama, DeepSeek-V2/V3, GLM-4.7-Flash) into a GQLA one.
///
/// MLA models get --groups groups of heads that share keys and values; their latent stays. Llama models get a latent of
/// --latent-rank and a shared rope key of --rope-dim. Works layer by layer from calibration text; the output appears whole
/// or not at all.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The checkpoint: a Hugging Face directory
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// The directory to make
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Groups of heads that share keys and values [default for Llama: its KV heads]
    #[arg(long, value_name = "G")]
    groups: Option<usize>,
    /// The device that runs the model (auto: the CPU, in f32; a GPU rounds to bf16); the linear algebra is the CPU's
    #[arg(long, value_enum, default_value = "auto")]
    device: DeviceChoice,
    /// Ranks that share the calibration, when not started by mpirun
    #[arg(long, value_name = "W", value_parser = clap::value_parser!(u32).range(1..=1024))]
    tp: Option<u32>,
    /// Threads of a rank [default: the host's cores shared by its ranks]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    threads: Option<u32>,
    /// Llama: elements of the latent, d_c [default: what --cache-elements leaves]
    #[arg(long, value_name = "D_C")]
    latent_rank: Option<usize>,
    /// Llama: elements of the shared rope key, d_r [default: by predicted loss]
    #[arg(long, value_name = "D_R")]
    rope_dim: Option<usize>,
    /// Llama: d_r + d_c, split by predicted loss [default: 28.125 % of the original's cache]
    #[arg(long, value_name = "N", conflicts_with = "cache_ratio")]
    cache_elements: Option<usize>,
    /// The same as a part of the original's cache
    #[arg(long, value_name = "PART", value_parser = part)]
    cache_ratio: Option<f64>,
    /// Llama: how RoPE is concentrated
    #[arg(long, value_enum, default_value = "adaptive")]
    rope: Rope,
    /// Llama, --rope published: adjacent frequencies a set
    #[arg(long, value_name = "N", default_value_t = 4)]
    fold: usize,
    /// How heads are grouped
    #[arg(long, value_enum, default_value = "neighbor")]
    grouping: Grouping,
    /// What calibration tokens count
    #[arg(long, value_enum, default_value = "uniform")]
    weights: Weights,
    /// How keys and values are shared
    #[arg(long, value_enum, default_value = "attention-aware")]
    method: Method,
    /// Rounds in which the values' path is refitted to attention's output; 0 takes less time and memory
    #[arg(long, value_name = "ROUNDS", default_value_t = 2)]
    refit: usize,
    /// Calibration: tokens as .u16 (little-endian), or text as .txt or .jsonl
    #[arg(long, value_name = "FILE")]
    calibration: PathBuf,
    /// Calibration windows
    #[arg(long, value_name = "N", default_value_t = 128)]
    samples: usize,
    /// Tokens a window
    #[arg(long, value_name = "TOKENS", default_value_t = 512)]
    length: usize,
    /// Shuffles the texts of a .jsonl
    #[arg(long, default_value_t = 42)]
    seed: u64,
    /// Measure perplexity, divergence and agreement on this, before and after
    #[arg(long, value_name = "FILE")]
    evaluate: Option<PathBuf>,
    /// Windows of it [default: all]
    #[arg(long, value_name = "N", requires = "evaluate")]
    windows: Option<usize>,
    /// The type of new weights
    #[arg(long, value_enum, default_value = "source")]
    dtype: StoredType,
    /// Largest shard in GB
    #[arg(long, value_name = "GB", default_value_t = 5.0, value_parser = gigabytes)]
    shard_size: f64,
    /// Hidden states above this many GB go to disk
    #[arg(long, value_name = "GB", default_value_t = 4.0, value_parser = gigabytes)]
    spill: f64,
    /// Keep finished layers when interrupted; go on after those that an earlier run with --resume left
    #[arg(long)]
    resume: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

fn part(text: &str) -> std::result::Result<f64, String> {
    match text.parse::<f64>() {
        Ok(x) if x > 0.0 && x <= 1.0 => Ok(x),
        _ => Err("give a part between 0 and 1, as in 0.28125".into()),
    }
}

fn gigabytes(text: &str) -> std::result::Result<f64, String> {
    match text.parse::<f64>() {
        Ok(x) if (0.0..=1e6).contains(&x) => Ok(x),
        _ => Err("give a number of GB".into()),
    }
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    let comm = world::world(args.tp)?;
    let (rank, local) = (comm.rank(), comm.local());
    let stop = end_on_interrupt(args.out.clone(), args.resume, rank)?;
    let threads = args.threads.map_or_else(|| fair_threads(local.1), |t| t as usize);
    // The linear algebra and the samples share rayon's threads; a second start in one process keeps the first's.
    let _ = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
    let options = options(&args)?;
    let bar = world::bar(0, "converting");
    let progress = |done: usize, of: usize, what: &str| {
        if rank == 0 {
            bar.set_message(what.to_string());
            bar.set_length(of as u64);
            bar.set_position(done as u64);
        }
    };
    // Each rank runs the model for its own samples: a device of its own, and no sums within a step.
    let device = DeviceOptions {
        device: match args.device {
            // In bf16, as GPUs keep activations, the figures before and after would be rounded.
            DeviceChoice::Auto | DeviceChoice::Cpu => Device::Cpu,
            DeviceChoice::Cuda => Device::Cuda,
        },
        max_rows: convert::STEP.max(options.length),
        max_sequences: convert::STEP,
        max_context: options.length,
        threads: Some(threads),
        share_gpus: true,
        ..DeviceOptions::default()
    };
    let mut alone: Box<dyn Communicator> = Box::new(OneComm::new());
    let chosen = device::choose(&device, &mut *alone)?;
    let task = Convert { options: &options, comm, stop: &stop, progress: &progress };
    let report = match device::with_device(&device, &chosen, alone, task) {
        // The signal's thread is about to end the process: what fails meanwhile is its doing.
        Err(_) if stop.load(Ordering::Relaxed) => loop {
            std::thread::park();
        },
        done => done?,
    };
    bar.finish_and_clear();
    if rank != 0 {
        return Ok(());
    }
    let (before, after) = (elements(&options.model)?, elements(&options.out)?);
    if args.json {
        let rows = |e: [Elements; 2]| -> Vec<_> {
            let row = |(i, tp): (usize, &usize)| json!({"tp": tp, "gqa_path": e[0][i], "absorb_path": e[1][i]});
            WORLDS.iter().enumerate().map(row).collect()
        };
        let report = json!({
            "out": options.out,
            "figures": report.figures,
            "elements_before": report.elements[0],
            "elements_a_rank_before": rows(before),
            "elements_a_rank": rows(after),
            "choices": report.choices,
        });
        return super::print(&format!("{report:#}"));
    }
    super::print(&as_text(&options.out, &report, before, after))
}

/// The conversion on whichever device there is.
struct Convert<'a> {
    options: &'a Options,
    comm: Box<dyn Communicator>,
    stop: &'a AtomicBool,
    progress: convert::Progress<'a>,
}

impl Task for Convert<'_> {
    type Out = Report;
    fn run<B: Backend + 'static>(self, mut backend: B) -> Result<Report> {
        convert::convert(self.options, &mut backend, self.comm, self.stop, self.progress)
    }
}

fn options(args: &Args) -> Result<Options> {
    let elements = match args.cache_ratio {
        None => args.cache_elements,
        Some(ratio) => match ModelConfig::load(&args.model)?.attention {
            Attention::Grouped(a) => Some((ratio * (2 * a.groups * a.head_dim) as f64).round() as usize),
            Attention::Latent(_) => args.cache_elements.or(Some(0)),
        },
    };
    Ok(Options {
        model: args.model.clone(),
        out: args.out.clone(),
        groups: args.groups,
        grouping: args.grouping,
        weights: args.weights,
        method: args.method,
        refit: args.refit,
        rope: match args.rope {
            Rope::Adaptive => RopeMode::Adaptive,
            Rope::Published => RopeMode::Published { fold: args.fold },
        },
        rope_dim: args.rope_dim,
        latent_rank: args.latent_rank,
        cache_elements: elements,
        calibration: args.calibration.clone(),
        samples: args.samples,
        length: args.length,
        seed: args.seed,
        evaluate: args.evaluate.clone(),
        evaluate_windows: args.windows,
        stored: args.dtype,
        shard_bytes: (args.shard_size * 1e9) as usize,
        spill: (args.spill * 1e9) as u64,
        resume: args.resume,
    })
}

/// On ctrl-C and SIGTERM the process ends at once, whatever it is at, and removes what it has begun to make (with --resume
/// it stays). mpirun leaves its ranks a second.
fn end_on_interrupt(out: PathBuf, resume: bool, rank: usize) -> Result<Arc<AtomicBool>> {
    use signal_hook::consts::{SIGINT, SIGTERM};
    let mut signals =
        signal_hook::iterator::Signals::new([SIGINT, SIGTERM]).map_err(|e| Error::io("signal handler", e))?;
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    let watch = move || {
        if signals.forever().next().is_some() {
            stopped.store(true, Ordering::Relaxed);
            if rank == 0 {
                if !resume {
                    convert::discard(&out);
                }
                eprintln!("\ngqla: {}: {}", Error::Interrupted, convert::left(&out, resume));
            }
            std::process::exit(Error::Interrupted.exit_code());
        }
    };
    let spawned = std::thread::Builder::new().name("gqla-signals".into()).spawn(watch);
    spawned.map_err(|e| Error::io("signal handler", e))?;
    Ok(stop)
}

/// Elements a token, layer and rank at W = 1, 2, 4, 8; `None` where W does not divide, or the model lacks the path.
type Elements = [Option<usize>; 4];

const WORLDS: [usize; 4] = [1, 2, 4, 8];

/// The elements on the GQA and on the absorb path, from the layouts that the caches are made with.
fn elements(model: &Path) -> Result<[Elements; 2]> {
    let config = ModelConfig::load(model)?;
    let on = |path: DecodePath| {
        WORLDS.map(|world| {
            let owned = Shard { rank: 0, world }.owned(&config, path).ok()?;
            Some(Layout::of(&config, &owned).elements())
        })
    };
    Ok([on(DecodePath::Gqa), on(DecodePath::Absorb)])
}

fn as_text(out: &Path, report: &Report, before: [Elements; 2], after: [Elements; 2]) -> String {
    let mut text = format!("wrote {}\n", out.display());
    if let Some(f) = &report.figures {
        text.push_str(&format!(
            "over {} windows of {} tokens: perplexity {:.4} before, {:.4} after; KL {:.5} nats; top-1 agreement {:.4}\n",
            f.windows, f.length, f.perplexity_before, f.perplexity_after, f.kl, f.top1
        ));
    }
    let mut table = Table::new();
    table.load_preset(presets::UTF8_HORIZONTAL_ONLY);
    table.set_header(["elements a token, layer and rank", "W=1", "W=2", "W=4", "W=8"]);
    let rows = [("before, GQA path", before[0]), ("before, absorb path", before[1]), ("GQA path", after[0])];
    for (label, cells) in rows.into_iter().chain([("absorb path", after[1])]) {
        if cells.iter().any(Option::is_some) {
            let cells = cells.map(|n| n.map_or("–".to_string(), |n| n.to_string()));
            table.add_row(std::iter::once(label.to_string()).chain(cells));
        }
    }
    right(&mut table);
    text.push_str(&format!("what each rank caches of a token, and reads of it in every decode step:\n{table}"));
    if !report.choices.is_empty() {
        text.push_str(&format!(
            "\nsplits of the cache and the same figures, best first:\n{}",
            choices(&report.choices)
        ));
    }
    text
}

fn choices(choices: &[Choice]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_HORIZONTAL_ONLY);
    table.set_header(["--rope-dim", "--latent-rank", "predicted loss", "GQA path at W=1", "2", "4", "8", "absorb"]);
    for c in choices {
        let mut row = vec![c.rope.to_string(), c.latent.to_string(), format!("{:.4}", c.predicted)];
        row.extend(c.grouped.iter().map(|n| if *n == 0 { "–".into() } else { n.to_string() }));
        row.push(c.absorb.to_string());
        table.add_row(row);
    }
    right(&mut table);
    table
}

fn right(table: &mut Table) {
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
}
