//! `gqla plan`: the cost model as a table or JSON.

use std::path::Path;

use comfy_table::{CellAlignment, Table, TableComponent, presets};
use serde_json::{Value, json};

use crate::backend::{Backend, cuda};
use crate::config::ModelConfig;
use crate::engine::device::{self, Device, DeviceOptions, Task};
use crate::error::{Error, Result};
use crate::plan::{self, Bound, Choice, Hardware, Load, PathCost, cost::Part, shapes};

/// The flags.
#[derive(clap::Args)]
pub struct Args {
    /// A checkpoint directory (only its config.json is read), or a name: llama-3-8b, llama-3-8b-gqla,
    /// deepseek-v2-lite, deepseek-v3, deepseek-v3-gqla, glm-4.7-flash, glm-4.7-flash-gqla
    #[arg(long, value_name = "DIR|NAME")]
    model: String,
    /// h100, h200, h20, a100-80gb, l40s, b200, cpu, or measured (this machine's GPUs)
    #[arg(long, default_value = "h100")]
    hardware: String,
    /// Memory bandwidth in TB/s, instead of the card's
    #[arg(long, value_name = "TB/s", value_parser = positive)]
    bandwidth: Option<f64>,
    /// Dense bf16 arithmetic in TFLOP/s, instead of the card's
    #[arg(long, value_name = "TFLOP/s", value_parser = positive)]
    flops: Option<f64>,
    /// Memory in GB, instead of the card's
    #[arg(long, value_name = "GB", value_parser = positive)]
    memory: Option<f64>,
    /// Link to the other ranks in GB/s in one direction, instead of the card's
    #[arg(long, value_name = "GB/s", value_parser = positive)]
    link: Option<f64>,
    /// Ranks, W
    #[arg(long, value_name = "W", default_value_t = 1)]
    tp: usize,
    /// Sequences in the batch
    #[arg(long, default_value_t = 32)]
    batch: usize,
    /// Cached tokens a sequence
    #[arg(long, default_value_t = 8192)]
    context: usize,
    /// Tokens a sequence brings to a step: 2 with one draft token
    #[arg(long, value_name = "N", default_value_t = 1)]
    s_q: usize,
    /// JSON instead of a table
    #[arg(long)]
    json: bool,
}

/// Prints what a step costs on each path and which path to take.
pub fn run(args: Args) -> Result<()> {
    let model = model(&args.model)?;
    let Some(hardware) = hardware(&args.hardware, args.tp, model.hidden)? else { return Ok(()) };
    let hardware = hardware.overridden(
        args.bandwidth.map(|x| x * 1e12),
        args.flops.map(|x| x * 1e12),
        args.memory.map(|x| x * 1e9),
        args.link.map(|x| x * 1e9),
    );
    let load = Load { batch: args.batch, context: args.context, s_q: args.s_q };
    let choice = plan::choose(&model, &hardware, args.tp, &load)?;
    if args.json {
        let report = as_json(&args.model, &model, &hardware, args.tp, &load, &choice);
        return super::print(&format!("{report:#}"));
    }
    super::print(&as_text(&args.model, &model, &hardware, args.tp, &load, &choice))
}

fn positive(text: &str) -> std::result::Result<f64, String> {
    match text.parse::<f64>() {
        Ok(x) if x.is_finite() && x > 0.0 => Ok(x),
        _ => Err("give a positive number".to_string()),
    }
}

fn model(name: &str) -> Result<ModelConfig> {
    if Path::new(name).is_dir() {
        return ModelConfig::load(Path::new(name));
    }
    shapes::named(name).ok_or_else(|| {
        let names = shapes::NAMES.join(", ");
        Error::Usage(format!("--model {name}: neither a directory nor one of the known models ({names})"))
    })
}

/// The card called `name`. `None` on the ranks that only help to measure.
fn hardware(name: &str, ranks: usize, hidden: usize) -> Result<Option<Hardware>> {
    match name {
        "measured" => measured(ranks, hidden),
        "cpu" => {
            let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
            Ok(Some(Hardware::cpu_share(cores, ranks, host_memory())))
        }
        _ => Hardware::named(name).map(Some).ok_or_else(|| {
            let names = Hardware::names().collect::<Vec<_>>().join(", ");
            Error::Usage(format!("--hardware {name} is unknown: use {names}, cpu or measured"))
        }),
    }
}

/// This machine's GPUs, measured: as many ranks as there are GPUs for, started by mpirun.
fn measured(ranks: usize, hidden: usize) -> Result<Option<Hardware>> {
    let gpus = cuda::usable(false).map_err(|e| {
        let remedy = "name a card instead, or give --bandwidth, --flops, --memory and --link";
        Error::Device(format!("--hardware measured needs a GPU: {e}; {remedy}"))
    })?;
    let ranks = ranks.clamp(1, gpus.len());
    let mut comm = super::world::world((ranks > 1).then_some(ranks as u32))?;
    let rank = comm.rank();
    let options = DeviceOptions { device: Device::Cuda, hidden, ..DeviceOptions::default() };
    let device = device::choose(&options, &mut *comm)?;
    let hardware = device::with_device(&options, &device, comm, Measure { hidden })?;
    Ok(hardware.filter(|_| rank == 0))
}

struct Measure {
    hidden: usize,
}

impl Task for Measure {
    type Out = Option<Hardware>;

    fn run<B: Backend + 'static>(self, mut b: B) -> Result<Option<Hardware>> {
        let rates = b.rates(self.hidden)?;
        let ranks = b.comm().world();
        let name = if ranks > 1 { format!("{ranks} × {}", b.describe()) } else { b.describe() };
        b.into_comm().finish()?;
        Ok(rates.map(|rates| Hardware::measured(&name, &rates)))
    }
}

/// The host's memory in bytes; 16 GB where it does not say.
fn host_memory() -> f64 {
    let kib = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        text.lines().find_map(|l| l.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB")?.trim().parse::<f64>().ok())
    });
    kib.map_or(16e9, |kib| kib * 1024.0)
}

fn as_json(name: &str, model: &ModelConfig, hardware: &Hardware, world: usize, load: &Load, choice: &Choice) -> Value {
    let mut paths = serde_json::Map::new();
    for cost in &choice.costs {
        paths.insert(cost.path.to_string(), json!(cost));
    }
    let refused: serde_json::Map<String, Value> =
        choice.refused.iter().map(|(path, why)| (path.to_string(), json!(why))).collect();
    json!({
        "model": name,
        "architecture": model.architecture,
        "hardware": {
            "name": hardware.name,
            "bandwidth_bytes_per_s": hardware.bandwidth,
            "flops_per_s": hardware.flops,
            "memory_bytes": hardware.memory,
            "link_bytes_per_s": hardware.link,
            "all_reduce_latency_s": hardware.latency,
            "element_bytes": hardware.element,
            "ridge": hardware.ridge(),
            "source": hardware.source,
        },
        "tp": world,
        "load": load,
        "paths": paths,
        "refused": refused,
        "choice": choice.path.to_string(),
        "reason": choice.reason,
    })
}

fn as_text(name: &str, model: &ModelConfig, hardware: &Hardware, world: usize, load: &Load, choice: &Choice) -> String {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_HORIZONTAL_ONLY);
    table.remove_style(TableComponent::HorizontalLines).remove_style(TableComponent::MiddleIntersections);
    let mut header = vec!["a decode step, one rank".to_string()];
    header.extend(
        choice.costs.iter().map(|c| if c.path == choice.path { format!("{} ←", c.path) } else { c.path.to_string() }),
    );
    table.set_header(header);
    for (label, show) in ROWS {
        let mut row = vec![label.to_string()];
        row.extend(choice.costs.iter().map(|cost| show(cost, hardware, load)));
        table.add_row(row);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    let mut text = format!(
        "{name} ({}, {} layers) on {world} × {}: {} sequences of {} tokens, s_q {}\n\
         {} TB/s, {} TFLOP/s, {} GB, link {} GB/s, ridge {:.1} FLOP/byte\n{}\n\n{table}\n\n",
        model.architecture,
        model.layers,
        hardware.name,
        load.batch,
        load.context,
        load.s_q,
        figure(hardware.bandwidth / 1e12),
        figure(hardware.flops / 1e12),
        figure(hardware.memory / 1e9),
        figure(hardware.link / 1e9),
        hardware.ridge(),
        hardware.source,
    );
    text.push_str(&format!("choice: {}. {}.", choice.path, capitalised(&choice.reason)));
    text
}

/// A cell of the table.
type Show = fn(&PathCost, &Hardware, &Load) -> String;

const ROWS: [(&str, Show); 13] = [
    ("cache elements a token and layer", |c, _, _| c.cache_elements_per_token_per_layer.to_string()),
    ("cache bytes a token, all layers", |c, _, _| c.cache_bytes_per_token.to_string()),
    ("attention, FLOP/byte", |c, _, _| format!("{:.2}", c.intensity)),
    ("attention bound by", |c, _, _| bound(c.bound).to_string()),
    ("attention: memory / compute", |c, _, _| format!("{} / {}", ms(c.attention.memory_s), ms(c.attention.compute_s))),
    ("weights: memory / compute", |c, _, _| format!("{} / {}", ms(c.weights.memory_s), ms(c.weights.compute_s))),
    ("all-reduces", |c, _, _| ms(c.all_reduce_s)),
    ("step", |c, _, _| ms(c.step_s)),
    ("longest part", |c, _, _| part(c.slowest).to_string()),
    ("tokens/s", |c, _, _| figure(c.tokens_per_s)),
    ("tokens/s, every draft accepted", |c, _, _| figure(c.tokens_per_s_all_accepted)),
    ("weights a rank / memory", |c, h, _| format!("{} / {} GB", figure(c.weight_bytes / 1e9), figure(h.memory / 1e9))),
    ("batch × context that fits", |c, _, l| match c.tokens_fit {
        0 => "none: the weights alone do not fit".to_string(),
        tokens => format!("{tokens} tokens = {} × {}", c.batch_fits, l.context),
    }),
];

fn bound(bound: Bound) -> &'static str {
    match bound {
        Bound::Memory => "memory",
        Bound::Compute => "compute",
    }
}

fn part(part: Part) -> &'static str {
    match part {
        Part::Weights => "weights",
        Part::Attention => "attention",
        Part::AllReduce => "all-reduces",
    }
}

fn ms(seconds: f64) -> String {
    format!("{:.3} ms", seconds * 1e3)
}

/// A number without needless digits.
fn figure(x: f64) -> String {
    let digits = if x >= 100.0 { 0 } else { 3 };
    let text = format!("{x:.digits$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_string() } else { text }
}

fn capitalised(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or(String::new(), |first| first.to_uppercase().chain(letters).collect())
}
