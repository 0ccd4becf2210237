// The chosen experts' gated MLPs, from a decode step's one row to a prefill chunk.
// The router (route.cu) has sorted rows by expert; each product streams every chosen
// expert's weights through once for all its rows (up to TOKENS a segment; an expert
// with more rows has several, whose weights then come from L2). The shared expert is
// one that every row chose, with weight 1.
//
// In the order of launches, on cards later than Hopper (for Hopper see experts_hopper.cu):
//   experts_gate_up  grid number of multiprocessors; block EXPERTS_THREADS = 384; dynamic shared memory UP_SMEM
//   experts_down     grid number of multiprocessors; block EXPERTS_THREADS = 384; dynamic shared memory DOWN_SMEM
//   experts_sum      grid (ceil(HIDDEN / 1024), rows); block 128
// With overlapping launches experts_down must directly follow experts_gate_up: its
// loading warps read the plan before grid_wait.
// Where HIDDEN, WIDTH or SHARED_WIDTH is no multiple of 32, and on older cards, instead of the first two:
//   experts_gate_up_any, experts_down_any: grid any (4 a multiprocessor); block 256; no dynamic shared memory
//
// -D EXPERTS routed ones (at most 1023), TOP_K, HIDDEN, WIDTH of one expert on this rank,
//    SHARED_WIDTH of the shared one on this rank (0: none)
//    TOKENS rows a segment: 8 up to 8 rows, else 64
//    TILE_ROWS, STEP, UP_RING, DOWN_RING, LOADERS tiling, defaults below
// The module's global ints experts_up_bytes, experts_down_bytes and experts_threads
// hold the shared memory and the block's size.

struct Experts {
  const u16* x;               // [rows, HIDDEN]
  const int* ids;             // [rows, TOP_K]; a row whose first id is negative is padding
  const float* weights;       // [rows, TOP_K]
  const u16* gate_up;         // [EXPERTS, 2 * WIDTH, HIDDEN], an expert's gate rows first
  const u16* down;            // [EXPERTS, HIDDEN, WIDTH]
  const u16* shared_gate_up;  // [2 * SHARED_WIDTH, HIDDEN] or null
  const u16* shared_down;     // [HIDDEN, SHARED_WIDTH] or null
  const int* count;           // [2] segments of routed experts, and of the shared one
  const int4* segments;       // [EXPERTS + 2 + rows * SLOTS / TOKENS] {expert, first position, rows, 0}
  const int* order;           // [rows * SLOTS] pair at each position; pair = row * SLOTS + k
  u16* h;                     // [rows * SLOTS, max(WIDTH, SHARED_WIDTH)] workspace, by position
  float* y;                   // [rows * SLOTS, HIDDEN] workspace, by pair
  u16* out;                   // [rows, HIDDEN]
  int rows;
};                            // SLOTS = TOP_K, and one more with a shared expert

constexpr int SHARED = SHARED_WIDTH > 0 ? 1 : 0;
constexpr int SLOTS = TOP_K + SHARED;
constexpr int H_WIDTH = WIDTH > SHARED_WIDTH ? WIDTH : SHARED_WIDTH;

#ifndef TILE_ROWS
#define TILE_ROWS (SHARED_KIB < 100 || TOKENS <= 8 ? 32 : 64)
#endif
#ifndef STEP
#define STEP (SHARED_KIB < 100 ? (TOKENS <= 8 ? 256 : 128) : TOKENS <= 8 ? 512 : 128)
#endif
#ifndef LOADERS
#define LOADERS 3
#endif
// With few rows a CTA of each of the two products fits in a multiprocessor, so that
// the second's first weights are on their way while the first ends.
constexpr int EXPERTS_STAGE = (TILE_ROWS + TOKENS) * (STEP * 2 + 64);
constexpr int EXPERTS_FIT = SHARED_KIB * 1024 / EXPERTS_STAGE < 2 ? 2 : SHARED_KIB * 1024 / EXPERTS_STAGE;
#ifndef UP_RING
#define UP_RING (TOKENS <= 8 ? 3 : EXPERTS_FIT)
#endif
#ifndef DOWN_RING
#define DOWN_RING (TOKENS <= 8 ? 2 : EXPERTS_FIT)
#endif
template <bool UP>
struct ExpertsEngine : Skinny<TILE_ROWS, TOKENS, TOKENS, STEP, UP ? UP_RING : DOWN_RING, LOADERS> {};
constexpr int UP_SMEM = ExpertsEngine<true>::BYTES, DOWN_SMEM = ExpertsEngine<false>::BYTES;
constexpr int EXPERTS_THREADS = ExpertsEngine<true>::THREADS;
extern "C" __device__ int experts_up_bytes = UP_SMEM;
extern "C" __device__ int experts_down_bytes = DOWN_SMEM;
extern "C" __device__ int experts_threads = EXPERTS_THREADS;

// All columns of all segments, end to end; each CTA takes an equal share of the
// weights' bytes. UP: columns are the expert's width, else the hidden size.
template <bool UP>
struct ExpertsWork {
  static constexpr bool ONCE = false;
  static constexpr int COLUMNS = UP ? TILE_ROWS / 2 : TILE_ROWS;
  const Experts& a;
  int routed;                        // segments
  int at, end;                       // columns, over all segments
  int n, columns_, first, tokens_;   // of this pass
  int expert;
  DEVICE_MEMBER static int width(bool shared) { return UP ? (shared ? SHARED_WIDTH : WIDTH) : HIDDEN; }
  DEVICE_MEMBER static int reduction(bool shared) { return UP ? HIDDEN : (shared ? SHARED_WIDTH : WIDTH); }
  DEVICE_MEMBER ExpertsWork(const Experts& args) : a(args), at(0), end(0) {}
  // After the plan is there.
  DEVICE_MEMBER void begin() {
    routed = load_fresh(a.count);
    const int shared = load_fresh(a.count + 1);
    at = bound(blockIdx.x, shared);
    end = bound(blockIdx.x + 1, shared);
  }
  DEVICE_MEMBER int bound(int cta, int shared) const {
    const i64 unit = reduction(false), shared_unit = SHARED ? reduction(true) : 1;
    const i64 split = (i64)routed * width(false) * unit;
    const i64 all = split + (i64)shared * width(true) * shared_unit;
    const i64 b = all * cta / gridDim.x;
    return b <= split ? (int)(b / unit) : routed * width(false) + (int)((b - split) / shared_unit);
  }
  DEVICE_MEMBER bool next() {
    if (at >= end) return false;
    const int split = routed * width(false);
    const bool shared = SHARED && at >= split;
    const int w = shared ? width(true) + (width(true) == 0) : width(false);
    const int v = shared ? at - split : at;
    const int segment = v / w;
    n = v - segment * w;
    columns_ = min(min(COLUMNS, end - at), w - n);
    const int4 s = load_fresh(a.segments + (shared ? routed : 0) + segment);
    expert = s.x, first = s.y, tokens_ = s.z;
    at += columns_;
    return true;
  }
  DEVICE_MEMBER bool shared() const { return SHARED && expert == EXPERTS; }
  DEVICE_MEMBER int rows() const { return UP ? 2 * columns_ : columns_; }
  DEVICE_MEMBER int tokens() const { return tokens_; }
  DEVICE_MEMBER int k() const { return reduction(shared()); }
  DEVICE_MEMBER const u16* w_row(int r) const {
    if (UP) {
      const int row = r < columns_ ? n + r : width(shared()) + n + r - columns_;
      return (shared() ? a.shared_gate_up : a.gate_up + (size_t)expert * 2 * WIDTH * HIDDEN) + (size_t)row * HIDDEN;
    }
    return (shared() ? a.shared_down : a.down + (size_t)expert * HIDDEN * WIDTH) + (size_t)(n + r) * k();
  }
  DEVICE_MEMBER const u16* x_row(int t) const {
    return UP ? a.x + (size_t)(a.order[first + t] / SLOTS) * HIDDEN : a.h + (size_t)(first + t) * H_WIDTH;
  }
};

// The shared expert's weights are known before the choice is: this CTA's part of
// them is brought to L2 while the router is at work.
DEVICE void prefetch_shared(const u16* p, size_t elems) {
  const size_t lines = elems / 64, end = lines * (blockIdx.x + 1) / gridDim.x;
  for (size_t i = lines * blockIdx.x / gridDim.x + threadIdx.x; i < end; i += blockDim.x) prefetch_l2(p + i * 64);
}

template <bool UP>
DEVICE void experts_body(const Experts& a) {
  typedef ExpertsEngine<UP> Engine;
  extern __shared__ __align__(128) u8 experts_shared[];
  const u32 base = smem_addr(experts_shared);
  const bool loading = threadIdx.x >= Engine::COMPUTE;
  if (UP) {
    if (SHARED) {
      prefetch_shared(a.shared_gate_up, (size_t)2 * SHARED_WIDTH * HIDDEN);
      prefetch_shared(a.shared_down, (size_t)HIDDEN * SHARED_WIDTH);
    }
    Engine::init(base);
    grid_wait();
    // Only now: experts_down relies on it that the plan was there before it began.
    grid_launch_dependents();
  } else {
    grid_launch_dependents();
    Engine::init(base);
    // The warps that load weights go ahead, everything else needs h.
    if (!loading || threadIdx.x / 32 == Engine::THREADS / 32 - 1) grid_wait();
  }
  ExpertsWork<UP> work(a);
  work.begin();
  if (loading) {
    Engine::load(work, base);
    return;
  }
  Engine::compute(work, experts_shared, [&](const ExpertsWork<UP>& p, const float* s) {
    const int columns = p.columns_;
    for (int i = threadIdx.x; i < columns * p.tokens_; i += Engine::COMPUTE) {
      const int c = i % columns, t = i / columns, col = p.n + c;
      float v = Engine::total(s, c, t);
      if (UP) {
        v = silu(v) * Engine::total(s, columns + c, t);
        a.h[(size_t)(p.first + t) * H_WIDTH + col] = f32_to_bf16(v);
      } else {
        a.y[(size_t)a.order[p.first + t] * HIDDEN + col] = v;
      }
    }
  });
}

extern "C" __global__ void __launch_bounds__(EXPERTS_THREADS) experts_gate_up(const Experts a) {
  experts_body<true>(a);
}
extern "C" __global__ void __launch_bounds__(EXPERTS_THREADS) experts_down(const Experts a) {
  experts_body<false>(a);
}

// The same for any dimensions: a warp takes one column of one segment.
template <bool UP>
DEVICE void experts_any(const Experts& a) {
  grid_launch_dependents();
  grid_wait();
  const int lane = threadIdx.x % 32, routed = a.count[0], shared_segments = a.count[1];
  typedef ExpertsWork<UP> Work;
  const int split = routed * Work::width(false), total = split + shared_segments * Work::width(true);
  for (int v = blockIdx.x * 8 + threadIdx.x / 32; v < total; v += gridDim.x * 8) {
    Work p(a);
    p.routed = routed;
    p.at = v;
    p.end = v + 1;
    p.next();
    const int k = p.k();
    for (int t = 0; t < p.tokens_; t++) {
      const u16* x = p.x_row(t);
      const u16* w = p.w_row(0);
      const u16* up = p.w_row(UP ? 1 : 0);
      float sum = 0.f, sum_up = 0.f;
      for (int i = lane; i < k; i += 32) {
        sum += bf16_to_f32(w[i]) * bf16_to_f32(x[i]);
        if (UP) sum_up += bf16_to_f32(up[i]) * bf16_to_f32(x[i]);
      }
      sum = warp_sum(sum);
      sum_up = warp_sum(sum_up);
      if (lane == 0) {
        if (UP) a.h[(size_t)(p.first + t) * H_WIDTH + p.n] = f32_to_bf16(silu(sum) * sum_up);
        else a.y[(size_t)a.order[p.first + t] * HIDDEN + p.n] = sum;
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(256) experts_gate_up_any(const Experts a) { experts_any<true>(a); }
extern "C" __global__ void __launch_bounds__(256) experts_down_any(const Experts a) { experts_any<false>(a); }

// out = sum over the chosen of weight * y, plus the shared expert's y; zeros for padding.
extern "C" __global__ void __launch_bounds__(128) experts_sum(const Experts a) {
  const size_t row = blockIdx.y;
  grid_launch_dependents();
  grid_wait();
  const bool live = a.ids[row * TOP_K] >= 0;
  float w[SLOTS];
#pragma unroll
  for (int k = 0; k < SLOTS; k++) w[k] = k < TOP_K ? a.weights[row * TOP_K + k] : 1.f;
  const float* y = a.y + row * SLOTS * HIDDEN;
  const int col = (blockIdx.x * 128 + threadIdx.x) * 8;
  if (HIDDEN % 8 == 0) {
    if (col >= HIDDEN) return;
    // All that is read is under way at once, even what a padded row then does not want.
    float4 p[SLOTS], q[SLOTS];
#pragma unroll
    for (int k = 0; k < SLOTS; k++) {
      p[k] = *(const float4*)(y + (size_t)k * HIDDEN + col);
      q[k] = *(const float4*)(y + (size_t)k * HIDDEN + col + 4);
    }
    float sum[8];
#pragma unroll
    for (int i = 0; i < 8; i++) sum[i] = 0.f;
    if (live) {
#pragma unroll
      for (int k = 0; k < SLOTS; k++) {
        sum[0] += w[k] * p[k].x, sum[1] += w[k] * p[k].y, sum[2] += w[k] * p[k].z, sum[3] += w[k] * p[k].w;
        sum[4] += w[k] * q[k].x, sum[5] += w[k] * q[k].y, sum[6] += w[k] * q[k].z, sum[7] += w[k] * q[k].w;
      }
    }
    *(uint4*)(a.out + row * HIDDEN + col) = make_uint4(pack_bf16(sum[0], sum[1]), pack_bf16(sum[2], sum[3]),
                                                       pack_bf16(sum[4], sum[5]), pack_bf16(sum[6], sum[7]));
  } else {
    for (int c = col; c < min(col + 8, HIDDEN); c++) {
      float sum = 0.f;
      if (live) {
#pragma unroll
        for (int k = 0; k < SLOTS; k++) sum += w[k] * y[(size_t)k * HIDDEN + c];
      }
      a.out[row * HIDDEN + c] = f32_to_bf16(sum);
    }
  }
}
