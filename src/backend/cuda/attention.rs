//! Attention over the paged cache: which kernel takes which rows, the split of the work, and the workspace for partial
//! results.

use std::cell::{Cell, RefCell};
use std::sync::Arc;

use super::Operand;
use super::context::{Gpu, Memory};
use super::kernels::{Function, Kernels, Launch, Source, arguments, source};
use super::step::{Inputs, Run};
use super::stream::clusters;
use crate::backend::AttentionShape;
use crate::error::{Error, Result};

/// The kernels' parameter blocks, field by field as in `kernels/`.
#[repr(C)]
struct GqaDecode {
    q: u64,
    cache: u64,
    out: u64,
    part_o: u64,
    part_lse: u64,
    block_table: u64,
    lens: u64,
    team: u64,
    groups: i32,
    max_blocks: i32,
    teams: i32,
    scale: f32,
    // So far as the portable kernel has it.
    kv: u64,
    k_rope: u64,
    cos_table: u64,
    sin_table: u64,
    q_stride: i32,
    kv_stride: i32,
    k_rope_stride: i32,
}
#[repr(C)]
struct AbsorbParams {
    q: u64,
    cache: u64,
    block_table: u64,
    lens: u64,
    team: u64,
    seq: u64,
    out: u64,
    part_o: u64,
    part_lse: u64,
    max_blocks: i32,
    scale: f32,
}
#[repr(C)]
struct Plan {
    lens: u64,
    team: u64,
    seq: u64,
    batch: i32,
    teams: i32,
    /// split_plan's min_blocks, absorb_plan's part_cost.
    least: i32,
}
#[repr(C)]
struct Combine {
    part_o: u64,
    part_lse: u64,
    seq: u64,
    out: u64,
    rows: i32,
    heads: i32,
    warps: i32,
}
#[repr(C)]
struct CombineOutput {
    kv_up: u64,
    part_o: u64,
    part_lse: u64,
    seq: u64,
    whole: u64,
    out: u64,
    rows: i32,
    heads: i32,
    heads_per_group: i32,
    first_head_in_group: i32,
    tile: i32,
}
#[repr(C)]
pub(super) struct Prefill {
    pub q: u64,
    pub cache: u64,
    pub out: u64,
    pub block_table: u64,
    pub lens: u64,
    pub first: u64,
    pub rows: u64,
    pub groups: i32,
    pub max_blocks: i32,
    pub scale: f32,
}

/// Which of the two caches is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// Keys and values of groups.
    Grouped,
    /// Latents.
    Latent,
}

/// What a step appends to a grouped cache: projections that are not turned yet, and the angles.
#[derive(Clone, Copy)]
pub(super) struct Fresh {
    pub q: Operand,
    pub kv: Operand,
    /// Of zeros where there is no shared rope key.
    pub k_rope: Operand,
    pub cos: u64,
    pub sin: u64,
    pub interleave: bool,
}

/// A decode kernel, chosen for a shape and s_q.
struct Decode {
    function: Function,
    threads: usize,
    shared: usize,
    /// CTAs that share a stretch of cache.
    row_groups: usize,
    /// CTAs at once on the GPU.
    resident: usize,
}

/// Where a decode kernel leaves its results: of sequences that one team has alone in its output, of the others in parts.
struct Parts {
    part_o: u64,
    part_lse: u64,
    seq: u64,
    /// The parts that a sequence has on average, were all of them equally long.
    each: usize,
}

/// Workspaces of attention. They grow on first use of a size, never inside a graph.
pub(crate) struct Attention {
    gpu: Arc<Gpu>,
    /// Partial outputs and their log-sum-exps.
    parts: RefCell<Option<(Memory, Memory)>>,
    /// Teams and sequences of each run's plan: one region a run.
    plans: RefCell<Vec<(Memory, Memory)>>,
    /// Runs planned in this step.
    planned: Cell<usize>,
    /// Counts growths: graphs made before are void.
    pub generation: Cell<u64>,
}

impl Attention {
    pub fn new(gpu: &Arc<Gpu>) -> Attention {
        Attention {
            gpu: gpu.clone(),
            parts: RefCell::new(None),
            plans: RefCell::default(),
            planned: Cell::new(0),
            generation: Cell::new(0),
        }
    }

    /// A new step: nothing is planned.
    pub fn begin(&self) {
        self.planned.set(0);
    }

    /// Enqueues attention of all rows of the step. `q`, `cache` and `out` are addresses.
    pub fn attend(
        &self,
        kernels: &Kernels,
        inputs: &Inputs,
        shape: &AttentionShape,
        form: Form,
        q: u64,
        cache: u64,
        out: u64,
    ) -> Result<()> {
        let (q_width, out_width) = widths(shape, form);
        for (i, run) in inputs.runs.iter().enumerate() {
            let skip = |width: usize| (run.first * shape.heads * width * 2) as u64;
            let out = out + skip(out_width);
            let parts = self.decode(kernels, inputs, shape, form, (i, run), q + skip(q_width), None, cache, out)?;
            self.combine(kernels, shape, form, run, &parts, out)?;
        }
        for chunk in inputs.chunks(|rows, context| !shape.expands(rows, context)) {
            let (f, [threads, shared, tiles]) = prefill(kernels, &self.gpu, shape, form)?;
            let (groups, per_group) = match form {
                Form::Grouped => (shape.groups, shape.heads / shape.groups),
                Form::Latent => (1, shape.heads),
            };
            let arguments = Prefill {
                q,
                cache,
                out,
                block_table: inputs.tables(chunk.span),
                lens: inputs.lens(chunk.span),
                first: inputs.first(chunk.span),
                rows: inputs.span_rows(chunk.span),
                groups: groups as i32,
                max_blocks: inputs.max_blocks as i32,
                scale: shape.scale,
            };
            let grid = ((chunk.rows * per_group).div_ceil(16 * tiles), groups, chunk.count);
            kernels.launch(f, Launch { grid, block: threads, shared, ..Launch::default() }, arguments![arguments])?;
        }
        Ok(())
    }

    /// Enqueues rotation, append and attention, where one launch does them all: on Hopper, in a step that is one run of
    /// few rows each. Elsewhere it enqueues nothing and says false.
    pub fn append_attend(
        &self,
        kernels: &Kernels,
        inputs: &Inputs,
        shape: &AttentionShape,
        fresh: Fresh,
        cache: u64,
        out: u64,
    ) -> Result<bool> {
        let [run] = inputs.runs.as_slice() else { return Ok(false) };
        let takes = *decode_source(shape, false, run.rows, self.gpu.sm() == 90).0 == source::GQA_DECODE;
        // The kernel reads 16 bytes at a time.
        let aligned = |x: Operand| x.at.is_multiple_of(16) && x.stride.is_multiple_of(8);
        let takes = takes && [fresh.q, fresh.kv, fresh.k_rope].into_iter().all(aligned);
        if !takes || run.count * run.rows < inputs.rows {
            return Ok(false);
        }
        let form = Form::Grouped;
        let parts = self.decode(kernels, inputs, shape, form, (0, run), fresh.q.at, Some(fresh), cache, out)?;
        self.combine(kernels, shape, form, run, &parts, out)?;
        Ok(true)
    }

    /// Enqueues decode attention over latents and the product with W_UV, where the launch that joins a sequence's parts
    /// multiplies too: on Hopper, in a step that is one run of not too many rows. Elsewhere it enqueues nothing and says
    /// false.
    pub fn attend_absorbed(
        &self,
        kernels: &Kernels,
        inputs: &Inputs,
        shape: &AttentionShape,
        (q, cache, latent): (u64, u64, u64),
        kv_up: u64,
        out: u64,
    ) -> Result<bool> {
        let fits = decode_source(shape, true, 1, self.gpu.sm() == 90).0.hopper && combines_output(shape);
        let ([run], true) = (inputs.runs.as_slice(), fits) else { return Ok(false) };
        let rows = run.count * run.rows;
        if rows < inputs.rows {
            return Ok(false);
        }
        let pairs = rows * shape.heads.min(shape.heads_per_group);
        let Some((split, tile)) = joined_cut(pairs, shape.groups, self.gpu.info.multiprocessors) else {
            return Ok(false);
        };
        let parts = self.decode(kernels, inputs, shape, Form::Latent, (0, run), q, None, cache, latent)?;
        let constants =
            [("SQ", run.rows as i64), ("DN", shape.nope as i64), ("DV", shape.value as i64), ("SPLIT", split as i64)];
        let f = kernels.get(&source::COMBINE_OUTPUT, "combine_output", &constants)?;
        let a = CombineOutput {
            kv_up,
            part_o: parts.part_o,
            part_lse: parts.part_lse,
            seq: parts.seq,
            whole: latent,
            out,
            rows: rows as i32,
            heads: shape.heads as i32,
            heads_per_group: shape.heads_per_group as i32,
            first_head_in_group: shape.first_head_in_group as i32,
            tile: tile as i32,
        };
        let grid = (split, pairs.div_ceil(tile), shape.groups);
        let launch = Launch { grid, block: 512, shared: f.exports()[0], ..Launch::default() };
        kernels.launch(f, launch, arguments![a])?;
        Ok(true)
    }

    /// The decode kernel of a run. Over groups it appends what is `fresh`.
    fn decode(
        &self,
        kernels: &Kernels,
        inputs: &Inputs,
        shape: &AttentionShape,
        form: Form,
        (index, run): (usize, &Run),
        q: u64,
        fresh: Option<Fresh>,
        cache: u64,
        out: u64,
    ) -> Result<Parts> {
        let kernel = decode_kernel(kernels, &self.gpu, shape, form, run.rows, fresh.map(|f| f.interleave))?;
        let teams = (kernel.resident / kernel.row_groups).max(1);
        let (team, seq, planned) = self.plan(kernels, inputs, form, index, run, teams)?;
        let (_, width) = widths(shape, form);
        let parts = (run.count + teams) * run.rows * shape.heads;
        let (part_o, part_lse) = self.parts(parts * width * 4, parts * 4)?;
        let (block_table, lens) = (inputs.tables(run.span), inputs.lens(run.span));
        let max_blocks = inputs.max_blocks as i32;
        // The kernels read the split before they wait for the launch before them.
        let launch = Launch::new(teams * kernel.row_groups, kernel.threads).shared(kernel.shared);
        let launch = Launch { serial: planned, ..launch };
        match form {
            Form::Grouped => {
                let none = Operand { at: 0, stride: 0 };
                let turned = Operand { at: q, stride: shape.heads * (shape.nope + shape.rope) };
                let turned = Fresh { q: turned, kv: none, k_rope: none, cos: 0, sin: 0, interleave: false };
                let fresh = fresh.unwrap_or(turned);
                let a = GqaDecode {
                    q,
                    cache,
                    out,
                    part_o,
                    part_lse,
                    block_table,
                    lens,
                    team,
                    groups: shape.groups as i32,
                    max_blocks,
                    teams: teams as i32,
                    scale: shape.scale,
                    kv: fresh.kv.at,
                    k_rope: fresh.k_rope.at,
                    cos_table: fresh.cos,
                    sin_table: fresh.sin,
                    q_stride: fresh.q.stride as i32,
                    kv_stride: fresh.kv.stride as i32,
                    k_rope_stride: fresh.k_rope.stride as i32,
                };
                kernels.launch(kernel.function, launch, arguments![a])?;
            }
            Form::Latent => {
                let scale = shape.scale;
                #[rustfmt::skip]
                let a = AbsorbParams { q, cache, block_table, lens, team, seq, out, part_o, part_lse, max_blocks, scale };
                kernels.launch(kernel.function, launch, arguments![a])?;
            }
        }
        Ok(Parts { part_o, part_lse, seq, each: ((teams + run.count) / run.count).min(teams) })
    }

    /// Joins a run's parts.
    fn combine(
        &self,
        kernels: &Kernels,
        shape: &AttentionShape,
        form: Form,
        run: &Run,
        parts: &Parts,
        out: u64,
    ) -> Result<()> {
        let (_, width) = widths(shape, form);
        let constants = [("DV", width as i64), ("SQ", run.rows as i64)];
        let f = kernels.get(&source::COMBINE, "combine", &constants)?;
        let [most, ..] = f.exports();
        let warps = match parts.each {
            24.. => 8,
            12.. => 4,
            6.. => 2,
            _ => 1,
        };
        let rows = run.count * run.rows;
        let (heads, grid) = (shape.heads as i32, (rows * shape.heads).div_ceil(most / warps));
        let &Parts { part_o, part_lse, seq, .. } = parts;
        let a = Combine { part_o, part_lse, seq, out, rows: rows as i32, heads, warps: warps as i32 };
        kernels.launch(f, Launch::new(grid, 32 * most), arguments![a])
    }

    /// The split of run `index`, made by the first layer of a step and used by all, and whether it was made now.
    fn plan(
        &self,
        kernels: &Kernels,
        inputs: &Inputs,
        form: Form,
        index: usize,
        run: &Run,
        teams: usize,
    ) -> Result<(u64, u64, bool)> {
        let mut plans = self.plans.borrow_mut();
        let (team_bytes, seq_bytes) = (teams * 16, run.count * 8);
        while plans.len() <= index {
            plans.push((self.grow(team_bytes)?, self.grow(seq_bytes)?));
        }
        let (team, seq) = &mut plans[index];
        if team.bytes() < team_bytes {
            *team = self.grow(team_bytes)?;
        }
        if seq.bytes() < seq_bytes {
            *seq = self.grow(seq_bytes.next_power_of_two())?;
        }
        let (team, seq) = (team.at(), seq.at());
        let fresh = self.planned.get() <= index;
        if fresh {
            self.planned.set(index + 1);
            let (source, entry, block, least) = match form {
                Form::Grouped => (&source::SPLIT_PLAN, "split_plan", 1, 0),
                Form::Latent => (&source::ABSORB_PLAN, "absorb_plan", 32, 4),
            };
            let f = kernels.get(source, entry, &[])?;
            let threads = f.exports()[0] * block;
            let (batch, teams) = (run.count as i32, teams as i32);
            let a = Plan { lens: inputs.lens(run.span), team, seq, batch, teams, least };
            kernels.launch(f, Launch::new(1, threads), arguments![a])?;
        }
        Ok((team, seq, fresh))
    }

    fn parts(&self, out: usize, lse: usize) -> Result<(u64, u64)> {
        let mut parts = self.parts.borrow_mut();
        let enough = parts.as_ref().is_some_and(|(o, l)| o.bytes() >= out && l.bytes() >= lse);
        if !enough {
            *parts = None;
            *parts = Some((self.grow(out)?, self.grow(lse)?));
        }
        match &*parts {
            Some((o, l)) => Ok((o.at(), l.at())),
            None => Err(Error::Internal("attention without a workspace".into())),
        }
    }

    fn grow(&self, bytes: usize) -> Result<Memory> {
        self.generation.set(self.generation.get() + 1);
        Memory::new(&self.gpu, bytes)
    }
}

/// How combine_output.cu takes `pairs` (row, head) pairs of each of `groups` groups: a cluster's CTAs and pairs; `None` where
/// two launches are faster.
fn joined_cut(pairs: usize, groups: usize, multiprocessors: usize) -> Option<(usize, usize)> {
    // About ten clusters of eight: more cost more to start than they share out.
    let few = (pairs * groups).div_ceil(10).max(2);
    if few <= 16 {
        return Some((8, few));
    }
    // Clusters of four, two CTAs to a multiprocessor.
    (pairs.div_ceil(16) * groups <= 2 * clusters(multiprocessors, 4)).then_some((4, 16))
}

/// Whether W_UV's rows divide among the CTAs of a cluster of combine_output.cu.
pub fn combines_output(shape: &AttentionShape) -> bool {
    [64, 128, 256, 512].contains(&shape.value)
}

/// Widths of a head's query and output.
fn widths(shape: &AttentionShape, form: Form) -> (usize, usize) {
    match form {
        Form::Grouped => (shape.nope + shape.rope, shape.value),
        Form::Latent => (shape.latent + shape.rope, shape.latent),
    }
}

/// The constants and the source of the decode kernel for a shape; `None` where no decode kernel takes it.
pub fn decode_source(
    shape: &AttentionShape,
    latent: bool,
    rows: usize,
    hopper: bool,
) -> (&'static Source, &'static str, Vec<(&'static str, i64)>) {
    let int = |x: usize| x as i64;
    if latent {
        let mut constants = vec![("HEADS", int(shape.heads)), ("SQ", int(rows))];
        if hopper && (shape.latent, shape.rope) == (512, 64) {
            return match shape.heads * rows {
                ..=32 => (&source::ABSORB_DECODE_FEW, "absorb_decode_few", constants),
                _ => (&source::ABSORB_DECODE, "absorb_decode", constants),
            };
        }
        constants.extend([("DC", int(shape.latent)), ("DR", int(shape.rope))]);
        return (&source::ABSORB_DECODE_PORTABLE, "absorb_decode_portable", constants);
    }
    let per_group = shape.heads / shape.groups.max(1);
    let mut constants = vec![
        ("DN", int(shape.nope)),
        ("DR", int(shape.rope)),
        ("DV", int(shape.value)),
        ("GS", int(per_group)),
        ("SQ", int(rows)),
    ];
    let swizzled = [shape.nope, shape.rope, shape.value].iter().all(|d| d % 64 == 0);
    let tiles = (per_group * rows).div_ceil(16);
    let most = if shape.value <= 128 { 8 } else { 4 };
    if hopper && swizzled && tiles <= most && shape.nope + shape.rope + shape.value <= 800 && shape.value <= 256 {
        constants.push(("NG", int(groups_per_cta(shape, tiles, most))));
        return (&source::GQA_DECODE, "gqa_decode", constants);
    }
    constants.push(("STAGES", if shape.nope + shape.rope + shape.value > 384 { 1 } else { 2 }));
    (&source::GQA_DECODE_PORTABLE, "gqa_decode_portable", constants)
}

/// Neighbouring groups of a CTA: two share one read of the rope key where both fit.
fn groups_per_cta(shape: &AttentionShape, tiles: usize, most: usize) -> usize {
    let fits = 2 * tiles <= most && shape.rope + 2 * (shape.nope + shape.value) <= 800;
    if shape.rope > 0 && shape.groups >= 4 && shape.groups.is_multiple_of(2) && fits { 2 } else { 1 }
}

/// The constants of the grouped decode kernel that rotates and appends too, besides the others.
pub fn append_constants(interleave: bool) -> [(&'static str, i64); 2] {
    [("APPEND", 1), ("INTERLEAVE", i64::from(interleave))]
}

/// `append`: whether neighbours turn, where the kernel rotates and appends too.
fn decode_kernel(
    kernels: &Kernels,
    gpu: &Gpu,
    shape: &AttentionShape,
    form: Form,
    rows: usize,
    append: Option<bool>,
) -> Result<Decode> {
    let hopper = gpu.sm() == 90;
    let (source, entry, mut constants) = decode_source(shape, form == Form::Latent, rows, hopper);
    constants.extend(append.into_iter().flat_map(append_constants));
    let function = kernels.get(source, entry, &constants)?;
    let [threads, shared, tiles] = function.exports();
    let row_groups = match *source {
        source::GQA_DECODE => {
            let each = constants.iter().find(|c| c.0 == "NG").map_or(1, |c| c.1 as usize);
            shape.groups / each
        }
        source::GQA_DECODE_PORTABLE => shape.groups * tiles,
        source::ABSORB_DECODE_FEW => 1,
        _ => tiles,
    };
    let on_one = if source.hopper { 1 } else { kernels.occupancy(function, threads, shared)?.min(4) };
    Ok(Decode { function, threads, shared, row_groups, resident: gpu.info.multiprocessors * on_one })
}

/// The constants of the prefill kernel.
pub fn prefill_constants(shape: &AttentionShape, latent: bool, shared_memory: usize) -> Vec<(&'static str, i64)> {
    let int = |x: usize| x as i64;
    let (q, value, tile) = if latent {
        (shape.latent + shape.rope, shape.latent, shape.latent + shape.rope)
    } else {
        (shape.nope + shape.rope, shape.value, shape.nope + shape.rope + shape.value)
    };
    let bytes = |mt: usize, stages: usize| 2 * (16 * mt * (q + 24) + stages * 64 * (tile + 48));
    let fits = [(4, 2), (4, 1), (2, 1), (1, 1)].into_iter().find(|&(mt, s)| bytes(mt, s) <= shared_memory);
    let (mt, stages) = fits.unwrap_or((1, 1));
    let mut constants = vec![
        ("LATENT", i64::from(latent)),
        ("DR", int(shape.rope)),
        ("MT", int(mt)),
        ("VS", if value > 256 { 2 } else { 1 }),
        ("STAGES", int(stages)),
    ];
    if latent {
        constants.extend([("DC", int(shape.latent)), ("GS", int(shape.heads))]);
    } else {
        let per_group = shape.heads / shape.groups.max(1);
        constants.extend([("DN", int(shape.nope)), ("DV", int(shape.value)), ("GS", int(per_group))]);
    }
    constants
}

/// The constants of the prefill kernel over keys and values that were expanded from latents, `per_group` heads a group.
pub fn expanded_constants(
    shape: &AttentionShape,
    per_group: usize,
    interleave: bool,
    shared_memory: usize,
) -> Vec<(&'static str, i64)> {
    let part = AttentionShape { heads: per_group, groups: 1, ..*shape };
    let mut constants = prefill_constants(&part, false, shared_memory);
    constants.extend([("EXPANDED", 1), ("DC", shape.latent as i64), ("INTERLEAVE", i64::from(interleave))]);
    constants
}

fn prefill(kernels: &Kernels, gpu: &Gpu, shape: &AttentionShape, form: Form) -> Result<(Function, [usize; 3])> {
    let constants = prefill_constants(shape, form == Form::Latent, gpu.info.shared_memory);
    let f = kernels.get(&source::PREFILL, "prefill", &constants)?;
    Ok((f, f.exports()))
}
