//! A thread that ends this process when waiting any longer is pointless. It makes MPI calls only once it has made sure
//! that the engine's thread makes no more.
//!
//! Three things cannot be seen from the engine's thread: that `mpirun` has been killed, which leaves its ranks running
//! with nobody to end them; that a call into MPI does not return, because the library waits for a rank that was
//! stopped at the wrong instruction or for a launcher that no longer answers; and that a call into a device's driver or
//! NCCL does not, because it waits for a rank that is lost.

use std::os::unix::process::parent_id;
use std::sync::atomic::{
    AtomicU64,
    Ordering::{AcqRel, Acquire, Relaxed},
};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crate::error::{Error, Result, tell};

/// How often the thread looks.
const LOOK: Duration = Duration::from_millis(200);

/// Of [`Watch::outside`]: the watching thread makes the MPI calls from now on.
const TAKEN: u64 = u64::MAX;

/// Finds out which ranks do not answer, and says so; given the collectives that this rank has begun.
type Ask = Box<dyn Fn(u64) -> String + Send + Sync>;

/// The engine thread's handle on the watching thread.
pub(super) struct Watch {
    begin: Instant,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    /// When the call under way is overdue, in milliseconds after `begin`; 0 while none is under way.
    overdue: AtomicU64,
    /// 0: the call under way is one into MPI. Else the engine's thread makes no MPI calls before it has set this to 0,
    /// and the value is [`TAKEN`] or one more than the collectives that it has begun.
    outside: AtomicU64,
    /// The bound of a call into other libraries than MPI, in milliseconds,
    bound: AtomicU64,
    /// and what changes while that call gets on, so that the bound begins anew.
    progress: OnceLock<Arc<AtomicU64>>,
    ask: OnceLock<Ask>,
}

impl Watch {
    /// Starts watching on behalf of `rank`.
    pub(super) fn start(rank: usize) -> Result<Watch> {
        let watch = Watch { begin: Instant::now(), shared: Arc::default() };
        let (begin, shared, parent) = (watch.begin, watch.shared.clone(), parent_id());
        let run = move || {
            let (mut late, mut reached) = (0, 0);
            loop {
                std::thread::sleep(LOOK);
                if parent_id() != parent {
                    end(rank, "mpirun is gone; ending");
                }
                // Twice in a row: after the whole process was stopped and continued, its engine thread gets a turn to
                // move the time on before this one judges it.
                let progress = shared.progress.get().map_or(0, |p| p.load(Relaxed));
                if std::mem::replace(&mut reached, progress) != progress {
                    shared.extend(begin.elapsed());
                }
                let limit = shared.overdue.load(Relaxed);
                late = if limit != 0 && begin.elapsed().as_millis() as u64 > limit { late + 1 } else { 0 };
                if late == 2 {
                    match shared.outside.load(Acquire) {
                        0 => end(rank, "a call into MPI does not return, so another rank or mpirun is stuck; ending"),
                        outside => match shared.ask.get().filter(|_| shared.take(outside)) {
                            Some(ask) => end(rank, &ask(outside - 1)),
                            // The engine's thread has come back just now.
                            None => late = 0,
                        },
                    }
                }
            }
        };
        let thread = std::thread::Builder::new().name("gqla-watch".into()).spawn(run);
        thread.map_err(|error| Error::Rank { rank, what: format!("cannot start a thread: {error}") })?;
        Ok(watch)
    }

    /// What to do when the engine's thread does not come back from [`go_outside`](Watch::go_outside). It may call MPI.
    pub(super) fn on_lost(&self, ask: Ask) {
        // There is one caller, which comes once.
        let _ = self.shared.ask.set(ask);
    }

    /// The bound of [`go_outside`](Watch::go_outside) begins anew whenever `progress` has changed.
    pub(super) fn follow(&self, progress: Arc<AtomicU64>) {
        // There is one caller, which comes once.
        let _ = self.shared.progress.set(progress);
    }

    /// From now on this process ends unless, within `bound`, this is called again or [`disarm`](Watch::disarm) is.
    pub(super) fn arm(&self, bound: Duration) {
        self.shared.overdue.store(((self.begin.elapsed() + bound).as_millis() as u64).max(1), Relaxed);
    }

    /// No call is under way.
    pub(super) fn disarm(&self) {
        self.shared.overdue.store(0, Relaxed);
    }

    /// As [`arm`](Watch::arm), for calls into other libraries than MPI. `count`: the collectives begun.
    pub(super) fn go_outside(&self, bound: Duration, count: u64) {
        self.shared.bound.store(bound.as_millis() as u64, Relaxed);
        self.arm(bound);
        self.shared.outside.store(count + 1, Relaxed);
    }

    /// The engine's thread may call MPI when this returns. It does not return once the watching thread has begun to.
    pub(super) fn come_back(&self) {
        let outside = self.shared.outside.load(Relaxed);
        if outside == 0 {
            return;
        }
        if outside == TAKEN || !self.shared.replace(outside, 0) {
            loop {
                std::thread::park();
            }
        }
        self.disarm();
    }
}

impl Shared {
    fn take(&self, outside: u64) -> bool {
        self.replace(outside, TAKEN)
    }

    /// Something got on `now`, in a call into another library.
    fn extend(&self, now: Duration) {
        let limit = self.overdue.load(Relaxed);
        if limit != 0 && self.outside.load(Relaxed) != 0 {
            let later = now.as_millis() as u64 + self.bound.load(Relaxed);
            // Where the engine's thread has set another one just now, that one is right.
            let _ = self.overdue.compare_exchange(limit, limit.max(later), Relaxed, Relaxed);
        }
    }

    fn replace(&self, outside: u64, new: u64) -> bool {
        self.outside.compare_exchange(outside, new, AcqRel, Acquire).is_ok()
    }
}

/// Prints why, and ends this process at once with the exit code of a lost rank.
pub(super) fn end(rank: usize, why: &str) -> ! {
    tell(&format!("rank {rank}: {why}"));
    let code = Error::Rank { rank, what: String::new() }.exit_code();
    // SAFETY: _exit has no preconditions. MPI's exit handlers, which `exit` would run, may wait for the lost rank.
    unsafe { libc::_exit(code) }
}
