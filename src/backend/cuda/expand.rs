//! The absorb path's long chunks: keys and values of their contexts, expanded from the cached latents by a product with
//! kv_b, then attention over those.
//!
//! Sequences share a product as far as the workspace goes. Where one sequence's keys and values do not fit, some groups
//! are expanded and attended at a time.

use std::ops::Range;

use super::attention::{Prefill, expanded_constants};
use super::context::Memory;
use super::kernels::{Function, Launch, arguments, source};
use super::matmul::Product;
use super::{Cache, CudaBackend, Matrix, Operand, RopeTable, Tensor, expect};
use crate::backend::AttentionShape;
use crate::cache::{BLOCK, Layout};
use crate::error::{Error, Result};

/// Tokens are multiplied in multiples of this: cuBLASLt has a plan for every number of them.
const STEP: usize = 512;
/// Tokens whose latents are multiplied at a time.
const PIECE: usize = 2048;
/// Bytes of keys and values, if a group of the longest context takes no more.
const BYTES: usize = 128 << 20;

/// The kernels' parameter blocks, field by field as in `kernels/`.
#[repr(C)]
struct GatherLatents {
    cache: u64,
    out: u64,
    block_table: u64,
    lens: u64,
    before: u64,
    spans: i32,
    from: i32,
    max_blocks: i32,
}
#[repr(C)]
struct ExpandedPrefill {
    prefill: Prefill,
    kv: u64,
    before: u64,
    cos_table: u64,
    sin_table: u64,
    q_stride: i32,
    kv_stride: i32,
    heads: i32,
}

/// Room for latents and for what is made of them.
pub(super) struct Workspace {
    /// `[tokens, latent]`
    latents: Memory,
    /// `[tokens, groups, nope + value]` of some groups.
    kv: Memory,
}

/// Neighbouring sequences that are expanded together.
#[derive(Debug, PartialEq, Eq)]
struct Lot {
    /// First sequence.
    span: usize,
    /// Sequences.
    count: usize,
    /// Rows of the longest.
    rows: usize,
    /// Blocks of all.
    blocks: usize,
}

/// Neighbouring groups of which this rank has equally many heads.
#[derive(Debug, PartialEq, Eq)]
struct Part {
    /// The groups.
    groups: Range<usize>,
    /// The first of their heads.
    head: usize,
    /// Heads of each.
    per_group: usize,
}

/// Bytes of the [`Workspace`]: latents, keys and values.
pub(super) fn bytes(groups: usize, width: usize, latent: usize, max_context: usize) -> (usize, usize) {
    let tokens = max_context.next_multiple_of(STEP);
    let group = tokens * width * 2;
    (tokens.min(PIECE) * latent * 2, (group * groups).min(group.max(BYTES)))
}

/// Cuts neighbouring sequences of these rows and contexts, the first of them number `span`, into lots of `room` tokens; a
/// sequence that is longer has a lot of its own.
fn lots(extents: impl Iterator<Item = (usize, usize)>, span: usize, room: usize) -> Vec<Lot> {
    let mut lots: Vec<Lot> = vec![];
    for (i, (rows, context)) in extents.enumerate() {
        let blocks = context.div_ceil(BLOCK);
        match lots.last_mut() {
            Some(lot) if (lot.blocks + blocks) * BLOCK <= room => {
                (lot.count, lot.rows, lot.blocks) = (lot.count + 1, lot.rows.max(rows), lot.blocks + blocks);
            }
            _ => lots.push(Lot { span: span + i, count: 1, rows, blocks }),
        }
    }
    lots
}

/// Cuts groups by how many heads they have here.
fn parts(shape: &AttentionShape, groups: Range<usize>) -> Vec<Part> {
    let mut parts: Vec<Part> = vec![];
    for group in groups {
        let heads = shape.heads_of(group);
        match parts.last_mut() {
            Some(part) if part.per_group == heads.len() => part.groups.end = group + 1,
            _ => parts.push(Part { groups: group..group + 1, head: heads.start, per_group: heads.len() }),
        }
    }
    parts
}

impl CudaBackend {
    /// Attention of the sequences that expand, and of no others.
    pub(super) fn expand(
        &mut self,
        shape: &AttentionShape,
        rope: &RopeTable,
        kv_up: &Matrix,
        q: Operand,
        cache: &Cache,
        out: &Tensor,
    ) -> Result<()> {
        let chunks = self.inputs.chunks(|rows, context| shape.expands(rows, context));
        if chunks.is_empty() {
            return Ok(());
        }
        let width = shape.nope + shape.value;
        expect(
            cache.layout == Layout::Latent { latent: shape.latent, rope: shape.rope }
                && (kv_up.rows, kv_up.cols) == (shape.groups * width, shape.latent)
                && rope.pairs * 2 == shape.rope
                && out.cols == shape.heads * shape.value,
            || format!("{:?} expanded by [{}, {}] for {shape:?}", cache.layout, kv_up.rows, kv_up.cols),
        )?;
        // One size for a model, whatever the step; another model's on the same backend may be larger.
        let (latents, kv) = bytes(shape.groups, width, shape.latent, self.options.max_context);
        if self.expansion.as_ref().is_none_or(|room| room.latents.bytes() < latents || room.kv.bytes() < kv) {
            self.expansion = None;
            let memory = |bytes| Memory::uninit(&self.gpu, bytes);
            self.expansion = Some(Workspace { latents: memory(latents)?, kv: memory(kv)? });
        }
        let Some(room) = &self.expansion else { return Err(Error::Internal("no room to expand latents".into())) };
        let token = width * 2;
        for chunk in chunks {
            let extents = self.inputs.extents[chunk.span..][..chunk.count].iter().map(|e| (e.rows, e.context));
            let together = room.kv.bytes() / (token * shape.groups) / STEP * STEP;
            for lot in lots(extents, chunk.span, together) {
                let tokens = (lot.blocks * BLOCK).next_multiple_of(STEP);
                let most = room.kv.bytes() / (tokens * token);
                expect(most > 0, || format!("{tokens} tokens on a backend made for {}", self.options.max_context))?;
                for first in (0..shape.groups).step_by(most) {
                    let groups = first..(first + most).min(shape.groups);
                    self.keys_and_values(room, shape, kv_up, cache, &lot, groups.clone())?;
                    for part in parts(shape, groups.clone()).iter().filter(|part| part.per_group > 0) {
                        self.attend_part(room, shape, rope, q, cache, out, &lot, &groups, part)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Keys and values of `groups` for the contexts of a lot.
    fn keys_and_values(
        &self,
        room: &Workspace,
        shape: &AttentionShape,
        kv_up: &Matrix,
        cache: &Cache,
        lot: &Lot,
        groups: Range<usize>,
    ) -> Result<()> {
        let constants = [("DC", shape.latent as i64), ("DR", shape.rope as i64)];
        let f = self.kernels.get(&source::GATHER_LATENTS, "gather_latents", &constants)?;
        let width = shape.nope + shape.value;
        let weights = kv_up.memory.at() + (groups.start * width * shape.latent * 2) as u64;
        let tokens = (lot.blocks * BLOCK).next_multiple_of(STEP);
        let piece = (room.latents.bytes() / (shape.latent * 2) / STEP * STEP).min(PIECE);
        for from in (0..tokens).step_by(piece) {
            let rows = piece.min(tokens - from);
            let a = GatherLatents {
                cache: cache.memory.at(),
                out: room.latents.at(),
                block_table: self.inputs.tables(lot.span),
                lens: self.inputs.lens(lot.span),
                before: self.inputs.blocks_before(lot.span),
                spans: lot.count as i32,
                from: (from / BLOCK) as i32,
                max_blocks: self.inputs.max_blocks as i32,
            };
            self.kernels.launch(f, Launch::new(rows / BLOCK, f.exports()[0]), arguments![a])?;
            let outs = groups.len() * width;
            let product = Product {
                rows,
                outs,
                depth: shape.latent,
                x_stride: shape.latent,
                out_stride: outs,
                f32_out: false,
                bias: false,
            };
            let out = room.kv.at() + (from * outs * 2) as u64;
            self.matmul.product(product, (room.latents.at(), weights, 0, out), || self.settle())?;
        }
        Ok(())
    }

    /// The kernel that attends a part of a lot.
    fn prefill_of(&self, shape: &AttentionShape, rope: &RopeTable, lot: &Lot, part: &Part) -> Result<Function> {
        let gpu = &self.gpu.info;
        let constants = |memory| expanded_constants(shape, part.per_group, rope.interleave, memory);
        let get = |constants: &[_]| self.kernels.get(&source::PREFILL, "prefill", constants);
        let tiles = |constants: &[(&str, i64)]| constants.iter().find(|c| c.0 == "MT").map_or(1, |c| c.1 as usize);
        let (alone, beside) = (constants(gpu.shared_memory), constants(gpu.shared_memory / 2));
        let ctas = (lot.rows * part.per_group).div_ceil(16 * tiles(&alone)) * part.groups.len() * lot.count;
        // Where not every CTA has a multiprocessor of its own, two on one that load no block ahead are faster than one
        // that does: by 8 % with the canonical shape, by 22 % with GLM-4.7-Flash's at G=4 (512 rows, 8192 tokens, H200).
        if ctas > gpu.multiprocessors && tiles(&beside) == tiles(&alone) { get(&beside) } else { get(&alone) }
    }

    /// Attention of some of the groups that are expanded.
    fn attend_part(
        &self,
        room: &Workspace,
        shape: &AttentionShape,
        rope: &RopeTable,
        q: Operand,
        cache: &Cache,
        out: &Tensor,
        lot: &Lot,
        groups: &Range<usize>,
        part: &Part,
    ) -> Result<()> {
        let f = self.prefill_of(shape, rope, lot, part)?;
        let [threads, shared, tiles] = f.exports();
        let width = shape.nope + shape.value;
        let a = ExpandedPrefill {
            prefill: Prefill {
                q: q.at + (part.head * (shape.nope + shape.rope) * 2) as u64,
                cache: cache.memory.at(),
                out: out.at() + (part.head * shape.value * 2) as u64,
                block_table: self.inputs.tables(lot.span),
                lens: self.inputs.lens(lot.span),
                first: self.inputs.first(lot.span),
                rows: self.inputs.span_rows(lot.span),
                groups: part.groups.len() as i32,
                max_blocks: self.inputs.max_blocks as i32,
                scale: shape.scale,
            },
            kv: room.kv.at() + ((part.groups.start - groups.start) * width * 2) as u64,
            before: self.inputs.blocks_before(lot.span),
            cos_table: rope.cos.at(),
            sin_table: rope.sin.at(),
            q_stride: q.stride as i32,
            kv_stride: (groups.len() * width) as i32,
            heads: shape.heads as i32,
        };
        let grid = ((lot.rows * part.per_group).div_ceil(16 * tiles), part.groups.len(), lot.count);
        self.kernels.launch(f, Launch { grid, block: threads, shared, ..Launch::default() }, arguments![a])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lots_cover_the_sequences_in_order() {
        let extents = [(100, 100), (20, 300), (70, 5000), (10, 64), (10, 64), (9, 700)];
        let all = lots(extents.into_iter(), 3, 1024);
        let bounds: Vec<_> = all.iter().map(|l| (l.span, l.count, l.rows, l.blocks)).collect();
        assert_eq!(bounds, [(3, 2, 100, 7), (5, 1, 70, 79), (6, 3, 10, 13)]);
    }

    #[test]
    fn groups_of_which_the_rank_has_a_part_are_apart() {
        let shape = |heads, groups, first_head_in_group| AttentionShape {
            heads,
            groups,
            first_head_in_group,
            heads_per_group: 6,
            nope: 40,
            rope: 24,
            value: 56,
            latent: 96,
            scale: 1.0,
            expand: true,
        };
        let part = |groups, head, per_group| Part { groups, head, per_group };
        assert_eq!(parts(&shape(24, 4, 0), 1..3), [part(1..3, 6, 6)]);
        assert_eq!(parts(&shape(3, 2, 5), 0..2), [part(0..1, 0, 1), part(1..2, 1, 2)]);
        assert_eq!(parts(&shape(16, 4, 4), 0..4), [part(0..1, 0, 2), part(1..3, 2, 6), part(3..4, 14, 2)]);
        assert_eq!(parts(&shape(2, 1, 3), 0..1), [part(0..1, 0, 2)]);
    }

    #[test]
    fn the_workspace_holds_a_group_of_the_longest_context() {
        for (groups, width, max_context) in [(8, 256, 131_072), (128, 256, 8192), (4, 448, 202_752), (1, 96, 100)] {
            let (latents, kv) = bytes(groups, width, 512, max_context);
            let tokens = max_context.next_multiple_of(STEP);
            assert!(kv >= tokens * width * 2 && kv <= (tokens * width * 2 * groups).max(BYTES));
            assert_eq!(latents / 1024 % STEP, 0);
        }
    }
}
