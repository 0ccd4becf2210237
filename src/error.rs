//! The one error type. Every message names what it is about (rank, file, tensor, field) and what to do.

use std::io::Write;
use std::path::PathBuf;

/// What went wrong, with the remedy in its text.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// A flag or an argument cannot be used as given.
    #[error("{0}")]
    Usage(String),
    /// A file of the checkpoint is missing, damaged, or not what the configuration says.
    #[error("{}: {what}", file.display())]
    Checkpoint {
        /// The file at fault.
        file: PathBuf,
        /// What is wrong with it, naming the tensor where one is concerned.
        what: String,
    },
    /// `config.json` asks for something this runtime does not compute, or contradicts itself.
    #[error("{}: {field}: {what}", file.display())]
    Config {
        /// The configuration file.
        file: PathBuf,
        /// The field at fault.
        field: String,
        /// What is wrong with it.
        what: String,
    },
    /// The world size does not fit the model and the path.
    #[error("{0}")]
    Sharding(String),
    /// Too little memory for the weights or the cache.
    #[error("{0}")]
    Memory(String),
    /// A rank was lost, stalled, or disagrees with the others.
    #[error("rank {rank}: {what}")]
    Rank {
        /// The rank at fault.
        rank: usize,
        /// What was seen.
        what: String,
    },
    /// The device, its driver or one of its libraries.
    #[error("{0}")]
    Device(String),
    /// A request that cannot be served as asked.
    #[error("{0}")]
    Request(String),
    /// The engine has stopped; the text says why.
    #[error("the engine has stopped: {0}")]
    Stopped(String),
    /// Interrupted by the user.
    #[error("interrupted")]
    Interrupted,
    /// An operating-system call failed.
    #[error("{}: {what}", file.display())]
    Io {
        /// The path concerned.
        file: PathBuf,
        /// The operating system's words.
        what: String,
    },
    /// A defect of this program.
    #[error("internal error: {0}; please report it")]
    Internal(String),
}

/// The result of everything fallible here.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// The process's exit code; the README's table of exit codes is this function.
    pub fn exit_code(&self) -> i32 {
        match self {
            Error::Internal(_) => 1,
            Error::Usage(_) | Error::Request(_) => 2,
            Error::Checkpoint { .. } | Error::Config { .. } | Error::Io { .. } => 3,
            Error::Sharding(_) => 4,
            Error::Memory(_) => 5,
            Error::Rank { .. } | Error::Stopped(_) => 6,
            Error::Device(_) => 7,
            Error::Interrupted => 130,
        }
    }

    /// An error about a path, from the operating system's.
    pub fn io(file: impl Into<PathBuf>, error: std::io::Error) -> Error {
        Error::Io { file: file.into(), what: error.to_string() }
    }

    /// An error about a file of the checkpoint.
    pub fn checkpoint(file: impl Into<PathBuf>, what: impl Into<String>) -> Error {
        Error::Checkpoint { file: file.into(), what: what.into() }
    }
}

/// Prints `gqla: what` on stderr in one piece, for all ranks write to the same one. mpirun reads it through a pipe: when
/// that is gone, so is the reader, and it must not stop us.
pub(crate) fn tell(what: &str) {
    let _ = std::io::stderr().write_all(format!("gqla: {what}\n").as_bytes());
}
