//! NCCL: sums on the GPUs' own links, on the stream that computes, inside graphs too.
//!
//! It is opened at run time through a small table of our own, because the handle is needed for abort and asynchronous
//! errors, and because the file is called `libnccl.so.2` nearly everywhere.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::OnceLock;
use std::time::Duration;

use super::Communicator;
use crate::backend::cuda::library::{self, functions};
use crate::error::{Error, Result};

/// ncclUniqueId.
#[repr(C)]
#[derive(Clone, Copy)]
struct UniqueId([u8; 128]);

functions! {
    /// NCCL's functions; 0 is success.
    struct Api {
        version: c"ncclGetVersion" fn(*mut c_int) -> c_int,
        unique_id: c"ncclGetUniqueId" fn(*mut UniqueId) -> c_int,
        init: c"ncclCommInitRank" fn(*mut *mut c_void, c_int, UniqueId, c_int) -> c_int,
        all_reduce: c"ncclAllReduce" fn(u64, u64, usize, c_int, c_int, *mut c_void, *mut c_void) -> c_int,
        async_error: c"ncclCommGetAsyncError" fn(*mut c_void, *mut c_int) -> c_int,
        abort: c"ncclCommAbort" fn(*mut c_void) -> c_int,
        destroy: c"ncclCommDestroy" fn(*mut c_void) -> c_int,
        error_text: c"ncclGetErrorString" fn(c_int) -> *const c_char,
        last_error: c"ncclGetLastError" fn(*mut c_void) -> *const c_char,
    }
}

/// Element types that are summed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Element {
    /// float32.
    F32 = 7,
    /// bfloat16, each sum rounded to it.
    Bf16 = 9,
}

/// NCCL's own state, so that errors beyond the immediate ones are found.
const IN_PROGRESS: c_int = 7;
const SUM: c_int = 0;

/// One rank's end of an NCCL communicator over the whole world, one GPU a rank.
pub struct Nccl {
    api: &'static Api,
    handle: *mut c_void,
    rank: usize,
}

// SAFETY: the handle is used from one thread at a time.
unsafe impl Send for Nccl {}

fn api() -> Result<&'static Api> {
    static API: OnceLock<Result<Api>> = OnceLock::new();
    let api = API.get_or_init(|| {
        if std::env::var_os("NCCL_NVLS_ENABLE").is_none() {
            // SAFETY: before NCCL is opened, by the thread that loads the rank. NVLink multicast can leave a shared
            // host's GPUs unusable when a process dies, so it is only used where the user asks for it.
            unsafe { std::env::set_var("NCCL_NVLS_ENABLE", "0") };
        }
        Api::load(&library::open(&library::NCCL)?)
    });
    api.as_ref().map_err(Clone::clone)
}

/// NCCL's version, 22809 for 2.28.9.
///
/// # Errors
/// [`Error::Device`] where there is no NCCL.
pub fn version() -> Result<usize> {
    let mut version = 0;
    // SAFETY: an out-parameter.
    unsafe { (api()?.version)(&mut version) };
    Ok(version as usize)
}

impl Nccl {
    /// Joins the world of `comm`: rank 0 makes the id and broadcasts it. The rank's GPU is current on this thread.
    ///
    /// # Errors
    /// [`Error::Device`] in NCCL's words.
    pub fn new(comm: &mut dyn Communicator, patience: Duration) -> Result<Nccl> {
        // Every rank looks for NCCL before any waits for another one.
        let api = api();
        super::agree(comm, "NCCL's presence", u64::from(api.is_ok()))?;
        let api = api?;
        if version()? < 21000 {
            return Err(Error::Device(format!("NCCL {} has no bf16 sums: install 2.24 or newer", version()?)));
        }
        let mut id = UniqueId([0; 128]);
        if comm.rank() == 0 {
            // SAFETY: an out-parameter.
            check(api, unsafe { (api.unique_id)(&mut id) }, null(), "making an id")?;
        }
        let mut message = id.0.to_vec();
        comm.broadcast(&mut message, Some(patience))?;
        if message.len() != id.0.len() {
            return Err(Error::Internal(format!("an NCCL id of {} bytes", message.len())));
        }
        id.0.copy_from_slice(&message);
        let mut handle = null();
        let (world, rank) = (comm.world() as c_int, comm.rank() as c_int);
        // SAFETY: an out-parameter and an id by value.
        check(api, unsafe { (api.init)(&mut handle, world, id, rank) }, null(), "joining the ranks")?;
        Ok(Nccl { api, handle, rank: comm.rank() })
    }

    /// Enqueues the sum over all ranks of `count` elements at `at`, in place; bitwise equal everywhere.
    pub(crate) fn all_reduce(&self, at: u64, count: usize, element: Element, stream: *mut c_void) -> Result<()> {
        // SAFETY: memory of `count` elements on this rank's GPU, a live communicator and stream.
        let status = unsafe { (self.api.all_reduce)(at, at, count, element as c_int, SUM, self.handle, stream) };
        check(self.api, status, self.handle, "all-reduce")
    }

    /// An error that has come up since, in a kernel or a link; the watchdog polls it.
    pub fn poll(&self) -> Result<()> {
        let mut status = 0;
        // SAFETY: an out-parameter.
        unsafe { (self.api.async_error)(self.handle, &mut status) };
        if status == IN_PROGRESS {
            return Ok(());
        }
        check(self.api, status, self.handle, "a rank or a link failed").map_err(|e| match e {
            Error::Device(what) => Error::Rank { rank: self.rank, what },
            other => other,
        })
    }

    /// Ends kernels that wait for other ranks; nothing more can be summed.
    pub fn abort(&mut self) {
        let handle = std::mem::replace(&mut self.handle, null());
        if !handle.is_null() {
            // SAFETY: a live communicator, given up here.
            unsafe { (self.api.abort)(handle) };
        }
    }

    /// Leaves in good order; every rank calls it, with nothing enqueued.
    pub fn finish(mut self) {
        let handle = std::mem::replace(&mut self.handle, null());
        if !handle.is_null() {
            // SAFETY: a live communicator, given up here.
            unsafe { (self.api.destroy)(handle) };
        }
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        self.abort();
    }
}

fn null() -> *mut c_void {
    std::ptr::null_mut()
}

fn check(api: &Api, status: c_int, handle: *mut c_void, what: &str) -> Result<()> {
    if status == 0 || status == IN_PROGRESS {
        return Ok(());
    }
    // SAFETY: NCCL's static texts, or null.
    let text = |p: *const c_char| unsafe {
        if p.is_null() { String::new() } else { CStr::from_ptr(p).to_string_lossy().into_owned() }
    };
    // SAFETY: plain look-ups.
    let (error, last) = unsafe { (text((api.error_text)(status)), text((api.last_error)(handle))) };
    let last = if last.is_empty() { String::new() } else { format!(" ({})", last.trim()) };
    Err(Error::Device(format!("NCCL: {what}: {error}{last}; NCCL_DEBUG=INFO says more")))
}
