//! The lanes as an array, for machines without any of the others.

use super::{LANES, Simd};

/// Plain Rust.
#[derive(Clone, Copy)]
pub struct Portable;

#[inline(always)]
fn each(f: impl Fn(usize) -> f32) -> [f32; LANES] {
    let mut v = [0.0; LANES];
    for (i, lane) in v.iter_mut().enumerate() {
        *lane = f(i);
    }
    v
}

#[inline(always)]
fn fold(v: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut v = v;
    for width in [8, 4, 2, 1] {
        for i in 0..width {
            v[i] = f(v[i], v[i + width]);
        }
    }
    v[0]
}

#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

#[inline(always)]
fn widen(x: u16) -> f32 {
    f32::from_bits((x as u32) << 16)
}

impl Simd for Portable {
    type V = [f32; LANES];
    const WIDE: bool = false;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> Self::V {
        // SAFETY: the caller's promise of 16 elements.
        each(|i| unsafe { *p.add(i) })
    }
    #[inline(always)]
    unsafe fn load_first(self, p: *const f32, n: usize) -> Self::V {
        // SAFETY: the caller's promise of n elements.
        each(|i| if i < n { unsafe { *p.add(i) } } else { 0.0 })
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u16) -> Self::V {
        // SAFETY: the caller's promise of 16 elements.
        each(|i| widen(unsafe { *p.add(i) }))
    }
    #[inline(always)]
    unsafe fn load_bf16_first(self, p: *const u16, n: usize) -> Self::V {
        // SAFETY: the caller's promise of n elements.
        each(|i| if i < n { widen(unsafe { *p.add(i) }) } else { 0.0 })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: Self::V) {
        // SAFETY: the caller's promise of 16 elements.
        unsafe { p.cast::<[f32; LANES]>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn store_first(self, p: *mut f32, n: usize, v: Self::V) {
        for (i, x) in v.iter().enumerate().take(n) {
            // SAFETY: the caller's promise of n elements.
            unsafe { *p.add(i) = *x }
        }
    }
    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        each(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        each(|i| a[i] + b[i])
    }
    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        each(|i| a[i] - b[i])
    }
    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        each(|i| a[i] * b[i])
    }
    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        each(|i| a[i] / b[i])
    }
    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        each(|i| larger(a[i], b[i]))
    }
    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        each(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn first(self, v: Self::V, n: usize, other: Self::V) -> Self::V {
        each(|i| if i < n { v[i] } else { other[i] })
    }
    #[inline(always)]
    fn pow2(self, biased: Self::V) -> Self::V {
        each(|i| f32::from_bits(biased[i].to_bits().wrapping_sub(0x4B40_0000 - 127) << 23))
    }
    #[inline(always)]
    fn sum(self, v: Self::V) -> f32 {
        fold(v, |a, b| a + b)
    }
    #[inline(always)]
    fn largest(self, v: Self::V) -> f32 {
        fold(v, larger)
    }
}
