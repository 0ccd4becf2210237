//! What the CPU backend reaches of the machine: `cargo bench --bench cpu`.
//!
//! Decode: an 8B-shaped stack of layers with random bf16 weights at batch 1 (attention over a short context included),
//! its weights' bytes a second beside the read bandwidth that the same run measures. Prefill: the same layers at 512
//! rows, beside the fused multiply-adds a second that the same run measures. Figures are the best of several rounds,
//! the two sides of a comparison taken in turn, since other work on the machine disturbs either.

use std::hint::black_box;
use std::time::Instant;

use gqla::backend::cpu::simd::{Isa, Kernel, Simd};
use gqla::backend::cpu::{Cache, CpuBackend, Matrix, RopeTable, Rows, Tensor, fair_threads, read_bandwidth};
use gqla::backend::{AttentionShape, Backend, Batch, Reduction, Span, View};
use gqla::cache::{BLOCK, Layout};
use gqla::comm::one::OneComm;
use gqla::config::{Rope, RopeScaling};

const HIDDEN: usize = 4096;
const WIDTH: usize = 14336;
const HEADS: usize = 32;
const GROUPS: usize = 8;
const HEAD: usize = 128;
/// 3.5 GB of weights: several times a large last-level cache.
const LAYERS: usize = 8;
const PREFILL: usize = 512;
const CONTEXT: usize = 512;

/// Small made-up bf16 weights, `[rows, cols]`.
struct MadeUp(usize, usize);

impl Rows for MadeUp {
    fn rows(&self) -> usize {
        self.0
    }
    fn cols(&self) -> usize {
        self.1
    }
    fn is_bf16(&self) -> bool {
        true
    }
    fn read_bf16(&self, row: usize, out: &mut [u16]) {
        let mut state = row as u64 ^ 0x9E37_79B9_7F4A_7C15;
        for x in out {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            // ±2⁻⁶ to 2⁻⁵.
            *x = (state >> 48) as u16 & 0x807F | 0x3C80;
        }
    }
    fn read_f32(&self, row: usize, out: &mut [f32]) {
        let mut bits = vec![0; out.len()];
        self.read_bf16(row, &mut bits);
        out.iter_mut().zip(bits).for_each(|(o, b)| *o = f32::from_bits((b as u32) << 16));
    }
}

struct Layer {
    qkv: Matrix,
    o: Matrix,
    gate_up: Matrix,
    down: Matrix,
    cache: Cache,
}

struct Stack {
    b: CpuBackend,
    layers: Vec<Layer>,
    norm: Vec<f32>,
    table: RopeTable,
    shape: AttentionShape,
}

/// Buffers of one step.
struct Buffers {
    x: Tensor,
    h: Tensor,
    qkv: Tensor,
    q: Tensor,
    attended: Tensor,
    partial: Tensor,
    gate_up: Tensor,
    act: Tensor,
}

impl Stack {
    fn new(threads: usize) -> Stack {
        let b = CpuBackend::new(Box::new(OneComm::new()), threads).unwrap();
        let matrix = |rows, cols, reduction| b.matrix_of(&[MadeUp(rows, cols)], reduction).unwrap();
        let layout = Layout::Grouped { groups: GROUPS, nope: HEAD, rope: 0, value: HEAD };
        let layers = (0..LAYERS)
            .map(|_| Layer {
                qkv: matrix((HEADS + 2 * GROUPS) * HEAD, HIDDEN, Reduction::Whole),
                o: matrix(HIDDEN, HEADS * HEAD, Reduction::Split),
                gate_up: matrix(2 * WIDTH, HIDDEN, Reduction::Whole),
                down: matrix(HIDDEN, WIDTH, Reduction::Split),
                cache: b.cache(layout, (CONTEXT + PREFILL).div_ceil(BLOCK)).unwrap(),
            })
            .collect();
        let rope = Rope { theta: 5e5, interleave: false, scaling: RopeScaling::Default };
        let inv_freq: Vec<f64> = (0..HEAD / 2).map(|i| 5e5f64.powf(-(i as f64) / (HEAD / 2) as f64)).collect();
        let table = b.rope_table(&rope, &inv_freq, 1.0, CONTEXT + PREFILL).unwrap();
        let shape = AttentionShape {
            heads: HEADS,
            groups: GROUPS,
            first_head_in_group: 0,
            heads_per_group: HEADS / GROUPS,
            nope: HEAD,
            rope: 0,
            value: HEAD,
            latent: 0,
            scale: (HEAD as f32).powf(-0.5),
            expand: false,
        };
        Stack { b, layers, norm: vec![1.0; HIDDEN], table, shape }
    }

    fn bytes(&self) -> usize {
        self.layers.iter().map(|l| [&l.qkv, &l.o, &l.gate_up, &l.down].map(Matrix::bytes).iter().sum::<usize>()).sum()
    }

    fn buffers(&self, rows: usize) -> Buffers {
        let t = |cols| self.b.tensor(rows, cols).unwrap();
        Buffers {
            x: t(HIDDEN),
            h: t(HIDDEN),
            qkv: t((HEADS + 2 * GROUPS) * HEAD),
            q: t(HEADS * HEAD),
            attended: t(HEADS * HEAD),
            partial: t(HIDDEN),
            gate_up: t(2 * WIDTH),
            act: t(WIDTH),
        }
    }

    /// One step of `rows` tokens that end at `context`; returns its seconds.
    fn step(&mut self, t: &mut Buffers, rows: usize, context: usize) -> f64 {
        let blocks = (0..context.div_ceil(BLOCK) as u32).collect();
        let b = &mut self.b;
        b.begin(&Batch {
            tokens: vec![0; rows],
            positions: (context - rows..context).map(|p| p as u32).collect(),
            spans: vec![Span { first: 0, rows, context, blocks }],
            ..Batch::default()
        })
        .unwrap();
        t.x.data_mut().iter_mut().enumerate().for_each(|(i, x)| *x = (i % 17) as f32 / 17.0 - 0.5);
        let kv = 2 * GROUPS * HEAD;
        let start = Instant::now();
        b.norm(&t.x, &self.norm, 1e-5, &mut t.h).unwrap();
        for l in &mut self.layers {
            b.linear(&l.qkv, None, View::new(&t.h, 0, HIDDEN), &mut t.qkv).unwrap();
            let (q, kv) = (View::new(&t.qkv, 0, HEADS * HEAD), View::new(&t.qkv, HEADS * HEAD, kv));
            b.rope_append_grouped(&self.shape, &self.table, q, kv, None, &mut t.q, &mut l.cache).unwrap();
            b.attend_grouped(&self.shape, &t.q, &l.cache, &mut t.attended).unwrap();
            b.linear(&l.o, None, View::new(&t.attended, 0, HEADS * HEAD), &mut t.partial).unwrap();
            b.all_reduce_add_norm(&mut t.partial, None, &mut t.x, &self.norm, 1e-5, &mut t.h).unwrap();
            b.linear(&l.gate_up, None, View::new(&t.h, 0, HIDDEN), &mut t.gate_up).unwrap();
            b.silu_mul(&t.gate_up, WIDTH, &mut t.act).unwrap();
            b.linear(&l.down, None, View::new(&t.act, 0, WIDTH), &mut t.partial).unwrap();
            b.all_reduce_add_norm(&mut t.partial, None, &mut t.x, &self.norm, 1e-5, &mut t.h).unwrap();
        }
        let seconds = start.elapsed().as_secs_f64();
        assert!(t.h.data()[..rows * HIDDEN].iter().all(|x| x.is_finite()));
        seconds
    }

    /// Before timing: a few outputs of a large product against f64.
    fn prove(&mut self) {
        let mut t = self.buffers(1);
        self.step(&mut t, 1, 1);
        let mut row = vec![0.0; HIDDEN];
        for out in [0, 1, 777, 2 * WIDTH - 1] {
            // The last layer's input was normed away; multiply what is there now.
            self.b.linear(&self.layers[LAYERS - 1].gate_up, None, View::new(&t.h, 0, HIDDEN), &mut t.gate_up).unwrap();
            MadeUp(2 * WIDTH, HIDDEN).read_f32(out, &mut row);
            let want: f64 = row.iter().zip(t.h.data()).map(|(&w, &x)| w as f64 * x as f64).sum();
            let got = t.gate_up.data()[out] as f64;
            assert!((got - want).abs() < 1e-4, "output {out} is {got} and not {want}");
        }
    }
}

/// Multiply-adds in registers.
struct Peak(usize);

impl Kernel for Peak {
    type Out = f32;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let mut sums = [s.zero(); 12];
        let (a, c) = (s.splat(black_box(0.999)), s.splat(black_box(0.001)));
        for _ in 0..self.0 {
            for sum in &mut sums {
                *sum = s.fma(*sum, a, c);
            }
        }
        let mut total = 0.0;
        for sum in sums {
            total += s.sum(sum);
        }
        total
    }
}

/// Multiply-adds (two operations each) a second on all threads.
fn peak(threads: usize, isa: Isa) -> f64 {
    let rounds = 3_000_000;
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| black_box(isa.run(Peak(rounds))));
        }
    });
    (threads * rounds * 12 * 16 * 2) as f64 / start.elapsed().as_secs_f64()
}

fn best(rounds: usize, mut one: impl FnMut() -> f64) -> f64 {
    (0..rounds).map(|_| one()).fold(f64::INFINITY, f64::min)
}

fn main() {
    let threads = fair_threads(1);
    let mut stack = Stack::new(threads);
    let isa = stack.b.isa();
    let bytes = stack.bytes();
    println!("{threads} threads, {isa}; {LAYERS} layers of 8B shape, {:.2} GB of bf16 weights", bytes as f64 / 1e9);
    stack.prove();

    let mut one = stack.buffers(1);
    let (mut seconds, mut read) = (f64::INFINITY, 0f64);
    for _ in 0..4 {
        read = read.max(read_bandwidth(threads, 2 << 30).unwrap());
        seconds = seconds.min(best(3, || stack.step(&mut one, 1, CONTEXT)));
    }
    let reached = bytes as f64 / seconds;
    println!(
        "decode, batch 1, context {CONTEXT}: {:.1} ms a step, weights {:.1} GB/s of {:.1} GB/s read: {:.0} %",
        seconds * 1e3,
        reached / 1e9,
        read / 1e9,
        100.0 * reached / read
    );
    for rows in [2, 4, 8, 16, 64, PREFILL] {
        let mut many = stack.buffers(rows);
        let (mut seconds, mut flops) = (f64::INFINITY, 0f64);
        for _ in 0..2 {
            flops = flops.max(peak(threads, isa));
            seconds = seconds.min(best(1, || stack.step(&mut many, rows, rows)));
        }
        let reached = (bytes / 2 * 2 * rows) as f64 / seconds;
        println!(
            "prefill, {rows} rows: {:.0} ms, {:.0} GFLOP/s of {:.0} in multiply-adds: {:.0} %; weights {:.1} GB/s",
            seconds * 1e3,
            reached / 1e9,
            flops / 1e9,
            100.0 * reached / flops,
            bytes as f64 / seconds / 1e9
        );
    }
}
