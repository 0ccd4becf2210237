//! Vectors of 16 logical lanes on every instruction set, and the choice of one at run time.
//!
//! Every implementation does the same lane-wise IEEE operations in the same order, fused multiply-adds included, so a
//! kernel gives the same bits on AVX-512, AVX2, NEON and in portable code.

#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::fmt;

/// `for $i in 0..$n` for a constant `$n` of at most 8, written out: a loop over an array of vectors would keep the
/// array in memory instead of registers.
macro_rules! unroll {
    ($i:ident in 0..$n:expr => $body:expr) => {
        $crate::backend::cpu::simd::unroll!(@ $i, $n, $body, 0 1 2 3 4 5 6 7)
    };
    (@ $i:ident, $n:expr, $body:expr, $($k:literal)*) => {{
        $(if $k < $n {
            #[allow(non_upper_case_globals)]
            const $i: usize = $k;
            $body;
        })*
    }};
}
pub(super) use unroll;

/// Lanes of a vector.
pub const LANES: usize = 16;

/// 16 lanes of f32. Implementations are zero-sized tokens that exist only where their instructions do.
pub trait Simd: Copy {
    /// The lanes.
    type V: Copy;
    /// There are registers for about 24 accumulators (else about 8).
    const WIDE: bool;

    /// Every lane `x`.
    fn splat(self, x: f32) -> Self::V;
    /// 16 floats.
    ///
    /// # Safety
    /// `p` is readable for 16 elements.
    unsafe fn load(self, p: *const f32) -> Self::V;
    /// The first `n < 16` floats, other lanes 0.
    ///
    /// # Safety
    /// `p` is readable for `n` elements.
    unsafe fn load_first(self, p: *const f32, n: usize) -> Self::V;
    /// 16 bf16, widened.
    ///
    /// # Safety
    /// `p` is readable for 16 elements.
    unsafe fn load_bf16(self, p: *const u16) -> Self::V;
    /// The first `n < 16` bf16, widened, other lanes 0.
    ///
    /// # Safety
    /// `p` is readable for `n` elements.
    unsafe fn load_bf16_first(self, p: *const u16, n: usize) -> Self::V;
    /// Writes 16 floats.
    ///
    /// # Safety
    /// `p` is writable for 16 elements.
    unsafe fn store(self, p: *mut f32, v: Self::V);
    /// Writes the first `n < 16` lanes.
    ///
    /// # Safety
    /// `p` is writable for `n` elements.
    unsafe fn store_first(self, p: *mut f32, n: usize, v: Self::V);
    /// `a·b + c`, rounded once.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `a + b`.
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a − b`.
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a · b`.
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a / b`.
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a > b ? a : b`, so `b` where either is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a < b ? a : b`, so `b` where either is NaN.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// The first `n` lanes of `v`, the others of `other`.
    fn first(self, v: Self::V, n: usize, other: Self::V) -> Self::V;
    /// `2^n` from `n + 1.5·2²³` (the sum holds the integer n in its low bits), `-126 <= n <= 127`.
    fn pow2(self, biased: Self::V) -> Self::V;
    /// The sum of the lanes: lanes i and i+8, then i and i+4, i and i+2, i and i+1.
    fn sum(self, v: Self::V) -> f32;
    /// The largest lane, folded like [`sum`](Simd::sum).
    fn largest(self, v: Self::V) -> f32;

    /// Every lane 0.
    #[inline(always)]
    fn zero(self) -> Self::V {
        self.splat(0.0)
    }

    /// `e^x` to about 1 ulp; arguments are clamped to −87.33..88.37, NaN stays NaN.
    #[inline(always)]
    fn exp(self, x: Self::V) -> Self::V {
        const BIAS: f32 = 12_582_912.0; // 1.5·2²³: adding it rounds to an integer
        let x = self.min(self.splat(88.37), self.max(self.splat(-87.33), x));
        let biased = self.fma(x, self.splat(std::f32::consts::LOG2_E), self.splat(BIAS));
        let n = self.sub(biased, self.splat(BIAS));
        // ln 2 in two parts, the first exact in few bits.
        let r = self.fma(n, self.splat(-0.693_359_4), x);
        let r = self.fma(n, self.splat(2.121_944_4e-4), r);
        let mut p = self.splat(1.987_569_1e-4);
        for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_65, 0.5] {
            p = self.fma(p, r, self.splat(c));
        }
        let p = self.fma(self.mul(p, r), r, r);
        self.mul(self.add(p, self.splat(1.0)), self.pow2(biased))
    }
}

/// Elements that weights and caches are kept in.
pub trait Element: Copy + Send + Sync + 'static {
    /// 16 elements as f32.
    ///
    /// # Safety
    /// `p` is readable for 16 elements.
    unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::V;
    /// The first `n < 16` elements as f32, other lanes 0.
    ///
    /// # Safety
    /// `p` is readable for `n` elements.
    unsafe fn load_first<S: Simd>(s: S, p: *const Self, n: usize) -> S::V;
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const f32) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { s.load(p) }
    }
    #[inline(always)]
    unsafe fn load_first<S: Simd>(s: S, p: *const f32, n: usize) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { s.load_first(p, n) }
    }
}

/// bf16 bits.
impl Element for u16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const u16) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { s.load_bf16(p) }
    }
    #[inline(always)]
    unsafe fn load_first<S: Simd>(s: S, p: *const u16, n: usize) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { s.load_bf16_first(p, n) }
    }
}

/// Work compiled once for each instruction set. `run` must be `#[inline(always)]`, and so must what it calls: only
/// then is it compiled with the instructions of its caller.
pub trait Kernel {
    /// What it returns.
    type Out;
    /// The work.
    fn run<S: Simd>(self, s: S) -> Self::Out;
}

/// An instruction set that this machine has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Isa(Kind);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "aarch64")]
    Neon,
    Portable,
}

impl Isa {
    /// The fastest that this machine has.
    pub fn detect() -> Isa {
        Isa::available()[0]
    }

    /// All that this machine has, fastest first. Results do not depend on which is taken.
    pub fn available() -> Vec<Isa> {
        let mut all = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let fma = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            if fma
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
            {
                all.push(Isa(Kind::Avx512));
            }
            if fma {
                all.push(Isa(Kind::Avx2));
            }
        }
        #[cfg(target_arch = "aarch64")]
        if std::arch::is_aarch64_feature_detected!("neon") {
            all.push(Isa(Kind::Neon));
        }
        all.push(Isa(Kind::Portable));
        all
    }

    /// Runs `kernel` with this instruction set.
    #[inline]
    pub fn run<K: Kernel>(self, kernel: K) -> K::Out {
        match self.0 {
            // SAFETY: an Isa is made by `available` alone, which has seen these features on this machine.
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => unsafe { x86::avx512(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => unsafe { x86::avx2(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "aarch64")]
            Kind::Neon => unsafe { neon::neon(kernel) },
            Kind::Portable => kernel.run(portable::Portable),
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => "avx2",
            #[cfg(target_arch = "aarch64")]
            Kind::Neon => "neon",
            Kind::Portable => "portable",
        })
    }
}
