//! Collectives among the ranks: a world of one, threads in one process, MPI on host memory.
//!
//! Sums are taken in one fixed order, a binary tree over the ranks (`((r0+r1)+(r2+r3))+…`), so that every rank gets the
//! same bits, and, together with the segmented products of the CPU backend, so does every power-of-two world size.

#[cfg(feature = "mpi")]
pub mod mpi;
pub mod one;
pub mod threads;

use std::time::Duration;

use crate::error::Result;

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
    /// Returns when every rank has come.
    fn barrier(&mut self) -> Result<()>;
    /// Bounds every wait but `broadcast`'s.
    fn set_watchdog(&mut self, bound: Duration);
    /// Ends every rank of the world with `code`, after `why` has been printed. Threads: their waits fail.
    fn abort(&mut self, code: i32, why: &str);
}

/// Sums `parts` (each `width` long, in rank order) into `out` in tree order.
pub fn tree_sum(parts: &mut [f32], width: usize, out: &mut [f32]) {
    let mut count = parts.len().checked_div(width).unwrap_or(0);
    while count > 1 {
        for i in 0..count / 2 {
            let (left, right) = parts.split_at_mut((2 * i + 1) * width);
            let left = &mut left[2 * i * width..];
            for (l, r) in left.iter_mut().zip(&right[..width]) {
                *l += *r;
            }
            parts.copy_within(2 * i * width..(2 * i + 1) * width, i * width);
        }
        if count % 2 == 1 {
            parts.copy_within((count - 1) * width..count * width, count / 2 * width);
        }
        count = count.div_ceil(2);
    }
    out.copy_from_slice(&parts[..width]);
}
