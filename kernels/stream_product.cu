// Products out = x W^T (+ bias) of 9 to 64 rows of x on Hopper: the weights stream
// through once, at memory speed, as the columns of wgmma; the rows of x are its 64 rows,
// of which those past ROWS hold whatever follows in shared memory and are not written.
//
// Every cluster has an equal share of W's rows, its CTAs each a part of the reduction, and
// so of x, which comes from L2 and would else be most of what a multiprocessor takes in;
// then each adds up a part of the columns. (A cluster whose CTAs bring parts of x to one
// another was no faster on an H200.) One thread keeps a ring of stages full with the tensor
// copy engine, weights before the launch that this one depends on has ended, x after; a
// warpgroup multiplies.
//
// -D ROWS     rows of x rounded up to 8, at most 64
//    COLUMNS  W's rows of a pass, a multiple of 8; at most 256, or gated 128 (of gate and of up each)
//    PASSES   of a CTA
//    SPLIT    CTAs of a cluster: parts of the reduction, each of a stage at least; more than 1 with one pass only,
//             and COLUMNS a multiple of 8 SPLIT. Default 1
//    GATED    1: w [2 * n, k], gate rows first; out = silu(gate) * up. Default 0
//    OUT_F32  1 for f32 output (logits). Default 0: bf16
//    PAIR     1: stream_pair in place of stream_product: two products of as many rows, each by CTAs of its own. Default 0
// stream_product: grid SPLIT * ceil(n / (COLUMNS * PASSES)); block STREAM_THREADS; dynamic shared memory STREAM_SMEM
// stream_pair:    the same with SPLIT 1, the products' grids one after the other
// k % 8 == 0; w, x and the strides at 16 bytes.

#ifndef GATED
#define GATED 0
#endif
#ifndef OUT_F32
#define OUT_F32 0
#endif
#ifndef SPLIT
#define SPLIT 1
#endif
#ifndef PAIR
#define PAIR 0
#endif

struct alignas(64) TensorMap {
  u64 opaque[16];
};

struct StreamProduct {
  const float* bias;  // [n] (gated: [2 * n]) or null
#if OUT_F32
  float* out;         // row r begins at out + r * out_stride: [n]
#else
  u16* out;           // row r begins at out + r * out_stride: [n]
#endif
  int n;              // columns of the output
  int k;              // reduction
  int rows;           // of x, at most ROWS
  int out_stride;     // elements
};

constexpr int PANEL = 64;                             // columns of the reduction: 128 bytes, wgmma's swizzle
constexpr int TILE = COLUMNS * (GATED ? 2 : 1);       // rows of W in a pass
constexpr int X_BYTES = ROWS * 128, W_BYTES = TILE * 128;
constexpr int PANEL_BYTES = X_BYTES + W_BYTES;
constexpr int UNITS = COLUMNS / 8 / SPLIT;            // of 8 columns, that a CTA writes in a pass
constexpr int SLICE = UNITS * (GATED ? 2 : 1);        // sums of 8 columns that it adds up for that
constexpr int PARTS_BYTES = SPLIT > 1 ? SPLIT * SLICE * 128 * 16 : 0;
constexpr int STREAM_ROOM = 198 * 1024 - PARTS_BYTES; // wgmma reads up to 7 KiB past the last stage's x
// Panels of a stage: as many as make it some 32 KiB, for a stage costs both sides a wait.
constexpr int PANELS = PANEL_BYTES <= 10 * 1024 ? 4 : PANEL_BYTES <= 20 * 1024 ? 2 : 1;
constexpr int STAGE_BYTES = PANELS * PANEL_BYTES;
constexpr int STAGES = STREAM_ROOM / STAGE_BYTES > 12 ? 12 : STREAM_ROOM / STAGE_BYTES;
constexpr int STREAM_THREADS = 128 + 32;
constexpr int STREAM_SMEM = STAGES * STAGE_BYTES + PARTS_BYTES + 8 * 1024;

static_assert(ROWS % 8 == 0 && ROWS <= 64 && COLUMNS % (8 * SPLIT) == 0 && TILE <= 256 && STAGES >= 2, "tiles");
static_assert(SPLIT == 1 || PASSES == 1, "a CTA's sums have one place");

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900

DEVICE void tensor_load(u32 dst, const TensorMap& map, int col, int row, u32 bar, u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3}], "
      "[%4], %5;" ::"r"(dst),
      "l"(&map), "r"(col), "r"(row), "r"(bar), "l"(policy)
      : "memory");
}
// ---- wgmma: d[64 x 8 U] += x[64 x 16] w[8 U x 16]^T, both K-major in shared memory ----

#define ACC4(i) "+f"(d[(i)]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])
#define ACC16(i) ACC4(i), ACC4((i) + 4), ACC4((i) + 8), ACC4((i) + 12)
#define ACC64(i) ACC16(i), ACC16((i) + 16), ACC16((i) + 32), ACC16((i) + 48)
#define LIST_0 "%0, %1, %2, %3"
#define LIST_1 LIST_0 ", %4, %5, %6, %7"
#define LIST_2 LIST_1 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define LIST_3 \
  LIST_2 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LIST_4                                                                                        \
  LIST_3 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49" \
         ", %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA(shape, list, a, b) \
  "wgmma.mma_async.sync.aligned.m64" shape "k16.f32.bf16.bf16 {" list "}, " a ", " b ", 1, 1, 1, 0, 0;"

constexpr int SUMS = TILE / 2;  // accumulators of a thread
// Independent sums of one output: narrow products would wait for one another.
constexpr int CHAINS = TILE <= 32 ? 4 : TILE <= 64 ? 2 : 1;

// The units (of 8 columns) from At on, in powers of two.
template <int At, int Units>
DEVICE void multiply(float (&d)[SUMS], u64 x, u64 w) {
  const u64 b = w + At * 64;
  if constexpr (Units >= 16) {
    asm volatile(WGMMA("n128", LIST_4, "%64", "%65") : ACC64(At * 4) : "l"(x), "l"(b));
    multiply<At + 16, Units - 16>(d, x, w);
  } else if constexpr (Units >= 8) {
    asm volatile(WGMMA("n64", LIST_3, "%32", "%33") : ACC16(At * 4), ACC16(At * 4 + 16) : "l"(x), "l"(b));
    multiply<At + 8, Units - 8>(d, x, w);
  } else if constexpr (Units >= 4) {
    asm volatile(WGMMA("n32", LIST_2, "%16", "%17") : ACC16(At * 4) : "l"(x), "l"(b));
    multiply<At + 4, Units - 4>(d, x, w);
  } else if constexpr (Units >= 2) {
    asm volatile(WGMMA("n16", LIST_1, "%8", "%9") : ACC4(At * 4), ACC4(At * 4 + 4) : "l"(x), "l"(b));
    multiply<At + 2, Units - 2>(d, x, w);
  } else if constexpr (Units == 1) {
    asm volatile(WGMMA("n8", LIST_0, "%4", "%5") : ACC4(At * 4) : "l"(x), "l"(b));
  }
}
// Keeps uses of the sums behind the wait for them.
DEVICE void settle(float (&sums)[CHAINS][SUMS]) {
#pragma unroll
  for (int c = 0; c < CHAINS; c++) {
    float(&d)[SUMS] = sums[c];
#pragma unroll
    for (int i = 0; i < SUMS; i += 4) asm volatile("" : ACC4(i)::"memory");
  }
}
// This CTA's part of the reduction, in stages.
struct Part {
  int cluster, rank, first, stages;
  DEVICE_MEMBER Part(int k, int cta) {
    const int all = ceil_div(k, PANEL * PANELS);
    cluster = cta / SPLIT, rank = cta % SPLIT;
    first = all * rank / SPLIT, stages = all * (rank + 1) / SPLIT - first;
  }
};

// The thread that loads. A stage holds x's panels, then W's.
DEVICE void load(const TensorMap& w, const TensorMap& x, const StreamProduct& a, const Part& part, u32 base, u32 full,
                 u32 empty) {
  const u64 once = l2_evict_first(), often = l2_evict_last();
  const int all = part.stages * PASSES;
  auto column = [&](int n) { return (part.first + n % part.stages) * PANEL * PANELS; };
  auto weights = [&](int n) {
    const int row = (part.cluster * PASSES + n / part.stages) * COLUMNS, col = column(n);
    const u32 dst = base + n % STAGES * STAGE_BYTES + PANELS * X_BYTES, bar = full + n % STAGES * 8;
    mbar_arrive_expect(bar, STAGE_BYTES);
#pragma unroll
    for (int p = 0; p < PANELS; p++) {
      tensor_load(dst + p * W_BYTES, w, col + p * PANEL, row, bar, once);
      if (GATED) tensor_load(dst + p * W_BYTES + COLUMNS * 128, w, col + p * PANEL, a.n + row, bar, once);
    }
  };
  auto rows = [&](int n) {
    const int col = column(n);
    const u32 dst = base + n % STAGES * STAGE_BYTES, bar = full + n % STAGES * 8;
#pragma unroll
    for (int p = 0; p < PANELS; p++) tensor_load(dst + p * X_BYTES, x, col + p * PANEL, 0, bar, often);
  };
  const int early = min(STAGES, all);
  for (int n = 0; n < early; n++) weights(n);
  grid_wait();
  for (int n = 0; n < early; n++) rows(n);
  for (int n = early; n < all; n++) {
    mbar_wait(empty + n % STAGES * 8, (n / STAGES - 1) & 1);
    weights(n);
    rows(n);
  }
}

DEVICE void store(u16* p, float v0, float v1) { *(u32*)p = pack_bf16(v0, v1); }
DEVICE void store(float* p, float v0, float v1) { *(float2*)p = make_float2(v0, v1); }
DEVICE void store(u16* p, float v) { *p = f32_to_bf16(v); }
DEVICE void store(float* p, float v) { *p = v; }

// A lane has two columns of every unit, in rows lane / 4 and lane / 4 + 8 of its warp's 16. `d`: UNITS units from column
// `first` on, where gated then as many of up.
template <int N>
DEVICE void write(const StreamProduct& a, const float (&d)[N], int first) {
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
  const bool pairs = (a.n | a.out_stride) % 2 == 0;
#pragma unroll
  for (int u = 0; u < UNITS; u++) {
    const int col = first + u * 8 + lane % 4 * 2;
    float bias[2] = {0.f, 0.f}, bias_up[2] = {0.f, 0.f};
    if (a.bias) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        if (col + i < a.n) bias[i] = a.bias[col + i];
        if (GATED && col + i < a.n) bias_up[i] = a.bias[a.n + col + i];
      }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int r = row + half * 8;
      float v[2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        v[i] = d[u * 4 + half * 2 + i] + bias[i];
        if (GATED) v[i] = silu(v[i]) * (d[(UNITS + u) * 4 % N + half * 2 + i] + bias_up[i]);
      }
      if (r >= a.rows || col >= a.n) continue;
      auto* to = a.out + (size_t)r * a.out_stride + col;
      if (pairs) {
        store(to, v[0], v[1]);
      } else {
        store(to, v[0]);
        if (col + 1 < a.n) store(to + 1, v[1]);
      }
    }
  }
}

// Gives every CTA of the cluster the units that it writes, and adds up its own, in the order of the parts.
// parts: float4 [SPLIT, SLICE, 128] for this CTA, a unit's sums as the thread holds them.
DEVICE void exchange(const float (&d)[SUMS], float (&sum)[SLICE * 4], const u8* parts, int rank) {
  const u32 own = smem_addr(parts) + (rank * SLICE * 128 + threadIdx.x) * 16;
  cluster_wait();  // all are there to be written to
#pragma unroll
  for (int to = 0; to < SPLIT; to++) {
    const u32 there = cluster_addr(own, to);
#pragma unroll
    for (int i = 0; i < SLICE; i++) {
      const int u = i / UNITS * (COLUMNS / 8) + to * UNITS + i % UNITS;
      asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(there + i * 128 * 16), "f"(d[u * 4]),
                   "f"(d[u * 4 + 1]), "f"(d[u * 4 + 2]), "f"(d[u * 4 + 3])
                   : "memory");
    }
  }
  cluster_arrive();
  cluster_wait();
#pragma unroll
  for (int i = 0; i < SLICE; i++) {
    float4 v = ((const float4*)parts)[i * 128 + threadIdx.x];
#pragma unroll
    for (int from = 1; from < SPLIT; from++) {
      const float4 more = ((const float4*)parts)[(from * SLICE + i) * 128 + threadIdx.x];
      v.x += more.x, v.y += more.y, v.z += more.z, v.w += more.w;
    }
    sum[i * 4] = v.x, sum[i * 4 + 1] = v.y, sum[i * 4 + 2] = v.z, sum[i * 4 + 3] = v.w;
  }
}

DEVICE void compute(const StreamProduct& a, const Part& part, u32 base, u32 full, u32 empty, const u8* parts) {
  const int lane = threadIdx.x % 32;
  int n = 0;
  auto release = [&](int stage) {
    if (lane == 0) mbar_arrive(empty + stage % STAGES * 8);
  };
  for (int pass = 0; pass < PASSES; pass++) {
    float sums[CHAINS][SUMS];
#pragma unroll
    for (int c = 0; c < CHAINS; c++)
#pragma unroll
      for (int i = 0; i < SUMS; i++) sums[c][i] = 0.f;
    for (int i = 0; i < part.stages; i++, n++) {
      mbar_wait(full + n % STAGES * 8, n / STAGES & 1);
      const u32 at = base + n % STAGES * STAGE_BYTES;
      wgmma_fence();
#pragma unroll
      for (int p = 0; p < PANELS; p++)
#pragma unroll
        for (int k = 0; k < PANEL / 16; k++)
          multiply<0, TILE / 8>(sums[k % CHAINS], matrix(at + p * X_BYTES) + k * 2,
                                matrix(at + PANELS * X_BYTES + p * W_BYTES) + k * 2);
      wgmma_commit();
      wgmma_wait<1>();
      if (i > 0) release(n - 1);
    }
    wgmma_wait<0>();
    settle(sums);
    release(n - 1);
#pragma unroll
    for (int c = 1; c < CHAINS; c++)
#pragma unroll
      for (int i = 0; i < SUMS; i++) sums[0][i] += sums[c][i];
    const int first = (part.cluster * PASSES + pass) * COLUMNS;
    if constexpr (SPLIT > 1) {
      float sum[SLICE * 4];
      exchange(sums[0], sum, parts, part.rank);
      write(a, sum, first + part.rank * UNITS * 8);
    } else {
      write(a, sums[0], first);
    }
  }
}

// CTA `cta` of a product's grid.
DEVICE void product(const TensorMap& w, const TensorMap& x, const StreamProduct& a, int cta) {
  extern __shared__ __align__(1024) u8 stream_shared[];
  __shared__ u64 bars[2 * STAGES];
  const u32 base = (smem_addr(stream_shared) + 1023) / 1024 * 1024;
  const u32 full = smem_addr(bars), empty = full + STAGES * 8;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      mbar_init(full + s * 8, 1);
      mbar_init(empty + s * 8, 4);
    }
    mbar_init_fence();
  }
  __syncthreads();
  if (SPLIT > 1) cluster_arrive();
  grid_launch_dependents();
  const Part part(a.k, cta);
  if (threadIdx.x < 128) {
    compute(a, part, base, full, empty, stream_shared + (base - smem_addr(stream_shared)) + STAGES * STAGE_BYTES);
  } else {
    if (threadIdx.x == 128) load(w, x, a, part, base, full, empty);
    __syncwarp();
    if (SPLIT > 1) cluster_wait();
  }
}
#endif

#if SPLIT > 1
#define IN_CLUSTERS __cluster_dims__(SPLIT, 1, 1)
#else
#define IN_CLUSTERS
#endif

#if PAIR
// The first `ctas` CTAs have the first product.
extern "C" __global__ void __launch_bounds__(STREAM_THREADS, 1)
    stream_pair(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, const StreamProduct a,
                const __grid_constant__ TensorMap w2, const __grid_constant__ TensorMap x2, const StreamProduct a2,
                const int ctas) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
  const int cta = blockIdx.x;
  if (cta < ctas) product(w, x, a, cta);
  else product(w2, x2, a2, cta - ctas);
#endif
}
#else
extern "C" __global__ void IN_CLUSTERS __launch_bounds__(STREAM_THREADS, 1)
    stream_product(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, const StreamProduct a) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
  product(w, x, a, blockIdx.x);
#endif
}
#endif
