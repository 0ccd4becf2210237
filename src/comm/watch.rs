//! A thread that ends this process when waiting any longer is pointless. It makes no MPI calls.
//!
//! Two things cannot be seen from the engine's thread: that `mpirun` has been killed, which leaves its ranks running
//! with nobody to end them, and that a call into MPI does not return, because the library waits for a rank that was
//! stopped at the wrong instruction or for a launcher that no longer answers.

use std::io::Write;
use std::os::unix::process::parent_id;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

/// How often the thread looks.
const LOOK: Duration = Duration::from_millis(200);

/// The engine thread's handle on the watching thread.
pub(super) struct Watch {
    begin: Instant,
    /// When the call under way is overdue, in milliseconds after `begin`; 0 while none is under way.
    overdue: Arc<AtomicU64>,
}

impl Watch {
    /// Starts watching on behalf of `rank`.
    pub(super) fn start(rank: usize) -> Result<Watch> {
        let watch = Watch { begin: Instant::now(), overdue: Arc::new(AtomicU64::new(0)) };
        let (begin, overdue, parent) = (watch.begin, watch.overdue.clone(), parent_id());
        let run = move || {
            let mut late = 0;
            loop {
                std::thread::sleep(LOOK);
                if parent_id() != parent {
                    end(rank, "mpirun is gone; ending");
                }
                // Twice in a row: after the whole process was stopped and continued, its engine thread gets a turn to
                // move the time on before this one judges it.
                let limit = overdue.load(Relaxed);
                late = if limit != 0 && begin.elapsed().as_millis() as u64 > limit { late + 1 } else { 0 };
                if late == 2 {
                    end(rank, "a call into MPI does not return, so another rank or mpirun is stuck; ending");
                }
            }
        };
        let thread = std::thread::Builder::new().name("gqla-watch".into()).spawn(run);
        thread.map_err(|error| Error::Rank { rank, what: format!("cannot start a thread: {error}") })?;
        Ok(watch)
    }

    /// From now on this process ends unless, within `bound`, this is called again or [`disarm`](Watch::disarm) is.
    pub(super) fn arm(&self, bound: Duration) {
        self.overdue.store(((self.begin.elapsed() + bound).as_millis() as u64).max(1), Relaxed);
    }

    /// No call into MPI is under way.
    pub(super) fn disarm(&self) {
        self.overdue.store(0, Relaxed);
    }
}

/// Prints why, and ends this process at once with the exit code of a lost rank.
pub(super) fn end(rank: usize, why: &str) -> ! {
    // mpirun reads our stderr through a pipe: when it is gone, so is the reader, and that must not stop us.
    let _ = writeln!(std::io::stderr(), "gqla: rank {rank}: {why}");
    let code = Error::Rank { rank, what: String::new() }.exit_code();
    // SAFETY: _exit has no preconditions. MPI's exit handlers, which `exit` would run, may wait for the lost rank.
    unsafe { libc::_exit(code) }
}
