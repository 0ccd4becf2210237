//! The CUDA backend: one rank on one GPU, every operation enqueued on one stream, a decode step replayed as one graph.
//!
//! Nothing of CUDA is needed to build it: driver, NVRTC, cuBLASLt and NCCL are opened at run time
//! ([`library`]). Activations are bf16, the residual stream and all sums f32.

mod access;
mod attention;
mod choice;
pub(crate) mod context;
mod expand;
mod experts;
mod graph;
pub mod kernels;
mod latents;
pub(crate) mod library;
mod load;
mod matmul;
mod memory;
mod ops;
mod products;
mod rates;
mod reduce;
mod step;
mod stream;
mod sums;
mod tokens;

use std::cell::RefCell;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use attention::{append_constants, combines_output, decode_source, expanded_constants, prefill_constants};
pub use context::{Gpu, GpuInfo, Memory, available};
pub use experts::{Experts, Routing, expert_constants, route_constants};
pub use latents::{absorb_constants, latent_constants};
pub use load::{Matrix, Vector};
pub use memory::predict;
pub use stream::Cut;

use self::attention::Attention;
use self::context::Pinned;
use self::graph::Graphs;
use self::kernels::Kernels;
use self::load::Loader;
use self::matmul::Matmul;
use self::reduce::Reduce;
use self::step::Inputs;
use self::tokens::Tokens;
use crate::backend::{AttentionShape, View};
use crate::cache::{BLOCK, Layout};
use crate::comm::Communicator;
use crate::comm::nccl::{Element, Nccl};
use crate::comm::one_shot::OneShot;
use crate::comm::pace::{Pace, crowded};
use crate::error::{Error, Result};

/// How long kernels that are told to leave may take to do so, and the ranks that are left to meet.
const LEAVING: Duration = Duration::from_secs(2);
/// After the watchdog's bound, how long until a rank in a call that does not return asks who is there: the others, which
/// wait in bounded ways, listen by then.
const ANSWERS: Duration = Duration::from_millis(500);

/// What a rank's GPU is made ready for.
#[derive(Debug, Clone)]
pub struct CudaOptions {
    /// Tokens a step.
    pub max_rows: usize,
    /// Sequences a step.
    pub max_sequences: usize,
    /// Longest context in tokens.
    pub max_context: usize,
    /// Several ranks may have one GPU: then they sum through host memory. For tests and demonstrations.
    pub share_gpus: bool,
    /// Replay decode steps as graphs.
    pub graphs: bool,
    /// Bound of a step's wait for other ranks.
    pub watchdog: Duration,
    /// How ranks sum.
    pub all_reduce: AllReduce,
}

/// How ranks sum.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AllReduce {
    /// One-shot where it is faster, else NCCL.
    #[default]
    Auto,
    /// NCCL.
    Nccl,
    /// One-shot wherever a step's rows fit, or an error.
    OneShot,
}

impl Default for CudaOptions {
    fn default() -> Self {
        CudaOptions {
            max_rows: 512,
            max_sequences: 64,
            max_context: 8192,
            share_gpus: false,
            graphs: true,
            watchdog: crate::comm::WATCHDOG,
            all_reduce: AllReduce::Auto,
        }
    }
}

/// The GPUs of this machine, where what computing on them needs is there as well: the compiler, cuBLASLt and, if several
/// ranks sum on GPUs, NCCL.
///
/// # Errors
/// [`Error::Device`] naming what is missing or too old, and what to install.
pub fn usable(nccl: bool) -> Result<Vec<GpuInfo>> {
    let gpus = available()?;
    kernels::compiler_version()?;
    matmul::version()?;
    if nccl {
        crate::comm::nccl::version()?;
    }
    Ok(gpus)
}

/// Versions of what is opened at run time, for reports: empty where there is no driver.
pub fn versions() -> Vec<(&'static str, String)> {
    let Ok(gpus) = available() else { return vec![] };
    let dotted = |major: usize, minor: usize| format!("{major}.{minor}");
    let mut all = vec![];
    if let Some(gpu) = gpus.first() {
        all.push(("cuda_driver", dotted(gpu.driver / 1000, gpu.driver % 1000 / 10)));
    }
    if let Ok((major, minor)) = kernels::compiler_version() {
        all.push(("nvrtc", format!("{major}.{minor}")));
    }
    if let Ok(version) = matmul::version() {
        all.push(("cublaslt", dotted(version / 10000, version % 10000 / 100)));
    }
    if crate::comm::nccl::version().is_ok() {
        all.push(("nccl", crate::comm::nccl::version_text()));
    }
    all
}

/// One rank on one GPU.
pub struct CudaBackend {
    comm: Box<dyn Communicator>,
    gpu: Arc<Gpu>,
    options: CudaOptions,
    kernels: Kernels,
    matmul: Matmul,
    loader: Loader,
    inputs: Inputs,
    attention: Attention,
    experts: experts::Workspace,
    expansion: Option<expand::Workspace>,
    graphs: Graphs,
    reduce: Reduce,
    one_shot: Option<OneShot>,
    head: RefCell<Head>,
    tokens: Tokens,
    waited: Duration,
}

/// Logits of a step and what is read of them.
struct Head {
    /// f32 `[outputs, vocab]`
    logits: Option<Memory>,
    host: Option<Pinned>,
    vocab: usize,
}

/// Activations `[rows, cols]` on the GPU, row-major.
pub struct Tensor {
    memory: Memory,
    rows: usize,
    cols: usize,
    element: Element,
}

/// One layer's paged cache, bf16, blocks as `kernels/` describes them.
pub struct Cache {
    memory: Memory,
    layout: Layout,
}

/// Tables of cos and sin, f32 `[positions, pairs]`.
pub struct RopeTable {
    cos: Memory,
    sin: Memory,
    interleave: bool,
    pairs: usize,
    positions: usize,
}

impl Tensor {
    fn at(&self) -> u64 {
        self.memory.at()
    }
}

/// An operand of a product.
#[derive(Clone, Copy)]
struct Operand {
    at: u64,
    stride: usize,
}

/// The address of a view's first element.
fn address(x: &View<Tensor>) -> u64 {
    x.tensor.at() + 2 * x.first as u64
}

/// A defect of the caller's, named.
fn expect(holds: bool, what: impl FnOnce() -> String) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::Internal(what())) }
}

impl CudaBackend {
    /// The backend of this rank: GPU number `local rank` of its host, and NCCL among the ranks.
    ///
    /// # Errors
    /// [`Error::Device`] naming the library, GPU or driver at fault and what to install.
    pub fn new(mut comm: Box<dyn Communicator>, options: CudaOptions) -> Result<CudaBackend> {
        match Parts::new(&mut *comm, &options) {
            Ok(parts) => Ok(parts.with(comm, options)),
            Err(e) => {
                if comm.world() > 1 {
                    comm.abort(e.exit_code(), &e.to_string());
                }
                Err(e)
            }
        }
    }

    /// The GPU.
    pub fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    /// Steps that were replayed from a graph.
    pub fn replays(&self) -> u64 {
        self.graphs.replays
    }

    /// Rows that every tensor has at least: a graph's padding may go beyond the step's tokens.
    fn tensor_rows(&self) -> usize {
        self.options.max_rows.max(step::bucket(self.options.max_sequences))
    }

    fn attend(
        &self,
        shape: &AttentionShape,
        form: attention::Form,
        q: &Tensor,
        cache: &Cache,
        out: &Tensor,
    ) -> Result<()> {
        self.attention.attend(&self.kernels, &self.inputs, shape, form, q.at(), cache.memory.at(), out.at())
    }

    /// Sums `rows` rows of a tensor over the ranks.
    fn sum(&mut self, x: &Tensor) -> Result<()> {
        let beyond = self.guarded();
        self.comm.guard(beyond);
        let count = self.inputs.rows * x.cols;
        if !self.reduce.waits() {
            self.settle()?;
        }
        self.waited += self.reduce.all_reduce(&self.gpu, &mut *self.comm, x.at(), count, x.element)?;
        Ok(())
    }

    /// Rows of `cols` columns that are summed in one shot.
    fn one_shot_rows(&self, cols: usize) -> usize {
        let Some(one_shot) = &self.one_shot else { return 0 };
        let rows = one_shot.rows(cols);
        // Beyond this a second round of messages costs less than sending everything to everyone; two ranks save nothing
        // by one.
        if self.options.all_reduce == AllReduce::Auto && one_shot.place().1 > 2 { rows / 2 } else { rows }
    }

    /// Records `body` as a graph, replays it `times` times after two to warm up, and gives the seconds of each replay:
    /// what benchmarks need. Every rank calls it alike.
    pub fn time(&mut self, times: usize, mut body: impl FnMut(&mut Self) -> Result<()>) -> Result<Vec<f64>> {
        self.attention.begin();
        body(self)?;
        self.wait()?;
        self.attention.begin();
        let gpu = self.gpu.clone();
        let graph = graph::Graph::record(&gpu, || body(self))?;
        let (mut seconds, beyond) = (vec![], self.guarded());
        for i in 0..times + 2 {
            self.comm.barrier()?;
            self.comm.guard(beyond);
            let took = graph.time()?;
            self.comm.guard(None);
            if i >= 2 {
                seconds.push(took);
            }
        }
        Ok(seconds)
    }

    /// Waits for what `done` asks about, for as long as the watchdog allows.
    fn until(&self, done: impl Fn(&Self) -> Result<bool>) -> Result<()> {
        let bound = self.options.watchdog;
        if self.reduce.poll(bound, || done(self))? { Ok(()) } else { Err(self.overdue()) }
    }

    /// Ends the sums that wait for another rank. The error names that rank, where the GPU knows it.
    fn overdue(&self) -> Error {
        let bound = self.options.watchdog;
        let mut rank = self.comm.rank();
        let mut what = format!("its GPU has waited {} s for the other ranks' part of a step", bound.as_secs_f32());
        if let Some(one_shot) = &self.one_shot {
            one_shot.stop();
            if let Err(e) = self.reduce.poll(LEAVING, || self.gpu.idle()) {
                return e;
            }
            if let Some(late) = one_shot.late() {
                rank = late;
                what = format!("its part of a step has not come in {} s", bound.as_secs_f32());
            }
        }
        Error::Rank { rank, what }
    }

    /// Waits for what is enqueued before something is timed.
    fn settle(&self) -> Result<()> {
        if self.waits() { self.until(|b| b.gpu.idle()) } else { Ok(()) }
    }

    /// Whether the GPU itself waits for other ranks.
    fn waits(&self) -> bool {
        self.reduce.waits() || self.one_shot.is_some()
    }

    /// The error of a wait that another rank has spoilt: where it names this rank for want of a better one, the ranks
    /// that are still there meet, and the one that does not come is named.
    fn blame(&mut self, e: Error) -> Error {
        self.comm.set_watchdog(LEAVING);
        let found = match &e {
            Error::Rank { rank, .. } if *rank == self.comm.rank() => self.comm.barrier().err().unwrap_or(e),
            _ => e,
        };
        // NCCL does not end while there is a graph that it has a part in.
        self.graphs = Graphs::default();
        self.comm.guard(Some(Duration::ZERO));
        self.reduce.abort();
        self.comm.guard(None);
        found
    }

    /// For [`Communicator::guard`], before calls that may wait for another rank, if only because too much has been
    /// enqueued. The ranks that wait in bounded ways have given up by the time this one is given up, and answer.
    fn guarded(&self) -> Option<Duration> {
        let stopping = if self.one_shot.is_some() { LEAVING } else { Duration::ZERO };
        self.waits().then_some(ANSWERS + stopping)
    }

    /// The side of the next step, once the step before last, which had it, is over.
    fn next_side(&mut self) -> Result<usize> {
        self.gpu.attach()?;
        let side = self.tokens.next();
        if self.waits() {
            let waited = self.until(|b| Ok(b.tokens.over(side)? && b.inputs.copied(side)?));
            waited.map_err(|e| self.blame(e))?;
        }
        Ok(side)
    }

    /// Waits until the last step, or the one before it, is over.
    fn wait_for_tokens(&mut self, behind: bool) -> Result<()> {
        self.gpu.attach()?;
        let side = self.tokens.side(behind);
        if self.waits() {
            let waited = self.until(|b| b.tokens.over(side));
            return waited.map_err(|e| self.blame(e));
        }
        while !self.tokens.over(side)? {
            std::hint::spin_loop();
        }
        Ok(())
    }

    /// Returns when everything enqueued is done or rank 0 has spoken; an error when another rank's part does not come.
    fn watch_device(&mut self) -> Result<()> {
        let (start, mut pace) = (Instant::now(), Pace::new(crowded(self.comm.local().1)));
        while !self.gpu.idle()? && !self.comm.arrived()? {
            let overdue = start.elapsed() > self.options.watchdog;
            let watched = if overdue { Err(self.overdue()) } else { self.reduce.failed() };
            watched.map_err(|e| self.blame(e))?;
            pace.pause();
        }
        Ok(())
    }

    /// Waits for the step, bounded by the watchdog.
    fn wait(&mut self) -> Result<()> {
        if !self.waits() {
            return self.gpu.synchronize();
        }
        let waited = self.until(|b| b.gpu.idle());
        waited.map_err(|e| self.blame(e))
    }
}

/// Everything of a backend but the communicator.
struct Parts {
    gpu: Arc<Gpu>,
    matmul: Matmul,
    inputs: Inputs,
    reduce: Reduce,
    one_shot: Option<OneShot>,
    tokens: Tokens,
}

impl Parts {
    fn new(comm: &mut dyn Communicator, options: &CudaOptions) -> Result<Parts> {
        let gpus = available()?;
        let (local, on_host) = comm.local();
        let shared = options.share_gpus && on_host > gpus.len();
        let gpu = Gpu::open(if options.share_gpus { local % gpus.len() } else { local })?;
        kernels::compiler_version()?;
        let matmul = Matmul::new(&gpu)?;
        let inputs = Inputs::new(&gpu, options.max_rows, options.max_sequences, options.max_context)?;
        let mut anyone_shares = vec![0; 8 * comm.world()];
        comm.all_gather(&u64::from(shared).to_le_bytes(), &mut anyone_shares)?;
        let reduce = match comm.world() {
            1 => Reduce::Alone,
            _ if anyone_shares.iter().any(|&b| b != 0) => Reduce::Host,
            _ => Reduce::Nccl(Nccl::new(comm, options.watchdog)?),
        };
        let one_shot = match (&reduce, options.all_reduce) {
            (Reduce::Nccl(_), AllReduce::Auto | AllReduce::OneShot) => OneShot::new(&gpu, comm)?,
            // Slower than host memory there, but the same kernels as between GPUs.
            (Reduce::Host, AllReduce::OneShot) => OneShot::new(&gpu, comm)?,
            _ => None,
        };
        if options.all_reduce == AllReduce::OneShot && comm.world() > 1 && one_shot.is_none() {
            let what = "one-shot sums need all ranks on one host, on GPUs that reach each other's memory";
            return Err(Error::Device(format!("{what}: use --all-reduce auto")));
        }
        let rows = options.max_rows.max(step::bucket(options.max_sequences));
        let tokens = Tokens::new(&gpu, rows, comm.world())?;
        Ok(Parts { gpu, matmul, inputs, reduce, one_shot, tokens })
    }

    fn with(self, mut comm: Box<dyn Communicator>, options: CudaOptions) -> CudaBackend {
        let Parts { gpu, matmul, inputs, reduce, one_shot, tokens } = self;
        let kernels = Kernels::new(&gpu);
        comm.progress(kernels.progress());
        CudaBackend {
            comm,
            options,
            kernels,
            matmul,
            loader: Loader::new(&gpu),
            inputs,
            attention: Attention::new(&gpu),
            experts: experts::Workspace::default(),
            expansion: None,
            graphs: Graphs::default(),
            reduce,
            one_shot,
            head: RefCell::new(Head { logits: None, host: None, vocab: 0 }),
            tokens,
            waited: Duration::ZERO,
            gpu,
        }
    }
}

/// Bytes of a cache of one layer.
fn cache_bytes(layout: Layout, blocks: usize) -> usize {
    blocks * BLOCK * layout.elements() * 2
}
