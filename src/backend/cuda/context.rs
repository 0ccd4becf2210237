//! The driver: which GPUs there are, one rank's GPU with its stream, and memory on it.

use std::ffi::c_void;
use std::sync::atomic::AtomicU32;
use std::sync::{Arc, OnceLock};

use cudarc::driver::result;
use cudarc::driver::sys::{self, CUdevice_attribute_enum as Attribute, CUresult};

use super::library;
use crate::comm::nccl::Window;
use crate::error::{Error, Result};

/// A GPU as the driver describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GpuInfo {
    /// The driver's number for it, after CUDA_VISIBLE_DEVICES.
    pub ordinal: usize,
    /// "NVIDIA H200".
    pub name: String,
    /// Compute capability, (9, 0) on Hopper.
    pub capability: (u32, u32),
    /// Multiprocessors.
    pub multiprocessors: usize,
    /// Bytes of its memory.
    pub memory: usize,
    /// Bytes of shared memory that a block may ask for.
    pub shared_memory: usize,
    /// The driver's CUDA version, 13000 for 13.0.
    pub driver: usize,
}

/// Turns a driver call's answer into ours, naming what was being done.
pub(crate) fn check(result: CUresult, what: &str) -> Result<()> {
    if result == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let error = result::DriverError(result);
    let text = error.error_string().map_or_else(|_| "unknown".into(), |t| t.to_string_lossy().into_owned());
    Err(Error::Device(format!("CUDA: {what}: {text} ({result:?})")))
}

/// Opens the driver once and starts it.
fn driver() -> Result<usize> {
    static DRIVER: OnceLock<Result<usize>> = OnceLock::new();
    DRIVER
        .get_or_init(|| {
            // cudarc looks for libcuda by file name and panics without it; once it is open, wherever it was found, the
            // loader knows it by that name.
            let library = library::open(&library::DRIVER)?;
            library.symbol(c"cuLaunchKernelEx")?;
            let mut version = 0;
            // SAFETY: the driver is open; these calls take no pointers but the one to `version`.
            unsafe {
                check(sys::cuInit(0), "starting the driver (no usable GPU?)")?;
                check(sys::cuDriverGetVersion(&mut version), "asking the driver's version")?;
            }
            if version < 12000 {
                return Err(library.too_old(&format!("it is for CUDA {}.{}", version / 1000, version % 1000 / 10)));
            }
            Ok(version as usize)
        })
        .clone()
}

/// The GPUs of this machine, or why there are none to use.
///
/// # Errors
/// [`Error::Device`] where there is no driver, it is too old, or it shows no GPU from compute capability 8.0 on.
pub fn available() -> Result<Vec<GpuInfo>> {
    let version = driver()?;
    let count = result::device::get_count().map_err(|e| Error::Device(format!("CUDA: counting GPUs: {e:?}")))?;
    let gpus = (0..count.max(0) as usize).map(|i| describe(i, version)).collect::<Result<Vec<_>>>()?;
    if let Some(old) = gpus.iter().find(|g| g.capability.0 < 8) {
        let (major, minor) = old.capability;
        let what =
            format!("{} (GPU {}) has compute capability {major}.{minor}; 8.0 is the oldest", old.name, old.ordinal);
        return Err(Error::Device(format!(
            "{what} that gqla runs on: hide it with CUDA_VISIBLE_DEVICES, or use --device cpu"
        )));
    }
    if gpus.is_empty() {
        return Err(Error::Device("the NVIDIA driver shows no GPU (is CUDA_VISIBLE_DEVICES empty?)".into()));
    }
    Ok(gpus)
}

fn describe(ordinal: usize, driver: usize) -> Result<GpuInfo> {
    let fail = |e| Error::Device(format!("CUDA: asking about GPU {ordinal}: {e:?}"));
    let device = result::device::get(ordinal as i32).map_err(fail)?;
    // SAFETY: a device of the driver's.
    let attribute = |a| unsafe { result::device::get_attribute(device, a) }.map_err(fail);
    Ok(GpuInfo {
        ordinal,
        name: result::device::get_name(device).map_err(fail)?,
        capability: (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)? as u32,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)? as u32,
        ),
        multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize,
        // SAFETY: a device of the driver's.
        memory: unsafe { result::device::total_mem(device) }.map_err(fail)?,
        shared_memory: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as usize,
        driver,
    })
}

/// One rank's GPU: its context and the one stream that everything runs on.
pub struct Gpu {
    /// What it is.
    pub info: GpuInfo,
    context: sys::CUcontext,
    device: sys::CUdevice,
    stream: sys::CUstream,
    /// Bytes that were free when only the context was there.
    free: usize,
}

// SAFETY: driver handles may be used from any thread; `attach` makes the context current on the thread that works.
unsafe impl Send for Gpu {}
// SAFETY: as above; the driver's calls are thread-safe.
unsafe impl Sync for Gpu {}

impl Gpu {
    /// GPU number `ordinal`, its context current on this thread.
    pub fn open(ordinal: usize) -> Result<Arc<Gpu>> {
        let gpus = available()?;
        let Some(info) = gpus.get(ordinal).cloned() else {
            let what = format!("this rank needs GPU {ordinal}, and there are {}", gpus.len());
            let remedy = "start fewer ranks on this host, or let ranks share GPUs with --share-gpus (slow, for tests)";
            return Err(Error::Device(format!("{what}: {remedy}")));
        };
        let (mut context, mut stream, mut device, mut free, mut total) = (null(), null(), 0, 0, 0);
        // SAFETY: out-parameters of the right types, in the order the driver wants.
        unsafe {
            check(sys::cuDeviceGet(&mut device, ordinal as i32), "opening the GPU")?;
            check(sys::cuDevicePrimaryCtxRetain(&mut context, device), "making a context on the GPU")?;
            check(sys::cuCtxSetCurrent(context), "making the context current")?;
            let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
            check(sys::cuStreamCreate(&mut stream, flags), "making a stream")?;
            check(sys::cuMemGetInfo_v2(&mut free, &mut total), "asking for free memory")?;
        }
        Ok(Arc::new(Gpu { info, context, device, stream, free }))
    }

    /// Makes the context current on the calling thread; cheap when it is already.
    pub fn attach(&self) -> Result<()> {
        // SAFETY: a live context.
        check(unsafe { sys::cuCtxSetCurrent(self.context) }, "making the context current")
    }

    /// The stream.
    pub(crate) fn stream(&self) -> sys::CUstream {
        self.stream
    }

    /// Waits until everything enqueued has run.
    pub fn synchronize(&self) -> Result<()> {
        // SAFETY: a live stream.
        check(unsafe { sys::cuStreamSynchronize(self.stream) }, "waiting for the GPU")
    }

    /// Whether everything enqueued has run; the watchdog polls it.
    pub(crate) fn idle(&self) -> Result<bool> {
        // SAFETY: a live stream.
        match unsafe { sys::cuStreamQuery(self.stream) } {
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            other => check(other, "waiting for the GPU").map(|()| true),
        }
    }

    /// Bytes free and bytes in all, as the driver has them now.
    pub fn memory(&self) -> Result<(usize, usize)> {
        self.attach()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: out-parameters.
        check(unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) }, "asking for free memory")?;
        Ok((free, total))
    }

    /// Bytes that have gone since the context was made: all of them this rank's, where the GPU is not shared.
    pub fn taken(&self) -> Result<usize> {
        Ok(self.free.saturating_sub(self.memory()?.0))
    }

    /// Compute capability as one number, 90 on Hopper.
    pub fn sm(&self) -> u32 {
        self.info.capability.0 * 10 + self.info.capability.1
    }

    /// Enqueues a copy from host memory, which must stay as it is until the copy is done ([`Event`]).
    pub(crate) fn upload(&self, to: u64, from: &[u8]) -> Result<()> {
        // SAFETY: the caller's destination has the room; page-locked sources are kept until an event says so.
        check(
            unsafe { sys::cuMemcpyHtoDAsync_v2(to, from.as_ptr().cast(), from.len(), self.stream) },
            "copying to the GPU",
        )
    }

    /// Enqueues a copy to host memory, done after [`synchronize`](Gpu::synchronize).
    pub(crate) fn download(&self, from: u64, to: &mut [u8]) -> Result<()> {
        let pointer = to.as_mut_ptr().cast();
        // SAFETY: `to` has the room and outlives the copy: every caller synchronises before it lets go.
        check(unsafe { sys::cuMemcpyDtoHAsync_v2(pointer, from, to.len(), self.stream) }, "copying from the GPU")
    }

    /// Whether the stream is being recorded as a graph.
    pub(crate) fn recording(&self) -> Result<bool> {
        let mut status = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        // SAFETY: a live stream and an out-parameter.
        check(unsafe { sys::cuStreamIsCapturing(self.stream, &mut status) }, "asking a stream")?;
        Ok(status != sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
    }

    /// The GPU's milliseconds of what `body` enqueues.
    pub(crate) fn time(&self, body: impl FnOnce() -> Result<()>) -> Result<f32> {
        let (mut start, mut end, mut milliseconds) = (null(), null(), 0f32);
        // SAFETY: out-parameters and live handles.
        unsafe {
            check(sys::cuEventCreate(&mut start, 0), "making an event")?;
            check(sys::cuEventCreate(&mut end, 0), "making an event")?;
            check(sys::cuEventRecord(start, self.stream), "recording an event")?;
        }
        let done = body();
        // SAFETY: the events made above; they are let go on every way out.
        unsafe {
            let timed = check(sys::cuEventRecord(end, self.stream), "recording an event")
                .and_then(|()| check(sys::cuEventSynchronize(end), "waiting for an event"))
                .and_then(|()| check(sys::cuEventElapsedTime_v2(&mut milliseconds, start, end), "timing"));
            let _ = sys::cuEventDestroy_v2(start);
            let _ = sys::cuEventDestroy_v2(end);
            done.and(timed)?;
        }
        Ok(milliseconds)
    }

    /// Enqueues a copy of `count` bytes on the GPU.
    pub(crate) fn copy(&self, from: u64, to: u64, count: usize) -> Result<()> {
        // SAFETY: the caller's addresses are of allocations of at least `count` bytes.
        check(unsafe { sys::cuMemcpyDtoDAsync_v2(to, from, count, self.stream()) }, "copying on the GPU")
    }

    /// Enqueues setting `count` bytes at `at`.
    pub(crate) fn fill(&self, at: u64, byte: u8, count: usize) -> Result<()> {
        if count == 0 {
            return Ok(());
        }
        // SAFETY: the caller's memory.
        check(unsafe { sys::cuMemsetD8Async(at, byte, count, self.stream) }, "clearing memory")
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // SAFETY: nothing that uses them is left: every Memory and function holds an Arc of this.
        unsafe {
            let _ = sys::cuCtxSetCurrent(self.context);
            let _ = sys::cuStreamDestroy_v2(self.stream);
            let _ = sys::cuDevicePrimaryCtxRelease_v2(self.device);
        }
    }
}

/// A point in the stream that can be waited for.
pub(crate) struct Event {
    gpu: Arc<Gpu>,
    handle: sys::CUevent,
}

// SAFETY: driver handles may be used from any thread.
unsafe impl Send for Event {}

impl Event {
    pub fn new(gpu: &Arc<Gpu>) -> Result<Event> {
        Event::with(gpu, sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32)
    }

    /// One that time can be measured between.
    pub fn timed(gpu: &Arc<Gpu>) -> Result<Event> {
        Event::with(gpu, 0)
    }

    fn with(gpu: &Arc<Gpu>, flags: u32) -> Result<Event> {
        gpu.attach()?;
        let mut handle = null();
        // SAFETY: an out-parameter.
        check(unsafe { sys::cuEventCreate(&mut handle, flags) }, "making an event")?;
        Ok(Event { gpu: gpu.clone(), handle })
    }

    /// Marks everything enqueued so far.
    pub fn record(&self) -> Result<()> {
        // SAFETY: live handles.
        check(unsafe { sys::cuEventRecord(self.handle, self.gpu.stream) }, "recording an event")
    }

    /// Whether what was marked has run; nothing marked has.
    pub fn done(&self) -> Result<bool> {
        // SAFETY: a live handle.
        match unsafe { sys::cuEventQuery(self.handle) } {
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            other => check(other, "waiting for an event").map(|()| true),
        }
    }

    /// Waits for what was marked; nothing if nothing was.
    pub fn wait(&self) -> Result<()> {
        // SAFETY: a live handle.
        check(unsafe { sys::cuEventSynchronize(self.handle) }, "waiting for an event")
    }

    /// The GPU's time from `earlier` to here, both of them timed and done.
    pub fn since(&self, earlier: &Event) -> Result<std::time::Duration> {
        let mut milliseconds = 0f32;
        // SAFETY: an out-parameter and live handles.
        check(unsafe { sys::cuEventElapsedTime_v2(&mut milliseconds, earlier.handle, self.handle) }, "timing")?;
        Ok(std::time::Duration::from_secs_f64(f64::from(milliseconds.max(0.0)) * 1e-3))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: ours.
        unsafe {
            let _ = sys::cuCtxSetCurrent(self.gpu.context);
            let _ = sys::cuEventDestroy_v2(self.handle);
        }
    }
}

/// A null handle or pointer.
pub(crate) fn null<T>() -> *mut T {
    std::ptr::null_mut()
}

/// Memory on the GPU.
pub struct Memory {
    gpu: Arc<Gpu>,
    at: u64,
    bytes: usize,
    /// NCCL's, where it is memory that ranks sum.
    window: Option<Window>,
}

impl Memory {
    /// `bytes` zeroed bytes, 256-byte aligned.
    ///
    /// # Errors
    /// [`Error::Memory`] when the GPU has no room.
    pub fn new(gpu: &Arc<Gpu>, bytes: usize) -> Result<Memory> {
        let memory = Memory::uninit(gpu, bytes)?;
        gpu.fill(memory.at, 0, bytes)?;
        Ok(memory)
    }

    /// As [`new`](Memory::new), with whatever the memory held.
    pub(crate) fn uninit(gpu: &Arc<Gpu>, bytes: usize) -> Result<Memory> {
        gpu.attach()?;
        let mut at = 0;
        // SAFETY: an out-parameter.
        match unsafe { sys::cuMemAlloc_v2(&mut at, bytes.max(256)) } {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                let (free, total) = gpu.memory()?;
                Err(Error::Memory(format!(
                    "GPU {} ({}) has {} MiB of {} MiB free, and {} MiB more are needed: use more ranks, a smaller \
                     cache (--cache-tokens), or --gpu-memory-utilization with a smaller figure",
                    gpu.info.ordinal,
                    gpu.info.name,
                    free >> 20,
                    total >> 20,
                    bytes.div_ceil(1 << 20)
                )))
            }
            other => {
                check(other, "allocating GPU memory").map(|()| Memory { gpu: gpu.clone(), at, bytes, window: None })
            }
        }
    }

    /// `bytes` zeroed bytes in a window of NCCL's.
    pub(crate) fn of_window(gpu: &Arc<Gpu>, window: Window, bytes: usize) -> Result<Memory> {
        let memory = Memory { gpu: gpu.clone(), at: window.at(), bytes, window: Some(window) };
        gpu.fill(memory.at, 0, bytes)?;
        Ok(memory)
    }

    /// Its address on the GPU.
    pub fn at(&self) -> u64 {
        self.at
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated by cuMemAlloc in this context, and nobody else frees it. Freeing waits for the GPU's work; a
        // window frees itself, and does not.
        unsafe {
            let _ = sys::cuCtxSetCurrent(self.gpu.context);
            if self.window.is_some() {
                let _ = sys::cuStreamSynchronize(self.gpu.stream);
            } else {
                let _ = sys::cuMemFree_v2(self.at);
            }
        }
    }
}

/// Page-locked host memory: copies from it need no staging.
pub(crate) struct Pinned {
    gpu: Arc<Gpu>,
    at: *mut c_void,
    bytes: usize,
}

// SAFETY: owned memory.
unsafe impl Send for Pinned {}

impl Pinned {
    /// `bytes` zeroed bytes.
    pub fn new(gpu: &Arc<Gpu>, bytes: usize) -> Result<Pinned> {
        gpu.attach()?;
        let mut at = null();
        // SAFETY: an out-parameter; the memory is ours until cuMemFreeHost.
        unsafe {
            check(sys::cuMemHostAlloc(&mut at, bytes.max(64), 0), "allocating page-locked host memory")?;
            std::ptr::write_bytes(at.cast::<u8>(), 0, bytes.max(64));
        }
        Ok(Pinned { gpu: gpu.clone(), at, bytes })
    }

    /// Its bytes as words that the GPU reads and writes at any time.
    pub fn words(&self) -> &[AtomicU32] {
        // SAFETY: initialised, aligned to a page, and any bytes are a value.
        unsafe { std::slice::from_raw_parts(self.at.cast(), self.bytes / size_of::<AtomicU32>()) }
    }

    /// Its bytes as numbers; page-aligned.
    pub fn slice<T: Copy>(&self) -> &[T] {
        // SAFETY: initialised, aligned to a page, and T is a plain number here.
        unsafe { std::slice::from_raw_parts(self.at.cast(), self.bytes / size_of::<T>()) }
    }

    /// Its bytes as numbers; page-aligned.
    pub fn slice_mut<T: Copy>(&mut self) -> &mut [T] {
        // SAFETY: as above, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.at.cast(), self.bytes / size_of::<T>()) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: from cuMemHostAlloc; copies from it have been waited for or are waited for by the free.
        unsafe {
            let _ = sys::cuCtxSetCurrent(self.gpu.context);
            let _ = sys::cuStreamSynchronize(self.gpu.stream);
            let _ = sys::cuMemFreeHost(self.at);
        }
    }
}

/// A slice's bytes.
pub(crate) fn bytes_of<T: Copy>(data: &[T]) -> &[u8] {
    // SAFETY: plain numbers without padding.
    unsafe { std::slice::from_raw_parts(data.as_ptr().cast(), size_of_val(data)) }
}

/// A slice's bytes.
pub(crate) fn bytes_of_mut<T: Copy>(data: &mut [T]) -> &mut [u8] {
    // SAFETY: plain numbers without padding, of which any bytes are a value.
    unsafe { std::slice::from_raw_parts_mut(data.as_mut_ptr().cast(), size_of_val(data)) }
}
