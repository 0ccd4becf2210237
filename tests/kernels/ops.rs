//! Operations that look at one row, products, routing, the head.

use gqla::backend::cpu::HostRows;
use gqla::backend::{Backend, Draw, Linear, Normed, Reduction, View};
use gqla::checkpoint::Checkpoint;
use gqla::config::{Moe, Scoring};

use crate::support::*;

/// bf16 outputs of f32 sums.
const BOUND: f64 = 6e-3;

#[test]
fn embedding_norms_and_activation() {
    let Some(mut p) = pair() else { return };
    for (n, hidden) in cases(vec![(1, 192), (5, 2048), (33, 4096), (3, 77)], &[0, 1, 3]) {
        let batch = p.random.batch(&vec![(1, 1); n.min(20)]);
        let n = batch.rows();
        p.begin(&batch);
        let table = p.random.floats(30 * hidden);
        let (tg, tc) = p.matrices(&table, hidden);
        let (mut xg, mut xc) = (p.gpu.residual(n, hidden).unwrap(), p.cpu.residual(n, hidden).unwrap());
        p.gpu.poison_tensor(&mut xg, 0xff).unwrap();
        p.gpu.embed(&tg, 10, &mut xg).unwrap();
        p.cpu.embed(&tc, 10, &mut xc).unwrap();
        p.same("embed", (&xg, &xc), n, 1e-9);

        let weight = p.random.floats(hidden);
        let (wg, wc) = (p.gpu.vector(&weight).unwrap(), p.cpu.vector(&weight).unwrap());
        let (mut og, mut oc) = p.outputs(n, hidden);
        p.gpu.norm(&xg, &wg, 1e-5, &mut og).unwrap();
        p.cpu.norm(&xc, &wc, 1e-5, &mut oc).unwrap();
        p.same("norm", (&og, &oc), n, BOUND);

        let partial = p.random.floats(n * hidden);
        let bias = p.random.floats(hidden);
        let (bg, bc) = (p.gpu.vector(&bias).unwrap(), p.cpu.vector(&bias).unwrap());
        for biased in [false, true] {
            let (mut pg, mut pc) = p.tensors(&partial, hidden);
            let (bg, bc) = (biased.then_some(&bg), biased.then_some(&bc));
            p.gpu.all_reduce_add_norm(&mut pg, bg, &mut xg, &wg, 1e-5, &mut og).unwrap();
            p.cpu.all_reduce_add_norm(&mut pc, bc, &mut xc, &wc, 1e-5, &mut oc).unwrap();
            p.same("residual", (&xg, &xc), n, 1e-6);
            p.same("norm of the residual", (&og, &oc), n, BOUND);
        }

        let wide = p.random.floats(n * (hidden + 24));
        let (vg, vc) = p.tensors(&wide, hidden + 24);
        for (first, q_width) in [(0, 0), (8, 16), (3, 21)] {
            let q_weight = p.random.floats(q_width);
            let (qg, qc) = (p.gpu.vector(&q_weight).unwrap(), p.cpu.vector(&q_weight).unwrap());
            let ((mut og, mut oc), (mut qog, mut qoc)) = (p.outputs(n, hidden), p.outputs(n, q_width));
            let normed = Normed { x: View::new(&vg, first, hidden), weight: &wg, out: &mut og };
            let q = Normed { x: View::new(&vg, hidden, q_width), weight: &qg, out: &mut qog };
            p.gpu.norm_latents(normed, (q_width > 0).then_some(q), 1e-6).unwrap();
            let normed = Normed { x: View::new(&vc, first, hidden), weight: &wc, out: &mut oc };
            let q = Normed { x: View::new(&vc, hidden, q_width), weight: &qc, out: &mut qoc };
            p.cpu.norm_latents(normed, (q_width > 0).then_some(q), 1e-6).unwrap();
            p.same("norm of a latent", (&og, &oc), n, BOUND);
            if q_width > 0 {
                p.same("norm of a query latent", (&qog, &qoc), n, BOUND);
            }
        }

        let gate_up = p.random.floats(n * 2 * hidden);
        let (gg, gc) = p.tensors(&gate_up, 2 * hidden);
        let (mut og, mut oc) = p.outputs(n, hidden);
        p.gpu.silu_mul(&gg, hidden, &mut og).unwrap();
        p.cpu.silu_mul(&gc, hidden, &mut oc).unwrap();
        p.same("silu·up", (&og, &oc), n, BOUND);
    }
}

#[test]
fn products_of_any_number_of_rows() {
    let Some(mut p) = pair() else { return };
    for (outs, depth) in cases(vec![(64, 48), (4096, 512), (1000, 1344), (257, 4096), (3072, 96)], &[0, 2]) {
        let weight = p.random.floats(outs * depth);
        let bias = p.random.floats(outs);
        let (wg, wc) = p.matrices(&weight, depth);
        let (bg, bc) = (p.gpu.vector(&bias).unwrap(), p.cpu.vector(&bias).unwrap());
        for n in cases(vec![1, 2, 3, 8, 13, 16, 17, 33, 64, 65, 200], &[0, 2, 6, 8]) {
            let spans: Vec<_> = if n <= 20 { vec![(1, 1); n] } else { vec![(n, n)] };
            let batch = p.random.batch(&spans);
            p.begin(&batch);
            let x = p.random.floats(n * (depth + 16));
            let (xg, xc) = p.tensors(&x, depth + 16);
            for (first, biased) in [(0, false), (8, true), (16, false)] {
                let (mut og, mut oc) = p.outputs(n, outs);
                let (bg, bc) = (biased.then_some(&bg), biased.then_some(&bc));
                p.gpu.linear(&wg, bg, View::new(&xg, first, depth), &mut og).unwrap();
                p.cpu.linear(&wc, bc, View::new(&xc, first, depth), &mut oc).unwrap();
                p.same(&format!("[{outs}, {depth}] of {n} rows from {first}"), (&og, &oc), n, BOUND);
            }
        }
    }
}

#[test]
fn two_products_in_one_launch() {
    let Some(mut p) = pair() else { return };
    let shapes =
        vec![[(2560, 768), (896, 512)], [(64, 64), (1000, 1344)], [(257, 96), (72, 48)], [(9000, 1536), (40, 512)]];
    for [(outs, depth), (more, deep)] in cases(shapes, &[1, 2]) {
        let weights = [p.random.floats(outs * depth), p.random.floats(more * deep)];
        let ((ag, ac), (bg, bc)) = (p.matrices(&weights[0], depth), p.matrices(&weights[1], deep));
        for n in cases(vec![1, 3, 8, 9, 16, 24, 64, 65], &[0, 2, 5]) {
            let batch = p.random.batch(&[(n, n)]);
            p.begin(&batch);
            // Both read the same tensor, side by side.
            let x = p.random.floats(n * (depth + deep));
            let (xg, xc) = p.tensors(&x, depth + deep);
            let ((mut og, mut oc), (mut qg, mut qc)) = (p.outputs(n, outs), p.outputs(n, more));
            let first = Linear { weight: &ag, x: View::new(&xg, 0, depth), out: &mut og };
            let second = Linear { weight: &bg, x: View::new(&xg, depth, deep), out: &mut qg };
            p.gpu.linear_pair(first, second).unwrap();
            p.cpu.linear(&ac, None, View::new(&xc, 0, depth), &mut oc).unwrap();
            p.cpu.linear(&bc, None, View::new(&xc, depth, deep), &mut qc).unwrap();
            p.same(&format!("[{outs}, {depth}] of {n} rows beside [{more}, {deep}]"), (&og, &oc), n, BOUND);
            p.same(&format!("[{more}, {deep}] of {n} rows beside it"), (&qg, &qc), n, BOUND);
        }
    }
}

#[test]
fn the_first_half_of_a_gated_mlp() {
    let Some(mut p) = pair() else { return };
    for (width, depth) in [(64, 64), (2056, 512), (1000, 1344)] {
        let weight = p.random.floats(2 * width * depth);
        let bias = p.random.floats(2 * width);
        let (wg, wc) = p.matrices(&weight, depth);
        let (bg, bc) = (p.gpu.vector(&bias).unwrap(), p.cpu.vector(&bias).unwrap());
        for n in cases(vec![1, 5, 16, 17, 40, 64, 100], &[1, 3, 5]) {
            let batch = p.random.batch(&[(n, n)]);
            p.begin(&batch);
            let x = p.random.floats(n * depth);
            let (xg, xc) = p.tensors(&x, depth);
            for biased in [false, true] {
                let (mut hg, mut hc) = p.outputs(n, 2 * width);
                let (mut og, mut oc) = p.outputs(n, width);
                let (bg, bc) = (biased.then_some(&bg), biased.then_some(&bc));
                p.gpu.gated(&wg, bg, View::new(&xg, 0, depth), width, &mut hg, &mut og).unwrap();
                p.cpu.gated(&wc, bc, View::new(&xc, 0, depth), width, &mut hc, &mut oc).unwrap();
                p.same(&format!("gated [{width}, {depth}] of {n} rows"), (&og, &oc), n, BOUND);
            }
        }
    }
}

#[test]
fn the_head_and_the_tokens_it_chooses() {
    let Some(mut p) = pair() else { return };
    for (n, vocab, hidden) in [(1, 1000, 256), (7, 4099, 192), (40, 512, 128), (23, 30_011, 64)] {
        let mut batch = p.random.batch(&[(n, n)]);
        batch.outputs = (0..n as u32).filter(|r| n < 3 || r % 3 != 1).collect();
        let outputs = batch.outputs.len();
        // Greedy rows among those that are drawn; the first token is not 0, as on a rank but the first.
        let first = 10_000 * (n - 1);
        let seed = p.random.below(1 << 30) as u64;
        batch.draws = (0..outputs as u64).map(|i| Draw::new(seed, i, [0.0, 0.3, 1.0, 40.0][i as usize % 4])).collect();
        p.begin(&batch);
        let (hg, hc) = {
            let mut w = p.random.floats(vocab * hidden);
            w.copy_within(3 * hidden..4 * hidden, 9 * hidden); // a tie
            p.matrices(&w, hidden)
        };
        let x = p.random.floats(n * hidden);
        let (xg, xc) = p.tensors(&x, hidden);
        let (mut sg, mut sc) = p.outputs(n, hidden);
        p.gpu.select_outputs(&xg, &mut sg).unwrap();
        p.cpu.select_outputs(&xc, &mut sc).unwrap();
        p.same("selected rows", (&sg, &sc), outputs, 1e-9);
        p.gpu.head(&hg, &sg, first, true).unwrap();
        p.cpu.head(&hc, &sc, first, true).unwrap();
        let (mut lg, mut lc) = (vec![], vec![]);
        p.gpu.read_logits(&mut lg).unwrap();
        p.cpu.read_logits(&mut lc).unwrap();
        close("logits", &lg, &lc, 1e-5);
        let mut best = vec![];
        p.gpu.read_best(&mut best).unwrap();
        assert_eq!(best.len(), outputs);
        // The same bits as the host's rule on the same logits, noise and all.
        let chosen: Vec<_> = lg.chunks(vocab).zip(&batch.draws).map(|(row, d)| d.best(first as u32, row)).collect();
        assert_eq!(best, chosen);
        let mut seen = vec![];
        p.cpu.read_best(&mut seen).unwrap();
        let agreed = seen.iter().zip(&chosen).filter(|(a, b)| a.1 == b.1).count();
        assert!(agreed * 10 >= outputs * 9, "the backends' own logits choose {agreed} of {outputs} alike");
    }
}

#[test]
fn routers_and_experts() {
    let Some(mut p) = pair() else { return };
    let moe = |experts, top_k, width, shared_width, groups, top_groups, scoring| Moe {
        experts,
        top_k,
        width,
        shared_width,
        scoring,
        groups,
        top_groups,
        normalise: scoring == Scoring::NoAuxTc,
        scale: 1.8,
    };
    for (moe, hidden) in [
        (moe(8, 2, 128, 128, 1, 1, Scoring::NoAuxTc), 256),
        (moe(96, 4, 192, 64, 1, 1, Scoring::NoAuxTc), 320),
        (moe(64, 4, 96, 96, 1, 1, Scoring::NoAuxTc), 512),
        (moe(16, 4, 64, 0, 4, 2, Scoring::NoAuxTc), 128),
        (moe(16, 6, 64, 128, 1, 1, Scoring::SoftmaxGreedy), 128),
        (moe(32, 3, 40, 24, 8, 3, Scoring::SoftmaxGroupLimited), 120),
    ] {
        let gate = p.random.floats(moe.experts * hidden);
        let (gg, gc) = p.matrices(&gate, hidden);
        let bias = p.random.floats(moe.experts);
        let bias = (moe.scoring == Scoring::NoAuxTc).then_some(bias);
        let bg = bias.as_ref().map(|b| p.gpu.vector(b).unwrap());
        let bc = bias.as_ref().map(|b| p.cpu.vector(b).unwrap());
        let widths: Vec<usize> =
            (0..moe.experts).map(|_| moe.width).chain((moe.shared_width > 0).then_some(moe.shared_width)).collect();
        let scaled = |p: &mut Pair, n: usize| -> Vec<u16> {
            (0..n).map(|_| half::bf16::from_f32(p.random.float() * 0.1).to_bits()).collect()
        };
        let ups: Vec<Vec<u16>> = widths.iter().map(|w| scaled(&mut p, 2 * w * hidden)).collect();
        let downs: Vec<Vec<u16>> = widths.iter().map(|w| scaled(&mut p, w * hidden)).collect();
        let rows = |all: &[Vec<u16>], each: &dyn Fn(usize) -> usize| -> Vec<Vec<HostRows<'static>>> {
            let leak = |v: &Vec<u16>| -> &'static [u16] { Vec::leak(v.clone()) };
            all.iter().enumerate().map(|(e, v)| vec![HostRows::Bf16(leak(v), each(e))]).collect()
        };
        let (up_rows, down_rows) = (rows(&ups, &|_| hidden), rows(&downs, &|e| widths[e]));
        let ec = p.cpu.experts_of(&up_rows, &down_rows, &moe).unwrap();
        let eg = p.gpu.experts_of(&ups, &downs, hidden, &moe).unwrap();
        let norm_weight = p.random.floats(hidden);
        let (wg, wc) = (p.gpu.vector(&norm_weight).unwrap(), p.cpu.vector(&norm_weight).unwrap());
        // With a large bias all rows choose the same experts.
        let together = bias.as_ref().map(|b| {
            let all: Vec<f32> = b
                .iter()
                .enumerate()
                .map(|(e, b)| b + if e % 2 == 1 && e <= 2 * moe.top_k { 64.0 } else { 0.0 })
                .collect();
            (p.gpu.vector(&all).unwrap(), p.cpu.vector(&all).unwrap())
        });
        let (tg, tc) = together.as_ref().map_or((None, None), |(g, c)| (Some(g), Some(c)));
        let runs = [1, 3, 8, 17, 33, 64, 130, 300].map(|n| [(n, bg.as_ref(), bc.as_ref()), (n, tg, tc)]);
        for (n, bg, bc) in runs.into_iter().flatten() {
            let spans: Vec<_> = if n <= 20 { vec![(1, 1); n] } else { vec![(n, n)] };
            let batch = p.random.batch(&spans);
            p.begin(&batch);
            let x = p.random.floats(n * hidden);
            let (xg, xc) = p.tensors(&x, hidden);
            let mut rg = p.gpu.routing(n, &moe).unwrap();
            let mut rc = p.cpu.routing(n, &moe).unwrap();
            p.gpu.route(&moe, &gg, bg, &xg, &mut rg).unwrap();
            p.cpu.route(&moe, &gc, bc, &xc, &mut rc).unwrap();
            let (ids, weights) = p.gpu.read_routing(&rg, n).unwrap();
            for r in 0..n {
                let at = r * moe.top_k..(r + 1) * moe.top_k;
                let (ids_c, weights_c) = rc.row(r);
                let sorted = |ids: &[u32], w: &[f32]| {
                    let mut all: Vec<(u32, f32)> = ids.iter().copied().zip(w.iter().copied()).collect();
                    all.sort_by_key(|a| a.0);
                    all
                };
                let (g, c) = (sorted(&ids[at.clone()], &weights[at]), sorted(ids_c, weights_c));
                assert_eq!(g.iter().map(|x| x.0).collect::<Vec<_>>(), c.iter().map(|x| x.0).collect::<Vec<_>>());
                for (g, c) in g.iter().zip(&c) {
                    assert!((g.1 - c.1).abs() < 1e-4 * c.1.abs().max(1e-3), "weight {} should be {}", g.1, c.1);
                }
            }
            let (mut og, mut oc) = p.outputs(n, hidden);
            p.gpu.moe(&eg, &rg, &xg, &mut og).unwrap();
            p.cpu.moe(&ec, &rc, &xc, &mut oc).unwrap();
            p.same(&format!("{} experts of {n} rows", moe.experts), (&og, &oc), n, 1e-2);

            let (residual, (mut hg, mut hc)) = (p.random.floats(n * hidden), (xg, xc));
            let (mut xg, mut xc) = (p.gpu.residual(n, hidden).unwrap(), p.cpu.residual(n, hidden).unwrap());
            p.gpu.write_rows(&residual, &mut xg).unwrap();
            p.cpu.write_rows(&residual, &mut xc).unwrap();
            p.gpu.poison_tensor(&mut og, 0xff).unwrap();
            p.gpu.moe_all_reduce_add_norm(&eg, &rg, &mut og, &mut xg, &wg, 1e-5, &mut hg).unwrap();
            p.cpu.moe_all_reduce_add_norm(&ec, &rc, &mut oc, &mut xc, &wc, 1e-5, &mut hc).unwrap();
            p.same(&format!("{} experts of {n} rows, added", moe.experts), (&xg, &xc), n, 1e-2);
            p.same(&format!("{} experts of {n} rows, normed", moe.experts), (&hg, &hc), n, 1e-2);
        }
    }
}

#[test]
fn made_up_weights_are_the_hosts() {
    let Some(p) = pair() else { return };
    let checkpoint = Checkpoint::dummy(0);
    for (rows, cols) in [(0..70, 0..100), (3..9, 5..2050)] {
        let slice = checkpoint.slice("model.some.weight", &[100, 4096], rows.clone(), cols.clone()).unwrap();
        let g = p.gpu.matrix(std::slice::from_ref(&slice), Reduction::Whole).unwrap();
        let mut want = vec![0f32; rows.len() * cols.len()];
        for (r, out) in want.chunks_mut(cols.len()).enumerate() {
            slice.read_f32(r, out);
        }
        assert_eq!(p.gpu.read_matrix(&g).unwrap(), want);
    }
}
