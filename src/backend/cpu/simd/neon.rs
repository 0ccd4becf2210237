//! NEON: four registers a vector.

use std::arch::aarch64::*;

use super::{Kernel, LANES, Simd};

/// NEON. The private field keeps it from being made elsewhere than in [`neon`].
#[derive(Clone, Copy)]
pub struct Neon(());

/// Runs `kernel` compiled for NEON.
///
/// # Safety
/// The machine has neon.
#[target_feature(enable = "neon")]
pub unsafe fn neon<K: Kernel>(kernel: K) -> K::Out {
    kernel.run(Neon(()))
}

type V = [float32x4_t; 4];

/// Applies an operation to each register.
macro_rules! each {
    ($i:ident => $e:expr) => {{
        // SAFETY: the token exists only inside `neon`, whose callers have seen the feature; pointers are as the
        // trait's callers promise.
        unsafe {
            [
                {
                    let $i = 0;
                    $e
                },
                {
                    let $i = 1;
                    $e
                },
                {
                    let $i = 2;
                    $e
                },
                {
                    let $i = 3;
                    $e
                },
            ]
        }
    }};
}

/// `a > b ? a : b` (vmaxq would propagate NaN).
///
/// # Safety
/// The machine has neon.
#[inline(always)]
unsafe fn larger(a: float32x4_t, b: float32x4_t) -> float32x4_t {
    // SAFETY: the caller's promise.
    unsafe { vbslq_f32(vcgtq_f32(a, b), a, b) }
}

impl Simd for Neon {
    type V = V;
    /// 32 registers of 4 lanes: 8 vectors.
    const WIDE: bool = false;

    #[inline(always)]
    fn splat(self, x: f32) -> V {
        each!(_i => vdupq_n_f32(x))
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> V {
        each!(i => vld1q_f32(p.add(4 * i)))
    }
    #[inline(always)]
    unsafe fn load_first(self, p: *const f32, n: usize) -> V {
        let mut lanes = [0f32; LANES];
        // SAFETY: n <= 16 elements are readable; the copy is ours.
        unsafe {
            std::ptr::copy_nonoverlapping(p, lanes.as_mut_ptr(), n);
            self.load(lanes.as_ptr())
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u16) -> V {
        each!(i => vreinterpretq_f32_u32(vshlq_n_u32::<16>(vmovl_u16(vld1_u16(p.add(4 * i))))))
    }
    #[inline(always)]
    unsafe fn load_bf16_first(self, p: *const u16, n: usize) -> V {
        let mut lanes = [0u16; LANES];
        // SAFETY: n <= 16 elements are readable; the copy is ours.
        unsafe {
            std::ptr::copy_nonoverlapping(p, lanes.as_mut_ptr(), n);
            self.load_bf16(lanes.as_ptr())
        }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: V) {
        each!(i => vst1q_f32(p.add(4 * i), v[i]));
    }
    #[inline(always)]
    unsafe fn store_first(self, p: *mut f32, n: usize, v: V) {
        let mut lanes = [0f32; LANES];
        // SAFETY: n <= 16 elements are writable; the copy is ours.
        unsafe {
            self.store(lanes.as_mut_ptr(), v);
            std::ptr::copy_nonoverlapping(lanes.as_ptr(), p, n);
        }
    }
    #[inline(always)]
    fn fma(self, a: V, b: V, c: V) -> V {
        each!(i => vfmaq_f32(c[i], a[i], b[i]))
    }
    #[inline(always)]
    fn add(self, a: V, b: V) -> V {
        each!(i => vaddq_f32(a[i], b[i]))
    }
    #[inline(always)]
    fn sub(self, a: V, b: V) -> V {
        each!(i => vsubq_f32(a[i], b[i]))
    }
    #[inline(always)]
    fn mul(self, a: V, b: V) -> V {
        each!(i => vmulq_f32(a[i], b[i]))
    }
    #[inline(always)]
    fn div(self, a: V, b: V) -> V {
        each!(i => vdivq_f32(a[i], b[i]))
    }
    #[inline(always)]
    fn max(self, a: V, b: V) -> V {
        each!(i => larger(a[i], b[i]))
    }
    #[inline(always)]
    fn min(self, a: V, b: V) -> V {
        each!(i => vbslq_f32(vcltq_f32(a[i], b[i]), a[i], b[i]))
    }
    #[inline(always)]
    fn first(self, v: V, n: usize, other: V) -> V {
        const LANE: [u32; LANES] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
        each!(i => vbslq_f32(vcltq_u32(vld1q_u32(LANE.as_ptr().add(4 * i)), vdupq_n_u32(n as u32)), v[i], other[i]))
    }
    #[inline(always)]
    fn pow2(self, biased: V) -> V {
        each!(i => vreinterpretq_f32_s32(vshlq_n_s32::<23>(vaddq_s32(
            vreinterpretq_s32_f32(biased[i]),
            vdupq_n_s32(127 - 0x4B40_0000)
        ))))
    }
    #[inline(always)]
    fn sum(self, v: V) -> f32 {
        // SAFETY: see `each`.
        unsafe {
            let v = vaddq_f32(vaddq_f32(v[0], v[2]), vaddq_f32(v[1], v[3]));
            let v = vadd_f32(vget_low_f32(v), vget_high_f32(v));
            vget_lane_f32::<0>(v) + vget_lane_f32::<1>(v)
        }
    }
    #[inline(always)]
    fn largest(self, v: V) -> f32 {
        // SAFETY: see `each`.
        unsafe {
            let v = larger(larger(v[0], v[2]), larger(v[1], v[3]));
            let mut lanes = [0f32; 4];
            vst1q_f32(lanes.as_mut_ptr(), v);
            let larger = |a: f32, b: f32| if a > b { a } else { b };
            larger(larger(lanes[0], lanes[2]), larger(lanes[1], lanes[3]))
        }
    }
}
