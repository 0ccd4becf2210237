//! How a rank spends the time in which it waits for another.
//!
//! First it spins, because in a step the others are microseconds away; then it yields its core; then it sleeps, each
//! time for a fixed part of what it has waited already, so that a long wait costs next to no CPU and a sleep never
//! adds more than that part to it.

use std::time::{Duration, Instant};

/// With a core for every rank, how long to spin. Short, because the rank waited for may have been put on this core.
const SPIN: Duration = Duration::from_micros(5);
/// How long to go on yielding before the first sleep.
const YIELD: Duration = Duration::from_micros(500);
/// A sleep's length is what has been waited already over this,
const SLEEP_PART: u32 = 16;
/// and no more than this.
const SLEEP_MOST: Duration = Duration::from_millis(1);
/// A gap between two looks at the clock counts for at most this: a process that was stopped (ctrl-Z, a debugger, a
/// laptop's lid) must not blame the others for the time in which it did not look.
const GAP_MOST: Duration = Duration::from_secs(1);

/// What to do before looking again.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Turn {
    /// Look again at once.
    Spin,
    /// Let another thread run.
    Yield,
    /// Sleep this long, or until woken.
    Sleep(Duration),
}

/// One wait.
pub(crate) struct Pace {
    spin: Duration,
    last: Instant,
    waited: Duration,
}

impl Pace {
    /// A wait that begins now. `crowded`: there are more ranks than cores, so that spinning keeps the others from
    /// arriving.
    pub(crate) fn new(crowded: bool) -> Pace {
        Pace { spin: if crowded { Duration::ZERO } else { SPIN }, last: Instant::now(), waited: Duration::ZERO }
    }

    /// What to do next.
    pub(crate) fn turn(&mut self) -> Turn {
        let now = Instant::now();
        self.waited += (now - self.last).min(GAP_MOST);
        self.last = now;
        if self.waited < self.spin {
            Turn::Spin
        } else if self.waited < YIELD {
            Turn::Yield
        } else {
            Turn::Sleep((self.waited / SLEEP_PART).min(SLEEP_MOST))
        }
    }

    /// Waits as [`turn`](Pace::turn) says.
    pub(crate) fn pause(&mut self) {
        match self.turn() {
            Turn::Spin => std::hint::spin_loop(),
            Turn::Yield => std::thread::yield_now(),
            Turn::Sleep(time) => std::thread::sleep(time),
        }
    }

    /// The time waited so far, as of the last turn.
    pub(crate) fn waited(&self) -> Duration {
        self.waited
    }
}

/// Whether `ranks` on this host are more than the cores that this process may use.
pub(crate) fn crowded(ranks: usize) -> bool {
    ranks > std::thread::available_parallelism().map_or(1, usize::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_in_which_the_process_was_stopped_is_not_held_against_the_others() {
        let mut pace = Pace::new(false);
        pace.last -= Duration::from_secs(3600);
        assert_eq!(pace.turn(), Turn::Sleep(SLEEP_MOST));
        assert_eq!(pace.waited(), GAP_MOST);
    }
}
