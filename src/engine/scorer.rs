//! Rank 0's other way to drive the ranks: every logit of given token lists, for comparison and perplexity.

use std::time::Duration;

use crate::cache::BLOCK;
use crate::comm::Communicator;
use crate::engine::message::{Message, Step, StepSpan, Want};
use crate::engine::runner::{Outputs, Run};
use crate::engine::setup::{self, Config, Info};
use crate::error::{Error, Result};

/// Scores token lists one after the other. Every other rank is in [`run_worker`](crate::engine::run_worker).
pub struct Scorer {
    runner: Box<dyn Run>,
    info: Info,
    message: Vec<u8>,
    number: u32,
}

impl Scorer {
    /// Loads rank 0 of a world.
    pub fn start(config: &Config, comm: Box<dyn Communicator>) -> Result<Scorer> {
        let mut comm = Some(comm);
        let loaded = setup::load(config, &mut comm).inspect_err(|e| {
            if let Some(comm) = comm.as_mut().filter(|c| c.world() > 1) {
                comm.abort(e.exit_code(), &e.to_string());
            }
        });
        let (runner, info) = loaded?;
        Ok(Scorer { runner, info, message: vec![], number: 0 })
    }

    /// What was loaded.
    pub fn info(&self) -> &Info {
        &self.info
    }

    /// Calls `visit` with each position of `tokens` and its logits `[vocab]`.
    pub fn logits(&mut self, tokens: &[u32], mut visit: impl FnMut(usize, &[f32])) -> Result<()> {
        if tokens.len() > self.info.max_context {
            let (have, room) = (tokens.len(), self.info.max_context);
            return Err(Error::Request(format!("{have} tokens do not fit in the context of {room}")));
        }
        let vocab = self.info.model.vocab;
        if let Some(t) = tokens.iter().find(|t| **t as usize >= vocab) {
            return Err(Error::Request(format!("token {t} is not in the vocabulary of {vocab}")));
        }
        for (i, chunk) in tokens.chunks(self.info.step_tokens).enumerate() {
            let first = i * self.info.step_tokens;
            let end = first + chunk.len();
            let keep = first.div_ceil(BLOCK) as u32;
            let span = StepSpan {
                slot: 0,
                rows: chunk.len() as u32,
                context: end as u32,
                keep,
                blocks: (keep..end.div_ceil(BLOCK) as u32).collect(),
            };
            let outputs = self.step(Step {
                want: Want::Logits,
                spans: vec![span],
                tokens: chunk.to_vec(),
                outputs: (0..chunk.len() as u32).collect(),
                ..Step::default()
            })?;
            for (row, logits) in outputs.logits.chunks_exact(vocab).enumerate() {
                visit(first + row, logits);
            }
        }
        Ok(())
    }

    /// Runs one step of the caller's making on all ranks; its number is set here.
    fn step(&mut self, step: Step) -> Result<Outputs> {
        self.launch(step)?;
        self.collect()
    }

    /// Begins a step of the caller's making on all ranks; its number is set here.
    pub fn launch(&mut self, mut step: Step) -> Result<()> {
        self.number = self.number.wrapping_add(1);
        step.number = self.number;
        match self.tell(Message::Step(step))? {
            Message::Step(step) => self.runner.launch(&step),
            _ => Err(Error::Internal("a step is a step".into())),
        }
    }

    /// What the oldest step that has not been collected gave.
    pub fn collect(&mut self) -> Result<Outputs> {
        self.runner.collect()
    }

    /// Whether a step may be launched before the one before it is collected.
    pub fn overlaps(&self) -> bool {
        self.runner.overlaps()
    }

    /// The device's own time of the step collected last, where it keeps one.
    pub fn step_time(&mut self) -> Result<Option<Duration>> {
        self.runner.step_time()
    }

    /// Time spent in all-reduces since the last call.
    pub fn reduce_time(&mut self) -> Option<Duration> {
        self.runner.reduce_time()
    }

    /// For benchmarks: the device's memory bandwidth in bytes a second, measured now.
    pub fn bandwidth(&mut self) -> Result<f64> {
        self.runner.bandwidth()
    }

    /// Lets the other ranks go.
    pub fn finish(mut self) -> Result<()> {
        self.tell(Message::Shutdown)?;
        self.runner.finish()
    }

    /// Ends the other ranks after a failure here.
    pub fn abort(mut self, error: &Error) {
        if self.runner.comm().world() > 1 {
            self.runner.comm().abort(error.exit_code(), &error.to_string());
        }
    }

    fn tell(&mut self, message: Message) -> Result<Message> {
        if self.runner.comm().world() > 1 {
            message.encode(&mut self.message);
            self.runner.comm().broadcast(&mut self.message, None)?;
        }
        Ok(message)
    }
}
