//! The tokens that steps choose: on the GPU for the next step's embedding, in page-locked memory for rank 0, and the
//! two steps that may be under way.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use super::context::{Event, Gpu, Memory, Pinned};
use crate::error::Result;

/// Steps under way at most.
pub(crate) const SIDES: usize = 2;

/// Candidates, tokens and steps under way.
pub(crate) struct Tokens {
    rows: usize,
    /// The last step's tokens. `[rows]`
    pub device: Memory,
    /// This rank's best, a score and a token each. `[rows, 2]`
    pub best: Memory,
    /// Of all ranks, where NCCL gathers them. `[world, rows, 2]`
    pub gathered: Option<Memory>,
    /// Workspace: the best of parts of a row. `[rows, parts, 2]`
    pub parts: RefCell<Option<Memory>>,
    /// The tokens of the last step and of the one before it. `[SIDES, rows]`
    host: Pinned,
    steps: [Step; SIDES],
    /// The last step's side.
    last: usize,
}

/// When a step began and ended on the GPU.
struct Step {
    began: Event,
    ended: Event,
}

impl Tokens {
    /// Room for `rows` output rows, gathered from `gathered` ranks.
    pub fn new(gpu: &Arc<Gpu>, rows: usize, gathered: usize) -> Result<Tokens> {
        let step = || Ok(Step { began: Event::timed(gpu)?, ended: Event::timed(gpu)? });
        Ok(Tokens {
            rows,
            device: Memory::new(gpu, rows * 4)?,
            best: Memory::new(gpu, rows * 8)?,
            gathered: if gathered > 1 { Some(Memory::new(gpu, gathered * rows * 8)?) } else { None },
            parts: RefCell::new(None),
            host: Pinned::new(gpu, SIDES * rows * 4)?,
            steps: [step()?, step()?],
            last: 0,
        })
    }

    /// Output rows there is room for.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Where the GPU puts tokens for the host.
    pub fn host(&self) -> u64 {
        self.host.words().as_ptr() as u64
    }

    /// The side of the next step.
    pub fn next(&self) -> usize {
        (self.last + 1) % SIDES
    }

    /// The next step's inputs are enqueued.
    pub fn begin(&mut self) -> Result<()> {
        self.last = self.next();
        self.steps[self.last].began.record()
    }

    /// The whole step is.
    pub fn end(&self) -> Result<()> {
        self.steps[self.last].ended.record()
    }

    /// Whether the last step with `side` is over.
    pub fn over(&self, side: usize) -> Result<bool> {
        self.steps[side].ended.done()
    }

    /// The GPU's time of a step that is over.
    pub fn time(&self, behind: bool) -> Result<Duration> {
        let step = &self.steps[self.side(behind)];
        step.ended.since(&step.began)
    }

    /// The tokens of a step that is over.
    pub fn read(&self, behind: bool, count: usize, tokens: &mut Vec<u32>) {
        let at = self.side(behind) * self.rows;
        tokens.clear();
        tokens.extend(self.host.words()[at..at + count].iter().map(|token| token.load(Relaxed)));
    }

    /// The side of the last step, or of the one before it.
    pub fn side(&self, behind: bool) -> usize {
        (self.last + usize::from(behind)) % SIDES
    }
}
