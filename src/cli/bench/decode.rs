//! `gqla bench decode`: whole decode steps through the engine's own step messages.
//!
//! What is timed is the steady state, as the engine runs it: a step's time is from when rank 0 has the tokens of the step
//! before it to when it has its own. On GPUs the step's message and launch go out meanwhile, naming the tokens of the
//! step before it by row; on CPUs broadcast, computation and the gathering of tokens follow each other. `gpu ms` is rank
//! 0's GPU's own time of a step, waits for other ranks among it: the rest is what the host adds.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::report::{self, Times};
use crate::cache::BLOCK;
use crate::cli::world::{self, ModelArgs};
use crate::comm::Communicator;
use crate::config::ModelConfig;
use crate::engine::message::{FROM, Step, StepSpan, Want};
use crate::engine::sampler::uniform;
use crate::engine::scorer::Scorer;
use crate::engine::setup::{Config, Routing, Source};
use crate::error::{Error, Result};
use crate::plan::cost::{self, PathCost};
use crate::plan::{Hardware, Load};

/// Measure whole decode steps.
// `bench scaling` takes these flags too, and two groups of one name in a command are refused.
#[derive(clap::Args, Debug, Clone)]
#[group(skip)]
pub struct Args {
    #[command(flatten)]
    pub model: ModelArgs,
    /// `dummy` needs no weights: --model may then name a shape (llama-3-8b, glm-4.7-flash-gqla, …)
    #[arg(long, value_enum, default_value = "auto")]
    pub load_format: LoadFormat,
    /// Which experts made-up weights choose: `same` sends all tokens to the same ones, as uniform dummy weights do
    #[arg(long, value_enum, default_value = "balanced")]
    pub dummy_routing: DummyRouting,
    /// Sequences in a step
    #[arg(long, value_name = "B,…", default_value = "1,8,64", value_delimiter = ',')]
    pub batch: Vec<usize>,
    /// Tokens in each sequence's cache
    #[arg(long, value_name = "L,…", default_value = "1024", value_delimiter = ',')]
    pub context: Vec<usize>,
    /// Tokens a sequence brings to a step: 2 is what a step with one draft token verifies
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=4))]
    pub s_q: u32,
    /// Steps measured
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..))]
    pub steps: u32,
    /// Measure one rank's shard of this many ranks, without the others
    #[arg(long, value_name = "W")]
    pub shard_of: Option<u32>,
    /// Write the report here
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// Where weights come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum LoadFormat {
    /// The checkpoint's; made up where --model names a shape
    Auto,
    /// Made up
    Dummy,
}

/// Which experts made-up weights choose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum DummyRouting {
    /// Every token its own: nearly all experts are read at a large batch
    Balanced,
    /// All tokens the same few
    Same,
}

/// The engine's source for `--model` and `--load-format`.
pub fn source(args: &Args) -> Result<Source> {
    let routing = match args.dummy_routing {
        DummyRouting::Balanced => Routing::Balanced,
        DummyRouting::Same => Routing::Same,
    };
    let name = args.model.model.to_string_lossy();
    if !args.model.model.is_dir()
        && let Some(shape) = crate::plan::shapes::named(&name)
    {
        return Ok(Source::Dummy(Box::new(shape), routing));
    }
    match args.load_format {
        LoadFormat::Auto => Ok(Source::Checkpoint(args.model.model.clone())),
        LoadFormat::Dummy => Ok(Source::Dummy(Box::new(ModelConfig::load(&args.model.model)?), routing)),
    }
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    let (batches, contexts) = (args.batch.clone(), args.context.clone());
    let (Some(most), Some(longest)) = (batches.iter().max(), contexts.iter().max()) else {
        return Err(Error::Usage("give at least one --batch and one --context".into()));
    };
    let mut config = args.model.config();
    config.model = source(&args)?;
    config.max_sequences = *most;
    config.step_tokens = (*most * args.s_q as usize).max(16);
    config.cache_tokens = Some(*most * longest.div_ceil(BLOCK) * BLOCK);
    config.max_context = Some(*longest);
    config.shard_of = args.shard_of.map(|w| w as usize);
    world::run(&args.model, config, |config, comm| lead(&args, &config, comm, &batches, &contexts))
}

fn lead(
    args: &Args,
    config: &Config,
    comm: Box<dyn Communicator>,
    batches: &[usize],
    contexts: &[usize],
) -> Result<()> {
    world::end_on_interrupt()?;
    let mut ranks = Scorer::start(config, comm)?;
    let measured = measure(args, config, &mut ranks, batches, contexts);
    match measured {
        Ok(report) => {
            ranks.finish()?;
            report::write(args.json.as_ref(), &report)
        }
        Err(e) => {
            ranks.abort(&e);
            Err(e)
        }
    }
}

fn measure(args: &Args, config: &Config, ranks: &mut Scorer, batches: &[usize], contexts: &[usize]) -> Result<Value> {
    let bandwidth = ranks.bandwidth()?;
    let info = ranks.info().clone();
    let world = config.shard_of.unwrap_or(info.world);
    println!(
        "{} | {} | {} path | {} of {world} ranks | copy bandwidth {:.1} GB/s",
        args.model.model.display(),
        info.device,
        info.path,
        info.world,
        bandwidth / 1e9
    );
    let bar = world::bar((batches.len() * contexts.len()) as u64, "measuring");
    let head = [
        "batch",
        "context",
        "s_q",
        "step ms (p10 – p90)",
        "gpu ms",
        "tokens/s",
        "GB/s a rank",
        "of copy",
        "all-reduce ms",
    ];
    let mut table = report::table(&head);
    let mut rows = vec![];
    for &context in contexts {
        for &batch in batches {
            let Measured { times, device, reduce } = steps(args, ranks, batch, context)?;
            let load = Load { batch, context, s_q: args.s_q as usize };
            let cost = bytes(&info.model, &info, world, &load, info.element)?;
            let mut bytes = cost.weights.bytes + cost.attention.bytes;
            if let Source::Dummy(_, Routing::Same) = &config.model {
                bytes -= cost::spared_by_same_routing(&info.model, world, batch * load.s_q);
            }
            let rate = bytes / times.median();
            let tokens = batch as f64 / times.median();
            table.add_row([
                batch.to_string(),
                context.to_string(),
                args.s_q.to_string(),
                times.text(),
                device.as_ref().map_or("–".into(), |d| format!("{:.3}", d.median() * 1e3)),
                format!("{tokens:.0}"),
                format!("{:.0}", rate / 1e9),
                format!("{:.2}", rate / bandwidth),
                reduce.map_or("in the step".into(), |seconds| format!("{:.3}", seconds * 1e3)),
            ]);
            rows.push(json!({
                "batch": batch, "context": context, "s_q": args.s_q, "step": times.json(),
                "gpu": device.map(|d| d.json()),
                "tokens_per_s": tokens, "bytes_per_step_per_rank": bytes, "bytes_per_s": rate,
                "fraction_of_copy_bandwidth": rate / bandwidth, "floor_us": bytes / bandwidth * 1e6,
                "flops_per_step_per_rank": cost.weights.flops + cost.attention.flops,
                "attention_intensity": cost.intensity, "all_reduce_us": reduce.map(|seconds| seconds * 1e6),
            }));
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    println!("{table}");
    let mut report = report::header("decode", &info.device, bandwidth, info.world);
    report["model"] = json!(args.model.model.to_string_lossy());
    report["path"] = json!(info.path.to_string());
    report["shard_of"] = json!(args.shard_of);
    report["dummy_routing"] = match &config.model {
        Source::Dummy(_, routing) => json!(format!("{routing:?}").to_lowercase()),
        Source::Checkpoint(_) => Value::Null,
    };
    report["cache_bytes_per_token"] = json!(info.cache_bytes_per_token);
    report["rows"] = json!(rows);
    Ok(report)
}

/// What a step must read: the cost model's bytes, which know nothing of the card.
fn bytes(
    model: &ModelConfig,
    info: &crate::engine::Info,
    world: usize,
    load: &Load,
    element: usize,
) -> Result<PathCost> {
    let mut hardware = Hardware::cpu(1e12, 1e15, 1e15);
    hardware.element = element;
    cost::path_cost(model, &hardware, world, info.path, load)
}

/// What a number of steps took.
struct Measured {
    times: Times,
    /// The device's own times, where it keeps them.
    device: Option<Times>,
    /// The median time in all-reduces, where the host sees it.
    reduce: Option<f64>,
}

/// Measures decode steps of `batch` sequences at `context`.
fn steps(args: &Args, ranks: &mut Scorer, batch: usize, context: usize) -> Result<Measured> {
    let (vocab, s_q) = (ranks.info().model.vocab, args.s_q as usize);
    let blocks = context.div_ceil(BLOCK);
    // Blocks in random order, as a server that has run for a while hands them out.
    let mut order: Vec<u32> = (0..(batch * blocks) as u32).collect();
    for i in (1..order.len()).rev() {
        order.swap(i, (uniform(1, i as u64) * (i + 1) as f64) as usize);
    }
    let rows = (batch * s_q) as u32;
    let step = |i: usize| {
        let span = |b: usize| StepSpan {
            slot: b as u32,
            rows: s_q as u32,
            context: context as u32,
            keep: if i == 0 { 0 } else { blocks as u32 },
            blocks: if i == 0 { order[b * blocks..(b + 1) * blocks].to_vec() } else { vec![] },
        };
        let first = |row: u32| (uniform(2, u64::from(row)) * vocab as f64) as u32;
        Step {
            want: Want::Tokens,
            spans: (0..batch).map(span).collect(),
            tokens: (0..rows).map(|row| if i == 0 { first(row) } else { FROM | row }).collect(),
            outputs: (0..rows).collect(),
            ..Step::default()
        }
    };
    let (mut times, mut device, mut reduces) = (vec![], vec![], vec![]);
    let warm = 5;
    let count = warm + args.steps as usize;
    let ahead = usize::from(ranks.overlaps());
    (0..ahead).try_for_each(|i| ranks.launch(step(i)))?;
    let mut before = Instant::now();
    for i in 0..count {
        if i + ahead < count {
            ranks.launch(step(i + ahead))?;
        }
        ranks.collect()?;
        let (now, reduce) = (Instant::now(), ranks.reduce_time());
        if i >= warm {
            times.push(now - before);
            device.extend(ranks.step_time()?);
            reduces.extend(reduce);
        }
        before = now;
    }
    let median = |times: Vec<Duration>| if times.is_empty() { None } else { Some(Times::new(&times)) };
    let reduce = median(reduces).map(|r| r.median());
    Ok(Measured { times: Times::new(&times), device: median(device), reduce })
}
