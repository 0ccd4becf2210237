//! The model forward, one layer's weights at a time, over windows of tokens.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use rayon::prelude::*;

use super::attention::{norm, tensor};
use super::hidden::Hidden;
use super::linalg::{Rows, exp, largest, product, sum};
use crate::backend::{Backend, Batch, Span};
use crate::cache::BLOCK;
use crate::checkpoint::Checkpoint;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::model::shard::{Path as DecodePath, Shard};

/// Positions whose logits a thread holds at once.
pub const ROWS: usize = 64;

/// Tokens a step.
pub const STEP: usize = 2048;

/// Residual streams of some windows of equal length, on their way through a model.
pub struct Stream<'a> {
    /// The model's weights.
    pub checkpoint: &'a Checkpoint,
    /// Its configuration.
    pub config: &'a ModelConfig,
    /// The tokens.
    pub windows: Vec<&'a [u32]>,
    /// Where each window stands: the input of the next layer.
    pub hidden: Hidden,
}

impl<'a> Stream<'a> {
    /// The embeddings of `windows`. The states are kept in `directory` when they take more than `bound` bytes.
    pub fn start(
        checkpoint: &'a Checkpoint,
        config: &'a ModelConfig,
        windows: Vec<&'a [u32]>,
        bound: u64,
        directory: &Path,
    ) -> Result<Stream<'a>> {
        let length = windows.first().map_or(0, |w| w.len());
        let hidden = Hidden::new(windows.len(), length * config.hidden, bound, directory)?;
        for (i, tokens) in windows.iter().enumerate() {
            hidden.write(i, &embeddings(checkpoint, config, tokens)?)?;
        }
        Ok(Stream { checkpoint, config, windows, hidden })
    }

    /// Tokens a window.
    pub fn length(&self) -> usize {
        self.windows.first().map_or(0, |w| w.len())
    }

    /// Takes every window through layer `i`.
    pub fn step<B: Backend>(
        &self,
        backend: &mut B,
        i: usize,
        stop: &AtomicBool,
        mut done: impl FnMut(usize),
    ) -> Result<()> {
        let (length, count) = (self.length(), self.windows.len());
        let together = (STEP / length.max(1)).clamp(1, count.max(1));
        let blocks = length.div_ceil(BLOCK);
        let owned = Shard::ONE.owned(self.config, DecodePath::Gqa)?;
        let mut model = Model::load_layer(
            backend,
            self.checkpoint,
            self.config,
            &owned,
            i,
            together * blocks,
            together * length,
            length,
        )?;
        for first in (0..count).step_by(together) {
            if stop.load(Ordering::Relaxed) {
                return Err(Error::Interrupted);
            }
            let some = first..(first + together).min(count);
            let mut batch = Batch::default();
            let mut residual = Vec::with_capacity(some.len() * length * self.config.hidden);
            for (at, sample) in some.clone().enumerate() {
                batch.spans.push(Span {
                    first: batch.tokens.len(),
                    rows: length,
                    context: length,
                    blocks: (at * blocks..(at + 1) * blocks).map(|b| b as u32).collect(),
                });
                batch.tokens.extend(self.windows[sample]);
                batch.positions.extend(0..length as u32);
                residual.extend(self.hidden.read(sample)?);
            }
            let rows = batch.rows();
            model.enter(backend, &batch, &residual)?;
            model.layer(backend, 0)?;
            let after = model.residual(backend, rows)?;
            for (sample, rows) in some.clone().zip(after.chunks_exact(length * self.config.hidden)) {
                self.hidden.write(sample, rows)?;
            }
            done(some.len());
        }
        Ok(())
    }

    /// The states after the last norm, of window `i`, once every layer has been stepped through.
    pub fn final_state(&self, i: usize, weight: &[f32]) -> Result<Vec<f32>> {
        let mut h = self.hidden.read(i)?;
        norm(&mut h, weight, self.config.norm_eps);
        Ok(h)
    }

    /// For each window the loss of each position's next token; 0 at the last position.
    pub fn losses(&self) -> Result<Vec<Vec<f32>>> {
        let head = head(self.checkpoint, self.config)?;
        let weight = self.checkpoint.vector("model.norm.weight", self.config.hidden)?;
        (0..self.windows.len())
            .into_par_iter()
            .map(|i| {
                let mut losses = Vec::with_capacity(self.length());
                let mut next = self.windows[i].iter().skip(1);
                for rows in self.final_state(i, &weight)?.chunks(ROWS * head.cols) {
                    let logits = log_probabilities(rows, &head);
                    // The last position has no next token.
                    let loss = |row: &[f32]| next.next().map_or(0.0, |t| -row[*t as usize]);
                    losses.extend(logits.chunks_exact(head.rows()).map(loss));
                }
                Ok(losses)
            })
            .collect()
    }
}

/// Rows of the embedding, `[tokens, hidden]`.
pub fn embeddings(checkpoint: &Checkpoint, config: &ModelConfig, tokens: &[u32]) -> Result<Vec<f32>> {
    let (vocab, hidden) = (config.vocab, config.hidden);
    let table = checkpoint.slice("model.embed_tokens.weight", &[vocab, hidden], 0..vocab, 0..hidden)?;
    let mut rows = vec![0.0; tokens.len() * hidden];
    for (row, token) in rows.chunks_exact_mut(hidden).zip(tokens) {
        table.read_f32(*token as usize, row);
    }
    Ok(rows)
}

/// The tensor that is the head.
pub fn head_name(config: &ModelConfig) -> &'static str {
    if config.tie_embeddings { "model.embed_tokens.weight" } else { "lm_head.weight" }
}

/// The head, or the embedding where they are one. `[vocab, hidden]`
pub fn head(checkpoint: &Checkpoint, config: &ModelConfig) -> Result<Rows> {
    tensor(checkpoint, head_name(config), config.vocab, config.hidden)
}

/// Logarithms of the probabilities of every next token, `[rows, vocab]`.
pub fn log_probabilities(h: &[f32], head: &Rows) -> Vec<f32> {
    let mut logits = product(h, head.cols, head);
    for row in logits.chunks_exact_mut(head.rows()) {
        let most = largest(row);
        let mut total = 0f64;
        for chunk in row.chunks(256) {
            let mut part = [0f32; 256];
            part.iter_mut().zip(chunk).for_each(|(p, l)| *p = exp(l - most));
            total += f64::from(sum(&part));
        }
        let shift = most + total.ln() as f32;
        row.iter_mut().for_each(|l| *l -= shift);
    }
    logits
}
