//! TransGQLA: published checkpoints into GQLA ones, layer by layer (SPEC.md section 4).
//!
//! The backend carries the calibration's hidden states from layer to layer; what a conversion must know of a layer
//! (latents, queries, attention's weights) is computed here on the host, in f32 with sums in f64. Between layers only the
//! hidden states and the finished layers' files are kept.

mod attention;
pub mod calibration;
mod evaluate;
mod forward;
mod gqa;
mod grouping;
mod hidden;
mod linalg;
mod measure;
mod mla;
mod mtp;
mod output;
mod refit;
mod write;

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};

use self::attention::{HostAttention, LatentLayer};
use self::calibration::Windows;
use self::forward::Stream;
use self::linalg::Rows;
use self::measure::Samples;
use self::write::{Made, Working};
use crate::backend::Backend;
use crate::checkpoint::Checkpoint;
use crate::comm::Communicator;
use crate::config::{Attention, ModelConfig};
use crate::error::{Error, Result};

pub use evaluate::{Figures, compare};
pub use forward::STEP;
pub use gqa::{Choice, RopeMode};
pub use grouping::Grouping;
pub use write::discard;

/// Ranks wait for each other a layer at a time, and a layer may take long.
const PATIENCE: Duration = Duration::from_secs(3600);

/// How keys and values are shared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Method {
    /// As published: principal components of the stacked keys and of the stacked values
    Pca,
    /// Keys in the queries' metric, values in the output's, refitted to the attention's output
    AttentionAware,
}

/// What calibration tokens count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Weights {
    /// All the same
    Uniform,
    /// The original's loss on the next token
    Nll,
}

/// The type that new weights are stored in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum StoredType {
    /// As the original's weights
    Source,
    /// bfloat16
    Bf16,
    /// float32
    F32,
}

/// Everything about a conversion.
#[derive(Debug, Clone)]
pub struct Options {
    /// The checkpoint.
    pub model: PathBuf,
    /// The directory to be made.
    pub out: PathBuf,
    /// Groups; for Llama its KV heads when not given.
    pub groups: Option<usize>,
    /// How heads are grouped.
    pub grouping: Grouping,
    /// What tokens count.
    pub weights: Weights,
    /// How keys and values are shared.
    pub method: Method,
    /// Rounds of the values' refit, where the method has one; 0 leaves it out.
    pub refit: usize,
    /// Llama: how RoPE is concentrated.
    pub rope: RopeMode,
    /// Llama: d_r, and d_c, when given.
    pub rope_dim: Option<usize>,
    /// Llama: d_c.
    pub latent_rank: Option<usize>,
    /// Llama: d_r + d_c, split by predicted loss.
    pub cache_elements: Option<usize>,
    /// The calibration's file.
    pub calibration: PathBuf,
    /// Its windows.
    pub samples: usize,
    /// Tokens a window.
    pub length: usize,
    /// Shuffles the texts of a .jsonl.
    pub seed: u64,
    /// Measured on before and after.
    pub evaluate: Option<PathBuf>,
    /// Windows of it; all when `None`.
    pub evaluate_windows: Option<usize>,
    /// How new weights are stored.
    pub stored: StoredType,
    /// Most bytes of a shard.
    pub shard_bytes: usize,
    /// Hidden states above this many bytes go to disk.
    pub spill: u64,
    /// Keep finished layers when interrupted, and go on after those that are there.
    pub resume: bool,
}

impl Options {
    /// The command's defaults.
    pub fn new(model: impl Into<PathBuf>, out: impl Into<PathBuf>, calibration: impl Into<PathBuf>) -> Options {
        Options {
            model: model.into(),
            out: out.into(),
            groups: None,
            grouping: Grouping::Neighbor,
            weights: Weights::Uniform,
            method: Method::AttentionAware,
            refit: 2,
            rope: RopeMode::Adaptive,
            rope_dim: None,
            latent_rank: None,
            cache_elements: None,
            calibration: calibration.into(),
            samples: 128,
            length: 512,
            seed: 42,
            evaluate: None,
            evaluate_windows: None,
            stored: StoredType::Source,
            shard_bytes: 5_000_000_000,
            spill: 4_000_000_000,
            resume: false,
        }
    }
}

/// What a conversion did.
#[derive(Debug, Clone)]
pub struct Report {
    /// Figures before and after, when measured.
    pub figures: Option<Figures>,
    /// Cache elements a token and layer: before, and the GQA and the absorb path's after.
    pub elements: [usize; 3],
    /// Llama: the splits of the cache that were possible, by predicted loss.
    pub choices: Vec<Choice>,
}

/// Told of progress: layers done, layers in all, and what is being done, at the beginning of each part of it.
pub type Progress<'a> = &'a (dyn Fn(usize, usize, &str) + Sync);

/// The output of an attention layer from its normed input `[length, hidden]`: the part of some heads.
fn layer_output(teacher: &HostAttention, h: &[f32], heads: &[usize]) -> Vec<f32> {
    let (projected, value, output, rows) = match teacher {
        HostAttention::Latent(l) => {
            let up = linalg::product(&l.latent(h).0, l.shape.kv_rank, &l.kv_up);
            (l.project(h), l.shape.value, &l.output, up)
        }
        HostAttention::Grouped(l) => {
            let mut v = linalg::product(h, l.v.cols, &l.v);
            if let Some([_, _, bias]) = &l.bias {
                for row in v.chunks_exact_mut(bias.len()) {
                    row.iter_mut().zip(bias).for_each(|(x, b)| *x += b);
                }
            }
            (l.project(h), l.shape.head_dim, &l.output, v)
        }
    };
    let (block, first) = match teacher {
        HostAttention::Latent(l) => (l.shape.nope + l.shape.value, l.shape.nope),
        HostAttention::Grouped(l) => (l.shape.head_dim, 0),
    };
    let per_row = rows.len() / projected.length;
    let width = heads.len() * value;
    let mut pooled = vec![0.0; projected.length * width];
    for (at, &j) in heads.iter().enumerate() {
        let from = j / projected.heads.1 * block + first;
        let values: Vec<f32> =
            rows.chunks_exact(per_row).flat_map(|row| row[from..from + value].iter().copied()).collect();
        let out = projected.pooled(j, &values, value);
        for (to, from) in pooled.chunks_exact_mut(width).zip(out.chunks_exact(value)) {
            to[at * value..(at + 1) * value].copy_from_slice(from);
        }
    }
    let mut columns = Rows::zeros(output.rows(), width);
    for r in 0..output.rows() {
        for (at, &j) in heads.iter().enumerate() {
            let from = &output.row(r)[j * value..(j + 1) * value];
            columns.data[r * width + at * value..][..value].copy_from_slice(from);
        }
    }
    linalg::product(&pooled, width, &columns)
}

/// Converts `options.model` into `options.out`. All ranks call it and share the calibration; rank 0 writes, and it alone
/// gets the figures.
///
/// The output appears whole or not at all.
pub fn convert<B: Backend>(
    options: &Options,
    backend: &mut B,
    mut comm: Box<dyn Communicator>,
    stop: &AtomicBool,
    progress: Progress,
) -> Result<Report> {
    comm.set_watchdog(PATIENCE);
    let comm = Mutex::new(comm);
    let done = on_all_ranks(options, backend, &comm, stop, progress);
    let mut comm = comm.into_inner().unwrap_or_else(PoisonError::into_inner);
    let (working, settings, plan, report) = match done {
        Ok(done) => done,
        Err(error) => {
            let error = remains(error, options);
            if comm.world() > 1 {
                comm.abort(error.exit_code(), &error.to_string());
            }
            return Err(error);
        }
    };
    // From here on rank 0 works alone.
    comm.finish()?;
    let Some(working) = working else {
        return Ok(report);
    };
    let done = finish(options, backend, stop, progress, working, &settings, &plan, report);
    done.map_err(|error| remains(error, options))
}

/// The error of a conversion that has ended, and what is left of it where the disk was at fault.
fn remains(error: Error, options: &Options) -> Error {
    match error {
        Error::Io { file, what } => {
            let left = left(&options.out, options.resume);
            Error::Io { file, what: format!("{what} ({left})") }
        }
        other => other,
    }
}

/// What is left of a conversion to `out` that did not finish, in words.
pub fn left(out: &Path, resume: bool) -> String {
    let directory = write::beside(out);
    if !directory.exists() {
        "nothing is left of the conversion".into()
    } else if resume {
        format!("finished layers are kept in {}: the same command goes on from there", directory.display())
    } else {
        format!("{} could not be removed: remove it", directory.display())
    }
}

/// Reads the calibration and converts every layer: the working directory on rank 0, the settings, the plan, and what is
/// known to report.
fn on_all_ranks<B: Backend>(
    options: &Options,
    backend: &mut B,
    comm: &Mutex<Box<dyn Communicator>>,
    stop: &AtomicBool,
    progress: Progress,
) -> Result<(Option<Working>, Value, output::Plan, Report)> {
    let checkpoint = Checkpoint::open(&options.model)?;
    let config = ModelConfig::load(&options.model)?;
    let mut plan = output::plan(options, &config)?;
    let calibration = calibration::read(
        &options.calibration,
        &options.model,
        &config,
        Some(options.samples),
        options.length,
        options.seed,
    )?;
    output::enough(options, &config, &plan)?;
    if options.evaluate.is_some() {
        // Refused now rather than at the end.
        evaluation(options, &config)?;
    }
    let (rank, world) = {
        let comm = comm.lock().unwrap_or_else(PoisonError::into_inner);
        (comm.rank(), comm.world())
    };
    // Rank 0's directory becomes the output; what the others spill goes beside it.
    let working = if rank == 0 { Some(Working::open(&options.out, options.resume)?) } else { None };
    let scratch = match &working {
        Some(working) => working.directory.clone(),
        None => write::beside(&options.out).with_file_name("."),
    };
    let settings = output::settings(options, &config, &plan, &calibration);
    let finished = match &working {
        Some(working) => output::resume(working, layers(&checkpoint, &config), &settings)?,
        None => vec![],
    };
    let finished = agreed(comm, &finished)?;
    let mine = (rank..calibration.windows.len()).step_by(world).collect();
    let run = Run {
        options,
        checkpoint: &checkpoint,
        config: &config,
        calibration: &calibration,
        mine,
        working: working.as_ref(),
        scratch,
    };
    let mut choices = Vec::new();
    if let (Attention::Grouped(a), false) = (&config.attention, plan.splits.is_empty()) {
        choices = plan.choose(&run.survey(backend, comm, stop, progress, &plan)?, a.head_dim);
    }
    run.layers(backend, comm, stop, progress, &plan, &finished)?;
    let report = Report { figures: None, elements: plan.elements, choices };
    Ok((working, settings, plan, report))
}

fn evaluation(options: &Options, config: &ModelConfig) -> Result<Option<Windows>> {
    let read = |file: &PathBuf| {
        calibration::read(file, &options.model, config, options.evaluate_windows, options.length, options.seed)
    };
    options.evaluate.as_ref().map(read).transpose()
}

/// Writes the shards and the small files, measures, and gives the directory its name.
fn finish<B: Backend>(
    options: &Options,
    backend: &mut B,
    stop: &AtomicBool,
    progress: Progress,
    working: Working,
    settings: &Value,
    plan: &output::Plan,
    mut report: Report,
) -> Result<Report> {
    let checkpoint = Checkpoint::open(&options.model)?;
    let config = ModelConfig::load(&options.model)?;
    let layers: Vec<PathBuf> = (0..layers(&checkpoint, &config)).map(|i| working.layer(i)).collect();
    progress(0, 1, "writing shards");
    let dropped = output::dropped(&config);
    write::assemble(&checkpoint, &working.directory, &layers, dropped, options.shard_bytes)?;
    write::copy_companions(&options.model, &working.directory)?;
    output::config(options, &config, plan, &working.directory)?;
    if let Some(windows) = evaluation(options, &config)? {
        progress(0, 1, "measuring");
        let at = &working.directory;
        report.figures = Some(compare(backend, &options.model, at, &windows, options.spill, at, stop)?);
    }
    output::meta(&working.directory, settings, plan, report.figures.as_ref(), options.evaluate.as_deref())?;
    output::clean(&working.directory)?;
    working.finish(&options.out)?;
    Ok(report)
}

/// A conversion under way.
struct Run<'a> {
    options: &'a Options,
    checkpoint: &'a Checkpoint,
    config: &'a ModelConfig,
    calibration: &'a Windows,
    /// This rank's windows.
    mine: Vec<usize>,
    /// The output to be, on rank 0.
    working: Option<&'a Working>,
    /// Where hidden states are spilled.
    scratch: PathBuf,
}

impl Run<'_> {
    /// Converts every layer that has no file yet.
    fn layers<B: Backend>(
        &self,
        backend: &mut B,
        comm: &Mutex<Box<dyn Communicator>>,
        stop: &AtomicBool,
        progress: Progress,
        plan: &output::Plan,
        finished: &[bool],
    ) -> Result<()> {
        let (config, count) = (self.config, layers(self.checkpoint, self.config));
        let weights = match self.options.weights {
            Weights::Uniform => None,
            Weights::Nll => {
                let stream = self.start()?;
                for i in 0..config.layers {
                    progress(i, config.layers, "weighing tokens");
                    stream.step(backend, i, stop, |_| ())?;
                }
                Some(stream.losses()?.into_iter().map(mean_one).collect::<Vec<_>>())
            }
        };
        if finished.iter().all(|done| *done) {
            return Ok(());
        }
        let mut stream = self.start()?;
        for i in 0..count {
            let told = |what: &str| progress(i, count, what);
            told("reading weights");
            if i == config.layers {
                stream = mtp::enter(stream, self.options.spill, &self.scratch)?;
            }
            let norm = self.checkpoint.vector(&format!("model.layers.{i}.input_layernorm.weight"), config.hidden)?;
            let samples = self.samples(&stream, &norm, weights.as_deref(), comm, stop, &told);
            if !finished[i] {
                let made = self.layer(i, &samples, plan)?;
                told("writing the layer");
                if let Some(working) = self.working {
                    write::save_layer(&working.layer(i), &made, &output::dtype(self.options, self.checkpoint)?)?;
                }
            }
            if i + 1 < count {
                told("model forward");
                stream.step(backend, i, stop, |_| ())?;
            }
        }
        Ok(())
    }

    /// This rank's windows at the model's beginning.
    fn start(&self) -> Result<Stream<'_>> {
        let windows = self.mine.iter().map(|i| self.calibration.windows[*i].as_slice()).collect();
        Stream::start(self.checkpoint, self.config, windows, self.options.spill, &self.scratch)
    }

    fn samples<'s>(
        &'s self,
        stream: &'s Stream,
        norm: &'s [f32],
        weights: Option<&'s [Vec<f32>]>,
        comm: &'s Mutex<Box<dyn Communicator>>,
        stop: &'s AtomicBool,
        told: &'s (dyn Fn(&str) + Sync),
    ) -> Samples<'s> {
        Samples {
            hidden: &stream.hidden,
            count: stream.windows.len(),
            tokens: self.calibration.windows.len() * stream.length(),
            norm: (norm, self.config.norm_eps),
            weights,
            comm,
            stop,
            told,
        }
    }

    /// The predicted loss of every split of the cache, summed over the layers.
    fn survey<B: Backend>(
        &self,
        backend: &mut B,
        comm: &Mutex<Box<dyn Communicator>>,
        stop: &AtomicBool,
        progress: Progress,
        plan: &output::Plan,
    ) -> Result<Vec<f64>> {
        let stream = self.start()?;
        let mut predicted = vec![0.0; plan.splits.len()];
        for i in 0..self.config.layers {
            let told = |_: &str| progress(i, self.config.layers, "comparing splits of the cache");
            let norm = format!("model.layers.{i}.input_layernorm.weight");
            let norm = self.checkpoint.vector(&norm, self.config.hidden)?;
            let samples = self.samples(&stream, &norm, None, comm, stop, &told);
            told("");
            if let HostAttention::Grouped(layer) = HostAttention::read(self.checkpoint, self.config, i)? {
                let layer = gqa::survey(&layer, &samples, &plan.splits)?;
                predicted.iter_mut().zip(layer).for_each(|(sum, x)| *sum += x);
            }
            if i + 1 < self.config.layers {
                stream.step(backend, i, stop, |_| ())?;
            }
        }
        Ok(predicted)
    }

    /// The new tensors of layer `i`.
    fn layer(&self, i: usize, samples: &Samples, plan: &output::Plan) -> Result<Vec<Made>> {
        let teacher = HostAttention::read(self.checkpoint, self.config, i)?;
        let Options { grouping, method, .. } = *self.options;
        let share = mla::Plan { groups: plan.groups, grouping, method, refit: plan.refit };
        let layer = match &teacher {
            HostAttention::Latent(l) if plan.groups == l.shape.groups => return Ok(vec![]),
            HostAttention::Latent(l) => mla::convert(&gqa::per_head(l), &teacher, samples, &share)?,
            HostAttention::Grouped(l) => {
                let latent = gqa::convert(l, &teacher, samples, plan)?;
                if plan.groups < l.shape.groups {
                    mla::convert(&gqa::per_head(&latent), &teacher, samples, &share)?
                } else {
                    latent
                }
            }
        };
        Ok(self.tensors(i, layer, plan))
    }

    fn tensors(&self, i: usize, layer: LatentLayer, plan: &output::Plan) -> Vec<Made> {
        let at = |name: &str| format!("model.layers.{i}.self_attn.{name}");
        let query = if layer.q_down.is_some() { "q_b_proj.weight" } else { "q_proj.weight" };
        let mut made = vec![
            Made::matrix(at(query), layer.q_up),
            Made::matrix(at("kv_b_proj.weight"), layer.kv_up),
            Made::matrix(at("o_proj.weight"), layer.output),
        ];
        if let Some(bias) = layer.q_bias {
            made.push(Made::vector(at("q_proj.bias"), bias, false));
        }
        if matches!(self.config.attention, Attention::Grouped(_)) {
            made.push(Made::matrix(at("kv_a_proj_with_mqa.weight"), layer.kv_down));
            if let Some(bias) = layer.kv_bias {
                made.push(Made::vector(at("kv_a_proj_with_mqa.bias"), bias, false));
            }
            if plan.stored_inv_freq {
                let inv_freq = layer.rotation.inv_freq.iter().map(|f| *f as f32).collect();
                made.push(Made::vector(at("rope_inv_freq"), inv_freq, true));
            }
        }
        made
    }
}

/// Layers to be converted: the model's, and its MTP layer unless config.json alone has one.
fn layers(checkpoint: &Checkpoint, config: &ModelConfig) -> usize {
    let there = |i: &usize| checkpoint.has(&format!("model.layers.{i}.eh_proj.weight"), false);
    config.layers + (config.layers..config.layers + config.mtp_layers).filter(there).count()
}

/// Rank 0's list of finished layers, on every rank.
fn agreed(comm: &Mutex<Box<dyn Communicator>>, finished: &[bool]) -> Result<Vec<bool>> {
    let mut message: Vec<u8> = finished.iter().map(|done| u8::from(*done)).collect();
    comm.lock().unwrap_or_else(PoisonError::into_inner).broadcast(&mut message, None)?;
    Ok(message.iter().map(|b| *b == 1).collect())
}

/// Scales weights to mean 1; all the same where they are all zero.
fn mean_one(mut weights: Vec<f32>) -> Vec<f32> {
    let mean = weights.iter().sum::<f32>() / weights.len().max(1) as f32;
    weights.iter_mut().for_each(|w| *w = if mean > 0.0 { *w / mean } else { 1.0 });
    weights
}

/// The settings and the calibration as `gqla_meta.json` has them.
fn named<T: clap::ValueEnum>(value: T) -> serde_json::Value {
    value.to_possible_value().map_or(json!(null), |v| json!(v.get_name()))
}

/// The checkpoint's directory with an absolute path where there is one.
fn shown(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}
