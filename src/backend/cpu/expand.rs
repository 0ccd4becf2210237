//! The absorb path's long chunks: keys and values of the context, expanded from the cached latents into blocks of the
//! grouped layout, then attention over those.

use std::ops::Range;

use super::attention::{Cache, attend_groups};
use super::buffer::{Matrix, Shared};
use super::linear::{Input, Outputs, dots};
use super::rope::RopeTable;
use super::simd::Isa;
use super::{Workers, absorb};
use crate::backend::{AttentionShape, Batch, Span};
use crate::cache::{BLOCK, Layout};
use crate::error::Result;

/// Elements of keys and values at a time: so many of the groups as fit, one at least.
const MOST: usize = 16 << 20;
/// Outputs of `kv_up` that a task takes.
const STRIP: usize = 128;

/// What the next call can use again.
#[derive(Default)]
pub(super) struct Expansion {
    /// Turned queries. `[rows, heads·(nope+rope)]`
    q: Vec<f32>,
    /// Keys and values of some groups of one sequence.
    cache: Option<Cache>,
}

impl Expansion {
    /// See [`Backend::attend_expanded`](crate::backend::Backend::attend_expanded). `q(row)` is `[heads·(nope+rope)]`.
    pub fn attend<'a>(
        &mut self,
        workers: &Workers,
        isa: Isa,
        batch: &Batch,
        shape: &AttentionShape,
        rope: &RopeTable,
        kv_up: &Matrix,
        q: impl Fn(usize) -> &'a [f32] + Sync,
        latents: &Cache,
        out: &mut [f32],
    ) -> Result<()> {
        absorb::check(shape, kv_up);
        latents.check(batch)?;
        for span in batch.spans.iter().filter(|s| shape.expands(s.rows, s.context)) {
            self.turn(workers, batch, span, shape, rope, &q);
            let blocks = span.context.div_ceil(BLOCK);
            let each = (MOST / (blocks * BLOCK * (shape.nope + shape.value))).max(1);
            let expanded = Span { blocks: (0..blocks as u32).collect(), ..span.clone() };
            for first in (0..shape.groups).step_by(each) {
                let groups = first..(first + each).min(shape.groups);
                let cache = expand(&mut self.cache, workers, isa, span, shape, kv_up, groups.clone(), latents)?;
                attend_groups(workers, isa, &[&expanded], shape, groups, &self.q, cache, out);
            }
        }
        Ok(())
    }

    /// Turns a sequence's queries.
    fn turn<'a>(
        &mut self,
        workers: &Workers,
        batch: &Batch,
        span: &Span,
        shape: &AttentionShape,
        rope: &RopeTable,
        q: &(impl Fn(usize) -> &'a [f32] + Sync),
    ) {
        let (head, width) = (shape.nope + shape.rope, shape.heads * (shape.nope + shape.rope));
        self.q.resize(batch.rows() * width, 0.0);
        let turned = Shared::new(&mut self.q);
        workers.run(span.rows, span.rows * width * 4, |i| {
            let row = span.first + i;
            // SAFETY: each row is one task's.
            let out = unsafe { turned.slice(row * width, width) };
            for (q, out) in q(row).chunks_exact(head).zip(out.chunks_exact_mut(head)) {
                out[..shape.nope].copy_from_slice(&q[..shape.nope]);
                rope.rotate(batch.positions[row] as usize, &q[shape.nope..], &mut out[shape.nope..]);
            }
        });
    }
}

/// Keys and values of `groups` for all tokens of a sequence: block i of the result is the sequence's block i. `room` keeps it.
fn expand<'a>(
    room: &'a mut Option<Cache>,
    workers: &Workers,
    isa: Isa,
    span: &Span,
    shape: &AttentionShape,
    kv_up: &Matrix,
    groups: Range<usize>,
    latents: &Cache,
) -> Result<&'a Cache> {
    let (nope, rope, width) = (shape.nope, shape.rope, shape.nope + shape.value);
    let layout = Layout::Grouped { groups: groups.len(), nope, rope, value: shape.value };
    let blocks = span.context.div_ceil(BLOCK);
    let cache = match room.take() {
        Some(cache) if cache.holds(layout, blocks) => cache,
        _ => Cache::new(layout, blocks.next_power_of_two())?,
    };
    let cache = room.insert(cache);
    let (from, stride) = (latents.data(), shape.latent + rope);
    let strips = width.div_ceil(STRIP);
    // A task has a strip of a group's columns, or the rope keys, of a block.
    let tasks = groups.len() * strips + 1;
    let work = span.context * groups.len() * width * shape.latent;
    cache.write(workers, blocks * tasks, work, |i, slots| {
        let (block, task) = (i / tasks, i % tasks);
        let start = span.blocks[block] as usize * latents.block_len();
        let offsets: Vec<usize> =
            (0..BLOCK.min(span.context - block * BLOCK)).map(|token| start + token * stride).collect();
        let slot = |token| slots.slot(block, token);
        if task == groups.len() * strips {
            for (token, at) in offsets.iter().enumerate() {
                slot(token).transposed(groups.len() * width * BLOCK, &from[at + shape.latent..][..rope]);
            }
            return;
        }
        let (group, first) = (task / strips, task % strips * STRIP);
        let count = STRIP.min(width - first);
        let outputs = Outputs { first: (groups.start + group) * width + first, count };
        dots(isa, Input { data: from, offsets: &offsets }, kv_up, outputs, 1, |dots| {
            for (token, kv) in dots.chunks_exact(count).take(offsets.len()).enumerate() {
                let (k, v) = kv.split_at(nope.saturating_sub(first).min(count));
                let (slot, at) = (slot(token), (first + k.len()).saturating_sub(nope));
                slot.transposed((group * width + first) * BLOCK, k);
                let values = (group * width + nope) * BLOCK;
                slot.columns(values, shape.value, at..at + v.len()).copy_from_slice(v);
            }
        });
    });
    Ok(cache)
}
