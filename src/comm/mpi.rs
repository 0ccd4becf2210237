//! MPI on host memory.
//!
//! Every collective is an exchange of messages between each pair of ranks, and every wait is our own loop over
//! `MPI_Testall`: MPI's blocking calls would spin, could not be bounded, and could not say who is missing. When a
//! bound passes, the rank tells all others that it gives up; whoever waits answers in kind, and the rank that stays
//! silent is the one to name.
//!
//! Messages are sent from and received into buffers of the communicator alone. After a failed wait MPI may still use
//! them, so they are then leaked, and no further operation is tried.

use std::ffi::{c_char, c_int, c_void};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use ::mpi::ffi;

use super::launch::{self, Launched};
use super::pace::{Pace, Turn, crowded};
use super::roll::{GRACE, Roll, silent};
use super::watch::{self, Watch};
use super::{Communicator, WATCHDOG, check_gather, is_small, name_ranks, share, tree_sum};
use crate::error::{Error, Result, tell};

/// What a call into MPI may take beyond the bound of the wait that it belongs to.
const SLACK: Duration = Duration::from_secs(5);
/// Bound of initialisation and finalisation, in which all ranks meet inside MPI.
const MEETING: Duration = Duration::from_secs(60);
/// Elements of one exchange of an all-reduce: bounds the buffers, and keeps counts within MPI's 32 bits.
const CHUNK: usize = 1 << 24;

/// Message tags. One a kind of operation, so that a rank which comes to another one is missing, not misread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tag {
    Reduce = 1,
    Gather = 2,
    Broadcast = 3,
    Barrier = 4,
    GiveUp = 5,
}

impl Tag {
    fn name(self) -> &'static str {
        match self {
            Tag::Reduce => "all-reduce",
            Tag::Gather => "all-gather",
            Tag::Broadcast => "broadcast",
            Tag::Barrier => "barrier",
            Tag::GiveUp => "giving up",
        }
    }
}

/// How a wait ended.
enum Waited {
    /// What was waited for is there.
    Done,
    /// The bound has passed.
    Expired,
    /// Another rank has given up.
    Called,
}

/// This process's end of the world that `mpirun` started.
///
/// Dropping it does not finalise MPI: finalising meets all other ranks, which a process that ends on an error cannot.
/// Ending without [`finish`](Communicator::finish) makes `mpirun` end the others.
pub struct MpiComm {
    comm: ffi::MPI_Comm,
    rank: usize,
    world: usize,
    local: (usize, usize),
    crowded: bool,
    watchdog: Duration,
    watch: Watch,
    /// Collectives begun, this one included.
    count: u64,
    /// The exchange under way: its requests, and whom each is with.
    requests: Vec<ffi::MPI_Request>,
    peers: Vec<Peer>,
    statuses: Vec<ffi::MPI_Status>,
    /// What messages are sent from and received into.
    room: Vec<f32>,
    /// The error after which the world is of no more use.
    lost: Option<Error>,
}

/// The other end of a request.
#[derive(Clone, Copy)]
struct Peer {
    rank: usize,
    /// Bytes to come; `None` for a message that is sent.
    expects: Option<usize>,
}

// SAFETY: what keeps it from being Send by itself are MPI's handles. MPI is initialised with MPI_THREAD_SERIALIZED,
// which allows calls from any thread as long as no two overlap; all calls go through this one value's `&mut self`.
unsafe impl Send for MpiComm {}

impl MpiComm {
    /// Initialises MPI when a launcher started this process; `None` when none did.
    ///
    /// Errors name this rank: MPI is initialised already or cannot be, or it sees another world than `mpirun` started.
    pub fn init() -> Result<Option<MpiComm>> {
        let Some(Launched { rank, world }) = launch::launched() else { return Ok(None) };
        let failed = |what: &str| Error::Rank { rank, what: what.to_owned() };
        let watch = Watch::start(rank)?;
        watch.arm(MEETING);
        let (mut initialized, mut provided) = (0, 0);
        // SAFETY: MPI_Initialized may be called at any time; MPI_Init_thread is called once, and null arguments are
        // allowed since MPI 2.
        unsafe {
            check(rank, ffi::MPI_Initialized(&mut initialized))?;
            if initialized != 0 {
                return Err(failed("MPI has been initialised already in this process"));
            }
            let (argc, argv) = (std::ptr::null_mut(), std::ptr::null_mut());
            check(rank, ffi::MPI_Init_thread(argc, argv, ffi::RSMPI_THREAD_SERIALIZED, &mut provided))?;
        }
        // SAFETY: a constant of the MPI library.
        if provided < unsafe { ffi::RSMPI_THREAD_SERIALIZED } {
            return Err(failed("this MPI library was built without support for threads"));
        }
        // SAFETY: MPI is initialised, and COMM_WORLD is valid from then on.
        let (comm, size, local) = unsafe {
            let mut comm = ffi::RSMPI_COMM_NULL;
            check(rank, ffi::MPI_Comm_set_errhandler(ffi::RSMPI_COMM_WORLD, ffi::RSMPI_ERRORS_RETURN))?;
            check(rank, ffi::MPI_Comm_dup(ffi::RSMPI_COMM_WORLD, &mut comm))?;
            check(rank, ffi::MPI_Comm_set_errhandler(comm, ffi::RSMPI_ERRORS_RETURN))?;
            let mut host = ffi::RSMPI_COMM_NULL;
            let shared = ffi::RSMPI_COMM_TYPE_SHARED;
            check(rank, ffi::MPI_Comm_split_type(comm, shared, rank as c_int, ffi::RSMPI_INFO_NULL, &mut host))?;
            let local = place(rank, host)?;
            check(rank, ffi::MPI_Comm_free(&mut host))?;
            (comm, place(rank, comm)?, local)
        };
        watch.disarm();
        let roll = Roll { comm, rank: size.0, world: size.1 };
        watch.on_lost(Box::new(move |count| roll.who_is_missing(count)));
        if let Some(world) = world.filter(|&world| world != size.1) {
            let remedy = "mpirun and the MPI library are of different installations";
            return Err(failed(&format!("mpirun started {world} ranks, but MPI sees {}: {remedy}", size.1)));
        }
        Ok(Some(MpiComm {
            comm,
            rank: size.0,
            world: size.1,
            local,
            crowded: crowded(local.1),
            watchdog: WATCHDOG,
            watch,
            count: 0,
            requests: Vec::new(),
            peers: Vec::new(),
            statuses: Vec::new(),
            room: Vec::new(),
            lost: None,
        }))
    }

    /// Begins a collective, which [`keep`](MpiComm::keep) ends; fails if the world is lost. Afterwards `room` has `floats` elements at least.
    fn begin(&mut self, floats: usize) -> Result<()> {
        self.watch.come_back();
        if let Some(error) = &self.lost {
            return Err(error.clone());
        }
        self.watch.arm(self.watchdog + SLACK);
        self.count += 1;
        if self.room.len() < floats {
            self.room.resize(floats, 0.0);
        }
        Ok(())
    }

    /// The other ranks, each rank beginning with its neighbour, so that not all of them address rank 0 first.
    fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let (rank, world) = (self.rank, self.world);
        (1..world).map(move |step| (rank + step) % world)
    }

    /// Starts to send `room`'s bytes `offset..offset + length` to `peer`. Until [`complete`](MpiComm::complete) has
    /// returned they must not change.
    fn send(&mut self, tag: Tag, peer: usize, offset: usize, length: usize) -> Result<()> {
        let data = self.bytes(offset, length).cast::<c_void>();
        let mut request = null_request();
        // SAFETY: `data` is valid for `length` bytes, and stays so until the request is complete: `room` is neither
        // resized nor freed before, and it is leaked if the wait fails.
        let code = unsafe {
            let (length, peer) = (length as c_int, peer as c_int);
            ffi::MPI_Isend(data, length, ffi::RSMPI_UINT8_T, peer, tag as c_int, self.comm, &mut request)
        };
        check(peer, code)?;
        self.requests.push(request);
        self.peers.push(Peer { rank: peer, expects: None });
        Ok(())
    }

    /// Starts to receive into `room`'s bytes `offset..offset + length` from `peer`. Until
    /// [`complete`](MpiComm::complete) has returned they must be left alone.
    fn receive(&mut self, tag: Tag, peer: usize, offset: usize, length: usize) -> Result<()> {
        let data = self.bytes(offset, length).cast::<c_void>();
        let mut request = null_request();
        // SAFETY: as in `send`; and no other request covers these bytes.
        let code = unsafe {
            let (length, peer) = (length as c_int, peer as c_int);
            ffi::MPI_Irecv(data, length, ffi::RSMPI_UINT8_T, peer, tag as c_int, self.comm, &mut request)
        };
        check(peer, code)?;
        self.requests.push(request);
        self.peers.push(Peer { rank: peer, expects: Some(length) });
        Ok(())
    }

    /// `room`'s bytes from `offset`, of which there must be `length`.
    fn bytes(&mut self, offset: usize, length: usize) -> *mut u8 {
        assert!(offset + length <= self.room.len() * 4 && length <= c_int::MAX as usize);
        // SAFETY: within the buffer, as just checked.
        unsafe { self.room.as_mut_ptr().cast::<u8>().add(offset) }
    }

    /// Sends rank's part to every other rank and receives theirs: part `p` is `room`'s bytes `place(p)` (offset and
    /// length). Returns when all have been sent and received.
    fn exchange(&mut self, tag: Tag, place: impl Fn(usize) -> (usize, usize)) -> Result<()> {
        let own = place(self.rank);
        for peer in self.others() {
            let (offset, length) = place(peer);
            self.receive(tag, peer, offset, length)?;
        }
        for peer in self.others() {
            self.send(tag, peer, own.0, own.1)?;
        }
        self.complete(tag)
    }

    /// Waits until every request of the exchange is complete.
    fn complete(&mut self, tag: Tag) -> Result<()> {
        // SAFETY: an all-zero MPI_Status is a valid value of that plain struct of integers.
        self.statuses.resize(self.requests.len(), unsafe { std::mem::zeroed() });
        match self.wait(Some(self.watchdog), |comm| comm.test_all(tag))? {
            Waited::Done => {
                self.requests.clear();
                self.peers.clear();
                Ok(())
            }
            Waited::Expired | Waited::Called => {
                let missing = self.incomplete();
                Err(self.inquest(tag, &missing))
            }
        }
    }

    /// Whether all requests are complete. An incoming message of another length than expected is an error.
    fn test_all(&mut self, tag: Tag) -> Result<bool> {
        let mut done = 0;
        let count = self.requests.len() as c_int;
        // SAFETY: both arrays have `count` elements; the requests are ours, and active or null.
        let code =
            unsafe { ffi::MPI_Testall(count, self.requests.as_mut_ptr(), &mut done, self.statuses.as_mut_ptr()) };
        if code != ffi::MPI_SUCCESS as c_int {
            let pending = ffi::MPI_ERR_PENDING as c_int;
            let bad = |status: &ffi::MPI_Status| status.MPI_ERROR != 0 && status.MPI_ERROR != pending;
            let (rank, code) = match self.statuses.iter().position(bad) {
                Some(at) => (self.peers[at].rank, self.statuses[at].MPI_ERROR),
                None => (self.rank, code),
            };
            return check(rank, code).map(|()| false);
        }
        if done == 0 {
            return Ok(false);
        }
        for (peer, status) in self.peers.iter().zip(&self.statuses) {
            let Some(expected) = peer.expects else { continue };
            let length = message_length(peer.rank, status)?;
            if length != expected {
                let (name, count, rank) = (tag.name(), self.count, self.rank);
                let what = format!("came to {name} {count} with {length} bytes where rank {rank} expects {expected}");
                return Err(Error::Rank { rank: peer.rank, what });
            }
        }
        Ok(true)
    }

    /// The ranks with which a request is not complete, in order.
    fn incomplete(&mut self) -> Vec<usize> {
        let mut missing = Vec::new();
        for (request, peer) in self.requests.iter_mut().zip(&self.peers) {
            let mut done = 0;
            // SAFETY: the request is ours, and active or null; a null one counts as complete.
            let code = unsafe { ffi::MPI_Test(request, &mut done, ffi::RSMPI_STATUS_IGNORE) };
            if code != ffi::MPI_SUCCESS as c_int || done == 0 {
                missing.push(peer.rank);
            }
        }
        missing.sort_unstable();
        missing.dedup();
        missing
    }

    /// Polls until `ready`, for `bound` at most, or until another rank gives up.
    fn wait(&mut self, bound: Option<Duration>, mut ready: impl FnMut(&mut Self) -> Result<bool>) -> Result<Waited> {
        let mut pace = Pace::new(self.crowded);
        loop {
            if ready(self)? {
                return Ok(Waited::Done);
            }
            let turn = pace.turn();
            if bound.is_some_and(|bound| pace.waited() >= bound) {
                return Ok(Waited::Expired);
            }
            match turn {
                Turn::Spin => std::hint::spin_loop(),
                Turn::Yield => std::thread::yield_now(),
                Turn::Sleep(nap) => {
                    if self.probe(None, Tag::GiveUp)?.is_some() {
                        return Ok(Waited::Called);
                    }
                    std::thread::sleep(nap);
                    self.watch.arm(self.watchdog + SLACK);
                }
            }
        }
    }

    /// As [`probe`].
    fn probe(&mut self, source: Option<usize>, tag: Tag) -> Result<Option<(usize, usize)>> {
        probe(self.comm, self.rank, source, tag)
    }

    /// Gives up ([`Roll::call`]) and returns the error that names the rank at fault.
    fn inquest(&mut self, tag: Tag, missing: &[usize]) -> Error {
        self.watch.arm(GRACE + SLACK);
        let heard = Roll { comm: self.comm, rank: self.rank, world: self.world }.call(self.count);
        let silent = silent(&heard);
        let blamed = silent.iter().find(|rank| missing.contains(rank)).or(silent.first()).copied();
        let (name, count, bound) = (tag.name(), self.count, self.watchdog);
        match blamed {
            Some(rank) => {
                let what = format!("did not come to {name} {count} within {bound:?}, and does not answer");
                Error::Rank { rank, what: what + &also(rank, &silent) }
            }
            None => {
                // All are waiting, so they disagree about what for: blame the one that is furthest behind.
                let rank = (0..self.world).min_by_key(|&rank| heard[rank]).unwrap_or(self.rank);
                let behind = heard[rank].unwrap_or(0);
                let what =
                    format!("waits at its collective {behind}, others for it at {name} {count}, since {bound:?}");
                Error::Rank { rank, what }
            }
        }
    }

    /// Ends an operation, and remembers the error after which nothing more is tried.
    fn keep(&mut self, result: Result<()>) -> Result<()> {
        self.watch.disarm();
        if let Err(error) = &result {
            self.lost.get_or_insert_with(|| error.clone());
        }
        result
    }

    /// Every rank sums everything: one exchange.
    fn reduce_small(&mut self, buffer: &mut [f32]) -> Result<()> {
        let width = buffer.len();
        self.begin(self.world * width)?;
        self.room[self.rank * width..][..width].copy_from_slice(buffer);
        self.exchange(Tag::Reduce, |rank| (rank * width * 4, width * 4))?;
        tree_sum(&mut self.room[..self.world * width], width, buffer);
        Ok(())
    }

    /// Every rank sums its share of `buffer`, at most [`CHUNK`] elements, then gathers the others': two exchanges.
    fn reduce_large(&mut self, buffer: &mut [f32]) -> Result<()> {
        let (rank, world, length) = (self.rank, self.world, buffer.len());
        let mine = share(length, world, rank);
        let width = mine.len();
        // `room`: the whole buffer, then every rank's part of this rank's share.
        self.begin(length + world * width)?;
        self.room[..length].copy_from_slice(buffer);
        self.room[length + rank * width..][..width].copy_from_slice(&buffer[mine.clone()]);
        for peer in self.others() {
            self.receive(Tag::Reduce, peer, (length + peer * width) * 4, width * 4)?;
        }
        for peer in self.others() {
            let theirs = share(length, world, peer);
            self.send(Tag::Reduce, peer, theirs.start * 4, theirs.len() * 4)?;
        }
        self.complete(Tag::Reduce)?;
        let (whole, parts) = self.room.split_at_mut(length);
        tree_sum(&mut parts[..world * width], width, &mut whole[mine]);
        self.exchange(Tag::Reduce, |rank| {
            let theirs = share(length, world, rank);
            (theirs.start * 4, theirs.len() * 4)
        })?;
        buffer.copy_from_slice(&self.room[..length]);
        Ok(())
    }

    /// Copies `bytes` into `room` from byte `offset`.
    fn put(&mut self, offset: usize, bytes: &[u8]) {
        let room = self.bytes(offset, bytes.len());
        // SAFETY: `room` has space for them, as `bytes()` checks, and is not part of `bytes`.
        unsafe { room.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) }
    }

    /// Copies `room`'s bytes from `offset` into `bytes`.
    fn take(&mut self, offset: usize, bytes: &mut [u8]) {
        let room = self.bytes(offset, bytes.len());
        // SAFETY: as in `put`; f32s have no padding, so all their bytes are initialised.
        unsafe { bytes.as_mut_ptr().copy_from_nonoverlapping(room, bytes.len()) }
    }

    fn gather(&mut self, mine: &[u8], all: &mut [u8]) -> Result<()> {
        let (world, length) = (self.world, mine.len());
        let most = CHUNK * 4 / world;
        for begin in (0..length.max(1)).step_by(most) {
            let part = (length - begin).min(most);
            self.begin((world * part).div_ceil(4))?;
            self.put(self.rank * part, &mine[begin..][..part]);
            self.exchange(Tag::Gather, |rank| (rank * part, part))?;
            for rank in 0..world {
                self.take(rank * part, &mut all[rank * length + begin..][..part]);
            }
        }
        Ok(())
    }

    fn cast(&mut self, message: &mut Vec<u8>, patience: Option<Duration>) -> Result<()> {
        if self.rank == 0 {
            if message.len() > c_int::MAX as usize {
                return Err(Error::Internal(format!("broadcast of {} bytes", message.len())));
            }
            self.begin(message.len().div_ceil(4))?;
            self.put(0, message);
            for peer in self.others() {
                self.send(Tag::Broadcast, peer, 0, message.len())?;
            }
            return self.complete(Tag::Broadcast);
        }
        self.begin(0)?;
        let mut length = 0;
        let waited = self.wait(patience, |comm| {
            let found = comm.probe(Some(0), Tag::Broadcast)?;
            length = found.map_or(0, |(_, length)| length);
            Ok(found.is_some())
        })?;
        match waited {
            Waited::Done => {}
            Waited::Called => return Err(self.inquest(Tag::Broadcast, &[0])),
            Waited::Expired => {
                let what = format!("broadcast nothing for {:?}", patience.unwrap_or_default());
                return Err(Error::Rank { rank: 0, what });
            }
        }
        if self.room.len() < length.div_ceil(4) {
            self.room.resize(length.div_ceil(4), 0.0);
        }
        self.receive(Tag::Broadcast, 0, 0, length)?;
        self.complete(Tag::Broadcast)?;
        message.resize(length, 0);
        self.take(0, message);
        Ok(())
    }
}

impl Communicator for MpiComm {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world(&self) -> usize {
        self.world
    }

    fn local(&self) -> (usize, usize) {
        self.local
    }

    fn all_reduce(&mut self, buffer: &mut [f32]) -> Result<()> {
        if is_small(buffer.len(), self.world) {
            let done = self.reduce_small(buffer);
            return self.keep(done);
        }
        for chunk in buffer.chunks_mut(CHUNK) {
            let done = self.reduce_large(chunk);
            self.keep(done)?;
        }
        Ok(())
    }

    fn all_gather(&mut self, mine: &[u8], all: &mut [u8]) -> Result<()> {
        check_gather(mine, all, self.world)?;
        let done = self.gather(mine, all);
        self.keep(done)
    }

    fn broadcast(&mut self, message: &mut Vec<u8>, patience: Option<Duration>) -> Result<()> {
        let done = self.cast(message, patience);
        self.keep(done)
    }

    fn guard(&mut self, beyond: Option<Duration>) {
        self.watch.come_back();
        if let Some(beyond) = beyond.filter(|_| self.world > 1) {
            self.watch.go_outside(self.watchdog + beyond, self.count);
        }
    }

    fn progress(&mut self, counter: Arc<AtomicU64>) {
        self.watch.follow(counter);
    }

    fn arrived(&mut self) -> Result<bool> {
        self.watch.come_back();
        // Whoever gives up is heard in the broadcast.
        Ok(self.lost.is_some()
            || self.probe(Some(0), Tag::Broadcast)?.is_some()
            || self.probe(None, Tag::GiveUp)?.is_some())
    }

    fn barrier(&mut self) -> Result<()> {
        let done = self.begin(0).and_then(|()| self.exchange(Tag::Barrier, |_| (0, 0)));
        self.keep(done)
    }

    fn set_watchdog(&mut self, bound: Duration) {
        self.watchdog = bound;
    }

    fn abort(&mut self, code: i32, why: &str) {
        tell(&format!("rank {}: {why}", self.rank));
        self.watch.come_back();
        self.watch.arm(SLACK);
        // SAFETY: the communicator is valid. What MPI_Abort needs of mpirun it waits for; the watch bounds that.
        unsafe { ffi::MPI_Abort(self.comm, code) };
        watch::end(self.rank, "MPI_Abort has returned");
    }

    fn finish(mut self: Box<Self>) -> Result<()> {
        self.barrier()?;
        self.watch.arm(MEETING);
        // SAFETY: all ranks have passed the barrier, no request is under way, and `self` goes: no call follows.
        let code = unsafe { ffi::MPI_Finalize() };
        self.watch.disarm();
        check(self.rank, code)
    }
}

impl Drop for MpiComm {
    fn drop(&mut self) {
        if self.lost.is_some() {
            std::mem::forget(std::mem::take(&mut self.room));
        }
    }
}

/// Rank and size in `comm`, which must be valid.
///
/// # Safety
/// MPI is initialised, and `comm` is a communicator.
unsafe fn place(rank: usize, comm: ffi::MPI_Comm) -> Result<(usize, usize)> {
    let (mut own, mut size) = (0, 0);
    // SAFETY: the caller's.
    unsafe {
        check(rank, ffi::MPI_Comm_rank(comm, &mut own))?;
        check(rank, ffi::MPI_Comm_size(comm, &mut size))?;
    }
    Ok((own as usize, size as usize))
}

/// An error code of MPI's, as an error about `rank` with MPI's own words.
fn check(rank: usize, code: c_int) -> Result<()> {
    if code == ffi::MPI_SUCCESS as c_int {
        return Ok(());
    }
    let mut text = [0u8; 4096];
    let mut length = 0;
    // SAFETY: the buffer is longer than MPI_MAX_ERROR_STRING of any implementation.
    unsafe { ffi::MPI_Error_string(code, text.as_mut_ptr().cast::<c_char>(), &mut length) };
    let words = String::from_utf8_lossy(&text[..length.clamp(0, text.len() as c_int) as usize]).into_owned();
    Err(Error::Rank { rank, what: words })
}

/// The sender and the length of a message that has come to `rank`, from `source` or from anyone, but not been received.
pub(super) fn probe(
    comm: ffi::MPI_Comm,
    rank: usize,
    source: Option<usize>,
    tag: Tag,
) -> Result<Option<(usize, usize)>> {
    let mut found = 0;
    // SAFETY: an all-zero MPI_Status is a valid value of that plain struct of integers.
    let mut status: ffi::MPI_Status = unsafe { std::mem::zeroed() };
    // SAFETY: the communicator is valid, and the results are written to live variables.
    let code = unsafe {
        let source = source.map_or(ffi::RSMPI_ANY_SOURCE, |rank| rank as c_int);
        ffi::MPI_Iprobe(source, tag as c_int, comm, &mut found, &mut status)
    };
    check(rank, code)?;
    if found == 0 {
        return Ok(None);
    }
    let sender = status.MPI_SOURCE as usize;
    Ok(Some((sender, message_length(sender, &status)?)))
}

/// The length in bytes of the message from `rank` that `status` describes.
fn message_length(rank: usize, status: &ffi::MPI_Status) -> Result<usize> {
    let mut length = 0;
    // SAFETY: `status` was filled by a completed receive or probe.
    check(rank, unsafe { ffi::MPI_Get_count(status, ffi::RSMPI_UINT8_T, &mut length) })?;
    Ok(usize::try_from(length).unwrap_or(0))
}

pub(super) fn null_request() -> ffi::MPI_Request {
    // SAFETY: a constant of the MPI library, set before `main`.
    unsafe { ffi::RSMPI_REQUEST_NULL }
}

/// " (also silent: ranks 3, 5)" for those beside `rank`.
fn also(rank: usize, silent: &[usize]) -> String {
    let rest: Vec<usize> = silent.iter().copied().filter(|&other| other != rank).collect();
    if rest.is_empty() { String::new() } else { format!(" (also silent: {})", name_ranks(&rest)) }
}
