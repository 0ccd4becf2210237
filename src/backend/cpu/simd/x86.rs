//! AVX-512 (one register a vector) and AVX2 with FMA (two).

use std::arch::x86_64::*;

use super::{Kernel, LANES, Simd};

/// AVX-512 F, BW and VL. The private field keeps it from being made elsewhere than in [`avx512`].
#[derive(Clone, Copy)]
pub struct Avx512(());

/// AVX2 and FMA. The private field keeps it from being made elsewhere than in [`avx2`].
#[derive(Clone, Copy)]
pub struct Avx2(());

/// Runs `kernel` compiled for AVX-512.
///
/// # Safety
/// The machine has avx512f, avx512bw, avx512vl, avx2 and fma.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma")]
pub unsafe fn avx512<K: Kernel>(kernel: K) -> K::Out {
    kernel.run(Avx512(()))
}

/// Runs `kernel` compiled for AVX2.
///
/// # Safety
/// The machine has avx2 and fma.
#[target_feature(enable = "avx2,fma")]
pub unsafe fn avx2<K: Kernel>(kernel: K) -> K::Out {
    kernel.run(Avx2(()))
}

/// The bits of 1.5·2²³ less the exponent's bias.
const POW2: i32 = 127 - 0x4B40_0000;

/// Folds 8 lanes: i and i+4, i and i+2, i and i+1.
macro_rules! fold8 {
    ($v:expr, $op:ident, $last:ident) => {{
        let v: __m256 = $v;
        let v = $op(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
        let v = $op(v, _mm_movehl_ps(v, v));
        _mm_cvtss_f32($last(v, _mm_shuffle_ps::<1>(v, v)))
    }};
}

// Every block below: SAFETY: a token exists only inside `avx512` or `avx2`, whose callers have seen the features;
// pointers are as the trait's callers promise.

impl Simd for Avx512 {
    type V = __m512;
    const WIDE: bool = true;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn load_first(self, p: *const f32, n: usize) -> __m512 {
        // SAFETY: see above; masked lanes are not read.
        unsafe { _mm512_maskz_loadu_ps(mask(n), p) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u16) -> __m512 {
        // SAFETY: see above.
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }
    #[inline(always)]
    unsafe fn load_bf16_first(self, p: *const u16, n: usize) -> __m512 {
        // SAFETY: see above; masked lanes are not read.
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask(n), p.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: __m512) {
        // SAFETY: see above.
        unsafe { _mm512_storeu_ps(p, v) }
    }
    #[inline(always)]
    unsafe fn store_first(self, p: *mut f32, n: usize, v: __m512) {
        // SAFETY: see above; masked lanes are not written.
        unsafe { _mm512_mask_storeu_ps(p, mask(n), v) }
    }
    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_min_ps(a, b) }
    }
    #[inline(always)]
    fn first(self, v: __m512, n: usize, other: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_mask_blend_ps(mask(n), other, v) }
    }
    #[inline(always)]
    fn pow2(self, biased: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe {
            let n = _mm512_add_epi32(_mm512_castps_si512(biased), _mm512_set1_epi32(POW2));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(n))
        }
    }
    #[inline(always)]
    fn sum(self, v: __m512) -> f32 {
        // SAFETY: see above.
        unsafe { fold8!(_mm256_add_ps(_mm512_castps512_ps256(v), high(v)), _mm_add_ps, _mm_add_ss) }
    }
    #[inline(always)]
    fn largest(self, v: __m512) -> f32 {
        // SAFETY: see above.
        unsafe { fold8!(_mm256_max_ps(_mm512_castps512_ps256(v), high(v)), _mm_max_ps, _mm_max_ss) }
    }
}

/// The upper 8 lanes.
///
/// # Safety
/// The machine has avx512f.
#[inline(always)]
unsafe fn high(v: __m512) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe { _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(v))) }
}

#[inline(always)]
fn mask(n: usize) -> __mmask16 {
    debug_assert!(n <= LANES);
    ((1u32 << n) - 1) as __mmask16
}

impl Simd for Avx2 {
    type V = [__m256; 2];
    const WIDE: bool = false;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        // SAFETY: see above.
        unsafe { [_mm256_set1_ps(x); 2] }
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> Self::V {
        // SAFETY: see above.
        unsafe { [_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))] }
    }
    #[inline(always)]
    unsafe fn load_first(self, p: *const f32, n: usize) -> Self::V {
        let mut lanes = [0f32; LANES];
        // SAFETY: n <= 16 elements are readable; the copy is ours.
        unsafe {
            std::ptr::copy_nonoverlapping(p, lanes.as_mut_ptr(), n);
            self.load(lanes.as_ptr())
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u16) -> Self::V {
        // SAFETY: see above.
        unsafe {
            [
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast())))),
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.add(8).cast())))),
            ]
        }
    }
    #[inline(always)]
    unsafe fn load_bf16_first(self, p: *const u16, n: usize) -> Self::V {
        let mut lanes = [0u16; LANES];
        // SAFETY: n <= 16 elements are readable; the copy is ours.
        unsafe {
            std::ptr::copy_nonoverlapping(p, lanes.as_mut_ptr(), n);
            self.load_bf16(lanes.as_ptr())
        }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: Self::V) {
        // SAFETY: see above.
        unsafe {
            _mm256_storeu_ps(p, v[0]);
            _mm256_storeu_ps(p.add(8), v[1]);
        }
    }
    #[inline(always)]
    unsafe fn store_first(self, p: *mut f32, n: usize, v: Self::V) {
        let mut lanes = [0f32; LANES];
        // SAFETY: n <= 16 elements are writable; the copy is ours.
        unsafe {
            self.store(lanes.as_mut_ptr(), v);
            std::ptr::copy_nonoverlapping(lanes.as_ptr(), p, n);
        }
    }
    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // SAFETY: see above.
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }
    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: see above.
        unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: see above.
        unsafe { [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: see above.
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: see above.
        unsafe { [_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: see above.
        unsafe { [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: see above.
        unsafe { [_mm256_min_ps(a[0], b[0]), _mm256_min_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn first(self, v: Self::V, n: usize, other: Self::V) -> Self::V {
        // SAFETY: see above.
        unsafe {
            let n = _mm256_set1_ps(n as f32);
            let low = _mm256_cmp_ps::<_CMP_LT_OQ>(_mm256_setr_ps(0., 1., 2., 3., 4., 5., 6., 7.), n);
            let high = _mm256_cmp_ps::<_CMP_LT_OQ>(_mm256_setr_ps(8., 9., 10., 11., 12., 13., 14., 15.), n);
            [_mm256_blendv_ps(other[0], v[0], low), _mm256_blendv_ps(other[1], v[1], high)]
        }
    }
    #[inline(always)]
    fn pow2(self, biased: Self::V) -> Self::V {
        let mut out = biased;
        for half in &mut out {
            // SAFETY: see above.
            *half = unsafe {
                let n = _mm256_add_epi32(_mm256_castps_si256(*half), _mm256_set1_epi32(POW2));
                _mm256_castsi256_ps(_mm256_slli_epi32::<23>(n))
            };
        }
        out
    }
    #[inline(always)]
    fn sum(self, v: Self::V) -> f32 {
        // SAFETY: see above.
        unsafe { fold8!(_mm256_add_ps(v[0], v[1]), _mm_add_ps, _mm_add_ss) }
    }
    #[inline(always)]
    fn largest(self, v: Self::V) -> f32 {
        // SAFETY: see above.
        unsafe { fold8!(_mm256_max_ps(v[0], v[1]), _mm_max_ps, _mm_max_ss) }
    }
}
