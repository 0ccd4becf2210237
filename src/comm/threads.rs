//! A world of threads in one process, for tests and for programs that embed the engine.
//!
//! Each end posts what it contributes in a slot of its own, counts it as posted, waits until all have, and reads the
//! others' slots. A slot has two sides, used in turn: an end that posts collective `n + 1` has finished reading `n`,
//! and nobody posts `n + 2` before all have posted `n + 1`, so a side is never written while it is being read.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};
use std::time::Duration;

use super::pace::{Pace, Turn, crowded};
use super::{Communicator, WATCHDOG, check_gather, is_small, name_ranks, share, tree_sum};
use crate::error::{Error, Result};

/// One end of a world of threads. It is moved to its thread; dropping it ends the others' waits for it.
pub struct ThreadsComm {
    shared: Arc<Shared>,
    rank: usize,
    /// Collectives posted by this end.
    count: u64,
    watchdog: Duration,
    /// Every rank's part of a sum.
    parts: Vec<f32>,
}

/// A world of `size` ends, in rank order.
pub fn world(size: usize) -> Vec<ThreadsComm> {
    let shared = Arc::new(Shared {
        ends: (0..size).map(|_| End::default()).collect(),
        crowded: crowded(size),
        aborted: OnceLock::new(),
        sleepers: AtomicUsize::new(0),
        sleep: Mutex::new(()),
        wake: Condvar::new(),
    });
    (0..size)
        .map(|rank| ThreadsComm { shared: shared.clone(), rank, count: 0, watchdog: WATCHDOG, parts: Vec::new() })
        .collect()
}

/// What the ends share.
struct Shared {
    ends: Vec<End>,
    crowded: bool,
    /// The rank that aborted, and why.
    aborted: OnceLock<(usize, String)>,
    /// Ends that wait on `wake`.
    sleepers: AtomicUsize,
    sleep: Mutex<()>,
    wake: Condvar,
}

/// One end as the others see it.
#[derive(Default)]
struct End {
    /// Collectives it has posted.
    posted: AtomicU64,
    /// What it posted last and before last, by the count's parity.
    sides: [RwLock<Posted>; 2],
    /// Broadcasts it has yet to read.
    inbox: Mutex<VecDeque<Arc<[u8]>>>,
    /// It has been dropped.
    left: AtomicBool,
}

#[derive(Default)]
struct Posted {
    operation: &'static str,
    floats: Vec<f32>,
    bytes: Vec<u8>,
}

impl Shared {
    /// Wakes whoever sleeps. A sleeper counts itself before it looks for the last time, and a poster looks at that
    /// count after it has posted: one of the two sees the other.
    fn notify(&self) {
        if self.sleepers.load(SeqCst) > 0 {
            drop(lock(&self.sleep));
            self.wake.notify_all();
        }
    }

    /// Waits until `ready`, for `bound` at most. `false`: the bound has passed.
    fn wait(&self, bound: Option<Duration>, mut ready: impl FnMut() -> Result<bool>) -> Result<bool> {
        let mut pace = Pace::new(self.crowded);
        loop {
            if ready()? {
                return Ok(true);
            }
            let turn = pace.turn();
            if bound.is_some_and(|bound| pace.waited() >= bound) {
                return Ok(false);
            }
            match turn {
                Turn::Spin => std::hint::spin_loop(),
                Turn::Yield => std::thread::yield_now(),
                Turn::Sleep(_) => {
                    // Posts wake us, so this sleep may be long; it ends to see whether the bound has passed.
                    let most = Duration::from_millis(500);
                    let nap = bound.map_or(most, |bound| most.min(bound - pace.waited()));
                    let guard = lock(&self.sleep);
                    self.sleepers.fetch_add(1, SeqCst);
                    let done = ready();
                    if matches!(done, Ok(false)) {
                        drop(self.wake.wait_timeout(guard, nap).unwrap_or_else(PoisonError::into_inner));
                    }
                    self.sleepers.fetch_sub(1, SeqCst);
                    if done? {
                        return Ok(true);
                    }
                }
            }
        }
    }

    /// Fails once some end has aborted.
    fn check(&self) -> Result<()> {
        match self.aborted.get() {
            None => Ok(()),
            Some((rank, why)) => Err(Error::Rank { rank: *rank, what: why.clone() }),
        }
    }
}

impl ThreadsComm {
    /// Posts this end's part of the next collective, and returns when all ends have posted theirs.
    fn post(&mut self, operation: &'static str, floats: &[f32], bytes: &[u8]) -> Result<()> {
        self.shared.check()?;
        self.count += 1;
        let (shared, count) = (&*self.shared, self.count);
        let own = &shared.ends[self.rank];
        {
            let mut side = own.sides[side(count)].write().unwrap_or_else(PoisonError::into_inner);
            side.operation = operation;
            side.floats.clear();
            side.floats.extend_from_slice(floats);
            side.bytes.clear();
            side.bytes.extend_from_slice(bytes);
        }
        own.posted.store(count, SeqCst);
        shared.notify();

        let arrived = shared.wait(Some(self.watchdog), || {
            shared.check()?;
            // A dropped end has posted all it ever will: its flag is read first.
            let left = shared.ends.iter().position(|end| end.left.load(SeqCst) && end.posted.load(SeqCst) < count);
            if let Some(rank) = left {
                return Err(Error::Rank { rank, what: format!("left before {operation} {count}") });
            }
            Ok(shared.ends.iter().all(|end| end.posted.load(SeqCst) >= count))
        })?;
        if !arrived { Err(self.stalled(operation)) } else { self.same_operation(operation, floats.len(), bytes.len()) }
    }

    /// The error that names the ends which have not arrived.
    fn stalled(&self, operation: &str) -> Error {
        let posted: Vec<u64> = self.shared.ends.iter().map(|end| end.posted.load(SeqCst)).collect();
        let missing: Vec<usize> = (0..posted.len()).filter(|&rank| posted[rank] < self.count).collect();
        // The one that is furthest behind holds the others up.
        let rank = missing.iter().copied().min_by_key(|&rank| posted[rank]).unwrap_or(self.rank);
        let (count, bound) = (self.count, self.watchdog);
        Error::Rank {
            rank,
            what: format!(
                "did not arrive at {operation} {count} within {bound:?} (rank {} waited for {})",
                self.rank,
                name_ranks(&missing)
            ),
        }
    }

    /// Every end must have come to the same operation with as many elements.
    fn same_operation(&self, operation: &str, floats: usize, bytes: usize) -> Result<()> {
        for (rank, end) in self.shared.ends.iter().enumerate() {
            let side = end.sides[side(self.count)].read().unwrap_or_else(PoisonError::into_inner);
            let theirs = (side.operation, side.floats.len(), side.bytes.len());
            if theirs != (operation, floats, bytes) {
                let mine = (operation, floats, bytes);
                let what = format!("came to {theirs:?} where rank {} came to {mine:?}", self.rank);
                return Err(Error::Rank { rank, what });
            }
        }
        Ok(())
    }

    /// Calls `take` with each end's part of the collective just posted.
    fn each(&self, mut take: impl FnMut(usize, &Posted)) {
        for (rank, end) in self.shared.ends.iter().enumerate() {
            take(rank, &end.sides[side(self.count)].read().unwrap_or_else(PoisonError::into_inner));
        }
    }
}

impl Communicator for ThreadsComm {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world(&self) -> usize {
        self.shared.ends.len()
    }

    fn local(&self) -> (usize, usize) {
        (self.rank, self.world())
    }

    fn all_reduce(&mut self, buffer: &mut [f32]) -> Result<()> {
        let (world, length) = (self.world(), buffer.len());
        self.post("all-reduce", buffer, &[])?;
        let mine = if is_small(length, world) { 0..length } else { share(length, world, self.rank) };
        let width = mine.len();
        let mut parts = std::mem::take(&mut self.parts);
        parts.resize(world * width, 0.0);
        self.each(|rank, end| parts[rank * width..][..width].copy_from_slice(&end.floats[mine.clone()]));
        tree_sum(&mut parts, width, &mut buffer[mine.clone()]);
        self.parts = parts;
        if !is_small(length, world) {
            // The shares differ in length by one, and ends post equal lengths: send the longest share's length.
            let longest = length.div_ceil(world);
            self.parts.resize(self.parts.len().max(longest), 0.0);
            let mut sum = std::mem::take(&mut self.parts);
            sum[..width].copy_from_slice(&buffer[mine]);
            let posted = self.post("all-reduce's second half", &sum[..longest], &[]);
            self.parts = sum;
            posted?;
            self.each(|rank, end| {
                let theirs = share(length, world, rank);
                let width = theirs.len();
                buffer[theirs].copy_from_slice(&end.floats[..width]);
            });
        }
        Ok(())
    }

    fn all_gather(&mut self, mine: &[u8], all: &mut [u8]) -> Result<()> {
        check_gather(mine, all, self.world())?;
        self.post("all-gather", &[], mine)?;
        self.each(|rank, end| all[rank * mine.len()..][..mine.len()].copy_from_slice(&end.bytes));
        Ok(())
    }

    fn broadcast(&mut self, message: &mut Vec<u8>, patience: Option<Duration>) -> Result<()> {
        let shared = &*self.shared;
        shared.check()?;
        if self.rank == 0 {
            let copy: Arc<[u8]> = message.as_slice().into();
            for end in &shared.ends[1..] {
                lock(&end.inbox).push_back(copy.clone());
            }
            shared.notify();
            return Ok(());
        }
        let inbox = &shared.ends[self.rank].inbox;
        let mut got = None;
        let arrived = shared.wait(patience, || {
            shared.check()?;
            // Read before the inbox: what rank 0 sent before it left still arrives.
            let left = shared.ends[0].left.load(SeqCst);
            got = lock(inbox).pop_front();
            if got.is_none() && left {
                return Err(Error::Rank { rank: 0, what: "left; no more broadcasts will come".into() });
            }
            Ok(got.is_some())
        })?;
        if !arrived {
            return Err(Error::Rank {
                rank: 0,
                what: format!("broadcast nothing for {:?}", patience.unwrap_or_default()),
            });
        }
        message.clear();
        message.extend_from_slice(got.as_deref().unwrap_or_default());
        Ok(())
    }

    fn arrived(&mut self) -> Result<bool> {
        let s = &*self.shared;
        let over = s.aborted.get().is_some() || s.ends[0].left.load(SeqCst);
        Ok(over || !lock(&s.ends[self.rank].inbox).is_empty())
    }

    fn barrier(&mut self) -> Result<()> {
        self.post("barrier", &[], &[])
    }

    fn set_watchdog(&mut self, bound: Duration) {
        self.watchdog = bound;
    }

    fn abort(&mut self, _code: i32, why: &str) {
        // The first reason counts; a later one is usually its consequence.
        let _ = self.shared.aborted.set((self.rank, why.to_owned()));
        self.shared.notify();
    }

    fn finish(mut self: Box<Self>) -> Result<()> {
        self.barrier()
    }
}

impl Drop for ThreadsComm {
    fn drop(&mut self) {
        self.shared.ends[self.rank].left.store(true, SeqCst);
        self.shared.notify();
    }
}

/// Which side of a slot collective `count` uses.
fn side(count: u64) -> usize {
    (count % 2) as usize
}

/// A panic elsewhere leaves nothing half-written behind these locks.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
