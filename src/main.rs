//! The `gqla` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    gqla::cli::main()
}
