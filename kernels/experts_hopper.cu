// The chosen experts' products for Hopper, from one row to a prefill chunk. This
// text follows experts.cu, whose plan, parameters and sum it shares.
//
// A product is computed with tokens as wgmma's 64 rows and weights as its columns,
// so that a pass takes any number of 32-row weight tiles, and few tokens cost no
// more than 64. The weights were brought into the order of shared memory when they
// were loaded (experts_tile.cu), so that one bulk copy brings 32 rows x 64 columns.
// Tokens' rows are gathered with cp.async.
//
// Two CTAs, a cluster, share a pass: each has half of the reduction, for twice the
// weight rows, so that a token's row is read from L2 half as often. In the end each
// gives the other the sums of half of the columns, through distributed shared memory.
// Passes lie end to end over all segments; each cluster takes an equal share of the
// weights' bytes. No sum depends on which CTA is faster.
//
//   experts_gate_up  grid number of multiprocessors, rounded down to CLUSTER; block HOPPER_THREADS; UP_BYTES
//   experts_down     the same; DOWN_BYTES
// In place of experts_gate_up and experts_down of experts.cu, with the same promise
// about overlapping launches.
//
// HIDDEN, WIDTH and SHARED_WIDTH are multiples of 64; TOKENS is 8 (up to 8 rows) or 64.

#if TOKENS != 8 && TOKENS != 64
#error "segments of 8 or 64 tokens"
#endif
#ifndef CLUSTER
#define CLUSTER 2
#endif
#ifndef X_PANELS
#define X_PANELS (TOKENS == 8 ? 4 : CLUSTER == 1 ? 2 : 1)
#endif
#ifndef UP_SLOTS
#define UP_SLOTS (TOKENS == 8 ? 10 : CLUSTER == 1 ? 6 : 8)
#endif
#ifndef DOWN_SLOTS
#define DOWN_SLOTS UP_SLOTS
#endif
#ifndef GATHERERS
#define GATHERERS (TOKENS == 8 ? 1 : 3)  // warps that bring tokens
#endif
#ifndef AHEAD
#define AHEAD (128 << 10)  // bytes of experts_down's weights that a CTA of experts_gate_up asks L2 for
#endif

constexpr int TILE_BYTES = 4096;          // 32 weight rows x 64 columns (a panel), swizzled
constexpr int TILES = 4;                  // of a pass, at most
constexpr int X_BYTES = TOKENS * 128;     // a panel of a segment's tokens, swizzled
constexpr int SLOT_W = X_PANELS * X_BYTES;             // where a slot's weights begin
constexpr int SLOT = SLOT_W + TILES * TILE_BYTES;
constexpr int LIVE = TOKENS == 8 ? 1 : 4; // warps that have tokens
constexpr int SENT = CLUSTER == 1 ? 0 : TILES * 2 * LIVE * 512;  // half of a pass's sums
// The plan of so few rows is copied to shared memory: there it has few segments.
constexpr int PLAN_ROWS = TOKENS, PLAN_SEGMENTS = EXPERTS + 2;
constexpr int PLAN = PLAN_SEGMENTS * 16 + (2 + PLAN_ROWS * SLOTS) * 4;
constexpr int HOPPER_THREADS = 128 + 32 + 32 * GATHERERS;
#define HOPPER_BYTES(slots) ((slots) * SLOT + SENT + (slots) * 16 + 16 + PLAN)
constexpr int UP_BYTES = HOPPER_BYTES(UP_SLOTS), DOWN_BYTES = HOPPER_BYTES(DOWN_SLOTS);

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900

// ---- wgmma: d[64 x 32 NT] += a[64 x 16] b[32 NT x 16]^T, both K-major in shared memory ----

#define ACC4(i) "+f"(d[i]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])
#define ACC16(i) ACC4(i), ACC4((i) + 4), ACC4((i) + 8), ACC4((i) + 12)
#define LIST_0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define LIST_1 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LIST_2 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define LIST_3 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

DEVICE void wgmma(float (&d)[16], u64 a, u64 b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {" LIST_0 "}, %16, %17, 1, 1, 1, 0, 0;"
               : ACC16(0)
               : "l"(a), "l"(b));
}
DEVICE void wgmma(float (&d)[32], u64 a, u64 b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" LIST_0 ", " LIST_1
               "}, %32, %33, 1, 1, 1, 0, 0;"
               : ACC16(0), ACC16(16)
               : "l"(a), "l"(b));
}
DEVICE void wgmma(float (&d)[48], u64 a, u64 b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n96k16.f32.bf16.bf16 {" LIST_0 ", " LIST_1 ", " LIST_2
               "}, %48, %49, 1, 1, 1, 0, 0;"
               : ACC16(0), ACC16(16), ACC16(32)
               : "l"(a), "l"(b));
}
DEVICE void wgmma(float (&d)[64], u64 a, u64 b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" LIST_0 ", " LIST_1 ", " LIST_2 ", " LIST_3
               "}, %64, %65, 1, 1, 1, 0, 0;"
               : ACC16(0), ACC16(16), ACC16(32), ACC16(48)
               : "l"(a), "l"(b));
}
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// Keeps the compiler from moving uses of accumulators across a wait or a fence.
template <int N>
DEVICE void settle(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; i += 4) asm volatile("" : ACC4(i)::"memory");
}
// K-major, 128-byte swizzle, 8-row groups 1024 bytes apart. With fewer than 64 tokens
// the groups past them are what follows in shared memory, and so are their sums.
DEVICE u64 matrix(u32 addr) { return (1ull << 62) | (64ull << 32) | (1ull << 16) | (u64)(addr >> 4); }

// ---- the cluster ----

DEVICE u32 cluster_rank() {
  u32 r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\n barrier.cluster.wait.acquire;" ::: "memory");
}
// The same place in another CTA's shared memory.
DEVICE u32 place_at(u32 addr, u32 rank) {
  u32 r;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(addr), "r"(rank));
  return r;
}
DEVICE void store_at(u32 addr, float x, float y, float z, float w) {
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(addr), "f"(x), "f"(y), "f"(z), "f"(w)
               : "memory");
}
DEVICE void mbar_arrive_at(u32 bar) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(bar) : "memory");
}
DEVICE void mbar_wait_cluster(u32 bar, u32 parity) {
  u32 ok = 0;
  while (!ok)
    asm volatile(
        "{\n .reg .pred p;\n"
        " mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        " selp.u32 %0, 1, 0, p;\n}"
        : "=r"(ok)
        : "r"(bar), "r"(parity)
        : "memory");
}
DEVICE void prefetch_bulk(const void* p, u32 bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes) : "memory");
}

// ---- this cluster's passes, in an order that all its warps repeat ----

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
    routed = load_any(plan.count);
    const int shared = load_any(plan.count + 1), cluster = blockIdx.x / CLUSTER;
    at = bound(cluster, shared);
    end = bound(cluster + 1, shared);
  }
  DEVICE_MEMBER int bound(int cluster, int shared) const {
    const i64 unit = columns(false) / 64, shared_unit = SHARED ? columns(true) / 64 : 1;
    const i64 split = routed * all(false) * unit, total = split + shared * all(true) * shared_unit;
    const i64 b = total * cluster / (gridDim.x / CLUSTER);
    return b <= split ? (int)(b / unit) : routed * all(false) + (int)((b - split) / shared_unit);
  }
  DEVICE_MEMBER bool next() {
    if (at >= end) return false;
    const int split = routed * all(false);
    const bool shared = SHARED && at >= split;
    const int w = SHARED && shared ? all(true) : all(false), v = shared ? at - split : at;
    const int segment = v / w;
    tile = v - segment * w;
    // What is left of the segment, in as few and as equal passes as can be.
    const int left = min(end - at, w - tile), passes = ceil_div(left, TILES);
    tiles = ceil_div(left, passes);
    const int* s = (const int*)(plan.segments + (shared ? routed : 0) + segment);
    expert = load_any(s), first = load_any(s + 1), tokens = load_any(s + 2);
    at += tiles;
    return true;
  }
  DEVICE_MEMBER bool shared() const { return SHARED && expert == EXPERTS; }
  DEVICE_MEMBER int pair(int t) const { return load_any(plan.order + first + t); }
  // This CTA's part of the reduction, in panels of 64; and how many of them make a stage.
  DEVICE_MEMBER int panels() const { return columns(shared()) / 64; }
  DEVICE_MEMBER int from(u32 rank) const { return rank == 0 ? 0 : (panels() + 1) / 2; }
  DEVICE_MEMBER int count(u32 rank) const { return CLUSTER == 1 ? panels() : (panels() + (rank == 0)) / 2; }
  DEVICE_MEMBER int stage() const { return min(X_PANELS, TILES / tiles); }
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
  DEVICE_MEMBER static u32 bars(u32 b) { return b + Slots * SLOT + SENT; }
  DEVICE_MEMBER u32 full() const { return bars(base) + slot * 16; }
  DEVICE_MEMBER u32 empty() const { return full() + 8; }
  // The sums that the other CTA sends are there; the other has read what this one sent.
  DEVICE_MEMBER static u32 got(u32 b) { return bars(b) + Slots * 16; }
  DEVICE_MEMBER static u32 read(u32 b) { return got(b) + 8; }
  DEVICE_MEMBER void advance() {
    if (++slot == Slots) slot = 0, phase ^= 1;
  }
};

template <bool UP, int Slots>
DEVICE void load_weights(const Experts& a, const Plan& plan, u32 base, u32 rank) {
  const u64 policy = l2_evict_first();
  Ring<Slots> ring(base);
  Passes<UP> p(a, plan);
  while (p.next()) {
    const int panels = p.panels(), from = p.from(rank), count = p.count(rank), stage = p.stage();
    const u8* w = p.weights() + (size_t)from * TILE_BYTES;
    for (int i = 0; i < count; i += stage) {
      const int here = min(stage, count - i);
      mbar_wait(ring.empty(), ring.phase ^ 1);
      mbar_arrive_expect(ring.full(), here * p.tiles * TILE_BYTES);
      u32 to = ring.at() + SLOT_W;
      for (int k = i; k < i + here; k++)
        for (int t = 0; t < p.tiles; t++, to += TILE_BYTES)
          bulk_load_hint(to, w + ((size_t)t * panels + k) * TILE_BYTES, TILE_BYTES, ring.full(), policy);
      ring.advance();
    }
  }
  if (UP && AHEAD > 0) {
    // The second product's CTAs begin when this one's end: until then its weights come as far as L2.
    Passes<false> next(a, plan);
    for (int bytes = 0; bytes < AHEAD && next.next();) {
      const int each = next.panels() * TILE_BYTES;
      for (int t = rank; t < next.tiles; t += CLUSTER, bytes += each)
        prefetch_bulk(next.weights() + (size_t)t * each, each);
    }
  }
}

// A warp instruction brings 128 bytes of four tokens.
template <bool UP, int Slots>
DEVICE void load_tokens(const Experts& a, const Plan& plan, u32 base, u32 rank, int warp, int lane) {
  constexpr int TURNS = (TOKENS / 4 + GATHERERS - 1) / GATHERERS;
  Ring<Slots> ring(base);
  Passes<UP> p(a, plan);
  const int c = lane % 8;
  while (p.next()) {
    const int from = p.from(rank), count = p.count(rank), stage = p.stage();
    const u16* x[TURNS];
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
      const int t = (i * GATHERERS + warp) * 4 + lane / 8;
      x[i] = nullptr;
      if (t < p.tokens) {
        const u16* row = UP ? a.x + (size_t)(p.pair(t) / SLOTS) * HIDDEN : a.h + (size_t)(p.first + t) * H_WIDTH;
        x[i] = row + from * 64 + c * 8;
      }
    }
    for (int k = 0; k < count; k += stage) {
      mbar_wait(ring.empty(), ring.phase ^ 1);
      u32 to = ring.at();
      for (int j = k; j < min(k + stage, count); j++, to += X_BYTES) {
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

// One pass of NT tiles by the computing warps; `done`: passes before it.
template <bool UP, int NT, int Slots>
DEVICE void compute_pass(const Passes<UP>& p, u8* shared, Ring<Slots>& ring, u32 rank, int done) {
  constexpr int STAGE = X_PANELS < TILES / NT ? X_PANELS : TILES / NT;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, count = p.count(rank);
  float d[NT * 16];
#pragma unroll
  for (int i = 0; i < NT * 16; i++) d[i] = 0.f;
  u32 before = 0;
  for (int i = 0; i < count; i += STAGE) {
    mbar_wait(ring.full(), ring.phase);
    fence_proxy_async();  // tokens came with cp.async
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < STAGE; j++) {
      if (j > 0 && i + j >= count) break;
      const u64 x = matrix(ring.at() + j * X_BYTES), w = matrix(ring.at() + SLOT_W + j * NT * TILE_BYTES);
#pragma unroll
      for (int k = 0; k < 4; k++) wgmma(d, x + k * 2, w + k * 2);
    }
    wgmma_commit();
    wgmma_wait<1>();
    if (i > 0 && lane == 0) mbar_arrive(before);
    before = ring.empty();
    ring.advance();
  }
  wgmma_wait<0>();
  settle(d);
  if (count > 0 && lane == 0) mbar_arrive(before);
  if (warp >= LIVE) return;

  // Of the four groups of 8 columns in a tile, 2 rank and 2 rank + 1 are this CTA's:
  // they end in the first two groups' place.
  constexpr int MINE = CLUSTER == 1 ? 4 : 2;
  if (CLUSTER > 1) {
    const bool live = warp * 16 < p.tokens;
    const u32 base = ring.base, mine = base + Slots * SLOT + threadIdx.x * 16;
    if (done > 0) mbar_wait_cluster(Ring<Slots>::read(base), (done - 1) & 1);
    if (live) {
      const u32 there = place_at(mine, rank ^ 1);
#pragma unroll
      for (int i = 0; i < NT * 2; i++) {
        float* low = d + i / 2 * 16 + i % 2 * 4;
        float* high = low + 8;
        if (rank == 0) {
          store_at(there + i * LIVE * 512, high[0], high[1], high[2], high[3]);
        } else {
          store_at(there + i * LIVE * 512, low[0], low[1], low[2], low[3]);
#pragma unroll
          for (int j = 0; j < 4; j++) low[j] = high[j];
        }
      }
    }
    __syncwarp();
    if (lane == 0) mbar_arrive_at(place_at(Ring<Slots>::got(base), rank ^ 1));
    mbar_wait_cluster(Ring<Slots>::got(base), done & 1);
    if (live) {
#pragma unroll
      for (int i = 0; i < NT * 2; i++) {
        const float4 s = *(const float4*)(shared + (mine - base) + i * LIVE * 512);
        float* low = d + i / 2 * 16 + i % 2 * 4;
        low[0] += s.x, low[1] += s.y, low[2] += s.z, low[3] += s.w;
      }
    }
    __syncwarp();
    if (lane == 0) mbar_arrive_at(place_at(Ring<Slots>::read(base), rank ^ 1));
    if (!live) return;
  }

  const int c = lane % 4, group = CLUSTER == 1 ? 0 : rank * 2;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int t = warp * 16 + half * 8 + lane / 4;
    if (t >= p.tokens) continue;
    if (UP) {
      u16* h = p.a.h + (size_t)(p.first + t) * H_WIDTH + p.tile * 16 + c * 4 + group;
#pragma unroll
      for (int i = 0; i < NT; i++)
#pragma unroll
        for (int j = 0; j < MINE; j += 2) {
          const float* s = d + i * 16 + j * 4 + 2 * half;
          *(u32*)(h + i * 16 + j) = pack_bf16(silu(s[0]) * s[1], silu(s[4]) * s[5]);
        }
    } else {
      float* y = p.a.y + (size_t)p.pair(t) * HIDDEN + p.tile * 32 + group * 8 + c * 2;
#pragma unroll
      for (int i = 0; i < NT; i++)
#pragma unroll
        for (int j = 0; j < MINE; j++) {
          const float* s = d + i * 16 + j * 4 + 2 * half;
          *(float2*)(y + i * 32 + j * 8) = make_float2(s[0], s[1]);
        }
    }
  }
}

template <bool UP, int Slots>
DEVICE void experts_hopper(const Experts& a) {
  extern __shared__ __align__(1024) u8 hopper_shared[];
  const u32 base = smem_addr(hopper_shared), rank = CLUSTER == 1 ? 0 : cluster_rank();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    Ring<Slots> ring(base);
    for (int s = 0; s < Slots; s++, ring.advance()) {
      mbar_init(ring.full(), 1 + GATHERERS * 32);
      mbar_init(ring.empty(), 4);
    }
    mbar_init(Ring<Slots>::got(base), LIVE);
    mbar_init(Ring<Slots>::read(base), LIVE);
    mbar_init_fence();
  }
  // The shared expert's weights are known before the choice is: each CTA brings its
  // part of them to L2 while the router is at work.
  if (UP && SHARED && threadIdx.x == 32) {
    constexpr u32 EACH = 4096, UPS = 4 * SHARED_WIDTH * (HIDDEN / 64) * 64 / EACH, ALL = UPS + UPS / 2;
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
    int* copy = (int*)(hopper_shared + Slots * SLOT + SENT + Slots * 16 + 16);
    for (int i = threadIdx.x; i < PLAN_SEGMENTS; i += HOPPER_THREADS) ((int4*)copy)[i] = load_fresh(a.segments + i);
    int* counts = copy + PLAN_SEGMENTS * 4;
    if (threadIdx.x < 2) counts[threadIdx.x] = load_fresh(a.count + threadIdx.x);
    for (int i = threadIdx.x; i < a.rows * SLOTS; i += HOPPER_THREADS) counts[2 + i] = load_fresh(a.order + i);
    plan = {counts, (const int4*)copy, counts + 2};
  }
  if (CLUSTER == 1) __syncthreads();
  else cluster_sync();
  // experts_down's weights go ahead, everything else needs h.
  if (!UP && warp != 4) grid_wait();
  if (warp == 4) {
    if (lane == 0) load_weights<UP, Slots>(a, plan, base, rank);
  } else if (warp > 4) {
    load_tokens<UP, Slots>(a, plan, base, rank, warp - 5, lane);
  } else {
    Ring<Slots> ring(base);
    Passes<UP> p(a, plan);
    for (int done = 0; p.next(); done++) {
      if (p.tiles == 1) compute_pass<UP, 1>(p, hopper_shared, ring, rank, done);
      else if (p.tiles == 2) compute_pass<UP, 2>(p, hopper_shared, ring, rank, done);
      else if (p.tiles == 3) compute_pass<UP, 3>(p, hopper_shared, ring, rank, done);
      else compute_pass<UP, 4>(p, hopper_shared, ring, rank, done);
    }
  }
  // What the other CTA still writes here must find it.
  if (CLUSTER > 1) cluster_sync();
}
#endif

#if CLUSTER > 1
#define PAIRED __cluster_dims__(CLUSTER, 1, 1)
#else
#define PAIRED
#endif
extern "C" __global__ void PAIRED __launch_bounds__(HOPPER_THREADS) experts_gate_up_hopper(const Experts a) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
  experts_hopper<true, UP_SLOTS>(a);
#endif
}
extern "C" __global__ void PAIRED __launch_bounds__(HOPPER_THREADS) experts_down_hopper(const Experts a) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
  experts_hopper<false, DOWN_SLOTS>(a);
#endif
}
