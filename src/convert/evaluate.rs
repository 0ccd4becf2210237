//! What a conversion cost: perplexity before and after, divergence from the teacher, agreement of the likeliest token.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use rayon::prelude::*;
use serde::Serialize;

use super::calibration::Windows;
use super::forward::{ROWS, Stream, head, head_name, log_probabilities};
use super::linalg::{exp, largest, sum};
use crate::backend::Backend;
use crate::checkpoint::Checkpoint;
use crate::config::ModelConfig;
use crate::error::Result;

/// Figures over some windows, the first token of each given.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Figures {
    /// Windows measured.
    pub windows: usize,
    /// Tokens a window.
    pub length: usize,
    /// Perplexity of the original.
    pub perplexity_before: f64,
    /// Perplexity of the converted model.
    pub perplexity_after: f64,
    /// Mean over positions of KL(original ‖ converted), in nats.
    pub kl: f64,
    /// The part of positions at which both find the same token likeliest.
    pub top1: f64,
}

/// Compares the checkpoints `before` and `after` on `windows`, layer by layer.
pub fn compare<B: Backend>(
    backend: &mut B,
    before: &Path,
    after: &Path,
    windows: &Windows,
    bound: u64,
    scratch: &Path,
    stop: &AtomicBool,
) -> Result<Figures> {
    let (before, before_config) = (Checkpoint::open(before)?, ModelConfig::load(before)?);
    let (after, after_config) = (Checkpoint::open(after)?, ModelConfig::load(after)?);
    let all = || windows.windows.iter().map(Vec::as_slice).collect::<Vec<_>>();
    let teacher = Stream::start(&before, &before_config, all(), bound, scratch)?;
    for i in 0..before_config.layers {
        teacher.step(backend, i, stop, |_| ())?;
    }
    let student = Stream::start(&after, &after_config, all(), bound, scratch)?;
    for i in 0..after_config.layers {
        student.step(backend, i, stop, |_| ())?;
    }
    let head_before = head(&before, &before_config)?;
    // A conversion leaves the head as it was: it is held once.
    let raw = before.raw(head_name(&before_config)).map(|(dtype, _, bytes)| (dtype, bytes));
    let same = raw == after.raw(head_name(&after_config)).map(|(dtype, _, bytes)| (dtype, bytes));
    let other = match same {
        true => None,
        false => Some(head(&after, &after_config)?),
    };
    let head_after = other.as_ref().unwrap_or(&head_before);
    let norm_before = before.vector("model.norm.weight", before_config.hidden)?;
    let norm_after = after.vector("model.norm.weight", after_config.hidden)?;
    let sums = (0..windows.windows.len())
        .into_par_iter()
        .map(|i| {
            let (t, s) = (teacher.final_state(i, &norm_before)?, student.final_state(i, &norm_after)?);
            let mut sums = [0.0; 4];
            let rows = t.chunks(ROWS * head_before.cols).zip(s.chunks(ROWS * head_after.cols));
            for (first, (t, s)) in (0..).step_by(ROWS).zip(rows) {
                let (t, s) = (log_probabilities(t, &head_before), log_probabilities(s, head_after));
                let some = positions(&t, &s, &windows.windows[i][first..], head_before.rows());
                sums.iter_mut().zip(some).for_each(|(sum, x)| *sum += x);
            }
            Ok(sums)
        })
        .collect::<Result<Vec<[f64; 4]>>>()?;
    let total = sums.iter().fold([0.0; 4], |a, b| std::array::from_fn(|i| a[i] + b[i]));
    let positions = (sums.len() * windows.length) as f64;
    let predicted = (sums.len() * (windows.length - 1)) as f64;
    Ok(Figures {
        windows: sums.len(),
        length: windows.length,
        perplexity_before: (total[0] / predicted).exp(),
        perplexity_after: (total[1] / predicted).exp(),
        kl: total[2] / positions,
        top1: total[3] / positions,
    })
}

/// Losses before and after, divergence and agreements, summed over some positions; `tokens` are the first one's and those
/// after it.
fn positions(before: &[f32], after: &[f32], tokens: &[u32], vocab: usize) -> [f64; 4] {
    let mut sums = [0.0; 4];
    for (position, (t, s)) in before.chunks_exact(vocab).zip(after.chunks_exact(vocab)).enumerate() {
        if let Some(next) = tokens.get(position + 1) {
            sums[0] -= f64::from(t[*next as usize]);
            sums[1] -= f64::from(s[*next as usize]);
        }
        for (t, s) in t.chunks(256).zip(s.chunks(256)) {
            let mut part = [0f32; 256];
            part.iter_mut().zip(t.iter().zip(s)).for_each(|(p, (t, s))| *p = exp(*t) * (t - s));
            sums[2] += f64::from(sum(&part));
        }
        sums[3] += f64::from(likeliest(t) == likeliest(s));
    }
    sums
}

fn likeliest(row: &[f32]) -> Option<usize> {
    let most = largest(row);
    row.iter().position(|x| *x == most)
}
