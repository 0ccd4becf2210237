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

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900

// ---- mbarriers, as far as sm_80 has them ----

DEVICE void mbar_init(u32 bar, u32 count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}
DEVICE void mbar_init_fence() {}
DEVICE void mbar_arrive(u32 bar) {
  asm volatile("{\n .reg .b64 t;\n mbarrier.arrive.shared.b64 t, [%0];\n}" ::"r"(bar) : "memory");
}
// Arrives once all this thread's cp_async16 so far have landed.
DEVICE void mbar_arrive_copies(u32 bar) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(bar) : "memory");
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

#define DEVICE_MEMBER __device__ __forceinline__

// ---- skinny products: few rows of x, and a weight matrix that streams through once ----
//
// One warp brings weights and x to a ring of stages in shared memory, eight warps
// multiply with mma.sync. A pass computes up to `Rows` weight rows (the tile's 16-row
// side) by up to `Tokens` tokens (the 8-column side) over the whole reduction, `Step` elements
// a stage. Elements of the reduction may meet in any order, as long as both sides
// agree: a lane takes 8 neighbours of its row in one 16-byte load, which is its
// share of two mma steps, and no fragment needs rearranging.

DEVICE uint4 load_shared16(u32 addr) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(addr));
  return v;
}

// Room: rows of x there is room for, at most Tokens.
template <int Rows, int Tokens, int Room, int Step, int Ring>
struct Skinny {
  static constexpr int COMPUTE = 256, THREADS = COMPUTE + 32;
  static constexpr int WR = Rows / 16, WT = Tokens > 32 && WR <= 4 ? 2 : 1, WK = 8 / (WR * WT);  // warps along each side
  static constexpr int NT = Tokens / 8 / WT;           // 8-token tiles a warp
  static constexpr int STRIDE = Step * 2 + 64;      // bytes of a row; neighbours lie on other banks
  static constexpr int STAGE = (Rows + Room) * STRIDE;
  static constexpr int SUM_ROW = Tokens == 8 ? 8 : Tokens + 8;
  static constexpr int SUMS = WK * Rows * SUM_ROW;   // floats
  static constexpr int BYTES = Ring * STAGE + SUMS * 4 + Ring * 16;
  static constexpr int X_LANE = (Room + 31) / 32;   // rows of x a lane copies

  static_assert(Rows % 16 == 0 && Tokens % 8 == 0 && Step % 32 == 0 && Room <= Tokens && WR * WT * WK == 8, "tiles");

  // `Work` hands out the passes of this CTA, in an order that both sides repeat:
  //   bool next(): moves to the next pass
  //   int rows(), tokens(), k(); const u16* w_row(r), x_row(t)
  template <class Work>
  struct Cursor {
    Work work;
    int k0;
    bool ok;
    const u16* x[X_LANE];
    DEVICE_MEMBER Cursor(const Work& w) : work(w) {
      ok = work.next();
      k0 = 0;
    }
    DEVICE_MEMBER void find_x(int lane) {
#pragma unroll
      for (int i = 0; i < X_LANE; i++)
        if (ok && lane + 32 * i < work.tokens()) x[i] = work.x_row(lane + 32 * i);
    }
    DEVICE_MEMBER int length() const { return min(Step, work.k() - k0); }
    DEVICE_MEMBER bool last() const { return k0 + Step >= work.k(); }
    // Returns whether a new pass begins.
    DEVICE_MEMBER bool advance() {
      k0 += Step;
      if (k0 < work.k()) return false;
      k0 = 0;
      ok = work.next();
      return true;
    }
  };

  static DEVICE_MEMBER u32 full(u32 base, int s) { return base + Ring * STAGE + SUMS * 4 + s * 16; }
  static DEVICE_MEMBER u32 empty(u32 base, int s) { return full(base, s) + 8; }

  static DEVICE_MEMBER void init(u32 base) {
    if (threadIdx.x == 0) {
      for (int s = 0; s < Ring; s++) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
        mbar_init(full(base, s), 32);
#else
        mbar_init(full(base, s), 1);
#endif
        mbar_init(empty(base, s), 8);
      }
      mbar_init_fence();
    }
    __syncthreads();
  }

  // The loading warp. EARLY: weights are known before the launch this one depends
  // on has ended, so a ring of them is asked for before the wait.
  template <bool EARLY, class Work>
  static DEVICE_MEMBER void produce(const Work& w, u32 base, bool stream) {
    const int lane = threadIdx.x % 32;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    const u64 policy = l2_evict_first();
#endif
    auto row = [&](u32 dst, const u16* src, u32 bytes, u32 bar, bool once) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
      if (once) bulk_load_hint(dst, src, bytes, bar, policy);
      else bulk_load(dst, src, bytes, bar);
#endif
    };
    auto load_w = [&](const Cursor<Work>& c, int s) {
      const u32 stage = base + s * STAGE, bytes = c.length() * 2;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
      for (int r = 0; r < c.work.rows(); r++) {
        const u16* src = c.work.w_row(r) + c.k0;
        for (u32 at = lane * 16; at < bytes; at += 512) cp_async16(stage + r * STRIDE + at, (const u8*)src + at, 16);
      }
#else
      if (lane == 0) mbar_arrive_expect(full(base, s), bytes * (c.work.rows() + c.work.tokens()));
      __syncwarp();
#pragma unroll
      for (int i = 0; i < (Rows + 31) / 32; i++) {
        const int r = lane + 32 * i;
        if (r < c.work.rows()) row(stage + r * STRIDE, c.work.w_row(r) + c.k0, bytes, full(base, s), stream);
      }
#endif
    };
    auto load_x = [&](const Cursor<Work>& c, int s) {
      const u32 stage = base + s * STAGE + Rows * STRIDE, bytes = c.length() * 2;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
      for (int t = 0; t < c.work.tokens(); t++) {
        const u16* src = c.work.x_row(t) + c.k0;
        for (u32 at = lane * 16; at < bytes; at += 512) cp_async16(stage + t * STRIDE + at, (const u8*)src + at, 16);
      }
      mbar_arrive_copies(full(base, s));
#else
#pragma unroll
      for (int i = 0; i < X_LANE; i++) {
        const int t = lane + 32 * i;
        if (t < c.work.tokens()) row(stage + t * STRIDE, c.x[i] + c.k0, bytes, full(base, s), false);
      }
#endif
    };

    int n = 0;  // stages filled
    if (!EARLY) grid_wait();
    Cursor<Work> c(w);
    if (EARLY) {
      Cursor<Work> x(c);
      for (; n < Ring && c.ok; n++) {
        load_w(c, n);
        c.advance();
      }
      grid_wait();
      x.find_x(lane);
      for (int s = 0; s < n; s++) {
        load_x(x, s);
        if (x.advance()) x.find_x(lane);
      }
    }
    c.find_x(lane);
    while (c.ok) {
      const int s = n % Ring;
      if (n >= Ring) mbar_wait(empty(base, s), (n / Ring - 1) & 1);
      load_w(c, s);
      load_x(c, s);
      n++;
      if (c.advance()) c.find_x(lane);
    }
  }

  // The eight computing warps. finish(work, sums) runs on COMPUTE threads after each
  // pass: the product of row r and token t is total(sums, r, t).
  template <class Work, class Finish>
  static DEVICE_MEMBER void consume(const Work& w, u32 base, float* sums, Finish finish) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int wr = warp % WR, wt = warp / WR % WT, wk = warp / (WR * WT);
    const int g = lane / 4, t = lane % 4;
    float acc[NT][4];
    u32 at_x[NT];
#pragma unroll
    for (int j = 0; j < NT; j++) {
      at_x[j] = (Rows + min((wt * NT + j) * 8 + g, Room - 1)) * STRIDE + t * 16;
#pragma unroll
      for (int i = 0; i < 4; i++) acc[j][i] = 0.f;
    }
    const u32 at_w = (wr * 16 + g) * STRIDE + t * 16;
    int n = 0;
    for (Cursor<Work> c(w); c.ok;) {
      const int s = n % Ring;
      const u32 stage = base + s * STAGE;
      const int tiles = min(NT, (c.work.tokens() - wt * NT * 8 + 7) / 8), steps = c.length() / 32;
      mbar_wait(full(base, s), n / Ring & 1);
      if (wr * 16 < c.work.rows() && tiles > 0) {
#pragma unroll 4
        for (int k = wk; k < steps; k += WK) {
          const uint4 w0 = load_shared16(stage + at_w + k * 64);
          const uint4 w1 = load_shared16(stage + at_w + 8 * STRIDE + k * 64);
          const u32 a0[4] = {w0.x, w1.x, w0.y, w1.y}, a1[4] = {w0.z, w1.z, w0.w, w1.w};
#pragma unroll
          for (int j = 0; j < NT; j++) {
            if (j < tiles) {
              const uint4 x = load_shared16(stage + at_x[j] + k * 64);
              mma_bf16(acc[j], a0, x.x, x.y);
              mma_bf16(acc[j], a1, x.z, x.w);
            }
          }
        }
      }
      __syncwarp();
      if (lane == 0) mbar_arrive(empty(base, s));
      n++;
      if (c.last()) {
#pragma unroll
        for (int j = 0; j < NT; j++) {
          float* p = sums + (wk * Rows + wr * 16 + g) * SUM_ROW + (wt * NT + j) * 8 + t * 2;
          *(float2*)p = make_float2(acc[j][0], acc[j][1]);
          *(float2*)(p + 8 * SUM_ROW) = make_float2(acc[j][2], acc[j][3]);
#pragma unroll
          for (int i = 0; i < 4; i++) acc[j][i] = 0.f;
        }
        named_barrier(1, COMPUTE);
        finish(c.work, sums);
        named_barrier(1, COMPUTE);
      }
      c.advance();
    }
  }

  static DEVICE_MEMBER float total(const float* sums, int r, int t) {
    float v = 0.f;
#pragma unroll
    for (int k = 0; k < WK; k++) v += sums[(k * Rows + r) * SUM_ROW + t];
    return v;
  }
};
