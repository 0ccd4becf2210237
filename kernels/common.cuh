// Device helpers that every kernel shares. The host puts this text before each
// kernel's own, so no kernel includes anything, and NVRTC needs no headers.
// Append new helpers at the end; do not change the ones that are here.

#ifdef __CUDACC__
#pragma nv_diag_suppress 177  // helpers that a kernel does not use
#endif

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define DEVICE static __device__ __forceinline__

// Tokens of a cache block; fixed for the whole runtime.
#ifndef BLOCK
#define BLOCK 64
#endif

#define NEG_INF (__int_as_float(0xff800000))
#define LOG2E 1.4426950408889634f

// ---- bf16, held as u16, or two in a u32 (the lower index in the lower half) ----

DEVICE float bf16_to_f32(u16 x) { return __uint_as_float((u32)x << 16); }
DEVICE float bf16_lo(u32 x) { return __uint_as_float(x << 16); }
DEVICE float bf16_hi(u32 x) { return __uint_as_float(x & 0xffff0000u); }

DEVICE u16 f32_to_bf16(float x) {
  u16 r;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(x));
  return r;
}

DEVICE u32 pack_bf16(float lo, float hi) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}

// ---- arithmetic ----

DEVICE float exp2_fast(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

DEVICE float log2_fast(float x) {
  float r;
  asm("lg2.approx.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

DEVICE float warp_sum(float x) {
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) x += __shfl_xor_sync(0xffffffffu, x, o);
  return x;
}

DEVICE float warp_max(float x) {
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, o));
  return x;
}

DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

// ---- cache tiles ----

// Element offset of (row, col) in a cache tile BLOCK x D: panels of 64 columns
// in wgmma's 128-byte swizzle where D allows it, plain rows where not.
template <int D>
DEVICE int tile_index(int row, int col) {
  if (D % 64 != 0) return row * D + col;
  return (col >> 6) * (BLOCK * 64) + row * 64 + ((((col >> 3) & 7) ^ (row & 7)) << 3) + (col & 7);
}

// ---- memory ----

DEVICE u32 smem_addr(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// 16-byte load of data that is read once.
DEVICE uint4 load_stream(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// 16 bytes to shared memory; only the first `bytes` are read, the rest is zero.
DEVICE void cp_async16(u32 dst, const void* src, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(bytes) : "memory");
}
DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- mma.sync m16n8k16, bf16 in, f32 accumulated ----

// Four 8x8 matrices; lane i gives the address of row i % 8 of matrix i / 8.
DEVICE void ldmatrix4(u32 (&r)[4], u32 addr) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(addr)
               : "memory");
}
DEVICE void ldmatrix4_trans(u32 (&r)[4], u32 addr) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(addr)
               : "memory");
}

// c[16x8] += a[16x16] b[16x8]
DEVICE void mma_bf16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- barriers among some of a block's threads ----

DEVICE void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// ---- mbarriers (addresses in shared memory, 8 bytes each) ----

DEVICE void mbar_init(u32 bar, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}
// After the inits, by the thread that made them, before the block's barrier.
DEVICE void mbar_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void mbar_arrive(u32 bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
DEVICE void mbar_arrive_expect(u32 bar, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
DEVICE bool mbar_try(u32 bar, u32 parity) {
  u32 ok;
  asm volatile(
      "{\n .reg .pred p;\n"
      " mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      " selp.u32 %0, 1, 0, p;\n}"
      : "=r"(ok)
      : "r"(bar), "r"(parity)
      : "memory");
  return ok != 0;
}
DEVICE void mbar_wait(u32 bar, u32 parity) {
  while (!mbar_try(bar, parity)) {
  }
}

// ---- the bulk copy engine: 1-D, 16-byte aligned, a multiple of 16 bytes ----

DEVICE u64 l2_evict_first() {
  u64 p;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(p));
  return p;
}
DEVICE u64 l2_evict_last() {
  u64 p;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(p));
  return p;
}
DEVICE void bulk_load(u32 dst, const void* src, u32 bytes, u32 bar) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(dst), "l"(src),
      "r"(bytes), "r"(bar)
      : "memory");
}
DEVICE void bulk_load_hint(u32 dst, const void* src, u32 bytes, u32 bar, u64 policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
          dst),
      "l"(src), "r"(bytes), "r"(bar), "l"(policy)
      : "memory");
}
// By each thread that touched shared memory with ordinary stores, before the
// barrier after which the copy engine or wgmma touches the same bytes.
DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- programmatic dependent launch: no-ops where the launch has no such edge ----

DEVICE void grid_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DEVICE void grid_launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

#else
DEVICE void grid_wait() {}
DEVICE void grid_launch_dependents() {}
#endif

// ---- the running softmax of a 16-row tile, in mma's accumulator layout ----

// This lane holds rows lane / 4 and lane / 4 + 8. Turns the logits p of N x 8 new
// keys (-inf: not seen) into weights, and brings the maxima `top` (base-2 logits),
// the sums (this lane's share of them) and the outputs o up to date. scale2 is the
// logits' scale times log2(e), positive.
template <int N, int M>
DEVICE void softmax_step(float (&p)[N][4], float (&o)[M][4], float (&top)[2], float (&sum)[2], float scale2) {
  float fade[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float x = fmaxf(p[0][2 * r], p[0][2 * r + 1]);
#pragma unroll
    for (int n = 1; n < N; n++) x = fmaxf(x, fmaxf(p[n][2 * r], p[n][2 * r + 1]));
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
    x = fmaxf(top[r], x * scale2);
    const float base = x == NEG_INF ? 0.f : x;
    fade[r] = exp2_fast(top[r] - base);
    top[r] = x;
    float add = 0.f;
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int i = 2 * r; i < 2 * r + 2; i++) {
        p[n][i] = exp2_fast(p[n][i] * scale2 - base);
        add += p[n][i];
      }
    sum[r] = sum[r] * fade[r] + add;
  }
  if (__any_sync(0xffffffffu, fade[0] != 1.f || fade[1] != 1.f)) {
#pragma unroll
    for (int n = 0; n < M; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) o[n][i] *= fade[i / 2];
  }
}
