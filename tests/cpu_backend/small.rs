//! Embedding, norms, activation, residual.

use gqla::backend::{Backend, Normed, Reduction, View};

use crate::support::*;

fn rmsnorm(x: &[f32], weight: &[f32], eps: f64) -> Vec<f64> {
    let mean = dot(x, x) / x.len() as f64;
    x.iter().zip(weight).map(|(&x, &w)| x as f64 / (mean + eps).sqrt() * w as f64).collect()
}

#[test]
fn embed_takes_the_ranks_rows_and_zero_elsewhere() {
    let mut random = Random::new();
    let w = Weight::random(&mut random, 10, 21);
    let mut b = backend();
    let mut batch = rows(4);
    batch.tokens = vec![29, 30, 39, 40];
    b.begin(&batch).unwrap();
    let mut out = tensor(&b, &[f32::NAN; 4 * 21], 21);
    b.embed(&w.matrix(&b, Reduction::Whole), 30, &mut out).unwrap();
    let want = [&[0.0; 21][..], w.row(0), w.row(9), &[0.0; 21][..]].concat();
    assert_eq!(b.read(&out, 4).unwrap(), want);
}

#[test]
fn norms_are_rmsnorm_of_the_columns() {
    let mut random = Random::new();
    for width in [1, 15, 16, 77, 512] {
        let (n, before, second) = (1 + random.below(40), random.below(5), 1 + random.below(90));
        let wide = before + width + second;
        let data = random.floats(n * wide);
        let (weight, second_weight) = (random.floats(width), random.floats(second));
        let mut results = Vec::new();
        for mut b in variants() {
            b.begin(&rows(n)).unwrap();
            let x = tensor(&b, &data, wide);
            let (mut out, mut second_out) = (b.tensor(n, width).unwrap(), b.tensor(n, second).unwrap());
            let first = Normed { x: View::new(&x, before, width), weight: &weight, out: &mut out };
            let after = View::new(&x, before + width, second);
            let after = Normed { x: after, weight: &second_weight, out: &mut second_out };
            b.norm_latents(first, Some(after), 1e-5).unwrap();
            results.push([b.read(&out, n).unwrap(), b.read(&second_out, n).unwrap()].concat());
        }
        let rows = |first: usize, weight: &[f32]| -> Vec<f64> {
            (0..n).flat_map(|r| rmsnorm(&data[r * wide + first..][..weight.len()], weight, 1e-5)).collect()
        };
        let want = [rows(before, &weight), rows(before + width, &second_weight)].concat();
        close(&results[0], &want, 1e-6);
        assert!(results.iter().all(|r| bits(r) == bits(&results[0])));
    }
}

#[test]
fn the_residual_grows_and_is_normed() {
    let mut random = Random::new();
    let (n, hidden) = (5, 83);
    let (partial, x, weight) = (random.floats(n * hidden), random.floats(n * hidden), random.floats(hidden));
    let mut b = backend();
    b.begin(&rows(n)).unwrap();
    for bias in [None, Some(random.floats(hidden))] {
        let (mut p, mut residual) = (tensor(&b, &partial, hidden), tensor(&b, &x, hidden));
        let mut out = b.tensor(n, hidden).unwrap();
        b.all_reduce_add_norm(&mut p, bias.as_ref(), &mut residual, &weight, 1e-6, &mut out).unwrap();
        let added = |i: usize| partial[i] as f64 + bias.as_ref().map_or(0.0, |b| b[i % hidden] as f64);
        let sum: Vec<f64> = x.iter().enumerate().map(|(i, &x)| x as f64 + added(i)).collect();
        let residual = b.read(&residual, n).unwrap();
        close(&residual, &sum, 2e-7);
        let want: Vec<f64> = residual.chunks(hidden).flat_map(|x| rmsnorm(x, &weight, 1e-6)).collect();
        close(&b.read(&out, n).unwrap(), &want, 1e-6);
    }
}

#[test]
fn silu_mul_holds_far_from_zero() {
    let mut random = Random::new();
    let (n, width) = (3, 61);
    let mut data: Vec<f32> = random.floats(n * 2 * width).iter().map(|x| x * 20.0).collect();
    for (i, extreme) in [-1e30, -200.0, -88.0, 88.0, 200.0, 1e30, 0.0, -0.0].into_iter().enumerate() {
        data[i] = extreme;
        data[width + i] = 1.0;
    }
    let mut results = Vec::new();
    for mut b in variants() {
        b.begin(&rows(n)).unwrap();
        let mut out = b.tensor(n, width).unwrap();
        b.silu_mul(&tensor(&b, &data, 2 * width), width, &mut out).unwrap();
        results.push(b.read(&out, n).unwrap());
    }
    for (i, &got) in results[0].iter().enumerate() {
        let (gate, up) = (data[i / width * 2 * width + i % width], data[i / width * 2 * width + width + i % width]);
        let want = gate as f64 / (1.0 + (-gate as f64).exp()) * up as f64;
        // Where e^gate is below the smallest normal float the exponent is held there.
        assert!(
            (got as f64 - want).abs() <= 1e-6 * want.abs() + 1e-8 * (gate as f64).abs().min(1.0),
            "{gate}: {got} and not {want}"
        );
    }
    assert!(results.iter().all(|r| bits(r) == bits(&results[0])));
}

#[test]
fn not_a_number_is_not_hidden() {
    let mut b = backend();
    b.begin(&rows(1)).unwrap();
    let mut out = b.tensor(1, 1).unwrap();
    b.silu_mul(&tensor(&b, &[f32::NAN, 1.0], 2), 1, &mut out).unwrap();
    assert!(b.read(&out, 1).unwrap()[0].is_nan());
}

#[test]
fn steps_that_contradict_themselves_are_refused() {
    let good = spans(&[(3, 70, vec![0, 1]), (1, 5, vec![2])]);
    let mut b = backend();
    b.begin(&good).unwrap();
    let mut faults = vec![good.clone(); 5];
    faults[0].spans[0].blocks.pop();
    faults[1].positions[1] = 9;
    faults[2].outputs = vec![4];
    faults[3].spans.pop();
    faults[4].spans[1].first = 2;
    for fault in faults {
        assert!(b.begin(&fault).is_err(), "{fault:?}");
    }
}
