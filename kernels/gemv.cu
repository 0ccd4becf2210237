// Skinny products out = x W^T (+ bias) for up to 16 rows of x: the weights stream
// through once, at memory speed. Each CTA of a persistent grid takes an equal share
// of W's rows, to one row, so that all end together; its first stages of weights are
// asked for before the launch it depends on has ended.
//
// -D ROWS   rows of x at most: 1, 2, 4, 8 or 16
//    OUT_F32 1 for f32 output (logits), default 0: bf16
//    PAIR    1: only gemv_pair. Default 0: all but it
//    TILE_ROWS, STEP, RING, LOADERS  tiling, defaults below
// gemv, gemv_gated: grid number of multiprocessors; block GEMV_THREADS = 288 + 32 * LOADERS = 384; dynamic shared memory
//   GEMV_SMEM (the global int `gemv_shared_bytes` of the module)
//   need k % 32 == 0, x_stride % 8 == 0, x and w at 16 bytes
// gemv_any: any k, any alignment: grid ceil(n / 8); block 256; no shared memory
//
// gemv_gated: w [2 * n, k], gate rows first; out [rows, n] = silu(gate) * up.
// gemv_pair:  two products of as many rows, each by CTAs of its own: as gemv

#ifndef OUT_F32
#define OUT_F32 0
#endif
#ifndef PAIR
#define PAIR 0
#endif
#ifndef TILE_ROWS
#define TILE_ROWS (ROWS <= 4 ? 16 : 32)
#endif
// Large stages: each costs the warps a few hundred cycles of waiting for one another.
#ifndef STEP
#define STEP (SHARED_KIB < 100 ? 256 : ROWS == 1 ? 2048 : ROWS <= 4 ? 1024 : 512)
#endif

struct Gemv {
  const u16* w;       // [n, k]; gemv_gated: [2 * n, k]
  const u16* x;       // row r begins at x + r * x_stride: [k]
  const float* bias;  // [n] (gemv_gated: [2 * n]) or null
#if OUT_F32
  float* out;         // row r begins at out + r * out_stride: [n]
#else
  u16* out;           // row r begins at out + r * out_stride: [n]
#endif
  int n;              // columns of the output
  int k;              // reduction
  int rows;           // of x, at most ROWS
  int x_stride;       // elements
  int out_stride;     // elements
};

#define GEMV_TOKENS (ROWS <= 8 ? 8 : 16)
// The ring fills a multiprocessor, so that there is never room for two CTAs: where there is, some multiprocessors get
// two of a launch's and others none.
#ifndef RING
constexpr int GEMV_FIT = SHARED_KIB * 1024 / ((TILE_ROWS + ROWS) * (STEP * 2 + 64));
#define RING (GEMV_FIT < 2 ? 2 : GEMV_FIT > 6 ? 6 : GEMV_FIT)
#endif
#ifndef LOADERS
#define LOADERS 3
#endif
typedef Skinny<TILE_ROWS, GEMV_TOKENS, ROWS, STEP, RING, LOADERS> Engine;
constexpr int GEMV_SMEM = Engine::BYTES, GEMV_THREADS = Engine::THREADS;
extern "C" __device__ int gemv_shared_bytes = GEMV_SMEM;
extern "C" __device__ int gemv_threads = Engine::THREADS;

DEVICE void put(u16* p, float v) { *p = f32_to_bf16(v); }
DEVICE void put(float* p, float v) { *p = v; }

template <bool GATED>
struct GemvWork {
  static constexpr bool ONCE = true;
  static constexpr int COLUMNS = GATED ? TILE_ROWS / 2 : TILE_ROWS;
  const Gemv& a;
  int n, next_n, end;  // columns [n, next_n) are this pass
  DEVICE_MEMBER GemvWork(const Gemv& args, u32 cta, u32 ctas) : a(args) {
    n = next_n = (int)((i64)a.n * cta / ctas);
    end = (int)((i64)a.n * (cta + 1) / ctas);
  }
  DEVICE_MEMBER bool next() {
    n = next_n;
    next_n = min(n + COLUMNS, end);
    return n < end;
  }
  DEVICE_MEMBER int columns() const { return next_n - n; }
  DEVICE_MEMBER int rows() const { return GATED ? 2 * columns() : columns(); }
  DEVICE_MEMBER int tokens() const { return a.rows; }
  DEVICE_MEMBER int k() const { return a.k; }
  DEVICE_MEMBER const u16* w_row(int r) const {
    const int row = GATED && r >= columns() ? a.n + n + r - columns() : n + r;
    return a.w + (size_t)row * a.k;
  }
  DEVICE_MEMBER const u16* x_row(int t) const { return a.x + (size_t)t * a.x_stride; }
};

// CTA `cta` of `ctas` that share the product.
template <bool GATED>
DEVICE void gemv_body(const Gemv& a, u32 cta, u32 ctas) {
  extern __shared__ __align__(128) u8 gemv_shared[];
  const u32 base = smem_addr(gemv_shared);
  const GemvWork<GATED> work(a, cta, ctas);
  Engine::init(base);
  grid_launch_dependents();
  if (threadIdx.x >= Engine::COMPUTE) {
    Engine::load(work, base);
    return;
  }
  // What earlier launches read of `out` they have read.
  grid_wait();
  Engine::compute(work, gemv_shared, [&](const GemvWork<GATED>& p, const float* s) {
    const int columns = p.columns();
    for (int i = threadIdx.x; i < columns * a.rows; i += Engine::COMPUTE) {
      const int c = i % columns, t = i / columns, col = p.n + c;
      float v = Engine::total(s, c, t);
      if (a.bias) v += a.bias[col];
      if (GATED) {
        float up = Engine::total(s, columns + c, t);
        if (a.bias) up += a.bias[a.n + col];
        v = silu(v) * up;
      }
      put(a.out + (size_t)t * a.out_stride + col, v);
    }
  });
}

#if PAIR
// The first `ctas` CTAs have product a.
extern "C" __global__ void __launch_bounds__(Engine::THREADS) gemv_pair(const Gemv a, const Gemv b, const u32 ctas) {
  if (blockIdx.x < ctas) gemv_body<false>(a, blockIdx.x, ctas);
  else gemv_body<false>(b, blockIdx.x - ctas, gridDim.x - ctas);
}
#else
extern "C" __global__ void __launch_bounds__(Engine::THREADS) gemv(const Gemv a) { gemv_body<false>(a, blockIdx.x, gridDim.x); }
extern "C" __global__ void __launch_bounds__(Engine::THREADS) gemv_gated(const Gemv a) { gemv_body<true>(a, blockIdx.x, gridDim.x); }

// A warp computes one column of the output.
extern "C" __global__ void __launch_bounds__(256) gemv_any(const Gemv a) {
  const int col = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
  grid_launch_dependents();
  grid_wait();
  if (col >= a.n) return;
  const u16* w = a.w + (size_t)col * a.k;
  float sum[ROWS];
#pragma unroll
  for (int t = 0; t < ROWS; t++) sum[t] = 0.f;
  for (int i = lane; i < a.k; i += 32) {
    const float v = bf16_to_f32(w[i]);
#pragma unroll
    for (int t = 0; t < ROWS; t++)
      if (t < a.rows) sum[t] += v * bf16_to_f32(a.x[(size_t)t * a.x_stride + i]);
  }
#pragma unroll
  for (int t = 0; t < ROWS; t++) {
    const float v = warp_sum(sum[t]);
    if (lane == 0 && t < a.rows) put(a.out + (size_t)t * a.out_stride + col, a.bias ? v + a.bias[col] : v);
  }
}
#endif
