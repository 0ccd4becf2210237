//! The paged cache, and attention over it.
//!
//! A block is [`BLOCK`] tokens of f32. Grouped: per group the keys transposed, `[nope, BLOCK]`, then the values,
//! `[BLOCK, value]`; after the groups the rope keys, `[rope, BLOCK]`. Latent: `[BLOCK, latent + rope]`.
//!
//! Every query is computed alike whatever shares its tile: the blocks of its sequence in order, an online softmax over
//! each, sums over keys in order. Keys beyond the query's position are masked or not read: unused slots may hold
//! anything.

// `unroll!` writes out 8 steps and leaves those past a constant end unreached, which clippy cannot see.
#![allow(clippy::out_of_bounds_indexing)]

use std::ops::Range;

use super::Workers;
use super::buffer::{Buffer, Shared, with_scratch};
use super::linear::tile;
use super::simd::{Element, Isa, Kernel, LANES, Simd, unroll};
use crate::backend::{AttentionShape, Batch, Span};
use crate::cache::{BLOCK, Layout};
use crate::error::{Error, Result};

/// Queries that share one pass over a sequence's blocks.
const TILE: usize = 32;
/// Vectors of a block of scores.
const VECTORS: usize = BLOCK / LANES;

/// One layer's blocks.
pub struct Cache {
    pub(super) layout: Layout,
    blocks: usize,
    data: Buffer<f32>,
}

impl Cache {
    /// All elements, in whatever order they are kept.
    pub(super) fn data_mut(&mut self) -> &mut [f32] {
        &mut self.data
    }

    pub(super) fn new(layout: Layout, blocks: usize) -> Result<Cache> {
        let elements = (layout.elements() * BLOCK)
            .checked_mul(blocks)
            .ok_or_else(|| Error::Memory(format!("a cache of {blocks} blocks is too big")))?;
        Ok(Cache { layout, blocks, data: Buffer::new(elements)? })
    }

    /// Bytes allocated.
    pub fn bytes(&self) -> usize {
        self.data.len() * size_of::<f32>()
    }

    /// Overwrites every slot (tests poison a cache with NaN).
    pub fn fill(&mut self, value: f32) {
        self.data.fill(value);
    }

    /// Elements of a block.
    pub(super) fn block_len(&self) -> usize {
        self.layout.elements() * BLOCK
    }

    /// All elements, block by block.
    pub(super) fn data(&self) -> &[f32] {
        &self.data
    }

    /// Whether it has blocks of `layout`, `blocks` at least.
    pub(super) fn holds(&self, layout: Layout, blocks: usize) -> bool {
        self.layout == layout && self.blocks >= blocks
    }

    /// Calls `write(i, slots)` for each of `tasks`, in parallel; a task writes what no other does.
    pub(super) fn write(&mut self, workers: &Workers, tasks: usize, work: usize, write: impl Fn(usize, &Slots) + Sync) {
        let slots = Slots { len: self.block_len(), data: Shared::new(&mut self.data) };
        workers.run(tasks, work, |i| write(i, &slots));
    }

    /// Refuses block numbers that the cache does not have.
    pub(super) fn check(&self, batch: &Batch) -> Result<()> {
        for span in &batch.spans {
            if let Some(b) = span.blocks.iter().take(span.context.div_ceil(BLOCK)).find(|&&b| b as usize >= self.blocks)
            {
                return Err(Error::Internal(format!("block {b} of a cache of {} blocks", self.blocks)));
            }
        }
        Ok(())
    }

    /// Writes the step's rows: `write(row, slot)` for each, in parallel.
    pub(super) fn append(
        &mut self,
        workers: &Workers,
        batch: &Batch,
        work: usize,
        write: impl Fn(usize, Slot) + Sync,
    ) -> Result<()> {
        self.check(batch)?;
        for span in &batch.spans {
            self.write(workers, span.rows, work * span.rows, |i, slots| {
                let position = span.context - span.rows + i;
                write(span.first + i, slots.slot(span.blocks[position / BLOCK] as usize, position % BLOCK));
            });
        }
        Ok(())
    }
}

/// A cache that is being written.
pub(super) struct Slots<'a> {
    data: Shared<'a, f32>,
    len: usize,
}

impl<'a> Slots<'a> {
    /// The place of a block's token `index`.
    pub fn slot(&self, block: usize, index: usize) -> Slot<'a> {
        Slot { data: self.data, start: block * self.len, index }
    }
}

/// One token's place in a cache, being written. Slots of different tokens are written by different tasks.
pub(super) struct Slot<'a> {
    data: Shared<'a, f32>,
    start: usize,
    index: usize,
}

impl Slot<'_> {
    /// Writes `values` from the block's element `first` on, `[values.len(), BLOCK]` transposed.
    pub fn transposed(&self, first: usize, values: &[f32]) {
        for (i, &x) in values.iter().enumerate() {
            // SAFETY: this token's elements alone.
            unsafe { self.data.slice(self.start + first + i * BLOCK + self.index, 1)[0] = x };
        }
    }

    /// This token's row of a `[BLOCK, width]` part of the block that starts at its element `first`.
    #[allow(clippy::mut_from_ref)]
    pub fn row(&self, first: usize, width: usize) -> &mut [f32] {
        self.columns(first, width, 0..width)
    }

    /// Some columns of this token's [`row`](Slot::row).
    #[allow(clippy::mut_from_ref)]
    pub fn columns(&self, first: usize, width: usize, columns: Range<usize>) -> &mut [f32] {
        // SAFETY: this token's elements alone, and a slot's columns are used by one task.
        unsafe { self.data.slice(self.start + first + self.index * width + columns.start, columns.len()) }
    }
}

/// A query of a tile.
#[derive(Clone, Copy)]
struct Query {
    /// First element of its vector in the query tensor.
    at: usize,
    /// First element of its result in the output tensor.
    out: usize,
    /// Keys it sees: its position and those before.
    visible: usize,
}

/// The queries of one tile: some rows of a sequence, some heads that share keys.
struct Task<'a> {
    span: &'a Span,
    group: usize,
    rows: Range<usize>,
    heads: Range<usize>,
}

impl Task<'_> {
    /// Row-major: what a query sees never shrinks along the list.
    fn queries(&self, shape: &AttentionShape, q_width: usize, out_width: usize) -> Vec<Query> {
        let mut all = Vec::with_capacity(TILE);
        for i in self.rows.clone() {
            let row = self.span.first + i;
            let visible = self.span.context - self.span.rows + i + 1;
            for head in self.heads.clone() {
                let at = row * shape.heads + head;
                all.push(Query { at: at * q_width, out: at * out_width, visible });
            }
        }
        all
    }
}

/// Cuts sequences' rows into tiles. `groups[g]` is the heads that share keys; a tile has at most `most` queries.
fn tasks<'a>(spans: &[&'a Span], groups: &[Range<usize>], most: usize) -> Vec<Task<'a>> {
    let mut all = Vec::new();
    for &span in spans {
        for (group, heads) in groups.iter().enumerate().filter(|(_, h)| !h.is_empty()) {
            let width = heads.len().div_ceil(heads.len().div_ceil(most));
            let height = (most / width).max(1);
            // Last rows first: they see most, and the shortest tiles end the step evenly.
            for first in (0..span.rows).step_by(height).rev() {
                for head in heads.clone().step_by(width) {
                    let rows = first..(first + height).min(span.rows);
                    all.push(Task { span, group, rows, heads: head..(head + width).min(heads.end) });
                }
            }
        }
    }
    all
}

/// Keys that queries meet, in all.
fn pairs(spans: &[&Span]) -> usize {
    spans.iter().map(|s| s.rows * s.context).sum()
}

/// See [`Backend::attend_grouped`](crate::backend::Backend::attend_grouped).
pub(super) fn attend_grouped(
    workers: &Workers,
    isa: Isa,
    batch: &Batch,
    shape: &AttentionShape,
    q: &[f32],
    cache: &Cache,
    out: &mut [f32],
) -> Result<()> {
    cache.check(batch)?;
    let spans: Vec<&Span> = batch.spans.iter().collect();
    attend_groups(workers, isa, &spans, shape, 0..shape.groups, q, cache, out);
    Ok(())
}

/// Attention of the heads of some of the rank's groups; `cache` has those groups.
pub(super) fn attend_groups(
    workers: &Workers,
    isa: Isa,
    spans: &[&Span],
    shape: &AttentionShape,
    groups: Range<usize>,
    q: &[f32],
    cache: &Cache,
    out: &mut [f32],
) {
    let (nope, rope, value) = (shape.nope, shape.rope, shape.value);
    let count = groups.len();
    let heads: Vec<_> = groups.map(|g| shape.heads_of(g)).collect();
    let tasks = tasks(spans, &heads, TILE);
    let out = Shared::new(out);
    let work = pairs(spans) * heads.iter().map(Range::len).sum::<usize>() * (nope + rope + value);
    workers.run(tasks.len(), work, |i| {
        let task = &tasks[i];
        let group = task.group * (nope + value) * BLOCK;
        let queries = task.queries(shape, nope + rope, value);
        attend(
            isa,
            task.span,
            cache,
            &queries,
            q,
            out,
            shape.scale,
            Keys::Grouped {
                nope,
                rope,
                value,
                key_at: group,
                value_at: group + nope * BLOCK,
                rope_at: count * (nope + value) * BLOCK,
            },
        );
    });
}

/// See [`Backend::attend_latent`](crate::backend::Backend::attend_latent).
pub(super) fn attend_latent(
    workers: &Workers,
    isa: Isa,
    batch: &Batch,
    shape: &AttentionShape,
    q: &[f32],
    cache: &Cache,
    out: &mut [f32],
) -> Result<()> {
    cache.check(batch)?;
    let spans: Vec<&Span> = batch.spans.iter().filter(|s| !shape.expands(s.rows, s.context)).collect();
    let (latent, rope) = (shape.latent, shape.rope);
    // All heads share the latents; few queries are still spread over the workers.
    let rows: usize = spans.iter().map(|s| s.rows).sum();
    let most = (rows * shape.heads).div_ceil(workers.threads()).clamp(4, TILE);
    let tasks = tasks(&spans, std::slice::from_ref(&(0..shape.heads)), most);
    let out = Shared::new(out);
    let work = pairs(&spans) * shape.heads * (2 * latent + rope);
    workers.run(tasks.len(), work, |i| {
        let task = &tasks[i];
        let queries = task.queries(shape, latent + rope, latent);
        attend(isa, task.span, cache, &queries, q, out, shape.scale, Keys::Latent { latent, rope });
    });
    Ok(())
}

/// Checks a tile's extents and computes it.
fn attend(
    isa: Isa,
    span: &Span,
    cache: &Cache,
    queries: &[Query],
    q: &[f32],
    out: Shared<f32>,
    scale: f32,
    keys: Keys,
) {
    let (q_width, out_width, len) = match keys {
        Keys::Grouped { nope, rope, value, rope_at, .. } => (nope + rope, value, rope_at + rope * BLOCK),
        Keys::Latent { latent, rope } => (latent + rope, latent, (latent + rope) * BLOCK),
    };
    assert_eq!(len, cache.block_len(), "attention's dimensions and the cache's differ");
    assert!(queries.iter().all(|query| query.at + q_width <= q.len() && query.visible <= span.context));
    with_scratch([queries.len() * BLOCK, queries.len() * 3], |[scores, state]| {
        let (peak, rest) = state.split_at_mut(queries.len());
        let (total, shrink) = rest.split_at_mut(queries.len());
        peak.fill(f32::NEG_INFINITY);
        total.fill(0.0);
        // SAFETY: each query of the batch is in one tile, and its output its own.
        let outs = queries.iter().map(|query| unsafe { out.slice(query.out, out_width) }.as_mut_ptr()).collect();
        isa.run(Attend {
            data: &cache.data,
            len,
            blocks: &span.blocks,
            queries,
            q,
            outs,
            scale,
            keys,
            scores,
            peak,
            total,
            shrink,
        });
    });
}

/// Where keys and values lie in a block.
#[derive(Clone, Copy)]
enum Keys {
    Grouped { nope: usize, rope: usize, value: usize, key_at: usize, value_at: usize, rope_at: usize },
    Latent { latent: usize, rope: usize },
}

/// A tile: its extents checked by [`attend`].
struct Attend<'a> {
    data: &'a [f32],
    /// Elements of a block.
    len: usize,
    blocks: &'a [u32],
    queries: &'a [Query],
    q: &'a [f32],
    outs: Vec<*mut f32>,
    scale: f32,
    keys: Keys,
    /// `[queries, BLOCK]`.
    scores: &'a mut [f32],
    /// Largest score so far, the sum of weights relative to it, and what a new peak shrinks the past by.
    peak: &'a mut [f32],
    total: &'a mut [f32],
    shrink: &'a mut [f32],
}

impl Kernel for Attend<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let n = self.queries.len();
        let last = self.queries[n - 1].visible;
        let mut start = 0;
        for block in 0..last.div_ceil(BLOCK) {
            // Queries are in order of what they see: those past their last block are at the front.
            while self.queries[start].visible <= block * BLOCK {
                start += 1;
            }
            let data = &self.data[self.blocks[block] as usize * self.len..][..self.len];
            // SAFETY: `attend` has checked the extents of queries, outputs and blocks.
            unsafe {
                self.score(s, data, start, last - block * BLOCK);
                for i in start..n {
                    let valid = self.valid(i, block);
                    let scores = self.scores.as_mut_ptr().add(i * BLOCK);
                    self.shrink[i] = softmax(s, scores, valid, self.scale, &mut self.peak[i], &mut self.total[i]);
                }
                self.accumulate(s, data, start, block);
            }
        }
        let width = self.out_width();
        for i in 0..n {
            let scale = s.splat(1.0 / self.total[i]);
            for c in (0..width).step_by(LANES) {
                // SAFETY: the output has `width` elements.
                unsafe {
                    let p = self.outs[i].add(c);
                    if c + LANES <= width {
                        s.store(p, s.mul(s.load(p), scale));
                    } else {
                        s.store_first(p, width - c, s.mul(s.load_first(p, width - c), scale));
                    }
                }
            }
        }
    }
}

impl Attend<'_> {
    #[inline(always)]
    fn out_width(&self) -> usize {
        match self.keys {
            Keys::Grouped { value, .. } => value,
            Keys::Latent { latent, .. } => latent,
        }
    }

    /// Keys of `block` that query `i` sees.
    #[inline(always)]
    fn valid(&self, i: usize, block: usize) -> usize {
        (self.queries[i].visible - block * BLOCK).min(BLOCK)
    }

    /// Products of the queries from `start` on with a block's keys; at least the first `valid` of them.
    ///
    /// # Safety
    /// `data` is a block; see [`attend`].
    #[inline(always)]
    unsafe fn score<S: Simd>(&mut self, s: S, data: &[f32], start: usize, valid: usize) {
        let n = self.queries.len();
        let mut i = start;
        // SAFETY: the caller's promise; i + 4 <= n in the wide calls.
        unsafe {
            while S::WIDE && i + 4 <= n {
                self.score_some::<S, 4>(s, data, i, valid.min(BLOCK));
                i += 4;
            }
            while i < n {
                self.score_some::<S, 1>(s, data, i, valid.min(BLOCK));
                i += 1;
            }
        }
    }

    /// Products of `Q` queries from `i` on.
    ///
    /// # Safety
    /// As [`score`](Self::score).
    #[inline(always)]
    unsafe fn score_some<S: Simd, const Q: usize>(&mut self, s: S, data: &[f32], i: usize, valid: usize) {
        let mut q = [std::ptr::null(); Q];
        // SAFETY: checked by `attend`.
        unroll!(j in 0..Q => q[j] = unsafe { self.q.as_ptr().add(self.queries[i + j].at) });
        // SAFETY: i + Q queries have scores; keys lie where the layout says.
        unsafe {
            let scores = self.scores.as_mut_ptr().add(i * BLOCK);
            match self.keys {
                Keys::Grouped { nope, rope, key_at, rope_at, .. } => {
                    let mut sums = [[s.zero(); VECTORS]; Q];
                    outer(s, q, data.as_ptr().add(key_at), nope, &mut sums);
                    unroll!(j in 0..Q => q[j] = q[j].add(nope));
                    outer(s, q, data.as_ptr().add(rope_at), rope, &mut sums);
                    unroll!(j in 0..Q => unroll!(v in 0..VECTORS => {
                        s.store(scores.add(j * BLOCK + v * LANES), sums[j][v])
                    }));
                }
                Keys::Latent { latent, rope } => {
                    let width = latent + rope;
                    let mut key = 0;
                    while key + 4 <= valid {
                        inner::<S, Q, 4>(s, q, data.as_ptr().add(key * width), width, scores.add(key));
                        key += 4;
                    }
                    while key < valid {
                        inner::<S, Q, 1>(s, q, data.as_ptr().add(key * width), width, scores.add(key));
                        key += 1;
                    }
                }
            }
        }
    }

    /// `out = out·shrink + Σ weight·value` for the queries from `start` on.
    ///
    /// # Safety
    /// As [`score`](Self::score).
    #[inline(always)]
    unsafe fn accumulate<S: Simd>(&mut self, s: S, data: &[f32], start: usize, block: usize) {
        let n = self.queries.len();
        let mut i = start;
        while i < n {
            // Values that only some of a tile's queries see are never multiplied, not even by zero.
            let together = S::WIDE && i + 4 <= n && self.valid(i, block) == self.valid(i + 3, block);
            // SAFETY: the caller's promise.
            unsafe {
                if together {
                    self.accumulate_some::<S, 4>(s, data, i, block);
                    i += 4;
                } else {
                    self.accumulate_some::<S, 1>(s, data, i, block);
                    i += 1;
                }
            }
        }
    }

    /// The same for `Q` queries from `i` on that see equally many keys of the block.
    ///
    /// # Safety
    /// As [`score`](Self::score).
    #[inline(always)]
    unsafe fn accumulate_some<S: Simd, const Q: usize>(&mut self, s: S, data: &[f32], i: usize, block: usize) {
        let (values, stride, width) = match self.keys {
            Keys::Grouped { value, value_at, .. } => (&data[value_at..], value, value),
            Keys::Latent { latent, rope } => (data, latent + rope, latent),
        };
        let mut weights = [std::ptr::null(); Q];
        let mut out = [std::ptr::null_mut(); Q];
        let mut shrink = [None; Q];
        for j in 0..Q {
            // SAFETY: i + Q queries have scores.
            weights[j] = unsafe { self.scores.as_ptr().add((i + j) * BLOCK) };
            out[j] = self.outs[i + j];
            shrink[j] = (block > 0).then_some(self.shrink[i + j]);
        }
        // SAFETY: a block has BLOCK values, outputs are `width` long.
        unsafe { weigh(s, weights, values.as_ptr(), stride, width, self.valid(i, block), shrink, out) };
    }
}

/// `sums[q][key] += Σ_d q[d]·keys[d][key]` over a block of transposed keys.
///
/// # Safety
/// Queries are readable for `depth` elements, `keys` for `depth·BLOCK`.
#[inline(always)]
unsafe fn outer<S: Simd, const Q: usize>(
    s: S,
    q: [*const f32; Q],
    keys: *const f32,
    depth: usize,
    sums: &mut [[S::V; VECTORS]; Q],
) {
    let mut acc = *sums;
    for d in 0..depth {
        let mut key = [s.zero(); VECTORS];
        // SAFETY: d < depth.
        unroll!(v in 0..VECTORS => key[v] = unsafe { s.load(keys.add(d * BLOCK + v * LANES)) });
        unroll!(j in 0..Q => {
            // SAFETY: d < depth.
            let x = s.splat(unsafe { *q[j].add(d) });
            unroll!(v in 0..VECTORS => acc[j][v] = s.fma(x, key[v], acc[j][v]));
        });
    }
    *sums = acc;
}

/// `scores[q·BLOCK + key] = q·keys[key]` for `K` keys of `width` elements.
///
/// # Safety
/// Queries are readable for `width` elements, `keys` for `K·width`, scores writable.
#[inline(always)]
unsafe fn inner<S: Simd, const Q: usize, const K: usize>(
    s: S,
    q: [*const f32; Q],
    keys: *const f32,
    width: usize,
    scores: *mut f32,
) {
    let mut rows = [keys; K];
    let mut sums = [[s.zero(); K]; Q];
    // SAFETY: the caller's promise.
    unsafe {
        unroll!(i in 0..K => rows[i] = keys.add(i * width));
        tile(s, q, rows, width, &mut sums);
        unroll!(j in 0..Q => unroll!(i in 0..K => *scores.add(j * BLOCK + i) = s.sum(sums[j][i])));
    }
}

/// Turns a block's scores into weights relative to the peak so far; returns what the past shrinks by.
///
/// # Safety
/// `scores` is a block's.
#[inline(always)]
unsafe fn softmax<S: Simd>(s: S, scores: *mut f32, valid: usize, scale: f32, peak: &mut f32, total: &mut f32) -> f32 {
    let mut x = [s.zero(); VECTORS];
    let nothing = s.splat(f32::NEG_INFINITY);
    let mut largest = nothing;
    for v in 0..VECTORS {
        // SAFETY: a block has 16·VECTORS scores.
        let score = s.mul(unsafe { s.load(scores.add(v * LANES)) }, s.splat(scale));
        x[v] = s.first(score, valid.saturating_sub(v * LANES).min(LANES), nothing);
        largest = s.max(largest, x[v]);
    }
    let before = *peak;
    let largest = s.largest(largest);
    *peak = if largest > before { largest } else { before };
    let mut sum = s.zero();
    for v in 0..VECTORS {
        let weight = s.exp(s.sub(x[v], s.splat(*peak)));
        let weight = s.first(weight, valid.saturating_sub(v * LANES).min(LANES), s.zero());
        sum = s.add(sum, weight);
        // SAFETY: as above.
        unsafe { s.store(scores.add(v * LANES), weight) };
    }
    let shrink = s.largest(s.exp(s.splat(before - *peak)));
    *total = *total * shrink + s.sum(sum);
    shrink
}

/// `out[q] = out[q]·shrink[q] + Σ_{i < count} weights[q][i]·rows[i]` over `width` columns, sums over i in order.
/// Where `shrink` is `None` the sum starts at zero.
///
/// # Safety
/// Weights are readable for `count` elements, rows (of `stride`) for `width`, outputs writable for `width`.
#[inline(always)]
pub(super) unsafe fn weigh<S: Simd, E: Element, const Q: usize>(
    s: S,
    weights: [*const f32; Q],
    rows: *const E,
    stride: usize,
    width: usize,
    count: usize,
    shrink: [Option<f32>; Q],
    out: [*mut f32; Q],
) {
    let mut c = 0;
    // SAFETY: columns stay below `width`.
    unsafe {
        while c + 4 * LANES <= width {
            weigh_columns::<S, E, Q, 4>(s, weights, rows.add(c), stride, count, shrink, out, c);
            c += 4 * LANES;
        }
        while c + LANES <= width {
            weigh_columns::<S, E, Q, 1>(s, weights, rows.add(c), stride, count, shrink, out, c);
            c += LANES;
        }
        if c < width {
            let n = width - c;
            for q in 0..Q {
                let p = out[q].add(c);
                let mut sum = match shrink[q] {
                    Some(f) => s.mul(s.load_first(p, n), s.splat(f)),
                    None => s.zero(),
                };
                for i in 0..count {
                    let row = E::load_first(s, rows.add(i * stride + c), n);
                    sum = s.fma(s.splat(*weights[q].add(i)), row, sum);
                }
                s.store_first(p, n, sum);
            }
        }
    }
}

/// `C` whole vectors of columns of [`weigh`]; `rows` starts at the first of them.
///
/// # Safety
/// As [`weigh`].
#[inline(always)]
unsafe fn weigh_columns<S: Simd, E: Element, const Q: usize, const C: usize>(
    s: S,
    weights: [*const f32; Q],
    rows: *const E,
    stride: usize,
    count: usize,
    shrink: [Option<f32>; Q],
    out: [*mut f32; Q],
    first: usize,
) {
    let mut sums = [[s.zero(); C]; Q];
    // SAFETY: the caller's promise.
    unsafe {
        unroll!(q in 0..Q => if let Some(f) = shrink[q] {
            unroll!(c in 0..C => sums[q][c] = s.mul(s.load(out[q].add(first + c * LANES)), s.splat(f)));
        });
        for i in 0..count {
            let mut row = [s.zero(); C];
            unroll!(c in 0..C => row[c] = E::load(s, rows.add(i * stride + c * LANES)));
            unroll!(q in 0..Q => {
                let x = s.splat(*weights[q].add(i));
                unroll!(c in 0..C => sums[q][c] = s.fma(x, row[c], sums[q][c]));
            });
        }
        unroll!(q in 0..Q => unroll!(c in 0..C => s.store(out[q].add(first + c * LANES), sums[q][c])));
    }
}
