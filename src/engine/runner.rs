//! One rank's part of a step, on whatever device: block tables, the model, and the collectives around the head.
//!
//! A step is launched and collected. Where the device allows it, the next step is launched before this one is
//! collected, its tokens named by this one's output rows; elsewhere a launch computes.

use std::collections::VecDeque;
use std::time::Duration;

use crate::backend::{Backend, Batch, FROM};
use crate::comm::Communicator;
use crate::engine::message::{Step, Tables, Want};
use crate::error::{Error, Result};
use crate::model::Model;

/// A rank that can compute steps.
pub trait Run: Send {
    /// Begins a step. Every rank calls it with the same step. A step whose logits are wanted, and every step of a rank
    /// that does not [overlap](Run::overlaps) them, is computed when it returns.
    fn launch(&mut self, step: &Step) -> Result<()>;
    /// What the oldest step that has not been collected gave, once it is computed; rank 0's to call.
    fn collect(&mut self) -> Result<Outputs>;
    /// Whether a step may be launched, and name the tokens of the one before it, when that one is not collected yet.
    fn overlaps(&self) -> bool;
    /// On a worker after a launch: returns when rank 0 has spoken again or there is nothing left to compute, and
    /// meanwhile finds out if the device fails.
    fn settle(&mut self) -> Result<()>;
    /// The control plane.
    fn comm(&mut self) -> &mut dyn Communicator;
    /// Time spent in all-reduces since the last call, where it can be told.
    fn reduce_time(&mut self) -> Option<Duration>;
    /// What the caches of all layers really take, in bytes.
    fn cache_bytes(&self) -> usize;
    /// For benchmarks: the device's memory bandwidth, measured now.
    fn bandwidth(&mut self) -> Result<f64> {
        Err(Error::Device("this rank has no memory to measure".into()))
    }
    /// For benchmarks: the device's own time of the step collected last, where it keeps one.
    fn step_time(&mut self) -> Result<Option<Duration>> {
        Ok(None)
    }
    /// The clean end: every rank comes here last.
    fn finish(self: Box<Self>) -> Result<()>;
}

/// What a step gave for its output rows.
#[derive(Debug, Clone, Default)]
pub struct Outputs {
    /// The token chosen for each, `[outputs]`. Empty when logits were wanted.
    pub tokens: Vec<u32>,
    /// All logits, `[outputs, vocab]`. Empty when tokens were wanted.
    pub logits: Vec<f32>,
}

/// A step that has been launched and not collected.
enum Launched {
    /// The device has, or will have, the tokens of this many output rows.
    Device(usize),
    /// It is computed.
    Host(Outputs),
}

/// A model on a backend.
pub struct Runner<B: Backend> {
    backend: B,
    model: Model<B>,
    tables: Tables,
    launched: VecDeque<Launched>,
    /// The step collected last has one launched behind it.
    behind: bool,
    /// The tokens of the last step, where the device does not keep them.
    last: Vec<u32>,
    local: Vec<f32>,
    best: Vec<(f32, u32)>,
    send: Vec<u8>,
    receive: Vec<u8>,
}

impl<B: Backend> Runner<B> {
    /// A runner of a loaded model.
    pub fn new(backend: B, model: Model<B>) -> Runner<B> {
        Runner {
            backend,
            model,
            tables: Tables::default(),
            launched: VecDeque::new(),
            behind: false,
            last: vec![],
            local: vec![],
            best: vec![],
            send: vec![],
            receive: vec![],
        }
    }

    /// Puts tokens in the place of the rows that name them.
    fn resolve(&self, batch: &mut Batch) -> Result<()> {
        for token in batch.tokens.iter_mut().filter(|t| **t & FROM != 0) {
            let row = (*token & !FROM) as usize;
            *token =
                *self.last.get(row).ok_or_else(|| Error::Internal(format!("the last step had no output {row}")))?;
        }
        Ok(())
    }

    /// Every rank's best of its vocabulary rows, compared everywhere; ties go to the lower token.
    fn gather_best(&mut self) -> Result<Vec<u32>> {
        self.model.best(&mut self.backend, &mut self.best)?;
        // A benchmark may hold one rank's shard of a world that is not there.
        let world = self.backend.comm().world();
        self.send.clear();
        for (score, token) in &self.best {
            self.send.extend(score.to_le_bytes());
            self.send.extend(token.to_le_bytes());
        }
        self.receive.resize(self.send.len() * world, 0);
        self.backend.comm().all_gather(&self.send, &mut self.receive)?;
        let word = |at: usize| {
            let r = &self.receive[at..at + 4];
            [r[0], r[1], r[2], r[3]]
        };
        let choose = |row: usize| {
            let mut best = (0.0, 0);
            for rank in 0..world {
                let at = rank * self.send.len() + row * 8;
                let (score, token) = (f32::from_le_bytes(word(at)), u32::from_le_bytes(word(at + 4)));
                if rank == 0 || score > best.0 {
                    best = (score, token);
                }
            }
            best.1
        };
        Ok((0..self.best.len()).map(choose).collect())
    }

    /// All ranks' logits side by side. Shards differ by one row at most, so they travel padded to the largest.
    fn gather_logits(&mut self, rows: usize) -> Result<Vec<f32>> {
        self.model.logits(&mut self.backend, &mut self.local)?;
        let shard = self.model.owned.shard;
        let vocab = self.model.config.vocab;
        if shard.world == 1 {
            return Ok(std::mem::take(&mut self.local));
        }
        let (mine, widest) = (self.model.owned.vocab.len(), vocab.div_ceil(shard.world));
        self.send.clear();
        for row in self.local.chunks_exact(mine) {
            row.iter().for_each(|l| self.send.extend(l.to_le_bytes()));
            self.send.extend(std::iter::repeat_n(0, 4 * (widest - mine)));
        }
        self.receive.resize(self.send.len() * shard.world, 0);
        self.backend.comm().all_gather(&self.send, &mut self.receive)?;
        let mut logits = vec![0.0; rows * vocab];
        for rank in 0..shard.world {
            let theirs = crate::model::shard::Shard { rank, ..shard }.range(vocab);
            for row in 0..rows {
                let at = rank * self.send.len() + row * widest * 4;
                let out = &mut logits[row * vocab..][theirs.clone()];
                for (o, b) in out.iter_mut().zip(self.receive[at..].chunks_exact(4)) {
                    *o = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                }
            }
        }
        Ok(logits)
    }
}

impl<B: Backend + 'static> Run for Runner<B> {
    fn launch(&mut self, step: &Step) -> Result<()> {
        let mut batch = self.tables.batch(step)?;
        let device = self.backend.overlaps();
        if !device {
            self.resolve(&mut batch)?;
        }
        self.model.forward(&mut self.backend, &batch, step.want == Want::Tokens)?;
        let count = batch.outputs.len();
        let mut outputs = Outputs::default();
        match step.want {
            Want::Tokens if device => {
                self.launched.push_back(Launched::Device(count));
                return Ok(());
            }
            Want::Tokens if count > 0 => outputs.tokens = self.gather_best()?,
            Want::Logits if count > 0 => outputs.logits = self.gather_logits(count)?,
            _ => {}
        }
        self.last.clone_from(&outputs.tokens);
        self.launched.push_back(Launched::Host(outputs));
        Ok(())
    }

    fn collect(&mut self) -> Result<Outputs> {
        let launched = self.launched.pop_front();
        self.behind = !self.launched.is_empty();
        match launched {
            Some(Launched::Host(outputs)) => Ok(outputs),
            Some(Launched::Device(count)) => {
                let mut outputs = Outputs::default();
                self.backend.read_tokens(self.behind, count, &mut outputs.tokens)?;
                Ok(outputs)
            }
            None => Err(Error::Internal("a step is collected that was not launched".into())),
        }
    }

    fn overlaps(&self) -> bool {
        self.backend.overlaps()
    }

    fn settle(&mut self) -> Result<()> {
        // Only rank 0 collects.
        self.launched.clear();
        self.backend.watch()
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

    fn step_time(&mut self) -> Result<Option<Duration>> {
        self.backend.step_time(self.behind)
    }

    fn finish(mut self: Box<Self>) -> Result<()> {
        // A step may be under way that nobody wants any more.
        self.backend.synchronize()?;
        let Runner { backend, model, .. } = *self;
        // What the ranks share goes before their ends do.
        drop(model);
        backend.into_comm().finish()
    }
}
