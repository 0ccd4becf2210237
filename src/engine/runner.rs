//! One rank's part of a step, on whatever device: block tables, the model, and the collectives around the head.

use std::time::Duration;

use crate::backend::Backend;
use crate::comm::Communicator;
use crate::engine::message::{Step, Tables, Want};
use crate::error::Result;
use crate::model::Model;

/// A rank that can compute steps.
pub trait Run: Send {
    /// Computes a step. Every rank calls it with the same step.
    fn execute(&mut self, step: &Step) -> Result<&Outputs>;
    /// The control plane.
    fn comm(&mut self) -> &mut dyn Communicator;
    /// Time spent in all-reduces since the last call, where it can be told.
    fn reduce_time(&mut self) -> Option<Duration>;
    /// What the caches of all layers really take, in bytes.
    fn cache_bytes(&self) -> usize;
    /// For benchmarks: the device's memory bandwidth, measured now.
    fn bandwidth(&mut self) -> Result<f64> {
        Err(crate::error::Error::Device("this rank has no memory to measure".into()))
    }
    /// The clean end: every rank comes here last.
    fn finish(self: Box<Self>) -> Result<()>;
}

/// What a step gave for its output rows.
#[derive(Debug, Clone, Default)]
pub struct Outputs {
    /// The token of the largest logit, `[outputs]`; on every rank. Empty when logits were wanted.
    pub best: Vec<u32>,
    /// All logits, `[outputs, vocab]`; on every rank. Empty when only the best were wanted.
    pub logits: Vec<f32>,
}

/// A model on a backend.
pub struct Runner<B: Backend> {
    backend: B,
    model: Model<B>,
    tables: Tables,
    local: Vec<f32>,
    best: Vec<(f32, u32)>,
    send: Vec<u8>,
    receive: Vec<u8>,
    outputs: Outputs,
}

impl<B: Backend> Runner<B> {
    /// A runner of a loaded model.
    pub fn new(backend: B, model: Model<B>) -> Runner<B> {
        Runner {
            backend,
            model,
            tables: Tables::default(),
            local: vec![],
            best: vec![],
            send: vec![],
            receive: vec![],
            outputs: Outputs::default(),
        }
    }

    /// Every rank's best of its vocabulary rows, compared everywhere; ties go to the lower token.
    fn gather_best(&mut self) -> Result<()> {
        self.model.argmax(&mut self.backend, &mut self.best)?;
        // A benchmark may hold one rank's shard of a world that is not there.
        let world = self.backend.comm().world();
        self.send.clear();
        for (value, index) in &self.best {
            let token = *index + self.model.owned.vocab.start as u32;
            self.send.extend(value.to_le_bytes());
            self.send.extend(token.to_le_bytes());
        }
        self.receive.resize(self.send.len() * world, 0);
        self.backend.comm().all_gather(&self.send, &mut self.receive)?;
        let word = |at: usize| {
            let r = &self.receive[at..at + 4];
            [r[0], r[1], r[2], r[3]]
        };
        for row in 0..self.best.len() {
            let mut best = (0.0, 0);
            for rank in 0..world {
                let at = rank * self.send.len() + row * 8;
                let (value, token) = (f32::from_le_bytes(word(at)), u32::from_le_bytes(word(at + 4)));
                if rank == 0 || value > best.0 {
                    best = (value, token);
                }
            }
            self.outputs.best.push(best.1);
        }
        Ok(())
    }

    /// All ranks' logits side by side. Shards differ by one row at most, so they travel padded to the largest.
    fn gather_logits(&mut self, rows: usize) -> Result<()> {
        self.model.logits(&mut self.backend, &mut self.local)?;
        let shard = self.model.owned.shard;
        let vocab = self.model.config.vocab;
        if shard.world == 1 {
            self.outputs.logits.extend_from_slice(&self.local);
            return Ok(());
        }
        let (mine, widest) = (self.model.owned.vocab.len(), vocab.div_ceil(shard.world));
        self.send.clear();
        for row in self.local.chunks_exact(mine) {
            row.iter().for_each(|l| self.send.extend(l.to_le_bytes()));
            self.send.extend(std::iter::repeat_n(0, 4 * (widest - mine)));
        }
        self.receive.resize(self.send.len() * shard.world, 0);
        self.backend.comm().all_gather(&self.send, &mut self.receive)?;
        self.outputs.logits.resize(rows * vocab, 0.0);
        for rank in 0..shard.world {
            let theirs = crate::model::shard::Shard { rank, ..shard }.range(vocab);
            for row in 0..rows {
                let at = rank * self.send.len() + row * widest * 4;
                let out = &mut self.outputs.logits[row * vocab..][theirs.clone()];
                for (o, b) in out.iter_mut().zip(self.receive[at..].chunks_exact(4)) {
                    *o = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                }
            }
        }
        Ok(())
    }
}

impl<B: Backend + 'static> Run for Runner<B> {
    fn execute(&mut self, step: &Step) -> Result<&Outputs> {
        let batch = self.tables.batch(step)?;
        self.outputs.best.clear();
        self.outputs.logits.clear();
        self.model.forward(&mut self.backend, &batch, step.want == Want::Argmax)?;
        if !batch.outputs.is_empty() {
            match step.want {
                Want::Argmax => self.gather_best()?,
                Want::Logits => self.gather_logits(batch.outputs.len())?,
            }
        }
        Ok(&self.outputs)
    }

    fn comm(&mut self) -> &mut dyn Communicator {
        self.backend.comm()
    }

    fn reduce_time(&mut self) -> Option<Duration> {
        self.backend.reduce_time()
    }

    fn cache_bytes(&self) -> usize {
        self.model.cache_bytes(&self.backend)
    }

    fn bandwidth(&mut self) -> Result<f64> {
        self.backend.bandwidth()
    }

    fn finish(self: Box<Self>) -> Result<()> {
        let Runner { backend, model, .. } = *self;
        // What the ranks share goes before their ends do.
        drop(model);
        backend.into_comm().finish()
    }
}
