//! Rank 0's other way to drive the ranks: every logit of given token lists, for comparison and perplexity.

use crate::cache::BLOCK;
use crate::comm::Communicator;
use crate::engine::message::{Message, Step, StepSpan, Want};
use crate::engine::runner::Run;
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
            self.number = self.number.wrapping_add(1);
            let step = Step {
                number: self.number,
                want: Want::Logits,
                spans: vec![span],
                tokens: chunk.to_vec(),
                outputs: (0..chunk.len() as u32).collect(),
            };
            let step = self.tell(Message::Step(step))?;
            if let Message::Step(step) = step {
                let outputs = self.runner.execute(&step)?;
                for (row, logits) in outputs.logits.chunks_exact(vocab).enumerate() {
                    visit(first + row, logits);
                }
            }
        }
        Ok(())
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
