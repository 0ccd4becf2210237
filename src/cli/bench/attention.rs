//! `gqla bench attention`: decode attention alone, over caches too large for any on-chip memory.

use std::path::PathBuf;
use std::time::Instant;

use serde_json::{Value, json};

use super::report::{self, Times};
use crate::backend::{AttentionShape, Backend, Batch, Span};
use crate::cache::{BLOCK, Layout};
use crate::cli::world::{self, DeviceChoice, PathChoice};
use crate::engine::device::{self, DeviceOptions, Task, with_device};
use crate::engine::sampler::uniform;
use crate::error::Result;

/// Seconds that a step's calls take at the copy's bandwidth.
const STEP: f64 = 5e-3;

/// Measure decode attention alone, on one rank's part of a layer.
#[derive(clap::Args, Debug, Clone)]
pub struct Args {
    /// The device
    #[arg(long, value_enum, default_value = "auto")]
    device: DeviceChoice,
    /// Which cache: grouped keys and values, or the latent; auto measures both
    #[arg(long, value_enum, default_value = "auto")]
    path: PathChoice,
    /// Query heads on the rank
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=1024))]
    heads: u32,
    /// Groups on the rank (GQA path)
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=1024))]
    groups: u32,
    /// Width of a key without its rope part
    #[arg(long, default_value_t = 128)]
    nope: usize,
    /// Width of the shared rope key (0: Llama)
    #[arg(long, default_value_t = 64)]
    rope: usize,
    /// Width of a value
    #[arg(long, default_value_t = 128)]
    value: usize,
    /// Width of the latent (absorb path)
    #[arg(long, default_value_t = 512)]
    latent: usize,
    /// Sequences in a step
    #[arg(long, value_name = "B,…", default_value = "64", value_delimiter = ',')]
    batch: Vec<usize>,
    /// Tokens in each sequence's cache
    #[arg(long, value_name = "L,…", default_value = "8192", value_delimiter = ',')]
    context: Vec<usize>,
    /// Draw each sequence's length from 1 to twice --context
    #[arg(long)]
    ragged: bool,
    /// Tokens a sequence brings to a step
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=4))]
    s_q: u32,
    /// Runs measured
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Write the report here
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    world::end_on_interrupt()?;
    let mut comm = crate::comm::connect()?;
    let (batches, contexts) = (args.batch.clone(), args.context.clone());
    let most = batches.iter().max().copied().unwrap_or(1);
    let longest = contexts.iter().max().copied().unwrap_or(1) * if args.ragged { 2 } else { 1 };
    let options = DeviceOptions {
        device: args.device.into(),
        max_rows: most * args.s_q as usize,
        max_sequences: most,
        max_context: longest,
        ..DeviceOptions::default()
    };
    let device = device::choose(&options, &mut *comm)?;
    let report = with_device(&options, &device, comm, Attention { args: args.clone(), batches, contexts })?;
    report::write(args.json.as_ref(), &report)
}

struct Attention {
    args: Args,
    batches: Vec<usize>,
    contexts: Vec<usize>,
}

impl Task for Attention {
    type Out = Value;

    fn run<B: Backend + 'static>(self, mut b: B) -> Result<Value> {
        let bandwidth = b.bandwidth()?;
        println!("{} | copy bandwidth {:.1} GB/s", b.describe(), bandwidth / 1e9);
        let head = ["path", "batch", "context", "s_q", "µs (median)", "GB/s", "of copy", "TFLOP/s"];
        let mut table = report::table(&head);
        let mut rows = vec![];
        let mut program = 1000;
        for absorb in [false, true] {
            if matches!((self.args.path, absorb), (PathChoice::Gqa, true) | (PathChoice::Absorb, false)) {
                continue;
            }
            for &context in &self.contexts {
                for &batch in &self.batches {
                    program += 1;
                    let case = Case { args: &self.args, absorb, batch, context, bandwidth };
                    let (times, bytes, flops) = case.measure(&mut b, program)?;
                    let path = if absorb { "absorb" } else { "gqa" };
                    let (rate, work) = (bytes / times.median(), flops / times.median());
                    table.add_row([
                        path.to_string(),
                        batch.to_string(),
                        if self.args.ragged { format!("1–{}", 2 * context) } else { context.to_string() },
                        self.args.s_q.to_string(),
                        format!("{:.1}", times.median() * 1e6),
                        format!("{:.0}", rate / 1e9),
                        format!("{:.2}", rate / bandwidth),
                        format!("{:.1}", work / 1e12),
                    ]);
                    rows.push(json!({
                        "path": path, "batch": batch, "context": context, "ragged": self.args.ragged,
                        "s_q": self.args.s_q, "time": times.json(), "bytes": bytes, "bytes_per_s": rate,
                        "fraction_of_copy_bandwidth": rate / bandwidth, "flops": flops, "flops_per_s": work,
                    }));
                }
            }
        }
        println!("{table}");
        let mut report = report::header("attention", &b.describe(), bandwidth, 1);
        let a = &self.args;
        report["shape"] = json!({
            "heads": a.heads, "groups": a.groups, "nope": a.nope, "rope": a.rope, "value": a.value, "latent": a.latent,
        });
        report["rows"] = json!(rows);
        b.into_comm().finish()?;
        Ok(report)
    }
}

struct Case<'a> {
    args: &'a Args,
    absorb: bool,
    batch: usize,
    context: usize,
    /// Of a copy, bytes a second.
    bandwidth: f64,
}

impl Case<'_> {
    /// Times of one layer's attention, and its bytes and FLOPs.
    fn measure<B: Backend>(&self, b: &mut B, program: u32) -> Result<(Times, f64, f64)> {
        let a = self.args;
        let (heads, groups, s_q) = (a.heads as usize, a.groups as usize, a.s_q as usize);
        let shape = AttentionShape {
            heads,
            groups,
            first_head_in_group: 0,
            heads_per_group: heads.div_ceil(groups),
            nope: a.nope,
            rope: a.rope,
            value: a.value,
            latent: if self.absorb { a.latent } else { 0 },
            scale: ((a.nope + a.rope) as f32).powf(-0.5),
            expand: false,
        };
        let layout = if self.absorb {
            Layout::Latent { latent: a.latent, rope: a.rope }
        } else {
            Layout::Grouped { groups, nope: a.nope, rope: a.rope, value: a.value }
        };
        let batch = self.batch();
        let tokens: usize = batch.spans.iter().map(|s| s.context).sum();
        let blocks: usize = batch.spans.iter().map(|s| s.blocks.len()).sum();
        let bytes = (tokens * layout.elements()) as f64 * b.cache_element() as f64;
        // Enough caches that a run does not find the last one's in any cache of the chip.
        let copies = ((1.5e9 / bytes).ceil() as usize).clamp(1, 64);
        let mut caches = (0..copies).map(|_| b.cache(layout, blocks)).collect::<Result<Vec<_>>>()?;
        for (i, cache) in caches.iter_mut().enumerate() {
            b.fill_cache(cache, i as u64 + 1)?;
        }
        let (q_width, o_width) = if self.absorb { (a.latent + a.rope, a.latent) } else { (a.nope + a.rope, a.value) };
        let q = b.noise_tensor(batch.rows(), heads * q_width, 7)?;
        let mut out = b.tensor(batch.rows(), heads * o_width)?;
        // A step as long as a model's decode step, which starts and ends once for all its layers.
        let calls = ((STEP * self.bandwidth / bytes) as usize).clamp(copies, 64);
        let mut times = vec![];
        for run in 0..3 + a.runs {
            let began = Instant::now();
            b.step(program, &batch, |b| {
                for cache in caches.iter().cycle().take(calls) {
                    if self.absorb {
                        b.attend_latent(&shape, &q, cache, &mut out)?;
                    } else {
                        b.attend_grouped(&shape, &q, cache, &mut out)?;
                    }
                }
                Ok(())
            })?;
            b.synchronize()?;
            if run >= 3 {
                times.push(began.elapsed() / calls as u32);
            }
        }
        let flops = 2.0 * (s_q * heads * (q_width + o_width)) as f64 * tokens as f64;
        Ok((Times::new(&times), bytes, flops))
    }

    fn batch(&self) -> Batch {
        let s_q = self.args.s_q as usize;
        let mut batch = Batch::default();
        let mut next = 0;
        for i in 0..self.batch {
            let context = if self.args.ragged {
                s_q + (uniform(11, i as u64) * (2 * self.context - s_q) as f64) as usize
            } else {
                self.context
            };
            let blocks = context.div_ceil(BLOCK) as u32;
            batch.spans.push(Span { first: i * s_q, rows: s_q, context, blocks: (next..next + blocks).collect() });
            next += blocks;
            batch.tokens.extend(vec![0; s_q]);
            batch.positions.extend((context - s_q) as u32..context as u32);
        }
        // Scattered blocks: a permutation of the pool.
        let scatter = |block: u32| ((u64::from(block) * 7919) % u64::from(next.max(1))) as u32;
        if next % 7919 != 0 {
            batch.spans.iter_mut().flat_map(|s| &mut s.blocks).for_each(|b| *b = scatter(*b));
        }
        batch
    }
}
