//! Rotation, append and attention, on both layouts, over caches whose unused slots are NaN.

use gqla::backend::cuda::CudaBackend;
use gqla::backend::{AttentionShape, Backend, Batch, Normed, Span, View};
use gqla::cache::{BLOCK, Layout};
use gqla::config::{Rope, RopeScaling};

use crate::support::*;

/// (heads, groups, first head in group, heads a group, nope, rope, value, latent)
type Dims = (usize, usize, usize, usize, usize, usize, usize, usize);

fn shape((heads, groups, first, per_group, nope, rope, value, latent): Dims) -> AttentionShape {
    let scale = ((nope + rope) as f32).powf(-0.5);
    AttentionShape {
        heads,
        groups,
        first_head_in_group: first,
        heads_per_group: per_group,
        nope,
        rope,
        value,
        latent,
        scale,
        expand: false,
    }
}

/// The steps that bring every sequence to its context: whole chunks before, then the step itself.
fn steps(last: &Batch) -> Vec<Batch> {
    let mut steps = vec![];
    for span in &last.spans {
        let before = span.context - span.rows;
        for from in (0..before).step_by(300) {
            let rows = (before - from).min(300);
            let context = from + rows;
            let span = Span { first: 0, rows, context, blocks: span.blocks.clone() };
            let positions = (from..context).map(|p| p as u32).collect();
            steps.push(Batch { tokens: vec![0; rows], positions, spans: vec![span], ..Batch::default() });
        }
    }
    steps.push(last.clone());
    steps
}

/// Batches to try: decode of 1 to 4 rows, of many sequences, prefill, and decode and prefill together.
fn batches(random: &mut Random) -> Vec<Batch> {
    let many: Vec<_> = [(1, 700)].into_iter().chain((0..23).map(|i| (1, 1 + 6 * i))).collect();
    if small() {
        let few = [&[(1, 1), (1, 129)][..], &[(2, 65)], &[(3, 66)], &[(4, 70)], &[(20, 84), (1, 5)], &many];
        return few.map(|spans| random.batch(spans)).into();
    }
    // On 132 multiprocessors two groups' 66 teams take these whole.
    let alike: Vec<_> = (0..64).map(|i| (1, 65 + 2 * (i % 32))).collect();
    let rows = 1 + random.below(4);
    let ragged: Vec<_> = (0..9).map(|_| (rows, rows + random.below(200))).collect();
    [
        &ragged,
        &[(1, 1), (1, 64), (1, 65), (1, 700), (1, 129)][..],
        &[(2, 2), (2, 65), (2, 400)],
        &[(4, 4), (4, 66), (4, 128), (4, 500)],
        &[(3, 191)],
        &[(37, 37), (130, 130), (65, 193)],
        &[(1, 300), (1, 5), (20, 84), (2, 70), (100, 100), (1, 1)],
        &many,
        &alike,
    ]
    .map(|spans| random.batch(spans))
    .into()
}

const ROPE: Rope = Rope { theta: 10000.0, interleave: true, scaling: RopeScaling::Default };

/// Width of a query latent.
const RANK: usize = 48;

fn frequencies(turned: usize) -> Vec<f64> {
    (0..turned / 2).map(|i| 10000f64.powf(-((2 * i) as f64) / turned as f64)).collect()
}

fn poisoned(gpu: &CudaBackend, layout: Layout, blocks: usize) -> gqla::backend::cuda::Cache {
    let mut cache = gpu.cache(layout, blocks).unwrap();
    gpu.poison(&mut cache, 0xff).unwrap();
    cache
}

fn blocks(batch: &Batch) -> usize {
    1 + batch.spans.iter().flat_map(|s| &s.blocks).max().map_or(0, |&b| b as usize)
}

#[test]
fn grouped_attention() {
    let Some(mut p) = pair() else { return };
    let dims = vec![
        ((16, 8, 0, 2, 32, 16, 32, 128), true),    // tiny-glm-gqla
        ((24, 4, 0, 6, 40, 24, 56, 96), true),     // odd heads
        ((6, 1, 0, 6, 40, 24, 56, 96), false),     // turning halves
        ((16, 8, 0, 2, 32, 0, 32, 0), false),      // tiny Llama
        ((8, 2, 0, 4, 128, 0, 128, 0), false),     // LLaMA-3
        ((32, 2, 0, 16, 128, 64, 128, 512), true), // canonical
        ((64, 4, 0, 16, 128, 64, 128, 512), false),
        ((10, 2, 0, 5, 192, 64, 256, 512), true), // GLM-4.7-Flash
        ((4, 4, 0, 1, 128, 64, 128, 512), true),  // MLA
    ];
    for (dims, interleave) in cases(dims, &[1, 3, 5, 7]) {
        let s = shape(dims);
        let rope = Rope { interleave, ..ROPE };
        let turned = if s.rope > 0 { s.rope } else { s.nope };
        let tg = p.gpu.rope_table(&rope, &frequencies(turned), 1.25, 800).unwrap();
        let tc = p.cpu.rope_table(&rope, &frequencies(turned), 1.25, 800).unwrap();
        let layout = Layout::Grouped { groups: s.groups, nope: s.nope, rope: s.rope, value: s.value };
        for batch in batches(&mut p.random) {
            let mut cg = poisoned(&p.gpu, layout, blocks(&batch));
            let mut joint = poisoned(&p.gpu, layout, blocks(&batch));
            let mut cc = p.cpu.cache(layout, blocks(&batch)).unwrap();
            let all = steps(&batch);
            for (i, step) in all.iter().enumerate() {
                p.begin(step);
                let n = step.rows();
                let (qw, kvw) = (s.heads * (s.nope + s.rope), s.groups * (s.nope + s.value));
                let wide = qw + 8 + kvw + s.rope;
                let x = p.random.floats(n * wide);
                let (xg, xc) = p.tensors(&x, wide);
                let (mut qg, mut qc) = p.outputs(n, qw);
                let (q, kv, k_rope) = projections(&xg, &s);
                p.gpu.rope_append_grouped(&s, &tg, q, kv, k_rope, &mut qg, &mut cg).unwrap();
                let (q, kv, k_rope) = projections(&xc, &s);
                p.cpu.rope_append_grouped(&s, &tc, q, kv, k_rope, &mut qc, &mut cc).unwrap();
                if i + 1 < all.len() {
                    let (q, kv, k_rope) = projections(&xg, &s);
                    p.gpu.rope_append_grouped(&s, &tg, q, kv, k_rope, &mut qg, &mut joint).unwrap();
                    continue;
                }
                let spans: Vec<_> = batch.spans.iter().map(|s| (s.rows, s.context)).collect();
                p.same(&format!("rotated queries {dims:?}"), (&qg, &qc), n, 5e-3);
                let (mut og, mut oc) = p.outputs(n, s.heads * s.value);
                p.gpu.attend_grouped(&s, &qg, &cg, &mut og).unwrap();
                p.cpu.attend_grouped(&s, &qc, &cc, &mut oc).unwrap();
                p.same(&format!("attention {dims:?} over {spans:?}"), (&og, &oc), n, 1e-2);
                let (mut turned, _) = p.outputs(n, qw);
                p.gpu.poison_tensor(&mut og, 0xff).unwrap();
                let (q, kv, k_rope) = projections(&xg, &s);
                p.gpu.append_attend_grouped(&s, &tg, q, kv, k_rope, &mut turned, &mut joint, &mut og).unwrap();
                p.same(&format!("append and attention {dims:?} over {spans:?}"), (&og, &oc), n, 1e-2);
                let same = p.gpu.cache_bits(&joint).unwrap() == p.gpu.cache_bits(&cg).unwrap();
                assert!(same, "caches of {dims:?} over {spans:?} differ");
            }
        }
    }
}

/// Queries, keys with values, and the rope key if there is one, side by side.
fn projections<'a, T>(x: &'a T, s: &AttentionShape) -> (View<'a, T>, View<'a, T>, Option<View<'a, T>>) {
    let (q, kv) = (s.heads * (s.nope + s.rope), s.groups * (s.nope + s.value));
    let k_rope = (s.rope > 0).then(|| View::new(x, q + 8 + kv, s.rope));
    (View::new(x, 0, q), View::new(x, q + 8, kv), k_rope)
}

#[test]
fn a_padded_step_appends_what_is_its_own() {
    let Some(mut p) = pair() else { return };
    for (dims, interleave, rows) in
        [((8, 2, 0, 4, 128, 0, 128, 0), false, 1), ((10, 2, 0, 5, 192, 64, 256, 512), true, 2)]
    {
        let s = shape(dims);
        let turned = if s.rope > 0 { s.rope } else { s.nope };
        let rope = Rope { interleave, ..ROPE };
        let table = p.gpu.rope_table(&rope, &frequencies(turned), 1.0, 800).unwrap();
        let layout = Layout::Grouped { groups: s.groups, nope: s.nope, rope: s.rope, value: s.value };
        let batch = p.random.batch(&[(rows, 200), (rows, 64 + 1), (rows, rows)]);
        let mut caches = [(); 2].map(|()| poisoned(&p.gpu, layout, blocks(&batch)));
        let wide = s.heads * (s.nope + s.rope) + 8 + s.groups * (s.nope + s.value) + s.rope;
        for step in steps(&batch) {
            let x = p.random.floats(step.rows() * wide);
            let (x, _) = p.tensors(&x, wide);
            let (mut turned, _) = p.outputs(step.rows(), s.heads * (s.nope + s.rope));
            let [apart, joint] = &mut caches;
            let (mut expected, _) = p.outputs(step.rows(), s.heads * s.value);
            let (mut out, _) = p.outputs(step.rows(), s.heads * s.value);
            p.gpu.begin(&step).unwrap();
            let (q, kv, k_rope) = projections(&x, &s);
            p.gpu.rope_append_grouped(&s, &table, q, kv, k_rope, &mut turned, apart).unwrap();
            p.gpu.attend_grouped(&s, &turned, apart, &mut expected).unwrap();
            // Three sequences are computed as four, the second time from a graph.
            for _ in 0..2 {
                p.gpu.poison_tensor(&mut out, 0xff).unwrap();
                let joint = p.gpu.step(9, &step, |b| {
                    let (q, kv, k_rope) = projections(&x, &s);
                    b.append_attend_grouped(&s, &table, q, kv, k_rope, &mut turned, joint, &mut out)
                });
                joint.unwrap();
                let outs = [&out, &expected].map(|x| p.gpu.read(x, step.rows()).unwrap());
                close("a padded step", &outs[0], &outs[1], 5e-3);
            }
        }
        let bits = caches.map(|c| p.gpu.cache_bits(&c).unwrap());
        assert!(bits[0] == bits[1], "caches of {dims:?} differ");
    }
}

#[test]
fn latent_attention_and_the_absorbing_products() {
    let Some(mut p) = pair() else { return };
    let dims = vec![
        ((16, 8, 0, 2, 32, 16, 32, 128), true),
        ((24, 4, 0, 6, 40, 24, 56, 96), true),
        ((3, 2, 5, 6, 40, 24, 56, 96), true), // a rank that has parts of two groups
        ((12, 3, 0, 4, 128, 64, 128, 512), true),
        ((10, 2, 0, 5, 192, 64, 256, 512), false),
        ((48, 3, 0, 16, 128, 64, 128, 512), true),
        ((6, 1, 0, 6, 40, 24, 56, 96), false),
        ((4, 2, 3, 4, 128, 64, 128, 512), true),
        ((32, 2, 0, 16, 128, 64, 128, 512), false),
    ];
    for (dims, interleave) in cases(dims, &[2, 3, 4]) {
        let s = shape(dims);
        let rope = Rope { interleave, ..ROPE };
        let tg = p.gpu.rope_table(&rope, &frequencies(s.rope), 1.0, 800).unwrap();
        let tc = p.cpu.rope_table(&rope, &frequencies(s.rope), 1.0, 800).unwrap();
        let layout = Layout::Latent { latent: s.latent, rope: s.rope };
        let up: Vec<f32> = p.random.floats(s.groups * (s.nope + s.value) * s.latent);
        let up: Vec<f32> = up.iter().map(|x| x / 16.0).collect();
        let (ug, uc) = p.matrices(&up, s.latent);
        let (normed, weight, q_weight) = (s.groups != 3, p.random.floats(s.latent), p.random.floats(RANK));
        let (wg, wc) = (p.gpu.vector(&weight).unwrap(), p.cpu.vector(&weight).unwrap());
        let (qwg, qwc) = (p.gpu.vector(&q_weight).unwrap(), p.cpu.vector(&q_weight).unwrap());
        for batch in batches(&mut p.random) {
            let mut cg = poisoned(&p.gpu, layout, blocks(&batch));
            let mut cc = p.cpu.cache(layout, blocks(&batch)).unwrap();
            let all = steps(&batch);
            for (i, step) in all.iter().enumerate() {
                p.begin(step);
                let n = step.rows();
                let qw = s.heads * (s.nope + s.rope);
                let wide = RANK + qw + s.latent + s.rope;
                let x = p.random.floats(n * wide);
                let (xg, xc) = p.tensors(&x, wide);
                let ((mut qg, mut qc), at) = (p.outputs(n, RANK), RANK + qw);
                let (latent, key) = (View::new(&xg, at, s.latent), View::new(&xg, at + s.latent, s.rope));
                let (weight, q) = if normed {
                    (Some(&wg), Some(Normed { x: View::new(&xg, 0, RANK), weight: &qwg, out: &mut qg }))
                } else {
                    (None, None)
                };
                p.gpu.append_latent(&s, &tg, (latent, weight), key, q, 1e-6, &mut cg).unwrap();
                let (latent, key) = (View::new(&xc, at, s.latent), View::new(&xc, at + s.latent, s.rope));
                let (weight, q) = if normed {
                    (Some(&wc), Some(Normed { x: View::new(&xc, 0, RANK), weight: &qwc, out: &mut qc }))
                } else {
                    (None, None)
                };
                p.cpu.append_latent(&s, &tc, (latent, weight), key, q, 1e-6, &mut cc).unwrap();
                if i + 1 < all.len() {
                    continue;
                }
                if normed {
                    p.same("norm of a query latent", (&qg, &qc), n, 5e-3);
                }
                let spans: Vec<_> = batch.spans.iter().map(|s| (s.rows, s.context)).collect();
                let (mut ag, mut ac) = p.outputs(n, s.heads * (s.latent + s.rope));
                p.gpu.absorb_query(&s, &tg, &ug, View::new(&xg, RANK, qw), &mut ag).unwrap();
                p.cpu.absorb_query(&s, &tc, &uc, View::new(&xc, RANK, qw), &mut ac).unwrap();
                p.same(&format!("absorbed queries {dims:?}"), (&ag, &ac), n, 8e-3);
                let (mut lg, mut lc) = p.outputs(n, s.heads * s.latent);
                p.gpu.attend_latent(&s, &ag, &cg, &mut lg).unwrap();
                p.cpu.attend_latent(&s, &ac, &cc, &mut lc).unwrap();
                p.same(&format!("attention {dims:?} over {spans:?}"), (&lg, &lc), n, 1.5e-2);
                let (mut og, mut oc) = p.outputs(n, s.heads * s.value);
                p.gpu.absorb_output(&s, &ug, &lg, &mut og).unwrap();
                p.cpu.absorb_output(&s, &uc, &lc, &mut oc).unwrap();
                p.same(&format!("output {dims:?} over {spans:?}"), (&og, &oc), n, 1.5e-2);
                p.gpu.poison_tensor(&mut lg, 0xff).unwrap();
                p.gpu.poison_tensor(&mut og, 0xff).unwrap();
                p.gpu.attend_absorbed(&s, &ug, &ag, &cg, &mut lg, &mut og).unwrap();
                p.same(&format!("attention and output {dims:?} over {spans:?}"), (&og, &oc), n, 1.5e-2);
            }
        }
    }
    assert_eq!(BLOCK, 64);
}

#[test]
fn expanded_attention() {
    let Some(mut p) = pair() else { return };
    let dims = vec![
        ((16, 8, 0, 2, 32, 16, 32, 128), true),
        ((24, 4, 0, 6, 40, 24, 56, 96), true),
        ((3, 2, 5, 6, 40, 24, 56, 96), false), // a rank that has parts of two groups
        ((9, 3, 3, 4, 40, 24, 56, 96), true),  // and of one, and two whole ones
        ((32, 2, 0, 16, 128, 64, 128, 512), true), // canonical
        ((10, 2, 0, 5, 192, 64, 256, 512), false), // GLM-4.7-Flash
        ((72, 72, 0, 1, 128, 64, 128, 512), true), // MLA: more groups than the workspace takes at once
    ];
    for (dims, interleave) in cases(dims, &[2, 3, 4]) {
        let s = AttentionShape { expand: true, ..shape(dims) };
        let rope = Rope { interleave, ..ROPE };
        let tg = p.gpu.rope_table(&rope, &frequencies(s.rope), 1.25, 4096).unwrap();
        let tc = p.cpu.rope_table(&rope, &frequencies(s.rope), 1.25, 4096).unwrap();
        let layout = Layout::Latent { latent: s.latent, rope: s.rope };
        let up: Vec<f32> = p.random.floats(s.groups * (s.nope + s.value) * s.latent);
        let up: Vec<f32> = up.iter().map(|x| x / 16.0).collect();
        let (ug, uc) = p.matrices(&up, s.latent);
        let mut all = vec![
            p.random.batch(&[(37, 37), (130, 130), (65, 193)]),
            p.random.batch(&[(1, 300), (20, 84), (1, 5), (100, 100), (1, 1)]),
        ];
        if !small() {
            // Several pieces of a product, several lots, and for MLA some groups at a time.
            all.push(p.random.batch(&[(300, 4090), (1, 20), (5, 700), (250, 2300), (100, 1000)]));
        }
        for batch in all {
            let mut cg = poisoned(&p.gpu, layout, blocks(&batch));
            let mut cc = p.cpu.cache(layout, blocks(&batch)).unwrap();
            let qw = s.heads * (s.nope + s.rope);
            let (all, mut last) = (steps(&batch), None);
            for (i, step) in all.iter().enumerate() {
                p.begin(step);
                // Queries are of the last step alone.
                let skip = if i + 1 < all.len() { 0 } else { qw + 8 };
                let wide = skip + s.latent + s.rope;
                let x = p.random.floats(step.rows() * wide);
                let (xg, xc) = p.tensors(&x, wide);
                let (latent, key) = (View::new(&xg, skip, s.latent), View::new(&xg, skip + s.latent, s.rope));
                p.gpu.append_latent(&s, &tg, (latent, None), key, None, 1e-6, &mut cg).unwrap();
                let (latent, key) = (View::new(&xc, skip, s.latent), View::new(&xc, skip + s.latent, s.rope));
                p.cpu.append_latent(&s, &tc, (latent, None), key, None, 1e-6, &mut cc).unwrap();
                last = Some((xg, xc));
            }
            let (xg, xc) = last.unwrap();
            let (qg, qc, n) = (View::new(&xg, 0, qw), View::new(&xc, 0, qw), batch.rows());
            let (mut ag, mut ac) = p.outputs(n, s.heads * (s.latent + s.rope));
            let (mut lg, mut lc) = p.outputs(n, s.heads * s.latent);
            let (mut og, mut oc) = p.outputs(n, s.heads * s.value);
            p.gpu.absorb_query(&s, &tg, &ug, qg, &mut ag).unwrap();
            p.gpu.attend_absorbed(&s, &ug, &ag, &cg, &mut lg, &mut og).unwrap();
            p.gpu.attend_expanded(&s, &tg, &ug, qg, &cg, &mut og).unwrap();
            p.cpu.absorb_query(&s, &tc, &uc, qc, &mut ac).unwrap();
            p.cpu.attend_absorbed(&s, &uc, &ac, &cc, &mut lc, &mut oc).unwrap();
            p.cpu.attend_expanded(&s, &tc, &uc, qc, &cc, &mut oc).unwrap();
            let spans: Vec<_> = batch.spans.iter().map(|s| (s.rows, s.context)).collect();
            p.same(&format!("attention {dims:?} over {spans:?}"), (&og, &oc), n, 1.5e-2);
        }
    }
}
