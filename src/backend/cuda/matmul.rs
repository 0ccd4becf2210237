//! Products with weights through cuBLASLt: a plan a shape, made once: its heuristic's candidates, timed where a product
//! streams its weights (few rows), for the heuristic's first choice is often not the fastest there.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::{c_int, c_void};
use std::sync::{Arc, OnceLock};

use cudarc::cublaslt::sys::{self, cublasLtMatmulAlgo_t, cublasLtMatmulHeuristicResult_t as Heuristic};

use super::context::{Gpu, Memory, null};
use super::library::{self, functions};
use crate::error::{Error, Result};

functions! {
    /// cuBLASLt's functions; status 0 is success.
    struct CublasLt {
        version: c"cublasLtGetVersion" fn() -> usize,
        create: c"cublasLtCreate" fn(*mut *mut c_void) -> c_int,
        destroy: c"cublasLtDestroy" fn(*mut c_void) -> c_int,
        desc_create: c"cublasLtMatmulDescCreate" fn(*mut *mut c_void, u32, u32) -> c_int,
        desc_set: c"cublasLtMatmulDescSetAttribute" fn(*mut c_void, u32, *const c_void, usize) -> c_int,
        layout_create: c"cublasLtMatrixLayoutCreate" fn(*mut *mut c_void, u32, u64, u64, i64) -> c_int,
        preference_create: c"cublasLtMatmulPreferenceCreate" fn(*mut *mut c_void) -> c_int,
        preference_set: c"cublasLtMatmulPreferenceSetAttribute" fn(*mut c_void, u32, *const c_void, usize) -> c_int,
        preference_destroy: c"cublasLtMatmulPreferenceDestroy" fn(*mut c_void) -> c_int,
        heuristic: c"cublasLtMatmulAlgoGetHeuristic" fn(*mut c_void, *mut c_void, *mut c_void, *mut c_void, *mut c_void, *mut c_void, *mut c_void, c_int, *mut Heuristic, *mut c_int) -> c_int,
        matmul: c"cublasLtMatmul" fn(*mut c_void, *mut c_void, *const f32, u64, *mut c_void, u64, *mut c_void, *const f32, u64, *mut c_void, u64, *mut c_void, *const cublasLtMatmulAlgo_t, u64, usize, *mut c_void) -> c_int,
    }
}

/// Bytes of workspace; NVIDIA's advice for Hopper.
pub(crate) const WORKSPACE: usize = 32 << 20;

/// Candidates that are asked of the heuristic, runs of each, and the rows up to which they are timed.
const CANDIDATES: usize = 8;
const TIMINGS: usize = 5;
const TIMED_ROWS: usize = 256;

/// `out[rows, outs] = x[rows, depth] · w[outs, depth]ᵀ`, all row-major.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Product {
    /// Rows of `x`.
    pub rows: usize,
    /// Rows of `w`.
    pub outs: usize,
    /// Length of the reduction.
    pub depth: usize,
    /// Elements from a row of `x` to the next.
    pub x_stride: usize,
    /// Elements from a row of `out` to the next.
    pub out_stride: usize,
    /// `out` is f32, else bf16.
    pub f32_out: bool,
    /// A bf16 bias `[outs]` is added.
    pub bias: bool,
}

/// A shape's descriptors and algorithm.
struct Plan {
    desc: *mut c_void,
    w: *mut c_void,
    x: *mut c_void,
    out: *mut c_void,
    algo: cublasLtMatmulAlgo_t,
}

/// cuBLASLt on one GPU.
pub(crate) struct Matmul {
    gpu: Arc<Gpu>,
    lt: &'static CublasLt,
    handle: *mut c_void,
    workspace: Memory,
    plans: RefCell<HashMap<(Product, u64), Plan>>,
}

// SAFETY: handles of a library that may be used from any thread, one at a time here.
unsafe impl Send for Matmul {}

fn check(status: c_int, what: &str) -> Result<()> {
    if status == 0 {
        return Ok(());
    }
    Err(Error::Device(format!("cuBLASLt: {what}: status {status}")))
}

/// cuBLASLt, opened once.
fn cublas_lt() -> Result<&'static CublasLt> {
    static LT: OnceLock<Result<CublasLt>> = OnceLock::new();
    let lt = LT.get_or_init(|| {
        let library = library::open(&library::CUBLASLT)?;
        let lt = CublasLt::load(&library)?;
        // SAFETY: it takes nothing.
        let version = unsafe { (lt.version)() };
        if version < 120_000 { Err(library.too_old(&format!("it is version {version}"))) } else { Ok(lt) }
    });
    lt.as_ref().map_err(Clone::clone)
}

/// cuBLASLt's version, 130100 for 13.1.
pub(crate) fn version() -> Result<usize> {
    // SAFETY: it takes nothing.
    cublas_lt().map(|lt| unsafe { (lt.version)() })
}

impl Matmul {
    pub fn new(gpu: &Arc<Gpu>) -> Result<Matmul> {
        let lt = cublas_lt()?;
        gpu.attach()?;
        let mut handle = null();
        // SAFETY: an out-parameter.
        check(unsafe { (lt.create)(&mut handle) }, "starting")?;
        let workspace = Memory::uninit(gpu, WORKSPACE)?;
        Ok(Matmul { gpu: gpu.clone(), lt, handle, workspace, plans: RefCell::default() })
    }

    /// Enqueues a product of the addresses x, w, bias and out. `settle` waits for the GPU, before candidates are timed.
    pub fn product(
        &self,
        p: Product,
        (x, w, bias, out): (u64, u64, u64, u64),
        settle: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        if p.rows == 0 || p.outs == 0 {
            return Ok(());
        }
        // The largest power of two that divides the addresses; cuBLASLt picks kernels by it.
        let alignment = 1 << (x | w | out | 256).trailing_zeros();
        let mut plans = self.plans.borrow_mut();
        let plan = match plans.entry((p, alignment)) {
            std::collections::hash_map::Entry::Occupied(found) => found.into_mut(),
            std::collections::hash_map::Entry::Vacant(empty) => {
                let (mut plan, candidates) = self.plan(p, alignment as u32)?;
                if p.rows <= TIMED_ROWS && candidates.len() > 1 && !self.gpu.recording()? {
                    settle()?;
                    plan.algo = self.fastest(&plan, &candidates, (x, w, bias, out), p.bias)?;
                }
                empty.insert(plan)
            }
        };
        self.multiply(plan, &plan.algo, (x, w, bias, out), p.bias).map_err(|e| match e {
            Error::Device(what) => Error::Device(format!("{what}, {p:?}")),
            other => other,
        })
    }

    fn multiply(
        &self,
        plan: &Plan,
        algo: &cublasLtMatmulAlgo_t,
        (x, w, bias, out): (u64, u64, u64, u64),
        biased: bool,
    ) -> Result<()> {
        if biased {
            let attribute = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER as u32;
            // SAFETY: a live descriptor and an attribute with its size.
            let status = unsafe { (self.lt.desc_set)(plan.desc, attribute, (&raw const bias).cast(), 8) };
            check(status, "setting a bias")?;
        }
        let (one, zero) = (1f32, 0f32);
        // SAFETY: a plan made for these shapes; the addresses have the extents it says.
        let status = unsafe {
            (self.lt.matmul)(
                self.handle,
                plan.desc,
                &one,
                w,
                plan.w,
                x,
                plan.x,
                &zero,
                out,
                plan.out,
                out,
                plan.out,
                algo,
                self.workspace.at(),
                WORKSPACE,
                self.gpu.stream().cast(),
            )
        };
        check(status, "multiplying")
    }

    /// The candidate with the shortest median time. The caller's `out` is written, as it will be afterwards anyway.
    fn fastest(
        &self,
        plan: &Plan,
        candidates: &[cublasLtMatmulAlgo_t],
        at: (u64, u64, u64, u64),
        biased: bool,
    ) -> Result<cublasLtMatmulAlgo_t> {
        // Twice the largest L2: writing it between runs leaves the weights cold, as they are in a step.
        let sweep = Memory::uninit(&self.gpu, 128 << 20)?;
        let mut best = (f32::INFINITY, candidates[0]);
        for algo in candidates {
            let mut times = vec![];
            for _ in 0..TIMINGS {
                self.gpu.fill(sweep.at(), 1, sweep.bytes())?;
                let run = || self.multiply(plan, algo, at, biased);
                match self.gpu.time(run) {
                    Ok(time) => times.push(time),
                    // A candidate that does not run after all is no candidate.
                    Err(_) => break,
                }
            }
            times.sort_unstable_by(f32::total_cmp);
            if times.len() == TIMINGS && times[TIMINGS / 2] < best.0 {
                best = (times[TIMINGS / 2], *algo);
            }
        }
        Ok(best.1)
    }

    /// Column-major, as cuBLASLt sees it: outᵀ[outs, rows] = (w[depth, outs])ᵀ · x[depth, rows].
    fn plan(&self, p: Product, alignment: u32) -> Result<(Plan, Vec<cublasLtMatmulAlgo_t>)> {
        let (lt, bf16, f32) =
            (self.lt, sys::cudaDataType_t::CUDA_R_16BF as u32, sys::cudaDataType_t::CUDA_R_32F as u32);
        let layout = |kind: u32, rows: usize, cols: usize, stride: usize| {
            let mut layout = null();
            // SAFETY: an out-parameter.
            let status = unsafe { (lt.layout_create)(&mut layout, kind, rows as u64, cols as u64, stride as i64) };
            check(status, "describing a matrix").map(|()| layout)
        };
        let w = layout(bf16, p.depth, p.outs, p.depth)?;
        let x = layout(bf16, p.depth, p.rows, p.x_stride)?;
        let out = layout(if p.f32_out { f32 } else { bf16 }, p.outs, p.rows, p.out_stride)?;
        let (mut desc, mut preference) = (null(), null());
        let mut found = [const { std::mem::MaybeUninit::<Heuristic>::zeroed() }; CANDIDATES];
        let mut count = 0;
        // SAFETY: out-parameters, live descriptors, attributes with their sizes.
        unsafe {
            let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F as u32;
            check((lt.desc_create)(&mut desc, compute, f32), "describing a product")?;
            let transposed = 1i32;
            let attribute = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA as u32;
            check((lt.desc_set)(desc, attribute, (&raw const transposed).cast(), 4), "describing a product")?;
            if p.bias {
                let epilogue = sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS as u32;
                let attribute = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_EPILOGUE as u32;
                check((lt.desc_set)(desc, attribute, (&raw const epilogue).cast(), 4), "describing a product")?;
            }
            check((lt.preference_create)(&mut preference), "making a preference")?;
            use sys::cublasLtMatmulPreferenceAttributes_t as Preference;
            let size = WORKSPACE as u64;
            let attribute = Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES as u32;
            check((lt.preference_set)(preference, attribute, (&raw const size).cast(), 8), "setting a preference")?;
            for attribute in [
                Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
                Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
                Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
            ] {
                let value = (&raw const alignment).cast();
                check((lt.preference_set)(preference, attribute as u32, value, 4), "setting a preference")?;
            }
            let status = (lt.heuristic)(
                self.handle,
                desc,
                w,
                x,
                out,
                out,
                preference,
                CANDIDATES as c_int,
                found.as_mut_ptr().cast(),
                &mut count,
            );
            (lt.preference_destroy)(preference);
            if status != 0 || count == 0 {
                return Err(Error::Device(format!("cuBLASLt has no kernel for {p:?} (status {status})")));
            }
        }
        let found = found.iter().take(count as usize);
        // SAFETY: zeroed, and the first `count` filled by the heuristic.
        let found = found.map(|found| unsafe { found.assume_init_ref() });
        let usable = found.filter(|found| found.state as u32 == 0);
        let candidates: Vec<cublasLtMatmulAlgo_t> = usable.map(|found| found.algo).collect();
        let Some(&algo) = candidates.first() else {
            return Err(Error::Device(format!("cuBLASLt has no kernel for {p:?}")));
        };
        Ok((Plan { desc, w, x, out, algo }, candidates))
    }
}

impl Drop for Matmul {
    fn drop(&mut self) {
        let _ = self.gpu.attach();
        // SAFETY: ours, and unused from here on. The few descriptors end with the process.
        unsafe {
            (self.lt.destroy)(self.handle);
        }
    }
}
