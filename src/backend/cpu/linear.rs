//! Products with weight matrices, whose bits depend on nothing but the row and the weights.
//!
//! `out[r][n] = x[r]·w[n]` is taken alike for every row and output, however many of them there are: 16 lanes, lane i
//! summing elements i, i+16, … in order with fused multiply-adds, the last partial vector padded with zeroes, and the
//! lanes folded in a fixed order ([`Simd::sum`]). Blocking only decides which dots are under way together.
//!
//! **World sizes.** A `Split` matrix has its columns on several ranks. The whole reduction is cut into [`SEGMENTS`]
//! pieces, a dot each, and the pieces are summed as a binary tree. A rank of W = 1, 2, 4 or 8 has 8/W of the pieces, a
//! whole subtree; the communicator's tree over ranks is the rest. Every such W gives the same bits.

use super::Workers;
use super::buffer::{Data, Matrix, Shared, with_scratch};
use super::simd::{Element, Isa, Kernel, LANES, Simd, unroll};

/// Pieces that a split reduction has in the whole world.
pub(super) const SEGMENTS: usize = 8;

/// Rows taken together; their inputs stay in the second-level cache.
pub(super) const ROW_BLOCK: usize = 96;
/// Outputs taken together in the blocked product.
const OUT_BLOCK: usize = 128;
/// Elements of the reduction taken together in the blocked product.
const DEPTH: usize = 512;

/// Pieces of a split reduction that one of `world` ranks has.
pub(super) fn local_segments(world: usize) -> usize {
    match world {
        1 | 2 | 4 | 8 => SEGMENTS / world,
        _ => 1,
    }
}

/// Input rows: row r is `data[offsets[r]..][..cols]`.
#[derive(Clone, Copy)]
pub(super) struct Input<'a> {
    pub data: &'a [f32],
    pub offsets: &'a [usize],
}

/// Outputs `first .. first + count` of a matrix.
#[derive(Clone, Copy)]
pub(super) struct Outputs {
    pub first: usize,
    pub count: usize,
}

/// A whole product: `out[targets[r] + n] = x[r]·w[first + n] (+ bias[n])` for the outputs asked for.
pub(super) struct Product<'a> {
    pub x: Input<'a>,
    pub weights: &'a Matrix,
    pub outputs: Outputs,
    pub bias: Option<&'a [f32]>,
    pub out: Shared<'a, f32>,
    pub targets: &'a [usize],
}

impl Product<'_> {
    /// Computes it with all workers.
    ///
    /// # Safety
    /// `out[t..][..outputs.count]` for each `t` of `targets` are disjoint, and nothing else refers to them.
    pub unsafe fn compute(&self, workers: &Workers, isa: Isa) {
        let rows = self.x.offsets.len();
        assert_eq!(rows, self.targets.len());
        assert!(self.bias.is_none_or(|b| b.len() == self.outputs.count));
        let strip = strip(workers, isa, rows, self.weights, self.outputs.count);
        let strips = self.outputs.count.div_ceil(strip);
        let row_blocks = rows.div_ceil(ROW_BLOCK);
        // Blocks of even height: a last one of a few rows would convert its weights for little.
        let height = rows.div_ceil(row_blocks.max(1)).next_multiple_of(6);
        workers.run(strips * row_blocks, rows * self.outputs.count * self.weights.cols, |task| {
            let (r0, n0) = (task / strips * height, task % strips * strip);
            let rows = r0.min(rows)..(r0 + height).min(rows);
            let count = strip.min(self.outputs.count - n0);
            let x = Input { data: self.x.data, offsets: &self.x.offsets[rows.clone()] };
            let outputs = Outputs { first: self.outputs.first + n0, count };
            dots(isa, x, self.weights, outputs, self.weights.segments, |dots| {
                if let Some(bias) = self.bias {
                    // To the first piece: a bias that rank 0 alone adds is then the same at every world size.
                    for row in dots[..rows.len() * count].chunks_exact_mut(count) {
                        row.iter_mut().zip(&bias[n0..]).for_each(|(d, b)| *d += b);
                    }
                }
                tree(dots, rows.len() * count, self.weights.segments);
                for (dots, r) in dots.chunks_exact(count).zip(rows.clone()) {
                    // SAFETY: this task's rows and columns, which the caller keeps apart from all others.
                    unsafe { self.out.slice(self.targets[r] + n0, count) }.copy_from_slice(dots);
                }
            });
        });
    }
}

/// Outputs a task takes: enough to stream from memory, few enough to share among the workers.
fn strip(workers: &Workers, isa: Isa, rows: usize, weights: &Matrix, outputs: usize) -> usize {
    let most =
        if rows <= direct_rows(isa) { ((512 << 10) / (weights.cols.max(1) * 2)).clamp(8, 512) } else { OUT_BLOCK };
    let shared = outputs.div_ceil(4 * workers.threads());
    most.min(shared).next_multiple_of(8).max(8)
}

/// Sums `segments` runs of `width` values as a binary tree into the first.
pub(super) fn tree(values: &mut [f32], width: usize, segments: usize) {
    let mut step = 1;
    while step < segments {
        for s in (0..segments).step_by(2 * step) {
            let (left, right) = values.split_at_mut((s + step) * width);
            for (l, r) in left[s * width..][..width].iter_mut().zip(right) {
                *l += *r;
            }
        }
        step *= 2;
    }
}

/// Dots of every input row (at most [`ROW_BLOCK`]) with some outputs, a piece of the reduction apart: hands `then`
/// `[segments, rows, outputs.count]`.
pub(super) fn dots<T>(
    isa: Isa,
    x: Input,
    weights: &Matrix,
    outputs: Outputs,
    segments: usize,
    then: impl FnOnce(&mut [f32]) -> T,
) -> T {
    let (rows, cols) = (x.offsets.len(), weights.cols);
    assert!(rows <= ROW_BLOCK && cols % segments == 0 && outputs.first + outputs.count <= weights.rows);
    assert!(x.offsets.iter().all(|o| o + cols <= x.data.len()));
    let blocked = rows > direct_rows(isa);
    let depth = (cols / segments).min(DEPTH).next_multiple_of(LANES);
    let scratch = |size: usize| if blocked { size } else { 0 };
    let sizes = [
        segments * rows * outputs.count,
        scratch(outputs.count * depth),
        scratch(rows * depth),
        scratch(rows * outputs.count * LANES),
    ];
    with_scratch(sizes, |[dots, w_pack, x_pack, sums]| {
        match &weights.data {
            Data::Bf16(w) => isa.run(Dots { x, w: &w[..], cols, outputs, segments, depth, dots, w_pack, x_pack, sums }),
            Data::F32(w) => isa.run(Dots { x, w: &w[..], cols, outputs, segments, depth, dots, w_pack, x_pack, sums }),
        }
        then(dots)
    })
}

/// Rows up to which weights are used as they stream by rather than converted into a block first.
fn direct_rows(isa: Isa) -> usize {
    struct Rows;
    impl Kernel for Rows {
        type Out = usize;
        #[inline(always)]
        fn run<S: Simd>(self, _: S) -> usize {
            if S::WIDE { 24 } else { 1 }
        }
    }
    isa.run(Rows)
}

/// The arguments of [`dots`], checked there.
struct Dots<'a, E> {
    x: Input<'a>,
    w: &'a [E],
    cols: usize,
    outputs: Outputs,
    segments: usize,
    depth: usize,
    dots: &'a mut [f32],
    w_pack: &'a mut [f32],
    x_pack: &'a mut [f32],
    sums: &'a mut [f32],
}

impl<E: Element> Kernel for Dots<'_, E> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        // SAFETY: `dots` has checked every extent.
        unsafe {
            if self.w_pack.is_empty() {
                direct(s, &mut self);
            } else {
                blocked(s, &mut self);
            }
        }
    }
}

/// `sums[r][n] += x[r]·w[n]` lane by lane over `k` elements: the one inner loop of all products.
///
/// # Safety
/// Every pointer is readable for `k` elements.
#[inline(always)]
pub(super) unsafe fn tile<S: Simd, E: Element, const R: usize, const N: usize>(
    s: S,
    x: [*const f32; R],
    w: [*const E; N],
    k: usize,
    sums: &mut [[S::V; N]; R],
) {
    let mut acc = *sums;
    let mut i = 0;
    while i + LANES <= k {
        let mut wide = [s.zero(); N];
        // SAFETY: i + 16 <= k.
        unroll!(n in 0..N => wide[n] = unsafe { E::load(s, w[n].add(i)) });
        unroll!(r in 0..R => {
            // SAFETY: as above.
            let x = unsafe { s.load(x[r].add(i)) };
            unroll!(n in 0..N => acc[r][n] = s.fma(x, wide[n], acc[r][n]));
        });
        i += LANES;
    }
    if i < k {
        let mut wide = [s.zero(); N];
        // SAFETY: k − i elements are left.
        unroll!(n in 0..N => wide[n] = unsafe { E::load_first(s, w[n].add(i), k - i) });
        unroll!(r in 0..R => {
            // SAFETY: as above.
            let x = unsafe { s.load_first(x[r].add(i), k - i) };
            unroll!(n in 0..N => acc[r][n] = s.fma(x, wide[n], acc[r][n]));
        });
    }
    *sums = acc;
}

/// Few rows: the weights are read once, as they are, each row of them in one go.
///
/// # Safety
/// The extents that [`dots`] checks.
#[inline(always)]
unsafe fn direct<S: Simd, E: Element>(s: S, job: &mut Dots<E>) {
    let (rows, outs) = (job.x.offsets.len(), job.outputs.count);
    let mut n = 0;
    while n < outs {
        let mut r = 0;
        let wide = S::WIDE && rows <= 2 && outs - n >= 8;
        let step = if wide {
            8
        } else if outs - n >= 4 {
            4
        } else {
            1
        };
        while r < rows {
            // SAFETY: r and n stay inside; `direct_tile` takes as many rows and outputs as its parameters say.
            unsafe {
                match (step, rows - r) {
                    (8, 1) => direct_tile::<S, E, 1, 8>(s, job, r, n),
                    (8, _) => direct_tile::<S, E, 2, 8>(s, job, r, n),
                    (4, 1) => direct_tile::<S, E, 1, 4>(s, job, r, n),
                    (4, 2) => direct_tile::<S, E, 2, 4>(s, job, r, n),
                    (4, 3) => direct_tile::<S, E, 3, 4>(s, job, r, n),
                    (4, 4) => direct_tile::<S, E, 4, 4>(s, job, r, n),
                    (4, 5) => direct_tile::<S, E, 5, 4>(s, job, r, n),
                    (4, _) => direct_tile::<S, E, 6, 4>(s, job, r, n),
                    _ => direct_tile::<S, E, 1, 1>(s, job, r, n),
                }
            }
            r += match step {
                8 => 2,
                4 => 6,
                _ => 1,
            };
        }
        n += step;
    }
}

/// Dots of `R` rows from `r` with `N` outputs from `n`.
///
/// # Safety
/// `r + R` and `n + N` are inside the job.
#[inline(always)]
unsafe fn direct_tile<S: Simd, E: Element, const R: usize, const N: usize>(
    s: S,
    job: &mut Dots<E>,
    r: usize,
    n: usize,
) {
    let (rows, outs) = (job.x.offsets.len(), job.outputs.count);
    let length = job.cols / job.segments;
    for segment in 0..job.segments {
        let mut x = [std::ptr::null(); R];
        // SAFETY: checked by `dots`.
        unroll!(i in 0..R => x[i] = unsafe { job.x.data.as_ptr().add(job.x.offsets[r + i] + segment * length) });
        let mut w = [std::ptr::null(); N];
        let first = (job.outputs.first + n) * job.cols + segment * length;
        // SAFETY: checked by `dots`.
        unroll!(j in 0..N => w[j] = unsafe { job.w.as_ptr().add(first + j * job.cols) });
        let mut sums = [[s.zero(); N]; R];
        // SAFETY: `length` elements of the segment.
        unsafe { tile(s, x, w, length, &mut sums) };
        unroll!(i in 0..R => unroll!(j in 0..N => {
            job.dots[(segment * rows + r + i) * outs + n + j] = s.sum(sums[i][j])
        }));
    }
}

/// Many rows: blocks of weights and inputs are laid out in cache as f32, and sums wait in lanes between blocks.
///
/// # Safety
/// The extents that [`dots`] checks.
#[inline(always)]
unsafe fn blocked<S: Simd, E: Element>(s: S, job: &mut Dots<E>) {
    let (rows, outs) = (job.x.offsets.len(), job.outputs.count);
    let length = job.cols / job.segments;
    for segment in 0..job.segments {
        let mut done = 0;
        while done < length {
            let depth = job.depth.min(length - done);
            let padded = depth.next_multiple_of(LANES);
            let first = segment * length + done;
            for n in 0..outs {
                // SAFETY: checked by `dots`; the packs hold `padded` elements a row.
                unsafe {
                    let w = job.w.as_ptr().add((job.outputs.first + n) * job.cols + first);
                    pack(s, w, depth, job.w_pack.as_mut_ptr().add(n * padded));
                }
            }
            for r in 0..rows {
                // SAFETY: as above.
                unsafe {
                    let x = job.x.data.as_ptr().add(job.x.offsets[r] + first);
                    pack(s, x, depth, job.x_pack.as_mut_ptr().add(r * padded));
                }
            }
            let part = Part { segment, padded, start: done == 0, end: done + depth == length };
            // SAFETY: as above.
            unsafe {
                if S::WIDE {
                    block_rows::<S, E, 6, 4>(s, job, part);
                } else {
                    block_rows::<S, E, 2, 2>(s, job, part);
                }
            }
            done += depth;
        }
    }
}

/// Widens `k` elements, padding with zeroes to whole vectors.
///
/// # Safety
/// `from` is readable for `k` elements, `to` writable for `k` rounded up to whole vectors.
#[inline(always)]
unsafe fn pack<S: Simd, E: Element>(s: S, from: *const E, k: usize, to: *mut f32) {
    let mut i = 0;
    while i + LANES <= k {
        // SAFETY: i + 16 <= k.
        unsafe { s.store(to.add(i), E::load(s, from.add(i))) };
        i += LANES;
    }
    if i < k {
        // SAFETY: k − i elements are left, and the target is padded.
        unsafe { s.store(to.add(i), E::load_first(s, from.add(i), k - i)) };
    }
}

/// A piece of a blocked reduction.
#[derive(Clone, Copy)]
struct Part {
    segment: usize,
    /// Elements a packed row has.
    padded: usize,
    /// The segment's first piece: sums start at zero.
    start: bool,
    /// Its last: the lanes are folded.
    end: bool,
}

/// All tiles of a packed block, `R` rows by `N` outputs at a time, the rest in smaller ones.
///
/// # Safety
/// The packs hold every row and output of the job.
#[inline(always)]
unsafe fn block_rows<S: Simd, E: Element, const R: usize, const N: usize>(s: S, job: &mut Dots<E>, part: Part) {
    let rows = job.x.offsets.len();
    let mut r = 0;
    // SAFETY: each loop stays inside the rows.
    unsafe {
        while r + R <= rows {
            block_outs::<S, E, R, N>(s, job, part, r);
            r += R;
        }
        while R > 3 && r + 3 <= rows {
            block_outs::<S, E, 3, N>(s, job, part, r);
            r += 3;
        }
        while r < rows {
            block_outs::<S, E, 1, N>(s, job, part, r);
            r += 1;
        }
    }
}

/// The tiles of `R` rows.
///
/// # Safety
/// As [`block_rows`].
#[inline(always)]
unsafe fn block_outs<S: Simd, E: Element, const R: usize, const N: usize>(
    s: S,
    job: &mut Dots<E>,
    part: Part,
    r: usize,
) {
    let mut n = 0;
    // SAFETY: each loop stays inside the outputs.
    unsafe {
        while n + N <= job.outputs.count {
            block_tile::<S, E, R, N>(s, job, part, r, n);
            n += N;
        }
        while n < job.outputs.count {
            block_tile::<S, E, R, 1>(s, job, part, r, n);
            n += 1;
        }
    }
}

/// One tile of a packed block.
///
/// # Safety
/// As [`block_rows`].
#[inline(always)]
unsafe fn block_tile<S: Simd, E: Element, const R: usize, const N: usize>(
    s: S,
    job: &mut Dots<E>,
    part: Part,
    r: usize,
    n: usize,
) {
    let (rows, outs) = (job.x.offsets.len(), job.outputs.count);
    let mut x = [std::ptr::null(); R];
    let mut w = [std::ptr::null(); N];
    let mut sums = [[s.zero(); N]; R];
    // SAFETY: the packs hold `padded` elements a row, `sums` 16 a pair, `dots` one a segment and pair.
    unsafe {
        unroll!(i in 0..R => x[i] = job.x_pack.as_ptr().add((r + i) * part.padded));
        unroll!(j in 0..N => w[j] = job.w_pack.as_ptr().add((n + j) * part.padded));
        let held = job.sums.as_mut_ptr().add((r * outs + n) * LANES);
        if !part.start {
            unroll!(i in 0..R => unroll!(j in 0..N => sums[i][j] = s.load(held.add((i * outs + j) * LANES))));
        }
        tile(s, x, w, part.padded, &mut sums);
        if part.end {
            let dots = job.dots.as_mut_ptr().add((part.segment * rows + r) * outs + n);
            unroll!(i in 0..R => unroll!(j in 0..N => *dots.add(i * outs + j) = s.sum(sums[i][j])));
        } else {
            unroll!(i in 0..R => unroll!(j in 0..N => s.store(held.add((i * outs + j) * LANES), sums[i][j])));
        }
    }
}
