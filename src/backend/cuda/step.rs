//! A step's tokens, positions and block tables on the GPU: one asynchronous copy from page-locked memory, and of the
//! block tables only what changed.

use std::ops::Range;
use std::sync::Arc;

use super::context::{Event, Gpu, Memory, Pinned, bytes_of};
use super::tokens::SIDES;
use crate::backend::{Batch, DECODE_ROWS, Span};
use crate::cache::BLOCK;
use crate::error::{Error, Result};

/// Neighbouring sequences that decode together: each has `rows` rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    /// First sequence.
    pub span: usize,
    /// Sequences.
    pub count: usize,
    /// First row.
    pub first: usize,
    /// Rows a sequence, s_q.
    pub rows: usize,
}

/// Neighbouring sequences in prefill.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Chunk {
    /// First sequence.
    pub span: usize,
    /// Sequences.
    pub count: usize,
    /// Rows of the longest.
    pub rows: usize,
}

/// A sequence's part of the step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Extent {
    /// First row.
    pub first: usize,
    /// Rows.
    pub rows: usize,
    /// Tokens in the cache, the new ones included.
    pub context: usize,
}

/// What is on its way to the GPU, in page-locked memory: two steps may be under way.
struct Staged {
    ints: Pinned,
    table: Pinned,
    copied: Event,
}

/// The present step.
pub(crate) struct Inputs {
    gpu: Arc<Gpu>,
    max_rows: usize,
    max_spans: usize,
    /// Blocks a sequence can have: the block table's stride.
    pub max_blocks: usize,
    staged: [Staged; SIDES],
    device: Memory,
    table: Memory,
    /// What the device's block table holds.
    shadow: Vec<i32>,
    /// Rows that are computed, padding included.
    pub rows: usize,
    /// Output rows that are computed, padding included.
    pub outputs: usize,
    /// Output rows that were asked for.
    pub wanted: usize,
    /// Decoding sequences.
    pub runs: Vec<Run>,
    /// All sequences, padding included.
    pub extents: Vec<Extent>,
}

impl Inputs {
    pub fn new(gpu: &Arc<Gpu>, max_rows: usize, max_spans: usize, max_context: usize) -> Result<Inputs> {
        // A graph's padding may round the sequences up.
        let max_spans = bucket(max_spans);
        let max_rows = max_rows.max(max_spans);
        let max_blocks = max_context.div_ceil(BLOCK).max(1);
        let ints = 7 * max_rows + 4 * max_spans + 1;
        let staged = || {
            let table = Pinned::new(gpu, 4 * max_spans * max_blocks)?;
            Ok(Staged { ints: Pinned::new(gpu, 4 * ints)?, table, copied: Event::new(gpu)? })
        };
        Ok(Inputs {
            gpu: gpu.clone(),
            max_rows,
            max_spans,
            max_blocks,
            staged: [staged()?, staged()?],
            device: Memory::new(gpu, 4 * ints)?,
            table: Memory::new(gpu, 4 * max_spans * max_blocks)?,
            shadow: vec![0; max_spans * max_blocks],
            rows: 0,
            outputs: 0,
            wanted: 0,
            runs: vec![],
            extents: vec![],
        })
    }

    /// Whether the inputs of the last step with `side` have been copied, so that another's can be written.
    pub fn copied(&self, side: usize) -> Result<bool> {
        self.staged[side].copied.done()
    }

    /// Sequences there is room for.
    pub fn spans(&self) -> usize {
        self.max_spans
    }
    /// Token ids, or, with the sign bit, a row of the last step's tokens. `[rows]`
    pub fn tokens(&self) -> u64 {
        self.device.at()
    }
    /// Positions. `[rows]`
    pub fn positions(&self) -> u64 {
        self.device.at() + 4 * self.max_rows as u64
    }
    /// Sequence of each row, -1 for padding. `[rows]`
    pub fn row_seq(&self) -> u64 {
        self.device.at() + 8 * self.max_rows as u64
    }
    /// Rows whose logits are wanted, -1 for padding. `[outputs]`
    pub fn output_rows(&self) -> u64 {
        self.device.at() + 12 * self.max_rows as u64
    }
    /// Temperatures. `[outputs]`
    pub fn temperatures(&self) -> u64 {
        self.device.at() + 16 * self.max_rows as u64
    }
    /// Keys of the noise, low and high half. `[outputs, 2]`
    pub fn keys(&self) -> u64 {
        self.device.at() + 20 * self.max_rows as u64
    }
    /// Which side of the tokens' host memory the step writes. `[1]`
    pub fn side(&self) -> u64 {
        self.device.at() + 4 * (7 * self.max_rows + 4 * self.max_spans) as u64
    }
    /// Tokens in the cache, from sequence `span` on; 0 for padding. `[spans]`
    pub fn lens(&self, span: usize) -> u64 {
        self.device.at() + 4 * (7 * self.max_rows + span) as u64
    }
    /// First row, from sequence `span` on. `[spans]`
    pub fn first(&self, span: usize) -> u64 {
        self.device.at() + 4 * (7 * self.max_rows + self.max_spans + span) as u64
    }
    /// Rows, from sequence `span` on. `[spans]`
    pub fn span_rows(&self, span: usize) -> u64 {
        self.device.at() + 4 * (7 * self.max_rows + 2 * self.max_spans + span) as u64
    }
    /// Blocks of the sequences in prefill before it, from sequence `span` on. `[spans]`
    pub fn blocks_before(&self, span: usize) -> u64 {
        self.device.at() + 4 * (7 * self.max_rows + 3 * self.max_spans + span) as u64
    }
    /// Block tables, from sequence `span` on. `[spans, max_blocks]`
    pub fn tables(&self, span: usize) -> u64 {
        self.table.at() + 4 * (span * self.max_blocks) as u64
    }

    /// Takes a batch as it is, on a side that no step under way has.
    pub fn begin(&mut self, batch: &Batch, side: usize) -> Result<()> {
        self.upload(batch, side, batch.spans.len(), batch.rows(), batch.outputs.len())?;
        let extent = |s: &Span| Extent { first: s.first, rows: s.rows, context: s.context };
        self.extents = batch.spans.iter().map(extent).collect();
        self.runs.clear();
        for (i, span) in batch.spans.iter().enumerate().filter(|(_, s)| s.rows <= DECODE_ROWS) {
            match self.runs.last_mut() {
                Some(run) if run.span + run.count == i && run.rows == span.rows => run.count += 1,
                _ => self.runs.push(Run { span: i, count: 1, first: span.first, rows: span.rows }),
            }
        }
        Ok(())
    }

    /// Prefilling sequences that `takes` takes by their rows and context.
    pub fn chunks(&self, takes: impl Fn(usize, usize) -> bool) -> Vec<Chunk> {
        let mut chunks: Vec<Chunk> = vec![];
        for (i, extent) in self.extents.iter().enumerate() {
            if extent.rows <= DECODE_ROWS || !takes(extent.rows, extent.context) {
                continue;
            }
            match chunks.last_mut() {
                Some(chunk) if chunk.span + chunk.count == i => {
                    chunk.count += 1;
                    chunk.rows = chunk.rows.max(extent.rows);
                }
                _ => chunks.push(Chunk { span: i, count: 1, rows: extent.rows }),
            }
        }
        chunks
    }

    /// Rows of the sequences that `takes` takes.
    pub fn rows_of(&self, takes: impl Fn(usize, usize) -> bool) -> Vec<Range<usize>> {
        let mut ranges: Vec<Range<usize>> = vec![];
        for extent in self.extents.iter().filter(|e| takes(e.rows, e.context)) {
            match ranges.last_mut() {
                Some(range) if range.end == extent.first => range.end += extent.rows,
                _ => ranges.push(extent.first..extent.first + extent.rows),
            }
        }
        ranges
    }

    /// Takes a decode batch padded to `spans` sequences of `rows` rows each, all of them outputs if any is.
    pub fn begin_padded(&mut self, batch: &Batch, side: usize, spans: usize, rows: usize) -> Result<()> {
        let outputs = if batch.outputs.is_empty() { 0 } else { spans * rows };
        self.upload(batch, side, spans, spans * rows, outputs)?;
        self.runs = vec![Run { span: 0, count: spans, first: 0, rows }];
        self.extents = (0..spans).map(|i| Extent { first: i * rows, rows, context: 0 }).collect();
        Ok(())
    }

    fn upload(&mut self, batch: &Batch, side: usize, spans: usize, rows: usize, outputs: usize) -> Result<()> {
        let (r, s) = (self.max_rows, self.max_spans);
        if rows > r || spans > s || outputs > r || batch.draws.len() > outputs {
            let what = format!("a step of {rows} rows and {spans} sequences on a backend made for {r} and {s}");
            return Err(Error::Internal(what));
        }
        self.gpu.attach()?;
        let staged = &mut self.staged[side];
        staged.copied.wait()?;
        let ints = staged.ints.slice_mut::<i32>();
        let (tokens, rest) = ints.split_at_mut(r);
        let (positions, rest) = rest.split_at_mut(r);
        let (row_seq, rest) = rest.split_at_mut(r);
        let (output_rows, rest) = rest.split_at_mut(r);
        let (temperatures, rest) = rest.split_at_mut(r);
        let (keys, rest) = rest.split_at_mut(2 * r);
        let (lens, rest) = rest.split_at_mut(s);
        let (firsts, rest) = rest.split_at_mut(s);
        let (span_rows, rest) = rest.split_at_mut(s);
        let (blocks_before, rest) = rest.split_at_mut(s);
        let mut before = 0;
        rest[0] = side as i32;
        let live = batch.rows();
        for i in 0..rows {
            tokens[i] = batch.tokens.get(i).map_or(0, |&t| t as i32);
            positions[i] = batch.positions.get(i).map_or(0, |&p| p as i32);
        }
        row_seq[..rows].fill(-1);
        output_rows[..outputs].fill(-1);
        for (o, &row) in output_rows.iter_mut().zip(&batch.outputs) {
            *o = row as i32;
        }
        temperatures[..outputs].fill(0);
        for (i, draw) in batch.draws.iter().enumerate() {
            temperatures[i] = draw.temperature.to_bits() as i32;
            keys[2 * i..2 * i + 2].copy_from_slice(&[draw.key as i32, (draw.key >> 32) as i32]);
        }
        for i in 0..spans {
            let Some(span) = batch.spans.get(i) else {
                (lens[i], firsts[i], span_rows[i]) = (0, live as i32, 0);
                continue;
            };
            if span.blocks.len() > self.max_blocks || span.context > span.blocks.len() * BLOCK {
                let what = format!("a sequence of {} tokens in {} blocks", span.context, span.blocks.len());
                return Err(Error::Internal(format!("{what}, with room for {} blocks", self.max_blocks)));
            }
            (lens[i], firsts[i], span_rows[i]) = (span.context as i32, span.first as i32, span.rows as i32);
            row_seq[span.first..span.first + span.rows].fill(i as i32);
            blocks_before[i] = before as i32;
            before += if span.rows > DECODE_ROWS { span.context.div_ceil(BLOCK) } else { 0 };
        }
        self.gpu.upload(self.device.at(), bytes_of(staged.ints.slice::<i32>()))?;
        // A block table changes by one entry every BLOCK tokens, and whole only when sequences come and go.
        for (i, span) in batch.spans.iter().enumerate() {
            let at = i * self.max_blocks;
            let row = &mut self.shadow[at..at + span.blocks.len()];
            let differs = |(old, new): (&i32, &u32)| *old != *new as i32;
            let Some(from) = row.iter().zip(&span.blocks).position(differs) else { continue };
            let to = row.len() - row.iter().rev().zip(span.blocks.iter().rev()).position(differs).unwrap_or(0);
            let changed = &mut staged.table.slice_mut::<i32>()[at + from..at + to];
            for ((old, staged), new) in row[from..to].iter_mut().zip(&mut *changed).zip(&span.blocks[from..to]) {
                *staged = *new as i32;
                *old = *new as i32;
            }
            self.gpu.upload(self.table.at() + 4 * (at + from) as u64, bytes_of(changed))?;
        }
        staged.copied.record()?;
        (self.rows, self.outputs, self.wanted) = (rows, outputs, batch.outputs.len());
        Ok(())
    }
}

/// The number of sequences a graph is made for: 1, 2, 4, 8, then multiples of 8, of 16 from 32, of 32 from 64.
pub(crate) fn bucket(count: usize) -> usize {
    match count {
        0..=8 => count.next_power_of_two(),
        9..=32 => count.next_multiple_of(8),
        33..=64 => count.next_multiple_of(16),
        65..=256 => count.next_multiple_of(32),
        _ => count.next_multiple_of(64),
    }
}

#[cfg(test)]
mod tests {
    use super::bucket;

    #[test]
    fn buckets_hold_their_batch_and_do_not_decrease() {
        let mut last = 0;
        for count in 1..1000 {
            let b = bucket(count);
            assert!(b >= count && b >= last && bucket(b) == b, "{count} in {b}");
            last = b;
        }
        assert_eq!([1, 2, 3, 5, 9, 33, 65, 100].map(bucket), [1, 2, 4, 8, 16, 48, 96, 128]);
    }
}
