//! NCCL: sums on the GPUs' own links, on the stream that computes, inside graphs too.
//!
//! It is opened at run time through a small table of our own, because the handle is needed for abort and asynchronous
//! errors, and because the file is called `libnccl.so.2` nearly everywhere.
//!
//! Where NCCL has them (2.27 on) and `NCCL_WIN_ENABLE=1` asks for them, buffers that are summed are symmetric windows:
//! memory that every rank registers alike, so that the kernels read and write the other ranks' copies themselves.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Arc, OnceLock};
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
        all_gather: c"ncclAllGather" fn(u64, u64, usize, c_int, *mut c_void, *mut c_void) -> c_int,
        async_error: c"ncclCommGetAsyncError" fn(*mut c_void, *mut c_int) -> c_int,
        abort: c"ncclCommAbort" fn(*mut c_void) -> c_int,
        destroy: c"ncclCommDestroy" fn(*mut c_void) -> c_int,
        error_text: c"ncclGetErrorString" fn(c_int) -> *const c_char,
        last_error: c"ncclGetLastError" fn(*mut c_void) -> *const c_char,
    }
}

functions! {
    /// Those for memory that all ranks register.
    struct Windows {
        alloc: c"ncclMemAlloc" fn(*mut u64, usize) -> c_int,
        free: c"ncclMemFree" fn(u64) -> c_int,
        register: c"ncclCommWindowRegister" fn(*mut c_void, u64, usize, *mut *mut c_void, c_int) -> c_int,
        deregister: c"ncclCommWindowDeregister" fn(*mut c_void, *mut c_void) -> c_int,
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
/// NCCL_WIN_COLL_SYMMETRIC: every rank's window is alike.
const SYMMETRIC: c_int = 1;
/// ncclUint8.
const BYTE: c_int = 1;

/// One rank's end of an NCCL communicator over the whole world, one GPU a rank.
pub struct Nccl {
    end: Arc<End>,
    rank: usize,
    windows: bool,
}

/// What registered memory shares with the communicator, which may end before it.
struct End {
    api: &'static Api,
    /// Null once the communicator has ended.
    handle: AtomicPtr<c_void>,
}

/// Memory of NCCL's that all ranks have registered.
pub(crate) struct Window {
    end: Arc<End>,
    windows: &'static Windows,
    at: u64,
    /// Null where NCCL takes no windows.
    window: AtomicPtr<c_void>,
}

fn api() -> Result<&'static Api> {
    loaded().map(|(api, _)| api)
}

/// NCCL, and its windows where it has them.
fn loaded() -> Result<(&'static Api, Option<&'static Windows>)> {
    static LOADED: OnceLock<Result<(Api, Option<Windows>)>> = OnceLock::new();
    let loaded = LOADED.get_or_init(|| {
        if std::env::var_os("NCCL_NVLS_ENABLE").is_none() {
            // SAFETY: before NCCL is opened, by the thread that loads the rank. NVLink multicast can leave a shared
            // host's GPUs unusable when a process dies, so it is only used where the user asks for it.
            unsafe { std::env::set_var("NCCL_NVLS_ENABLE", "0") };
        }
        let library = library::open(&library::NCCL)?;
        let api = Api::load(&library)?;
        let mut version = 0;
        // SAFETY: an out-parameter.
        unsafe { (api.version)(&mut version) };
        if version < 21000 {
            return Err(library.too_old(&format!("it is version {version}, without sums in bf16")));
        }
        Ok((api, Windows::load(&library).ok()))
    });
    loaded.as_ref().map(|(api, windows)| (api, windows.as_ref())).map_err(Clone::clone)
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

/// The version as people write it, "2.28.9".
pub(crate) fn version_text() -> String {
    let v = version().unwrap_or(0);
    format!("{}.{}.{}", v / 10000, v / 100 % 100, v % 100)
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
        let end = Arc::new(End { api, handle: AtomicPtr::new(handle) });
        let mut nccl = Nccl { end, rank: comm.rank(), windows: false };
        // A small one first: all ranks have windows or none has.
        let wanted = std::env::var("NCCL_WIN_ENABLE").is_ok_and(|value| value != "0");
        let tried = wanted && nccl.window(1 << 20).is_ok_and(|w| w.is_some_and(|w| w.is_registered()));
        let mut everyone = vec![0; comm.world()];
        comm.all_gather(&[u8::from(tried)], &mut everyone)?;
        nccl.windows = everyone.iter().all(|&has| has == 1);
        Ok(nccl)
    }

    fn handle(&self) -> *mut c_void {
        self.end.handle.load(Ordering::Relaxed)
    }

    /// Whether summed buffers are symmetric windows.
    pub fn has_windows(&self) -> bool {
        self.windows
    }

    /// Memory for a buffer that will be summed, `None` where there are no windows. Every rank calls it alike.
    pub(crate) fn summed(&self, bytes: usize) -> Result<Option<Window>> {
        if self.windows { self.window(bytes) } else { Ok(None) }
    }

    fn window(&self, bytes: usize) -> Result<Option<Window>> {
        let (api, Some(windows)) = loaded()? else { return Ok(None) };
        let (mut at, mut window) = (0, null());
        // SAFETY: an out-parameter; then memory of that size, and a live communicator.
        unsafe {
            check(api, (windows.alloc)(&mut at, bytes), null(), "allocating a window")?;
            let status = (windows.register)(self.handle(), at, bytes, &mut window, SYMMETRIC);
            let made = Window { end: self.end.clone(), windows, at, window: AtomicPtr::new(window) };
            check(api, status, self.handle(), "registering a window")?;
            Ok(Some(made))
        }
    }

    /// Enqueues the sum over all ranks of `count` elements at `at`, in place; bitwise equal everywhere.
    pub(crate) fn all_reduce(&self, at: u64, count: usize, element: Element, stream: *mut c_void) -> Result<()> {
        // SAFETY: memory of `count` elements on this rank's GPU, a live communicator and stream.
        let status = unsafe { (self.end.api.all_reduce)(at, at, count, element as c_int, SUM, self.handle(), stream) };
        check(self.end.api, status, self.handle(), "all-reduce")
    }

    /// Enqueues the gathering of `bytes` bytes at `mine` from every rank, in rank order, at `all`.
    pub(crate) fn all_gather(&self, mine: u64, all: u64, bytes: usize, stream: *mut c_void) -> Result<()> {
        // SAFETY: memory of `bytes` and of as many for each rank on this rank's GPU, a live communicator and stream.
        let status = unsafe { (self.end.api.all_gather)(mine, all, bytes, BYTE, self.handle(), stream) };
        check(self.end.api, status, self.handle(), "all-gather")
    }

    /// An error that has come up since, in a kernel or a link; the watchdog polls it.
    pub fn poll(&self) -> Result<()> {
        let mut status = 0;
        // SAFETY: an out-parameter.
        unsafe { (self.end.api.async_error)(self.handle(), &mut status) };
        if status == IN_PROGRESS {
            return Ok(());
        }
        check(self.end.api, status, self.handle(), "a rank or a link failed").map_err(|e| match e {
            Error::Device(what) => Error::Rank { rank: self.rank, what },
            other => other,
        })
    }

    /// Ends kernels that wait for other ranks; nothing more can be summed.
    pub fn abort(&mut self) {
        let handle = self.end.handle.swap(null(), Ordering::Relaxed);
        if !handle.is_null() {
            // SAFETY: a live communicator, given up here.
            unsafe { (self.end.api.abort)(handle) };
        }
    }

    /// Leaves in good order; every rank calls it, with nothing enqueued.
    pub fn finish(self) {
        let handle = self.end.handle.swap(null(), Ordering::Relaxed);
        if !handle.is_null() {
            // SAFETY: a live communicator, given up here.
            unsafe { (self.end.api.destroy)(handle) };
        }
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        self.abort();
    }
}

impl Window {
    /// Its address on the GPU.
    pub fn at(&self) -> u64 {
        self.at
    }

    fn is_registered(&self) -> bool {
        !self.window.load(Ordering::Relaxed).is_null()
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        let (handle, window) = (self.end.handle.load(Ordering::Relaxed), self.window.load(Ordering::Relaxed));
        // SAFETY: ours, and the owner has waited for what used it. A communicator that has ended took its windows along.
        unsafe {
            if !handle.is_null() && !window.is_null() {
                (self.windows.deregister)(handle, window);
            }
            (self.windows.free)(self.at);
        }
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
