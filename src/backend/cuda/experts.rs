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
struct Route(u64, u64, u64, u64, u64, u64, u64, i32, f32);
#[repr(C)]
struct ExpertsRun([u64; 13], i32);

/// The experts of one layer, this rank's columns, bf16.
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
}

/// Chosen experts and their weights, `[rows, top_k]`.
pub struct Routing {
    ids: Memory,
    weights: Memory,
    logits: Memory,
    /// Experts a token.
    pub top_k: usize,
}

impl Experts {
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
        let (hidden, width) = (first.rows(), first.cols());
        let shared_width = slices.down.get(moe.experts).and_then(|d| d.first()).map_or(0, |d| d.cols());
        let gate_up = Memory::uninit(gpu, moe.experts * 2 * width * hidden * 2)?;
        let down = Memory::uninit(gpu, moe.experts * width * hidden * 2)?;
        for e in 0..moe.experts {
            loader.rows(kernels, &slices.gate_up[e], gate_up.at() + (e * 4 * width * hidden) as u64)?;
            loader.rows(kernels, &slices.down[e], down.at() + (e * 2 * width * hidden) as u64)?;
        }
        let shared = match shared_width {
            0 => None,
            _ => Some((
                loader.matrix(kernels, &slices.gate_up[moe.experts])?.memory,
                loader.matrix(kernels, &slices.down[moe.experts])?.memory,
            )),
        };
        Ok(Experts { gate_up, down, shared, experts: moe.experts, top_k: moe.top_k, hidden, width, shared_width })
    }

    /// Experts from host memory: per expert gate and up `[2·width, hidden]` and down `[hidden, width]`, the shared last.
    pub(crate) fn from_host(
        gpu: &Arc<Gpu>,
        gate_up: &[Vec<u16>],
        down: &[Vec<u16>],
        hidden: usize,
        moe: &Moe,
    ) -> Result<Experts> {
        let copy = |parts: &[Vec<u16>]| {
            let all = parts.concat();
            let memory = Memory::uninit(gpu, all.len() * 2)?;
            gpu.upload(memory.at(), bytes_of(&all))?;
            gpu.synchronize().map(|()| memory)
        };
        let shared = match moe.shared_width {
            0 => None,
            _ => Some((copy(&gate_up[moe.experts..])?, copy(&down[moe.experts..])?)),
        };
        let (gate_up, down) = (copy(&gate_up[..moe.experts])?, copy(&down[..moe.experts])?);
        let (width, shared_width) = (moe.width, moe.shared_width);
        Ok(Experts { gate_up, down, shared, experts: moe.experts, top_k: moe.top_k, hidden, width, shared_width })
    }
}

/// The constants of the router.
pub fn route_constants(moe: &Moe, hidden: usize) -> Vec<(&'static str, i64)> {
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
    ]
}

/// The constants of the experts' products for `rows` rows, `width` and `shared_width` columns on the rank.
pub fn expert_constants(
    (experts, top_k, hidden): (usize, usize, usize),
    (width, shared_width): (usize, usize),
    rows: usize,
) -> Vec<(&'static str, i64)> {
    let tokens = match rows {
        0..=8 => 8,
        9..=256 => 16,
        _ => 32,
    };
    vec![
        ("EXPERTS", experts as i64),
        ("TOP_K", top_k as i64),
        ("HIDDEN", hidden as i64),
        ("WIDTH", width as i64),
        ("SHARED_WIDTH", shared_width as i64),
        ("TOKENS", tokens),
    ]
}

impl Routing {
    pub(crate) fn new(gpu: &Arc<Gpu>, rows: usize, moe: &Moe) -> Result<Routing> {
        let memory = |each: usize| Memory::new(gpu, rows * each * 4);
        Ok(Routing {
            ids: memory(moe.top_k)?,
            weights: memory(moe.top_k)?,
            logits: memory(moe.experts)?,
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
        let constants = route_constants(moe, hidden);
        let a = Route(
            x,
            gate.memory.at(),
            bias.map_or(0, |b| b.memory.at()),
            self.logits.at(),
            self.ids.at(),
            self.weights.at(),
            row_seq,
            rows as i32,
            moe.scale,
        );
        let f = kernels.get(&source::ROUTE, "route_logits", &constants)?;
        let grid = (moe.experts.div_ceil(8), rows.div_ceil(8), 1);
        kernels.launch(f, Launch { grid, block: 256, ..Launch::default() }, arguments![a])?;
        let f = kernels.get(&source::ROUTE, "route_choose", &constants)?;
        kernels.launch(f, Launch::new(rows.div_ceil(4), 128), arguments![a])
    }
}

/// What the experts' kernels need between them: pairs sorted by expert, and intermediate rows.
#[derive(Default)]
pub(crate) struct Workspace {
    memory: Option<Memory>,
}

impl Workspace {
    /// Bytes for `rows` rows of experts with `slots` a row: count, segments, order, h and y, each 256-byte aligned.
    fn layout(rows: usize, slots: usize, experts: usize, width: usize, hidden: usize) -> [usize; 5] {
        let pairs = rows * slots;
        let segments = experts + 2 + pairs.div_ceil(8);
        [8, segments * 16, pairs * 4, pairs * width * 2, pairs * hidden * 4].map(|b: usize| b.next_multiple_of(256))
    }

    /// Enqueues the experts of `rows` rows; tells whether the workspace had to grow.
    pub fn run(
        &mut self,
        gpu: &Arc<Gpu>,
        kernels: &Kernels,
        e: &Experts,
        routing: &Routing,
        rows: usize,
        x: u64,
        out: u64,
    ) -> Result<bool> {
        let dims = (e.experts, e.top_k, e.hidden);
        let constants = expert_constants(dims, (e.width, e.shared_width), rows);
        let slots = e.top_k + usize::from(e.shared_width > 0);
        let sizes = Workspace::layout(rows, slots, e.experts, e.width.max(e.shared_width), e.hidden);
        let bytes: usize = sizes.iter().sum();
        let grow = self.memory.as_ref().is_none_or(|m| m.bytes() < bytes);
        if grow {
            self.memory = None;
            self.memory = Some(Memory::new(gpu, bytes)?);
        }
        let mut next = self.memory.as_ref().map_or(0, Memory::at);
        let [count, segments, order, h, y] = sizes.map(|size| {
            let at = next;
            next += size as u64;
            at
        });
        let (shared_up, shared_down) = e.shared.as_ref().map_or((0, 0), |(u, d)| (u.at(), d.at()));
        let a = ExpertsRun(
            [
                x,
                routing.ids(),
                routing.weights(),
                e.gate_up.at(),
                e.down.at(),
                shared_up,
                shared_down,
                count,
                segments,
                order,
                h,
                y,
                out,
            ],
            rows as i32,
        );
        let get = |entry| kernels.get(&source::EXPERTS, entry, &constants);
        kernels.launch(get("experts_plan")?, Launch::new(1, 512), arguments![a])?;
        let streamed = gpu.sm() >= 90 && [e.hidden, e.width, e.shared_width].iter().all(|w| w % 32 == 0);
        let cores = gpu.info.multiprocessors;
        if streamed {
            for (i, entry) in ["experts_gate_up", "experts_down"].into_iter().enumerate() {
                let f = get(entry)?;
                let exports = f.exports();
                kernels.launch(f, Launch::new(cores, exports[2]).shared(exports[i]), arguments![a])?;
            }
        } else {
            for entry in ["experts_gate_up_any", "experts_down_any"] {
                kernels.launch(get(entry)?, Launch::new(4 * cores, 256), arguments![a])?;
            }
        }
        // It reads the choice before it waits, and the plain products do not keep it from starting too early.
        let grid = (e.hidden.div_ceil(1024), rows, 1);
        let sum = Launch { grid, block: 128, serial: !streamed, ..Launch::default() };
        kernels.launch(get("experts_sum")?, sum, arguments![a])?;
        Ok(grow)
    }
}
