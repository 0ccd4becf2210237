//! The CPU backend: weights as the checkpoint has them (bf16 stays bf16), arithmetic and caches in f32.
//!
//! It is the oracle of the other backends, so its results are strict: a row's bits depend neither on the other rows of
//! the batch, nor on how a prompt is cut into chunks, nor on threads, instruction set, or a power-of-two world size up
//! to 8 (see [`linear`]). Long chunks could [`expand`] on the absorb path, in half the time; models do not let them here, for
//! their bits would depend on the chunks.

mod absorb;
mod attention;
mod buffer;
mod expand;
mod linear;
mod moe;
mod ops;
mod rope;
pub mod simd;

use std::time::{Duration, Instant};

use rayon::prelude::*;

pub use attention::Cache;
pub use buffer::{HostRows, Matrix, Rows, Tensor};
pub use moe::{Experts, Routing};
pub use ops::read_bandwidth;
pub use rope::RopeTable;

use self::buffer::Shared;
use self::expand::Expansion;
use self::linear::{Input, Outputs, Product, local_segments};
use self::moe::Mlps;
use self::simd::Isa;
use crate::backend::{AttentionShape, Backend, Batch, Draw, ExpertSlices, Normed, Reduction, View};
use crate::cache::{BLOCK, Layout};
use crate::checkpoint::Slice;
use crate::comm::Communicator;
use crate::config::{ModelConfig, Moe, Rope};
use crate::error::{Error, Result};
use crate::model::shard::Owned;

/// Threads for one of `ranks_on_host` ranks: the cores this process may use, shared evenly, at least 1.
pub fn fair_threads(ranks_on_host: usize) -> usize {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    (cores / ranks_on_host.max(1)).max(1)
}

/// The threads that share an operation's tasks.
struct Workers {
    pool: Option<rayon::ThreadPool>,
    threads: usize,
}

impl Workers {
    /// Multiply-adds (or elements moved) below which waking the threads costs more than they save.
    const ALONE: usize = 1 << 18;

    fn new(threads: usize) -> Result<Workers> {
        let threads = threads.max(1);
        let pool = match threads {
            1 => None,
            _ => Some(
                rayon::ThreadPoolBuilder::new()
                    .num_threads(threads)
                    .thread_name(|i| format!("gqla-cpu-{i}"))
                    .build()
                    .map_err(|e| Error::Device(format!("cannot start {threads} threads: {e}; use --threads 1")))?,
            ),
        };
        Ok(Workers { pool, threads })
    }

    fn threads(&self) -> usize {
        self.threads
    }

    /// Runs `task(0..tasks)`, in parallel where `work` is worth it. The order is not fixed: tasks write apart.
    fn run(&self, tasks: usize, work: usize, task: impl Fn(usize) + Sync) {
        match &self.pool {
            Some(pool) if tasks > 1 && work >= Workers::ALONE => {
                pool.install(|| (0..tasks).into_par_iter().for_each(&task));
            }
            _ => (0..tasks).for_each(task),
        }
    }
}

/// One rank on the CPU.
pub struct CpuBackend {
    comm: Box<dyn Communicator>,
    workers: Workers,
    isa: Isa,
    batch: Batch,
    /// Activations of the experts between calls.
    hold: Vec<f32>,
    expansion: Expansion,
    /// Of the last head, `[outputs, vocab]`.
    logits: Vec<f32>,
    vocab: usize,
    /// The token of its first column.
    first: usize,
    reducing: Duration,
}

impl CpuBackend {
    /// A backend of `threads` threads on the fastest instruction set.
    pub fn new(comm: Box<dyn Communicator>, threads: usize) -> Result<CpuBackend> {
        CpuBackend::with_isa(comm, threads, Isa::detect())
    }

    /// The same on a chosen instruction set, for tests.
    pub fn with_isa(comm: Box<dyn Communicator>, threads: usize, isa: Isa) -> Result<CpuBackend> {
        Ok(CpuBackend {
            comm,
            workers: Workers::new(threads)?,
            isa,
            batch: Batch::default(),
            hold: Vec::new(),
            expansion: Expansion::default(),
            logits: Vec::new(),
            vocab: 0,
            first: 0,
            reducing: Duration::ZERO,
        })
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Threads in use.
    pub fn threads(&self) -> usize {
        self.workers.threads()
    }

    /// The rows of `parts`, one under the other; [`Backend::matrix`] for any source.
    pub fn matrix_of<R: Rows>(&self, parts: &[R], reduction: Reduction) -> Result<Matrix> {
        let parts: Vec<&R> = parts.iter().collect();
        Matrix::load(&self.workers, &parts, reduction, self.segments())
    }

    /// Experts from any source; [`Backend::experts`].
    pub fn experts_of<R: Rows>(&self, gate_up: &[Vec<R>], down: &[Vec<R>], moe: &Moe) -> Result<Experts> {
        let expected = moe.experts + usize::from(moe.shared_width > 0);
        if gate_up.len() != expected || down.len() != expected {
            return Err(Error::Internal(format!("{} and {} experts, not {expected}", gate_up.len(), down.len())));
        }
        let load = |range: std::ops::Range<usize>| -> Result<Mlps> {
            let count = range.len();
            let gates: Vec<&R> = gate_up[range.clone()].iter().flatten().collect();
            let downs: Vec<&R> = down[range].iter().flatten().collect();
            let gate_up = Matrix::load(&self.workers, &gates, Reduction::Whole, 1)?;
            let down = Matrix::load(&self.workers, &downs, Reduction::Split, self.segments())?;
            let width = down.cols();
            Ok(Mlps { gate_up, down, count, width })
        };
        let routed = load(0..moe.experts)?;
        let shared = if moe.shared_width > 0 { Some(load(moe.experts..expected)?) } else { None };
        Experts::new(routed, shared, self.segments())
    }

    fn segments(&self) -> usize {
        local_segments(self.comm.world())
    }

    fn rows(&self) -> usize {
        self.batch.rows()
    }

    /// `out[r] = x[r]·weight (+ bias)` for `rows` rows of `stride` elements from column `first` on.
    fn product(
        &self,
        weight: &Matrix,
        bias: Option<&[f32]>,
        x: (&[f32], usize, usize),
        rows: usize,
        out: &mut [f32],
        out_stride: usize,
    ) {
        let (data, stride, first) = x;
        let offsets: Vec<usize> = (0..rows).map(|r| r * stride + first).collect();
        let targets: Vec<usize> = (0..rows).map(|r| r * out_stride).collect();
        assert!(out_stride >= weight.rows);
        let product = Product {
            x: Input { data, offsets: &offsets },
            weights: weight,
            outputs: Outputs { first: 0, count: weight.rows },
            bias,
            out: Shared::new(out),
            targets: &targets,
        };
        // SAFETY: each row has a target of at least as many columns as the matrix has rows.
        unsafe { product.compute(&self.workers, self.isa) };
    }

    /// Calls `work(row, out[row])` for the batch's rows.
    fn each_row(&self, out: &mut Tensor, width: usize, work: impl Fn(usize, &mut [f32]) + Sync) {
        let (rows, cols) = (self.rows(), out.cols());
        assert!(rows <= out.rows() && width <= cols, "{rows} rows of {width} in a [{}, {cols}] tensor", out.rows());
        let data = Shared::new(&mut out.data);
        // SAFETY: each row is one task's.
        self.workers.run(rows, rows * width * 4, |r| work(r, unsafe { data.slice(r * cols, width) }));
    }

    fn check_view(&self, x: &View<Tensor>, width: usize) {
        assert_eq!(x.width, width, "a view's width");
        assert!(x.first + x.width <= x.tensor.cols() && self.rows() <= x.tensor.rows(), "a view beyond its tensor");
    }

    /// Rotates the queries, `[rows, heads·(nope+rope)]`: their rope parts, or all of them where `whole`.
    fn rotate_queries(
        &self,
        shape: &AttentionShape,
        table: &RopeTable,
        q: View<Tensor>,
        whole: bool,
        out: &mut Tensor,
    ) {
        let width = shape.nope + shape.rope;
        self.check_view(&q, shape.heads * width);
        assert_eq!(out.cols(), q.width);
        let still = if whole { 0 } else { shape.nope };
        assert_eq!(table.dim(), width - still, "the rope table's width");
        let positions = &self.batch.positions;
        self.each_row(out, q.width, |r, out| {
            let position = positions[r] as usize;
            for (q, out) in columns(&q, r).chunks_exact(width).zip(out.chunks_exact_mut(width)) {
                out[..still].copy_from_slice(&q[..still]);
                table.rotate(position, &q[still..], &mut out[still..]);
            }
        });
    }

    fn norm_columns(&self, x: View<Tensor>, weight: &[f32], eps: f32, out: &mut Tensor) {
        self.check_view(&x, weight.len());
        assert_eq!(out.cols(), x.width);
        let isa = self.isa;
        self.each_row(out, x.width, |r, out| {
            isa.run(ops::RmsNorm { x: columns(&x, r), weight, eps, out });
        });
    }

    /// Rows of sequences that do not expand.
    fn absorbed_rows(&self, shape: &AttentionShape) -> Vec<usize> {
        let spans = self.batch.spans.iter().filter(|s| !shape.expands(s.rows, s.context));
        spans.flat_map(|s| s.first..s.first + s.rows).collect()
    }

    fn check_positions(&self, table: &RopeTable) -> Result<()> {
        match self.batch.positions.iter().max() {
            Some(&p) if p as usize >= table.positions() => {
                Err(Error::Internal(format!("position {p} of a rope table of {}", table.positions())))
            }
            _ => Ok(()),
        }
    }
}

impl Backend for CpuBackend {
    type Tensor = Tensor;
    type Matrix = Matrix;
    type Vector = Vec<f32>;
    type Cache = Cache;
    type Experts = Experts;
    type Routing = Routing;
    type RopeTable = RopeTable;

    fn tensor(&self, rows: usize, cols: usize) -> Result<Tensor> {
        Tensor::new(rows, cols)
    }

    fn matrix(&self, parts: &[Slice], reduction: Reduction) -> Result<Matrix> {
        self.matrix_of(parts, reduction)
    }

    fn vector(&self, data: &[f32]) -> Result<Vec<f32>> {
        Ok(data.to_vec())
    }

    fn cache(&self, layout: Layout, blocks: usize) -> Result<Cache> {
        Cache::new(layout, blocks)
    }

    fn cache_bytes(&self, cache: &Cache) -> usize {
        cache.bytes()
    }

    fn experts(&self, slices: &ExpertSlices, moe: &Moe) -> Result<Experts> {
        self.experts_of(&slices.gate_up, &slices.down, moe)
    }

    fn routing(&self, rows: usize, moe: &Moe) -> Result<Routing> {
        Ok(Routing::new(rows, moe))
    }

    fn rope_table(&self, rope: &Rope, inv_freq: &[f64], magnitude: f64, positions: usize) -> Result<RopeTable> {
        Ok(RopeTable::new(&self.workers, rope.interleave, inv_freq, magnitude, positions))
    }

    fn begin(&mut self, batch: &Batch) -> Result<()> {
        check_batch(batch)?;
        self.batch.clone_from(batch);
        Ok(())
    }

    fn embed(&self, table: &Matrix, first: usize, out: &mut Tensor) -> Result<()> {
        assert_eq!(table.cols(), out.cols());
        let tokens = &self.batch.tokens;
        self.each_row(out, table.cols(), |r, out| {
            match (tokens[r] as usize).checked_sub(first) {
                Some(row) if row < table.rows() => {
                    table.read_row(row, out);
                    // −0 becomes 0, as it does in a sum over ranks.
                    out.iter_mut().for_each(|x| *x += 0.0);
                }
                _ => out.fill(0.0),
            }
        });
        Ok(())
    }

    fn norm(&self, x: &Tensor, weight: &Vec<f32>, eps: f32, out: &mut Tensor) -> Result<()> {
        self.norm_columns(View::new(x, 0, x.cols()), weight, eps, out);
        Ok(())
    }

    fn all_reduce(&mut self, x: &mut Tensor) -> Result<()> {
        let live = self.rows() * x.cols();
        let start = Instant::now();
        self.comm.all_reduce(&mut x.data[..live])?;
        self.reducing += start.elapsed();
        Ok(())
    }

    fn all_reduce_add_norm(
        &mut self,
        partial: &mut Tensor,
        bias: Option<&Vec<f32>>,
        x: &mut Tensor,
        weight: &Vec<f32>,
        eps: f32,
        out: &mut Tensor,
    ) -> Result<()> {
        self.all_reduce(partial)?;
        assert!(partial.cols() == x.cols() && bias.is_none_or(|b| b.len() == x.cols()));
        self.each_row(x, partial.cols(), |r, x| {
            let partial = &partial.data[r * x.len()..][..x.len()];
            match bias {
                Some(bias) => x.iter_mut().zip(partial).zip(bias).for_each(|((x, p), b)| *x += p + b),
                None => x.iter_mut().zip(partial).for_each(|(x, p)| *x += p),
            }
        });
        self.norm(x, weight, eps, out)
    }

    fn linear(&self, weight: &Matrix, bias: Option<&Vec<f32>>, x: View<Tensor>, out: &mut Tensor) -> Result<()> {
        self.check_view(&x, weight.cols());
        let (rows, stride) = (self.rows(), out.cols());
        assert!(rows <= out.rows() && weight.rows() == stride, "{} outputs into {stride} columns", weight.rows());
        let input = (x.tensor.data(), x.tensor.cols(), x.first);
        self.product(weight, bias.map(Vec::as_slice), input, rows, &mut out.data, stride);
        Ok(())
    }

    fn norm_latents(&self, latent: Normed<Self>, q: Option<Normed<Self>>, eps: f32) -> Result<()> {
        for n in q.into_iter().chain([latent]) {
            self.norm_columns(n.x, n.weight, eps, n.out);
        }
        Ok(())
    }

    fn rope_append_grouped(
        &self,
        shape: &AttentionShape,
        rope: &RopeTable,
        q: View<Tensor>,
        kv: View<Tensor>,
        k_rope: Option<View<Tensor>>,
        q_out: &mut Tensor,
        cache: &mut Cache,
    ) -> Result<()> {
        self.check_positions(rope)?;
        let (groups, nope, value) = (shape.groups, shape.nope, shape.value);
        assert_eq!(cache.layout, Layout::Grouped { groups, nope, rope: shape.rope, value });
        self.check_view(&kv, groups * (nope + value));
        match &k_rope {
            Some(k) => self.check_view(k, shape.rope),
            None => assert_eq!(shape.rope, 0, "a shared rope key that is not given"),
        }
        self.rotate_queries(shape, rope, q, k_rope.is_none(), q_out);
        let batch = &self.batch;
        cache.append(&self.workers, batch, 4 * (kv.width + shape.rope), |r, slot| {
            let position = batch.positions[r] as usize;
            let mut turned = vec![0.0; rope.dim()];
            for (g, kv) in columns(&kv, r).chunks_exact(nope + value).enumerate() {
                let first = g * (nope + value) * BLOCK;
                let (k, v) = kv.split_at(nope);
                if k_rope.is_none() {
                    rope.rotate(position, k, &mut turned);
                    slot.transposed(first, &turned);
                } else {
                    slot.transposed(first, k);
                }
                slot.row(first + nope * BLOCK, value).copy_from_slice(v);
            }
            if let Some(k) = &k_rope {
                rope.rotate(position, columns(k, r), &mut turned);
                slot.transposed(groups * (nope + value) * BLOCK, &turned);
            }
        })
    }

    fn append_latent(
        &self,
        shape: &AttentionShape,
        rope: &RopeTable,
        (latent, weight): (View<Tensor>, Option<&Vec<f32>>),
        k_rope: View<Tensor>,
        q: Option<Normed<Self>>,
        eps: f32,
        cache: &mut Cache,
    ) -> Result<()> {
        self.check_positions(rope)?;
        assert_eq!(cache.layout, Layout::Latent { latent: shape.latent, rope: shape.rope });
        self.check_view(&latent, shape.latent);
        self.check_view(&k_rope, shape.rope);
        if let Some(q) = q {
            self.norm_columns(q.x, q.weight, eps, q.out);
        }
        let (batch, isa) = (&self.batch, self.isa);
        cache.append(&self.workers, batch, shape.latent + shape.rope, |r, slot| {
            let (out, key) = slot.row(0, shape.latent + shape.rope).split_at_mut(shape.latent);
            match weight {
                Some(weight) => isa.run(ops::RmsNorm { x: columns(&latent, r), weight, eps, out }),
                None => out.copy_from_slice(columns(&latent, r)),
            }
            rope.rotate(batch.positions[r] as usize, columns(&k_rope, r), key);
        })
    }

    fn attend_grouped(&self, shape: &AttentionShape, q: &Tensor, cache: &Cache, out: &mut Tensor) -> Result<()> {
        assert_eq!((q.cols(), out.cols()), (shape.heads * (shape.nope + shape.rope), shape.heads * shape.value));
        attention::attend_grouped(&self.workers, self.isa, &self.batch, shape, q.data(), cache, &mut out.data)
    }

    fn absorb_query(
        &self,
        shape: &AttentionShape,
        rope: &RopeTable,
        kv_up: &Matrix,
        q: View<Tensor>,
        out: &mut Tensor,
    ) -> Result<()> {
        self.check_positions(rope)?;
        self.check_view(&q, shape.heads * (shape.nope + shape.rope));
        assert_eq!((out.cols(), rope.dim()), (shape.heads * (shape.latent + shape.rope), shape.rope));
        let positions = &self.batch.positions;
        let rows = self.absorbed_rows(shape);
        absorb::absorb_query(&self.workers, self.isa, shape, kv_up, &rows, |r| columns(&q, r), &mut out.data);
        self.each_row(out, out.cols(), |r, out| {
            let heads = columns(&q, r).chunks_exact(shape.nope + shape.rope);
            for (q, out) in heads.zip(out.chunks_exact_mut(shape.latent + shape.rope)) {
                rope.rotate(positions[r] as usize, &q[shape.nope..], &mut out[shape.latent..]);
            }
        });
        Ok(())
    }

    fn attend_latent(&self, shape: &AttentionShape, q: &Tensor, cache: &Cache, out: &mut Tensor) -> Result<()> {
        assert_eq!((q.cols(), out.cols()), (shape.heads * (shape.latent + shape.rope), shape.heads * shape.latent));
        attention::attend_latent(&self.workers, self.isa, &self.batch, shape, q.data(), cache, &mut out.data)
    }

    fn absorb_output(&self, shape: &AttentionShape, kv_up: &Matrix, latent: &Tensor, out: &mut Tensor) -> Result<()> {
        assert_eq!((latent.cols(), out.cols()), (shape.heads * shape.latent, shape.heads * shape.value));
        let rows = self.absorbed_rows(shape);
        absorb::absorb_output(&self.workers, self.isa, shape, kv_up, &rows, latent.data(), &mut out.data);
        Ok(())
    }

    fn attend_expanded(
        &mut self,
        shape: &AttentionShape,
        rope: &RopeTable,
        kv_up: &Matrix,
        q: View<Tensor>,
        cache: &Cache,
        out: &mut Tensor,
    ) -> Result<()> {
        self.check_positions(rope)?;
        self.check_view(&q, shape.heads * (shape.nope + shape.rope));
        assert_eq!(out.cols(), shape.heads * shape.value);
        let mut expansion = std::mem::take(&mut self.expansion);
        let q = |r| columns(&q, r);
        let done = expansion.attend(&self.workers, self.isa, &self.batch, shape, rope, kv_up, q, cache, &mut out.data);
        self.expansion = expansion;
        done
    }

    fn silu_mul(&self, gate_up: &Tensor, width: usize, out: &mut Tensor) -> Result<()> {
        assert_eq!((gate_up.cols(), out.cols()), (2 * width, width));
        let isa = self.isa;
        self.each_row(out, width, |r, out| {
            let (gate, up) = gate_up.data[r * 2 * width..][..2 * width].split_at(width);
            isa.run(ops::SiluMul { gate, up, out });
        });
        Ok(())
    }

    fn route(
        &self,
        moe: &Moe,
        gate: &Matrix,
        bias: Option<&Vec<f32>>,
        x: &Tensor,
        routing: &mut Routing,
    ) -> Result<()> {
        assert_eq!(gate.cols(), x.cols());
        routing.choose(&self.workers, self.isa, moe, gate, bias.map(Vec::as_slice), x.data(), self.rows());
        Ok(())
    }

    fn moe(&mut self, experts: &Experts, routing: &Routing, x: &Tensor, out: &mut Tensor) -> Result<()> {
        assert_eq!((x.cols(), out.cols()), (experts.hidden, experts.hidden));
        let rows = self.rows();
        moe::moe(&self.workers, self.isa, experts, routing, rows, x.data(), &mut self.hold, &mut out.data);
        Ok(())
    }

    fn select_outputs(&self, x: &Tensor, out: &mut Tensor) -> Result<()> {
        let cols = x.cols();
        assert!(out.cols() == cols && self.batch.outputs.len() <= out.rows());
        for (i, &row) in self.batch.outputs.iter().enumerate() {
            out.data[i * cols..][..cols].copy_from_slice(&x.data[row as usize * cols..][..cols]);
        }
        Ok(())
    }

    fn head(&mut self, head: &Matrix, x: &Tensor, first: usize, _choose: bool) -> Result<()> {
        let rows = self.batch.outputs.len();
        assert!(head.cols() == x.cols() && rows <= x.rows());
        let mut logits = std::mem::take(&mut self.logits);
        logits.resize(rows * head.rows(), 0.0);
        self.product(head, None, (x.data(), x.cols(), 0), rows, &mut logits, head.rows());
        self.logits = logits;
        (self.vocab, self.first) = (head.rows(), first);
        Ok(())
    }

    fn read_logits(&mut self, logits: &mut Vec<f32>) -> Result<()> {
        logits.clone_from(&self.logits);
        Ok(())
    }

    fn read_best(&mut self, best: &mut Vec<(f32, u32)>) -> Result<()> {
        best.clear();
        let draws = self.batch.draws.iter().copied().chain(std::iter::repeat(Draw::default()));
        let rows = self.logits.chunks(self.vocab.max(1)).zip(draws);
        best.extend(rows.map(|(logits, draw)| draw.best(self.first as u32, logits)));
        Ok(())
    }

    fn read(&self, x: &Tensor, rows: usize) -> Result<Vec<f32>> {
        Ok(x.data[..rows * x.cols()].to_vec())
    }

    fn write_rows(&self, values: &[f32], x: &mut Tensor) -> Result<()> {
        x.data[..values.len()].copy_from_slice(values);
        Ok(())
    }

    fn reduce_time(&mut self) -> Option<Duration> {
        Some(std::mem::take(&mut self.reducing))
    }

    fn fitting_blocks(&self, model: &ModelConfig, owned: &Owned, wanted: usize, utilization: f64) -> Result<usize> {
        let block = Layout::of(model, owned).elements() * self.cache_element() * BLOCK * model.layers;
        let hidden_and_head = 2 * owned.vocab.len() * model.hidden * 2;
        // Weights are read after this: a quarter of what is free leaves them room.
        let share = available_memory() as f64 * utilization / 4.0 / self.comm.local().1 as f64;
        let fits = (share as usize).saturating_sub(hidden_and_head) / block.max(1);
        Ok(wanted.min(fits.max(1)))
    }

    fn synchronize(&mut self) -> Result<()> {
        Ok(())
    }

    fn describe(&self) -> String {
        let threads = self.threads();
        format!("CPU ({:?}, {threads} thread{} a rank)", self.isa, if threads == 1 { "" } else { "s" })
    }

    fn cache_element(&self) -> usize {
        4
    }

    fn fill_cache(&self, cache: &mut Cache, seed: u64) -> Result<()> {
        noise(seed, cache.data_mut());
        Ok(())
    }

    fn noise_tensor(&self, rows: usize, cols: usize, seed: u64) -> Result<Tensor> {
        let mut tensor = self.tensor(rows, cols)?;
        noise(seed, tensor.data_mut());
        Ok(tensor)
    }

    fn bandwidth(&mut self) -> Result<f64> {
        read_bandwidth(self.threads(), 1 << 30)
    }

    fn comm(&mut self) -> &mut dyn Communicator {
        &mut *self.comm
    }

    fn into_comm(self) -> Box<dyn Communicator> {
        self.comm
    }
}

/// Row `r` of a view.
fn columns<'a>(x: &View<'a, Tensor>, r: usize) -> &'a [f32] {
    &x.tensor.data[r * x.tensor.cols() + x.first..][..x.width]
}

/// Refuses a batch whose parts contradict each other.
fn check_batch(batch: &Batch) -> Result<()> {
    let refuse = |what: String| Err(Error::Internal(format!("a step whose {what}")));
    let rows = batch.rows();
    if batch.positions.len() != rows {
        return refuse(format!("{rows} tokens have {} positions", batch.positions.len()));
    }
    let mut next = 0;
    for span in &batch.spans {
        if span.first != next || span.rows > rows - next || span.rows > span.context {
            return refuse(format!("spans do not follow one another: {} rows at {}", span.rows, span.first));
        }
        if span.blocks.len() < span.context.div_ceil(BLOCK) {
            return refuse(format!("sequence has {} blocks for {} tokens", span.blocks.len(), span.context));
        }
        let positions = &batch.positions[span.first..span.first + span.rows];
        if !positions.iter().copied().eq((span.context - span.rows..span.context).map(|p| p as u32)) {
            return refuse(format!("positions do not end at the context of {} tokens", span.context));
        }
        next += span.rows;
    }
    if next != rows || batch.outputs.iter().any(|&r| r as usize >= rows) {
        return refuse(format!("spans cover {next} of {rows} rows, or whose outputs are beyond them"));
    }
    Ok(())
}

/// Values between -1 and 1 that depend on `seed` and their place: a multiplicative hash, its top bits.
fn noise(seed: u64, out: &mut [f32]) {
    for (i, out) in out.iter_mut().enumerate() {
        let hash = (seed.wrapping_mul(0x9E37_79B9) ^ i as u64).wrapping_mul(0xD6E8_FEB8_6659_FD93);
        *out = ((hash >> 40) as f32 / (1u64 << 23) as f32) - 1.0;
    }
}

/// Bytes the operating system would give without swapping.
pub fn available_memory() -> usize {
    let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = info.lines().find_map(|l| l.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|l| l.trim().trim_end_matches("kB").trim().parse::<usize>().ok());
    kib.map_or(4 << 30, |kib| kib * 1024)
}
