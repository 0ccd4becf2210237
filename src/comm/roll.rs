//! Who still answers: asked by a rank whose wait has failed.

use std::ffi::{c_int, c_void};
use std::time::Duration;

use ::mpi::ffi;

use super::mpi::{Tag, null_request, probe};
use super::name_ranks;
use super::pace::Pace;

/// How long to collect the others' answers after giving up.
pub(super) const GRACE: Duration = Duration::from_millis(500);

/// A world whose ranks can be asked.
#[derive(Clone, Copy)]
pub(super) struct Roll {
    pub(super) comm: ffi::MPI_Comm,
    pub(super) rank: usize,
    pub(super) world: usize,
}

// SAFETY: what keeps it from being Send and Sync by itself is MPI's handle, which may be used from any thread as long
// as no two calls overlap; `call` says so.
unsafe impl Send for Roll {}
// SAFETY: as above.
unsafe impl Sync for Roll {}

impl Roll {
    /// Gives up: says so to all others, and hears who else does, each with the collectives that it has begun (this rank
    /// `count`). Whoever waits, in whatever collective, hears it and answers; so the ranks which stay silent are the ones
    /// that are stopped, or busy for longer than the watchdog allows. No other call into MPI may be under way.
    pub(super) fn call(&self, count: u64) -> Vec<Option<u64>> {
        // Leaked on purpose, as are the requests: the messages may still be under way when this process ends.
        let notice: &'static [u64; 1] = Box::leak(Box::new([count]));
        for peer in (1..self.world).map(|step| (self.rank + step) % self.world) {
            let mut request = null_request();
            // SAFETY: `notice` lives for ever. A failure to send is no news here.
            unsafe {
                let data = notice.as_ptr().cast::<c_void>();
                let (peer, tag) = (peer as c_int, Tag::GiveUp as c_int);
                ffi::MPI_Isend(data, 8, ffi::RSMPI_UINT8_T, peer, tag, self.comm, &mut request);
            }
        }
        let mut heard: Vec<Option<u64>> = vec![None; self.world];
        heard[self.rank] = Some(count);
        let mut pace = Pace::new(true);
        while pace.waited() < GRACE && heard.contains(&None) {
            match probe(self.comm, self.rank, None, Tag::GiveUp) {
                Ok(Some((sender, 8))) => {
                    let mut count = 0u64;
                    // SAFETY: the message is there, eight bytes long, and `count` has room for it.
                    unsafe {
                        let data = (&raw mut count).cast::<c_void>();
                        let (from, tag) = (sender as c_int, Tag::GiveUp as c_int);
                        ffi::MPI_Recv(data, 8, ffi::RSMPI_UINT8_T, from, tag, self.comm, ffi::RSMPI_STATUS_IGNORE);
                    }
                    heard[sender] = Some(count);
                }
                _ => std::thread::sleep(Duration::from_millis(1)),
            }
            pace.turn();
        }
        heard
    }

    /// Gives up, and says in words who does not answer.
    pub(super) fn who_is_missing(&self, count: u64) -> String {
        let waited = "a call into the device's driver or NCCL does not return";
        match silent(&self.call(count)).as_slice() {
            [] => format!("{waited}, though every rank answers; ending"),
            missing => format!("{waited}, and there is no answer from {}; ending", name_ranks(missing)),
        }
    }
}

/// The ranks that were not heard.
pub(super) fn silent(heard: &[Option<u64>]) -> Vec<usize> {
    (0..heard.len()).filter(|&rank| heard[rank].is_none()).collect()
}
