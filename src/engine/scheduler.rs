//! Which sequences compute what in the next step, and who holds which block. Touches no tensors.
//!
//! A sequence is its tokens and how many of them are in the cache. One token short of the end is decoding; more is
//! prefill, a chunk at a time. When blocks run out the youngest sequence gives up its own and computes them again later.
//! A sequence that begins with tokens of which full blocks are in the cache shares these and computes the rest.
//!
//! A step may be planned before the tokens of the one before it are known: then it names them by output row. The ranks
//! compute steps in the order in which they were planned, so what a sequence gives back may go to others at once, even
//! if a step that still uses it is under way: theirs comes after it.

use std::collections::{HashMap, VecDeque};

use crate::cache::BLOCK;
use crate::cache::pool::{Key, Pool};
use crate::engine::message::{FROM, Step, StepSpan};

/// Bounds of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Sequences running at once.
    pub sequences: usize,
    /// Tokens a step.
    pub step_tokens: usize,
    /// Blocks in the cache of every rank.
    pub blocks: usize,
    /// Whether sequences share the blocks of a common prefix.
    pub share_prefixes: bool,
}

#[derive(Debug)]
struct Sequence {
    tokens: Vec<u32>,
    /// Tokens there can be in all.
    most: usize,
    /// Planned outputs whose tokens are not known yet: they follow `tokens`.
    awaited: usize,
    /// Of the last of those: its row among the outputs of the step planned last.
    row: u32,
    /// Tokens in the cache, awaited ones among them.
    computed: usize,
    blocks: Vec<u32>,
    /// Blocks of `blocks` that the ranks know of.
    told: usize,
    slot: Option<u32>,
    /// Keys of its first full blocks, as many as have been needed yet.
    keys: Vec<Key>,
    /// Blocks of `blocks` that are known by their keys.
    known: usize,
    /// It has computed something, be it before a pre-emption.
    begun: bool,
    /// Tokens of the prompt that were in the cache when it first ran; `None` before that.
    cached: Option<usize>,
    /// Rows of every prompt position are wanted (prompt log-probabilities).
    all_rows: bool,
}

impl Sequence {
    /// Its tokens, those awaited among them.
    fn length(&self) -> usize {
        self.tokens.len() + self.awaited
    }

    /// Tokens that can be computed now: none while the last is awaited, or while more than one is.
    fn rest(&self) -> usize {
        if self.awaited > 1 || (self.awaited == 1 && self.length() >= self.most) {
            return 0;
        }
        self.length() - self.computed
    }

    /// Makes the keys of the first `full` blocks.
    fn hash_to(&mut self, full: usize) {
        for i in self.keys.len()..full {
            let key = Key::of(self.keys.last().copied(), &self.tokens[i * BLOCK..(i + 1) * BLOCK]);
            self.keys.push(key);
        }
    }
}

/// The scheduler's state.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    pool: Pool,
    slots: Vec<u32>,
    sequences: HashMap<u64, Sequence>,
    waiting: VecDeque<u64>,
    /// Oldest first.
    running: Vec<u64>,
    step: u32,
    /// Sequences made to compute their cache again, since the start.
    pub preemptions: u64,
}

/// A planned step and whose rows its outputs are.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Plan {
    /// What the ranks are told.
    pub step: Step,
    /// A sequence of each output row, in order, and the position of that row in the sequence.
    pub outputs: Vec<(u64, usize)>,
    /// Sequences that compute for the first time.
    pub began: Vec<u64>,
}

impl Scheduler {
    /// Nothing waiting, all blocks free.
    pub fn new(mut limits: Limits) -> Scheduler {
        // Every sequence that runs can decode in every step.
        limits.sequences = limits.sequences.min(limits.step_tokens);
        Scheduler {
            limits,
            pool: Pool::new(limits.blocks),
            slots: (0..limits.sequences as u32).rev().collect(),
            sequences: HashMap::new(),
            waiting: VecDeque::new(),
            running: vec![],
            step: 0,
            preemptions: 0,
        }
    }

    /// Queues a sequence, which ends after `generate` tokens if not before. `id` must be new.
    pub fn add(&mut self, id: u64, prompt: Vec<u32>, generate: usize, all_rows: bool) {
        let sequence = Sequence {
            most: prompt.len().saturating_add(generate),
            tokens: prompt,
            awaited: 0,
            row: 0,
            computed: 0,
            blocks: vec![],
            told: 0,
            slot: None,
            keys: vec![],
            known: 0,
            begun: false,
            cached: None,
            all_rows,
        };
        self.sequences.insert(id, sequence);
        self.waiting.push_back(id);
    }

    /// Appends the token that the oldest awaited output gave.
    pub fn push(&mut self, id: u64, token: u32) {
        if let Some(s) = self.sequences.get_mut(&id) {
            s.tokens.push(token);
            s.awaited = s.awaited.saturating_sub(1);
        }
    }

    /// Forgets a sequence, finished or cancelled, and frees what it held.
    pub fn remove(&mut self, id: u64) {
        self.waiting.retain(|w| *w != id);
        self.running.retain(|r| *r != id);
        if let Some(s) = self.sequences.remove(&id) {
            self.pool.give(s.blocks.into_iter());
            self.slots.extend(s.slot);
        }
    }

    /// A sequence's known tokens, prompt first.
    pub fn tokens(&self, id: u64) -> &[u32] {
        self.sequences.get(&id).map_or(&[], |s| &s.tokens)
    }

    /// A running sequence's block table, and how many of its tokens are in the cache or in the step last planned.
    pub fn table(&self, id: u64) -> Option<(&[u32], usize)> {
        self.sequences.get(&id).filter(|s| s.slot.is_some()).map(|s| (&s.blocks[..], s.computed))
    }

    /// Tokens of a sequence's prompt that it found in the cache.
    pub fn cached(&self, id: u64) -> usize {
        self.sequences.get(&id).and_then(|s| s.cached).unwrap_or(0)
    }

    /// Sequences that run, and that wait.
    pub fn counts(&self) -> (usize, usize) {
        (self.running.len(), self.waiting.len())
    }

    /// Blocks free, and in all.
    pub fn blocks(&self) -> (usize, usize) {
        (self.pool.free(), self.pool.total())
    }

    /// The next step, or `None` when there is nothing to compute, unless it is to await tokens. The plan counts as
    /// computed once it is returned. All tokens but those of the last plan must have been pushed.
    pub fn plan(&mut self) -> Option<Plan> {
        let mut plan = Plan::default();
        let mut budget = self.limits.step_tokens;
        // Oldest first, so that whoever loses its blocks below has not been scheduled yet. A long prompt leaves one
        // row for every sequence that decodes behind it.
        let order = self.running.clone();
        let mut decoding = order.iter().filter(|id| self.rest(**id) == 1).count();
        for id in order {
            let rest = self.sequences.get(&id).filter(|s| s.slot.is_some()).map_or(0, Sequence::rest);
            if rest == 0 {
                continue;
            }
            decoding -= usize::from(rest == 1);
            let share = budget.saturating_sub(decoding);
            if share > 0 && self.make_room(id, share) {
                budget -= self.schedule(id, share, &mut plan);
            }
        }
        while budget > 0 && self.running.len() < self.limits.sequences {
            let Some(id) = self.waiting.front().copied() else { break };
            if self.rest(id) == 0 || !self.admit(id) {
                break;
            }
            self.waiting.pop_front();
            self.running.push(id);
            budget -= self.schedule(id, budget, &mut plan);
        }
        self.learn();
        if plan.step.spans.is_empty() {
            return None;
        }
        self.step = self.step.wrapping_add(1);
        plan.step.number = self.step;
        Some(plan)
    }

    /// Tokens of a sequence that can be computed now.
    fn rest(&self, id: u64) -> usize {
        self.sequences.get(&id).map_or(0, Sequence::rest)
    }

    /// Gives the first who waits a slot and the blocks of its prefix that are in the cache; false when the rest does not
    /// fit.
    fn admit(&mut self, id: u64) -> bool {
        let Some(s) = self.sequences.get_mut(&id) else { return false };
        // One token at least is computed, for its output. Log-probabilities need the rows of all.
        let full = if s.all_rows || !self.limits.share_prefixes { 0 } else { (s.length() - 1) / BLOCK };
        s.hash_to(full);
        let (found, idle) = self.pool.find(&s.keys[..full]);
        if s.length().div_ceil(BLOCK) - found > self.pool.free() - idle {
            return false;
        }
        s.blocks = self.pool.share(&s.keys[..found]);
        (s.computed, s.known) = (found * BLOCK, found);
        s.cached.get_or_insert(s.computed);
        s.slot = self.slots.pop();
        true
    }

    /// Blocks that this step fills are known from the next step on.
    fn learn(&mut self) {
        if !self.limits.share_prefixes {
            return;
        }
        for id in &self.running {
            let Some(s) = self.sequences.get_mut(id) else { continue };
            let full = s.computed.min(s.tokens.len()) / BLOCK;
            if full > s.known {
                s.hash_to(full);
                for i in s.known..full {
                    self.pool.know(s.blocks[i], s.keys[i]);
                }
                s.known = full;
            }
        }
    }

    /// Frees blocks, the youngest sequence's first, until the next chunk of `id` fits; false when `id` itself had to go.
    fn make_room(&mut self, id: u64, budget: usize) -> bool {
        loop {
            let Some(s) = self.sequences.get(&id) else { return false };
            let end = s.computed + s.rest().min(budget);
            if end.div_ceil(BLOCK) <= s.blocks.len() + self.pool.free() {
                return true;
            }
            let Some(youngest) = self.running.pop() else { return false };
            self.preempt(youngest);
            if youngest == id {
                return false;
            }
        }
    }

    /// Takes everything from a sequence; it computes its tokens again, before anyone who waits.
    fn preempt(&mut self, id: u64) {
        if let Some(s) = self.sequences.get_mut(&id) {
            self.pool.give(s.blocks.drain(..));
            self.slots.extend(s.slot.take());
            (s.computed, s.told, s.known) = (0, 0, 0);
            self.waiting.push_front(id);
            self.preemptions += 1;
        }
    }

    /// Adds the next chunk of `id` to the plan and returns its rows. There is room for it.
    fn schedule(&mut self, id: u64, budget: usize, plan: &mut Plan) -> usize {
        let Some(s) = self.sequences.get_mut(&id) else { return 0 };
        let rows = s.rest().min(budget);
        let end = s.computed + rows;
        let missing = end.div_ceil(BLOCK).saturating_sub(s.blocks.len());
        let Some(taken) = self.pool.take(missing) else { return 0 };
        s.blocks.extend(taken);
        if !std::mem::replace(&mut s.begun, true) {
            plan.began.push(id);
        }
        let first = plan.step.tokens.len();
        plan.step.spans.push(StepSpan {
            slot: s.slot.unwrap_or(0),
            rows: rows as u32,
            context: end as u32,
            keep: s.told as u32,
            blocks: s.blocks[s.told..].to_vec(),
        });
        let known = s.tokens.len();
        plan.step.tokens.extend(&s.tokens[s.computed.min(known)..end.min(known)]);
        if end > known {
            plan.step.tokens.push(FROM | s.row);
        }
        let wanted = if s.all_rows {
            s.computed..end
        } else if end == s.length() {
            end - 1..end
        } else {
            end..end
        };
        for position in wanted {
            plan.step.outputs.push((first + position - s.computed) as u32);
            plan.outputs.push((id, position));
        }
        if end == s.length() {
            s.awaited += 1;
            s.row = plan.outputs.len() as u32 - 1;
        }
        (s.computed, s.told) = (end, s.blocks.len());
        rows
    }
}
