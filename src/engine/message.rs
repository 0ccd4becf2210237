//! What the coordinator tells the ranks: a message of fixed layout, 32-bit little-endian words.
//!
//! ```text
//! magic, kind, step, want, spans, tokens, outputs, draws
//! spans   × { slot, rows, context, keep, blocks }   then each span's block ids, in order
//! tokens  × token id, or FROM and an output row of the step before
//! outputs × row
//! draws   × { key (two words), temperature }
//! ```

pub use crate::backend::FROM;
use crate::backend::{Batch, Draw, Span};
use crate::error::{Error, Result};

const MAGIC: u32 = 0x4751_0002; // "GQ", layout 2
const HEADER: usize = 8;
const SPAN: usize = 5;
const DRAW: usize = 3;

/// One message.
#[derive(Debug, Clone, PartialEq)]
pub enum Message {
    /// Compute a step.
    Step(Step),
    /// Nothing to compute; answer a barrier, so that a lost rank is noticed.
    Heartbeat,
    /// Leave the loop.
    Shutdown,
}

/// What is wanted of a step's output rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Want {
    /// Their tokens, chosen as `draws` says: only scores and tokens travel.
    #[default]
    Tokens,
    /// All logits, gathered on rank 0, which chooses.
    Logits,
}

/// A step: whose tokens, where they go, and which rows are wanted.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Step {
    /// Counts up from 1; a gap means that a rank lost a message.
    pub number: u32,
    /// What is wanted of `outputs`.
    pub want: Want,
    /// The sequences' parts, in row order.
    pub spans: Vec<StepSpan>,
    /// Token ids, or [`FROM`] and an output row of the step before, `[rows]`.
    pub tokens: Vec<u32>,
    /// Rows whose result is wanted, ascending.
    pub outputs: Vec<u32>,
    /// How the outputs' tokens are chosen, `[outputs]`; empty takes the largest logit of each.
    pub draws: Vec<Draw>,
}

/// One sequence's part of a step. Every rank keeps a block table a slot; a step only names what changes in it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StepSpan {
    /// The sequence's slot.
    pub slot: u32,
    /// Rows of the step.
    pub rows: u32,
    /// Tokens in the cache after the step.
    pub context: u32,
    /// Blocks of the slot's table that stay (0 begins a new sequence).
    pub keep: u32,
    /// Blocks that follow those.
    pub blocks: Vec<u32>,
}

impl Message {
    /// The message's bytes, into `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.clear();
        let mut put = |word: u32| out.extend_from_slice(&word.to_le_bytes());
        let (kind, step) = match self {
            Message::Shutdown => (0, None),
            Message::Heartbeat => (1, None),
            Message::Step(step) => (2, Some(step)),
        };
        let empty = Step::default();
        let step = step.unwrap_or(&empty);
        put(MAGIC);
        put(kind);
        put(step.number);
        put(match step.want {
            Want::Tokens => 0,
            Want::Logits => 1,
        });
        for count in [step.spans.len(), step.tokens.len(), step.outputs.len(), step.draws.len()] {
            put(count as u32);
        }
        for s in &step.spans {
            for word in [s.slot, s.rows, s.context, s.keep, s.blocks.len() as u32] {
                put(word);
            }
        }
        let blocks = step.spans.iter().flat_map(|s| &s.blocks);
        blocks.chain(&step.tokens).chain(&step.outputs).for_each(|word| put(*word));
        for d in &step.draws {
            [d.key as u32, (d.key >> 32) as u32, d.temperature.to_bits()].into_iter().for_each(&mut put);
        }
    }

    /// Reads what [`encode`](Message::encode) wrote; refuses anything else.
    pub fn decode(bytes: &[u8]) -> Result<Message> {
        let bad = |what: &str| Error::Internal(format!("step message: {what}"));
        if !bytes.len().is_multiple_of(4) || bytes.len() < 4 * HEADER {
            return Err(bad("too short"));
        }
        let words: Vec<u32> = bytes.chunks_exact(4).map(|w| u32::from_le_bytes([w[0], w[1], w[2], w[3]])).collect();
        if words[0] != MAGIC {
            return Err(bad("another version of gqla runs on rank 0"));
        }
        let want = match words[3] {
            0 => Want::Tokens,
            1 => Want::Logits,
            _ => return Err(bad("unknown output")),
        };
        match words[1] {
            0 => return Ok(Message::Shutdown),
            1 => return Ok(Message::Heartbeat),
            2 => {}
            _ => return Err(bad("unknown kind")),
        }
        let [spans, tokens, outputs, draws] = [4, 5, 6, 7].map(|i| words[i] as usize);
        let mut rest = &words[HEADER..];
        let mut take = |count: usize| {
            let (head, tail) = rest.split_at_checked(count).ok_or_else(|| bad("truncated"))?;
            rest = tail;
            Ok::<_, Error>(head)
        };
        let fixed = take(spans.checked_mul(SPAN).ok_or_else(|| bad("truncated"))?)?;
        let mut step = Step { number: words[2], want, ..Step::default() };
        for s in fixed.chunks_exact(SPAN) {
            let blocks = take(s[4] as usize)?.to_vec();
            step.spans.push(StepSpan { slot: s[0], rows: s[1], context: s[2], keep: s[3], blocks });
        }
        step.tokens = take(tokens)?.to_vec();
        step.outputs = take(outputs)?.to_vec();
        for d in take(draws.checked_mul(DRAW).ok_or_else(|| bad("truncated"))?)?.chunks_exact(DRAW) {
            let key = u64::from(d[0]) | u64::from(d[1]) << 32;
            step.draws.push(Draw { key, temperature: f32::from_bits(d[2]) });
        }
        let drawn = draws == 0 || draws == outputs;
        if !rest.is_empty() || !drawn || step.spans.iter().map(|s| s.rows as usize).sum::<usize>() != tokens {
            return Err(bad("lengths do not add up"));
        }
        Ok(Message::Step(step))
    }
}

/// The block tables of all slots on one rank.
#[derive(Debug, Clone, Default)]
pub struct Tables {
    slots: Vec<Vec<u32>>,
}

impl Tables {
    /// Applies what a step changes and lays the step out as a batch.
    pub fn batch(&mut self, step: &Step) -> Result<Batch> {
        let mut batch = Batch {
            tokens: step.tokens.clone(),
            outputs: step.outputs.clone(),
            draws: step.draws.clone(),
            ..Batch::default()
        };
        for s in &step.spans {
            let slot = s.slot as usize;
            if self.slots.len() <= slot {
                self.slots.resize(slot + 1, vec![]);
            }
            let table = &mut self.slots[slot];
            if table.len() < s.keep as usize || s.context < s.rows {
                return Err(Error::Internal(format!("step {}: slot {slot} does not fit its block table", step.number)));
            }
            table.truncate(s.keep as usize);
            table.extend_from_slice(&s.blocks);
            batch.spans.push(Span {
                first: batch.positions.len(),
                rows: s.rows as usize,
                context: s.context as usize,
                blocks: table.clone(),
            });
            batch.positions.extend(s.context - s.rows..s.context);
        }
        Ok(batch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step() -> Step {
        Step {
            number: 7,
            want: Want::Logits,
            spans: vec![
                StepSpan { slot: 1, rows: 2, context: 66, keep: 0, blocks: vec![5, 9] },
                StepSpan { slot: 0, rows: 1, context: 1, keep: 0, blocks: vec![3] },
            ],
            tokens: vec![10, FROM | 3, 12],
            outputs: vec![1, 2],
            draws: vec![Draw::new(1, 2, 0.7), Draw::new(3, 4, 0.0)],
        }
    }

    #[test]
    fn a_message_survives_the_wire_and_no_cut_is_accepted() {
        let mut bytes = vec![];
        for m in [Message::Step(step()), Message::Heartbeat, Message::Shutdown] {
            m.encode(&mut bytes);
            assert_eq!(Message::decode(&bytes).unwrap(), m);
        }
        Message::Step(step()).encode(&mut bytes);
        for cut in 0..bytes.len() {
            assert!(Message::decode(&bytes[..cut]).is_err(), "{cut} bytes");
        }
        bytes.extend([0; 4]);
        assert!(Message::decode(&bytes).is_err());
    }

    #[test]
    fn tables_grow_by_what_a_step_names() {
        let mut tables = Tables::default();
        let batch = tables.batch(&step()).unwrap();
        assert_eq!(batch.positions, [64, 65, 0]);
        let next = StepSpan { slot: 1, rows: 1, context: 129, keep: 2, blocks: vec![4] };
        let batch = tables.batch(&Step { spans: vec![next], tokens: vec![1], ..Step::default() }).unwrap();
        assert_eq!(batch.spans[0].blocks, [5, 9, 4]);
        let lost = StepSpan { slot: 2, rows: 1, context: 65, keep: 1, blocks: vec![4] };
        assert!(tables.batch(&Step { spans: vec![lost], tokens: vec![1], ..Step::default() }).is_err());
    }
}
