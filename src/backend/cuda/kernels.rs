//! Kernels: compiled at load for the model's dimensions, kept by (source, constants), launched on the rank's stream.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::{CString, c_char, c_int, c_void};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};

use cudarc::driver::sys;

use super::context::{Gpu, check, null};
use super::library::{self, functions};
use crate::error::{Error, Result};

/// Text before every kernel's.
const COMMON: &str = include_str!("../../../kernels/common.cuh");

/// A kernel's source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Source {
    /// File name without `.cu`.
    pub name: &'static str,
    /// Its text.
    pub text: &'static str,
    /// Its constants that a launch needs to know (threads, shared memory); the host reads them from the compiled text,
    /// so that they are written down once.
    pub exports: &'static [&'static str],
    /// Needs sm_90a.
    pub hopper: bool,
}

macro_rules! sources {
    ($($(#[$doc:meta])* $konst:ident = $name:literal $(after $($before:literal)+)? $(exports $($export:literal)*)? $(on $hopper:ident)?;)*) => {
        $($(#[$doc])* pub const $konst: Source = Source {
            name: $name,
            text: concat!(
                $($(include_str!(concat!("../../../kernels/", $before, ".cu")),)+)?
                include_str!(concat!("../../../kernels/", $name, ".cu"))
            ),
            exports: &[$($($export),*)?],
            hopper: sources!(@ $($hopper)?),
        };)*
        /// Every source.
        pub const ALL: &[Source] = &[$($konst),*];
    };
    (@ hopper) => { true };
    (@) => { false };
}

/// The sources in `kernels/`.
pub mod source {
    use super::Source;
    sources! {
        /// Grouped decode attention on Hopper.
        GQA_DECODE = "gqa_decode" exports "GQA_THREADS" "GQA_SMEM" on hopper;
        /// Grouped decode attention elsewhere.
        GQA_DECODE_PORTABLE = "gqa_decode_portable" exports "THREADS" "PORTABLE_SMEM" "ROW_TILES";
        /// Latent decode attention on Hopper.
        ABSORB_DECODE = "absorb_decode" after "absorb_work" exports "THREADS" "SMEM_BYTES" "ROW_TILES" on hopper;
        /// Latent decode attention of few query rows on Hopper.
        ABSORB_DECODE_FEW = "absorb_decode_few" after "absorb_work" "wgmma" exports "FEW_THREADS" "FEW_SMEM" on hopper;
        /// Latent decode attention elsewhere.
        ABSORB_DECODE_PORTABLE = "absorb_decode_portable" exports "THREADS" "SMEM_BYTES" "ROW_TILES";
        /// The work split of grouped decode attention.
        SPLIT_PLAN = "split_plan" exports "PLAN_THREADS";
        /// The work split of latent decode attention.
        ABSORB_PLAN = "absorb_plan" exports "PLAN_WARPS";
        /// Joins partial results.
        COMBINE = "combine" exports "COMBINE_WARPS";
        /// Attention of longer chunks.
        PREFILL = "prefill" exports "PREFILL_THREADS" "PREFILL_SMEM" "MT";
        /// Rows of the embedding.
        EMBED = "embed";
        /// RMSNorms.
        NORM = "norm" exports "NORM_THREADS";
        /// Sums over ranks, residual and norm at once.
        ONE_SHOT = "one_shot_all_reduce" after "norm" exports "NORM_THREADS";
        /// Rotation and append, grouped layout.
        ROPE_APPEND_GROUPED = "rope_append_grouped" exports "VEC";
        /// Norms of latents, and their append.
        APPEND_LATENT = "append_latent" exports "LATENT_THREADS";
        /// Cached latents as rows of a matrix.
        GATHER_LATENTS = "gather_latents" exports "GATHER_THREADS";
        /// The absorb path's products.
        ABSORB_PRODUCT = "absorb_product" exports "QUERY_SMEM" "OUTPUT_SMEM";
        /// Partial results of latent decode attention, joined and taken through W_UV.
        COMBINE_OUTPUT = "combine_output" exports "COMBINE_OUTPUT_SMEM" on hopper;
        /// The gate of an MLP.
        SILU_MUL = "silu_mul";
        /// Products of few rows.
        GEMV = "gemv" after "skinny" exports "GEMV_THREADS" "GEMV_SMEM";
        /// Products of some more rows on Hopper.
        STREAM_PRODUCT = "stream_product" exports "STREAM_THREADS" "STREAM_SMEM" on hopper;
        /// The chosen experts.
        EXPERTS = "experts" after "skinny" exports "UP_SMEM" "DOWN_SMEM" "EXPERTS_THREADS";
        /// The chosen experts on Hopper.
        EXPERTS_HOPPER = "experts_hopper" after "skinny" "experts" "wgmma" exports "UP_BYTES" "DOWN_BYTES" "HOPPER_THREADS" on hopper;
        /// Experts' weights as Hopper's products want them.
        EXPERTS_TILE = "experts_tile";
        /// The choice of experts.
        ROUTE = "route";
        /// Rows of hidden states.
        SELECT_ROWS = "select_rows";
        /// The choice of tokens.
        CHOOSE = "choose" exports "CHOOSE_PARTS";
        /// Weights of benchmarks.
        DUMMY_WEIGHTS = "dummy_weights";
    }
}

functions! {
    /// NVRTC's functions.
    pub(crate) struct Nvrtc {
        version: c"nvrtcVersion" fn(*mut c_int, *mut c_int) -> c_int,
        create: c"nvrtcCreateProgram" fn(*mut *mut c_void, *const c_char, *const c_char, c_int, *const *const c_char, *const *const c_char) -> c_int,
        compile: c"nvrtcCompileProgram" fn(*mut c_void, c_int, *const *const c_char) -> c_int,
        destroy: c"nvrtcDestroyProgram" fn(*mut *mut c_void) -> c_int,
        ptx_size: c"nvrtcGetPTXSize" fn(*mut c_void, *mut usize) -> c_int,
        ptx: c"nvrtcGetPTX" fn(*mut c_void, *mut c_char) -> c_int,
        log_size: c"nvrtcGetProgramLogSize" fn(*mut c_void, *mut usize) -> c_int,
        log: c"nvrtcGetProgramLog" fn(*mut c_void, *mut c_char) -> c_int,
    }
}

/// NVRTC, opened once.
fn nvrtc() -> Result<&'static Nvrtc> {
    static NVRTC: OnceLock<Result<Nvrtc>> = OnceLock::new();
    let opened = NVRTC.get_or_init(|| {
        let library = library::open(&library::NVRTC)?;
        let nvrtc = Nvrtc::load(&library)?;
        let (mut major, mut minor) = (0, 0);
        // SAFETY: out-parameters.
        unsafe { (nvrtc.version)(&mut major, &mut minor) };
        if major < 12 { Err(library.too_old(&format!("it is of CUDA {major}.{minor}"))) } else { Ok(nvrtc) }
    });
    opened.as_ref().map_err(Clone::clone)
}

/// NVRTC's version, (13, 0).
pub fn compiler_version() -> Result<(i32, i32)> {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: out-parameters.
    unsafe { (nvrtc()?.version)(&mut major, &mut minor) };
    Ok((major, minor))
}

/// Compiles `source` with `-D` constants to PTX for `architecture` ("compute_90a").
///
/// # Errors
/// [`Error::Device`] without NVRTC; [`Error::Internal`] with the compiler's words when the source does not compile.
pub fn compile(source: &Source, constants: &[(&str, i64)], architecture: &str) -> Result<CString> {
    let n = nvrtc()?;
    let exports: String =
        source.exports.iter().map(|e| format!("extern \"C\" __device__ int {} = {e};\n", export_name(e))).collect();
    let text = c_string(format!("{COMMON}\n#line 1 \"{}.cu\"\n{}\n{exports}", source.name, source.text))?;
    let name = c_string(format!("{}.cu", source.name))?;
    let mut options = vec![c_string(format!("--gpu-architecture={architecture}"))?, c_string("--std=c++17".into())?];
    for (name, value) in constants {
        options.push(c_string(format!("-D{name}={value}"))?);
    }
    let pointers: Vec<*const c_char> = options.iter().map(|o| o.as_ptr()).collect();
    let mut program = null();
    // SAFETY: C strings that outlive the calls, out-parameters of the right types, buffers of the size NVRTC asked for.
    unsafe {
        if (n.create)(&mut program, text.as_ptr(), name.as_ptr(), 0, std::ptr::null(), std::ptr::null()) != 0 {
            return Err(Error::Device("NVRTC could not take a program".into()));
        }
        let compiled = (n.compile)(program, pointers.len() as c_int, pointers.as_ptr());
        let (mut size, answer) = (0, compiled);
        let fetch = if answer == 0 { (n.ptx_size, n.ptx) } else { (n.log_size, n.log) };
        (fetch.0)(program, &mut size);
        let mut bytes = vec![0u8; size.max(1)];
        (fetch.1)(program, bytes.as_mut_ptr().cast());
        (n.destroy)(&mut program);
        let end = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
        bytes.truncate(end);
        if answer != 0 {
            let log = String::from_utf8_lossy(&bytes).into_owned();
            let what = format!("kernels/{}.cu {constants:?} does not compile for {architecture}: {log}", source.name);
            return Err(Error::Internal(what));
        }
        CString::new(bytes).map_err(|_| Error::Internal("PTX with a zero byte".into()))
    }
}

fn export_name(expression: &str) -> String {
    format!("export_{expression}")
}

/// The value of an exported constant in compiled text.
pub fn export(ptx: &CString, name: &str) -> Option<usize> {
    let text = ptx.to_str().ok()?;
    let name = format!(" {} = ", export_name(name));
    let at = text.find(&name)? + name.len();
    let digits = text[at..].split(';').next()?;
    digits.trim().parse().ok()
}

fn c_string(text: String) -> Result<CString> {
    CString::new(text).map_err(|_| Error::Internal("a zero byte in a kernel's text".into()))
}

/// What NVRTC compiles for on a GPU of compute capability `sm`: PTX for Hopper alone on Hopper, elsewhere PTX that every
/// later GPU takes, which any NVRTC knows.
pub fn architecture(sm: u32) -> &'static str {
    match sm {
        90 => "compute_90a",
        91.. => "compute_90",
        _ => "compute_80",
    }
}

/// A loaded kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Function {
    handle: sys::CUfunction,
    name: &'static str,
    /// Waits by itself for the launch before it.
    overlap: bool,
    exports: [usize; 3],
}

impl Function {
    /// The source's exported constants, in its order.
    pub fn exports(&self) -> [usize; 3] {
        self.exports
    }
}

/// How a kernel is launched.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Launch {
    /// Blocks.
    pub grid: (usize, usize, usize),
    /// Threads a block.
    pub block: usize,
    /// Bytes of dynamic shared memory.
    pub shared: usize,
    /// Starts only when the launch before it has ended, even if the kernel waits for that by itself.
    pub serial: bool,
}

impl Launch {
    /// A one-dimensional grid.
    pub fn new(grid: usize, block: usize) -> Launch {
        Launch { grid: (grid, 1, 1), block, ..Launch::default() }
    }

    /// With dynamic shared memory.
    pub fn shared(self, shared: usize) -> Launch {
        Launch { shared, ..self }
    }
}

/// The kernels compiled so far.
pub(crate) struct Kernels {
    gpu: Arc<Gpu>,
    loaded: RefCell<HashMap<(&'static str, &'static str, String), Loaded>>,
    /// Compilations and loads that are over.
    progress: Arc<AtomicU64>,
}

#[derive(Clone)]
struct Loaded {
    module: sys::CUmodule,
    function: Function,
}

// SAFETY: driver handles may be used from any thread, one at a time here.
unsafe impl Send for Kernels {}

impl Kernels {
    pub fn new(gpu: &Arc<Gpu>) -> Kernels {
        Kernels { gpu: gpu.clone(), loaded: RefCell::default(), progress: Arc::default() }
    }

    /// Compilations and loads that are over: they take long, and wait for nobody.
    pub fn progress(&self) -> Arc<AtomicU64> {
        self.progress.clone()
    }

    /// The kernel called `entry` of a source, compiled for `constants` on first use.
    pub fn get(&self, source: &Source, entry: &'static str, constants: &[(&str, i64)]) -> Result<Function> {
        self.load(source, entry, constants).map(|l| l.function)
    }

    fn load(&self, source: &Source, entry: &'static str, constants: &[(&str, i64)]) -> Result<Loaded> {
        let key = (source.name, entry, format!("{constants:?}"));
        if let Some(found) = self.loaded.borrow().get(&key) {
            return Ok(found.clone());
        }
        let sm = self.gpu.sm();
        let ptx = compile(source, constants, architecture(sm))?;
        self.progress.fetch_add(1, Relaxed);
        self.gpu.attach()?;
        let (mut module, mut handle) = (null(), null());
        let name = c_string(entry.into())?;
        // SAFETY: PTX as a C string; out-parameters.
        unsafe {
            match sys::cuModuleLoadData(&mut module, ptx.as_ptr().cast()) {
                sys::CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION => {
                    let (major, minor) = compiler_version()?;
                    let driver = self.gpu.info.driver;
                    return Err(Error::Device(format!(
                        "the driver (CUDA {}.{}) is older than NVRTC {major}.{minor}: update the driver, or install \
                         nvidia-cuda-nvrtc of the driver's version",
                        driver / 1000,
                        driver % 1000 / 10
                    )));
                }
                other => check(other, &format!("loading kernels/{}.cu", source.name))?,
            }
            check(sys::cuModuleGetFunction(&mut handle, module, name.as_ptr()), &format!("finding kernel {entry}"))?;
            let shared = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            let mut fixed = 0;
            let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES;
            check(sys::cuFuncGetAttribute(&mut fixed, attribute, handle), "asking a kernel's shared memory")?;
            let most = self.gpu.info.shared_memory as i32 - fixed;
            check(sys::cuFuncSetAttribute(handle, shared, most), "granting shared memory")?;
        }
        let mut exports = [0; 3];
        for (value, name) in exports.iter_mut().zip(source.exports) {
            *value =
                export(&ptx, name).ok_or_else(|| Error::Internal(format!("{}.cu exports no {name}", source.name)))?;
        }
        let overlap = source.text.contains("grid_wait()");
        let loaded = Loaded { module, function: Function { handle, name: entry, overlap, exports } };
        self.progress.fetch_add(1, Relaxed);
        self.loaded.borrow_mut().insert(key, loaded.clone());
        Ok(loaded)
    }

    /// Blocks of `launch`'s size that one multiprocessor holds.
    pub fn occupancy(&self, f: Function, block: usize, shared: usize) -> Result<usize> {
        let mut blocks = 0;
        // SAFETY: a loaded kernel.
        let asked =
            unsafe { sys::cuOccupancyMaxActiveBlocksPerMultiprocessor(&mut blocks, f.handle, block as i32, shared) };
        check(asked, "asking a kernel's occupancy")?;
        Ok(blocks.max(1) as usize)
    }

    /// Enqueues a kernel. `arguments` point to its parameters in order, of the types it declares.
    pub fn launch(&self, f: Function, launch: Launch, arguments: &[*const c_void]) -> Result<()> {
        let (x, y, z) = launch.grid;
        if x == 0 || y == 0 || z == 0 {
            return Ok(());
        }
        let mut attribute = attribute();
        let mut count = 0;
        if f.overlap && !launch.serial && self.gpu.sm() >= 90 {
            attribute.id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
            attribute.value.programmaticStreamSerializationAllowed = 1;
            count = 1;
        }
        let config = sys::CUlaunchConfig {
            gridDimX: x as u32,
            gridDimY: y as u32,
            gridDimZ: z as u32,
            blockDimX: launch.block as u32,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shared as u32,
            hStream: self.gpu.stream(),
            attrs: &mut attribute,
            numAttrs: count,
        };
        // SAFETY: the kernel's own parameters, copied by the driver before it returns.
        let launched =
            unsafe { sys::cuLaunchKernelEx(&config, f.handle, arguments.as_ptr().cast_mut().cast(), null()) };
        check(launched, &format!("launching {} ({launch:?})", f.name))
    }
}

fn attribute() -> sys::CUlaunchAttribute {
    sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_IGNORE,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue { pad: [0; 64] },
    }
}

impl Drop for Kernels {
    fn drop(&mut self) {
        let _ = self.gpu.attach();
        for loaded in self.loaded.borrow().values() {
            // SAFETY: loaded by us; nothing launches it any more, and unloading waits for what runs.
            unsafe {
                let _ = sys::cuModuleUnload(loaded.module);
            }
        }
    }
}

/// Pointers to values, as [`Kernels::launch`] takes them.
macro_rules! arguments {
    ($($value:expr),* $(,)?) => { &[$((&raw const $value).cast::<std::ffi::c_void>()),*] };
}
pub(crate) use arguments;
