//! Products with weight matrices.

use gqla::backend::cpu::CpuBackend;
use gqla::backend::cpu::simd::Isa;
use gqla::backend::{Backend, Reduction, View};
use gqla::comm::tree_sum;

use crate::support::*;

const ROWS: [usize; 12] = [1, 2, 3, 4, 5, 6, 7, 11, 13, 96, 97, 131];
const COLS: [usize; 9] = [1, 7, 16, 32, 33, 100, 640, 1031, 2100];
const OUTS: [usize; 8] = [1, 3, 8, 13, 64, 70, 131, 300];

fn linear(b: &mut CpuBackend, w: &Weight, reduction: Reduction, bias: Option<&Vec<f32>>, x: &[f32]) -> Vec<f32> {
    let n = x.len() / w.cols;
    b.begin(&rows(n)).unwrap();
    let matrix = w.matrix(b, reduction);
    let x = tensor(b, x, w.cols);
    let mut out = b.tensor(n, w.rows()).unwrap();
    b.linear(&matrix, bias, View::new(&x, 0, w.cols), &mut out).unwrap();
    b.read(&out, n).unwrap()
}

#[test]
fn linear_is_the_product_at_odd_sizes() {
    let mut random = Random::new();
    for _ in 0..40 {
        let (n, cols, outs) = (random.pick(&ROWS), random.pick(&COLS), random.pick(&OUTS));
        let w = Weight::random(&mut random, outs, cols);
        let reduction = random.pick(&[Reduction::Whole, Reduction::Split]);
        let bias = random.coin().then(|| random.floats(outs));
        // Columns in the middle of a wider tensor.
        let (before, after) = (random.below(3), random.below(3));
        let wide = before + cols + after;
        let data = random.floats(n * wide);
        let mut b = backend();
        b.begin(&rows(n)).unwrap();
        let x = tensor(&b, &data, wide);
        let mut out = tensor(&b, &vec![f32::NAN; n * outs], outs);
        b.linear(&w.matrix(&b, reduction), bias.as_ref(), View::new(&x, before, cols), &mut out).unwrap();
        let mut want = Vec::new();
        for r in 0..n {
            for o in 0..outs {
                want.push(
                    dot(&data[r * wide + before..][..cols], w.row(o)) + bias.as_ref().map_or(0.0, |b| b[o] as f64),
                );
            }
        }
        close(&b.read(&out, n).unwrap(), &want, 2e-6);
    }
}

#[test]
fn a_row_does_not_depend_on_the_others() {
    let mut random = Random::new();
    for _ in 0..20 {
        let (n, cols, outs) = (random.pick(&ROWS), random.pick(&COLS), random.pick(&OUTS));
        let reduction = random.pick(&[Reduction::Whole, Reduction::Split]);
        let w = Weight::random(&mut random, outs, cols);
        let x = random.floats(n * cols);
        let mut b = backend();
        let together = linear(&mut b, &w, reduction, None, &x);
        let mut first = 0;
        while first < n {
            let some = (1 + random.below(5)).min(n - first);
            let apart = linear(&mut b, &w, reduction, None, &x[first * cols..][..some * cols]);
            assert_eq!(bits(&apart), bits(&together[first * outs..][..some * outs]), "rows {first}+{some} of {n}");
            first += some;
        }
    }
}

#[test]
fn instruction_sets_and_threads_give_the_same_bits() {
    let mut random = Random::new();
    for _ in 0..12 {
        let (n, cols, outs) = (random.pick(&ROWS), random.pick(&COLS), random.pick(&OUTS));
        let w = Weight::random(&mut random, outs, cols);
        let x = random.floats(n * cols);
        let all: Vec<_> = variants().iter_mut().map(|b| bits(&linear(b, &w, Reduction::Split, None, &x))).collect();
        assert!(all.iter().all(|one| *one == all[0]), "[{n}, {cols}] by [{outs}, {cols}]");
    }
}

#[test]
fn world_sizes_give_the_same_bits() {
    let mut random = Random::new();
    // 1, 3, 32 and more than a block of elements a segment.
    for cols in [8, 24, 256, 8 * 37, 8 * 1100] {
        let (n, outs) = (random.pick(&[1, 3, 9]), random.pick(&OUTS));
        let w = Weight::random(&mut random, outs, cols);
        let bias = random.floats(outs);
        let x = random.floats(n * cols);
        let whole = linear(&mut backend(), &w, Reduction::Split, Some(&bias), &x);
        for world in [2, 4, 8] {
            let local = cols / world;
            let mut parts = Vec::new();
            for rank in 0..world {
                let mut b = backend_of(Isa::detect(), 1, world);
                let part = w.part(0..outs, rank * local..(rank + 1) * local);
                let x: Vec<f32> = x.chunks(cols).flat_map(|x| x[rank * local..][..local].to_vec()).collect();
                parts.extend(linear(&mut b, &part, Reduction::Split, (rank == 0).then_some(&bias), &x));
            }
            let mut sum = vec![0.0; n * outs];
            tree_sum(&mut parts, n * outs, &mut sum);
            assert_eq!(bits(&sum), bits(&whole), "{world} ranks, {cols} columns");
        }
    }
}

#[test]
fn odd_splits_are_still_right() {
    let mut random = Random::new();
    for (world, cols) in [(1, 20), (3, 21), (4, 9), (5, 35), (16, 4)] {
        let w = Weight::random(&mut random, 11, cols);
        let x = random.floats(2 * cols);
        let out = linear(&mut backend_of(Isa::detect(), 1, world), &w, Reduction::Split, None, &x);
        let want: Vec<f64> = (0..22).map(|i| dot(&x[i / 11 * cols..][..cols], w.row(i % 11))).collect();
        close(&out, &want, 1e-6);
    }
}

#[test]
fn stacked_parts_are_one_matrix() {
    let mut random = Random::new();
    let (top, bottom) = (Weight::random(&mut random, 5, 19), Weight::random(&mut random, 9, 19));
    let mut b = backend();
    let matrix = b.matrix_of(&[top.host(), bottom.host()], Reduction::Whole).unwrap();
    assert_eq!((matrix.rows(), matrix.cols()), (14, 19));
    // bf16 only where every part is.
    let bf16 = top.bf16.is_some() && bottom.bf16.is_some();
    assert_eq!(matrix.bytes(), 14 * 19 * if bf16 { 2 } else { 4 });
    b.begin(&rows(1)).unwrap();
    let x = random.floats(19);
    let mut out = b.tensor(1, 14).unwrap();
    b.linear(&matrix, None, View::new(&tensor(&b, &x, 19), 0, 19), &mut out).unwrap();
    let want: Vec<f64> = (0..5).map(|r| dot(&x, top.row(r))).chain((0..9).map(|r| dot(&x, bottom.row(r)))).collect();
    close(&b.read(&out, 1).unwrap(), &want, 1e-6);
}

#[test]
fn the_head_selects_multiplies_and_ranks() {
    let mut random = Random::new();
    let (n, hidden, vocab) = (9, 65, 301);
    let mut b = backend();
    let mut batch = rows(n);
    batch.outputs = vec![1, 4, 8];
    b.begin(&batch).unwrap();
    let x = random.floats(n * hidden);
    let mut w = Weight::random(&mut random, vocab, hidden);
    // Two equal rows that win everywhere for the first output: the lower index counts.
    let winner: Vec<f32> = x[hidden..2 * hidden].iter().map(|v| (v * 64.0).round()).collect();
    w.bf16 = None;
    for row in [37, 211] {
        w.f32[row * hidden..][..hidden].copy_from_slice(&winner);
    }
    let head = w.matrix(&b, Reduction::Whole);
    let mut selected = b.tensor(4, hidden).unwrap();
    b.select_outputs(&tensor(&b, &x, hidden), &mut selected).unwrap();
    let (mut logits, mut best) = (vec![9.0; 5], vec![(0.0, 7); 9]);
    b.head(&head, &selected, 1000, true).unwrap();
    b.read_logits(&mut logits).unwrap();
    b.read_best(&mut best).unwrap();
    let want: Vec<f64> = [1, 4, 8]
        .iter()
        .flat_map(|&r| (0..vocab).map(move |v| (r, v)))
        .map(|(r, v)| dot(&x[r * hidden..][..hidden], w.row(v)))
        .collect();
    close(&logits, &want, 1e-6);
    assert_eq!(best.len(), 3);
    assert_eq!(best[0].1, 1037);
    for (best, logits) in best.iter().zip(logits.chunks(vocab)) {
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        assert_eq!(*best, (largest, 1000 + logits.iter().position(|&l| l == largest).unwrap() as u32));
    }
}
