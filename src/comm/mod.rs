//! Collectives among the ranks: a world of one, threads in one process, MPI on host memory.
//!
//! Sums are taken in one fixed order, a binary tree over the ranks (`((r0+r1)+(r2+r3))+…`), so that every rank gets the
//! same bits, and, together with the segmented products of the CPU backend, so does every power-of-two world size.

#[cfg(feature = "mpi")]
pub mod launch;
#[cfg(feature = "mpi")]
pub mod mpi;
pub mod nccl;
pub mod one;
pub mod one_shot;
pub(crate) mod pace;
#[cfg(feature = "mpi")]
mod roll;
pub mod threads;
#[cfg(feature = "mpi")]
mod watch;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use crate::error::{Error, Result};

/// The watchdog's bound until [`Communicator::set_watchdog`] says otherwise.
pub const WATCHDOG: Duration = Duration::from_secs(30);

/// One rank's end of a world. All ranks call the same operations in the same order, from one thread each.
///
/// Every wait is bounded by the step watchdog ([`set_watchdog`](Communicator::set_watchdog)): a rank that does not
/// arrive in time is an [`Error::Rank`](crate::error::Error::Rank), never a hang.
pub trait Communicator: Send {
    /// This rank.
    fn rank(&self) -> usize;
    /// World size.
    fn world(&self) -> usize;
    /// The rank's number among those on its host, and how many those are.
    fn local(&self) -> (usize, usize);
    /// `buffer` becomes the sum over all ranks, bitwise equal everywhere.
    fn all_reduce(&mut self, buffer: &mut [f32]) -> Result<()>;
    /// `all` becomes the ranks' `mine` in rank order; `all.len() == world * mine.len()`.
    fn all_gather(&mut self, mine: &[u8], all: &mut [u8]) -> Result<()>;
    /// `message` becomes rank 0's. Workers may wait here for long: the bound is `patience`, not the watchdog
    /// (`None` waits for ever), and an idle wait sleeps.
    fn broadcast(&mut self, message: &mut Vec<u8>, patience: Option<Duration>) -> Result<()>;
    /// On a worker, whether the next [`broadcast`](Communicator::broadcast) has something to read, an error included.
    fn arrived(&mut self) -> Result<bool>;
    /// Returns when every rank has come.
    fn barrier(&mut self) -> Result<()>;
    /// Bounds every wait but `broadcast`'s.
    fn set_watchdog(&mut self, bound: Duration);
    /// This thread is about to call what may wait for another rank and is not part of the communicator: a device's driver
    /// or NCCL. MPI: unless the next operation, or this again, comes within the watchdog's bound and `beyond`, this
    /// process ends as for a lost rank, naming the ranks that do not answer; a thread of its own sees to that. `None`:
    /// it has returned. Elsewhere nothing.
    fn guard(&mut self, _beyond: Option<Duration>) {}
    /// What changes while a guarded call gets on by itself, so that its bound begins anew. Said once.
    fn progress(&mut self, _counter: Arc<AtomicU64>) {}
    /// Ends every rank of the world. MPI: prints `gqla: rank R: why` on stderr, then ends all processes with `code`
    /// and does not return. Threads and a world of one: this and every other end's operations fail from now on,
    /// naming this rank and `why`.
    fn abort(&mut self, code: i32, why: &str);
    /// Leaves the world in good order; every rank calls it last. An MPI process that ends without it counts as lost.
    fn finish(self: Box<Self>) -> Result<()>;
}

/// The world this process was started in: MPI's under `mpirun` (or Slurm with PMIx), else a world of one.
pub fn connect() -> Result<Box<dyn Communicator>> {
    #[cfg(feature = "mpi")]
    if let Some(comm) = mpi::MpiComm::init()? {
        return Ok(Box::new(comm));
    }
    Ok(Box::new(one::OneComm::new()))
}

/// Checks that every rank has the same value `mine` of `what` ("checkpoint", "world size", …).
///
/// Where they differ, every rank gets an [`Error::Rank`] naming the first rank that differs from rank 0.
pub fn agree(comm: &mut dyn Communicator, what: &str, mine: u64) -> Result<()> {
    let mut all = vec![0; comm.world() * 8];
    comm.all_gather(&mine.to_le_bytes(), &mut all)?;
    match all.chunks_exact(8).position(|other| other != &all[..8]) {
        None => Ok(()),
        Some(rank) => Err(Error::Rank { rank, what: format!("{what} differs from rank 0's") }),
    }
}

/// Sums `parts` (each `width` long, in rank order) into `out` in tree order: neighbours first, then pairs, then fours;
/// a part with no partner waits for the next round. `parts` is left with partial sums.
pub fn tree_sum(parts: &mut [f32], width: usize, out: &mut [f32]) {
    let count = parts.len().checked_div(width).unwrap_or(0);
    let mut stride = 1;
    while stride < count {
        for left in (0..count - stride).step_by(2 * stride) {
            let (low, high) = parts.split_at_mut((left + stride) * width);
            for (l, r) in low[left * width..][..width].iter_mut().zip(&high[..width]) {
                *l += *r;
            }
        }
        stride *= 2;
    }
    out.copy_from_slice(&parts[..width]);
}

/// The part of `0..length` that `rank` of `world` sums in a large all-reduce; the parts cover it without overlap.
fn share(length: usize, world: usize, rank: usize) -> Range<usize> {
    length * rank / world..length * (rank + 1) / world
}

/// Up to this many elements over all ranks, every rank sums everything itself, in one exchange; above, it sums its
/// share and gathers the others', in two exchanges of less data.
fn is_small(length: usize, world: usize) -> bool {
    length * world <= 8192
}

/// An all-gather's lengths are the caller's to get right: `all` holds `world` times `mine`.
fn check_gather(mine: &[u8], all: &[u8], world: usize) -> Result<()> {
    if all.len() == world * mine.len() {
        return Ok(());
    }
    let what = format!("all-gather of {} bytes from each of {world} ranks into {} bytes", mine.len(), all.len());
    Err(Error::Internal(what))
}

/// `[1]` as "rank 1", `[1, 3]` as "ranks 1, 3".
fn name_ranks(ranks: &[usize]) -> String {
    let list: Vec<String> = ranks.iter().map(usize::to_string).collect();
    format!("rank{} {}", if ranks.len() == 1 { "" } else { "s" }, list.join(", "))
}
