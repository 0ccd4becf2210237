//! The command line: one file a subcommand, each with its `Args` and a `run`.

mod bench;
mod chat;
mod convert;
mod generate;
mod plan;
mod score;
mod serve;
mod world;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::error::{Error, Result, tell};

/// Exit codes as `--help` shows them; [`Error::exit_code`] is the source.
const EXIT_CODES: &str = "\
Exit codes:
  0    done
  1    a defect of this program
  2    wrong flags, or a request that cannot be served as asked
  3    the checkpoint or another file: missing, damaged or unsupported
  4    the world size does not fit the model and the path
  5    too little memory
  6    a rank was lost, stalled or disagrees with the others
  7    the device, its driver or one of its libraries
  130  interrupted (ctrl-C)";

const EXAMPLES: &str = "\
Examples:
  gqla generate --model checkpoints/tiny-glm-gqla --prompt \"def fibonacci(n):\"
  gqla generate --model checkpoints/tiny-glm-gqla --prompt \"import os\" --tp 8 --path gqla
  gqla score --model checkpoints/tiny-glm-gqla --perplexity held-out.u16 --window 512
  gqla serve --model checkpoints/tiny-glm-gqla --port 8000
  gqla plan --model glm-4.7-flash-gqla --hardware h200 --tp 4
  gqla plan --model path/to/checkpoint --hardware h20 --tp 8 --batch 64 --context 32768 --json
  gqla convert --model path/to/glm-4.7-flash --out glm-gqla --groups 4 --calibration text.txt
";

/// A multi-GPU tensor-parallel runtime for Group-Query Latent Attention.
///
/// One process a GPU, started by mpirun; rank 0 streams the tokens. The same binary runs on CPUs. The answer alone goes
/// to stdout, everything else to stderr.
#[derive(Parser)]
#[command(name = "gqla", version, after_help = help_tail())]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

fn help_tail() -> String {
    format!("{EXAMPLES}\n{EXIT_CODES}")
}

#[derive(Subcommand)]
enum Command {
    /// Continue a prompt, streaming
    Generate(generate::Args),
    /// Talk with a model whose checkpoint has a chat template
    Chat(chat::Args),
    /// Logits of token lists, or perplexity
    Score(score::Args),
    /// Serve a model over HTTP in OpenAI's wire format
    Serve(Box<serve::Args>),
    /// Measure this machine (attention, all-reduce, decode steps, scaling), or a running server
    Bench(bench::Args),
    /// What a decode step costs on each path, and which path to take; needs no checkpoint and no GPU.
    Plan(plan::Args),
    /// Turn a published Llama, DeepSeek or GLM checkpoint into a GQLA one.
    Convert(Box<convert::Args>),
}

/// Runs the command that the process's arguments name.
pub fn main() -> ExitCode {
    // clap prints its own errors, --help and --version, and exits with 2, 0 and 0.
    let cli = Cli::parse();
    let done = match cli.command {
        Command::Generate(args) => generate::run(args),
        Command::Chat(args) => chat::run(args),
        Command::Score(args) => score::run(args),
        Command::Serve(args) => serve::run(*args),
        Command::Bench(args) => bench::run(args),
        Command::Plan(args) => plan::run(args),
        Command::Convert(args) => convert::run(*args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tell(&error.to_string().replace('\n', " "));
            ExitCode::from(error.exit_code() as u8)
        }
    }
}

/// Writes `text` and a newline to stdout. A reader that has gone away (`gqla … | head`) is no error.
fn print(text: &str) -> Result<()> {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    match writeln!(out, "{text}").and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(Error::io("stdout", error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn arguments_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn help_lists_every_exit_code() {
        let errors = [
            Error::Internal(String::new()),
            Error::Usage(String::new()),
            Error::io("x", std::io::Error::other("y")),
            Error::Sharding(String::new()),
            Error::Memory(String::new()),
            Error::Stopped(String::new()),
            Error::Device(String::new()),
            Error::Interrupted,
        ];
        for error in errors {
            let code = error.exit_code().to_string();
            assert!(EXIT_CODES.lines().any(|l| l.split_whitespace().next() == Some(&code)), "{code} is not in --help");
        }
    }
}
