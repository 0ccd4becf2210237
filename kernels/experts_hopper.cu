// The chosen experts' products for Hopper, from one row to a prefill chunk. This
// text follows experts.cu, whose parameters and sum it shares, and wgmma.cu.
//
// Up to 64 tokens are wgmma's 64 rows and weights its columns, so that a pass takes any
// number of 32-row weight tiles; up to 8 tokens are its columns and weights its rows,
// which takes half the time. The weights were brought into the order of shared memory when they
// were loaded (experts_tile.cu), so that one bulk copy brings 32 rows x 64 columns.
// Tokens' rows are gathered with cp.async. Passes lie end to end over all segments;
// each CTA takes an equal share of the weights' bytes.
//
//   experts_gate_up_hopper  grid number of multiprocessors; block HOPPER_THREADS; dynamic shared memory UP_BYTES
//   experts_down_hopper     the same; DOWN_BYTES
// In place of experts_gate_up and experts_down of experts.cu, with the same promise
// about overlapping launches.
//
// HIDDEN, WIDTH and SHARED_WIDTH are multiples of 64; TOKENS is 8 (up to 8 rows) or 64.
//
// Tried and slower: two CTAs, each with half of the reduction, sharing twice the
// weight rows (tokens are read from L2 half as often, but the exchange of sums costs
// more: 3.1 against 4.1 TB/s with every expert chosen); asking L2 for the second
// product's weights while the first ends (the first ends later); smaller rings, so that
// both products fit in a multiprocessor (27.0 against 22.0 us at 64 rows of one choice).

#if TOKENS != 8 && TOKENS != 64
#error "segments of 8 or 64 tokens"
#endif
#ifndef X_PANELS
#define X_PANELS 2  // of a stage, at most
#endif
#ifndef UP_SLOTS
#define UP_SLOTS (TOKENS == 8 ? 11 : 6)
#endif
#ifndef DOWN_SLOTS
#define DOWN_SLOTS UP_SLOTS
#endif
#ifndef GATHERERS
#define GATHERERS (TOKENS == 8 ? 1 : 3)  // warps that bring tokens
#endif

constexpr int TILE_BYTES = 4096;          // 32 weight rows x 64 columns (a panel), swizzled
constexpr int TILES = 4;                  // of a pass, at most
constexpr int X_BYTES = TOKENS * 128;     // a panel of a segment's tokens, swizzled
constexpr int SLOT_W = X_PANELS * X_BYTES;             // where a slot's weights begin
constexpr int SLOT = SLOT_W + TILES * TILE_BYTES;
// The plan of so few rows is copied to shared memory: there it has few segments.
constexpr int PLAN_ROWS = TOKENS, PLAN_SEGMENTS = EXPERTS + 2;
constexpr int PLAN = PLAN_SEGMENTS * 16 + (2 + PLAN_ROWS * SLOTS) * 4;
constexpr int HOPPER_THREADS = 128 + 32 + 32 * GATHERERS;
#define PLAN_AT(slots) ((slots) * SLOT + (slots) * 16)
constexpr int UP_BYTES = PLAN_AT(UP_SLOTS) + PLAN, DOWN_BYTES = PLAN_AT(DOWN_SLOTS) + PLAN;

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900

// ---- this CTA's passes, in an order that all its warps repeat ----

// Where the plan is: in global memory, or this CTA's copy.
struct Plan {
  const int* count;
  const int4* segments;
  const int* order;
};
// Through any address, past the first-level cache.
DEVICE int load_any(const int* p) { return *(const volatile int*)p; }

template <bool UP>
struct Passes {
  const Experts& a;
  const Plan& plan;
  int routed, at, end;  // segments; tiles, over all segments
  int expert, first, tokens, tile, tiles;  // of this pass: the first tile and how many
  DEVICE_MEMBER static int all(bool shared) { return UP ? (shared ? SHARED_WIDTH : WIDTH) / 16 : HIDDEN / 32; }
  DEVICE_MEMBER static int columns(bool shared) { return UP ? HIDDEN : (shared ? SHARED_WIDTH : WIDTH); }
  DEVICE_MEMBER Passes(const Experts& args, const Plan& planned) : a(args), plan(planned) {
    constexpr bool ALIKE = !SHARED || SHARED_WIDTH == WIDTH;
    routed = load_any(plan.count);
    const int shared = load_any(plan.count + 1);
    const u32 cta = blockIdx.x, ctas = gridDim.x, segments = routed + shared, each = all(false);
    const u32 fewest = segments == 0 ? 0 : ctas / segments;  // CTAs of a segment
    if (ALIKE && fewest > 0 && ceil_div(each, fewest) <= ceil_div(segments * each, ctas)) {
      // No CTA has more than with equal shares if each keeps to one segment: less to begin and end.
      const u32 segment = cta * segments / ctas;
      const u32 from = ceil_div(segment * ctas, segments), to = ceil_div((segment + 1) * ctas, segments);
      at = segment * each + each * (cta - from) / (to - from);
      end = segment * each + each * (cta + 1 - from) / (to - from);
    } else {
      at = bound(cta, shared);
      end = bound(cta + 1, shared);
    }
  }
  DEVICE_MEMBER int bound(u32 cta, int shared) const {
    const u32 unit = columns(false) / 64, shared_unit = SHARED ? columns(true) / 64 : 1;
    const u32 split = routed * all(false) * unit, total = split + shared * all(true) * shared_unit;
    const u32 each = total / gridDim.x, b = each * cta + (total - each * gridDim.x) * cta / gridDim.x;
    return b <= split ? b / unit : routed * all(false) + (b - split) / shared_unit;
  }
  DEVICE_MEMBER bool next() {
    if (at >= end) return false;
    const int split = routed * all(false);
    const bool shared = SHARED && at >= split;
    const int w = SHARED && shared ? all(true) : all(false), v = shared ? at - split : at;
    const int segment = v / w;
    tile = v - segment * w;
    // What is left of the segment, the last two passes alike.
    const int left = min(end - at, w - tile);
    tiles = left <= TILES ? left : left < 2 * TILES ? (left + 1) / 2 : TILES;
    const int* s = (const int*)(plan.segments + (shared ? routed : 0) + segment);
    expert = load_any(s), first = load_any(s + 1), tokens = load_any(s + 2);
    at += tiles;
    return true;
  }
  DEVICE_MEMBER bool shared() const { return SHARED && expert == EXPERTS; }
  DEVICE_MEMBER int pair(int t) const { return load_any(plan.order + first + t); }
  // The reduction in panels of 64; the tiles that are multiplied; the panels of a stage.
  DEVICE_MEMBER int panels() const { return columns(shared()) / 64; }
  DEVICE_MEMBER int room() const { return tiles <= TILES / 2 ? TILES / 2 : TILES; }
  DEVICE_MEMBER int stage() const { return min(X_PANELS, TILES / room()); }
  DEVICE_MEMBER const u8* weights() const {
    const u16* w = UP ? a.gate_up : a.down;
    const size_t each = (size_t)(UP ? 2 : 1) * WIDTH * HIDDEN;
    const u16* p = shared() ? (UP ? a.shared_gate_up : a.shared_down) : w + expert * each;
    return (const u8*)p + (size_t)tile * panels() * TILE_BYTES;
  }
};

// The ring's slots: stage n is in slot n % Slots.
template <int Slots>
struct Ring {
  u32 base;
  int slot;
  u32 phase;
  DEVICE_MEMBER Ring(u32 b) : base(b), slot(0), phase(0) {}
  DEVICE_MEMBER u32 at() const { return base + slot * SLOT; }
  DEVICE_MEMBER static u32 bars(u32 b) { return b + Slots * SLOT; }
  DEVICE_MEMBER u32 full() const { return bars(base) + slot * 16; }
  DEVICE_MEMBER u32 empty() const { return full() + 8; }
  DEVICE_MEMBER void advance() {
    if (++slot == Slots) slot = 0, phase ^= 1;
  }
};

template <bool UP, int Slots>
DEVICE void load_weights(const Experts& a, const Plan& plan, u32 base) {
  const u64 policy = l2_evict_first();
  Ring<Slots> ring(base);
  Passes<UP> p(a, plan);
  while (p.next()) {
    const int panels = p.panels(), stage = p.stage(), stride = p.room() * TILE_BYTES;
    const u8* w = p.weights();
    for (int i = 0; i < panels; i += stage) {
      const int here = min(stage, panels - i);
      mbar_wait(ring.empty(), ring.phase ^ 1);
      mbar_arrive_expect(ring.full(), here * p.tiles * TILE_BYTES);
      for (int k = 0; k < here; k++)
        for (int t = 0; t < p.tiles; t++)
          bulk_load_hint(ring.at() + SLOT_W + k * stride + t * TILE_BYTES, w + (t * panels + i + k) * TILE_BYTES,
                         TILE_BYTES, ring.full(), policy);
      ring.advance();
    }
  }
}

// A warp instruction brings 128 bytes of four tokens.
template <bool UP, int Slots>
DEVICE void load_tokens(const Experts& a, const Plan& plan, u32 base, int warp, int lane) {
  constexpr int TURNS = (TOKENS / 4 + GATHERERS - 1) / GATHERERS;
  Ring<Slots> ring(base);
  Passes<UP> p(a, plan);
  const int c = lane % 8;
  while (p.next()) {
    const int panels = p.panels(), stage = p.stage();
    const u16* x[TURNS];
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
      const int t = (i * GATHERERS + warp) * 4 + lane / 8;
      x[i] = nullptr;
      if (t < p.tokens) {
        const u16* row = UP ? a.x + (size_t)(p.pair(t) / SLOTS) * HIDDEN : a.h + (size_t)(p.first + t) * H_WIDTH;
        x[i] = row + c * 8;
      }
    }
    if (!UP && ring.slot == 0 && ring.phase == 0) grid_wait();
    for (int k = 0; k < panels; k += stage) {
      mbar_wait(ring.empty(), ring.phase ^ 1);
      u32 to = ring.at();
      for (int j = k; j < min(k + stage, panels); j++, to += X_BYTES) {
#pragma unroll
        for (int i = 0; i < TURNS; i++) {
          const int t = (i * GATHERERS + warp) * 4 + lane / 8;
          if (x[i]) cp_async16(to + t * 128 + ((c ^ (t % 8)) << 4), x[i] + j * 64, 16);
        }
      }
      mbar_arrive_copies(ring.full());
      ring.advance();
    }
  }
}

// A pass's sums of NT tiles and all tokens. With 8 tokens: of 64 weight rows each, this lane
// has rows 16 warp + lane / 4 (+ 8) and tokens lane % 4 * 2 (+ 1). With 64: this lane has tokens
// 16 warp + lane / 4 (+ 8) and of each 8 weight rows the columns lane % 4 * 2 (+ 1).
// Products that are added up wait for each other, some 50 ns each: so there are several chains.
template <int NT>
struct Sums {
  static constexpr int PARTS = TOKENS == 8 ? NT / 2 : 1, EACH = TOKENS == 8 ? 4 : NT * 16, CHAINS = TOKENS == 8 ? 4 : 4 / NT;
  float d[CHAINS * PARTS][EACH];
  // 16 of the reduction, the k-th of four of a panel.
  DEVICE_MEMBER void add(bool first, int k, u64 x, u64 w) {
    const int accumulate = !first || k >= CHAINS;
#pragma unroll
    for (int i = 0; i < PARTS; i++) {
      float(&sum)[EACH] = d[k % CHAINS * PARTS + i];
      if constexpr (TOKENS == 8) wgmma(sum, w + i * (2 * TILE_BYTES / 16), x, accumulate);
      else wgmma(sum, x, w, accumulate);
    }
  }
  // After a wait: all chains' sums to the first one's place.
  DEVICE_MEMBER void join() {
#pragma unroll
    for (int i = 0; i < CHAINS * PARTS; i++) settle(d[i]);
#pragma unroll
    for (int i = PARTS * EACH; i < CHAINS * PARTS * EACH; i++) d[i / EACH % PARTS][i % EACH] += d[i / EACH][i % EACH];
  }
};

template <bool UP, int NT>
DEVICE void store_few(const Passes<UP>& p, const float (*d)[4], int warp, int lane) {
#pragma unroll
  for (int m = 0; m < NT / 2; m++) {
    const int tile = m * 2 + warp / 2, g = lane / 4;
    const bool live = tile < p.tiles;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int t = lane % 4 * 2 + i;
      if (UP) {
        // Even g: gates of two columns; up's are with the lane of the next row.
        const float up0 = __shfl_xor_sync(0xffffffffu, d[m][i], 4), up1 = __shfl_xor_sync(0xffffffffu, d[m][2 + i], 4);
        u16* h = p.a.h + (size_t)(p.first + t) * H_WIDTH + (p.tile + tile) * 16 + g / 2 * 4 + warp % 2 * 2;
        if (live && t < p.tokens && g % 2 == 0)
          *(u32*)h = pack_bf16(silu(d[m][i]) * up0, silu(d[m][2 + i]) * up1);
      } else if (live && t < p.tokens) {
        float* y = p.a.y + (size_t)p.pair(t) * HIDDEN + (p.tile + tile) * 32 + warp % 2 * 16 + g;
        y[0] = d[m][i];
        y[8] = d[m][2 + i];
      }
    }
  }
}

template <bool UP, int NT>
DEVICE void store_many(const Passes<UP>& p, const float (&d)[NT * 16], int warp, int lane) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int t = warp * 16 + half * 8 + lane / 4, c = lane % 4;
    if (t >= p.tokens) continue;
    if (UP) {
      u16* h = p.a.h + (size_t)(p.first + t) * H_WIDTH + p.tile * 16 + c * 4;
#pragma unroll
      for (int i = 0; i < NT; i++) {
        if (i >= p.tiles) break;
        const float* s = d + i * 16 + 2 * half;
        *(uint2*)(h + i * 16) = make_uint2(pack_bf16(silu(s[0]) * s[1], silu(s[4]) * s[5]),
                                           pack_bf16(silu(s[8]) * s[9], silu(s[12]) * s[13]));
      }
    } else {
      float* y = p.a.y + (size_t)p.pair(t) * HIDDEN + p.tile * 32 + c * 2;
#pragma unroll
      for (int i = 0; i < NT; i++) {
        if (i >= p.tiles) break;
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const float* s = d + i * 16 + j * 4 + 2 * half;
          *(float2*)(y + i * 32 + j * 8) = make_float2(s[0], s[1]);
        }
      }
    }
  }
}

// One pass of up to NT tiles by the computing warps; past its tiles, the sums are meaningless.
template <bool UP, int NT, int Slots>
DEVICE void compute_pass(const Passes<UP>& p, Ring<Slots>& ring) {
  constexpr int STAGE = X_PANELS < TILES / NT ? X_PANELS : TILES / NT;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, panels = p.panels();
  Sums<NT> sums;
  u32 before = 0;
#pragma unroll 1
  for (int i = 0; i < panels; i += STAGE) {
    mbar_wait(ring.full(), ring.phase);
    fence_proxy_async();  // tokens came with cp.async
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < STAGE; j++) {
      if (j > 0 && i + j >= panels) break;
      const u64 x = matrix(ring.at() + j * X_BYTES), w = matrix(ring.at() + SLOT_W + j * NT * TILE_BYTES);
#pragma unroll
      for (int k = 0; k < 4; k++) sums.add(i == 0 && j == 0, k, x + k * 2, w + k * 2);
    }
    wgmma_commit();
    wgmma_wait<1>();
    if (i > 0 && lane == 0) mbar_arrive(before);
    before = ring.empty();
    ring.advance();
  }
  wgmma_wait<0>();
  sums.join();
  if (lane == 0) mbar_arrive(before);
  if constexpr (TOKENS == 8) store_few<UP, NT>(p, sums.d, warp, lane);
  else store_many<UP, NT>(p, sums.d[0], warp, lane);
}

template <bool UP, int Slots>
DEVICE void experts_hopper(const Experts& a) {
  extern __shared__ __align__(1024) u8 hopper_shared[];
  const u32 base = smem_addr(hopper_shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    Ring<Slots> ring(base);
    for (int s = 0; s < Slots; s++, ring.advance()) {
      mbar_init(ring.full(), 1 + GATHERERS * 32);
      mbar_init(ring.empty(), 4);
    }
    mbar_init_fence();
  }
  // The shared expert's weights are known before the choice is: each CTA brings its
  // part of them to L2 while the router is at work.
  if (UP && SHARED && threadIdx.x == 32) {
    constexpr u32 EACH = 4096, UPS = 4 * SHARED_WIDTH * HIDDEN / EACH, ALL = UPS + UPS / 2;
    for (u32 i = blockIdx.x; i < ALL; i += gridDim.x)
      prefetch_bulk(i < UPS ? (const u8*)a.shared_gate_up + (size_t)i * EACH
                            : (const u8*)a.shared_down + (size_t)(i - UPS) * EACH,
                    EACH);
  }
  // Only then: experts_down relies on it that the plan was there before it began.
  if (UP) grid_wait();
  grid_launch_dependents();
  Plan plan = {a.count, a.segments, a.order};
  if (a.rows <= PLAN_ROWS) {
    int* copy = (int*)(hopper_shared + PLAN_AT(Slots));
    for (int i = threadIdx.x; i < PLAN_SEGMENTS; i += HOPPER_THREADS) ((int4*)copy)[i] = load_fresh(a.segments + i);
    int* counts = copy + PLAN_SEGMENTS * 4;
    if (threadIdx.x < 2) counts[threadIdx.x] = load_fresh(a.count + threadIdx.x);
    for (int i = threadIdx.x; i < a.rows * SLOTS; i += HOPPER_THREADS) counts[2 + i] = load_fresh(a.order + i);
    plan = {counts, (const int4*)copy, counts + 2};
  }
  __syncthreads();
  // experts_down waits only where tokens are gathered: its weights go ahead, and sums wait for tokens.
  if (warp == 4) {
    if (lane == 0) load_weights<UP, Slots>(a, plan, base);
  } else if (warp > 4) {
    load_tokens<UP, Slots>(a, plan, base, warp - 5, lane);
  } else {
    Ring<Slots> ring(base);
    Passes<UP> p(a, plan);
    while (p.next()) {
      if (p.tiles <= TILES / 2) compute_pass<UP, TILES / 2>(p, ring);
      else compute_pass<UP, TILES>(p, ring);
    }
  }
  // This launch must not end before the one it depends on, even without work.
  if (!UP) grid_wait();
}
#endif

extern "C" __global__ void __launch_bounds__(HOPPER_THREADS) experts_gate_up_hopper(const Experts a) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
  experts_hopper<true, UP_SLOTS>(a);
#endif
}
extern "C" __global__ void __launch_bounds__(HOPPER_THREADS) experts_down_hopper(const Experts a) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
  experts_hopper<false, DOWN_SLOTS>(a);
#endif
}
