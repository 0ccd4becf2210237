//! `gqla bench`: what this machine does, beside what its memory bandwidth would allow.

mod all_reduce;
mod attention;
mod decode;
mod plot;
mod report;
mod scaling;
mod serve;

use crate::error::Result;

/// Measure attention kernels, all-reduces, whole decode steps, and scaling over ranks.
#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand, Debug)]
enum What {
    /// Decode attention alone: GB/s and TFLOP/s against the measured bandwidth
    Attention(attention::Args),
    /// All-reduce, residual and RMSNorm, as a layer does them; run it under mpirun
    AllReduce(all_reduce::Args),
    /// Whole decode steps of a model, on one rank or under mpirun
    Decode(decode::Args),
    /// Decode at 1, 2, 4 and 8 ranks, with a plot; starts mpirun itself
    Scaling(scaling::Args),
    /// A running server under a given arrival rate, as its clients see it
    Serve(serve::Args),
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    match args.what {
        What::Attention(args) => attention::run(args),
        What::AllReduce(args) => all_reduce::run(args),
        What::Decode(args) => decode::run(args),
        What::Scaling(args) => scaling::run(args),
        What::Serve(args) => serve::run(args),
    }
}
