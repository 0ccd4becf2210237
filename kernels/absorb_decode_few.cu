// Absorb decode attention for Hopper, for sequences of few query rows (SQ x HEADS, at
// most 32): limited by memory alone. This text follows absorb_work.cu and wgmma.cu.
// Needs sm_90a.
//
// Here a block's 64 tokens are wgmma's 64 rows and the queries its N columns, so that
// no row of a product is padding:
//
//   S = K Q^T [64, N], softmax down its columns, O += V^T P [512, N],
//
// all by one warpgroup, which takes less than half of the time that a block is on
// its way from memory. A warp streams the cache through a ring of SLOTS panels (64 tokens x
// 64 columns, 8 KiB); a panel that has been multiplied is refilled at once.
//
// The running maximum of a column moves only when it grows by more than 2^8, and S of
// the next block is multiplied together with P V of this one. (B = 64, L = 8192 on an
// H200, beside absorb_decode: 143.4 against 147.7 us with 8 heads, 146.2 against 148.0
// with 16, 150.4 against 153.9 with 32; in GLM-4.7-Flash's step at W = 2, with one
// sequence, 6 % less. With 10 heads 144 us, 161 with a ring of 19 panels, 144 of 22.)

constexpr int N = ROWS <= 8 ? 8 : ROWS <= 16 ? 16 : 32;
constexpr int COLS = N / 4;                      // of S and O that a lane has: 8 j + 2 (lane % 4) + e is number 2 j + e
constexpr int CHAINS = N <= 16 ? 4 : 3;          // independent sums of S: products that are added up wait for each other
constexpr int VALUES = VDIM / 64;                // wgmma's of O
constexpr int FEW_THREADS = 128 + 32;

// Dynamic shared memory, which begins at 1024 bytes: the queries as panels of 64 columns [9][N, 64], P [N, 64 tokens],
// both swizzled; the ring; f32 [2][4 warps][N]; barriers.
constexpr int Q_PANEL = N * 128;
constexpr int SM_P = PANELS * Q_PANEL;
constexpr int SM_RING = SM_P + Q_PANEL;
constexpr int FIT = (227 * 1024 - 2048 - SM_RING) / PANEL, SLOTS = FIT < 25 ? FIT : 25;
constexpr int SM_TOP = SM_RING + SLOTS * PANEL;
constexpr int SM_BAR = SM_TOP + 2 * 4 * N * 4;
constexpr int FEW_SMEM = SM_BAR + 2 * SLOTS * 8;

static_assert(ROWS <= 32, "too many query rows: a job for absorb_decode");
static_assert(SLOTS > 2 * PANELS && FEW_SMEM <= 227 * 1024, "two blocks must fit");

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900

// Keeps the compiler from moving uses of accumulators across a wait or a fence.
template <int Sums>
DEVICE void settle(float (&sums)[Sums][2 * COLS]) {
#pragma unroll
  for (int i = 0; i < Sums; i++) settle(sums[i]);
}

// ---- the ring: the panels of all blocks, end to end ----

struct Place {
  u32 smem;
  int slot = 0;   // of a block's first panel
  u32 phase = 0;
  // Of the block's panel i.
  DEVICE_MEMBER int at(int i) const { return slot + i < SLOTS ? slot + i : slot + i - SLOTS; }
  DEVICE_MEMBER u32 parity(int i) const { return slot + i < SLOTS ? phase : phase ^ 1; }
  DEVICE_MEMBER u32 panel(int i) const { return smem + SM_RING + at(i) * PANEL; }
  DEVICE_MEMBER u32 full(int i) const { return smem + SM_BAR + at(i) * 16; }
  DEVICE_MEMBER u32 empty(int i) const { return full(i) + 8; }
  DEVICE_MEMBER void next() {
    slot += PANELS;
    if (slot >= SLOTS) slot -= SLOTS, phase ^= 1;
  }
};

// Blocks that lie whole before this step's tokens are asked for while the launch
// before this one still runs: nothing in the step writes them.
DEVICE void produce(const AbsorbParams& p, u32 smem, int lane) {
  const u64 policy = l2_evict_first();
  Place place{smem};
  bool waited = false;
  Work work = team_work(p, blockIdx.x);
  Segment s;
  while (next_segment(p, work, s)) {
    const int* table = p.block_table + (i64)s.batch * p.max_blocks + s.begin;
    const int n = s.end - s.begin, old = (s.len - SQ) / BLOCK - s.begin;
    int ids = 0, ids_next = lane < n ? table[lane] : 0;
    for (int k = 0; k < n; k++, place.next()) {
      if (k % 32 == 0) {  // the table's next 32 entries are on their way before they are needed
        ids = ids_next;
        ids_next = k + 32 + lane < n ? table[k + 32 + lane] : 0;
      }
      const u8* block = (const u8*)(p.cache + (i64)__shfl_sync(0xffffffffu, ids, k % 32) * (BLOCK * DIM));
      if (k >= old && !waited) {
        if (lane < PANELS) prefetch_bulk(block + lane * PANEL, PANEL);
        grid_wait();
        waited = true;
      }
      const int bytes = min(BLOCK, s.len - (s.begin + k) * BLOCK) * 128;
      if (lane == 0) {
#pragma unroll
        for (int i = 0; i < PANELS; i++) {
          mbar_wait(place.empty(i), place.parity(i) ^ 1);
          mbar_arrive_expect(place.full(i), PANEL);
          bulk_load_hint(place.panel(i), block + i * PANEL, bytes, place.full(i), policy);
          if (bytes < PANEL) bulk_load_hint(place.panel(i) + bytes, absorb_zeros, PANEL - bytes, place.full(i), policy);
        }
      }
      __syncwarp();
    }
  }
}

// ---- the warpgroup that computes ----

struct Consumer {
  u32 smem;
  int warp, lane;
  float m[COLS];  // running maximum of this lane's columns, in log2 units
  float l[COLS];  // this lane's part of the sum
};

// A sequence's query rows into their panels. The rows that no query has stay as `clear_queries` left them.
DEVICE void load_queries(u32 smem, const u16* q) {
  for (int c = threadIdx.x; c < ROWS * (DIM / 8); c += 128) {
    const int row = c / (DIM / 8), col = c % (DIM / 8);
    cp_async16(smem + col / 8 * Q_PANEL + row * 128 + ((col % 8 ^ row % 8) << 4), q + (i64)c * 8, 16);
  }
  cp_async_commit();
  cp_async_wait<0>();
  fence_proxy_async();
  named_barrier(1, 128);
}
DEVICE void clear_queries(u32 smem) {
  for (int c = ROWS * 8 + threadIdx.x; c < N * 8; c += 128)
#pragma unroll
    for (int i = 0; i < PANELS; i++)
      asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(smem + i * Q_PANEL + c * 16), "r"(0) : "memory");
}

// S = K Q^T of a block, panel after panel as they arrive.
DEVICE void issue_s(const Consumer& c, float (&s)[CHAINS][2 * COLS], const Place& place) {
#pragma unroll
  for (int i = 0; i < PANELS; i++) {
    mbar_wait(place.full(i), place.parity(i));
    wgmma_fence();
    const u64 a = matrix(place.panel(i)), b = matrix(c.smem + i * Q_PANEL);
#pragma unroll
    for (int k = 0; k < 4; k++) wgmma<false>(s[(i * 4 + k) % CHAINS], a + 2 * k, b + 2 * k, i * 4 + k >= CHAINS);
  }
  wgmma_commit();
}

// O += V^T P of a block.
DEVICE void issue_o(const Consumer& c, float (&o)[VALUES][2 * COLS], const Place& place) {
  const u64 b = matrix(c.smem + SM_P);
  settle(o);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4; k++)
#pragma unroll
    for (int i = 0; i < VALUES; i++)
      wgmma<true>(o[i], turned_matrix(place.panel(i)) + k * (2048 >> 4), b + 2 * k, 1);
  wgmma_commit();
}

// Gives panels [from, to) of a block back.
DEVICE void release(const Consumer& c, const Place& place, int from, int to) {
  if (c.lane >= from && c.lane < to) mbar_arrive(place.empty(c.lane));
}

// A column's value over all tokens of the warp, by `join`.
template <class Join>
DEVICE void over_rows(float (&x)[COLS], Join join) {
#pragma unroll
  for (int d = 4; d < 32; d *= 2)
#pragma unroll
    for (int i = 0; i < COLS; i++) x[i] = join(x[i], __shfl_xor_sync(0xffffffffu, x[i], d));
}

// The same over all four warps, by way of room `turn` of SM_TOP.
template <class Join>
DEVICE void over_warps(const Consumer& c, float (&x)[COLS], int turn, Join join) {
  over_rows(x, join);
  const u32 room = c.smem + SM_TOP + turn * (4 * N * 4) + c.lane % 4 * 8;
  if (c.lane < 4)
#pragma unroll
    for (int j = 0; j < COLS / 2; j++)
      asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(room + c.warp * (N * 4) + j * 32), "f"(x[2 * j]), "f"(x[2 * j + 1])
                   : "memory");
  named_barrier(1, 128);
#pragma unroll
  for (int w = 0; w < 4; w++)
#pragma unroll
    for (int j = 0; j < COLS / 2; j++) {
      float v[2];
      asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v[0]), "=f"(v[1]) : "r"(room + w * (N * 4) + j * 32) : "memory");
#pragma unroll
      for (int e = 0; e < 2; e++) x[2 * j + e] = w == 0 ? v[e] : join(x[2 * j + e], v[e]);
    }
}

// P = exp2(S scale - m), to shared memory.
DEVICE void softmax(Consumer& c, float (&s)[2 * COLS], float (&o)[VALUES][2 * COLS], float scale, int token, int len, int turn) {
  if (token + BLOCK > len - (SQ - 1)) {  // row (t, head) sees the first len - SQ + 1 + t keys
#pragma unroll
    for (int i = 0; i < 2 * COLS; i++) {
      const int row = i / 4 * 8 + c.lane % 4 * 2 + i % 2, key = token + c.warp * 16 + c.lane / 4 + i % 4 / 2 * 8;
      if (key >= len - (SQ - 1) + min(row / HEADS, SQ - 1)) s[i] = NEG_INF;
    }
  }
  float x[COLS];
#pragma unroll
  for (int i = 0; i < COLS; i++) x[i] = fmaxf(s[i / 2 * 4 + i % 2], s[i / 2 * 4 + 2 + i % 2]);
  over_warps(c, x, turn, [](float a, float b) { return fmaxf(a, b); });
  bool grows = false;
#pragma unroll
  for (int i = 0; i < COLS; i++) {
    x[i] = x[i] * scale > c.m[i] + RESCALE ? x[i] * scale : c.m[i];
    grows |= x[i] != c.m[i];
  }
  if (__any_sync(0xffffffffu, grows)) {
#pragma unroll
    for (int i = 0; i < COLS; i++) {
      const float f = exp2_fast(c.m[i] - x[i]);
#pragma unroll
      for (int v = 0; v < VALUES; v++) o[v][i / 2 * 4 + i % 2] *= f, o[v][i / 2 * 4 + 2 + i % 2] *= f;
      c.l[i] *= f, c.m[i] = x[i];
    }
  }
  u32 a[COLS];  // of 8 columns each: tokens from 0 on, from 8 on
#pragma unroll
  for (int i = 0; i < COLS; i++) {
    float e[2];
#pragma unroll
    for (int k = 0; k < 2; k++) {
      e[k] = exp2_fast(s[i * 2 + k] * scale - c.m[i / 2 * 2 + k]);
      c.l[i / 2 * 2 + k] += e[k];
    }
    a[i] = pack_bf16(e[0], e[1]);
  }
#pragma unroll
  for (int i = 0; i < COLS; i += 2) {
    const int row = i / 2 * 8 + c.lane % 8, chunk = c.warp * 2 + c.lane / 8 % 2;
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(c.smem + SM_P + row * 128 + ((chunk ^ row % 8) << 4)),
                 "r"(a[i]), "r"(a[i + 1])
                 : "memory");
  }
  fence_proxy_async();
  named_barrier(1, 128);
}

DEVICE void write_rows(const AbsorbParams& p, Consumer& c, const float (&o)[VALUES][2 * COLS], const Segment& s, int turn) {
  over_warps(c, c.l, turn, [](float a, float b) { return a + b; });
  float inv[COLS];
#pragma unroll
  for (int i = 0; i < COLS; i++) inv[i] = c.l[i] > 0.f ? 1.f / c.l[i] : 0.f;
  if (p.seq[s.batch].y == 1) {
    u16* to = p.out + (i64)s.batch * ROWS * VDIM;
#pragma unroll
    for (int v = 0; v < VALUES; v++)
#pragma unroll
      for (int i = 0; i < COLS; i++) {  // 8 rows of the output by 8 columns, turned among the lanes
        u32 x = pack_bf16(o[v][i * 2] * inv[i / 2 * 2], o[v][i * 2 + 1] * inv[i / 2 * 2 + 1]);
        asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(x));
        const int row = i / 2 * 8 + c.lane / 4, col = v * 64 + c.warp * 16 + i % 2 * 8 + c.lane % 4 * 2;
        if (row < ROWS) *(u32*)(to + row * VDIM + col) = x;
      }
    return;
  }
  const i64 first = (i64)(s.batch + (int)blockIdx.x) * ROWS;
#pragma unroll
  for (int v = 0; v < VALUES; v++)
#pragma unroll
    for (int i = 0; i < 2 * COLS; i++) {
      const int row = i / 4 * 8 + c.lane % 4 * 2 + i % 2, col = v * 64 + c.warp * 16 + i % 4 / 2 * 8 + c.lane / 4;
      if (row < ROWS) p.part_o[(first + row) * VDIM + col] = o[v][i] * inv[i / 4 * 2 + i % 2];
    }
  if (c.warp == 0 && c.lane < 4)
#pragma unroll
    for (int i = 0; i < COLS; i++) {
      const int row = i / 2 * 8 + c.lane % 4 * 2 + i % 2;
      if (row < ROWS) p.part_lse[first + row] = c.l[i] > 0.f ? c.m[i] + log2_fast(c.l[i]) : NEG_INF;
    }
}

DEVICE void consume(const AbsorbParams& p, u32 smem) {
  Consumer c;
  c.smem = smem, c.warp = threadIdx.x / 32, c.lane = threadIdx.x % 32;
  const float scale = p.scale * LOG2E;
  float o[VALUES][2 * COLS], s[CHAINS][2 * COLS];
  clear_queries(smem);
  Place place{smem};
  int turn = 0;
  Work work = team_work(p, blockIdx.x);
  Segment seg;
  grid_wait();
  grid_launch_dependents();  // the next launch waits for the whole of this one anyway
  while (next_segment(p, work, seg)) {
    const int n = seg.end - seg.begin;
    load_queries(smem, p.q + (i64)seg.batch * ROWS * DIM);
#pragma unroll
    for (int i = 0; i < COLS; i++) c.m[i] = -1e30f, c.l[i] = 0.f;
#pragma unroll
    for (int v = 0; v < VALUES; v++)
#pragma unroll
      for (int i = 0; i < 2 * COLS; i++) o[v][i] = 0.f;
    int k = 0;
    // S of block k is multiplied: its softmax.
    auto weigh = [&]() {
      settle(s);
      release(c, place, VALUES, PANELS);  // nobody needs the rope key after S
#pragma unroll
      for (int i = 0; i < 2 * COLS; i++)
#pragma unroll
        for (int j = 1; j < CHAINS; j++) s[0][i] += s[j][i];
      softmax(c, s[0], o, scale, (seg.begin + k) * BLOCK, seg.len, turn++ % 2);
    };
    issue_s(c, s, place);
    wgmma_wait<0>();
    weigh();
    for (k = 1; k < n; k++) {
      const Place before = place;
      issue_o(c, o, before);
      place.next();
      issue_s(c, s, place);
      wgmma_wait<1>();
      settle(o);
      release(c, before, 0, VALUES);
      wgmma_wait<0>();
      weigh();
    }
    issue_o(c, o, place);
    wgmma_wait<0>();
    settle(o);
    release(c, place, 0, VALUES);
    place.next();
    write_rows(p, c, o, seg, turn++ % 2);
  }
}
#endif

// Grid: teams, one CTA each, one to a multiprocessor: teams = multiprocessors; block FEW_THREADS; dynamic shared memory
// FEW_SMEM. Before it absorb_plan (or split_plan) for `teams`, once a step, and complete before this launch begins; after
// it combine.
extern "C" __global__ void __launch_bounds__(FEW_THREADS, 1) absorb_decode_few(const __grid_constant__ AbsorbParams p) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
  extern __shared__ __align__(1024) u8 few_shared[];
  const u32 smem = smem_addr(few_shared);
  if (threadIdx.x == 0) {
    for (int i = 0; i < SLOTS; i++) {
      mbar_init(smem + SM_BAR + i * 16, 1);
      mbar_init(smem + SM_BAR + i * 16 + 8, 4);
    }
    mbar_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < 128) consume(p, smem);
  else produce(p, smem, threadIdx.x % 32);
#endif
}
