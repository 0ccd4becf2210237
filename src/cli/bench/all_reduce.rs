//! `gqla bench all-reduce`: what stands between two half-layers, `x += Σ partial; h = rmsnorm(x)`, and nothing else.

use std::path::PathBuf;
use std::time::Instant;

use serde_json::{Value, json};

use super::report::{self, Times};
use crate::backend::{Backend, Batch, Span};
use crate::cli::world::{self, AllReduceChoice, DeviceChoice};
use crate::engine::device::{self, DeviceOptions, Task, with_device};
use crate::error::Result;

/// Dependent calls in one step, as the layers of a model make them.
const CALLS: usize = 64;

/// Measure the all-reduce between half-layers, with the residual and the RMSNorm that follow it. Run it under mpirun.
#[derive(clap::Args, Debug, Clone)]
pub struct Args {
    /// The device
    #[arg(long, value_enum, default_value = "auto")]
    device: DeviceChoice,
    /// How ranks on GPUs sum
    #[arg(long, value_enum, default_value = "auto")]
    all_reduce: AllReduceChoice,
    /// Width of the residual stream
    #[arg(long, default_value_t = 4096)]
    hidden: usize,
    /// Rows of a call; a row of 4096 is 8 KiB in bf16
    #[arg(long, value_name = "N,…", default_value = "1,2,8,32,128", value_delimiter = ',')]
    rows: Vec<usize>,
    /// Runs of 64 dependent calls measured
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Write the report here
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Runs the command: every rank the same.
pub fn run(args: Args) -> Result<()> {
    let mut comm = crate::comm::connect()?;
    let rank = comm.rank();
    if rank == 0 {
        world::end_on_interrupt()?;
    }
    let rows = args.rows.clone();
    let most = rows.iter().max().copied().unwrap_or(1);
    let options = DeviceOptions {
        device: args.device.into(),
        all_reduce: args.all_reduce.into(),
        max_rows: most,
        max_sequences: most,
        max_context: 64,
        hidden: args.hidden,
        ..DeviceOptions::default()
    };
    let device = device::choose(&options, &mut *comm)?;
    let report = with_device(&options, &device, comm, Sums { args: args.clone(), rows, rank })?;
    if rank == 0 { report::write(args.json.as_ref(), &report) } else { Ok(()) }
}

struct Sums {
    args: Args,
    rows: Vec<usize>,
    rank: usize,
}

impl Task for Sums {
    type Out = Value;

    fn run<B: Backend + 'static>(self, mut b: B) -> Result<Value> {
        let (hidden, world) = (self.args.hidden, b.comm().world());
        let weight = b.vector(&vec![1.0; hidden])?;
        let bandwidth = if self.rank == 0 { b.bandwidth()? } else { 1.0 };
        let head = ["rows", "KiB in bf16", "µs a call (median)", "GB/s in and out", "of copy"];
        let mut table = report::table(&head);
        let mut out = vec![];
        for (i, &rows) in self.rows.iter().enumerate() {
            let batch = Batch {
                tokens: vec![0; rows],
                positions: vec![0; rows],
                spans: (0..rows).map(|r| Span { first: r, rows: 1, context: 1, blocks: vec![0] }).collect(),
                ..Batch::default()
            };
            let mut partial = b.noise_tensor(rows, hidden, 3 + self.rank as u64)?;
            let (mut x, mut h) = (b.residual(rows, hidden)?, b.tensor(rows, hidden)?);
            let mut times = vec![];
            for run in 0..5 + self.args.runs {
                b.comm().barrier()?;
                let began = Instant::now();
                b.step(2000 + i as u32, &batch, |b| {
                    for _ in 0..CALLS {
                        b.all_reduce_add_norm(&mut partial, None, &mut x, &weight, 1e-5, &mut h)?;
                    }
                    Ok(())
                })?;
                b.synchronize()?;
                if run >= 5 {
                    times.push(began.elapsed() / CALLS as u32);
                }
            }
            let times = Times::new(&times);
            let bytes = (rows * hidden * 2) as f64;
            let kib = bytes / 1024.0;
            // What a rank must send and receive at least.
            let moved = 4.0 * (world - 1) as f64 / world as f64 * bytes;
            let rate = moved / times.median();
            table.add_row([
                rows.to_string(),
                format!("{kib}"),
                format!("{:.2}", times.median() * 1e6),
                format!("{:.1}", rate / 1e9),
                format!("{:.3}", rate / bandwidth),
            ]);
            out.push(json!({
                "rows": rows, "hidden": hidden, "kib_bf16": kib, "time": times.json(), "bytes": moved,
                "bytes_per_s": rate, "fraction_of_copy_bandwidth": rate / bandwidth,
            }));
        }
        let mut report = report::header("all-reduce", &b.describe(), bandwidth, world);
        if self.rank == 0 {
            let (device, sums, rate) = (b.describe(), b.sums(), bandwidth / 1e9);
            println!(
                "{device} | {world} ranks, {sums} | copy bandwidth {rate:.1} GB/s | {CALLS} dependent calls a step"
            );
            println!("{table}");
        }
        report["sums"] = json!(b.sums());
        report["all_reduce"] = json!(format!("{:?}", self.args.all_reduce).to_lowercase());
        report["rows"] = json!(out);
        b.into_comm().finish()?;
        Ok(report)
    }
}
