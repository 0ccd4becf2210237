//! From logits to a token: penalties, truncation, and the choice that [`Draw`] describes among what is left. A draw
//! depends on the request's seed and the token's index alone, so a request gives the same tokens whatever else runs
//! beside it, and whether a rank's device chooses or rank 0 does.

use crate::backend::draw::{Draw, bits};
use crate::engine::request::{Logprob, Sampling};

/// The `index`-th uniform number in [0, 1) of `seed`.
pub fn uniform(seed: u64, index: u64) -> f64 {
    (bits(seed, index) >> 11) as f64 / (1u64 << 53) as f64
}

/// Draws the next token. `logits` `[vocab]` is overwritten; `prompt` and `text` are the tokens so far; tokens in
/// `banned` are never drawn.
pub fn sample(s: &Sampling, seed: u64, logits: &mut [f32], prompt: &[u32], text: &[u32], banned: &[u32]) -> u32 {
    penalise(s, logits, prompt, text);
    for id in banned {
        logits[*id as usize] = f32::NEG_INFINITY;
    }
    let draw = Draw::new(seed, text.len() as u64, s.temperature);
    if s.temperature == 0.0 || !s.truncates() {
        return draw.best(0, logits).1;
    }
    let score = |id: &u32| draw.score(*id, logits[*id as usize]);
    // The most probable first: a tie goes to it.
    kept(s, logits).into_iter().rev().max_by(|a, b| score(a).total_cmp(&score(b))).unwrap_or(0)
}

/// Logit bias and the three penalties.
fn penalise(s: &Sampling, logits: &mut [f32], prompt: &[u32], text: &[u32]) {
    for (id, bias) in &s.logit_bias {
        logits[*id as usize] += bias;
    }
    if s.repetition_penalty != 1.0 {
        let mut seen: Vec<u32> = prompt.iter().chain(text).copied().collect();
        seen.sort_unstable();
        seen.dedup();
        for id in seen {
            let l = &mut logits[id as usize];
            *l = if *l > 0.0 { *l / s.repetition_penalty } else { *l * s.repetition_penalty };
        }
    }
    if s.presence_penalty != 0.0 || s.frequency_penalty != 0.0 {
        let mut sorted = text.to_vec();
        sorted.sort_unstable();
        for run in sorted.chunk_by(|a, b| a == b) {
            logits[run[0] as usize] -= s.presence_penalty + s.frequency_penalty * run.len() as f32;
        }
    }
}

/// The candidates that top-k, min-p and top-p leave, most probable first.
fn kept(s: &Sampling, logits: &[f32]) -> Vec<u32> {
    let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weight = |l: f32| f64::from((l - top) / s.temperature).exp();
    // Nothing below min_p of the best survives, and without it nothing that rounds to zero beside the best.
    let floor = (f64::from(s.min_p)).max(1e-30);
    let mut candidates: Vec<(u32, f64)> =
        logits.iter().enumerate().map(|(i, l)| (i as u32, weight(*l))).filter(|c| c.1 >= floor).collect();
    let order = |a: &(u32, f64), b: &(u32, f64)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    if s.top_k > 0 && s.top_k < candidates.len() {
        candidates.select_nth_unstable_by(s.top_k - 1, order);
        candidates.truncate(s.top_k);
    }
    candidates.sort_unstable_by(order);
    if s.top_p < 1.0 {
        let total: f64 = candidates.iter().map(|c| c.1).sum();
        let mut sum = 0.0;
        let enough = candidates.iter().position(|c| {
            sum += c.1;
            sum >= f64::from(s.top_p) * total
        });
        candidates.truncate(enough.map_or(candidates.len(), |i| i + 1));
    }
    candidates.into_iter().map(|c| c.0).collect()
}

/// The log-probability of `id` under `logits`, with the `top` best. `[vocab]`
pub fn logprob(logits: &[f32], id: u32, top: usize) -> Logprob {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|l| f64::from(l - largest).exp()).sum();
    let norm = f64::from(largest) + sum.ln();
    let of = |i: u32| (f64::from(logits[i as usize]) - norm) as f32;
    let mine = logits[id as usize];
    let rank = logits.iter().enumerate().filter(|(i, l)| **l > mine || (**l == mine && (*i as u32) < id)).count();
    let mut best: Vec<u32> = (0..logits.len() as u32).collect();
    let order = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    let top = top.min(best.len());
    if top > 0 && top < best.len() {
        best.select_nth_unstable_by(top - 1, order);
    }
    best.truncate(top);
    best.sort_unstable_by(order);
    Logprob { id, logprob: of(id), rank, top: best.into_iter().map(|i| (i, of(i))).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draw(s: &Sampling, logits: &[f32], seed: u64) -> u32 {
        sample(s, seed, &mut logits.to_vec(), &[], &[], &[])
    }

    #[test]
    fn draws_follow_the_softmax() {
        let s = Sampling { temperature: 0.5, ..Sampling::default() };
        let logits = [1.0f32, 0.0, 0.5, -1.0];
        let weights: Vec<f64> = logits.iter().map(|l| f64::from(l / 0.5).exp()).collect();
        let total: f64 = weights.iter().sum();
        let mut counts = [0usize; 4];
        for seed in 0..40_000 {
            counts[draw(&s, &logits, seed) as usize] += 1;
        }
        for i in 0..4 {
            let (p, seen) = (weights[i] / total, counts[i] as f64 / 40_000.0);
            assert!((seen - p).abs() < 4.5 * (p * (1.0 - p) / 40_000.0).sqrt(), "token {i}: {seen} of {p}");
        }
    }

    #[test]
    fn truncations_keep_only_the_best() {
        let logits = [0.0f32, 3.0, 2.0, 1.0];
        let t = Sampling { temperature: 1.0, ..Sampling::default() };
        for seed in 0..500 {
            assert!([1, 2].contains(&draw(&Sampling { top_k: 2, ..t.clone() }, &logits, seed)));
            assert_eq!(draw(&Sampling { top_p: 0.1, ..t.clone() }, &logits, seed), 1);
            assert!([1, 2].contains(&draw(&Sampling { min_p: 0.3, ..t.clone() }, &logits, seed)));
        }
    }

    #[test]
    fn penalties_and_bias_move_the_choice() {
        let logits = [1.0f32, 0.9, -5.0];
        let g = Sampling::default();
        let pick = |s: &Sampling, prompt: &[u32], text: &[u32], banned: &[u32]| {
            sample(s, 0, &mut logits.to_vec(), prompt, text, banned)
        };
        assert_eq!(pick(&g, &[], &[], &[]), 0);
        assert_eq!(pick(&Sampling { repetition_penalty: 2.0, ..g.clone() }, &[0], &[], &[]), 1);
        assert_eq!(pick(&Sampling { presence_penalty: 0.2, ..g.clone() }, &[0], &[], &[]), 0);
        assert_eq!(pick(&Sampling { presence_penalty: 0.2, ..g.clone() }, &[], &[0], &[]), 1);
        assert_eq!(pick(&Sampling { frequency_penalty: 0.06, ..g.clone() }, &[], &[0, 0], &[]), 1);
        assert_eq!(pick(&Sampling { logit_bias: vec![(2, 50.0)], ..g.clone() }, &[], &[], &[]), 2);
        assert_eq!(pick(&g, &[], &[], &[0]), 1);
    }

    #[test]
    fn logprobs_are_normalised_and_ranked() {
        let logits = [1.0f32, 3.0, 2.0];
        let all: f32 = (0..3).map(|i| logprob(&logits, i, 0).logprob.exp()).sum();
        assert!((all - 1.0).abs() < 1e-6);
        let l = logprob(&logits, 0, 2);
        assert_eq!((l.rank, l.top.iter().map(|t| t.0).collect::<Vec<_>>()), (2, vec![1, 2]));
    }
}
