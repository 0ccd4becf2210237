//! `gqla bench scaling`: decode at 1, 2, 4 and 8 ranks, as far as there are devices, and a projection beyond.
//!
//! A projected point is one rank's shard of the larger world, measured here alone, plus the all-reduces that it would
//! wait for; it is marked as such everywhere.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use super::plot::{Curve, Point, scaling};
use super::report;
use crate::backend::cuda;
use crate::cli::world::{self, DeviceChoice};
use crate::error::{Error, Result};
use crate::model::shard::{Path, world_sizes};

/// Decode at rising world sizes, with a plot of speed, efficiency and the roofline. Starts mpirun itself.
#[derive(clap::Args, Debug, Clone)]
pub struct Args {
    #[command(flatten)]
    decode: super::decode::Args,
    /// World sizes
    #[arg(long, value_name = "W,…", default_value = "1,2,4,8", value_delimiter = ',')]
    worlds: Vec<usize>,
    /// Ranks to run really; larger worlds are projected [default: the GPUs, or the cores]
    #[arg(long, value_name = "W")]
    devices: Option<usize>,
    /// Microseconds of one all-reduce in projected worlds [default: as measured at the largest real world]
    #[arg(long, value_name = "US")]
    all_reduce_us: Option<f64>,
    /// Arithmetic rate of the roofline, TFLOP/s
    #[arg(long, value_name = "TFLOPS", default_value_t = 790.0)]
    peak: f64,
    /// Where the plot goes
    #[arg(long, value_name = "FILE.svg", default_value = "scaling.svg")]
    plot: PathBuf,
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    world::end_on_interrupt()?;
    let model = match super::decode::source(&args.decode)? {
        crate::engine::setup::Source::Checkpoint(directory) => crate::config::ModelConfig::load(&directory)?,
        crate::engine::setup::Source::Dummy(model, _) => *model,
    };
    let (batch, context) = (args.decode.batch.clone(), args.decode.context.clone());
    let (&[batch], &[context]) = (&batch[..], &context[..]) else {
        return Err(Error::Usage("a scaling curve has one --batch and one --context: give one of each".into()));
    };
    let devices = args.devices.unwrap_or_else(|| devices(&args));
    let (mut curves, mut all, mut bandwidth, mut untold) = (vec![], vec![], 1.0, false);
    for path in [Path::Gqa, Path::Absorb] {
        let mut points: Vec<Point> = vec![];
        // Time that ranks add to a step beside their shards, at the largest world really run.
        let mut exchange = None;
        for world in args.worlds.clone() {
            if !world_sizes(&model, path).contains(&world) {
                eprintln!("{path} path: {world} ranks do not fit the model; left out");
                continue;
            }
            let projected = world > devices;
            let report = decode(&args, path, world, projected, batch, context)?;
            let row = &report["rows"][0];
            let number = |name: &str| row[name].as_f64().unwrap_or(0.0);
            let mut step = row["step"]["median_us"].as_f64().unwrap_or(0.0) * 1e-6;
            if projected {
                let sums = (2 * model.layers + 1) as f64;
                let sums = args.all_reduce_us.map(|us| us * 1e-6 * sums).or(exchange);
                if sums.is_none() && !untold {
                    eprintln!(
                        "no world of several ranks ran: projected points leave the all-reduces out; give --all-reduce-us"
                    );
                    untold = true;
                }
                step += sums.unwrap_or(0.0);
            } else if world > 1 {
                let alone = decode(&args, path, world, true, batch, context)?;
                let shard = alone["rows"][0]["step"]["median_us"].as_f64().unwrap_or(0.0) * 1e-6;
                exchange = Some((step - shard).max(0.0));
            }
            bandwidth = report["copy_bandwidth_bytes_per_s"].as_f64().unwrap_or(bandwidth);
            points.push(Point {
                world,
                tokens: batch as f64 / step,
                projected,
                intensity: number("flops_per_step_per_rank") / number("bytes_per_step_per_rank").max(1.0),
                flops: number("flops_per_step_per_rank") / step,
            });
            let mut entry = report.clone();
            entry["world_size"] = json!(world);
            entry["projected"] = json!(projected);
            entry["step_s"] = json!(step);
            entry["tokens_per_s"] = json!(batch as f64 / step);
            all.push(entry);
        }
        if !points.is_empty() {
            curves.push(Curve { name: format!("{path} path"), points });
        }
    }
    print_table(&curves);
    let title = format!("{}, batch {batch}, context {context}", args.decode.model.model.display());
    scaling(&args.plot, &title, &curves, bandwidth, args.peak * 1e12)?;
    eprintln!("plot: {}", args.plot.display());
    report::write(args.decode.json.as_ref(), &json!({"bench": "scaling", "runs": all}))
}

fn print_table(curves: &[Curve]) {
    let mut table = report::table(&["path", "ranks", "tokens/s", "speed-up", "efficiency", ""]);
    for curve in curves {
        let one = curve.points.first().map_or(1.0, |p| p.tokens / p.world as f64);
        for p in &curve.points {
            table.add_row([
                curve.name.clone(),
                p.world.to_string(),
                format!("{:.0}", p.tokens),
                format!("{:.2}", p.tokens / one),
                format!("{:.2}", p.tokens / one / p.world as f64),
                if p.projected { "projected".into() } else { String::new() },
            ]);
        }
    }
    println!("{table}");
}

/// Runs `gqla bench decode` at `world` ranks, or one rank's shard of them, and returns its report.
fn decode(args: &Args, path: Path, world: usize, shard_alone: bool, batch: usize, context: usize) -> Result<Value> {
    let out = std::env::temp_dir().join(format!("gqla-scaling-{}-{path}-{world}.json", std::process::id()));
    let me = std::env::current_exe().map_err(|e| Error::io("gqla", e))?;
    let mut command = if world > 1 && !shard_alone {
        let mut command = ranks(world)?;
        command.arg(me);
        command
    } else {
        Command::new(me)
    };
    let d = &args.decode;
    command.args(["bench", "decode", "--path", &path.to_string(), "--s-q", &d.s_q.to_string()]);
    command.args(["--batch", &batch.to_string(), "--context", &context.to_string(), "--steps", &d.steps.to_string()]);
    command.arg("--model").arg(&d.model.model).arg("--json").arg(&out);
    command.args(["--load-format", &name(d.load_format), "--dummy-routing", &name(d.dummy_routing)]);
    command.args(["--device", &name(d.model.device), "--all-reduce", &name(d.model.all_reduce)]);
    command.args(["--gpu-memory-utilization", &d.model.gpu_memory_utilization.to_string()]);
    if let Some(threads) = d.model.threads {
        command.args(["--threads", &threads.to_string()]);
    }
    if world > 1 && shard_alone {
        command.args(["--shard-of", &world.to_string()]);
    }
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).status();
    let status = status.map_err(|e| Error::io("mpirun", e))?;
    if !status.success() {
        return Err(Error::Device(format!("gqla bench decode at {world} ranks failed: {status}")));
    }
    let text = std::fs::read_to_string(&out).map_err(|e| Error::io(&out, e))?;
    // A file of ours in the temporary folder: leaving it behind is no harm.
    let _ = std::fs::remove_file(&out);
    serde_json::from_str(&text).map_err(|e| Error::Internal(format!("{}: {e}", out.display())))
}

/// The command that starts `world` ranks.
fn ranks(world: usize) -> Result<Command> {
    #[cfg(feature = "mpi")]
    return crate::comm::launch::mpirun(world);
    #[cfg(not(feature = "mpi"))]
    Err(Error::Usage(format!("{world} ranks need MPI, and this gqla was built without it: --devices 1 projects them")))
}

/// A flag's value as it is written on the command line.
fn name(value: impl clap::ValueEnum) -> String {
    value.to_possible_value().map_or_else(String::new, |v| v.get_name().to_string())
}

/// Ranks that can really run here: one a GPU, or on CPUs one a core.
fn devices(args: &Args) -> usize {
    let gpus = match args.decode.model.device {
        DeviceChoice::Cpu => 0,
        DeviceChoice::Auto | DeviceChoice::Cuda => cuda::available().map_or(0, |gpus| gpus.len()),
    };
    if gpus > 0 { gpus } else { std::thread::available_parallelism().map_or(1, usize::from) }
}
