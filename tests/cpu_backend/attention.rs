//! RoPE, caches, attention on both paths, the absorbing products.

use gqla::backend::cpu::simd::Isa;
use gqla::backend::cpu::{Cache, CpuBackend, Matrix, RopeTable, Tensor};
use gqla::backend::{AttentionShape, Backend, Batch, Reduction, View};
use gqla::cache::{BLOCK, Layout};
use gqla::config::{Rope, RopeScaling};

use crate::support::*;

/// One layer's attention inputs for a sequence, and the shapes.
struct Case {
    shape: AttentionShape,
    interleave: bool,
    inv_freq: Vec<f64>,
    magnitude: f64,
    tokens: usize,
    /// `[tokens, heads·(nope+rope)]`.
    q: Vec<f32>,
    /// Grouped: `[tokens, groups·(nope+value)]`; latent: `[tokens, latent]`.
    kv: Vec<f32>,
    /// `[tokens, rope]`.
    k_rope: Vec<f32>,
}

impl Case {
    fn random(random: &mut Random, latent: bool) -> Case {
        let heads_per_group = random.pick(&[1, 2, 3, 4, 5]);
        let groups = random.pick(&[1, 2, 3]);
        // On the absorb path a rank may start and end inside a group.
        let first = if latent { random.below(heads_per_group) } else { 0 };
        let last = if latent && (groups > 1 || first == 0) { random.below(heads_per_group) } else { 0 };
        let heads = (groups * heads_per_group - first).saturating_sub(last).max(1);
        let rope = random.pick(&[2, 8, 14]);
        let llama = !latent && random.coin();
        let shape = AttentionShape {
            heads,
            groups: (first + heads - 1) / heads_per_group + 1,
            first_head_in_group: first,
            heads_per_group,
            nope: if llama { random.pick(&[6, 32]) } else { random.pick(&[5, 16, 27]) },
            rope: if llama { 0 } else { rope },
            value: random.pick(&[7, 16, 64, 83]),
            latent: if latent { random.pick(&[19, 32, 85, 300]) } else { 0 },
            scale: 0.3,
            expand: false,
        };
        let tokens = 1 + random.below(200);
        let turned = if llama { shape.nope } else { rope };
        let kv = if latent { shape.latent } else { shape.groups * (shape.nope + shape.value) };
        Case {
            shape,
            interleave: random.coin(),
            inv_freq: (0..turned / 2).map(|i| 0.7f64.powi(i as i32)).collect(),
            magnitude: random.pick(&[1.0, 1.25]),
            tokens,
            q: random.floats(tokens * heads * (shape.nope + shape.rope)),
            kv: random.floats(tokens * kv),
            k_rope: random.floats(tokens * shape.rope),
        }
    }

    fn is_latent(&self) -> bool {
        self.shape.latent > 0
    }

    fn layout(&self) -> Layout {
        let s = &self.shape;
        if self.is_latent() {
            Layout::Latent { latent: s.latent, rope: s.rope }
        } else {
            Layout::Grouped { groups: s.groups, nope: s.nope, rope: s.rope, value: s.value }
        }
    }

    fn q_width(&self) -> usize {
        self.shape.heads * (self.shape.nope + self.shape.rope)
    }

    /// Width of a query as attention takes it.
    fn attend_width(&self) -> usize {
        let s = &self.shape;
        if self.is_latent() { s.heads * (s.latent + s.rope) } else { self.q_width() }
    }

    fn out_width(&self) -> usize {
        self.shape.heads * if self.is_latent() { self.shape.latent } else { self.shape.value }
    }

    fn table(&self, b: &CpuBackend) -> RopeTable {
        let rope = Rope { theta: 1e4, interleave: self.interleave, scaling: RopeScaling::Default };
        b.rope_table(&rope, &self.inv_freq, self.magnitude, self.tokens).unwrap()
    }

    fn turn(&self, position: usize, x: &[f32]) -> Vec<f64> {
        let half = self.inv_freq.len();
        let mut out = vec![0.0; x.len()];
        for i in 0..half {
            let (a, b) = if self.interleave { (2 * i, 2 * i + 1) } else { (i, i + half) };
            let angle = position as f64 * self.inv_freq[i];
            let (s, c) = (angle.sin() * self.magnitude, angle.cos() * self.magnitude);
            out[a] = x[a] as f64 * c - x[b] as f64 * s;
            out[b] = x[b] as f64 * c + x[a] as f64 * s;
        }
        out
    }

    /// The query that attention sees, of one head: rotated, and (latent) in the latent space.
    fn query(&self, up: Option<&Weight>, row: usize, head: usize) -> Vec<f64> {
        let s = &self.shape;
        let q = &self.q[row * self.q_width() + head * (s.nope + s.rope)..][..s.nope + s.rope];
        if s.rope == 0 {
            return self.turn(row, q);
        }
        let mut all: Vec<f64> = q[..s.nope].iter().map(|&x| x as f64).collect();
        if let Some(up) = up {
            let first = s.group_of(head) * (s.nope + s.value);
            all = (0..s.latent).map(|c| (0..s.nope).map(|i| q[i] as f64 * up.row(first + i)[c] as f64).sum()).collect();
        }
        all.extend(self.turn(row, &q[s.nope..]));
        all
    }

    /// Key and value of a token for a head.
    fn key_value(&self, token: usize, head: usize) -> (Vec<f64>, Vec<f64>) {
        let s = &self.shape;
        let wide = |x: &[f32]| x.iter().map(|&x| x as f64).collect::<Vec<f64>>();
        let k_rope = if s.rope > 0 { self.turn(token, &self.k_rope[token * s.rope..][..s.rope]) } else { vec![] };
        if self.is_latent() {
            let latent = wide(&self.kv[token * s.latent..][..s.latent]);
            return ([&latent[..], &k_rope].concat(), latent);
        }
        let width = s.nope + s.value;
        let kv = &self.kv[(token * s.groups + s.group_of(head)) * width..][..width];
        let value = wide(&kv[s.nope..]);
        if s.rope == 0 {
            (self.turn(token, &kv[..s.nope]), value)
        } else {
            ([wide(&kv[..s.nope]), k_rope].concat(), value)
        }
    }

    /// What attention should say, `[tokens, out_width]`.
    fn expected(&self, up: Option<&Weight>) -> Vec<f64> {
        let mut out = Vec::new();
        for row in 0..self.tokens {
            for head in 0..self.shape.heads {
                let q = self.query(up, row, head);
                let pairs: Vec<_> = (0..=row).map(|t| self.key_value(t, head)).collect();
                let score = |k: &[f64]| q.iter().zip(k).map(|(a, b)| a * b).sum::<f64>() * self.shape.scale as f64;
                let scores: Vec<f64> = pairs.iter().map(|(k, _)| score(k)).collect();
                let peak = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let total: f64 = scores.iter().map(|s| (s - peak).exp()).sum();
                for c in 0..pairs[0].1.len() {
                    out.push(scores.iter().zip(&pairs).map(|(s, (_, v))| (s - peak).exp() / total * v[c]).sum());
                }
            }
        }
        out
    }

    /// Appends and attends for rows `from..to`; the blocks are the sequence's.
    fn step(
        &self,
        b: &mut CpuBackend,
        cache: &mut Cache,
        up: Option<&Matrix>,
        blocks: &[u32],
        from: usize,
        to: usize,
    ) -> Vec<f32> {
        b.begin(&spans(&[(to - from, to, blocks.to_vec())])).unwrap();
        self.attend(b, cache, up, from, to)
    }

    fn attend(&self, b: &CpuBackend, cache: &mut Cache, up: Option<&Matrix>, from: usize, to: usize) -> Vec<f32> {
        let n = to - from;
        let s = &self.shape;
        let cut = |data: &[f32], width: usize| tensor(b, &data[from * width..to * width], width.max(1));
        let q = cut(&self.q, self.q_width());
        let kv_width = self.kv.len() / self.tokens;
        let kv = cut(&self.kv, kv_width);
        let mut q_out = b.tensor(n, self.q_width()).unwrap();
        let mut out = tensor(b, &vec![f32::NAN; n * self.out_width()], self.out_width());
        let (table, q, kv) = (self.table(b), View::new(&q, 0, self.q_width()), View::new(&kv, 0, kv_width));
        let k_rope = (s.rope > 0).then(|| cut(&self.k_rope, s.rope));
        let k_rope = k_rope.as_ref().map(|k| View::new(k, 0, s.rope));
        if self.is_latent() {
            b.append_latent(s, &table, (kv, None), k_rope.unwrap(), None, 0.0, cache).unwrap();
            let mut absorbed = tensor(b, &vec![f32::NAN; n * self.attend_width()], self.attend_width());
            b.absorb_query(s, &table, up.unwrap(), q, &mut absorbed).unwrap();
            b.attend_latent(s, &absorbed, cache, &mut out).unwrap();
        } else {
            b.rope_append_grouped(s, &table, q, kv, k_rope, &mut q_out, cache).unwrap();
            b.attend_grouped(s, &q_out, cache, &mut out).unwrap();
        }
        b.read(&out, n).unwrap()
    }

    fn up(&self, random: &mut Random) -> Option<Weight> {
        let s = &self.shape;
        self.is_latent().then(|| Weight::random(random, s.groups * (s.nope + s.value), s.latent))
    }
}

/// A cache whose every slot is NaN, and a sequence's blocks in it in random order.
fn poisoned(random: &mut Random, b: &CpuBackend, case: &Case) -> (Cache, Vec<u32>) {
    let count = blocks_for(case.tokens) + 2;
    let mut cache = b.cache(case.layout(), count).unwrap();
    cache.fill(f32::NAN);
    let blocks = random.shuffled(count)[..blocks_for(case.tokens)].to_vec();
    (cache, blocks)
}

#[test]
fn attention_is_softmax_over_what_is_cached() {
    let mut random = Random::new();
    for latent in [false, true] {
        for _ in 0..12 {
            let case = Case::random(&mut random, latent);
            let up = case.up(&mut random);
            let mut b = backend();
            let (mut cache, blocks) = poisoned(&mut random, &b, &case);
            let matrix = up.as_ref().map(|w| w.matrix(&b, Reduction::Whole));
            let out = case.step(&mut b, &mut cache, matrix.as_ref(), &blocks, 0, case.tokens);
            eprintln!("{:?}, {} tokens", case.shape, case.tokens);
            close(&out, &case.expected(up.as_ref()), 3e-6);
        }
    }
}

#[test]
fn chunks_give_the_bits_of_the_whole() {
    let mut random = Random::new();
    for latent in [false, true] {
        for _ in 0..12 {
            let case = Case::random(&mut random, latent);
            let up = case.up(&mut random);
            let mut b = backend();
            let matrix = up.as_ref().map(|w| w.matrix(&b, Reduction::Whole));
            let (mut cache, blocks) = poisoned(&mut random, &b, &case);
            let whole = case.step(&mut b, &mut cache, matrix.as_ref(), &blocks, 0, case.tokens);
            let (mut cache, blocks) = poisoned(&mut random, &b, &case);
            let (mut chunked, mut from) = (Vec::new(), 0);
            while from < case.tokens {
                let longest = random.pick(&[1, 3, 40, 130]);
                let to = (from + 1 + random.below(longest)).min(case.tokens);
                chunked.extend(case.step(&mut b, &mut cache, matrix.as_ref(), &blocks, from, to));
                from = to;
            }
            assert_eq!(bits(&chunked), bits(&whole), "{:?}, {} tokens", case.shape, case.tokens);
        }
    }
}

#[test]
fn instruction_sets_and_threads_give_the_same_bits() {
    let mut random = Random::new();
    for latent in [false, true] {
        for _ in 0..5 {
            let case = Case::random(&mut random, latent);
            let up = case.up(&mut random);
            let mut results = Vec::new();
            for mut b in variants() {
                let matrix = up.as_ref().map(|w| w.matrix(&b, Reduction::Whole));
                let (mut cache, blocks) = poisoned(&mut random, &b, &case);
                results.push(bits(&case.step(&mut b, &mut cache, matrix.as_ref(), &blocks, 0, case.tokens)));
            }
            assert!(results.iter().all(|r| *r == results[0]), "{:?}", case.shape);
        }
    }
}

#[test]
fn sequences_in_one_step_do_not_meet() {
    let mut random = Random::new();
    for latent in [false, true] {
        let mut one = Case::random(&mut random, latent);
        one.tokens = 1 + random.below(150);
        let up = one.up(&mut random);
        // The second sequence has the same shape and its own data; in the step it is in decode, the first in prefill.
        let s = one.shape;
        let length = 66 + random.below(80);
        let fresh = |random: &mut Random, case: &Case, tokens: usize| Case {
            shape: s,
            interleave: case.interleave,
            inv_freq: case.inv_freq.clone(),
            magnitude: case.magnitude,
            tokens,
            q: random.floats(tokens * case.q_width()),
            kv: random.floats(tokens * if latent { s.latent } else { s.groups * (s.nope + s.value) }),
            k_rope: random.floats(tokens * s.rope),
        };
        let two = fresh(&mut random, &one, length);
        let one = fresh(&mut random, &one, one.tokens);
        let mut b = backend();
        let matrix = up.as_ref().map(|w| w.matrix(&b, Reduction::Whole));
        let (mut cache, blocks) = poisoned(&mut random, &b, &one);
        let alone_one = one.step(&mut b, &mut cache, matrix.as_ref(), &blocks, 0, one.tokens);
        let (mut cache, blocks) = poisoned(&mut random, &b, &two);
        two.step(&mut b, &mut cache, matrix.as_ref(), &blocks, 0, length - 1);
        let alone_two = two.step(&mut b, &mut cache, matrix.as_ref(), &blocks, length - 1, length);

        let need = blocks_for(one.tokens);
        let count = need + blocks_for(length);
        let order = random.shuffled(count);
        let mut cache = b.cache(one.layout(), count).unwrap();
        cache.fill(f32::NAN);
        two.step(&mut b, &mut cache, matrix.as_ref(), &order[need..], 0, length - 1);
        b.begin(&spans(&[(one.tokens, one.tokens, order[..need].to_vec()), (1, length, order[need..].to_vec())]))
            .unwrap();
        let last = |data: &[f32], width: usize| data[(length - 1) * width..].to_vec();
        let n = one.tokens + 1;
        let both = Case {
            tokens: n,
            q: [&one.q[..], &last(&two.q, one.q_width())].concat(),
            kv: [&one.kv[..], &last(&two.kv, two.kv.len() / length)].concat(),
            k_rope: [&one.k_rope[..], &last(&two.k_rope, s.rope)].concat(),
            ..fresh(&mut random, &one, 0)
        };
        let together = attend_rows(&b, &mut cache, matrix.as_ref(), &both, n.max(length));
        assert_eq!(bits(&together), bits(&[alone_one, alone_two].concat()), "{s:?}");
    }
}

/// Like `Case::attend` of all rows, which are not of one sequence, with angles for `positions` positions.
fn attend_rows(b: &CpuBackend, cache: &mut Cache, up: Option<&Matrix>, case: &Case, positions: usize) -> Vec<f32> {
    let (s, n) = (&case.shape, case.tokens);
    let kv_width = case.kv.len() / n;
    let (q, kv) = (tensor(b, &case.q, case.q_width()), tensor(b, &case.kv, kv_width));
    let k_rope = (s.rope > 0).then(|| tensor(b, &case.k_rope, s.rope));
    let k_rope = k_rope.as_ref().map(|k| View::new(k, 0, s.rope));
    let rope = Rope { theta: 1e4, interleave: case.interleave, scaling: RopeScaling::Default };
    let table = b.rope_table(&rope, &case.inv_freq, case.magnitude, positions).unwrap();
    let mut turned = b.tensor(n, case.q_width()).unwrap();
    let mut out = b.tensor(n, case.out_width()).unwrap();
    let (q, kv) = (View::new(&q, 0, case.q_width()), View::new(&kv, 0, kv_width));
    if case.is_latent() {
        b.append_latent(s, &table, (kv, None), k_rope.unwrap(), None, 0.0, cache).unwrap();
        let mut absorbed = b.tensor(n, case.attend_width()).unwrap();
        b.absorb_query(s, &table, up.unwrap(), q, &mut absorbed).unwrap();
        b.attend_latent(s, &absorbed, cache, &mut out).unwrap();
    } else {
        b.rope_append_grouped(s, &table, q, kv, k_rope, &mut turned, cache).unwrap();
        b.attend_grouped(s, &turned, cache, &mut out).unwrap();
    }
    b.read(&out, n).unwrap()
}

#[test]
fn absorbed_outputs_are_the_groups_values() {
    let mut random = Random::new();
    for _ in 0..12 {
        let case = Case::random(&mut random, true);
        let (s, up) = (case.shape, case.up(&mut random).unwrap());
        let n = random.pick(&[1, 2, 5, 40]);
        let latent = random.floats(n * case.out_width());
        let mut results = Vec::new();
        for mut b in variants() {
            b.begin(&rows(n)).unwrap();
            let mut out = b.tensor(n, s.heads * s.value).unwrap();
            let matrix = up.matrix(&b, Reduction::Whole);
            b.absorb_output(&s, &matrix, &tensor(&b, &latent, case.out_width()), &mut out).unwrap();
            results.push(b.read(&out, n).unwrap());
        }
        let mut want = Vec::new();
        for at in 0..n * s.heads {
            let first = s.group_of(at % s.heads) * (s.nope + s.value) + s.nope;
            want.extend((0..s.value).map(|v| dot(&latent[at * s.latent..][..s.latent], up.row(first + v))));
        }
        close(&results[0], &want, 1e-6);
        assert!(results.iter().all(|r| bits(r) == bits(&results[0])));
    }
}

/// A step's columns of a case's data: its rows are the case's tokens at their positions, whatever sequence they are of.
fn picked(b: &CpuBackend, batch: &Batch, data: &[f32], width: usize) -> Tensor {
    let rows = batch.positions.iter().flat_map(|&p| &data[p as usize * width..][..width]);
    tensor(b, &rows.copied().collect::<Vec<_>>(), width)
}

#[test]
fn long_chunks_give_the_gqa_paths_bits_and_short_ones_the_absorbed() {
    let mut random = Random::new();
    let mut expanded = 0;
    for _ in 0..6 {
        let case = Case { tokens: 200, ..Case::random(&mut random, true) };
        let s = case.shape;
        let case = Case {
            q: random.floats(200 * case.q_width()),
            kv: random.floats(200 * s.latent),
            k_rope: random.floats(200 * s.rope),
            ..case
        };
        let up = case.up(&mut random).unwrap();
        // (rows, context): whole prompts, a prompt's later chunks, decode of one to four rows.
        let mut sequences = [(130, 130), (1 + random.below(40), 150), (70, 200), (1, 65), (4, 90), (1, 1)];
        for i in (1..sequences.len()).rev() {
            sequences.swap(i, random.below(i + 1));
        }
        let blocks = random.shuffled(sequences.iter().map(|s| blocks_for(s.1)).sum::<usize>() + 2);
        let mut free = blocks.iter().copied();
        let sequences: Vec<(usize, usize, Vec<u32>)> = sequences
            .iter()
            .map(|&(rows, context)| (rows, context, free.by_ref().take(blocks_for(context)).collect()))
            .collect();
        let before = sequences
            .iter()
            .filter(|s| s.1 > s.0)
            .map(|(rows, context, b)| (context - rows, context - rows, b.clone()));
        let steps = [spans(&before.collect::<Vec<_>>()), spans(&sequences)];
        let (n, most) = (steps[1].rows(), steps[0].rows().max(steps[1].rows()));
        let grouped = Layout::Grouped { groups: s.groups, nope: s.nope, rope: s.rope, value: s.value };
        let (kv_width, out_width) = (s.groups * (s.nope + s.value), s.heads * s.value);
        let mut results = vec![];
        for mut b in variants() {
            let matrix = up.matrix(&b, Reduction::Whole);
            let (table, nan) = (case.table(&b), |cols: usize| tensor(&b, &vec![f32::NAN; most * cols], cols));
            let (mut turned, mut kv_out) = (nan(case.q_width()), nan(kv_width));
            let (mut query, mut between) = (nan(case.attend_width()), nan(s.heads * s.latent));
            let mut outs = [nan(out_width), nan(out_width), nan(out_width)];
            let mut latents = b.cache(case.layout(), blocks.len()).unwrap();
            let mut groups = b.cache(grouped, blocks.len()).unwrap();
            latents.fill(f32::NAN);
            groups.fill(f32::NAN);
            let mut q = None;
            for batch in &steps {
                b.begin(batch).unwrap();
                let (x, kv) = (picked(&b, batch, &case.q, case.q_width()), picked(&b, batch, &case.kv, s.latent));
                let key = picked(&b, batch, &case.k_rope, s.rope);
                let (view, k_rope) = (View::new(&kv, 0, s.latent), View::new(&key, 0, s.rope));
                b.append_latent(&s, &table, (view, None), k_rope, None, 0.0, &mut latents).unwrap();
                b.linear(&matrix, None, view, &mut kv_out).unwrap();
                let (kv, whole) = (View::new(&kv_out, 0, kv_width), View::new(&x, 0, case.q_width()));
                b.rope_append_grouped(&s, &table, whole, kv, Some(k_rope), &mut turned, &mut groups).unwrap();
                q = Some(x);
            }
            let q = View::new(q.as_ref().unwrap(), 0, case.q_width());
            b.attend_grouped(&s, &turned, &groups, &mut outs[0]).unwrap();
            for (out, expand) in outs[1..].iter_mut().zip([false, true]) {
                let s = AttentionShape { expand, ..s };
                let mut steps_of = |b: &mut CpuBackend| {
                    b.absorb_query(&s, &table, &matrix, q, &mut query).unwrap();
                    b.attend_absorbed(&s, &matrix, &query, &latents, &mut between, out).unwrap();
                    let absorbed = b.read(out, n).unwrap();
                    b.attend_expanded(&s, &table, &matrix, q, &latents, out).unwrap();
                    absorbed
                };
                let absorbed = steps_of(&mut b);
                for span in &steps[1].spans {
                    let rows = &absorbed[span.first * out_width..][..span.rows * out_width];
                    let left = s.expands(span.rows, span.context);
                    assert!(rows.iter().all(|x| x.is_nan() == left), "{s:?}: {span:?}");
                    expanded += usize::from(left);
                }
            }
            let [gqa, absorb, both] = outs.map(|out| b.read(&out, n).unwrap());
            close(&both, &absorb.iter().map(|&x| f64::from(x)).collect::<Vec<_>>(), 1e-5);
            let s = AttentionShape { expand: true, ..s };
            for span in &steps[1].spans {
                let rows = span.first * out_width..(span.first + span.rows) * out_width;
                let want = if s.expands(span.rows, span.context) { &gqa } else { &absorb };
                assert_eq!(bits(&both[rows.clone()]), bits(&want[rows]), "{s:?}: {span:?}");
            }
            results.push(bits(&both));
        }
        assert!(results.iter().all(|r| *r == results[0]), "{s:?}");
    }
    assert!(expanded > 0);
}

#[test]
fn a_chunk_is_expanded_where_that_is_less_work() {
    // Canonical, GLM-4.7-Flash at G=4, DeepSeek-V3: rows from which a chunk of a long context is expanded.
    for (heads, groups, nope, value, from) in [(128, 8, 128, 128, 11), (20, 4, 192, 256, 80), (128, 128, 128, 128, 171)]
    {
        let shape = AttentionShape {
            heads,
            groups,
            first_head_in_group: 0,
            heads_per_group: heads / groups,
            nope,
            rope: 64,
            value,
            latent: 512,
            scale: 1.0,
            expand: true,
        };
        let context = 100_000;
        let first = (1..context).find(|&rows| shape.expands(rows, context)).unwrap();
        assert!(first.abs_diff(from) <= 2, "{heads} heads, {groups} groups: from {first} rows on");
        assert!((first..2000).all(|rows| shape.expands(rows, context)));
        // A prompt's first chunk needs no more keys than it has rows.
        assert!((5..600).all(|rows| shape.expands(rows, rows)));
        assert!((1..=4).all(|rows| !shape.expands(rows, rows) && !shape.expands(rows, context)));
        assert!(!AttentionShape { expand: false, ..shape }.expands(600, 600));
    }
}

#[test]
fn a_cache_takes_what_its_layout_says() {
    let b = backend_of(Isa::detect(), 1, 1);
    for layout in [
        Layout::Grouped { groups: 3, nope: 17, rope: 6, value: 5 },
        Layout::Grouped { groups: 1, nope: 128, rope: 0, value: 128 },
        Layout::Latent { latent: 33, rope: 4 },
    ] {
        let cache = b.cache(layout, 7).unwrap();
        assert_eq!(b.cache_bytes(&cache), 7 * BLOCK * layout.elements() * 4);
    }
}

#[test]
fn blocks_and_positions_beyond_the_end_are_refused() {
    let mut random = Random::new();
    let case = Case { tokens: 3, ..Case::random(&mut random, false) };
    let mut b = backend();
    let mut cache = b.cache(case.layout(), 2).unwrap();
    b.begin(&spans(&[(1, 1, vec![2])])).unwrap();
    let q = b.tensor(1, case.q_width()).unwrap();
    let mut out = b.tensor(1, case.out_width()).unwrap();
    assert!(b.attend_grouped(&case.shape, &q, &cache, &mut out).is_err());
    b.begin(&spans(&[(1, 9, vec![0])])).unwrap();
    let s = &case.shape;
    let kv = b.tensor(1, s.groups * (s.nope + s.value)).unwrap();
    let key = b.tensor(1, s.rope.max(1)).unwrap();
    let k_rope = (s.rope > 0).then(|| View::new(&key, 0, s.rope));
    let (q, kv) = (View::new(&q, 0, case.q_width()), View::new(&kv, 0, kv.cols()));
    let mut turned = b.tensor(1, case.q_width()).unwrap();
    assert!(b.rope_append_grouped(s, &case.table(&b), q, kv, k_rope, &mut turned, &mut cache).is_err());
}
