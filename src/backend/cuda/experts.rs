//! The router and the chosen experts.

use std::sync::Arc;

use super::context::{Gpu, Memory, bytes_of};
use super::kernels::{Kernels, Launch, arguments, source};
use super::load::{Loader, Matrix, Vector};
use crate::backend::ExpertSlices;
use crate::config::{Moe, Scoring};
use crate::error::{Error, Result};

/// The kernels' parameter blocks, field by field as in `kernels/`.
#[repr(C)]
struct Route([u64; 11], i32, f32);
#[repr(C)]
#[derive(Clone, Copy)]
struct ExpertsRun {
    tensors: [u64; 12],
    out: u64,
    rows: i32,
}
#[repr(C)]
struct TileJob(u64, u64, i32, i32, i32);

/// The experts of one layer, this rank's columns, bf16; on Hopper in tiles (`kernels/experts_tile.cu`), where their
/// dimensions allow it.
pub struct Experts {
    /// `[experts, 2·width, hidden]`, gate rows first.
    gate_up: Memory,
    /// `[experts, hidden, width]`
    down: Memory,
    /// The shared expert's.
    shared: Option<(Memory, Memory)>,
    experts: usize,
    top_k: usize,
    hidden: usize,
    width: usize,
    shared_width: usize,
    tiled: bool,
}

/// Chosen experts and their weights, `[rows, top_k]`, and the plan of their products.
pub struct Routing {
    ids: Memory,
    weights: Memory,
    logits: Memory,
    arrived: Memory,
    /// Segments; then each one's expert and rows.
    count: Memory,
    segments: Memory,
    order: Memory,
    /// Experts a token.
    pub top_k: usize,
}

impl Experts {
    /// Room for all weights; `widths` of an expert and of the shared one.
    fn room(gpu: &Arc<Gpu>, moe: &Moe, hidden: usize, (width, shared_width): (usize, usize)) -> Result<Experts> {
        let memory = |elements: usize| Memory::uninit(gpu, elements * 2);
        let shared = match shared_width {
            0 => None,
            w => Some((memory(2 * w * hidden)?, memory(w * hidden)?)),
        };
        Ok(Experts {
            gate_up: memory(moe.experts * 2 * width * hidden)?,
            down: memory(moe.experts * width * hidden)?,
            shared,
            experts: moe.experts,
            top_k: moe.top_k,
            hidden,
            width,
            shared_width,
            tiled: gpu.sm() == 90 && [hidden, width, shared_width].iter().all(|n| n % 64 == 0),
        })
    }

    /// Fills every matrix: `rows(expert, up, at)` writes an expert's gate and up rows, or its down rows, at `at`.
    fn fill(&self, gpu: &Arc<Gpu>, kernels: &Kernels, rows: impl Fn(usize, bool, u64) -> Result<()>) -> Result<()> {
        let widest = self.width.max(self.shared_width);
        let plain = Memory::uninit(gpu, if self.tiled { 4 * widest * self.hidden } else { 0 })?;
        for e in 0..self.experts + usize::from(self.shared.is_some()) {
            for up in [true, false] {
                let (memory, n, width) = match &self.shared {
                    Some((u, d)) if e == self.experts => (if up { u } else { d }, 0, self.shared_width),
                    _ => (if up { &self.gate_up } else { &self.down }, e, self.width),
                };
                let (height, columns) = if up { (2 * width, self.hidden) } else { (self.hidden, width) };
                let to = memory.at() + (n * height * columns * 2) as u64;
                if !self.tiled {
                    rows(e, up, to)?;
                    continue;
                }
                rows(e, up, plain.at())?;
                let job = TileJob(plain.at(), to, height as i32, columns as i32, i32::from(up));
                let f = kernels.get(&source::EXPERTS_TILE, "experts_tile", &[])?;
                kernels.launch(f, Launch::new((height * columns).div_ceil(8 * 256), 256), arguments![job])?;
            }
        }
        Ok(())
    }

    pub(crate) fn load(
        gpu: &Arc<Gpu>,
        loader: &Loader,
        kernels: &Kernels,
        slices: &ExpertSlices,
        moe: &Moe,
    ) -> Result<Experts> {
        let expected = moe.experts + usize::from(moe.shared_width > 0);
        let (count, downs) = (slices.gate_up.len(), slices.down.len());
        let (Some(first), true) = (slices.down.first().and_then(|d| d.first()), count == expected && downs == expected)
        else {
            return Err(Error::Internal(format!("{count} and {downs} experts, not {expected}")));
        };
        let shared_width = slices.down.get(moe.experts).and_then(|d| d.first()).map_or(0, |d| d.cols());
        if shared_width == 0 && moe.shared_width > 0 {
            return Err(Error::Internal(format!(
                "a rank with none of the shared expert's {} columns",
                moe.shared_width
            )));
        }
        let e = Experts::room(gpu, moe, first.rows(), (first.cols(), shared_width))?;
        e.fill(gpu, kernels, |expert, up, at| {
            loader.rows(kernels, &(if up { &slices.gate_up } else { &slices.down })[expert], at)
        })?;
        Ok(e)
    }

    /// Experts from host memory: per expert gate and up `[2·width, hidden]` and down `[hidden, width]`, the shared last.
    pub(crate) fn from_host(
        gpu: &Arc<Gpu>,
        kernels: &Kernels,
        gate_up: &[Vec<u16>],
        down: &[Vec<u16>],
        hidden: usize,
        moe: &Moe,
    ) -> Result<Experts> {
        let e = Experts::room(gpu, moe, hidden, (moe.width, moe.shared_width))?;
        e.fill(gpu, kernels, |expert, up, at| {
            gpu.upload(at, bytes_of(&(if up { gate_up } else { down })[expert]))?;
            gpu.synchronize()
        })?;
        Ok(e)
    }
}

/// The constants of the router for `rows` rows.
pub fn route_constants(moe: &Moe, hidden: usize, rows: usize) -> Vec<(&'static str, i64)> {
    let scoring = match moe.scoring {
        Scoring::NoAuxTc => 0,
        Scoring::SoftmaxGreedy => 1,
        Scoring::SoftmaxGroupLimited => 2,
    };
    vec![
        ("EXPERTS", moe.experts as i64),
        ("TOP_K", moe.top_k as i64),
        ("GROUPS", moe.groups as i64),
        ("TOP_GROUPS", moe.top_groups as i64),
        ("HIDDEN", hidden as i64),
        ("SCORING", scoring),
        ("NORMALISE", i64::from(moe.normalise)),
        ("SHARED", i64::from(moe.shared_width > 0)),
        ("TOKENS", tokens(rows)),
    ]
}

/// Rows of a segment: an expert with more has several.
fn tokens(rows: usize) -> i64 {
    if rows <= 8 { 8 } else { 64 }
}

/// The constants of the experts' products for `rows` rows, `width` and `shared_width` columns on the rank.
pub fn expert_constants(
    (experts, top_k, hidden): (usize, usize, usize),
    (width, shared_width): (usize, usize),
    rows: usize,
) -> Vec<(&'static str, i64)> {
    vec![
        ("EXPERTS", experts as i64),
        ("TOP_K", top_k as i64),
        ("HIDDEN", hidden as i64),
        ("WIDTH", width as i64),
        ("SHARED_WIDTH", shared_width as i64),
        ("TOKENS", tokens(rows)),
    ]
}

impl Routing {
    pub(crate) fn new(gpu: &Arc<Gpu>, rows: usize, moe: &Moe) -> Result<Routing> {
        let memory = |each: usize| Memory::new(gpu, rows * each * 4);
        let slots = moe.top_k + usize::from(moe.shared_width > 0);
        let segments = moe.experts + 2 + (rows * slots).div_ceil(8);
        Ok(Routing {
            ids: memory(moe.top_k)?,
            weights: memory(moe.top_k)?,
            logits: memory(moe.experts)?,
            arrived: Memory::new(gpu, (1 + rows.div_ceil(4)) * 4)?,
            count: Memory::new(gpu, 8)?,
            segments: Memory::new(gpu, segments * 16)?,
            order: memory(slots)?,
            top_k: moe.top_k,
        })
    }

    pub(crate) fn ids(&self) -> u64 {
        self.ids.at()
    }

    pub(crate) fn weights(&self) -> u64 {
        self.weights.at()
    }

    pub(crate) fn choose(
        &mut self,
        kernels: &Kernels,
        moe: &Moe,
        gate: &Matrix,
        bias: Option<&Vector>,
        (x, hidden): (u64, usize),
        (row_seq, rows): (u64, usize),
    ) -> Result<()> {
        let a = Route(
            [
                x,
                gate.memory.at(),
                bias.map_or(0, |b| b.memory.at()),
                self.logits.at(),
                self.ids.at(),
                self.weights.at(),
                row_seq,
                self.arrived.at(),
                self.count.at(),
                self.segments.at(),
                self.order.at(),
            ],
            rows as i32,
            moe.scale,
        );
        let f = kernels.get(&source::ROUTE, "route", &route_constants(moe, hidden, rows))?;
        let grid = (8, rows.div_ceil(4), 1);
        kernels.launch(f, Launch { grid, block: 256, ..Launch::default() }, arguments![a])
    }
}

/// What the experts' products leave behind: f32 `[rows, results, hidden]` at `y`, of which the first `top_k` have weights.
pub(crate) struct Results {
    /// The results.
    pub y: u64,
    /// The weights, f32 `[rows, top_k]`.
    pub weights: u64,
    /// The experts, `[rows, top_k]`.
    pub ids: u64,
    /// Results a row.
    pub results: usize,
    /// Experts a row.
    pub top_k: usize,
    /// Their sum may begin only when the products have ended: they do not keep it from starting too early.
    pub serial: bool,
    /// The workspace had to grow.
    pub grown: bool,
    run: ExpertsRun,
    constants: Vec<(&'static str, i64)>,
}

/// What the experts' kernels need between them.
#[derive(Default)]
pub(crate) struct Workspace {
    memory: Option<Memory>,
}

impl Workspace {
    /// Enqueues the products of the experts of `rows` rows of `x`.
    pub fn products(
        &mut self,
        gpu: &Arc<Gpu>,
        kernels: &Kernels,
        e: &Experts,
        routing: &Routing,
        rows: usize,
        x: u64,
    ) -> Result<Results> {
        let dims = (e.experts, e.top_k, e.hidden);
        let constants = expert_constants(dims, (e.width, e.shared_width), rows);
        let slots = e.top_k + usize::from(e.shared_width > 0);
        let h_bytes = (rows * slots * e.width.max(e.shared_width) * 2).next_multiple_of(256);
        let bytes = h_bytes + rows * slots * e.hidden * 4;
        let grow = self.memory.as_ref().is_none_or(|m| m.bytes() < bytes);
        if grow {
            self.memory = None;
            self.memory = Some(Memory::new(gpu, bytes)?);
        }
        let h = self.memory.as_ref().map_or(0, Memory::at);
        let (shared_up, shared_down) = e.shared.as_ref().map_or((0, 0), |(u, d)| (u.at(), d.at()));
        let a = ExpertsRun {
            tensors: [
                x,
                routing.ids(),
                routing.weights(),
                e.gate_up.at(),
                e.down.at(),
                shared_up,
                shared_down,
                routing.count.at(),
                routing.segments.at(),
                routing.order.at(),
                h,
                h + h_bytes as u64,
            ],
            out: 0,
            rows: rows as i32,
        };
        let get = |source, entry| kernels.get(source, entry, &constants);
        let streamed = gpu.sm() >= 90 && [e.hidden, e.width, e.shared_width].iter().all(|w| w % 32 == 0);
        let cores = gpu.info.multiprocessors;
        let (source, entries) = match (e.tiled, streamed) {
            (true, _) => (&source::EXPERTS_HOPPER, ["experts_gate_up_hopper", "experts_down_hopper"]),
            (_, true) => (&source::EXPERTS, ["experts_gate_up", "experts_down"]),
            _ => (&source::EXPERTS, ["experts_gate_up_any", "experts_down_any"]),
        };
        for (i, entry) in entries.into_iter().enumerate() {
            let f = get(source, entry)?;
            let exports = f.exports();
            let launch = match streamed {
                true => Launch::new(cores, exports[2]).shared(exports[i]),
                false => Launch::new(4 * cores, 256),
            };
            kernels.launch(f, launch, arguments![a])?;
        }
        Ok(Results {
            y: h + h_bytes as u64,
            weights: routing.weights(),
            ids: routing.ids(),
            results: slots,
            top_k: e.top_k,
            serial: !streamed,
            grown: grow,
            run: a,
            constants,
        })
    }

    /// Enqueues the weighted sums of `rows` rows of results, into `out`.
    pub fn sum(&self, kernels: &Kernels, e: &Experts, rows: usize, results: &Results, out: u64) -> Result<()> {
        let grid = (e.hidden.div_ceil(1024), rows, 1);
        let launch = Launch { grid, block: 128, serial: results.serial, ..Launch::default() };
        let f = kernels.get(&source::EXPERTS, "experts_sum", &results.constants)?;
        let a = ExpertsRun { out, ..results.run };
        kernels.launch(f, launch, arguments![a])
    }
}
