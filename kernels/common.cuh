// Device helpers that every kernel shares. The host puts this text before each
// kernel's own, so no kernel includes anything, and NVRTC needs no headers.

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

DEVICE float silu(float x) { return x / (1.f + exp2_fast(-LOG2E * x)); }

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
// Of data that is read once: it leaves L2 first.
DEVICE void cp_async16_once(u32 dst, const void* src) {
  u64 once;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "l"(once)
               : "memory");
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
// For `count` of those that the barrier waits for.
DEVICE void mbar_arrive_for(u32 bar, u32 count) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(count) : "memory");
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

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900

// ---- mbarriers, as far as sm_80 has them ----

DEVICE void mbar_init(u32 bar, u32 count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}
DEVICE void mbar_init_fence() {}
DEVICE void mbar_arrive(u32 bar) {
  asm volatile("{\n .reg .b64 t;\n mbarrier.arrive.shared.b64 t, [%0];\n}" ::"r"(bar) : "memory");
}
DEVICE bool mbar_try(u32 bar, u32 parity) {
  u32 ok;
  asm volatile(
      "{\n .reg .pred p;\n"
      " mbarrier.test_wait.parity.shared.b64 p, [%1], %2;\n"
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
#endif

// A read past the first-level cache, for what another launch wrote while this one may have been resident.
DEVICE int load_fresh(const int* p) {
  int v;
  asm volatile("ld.global.cg.s32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
DEVICE float load_fresh(const float* p) { return __int_as_float(load_fresh((const int*)p)); }
DEVICE int4 load_fresh(const int4* p) {
  int4 v;
  asm volatile("ld.global.cg.v4.s32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}
DEVICE void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Arrives once all this thread's cp_async16 so far have landed.
DEVICE void mbar_arrive_copies(u32 bar) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(bar) : "memory");
}

#define DEVICE_MEMBER __device__ __forceinline__

// Shared memory a block may count on, KiB, with a little left for sums and barriers.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 900 || __CUDA_ARCH__ >= 1200)
#define SHARED_KIB 84
#else
#define SHARED_KIB 210
#endif

// ---- rows of bf16 in memory, 8 values or 1 at a time ----

template <int VEC>
DEVICE void load_bf16(const u16* p, float (&v)[VEC]) {
  if (VEC == 8 && ((u64)p & 15) == 0) {
    const uint4 q = *(const uint4*)p;
    const u32 w[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
    for (int i = 0; i < VEC; i++) v[i] = i & 1 ? bf16_hi(w[i / 2]) : bf16_lo(w[i / 2]);
  } else {
#pragma unroll
    for (int i = 0; i < VEC; i++) v[i] = bf16_to_f32(p[i]);
  }
}

// p must lie at 16 bytes where VEC is 8.
template <int VEC>
DEVICE void store_bf16(u16* p, const float (&v)[VEC]) {
  if (VEC == 8) {
    u32 w[4];
#pragma unroll
    for (int i = 0; i + 1 < VEC; i += 2) w[i / 2] = pack_bf16(v[i], v[i + 1]);
    *(uint4*)p = make_uint4(w[0], w[1], w[2], w[3]);
  } else {
    p[0] = f32_to_bf16(v[0]);
  }
}

// ---- rotary embedding ----

// Elements at .. at + VEC of the vector x[D] turned by the angles of cs, sn [D / 2]:
// the pairs are (2i, 2i+1) where INTERLEAVED, else (i, i + D/2). VEC is 8 or 1 and
// divides D / 2 where halves turn.
template <int D, int VEC, bool INTERLEAVED>
DEVICE void rope_turn(const u16* x, int at, const float* cs, const float* sn, float (&v)[VEC]) {
  constexpr int HALF = D / 2;
  if (INTERLEAVED && VEC == 8) {
    float p[VEC];
    load_bf16(x + at, p);
#pragma unroll
    for (int i = 0; i + 1 < VEC; i += 2) {
      const float c = cs[(at + i) / 2], s = sn[(at + i) / 2];
      v[i] = p[i] * c - p[i + 1] * s;
      v[i + 1] = p[i + 1] * c + p[i] * s;
    }
  } else if (INTERLEAVED) {
    const float own = bf16_to_f32(x[at]), other = bf16_to_f32(x[at ^ 1]);
    v[0] = own * cs[at / 2] + (at & 1 ? other : -other) * sn[at / 2];
  } else {
    const bool upper = at >= HALF;
    float own[VEC], other[VEC];
    load_bf16(x + at, own);
    load_bf16(x + (upper ? at - HALF : at + HALF), other);
    const int pair = upper ? at - HALF : at;
#pragma unroll
    for (int i = 0; i < VEC; i++) v[i] = own[i] * cs[pair + i] + (upper ? other[i] : -other[i]) * sn[pair + i];
  }
}

// ---- what ranks push to each other's memory ----

#define MAX_WORLD 8  // ranks of a one-shot sum, or of a choice of tokens
#define POLLS 4096   // between two looks at the host's stop word

// ---- clusters of CTAs, and copies to L2 ----

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// To L2, where what another launch writes later is seen. 16-byte aligned, a multiple of 16 bytes.
DEVICE void prefetch_bulk(const void* p, u32 bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes) : "memory");
}
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// The address, in CTA `rank` of the cluster, of what lies at `addr` in this one.
DEVICE u32 cluster_addr(u32 addr, int rank) {
  u32 at;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(addr), "r"(rank));
  return at;
}
DEVICE void cluster_store(u32 at, u32 x, u32 y) {
  asm volatile("st.shared::cluster.v2.u32 [%0], {%1, %2};" ::"r"(at), "r"(x), "r"(y) : "memory");
}
#else
DEVICE void prefetch_bulk(const void*, u32) {}
#endif

// ---- Hopper's products of a warpgroup ----

DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// A matrix in shared memory: K-major, 128-byte swizzle, 8-row groups 1024 bytes apart.
DEVICE u64 matrix(u32 addr) { return (1ull << 62) | (64ull << 32) | (1ull << 16) | (u64)(addr >> 4); }
