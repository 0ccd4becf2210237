// Absorb decode attention for Hopper: every query head of a rank attends to the
// paged latent cache. For more than 32 query rows a sequence: up to there memory is
// what limits it, and absorb_decode_few.cu is faster. This text follows
// absorb_work.cu. Needs sm_90a.
//
// Rows of a sequence are its SQ*HEADS (position, head) pairs, cut into tiles of 64.
// A CTA holds one row tile: 64 x 576 queries in shared memory and the 64 x 512 f32
// output in the registers of two warpgroups, 256 columns each. Cache blocks of 64
// tokens stream through two 72 KiB buffers. Block g is owned by warpgroup g % 2:
//
//   owner: S = Q K^T, softmax, O += P V in its columns, P into the block's rope panel
//          (nobody needs that panel after S, and it has P's size exactly);
//   other: O += P V in its columns, from the same shared memory that was K.
//
// So the two warpgroups are half a period apart and one's softmax falls into the
// other's tensor work. What is scarce is buffers: each half of one is refilled as
// soon as its last reader is done, panel by panel (8 KiB, 64 columns), and S of the
// next block begins with the half that is freed first.
//
// The running maximum moves only when it grows by more than 2^8 (P and the sums
// stay far inside f32), so the output is hardly ever rescaled.
//
// Tried and slower: two CTAs sharing a block by multicast (each waits for the
// other's buffers), prefetching into L2, letting the warpgroups take strict turns
// at the tensor cores (15 % faster when nothing has to be loaded, slower when it has).

#define TILE_BYTES (PANELS * PANEL)              // a cache block, and a query tile
#define ROW_TILES ((ROWS + 63) / 64)
#define THREADS 384                              // two warpgroups, and one whose first warp produces

// Offsets in dynamic shared memory (its base must be 1024-aligned).
#define SM_Q 0
#define SM_KV TILE_BYTES                         // two buffers
#define SM_MAX (3 * TILE_BYTES)                  // f32 [2 buffers][64 rows]
#define SM_SUM (SM_MAX + 2 * 64 * 4)             // f32 [2 turns][2 warpgroups][64 rows]
#define SM_BAR (SM_SUM + 4 * 64 * 4)
#define BAR_FULL(buf, panel) (SM_BAR + ((buf) * PANELS + (panel)) * 8)
#define BAR_EMPTY(buf, half) (SM_BAR + (2 * PANELS + (buf) * 2 + (half)) * 8)
#define BAR_Q_FULL (SM_BAR + (2 * PANELS + 4) * 8)
#define BAR_Q_EMPTY (BAR_Q_FULL + 8)
#define BAR_P(buf) (BAR_Q_EMPTY + 8 + (buf) * 8)
#define SMEM_BYTES (SM_BAR + (2 * PANELS + 8) * 8) // 222928: what the launch must grant

// ---- wgmma ----

#define ACC4(d, i) "+f"(d[i]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])
#define ACC16(d, i) ACC4(d, i), ACC4(d, (i) + 4), ACC4(d, (i) + 8), ACC4(d, (i) + 12)
#define ACC32(d, i) ACC16(d, i), ACC16(d, (i) + 16)

// d[64x64] (+)= a[64x16] b[64x16]^T, both K-major in shared memory
DEVICE void wgmma_qk(float (&d)[32], u64 a, u64 b, int accumulate) {
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.b32 p, %34, 0;\n"
      " wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "%32, %33, p, 1, 1, 0, 0;\n}"
      : ACC32(d, 0)
      : "l"(a), "l"(b), "r"(accumulate));
}

// d[64x256] (+)= a[64x16] b[16x256], a K-major and b MN-major in shared memory
DEVICE void wgmma_pv_ss(float (&d)[128], u64 a, u64 b, int accumulate) {
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.b32 p, %130, 0;\n"
      " wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
      "%128, %129, p, 1, 1, 0, 1;\n}"
      : ACC32(d, 0), ACC32(d, 32), ACC32(d, 64), ACC32(d, 96)
      : "l"(a), "l"(b), "r"(accumulate));
}

// the same with a in registers
DEVICE void wgmma_pv_rs(float (&d)[128], const u32* a, u64 b, int accumulate) {
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.b32 p, %133, 0;\n"
      " wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
      "{%128, %129, %130, %131}, %132, p, 1, 1, 1;\n}"
      : ACC32(d, 0), ACC32(d, 32), ACC32(d, 64), ACC32(d, 96)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}

// Keeps the compiler from moving uses of accumulators across a wait or a fence.
DEVICE void settle(float (&d)[32]) { asm volatile("" : ACC32(d, 0)::"memory"); }
DEVICE void settle(float (&d)[128]) {
  asm volatile("" : ACC32(d, 0), ACC32(d, 32), ACC32(d, 64), ACC32(d, 96)::"memory");
}

// ---- synchronisation ----

DEVICE bool mbar_test(u32 bar, u32 parity) {
  u32 ok;
  asm volatile(
      "{\n .reg .pred p;\n"
      " mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      " selp.u32 %0, 1, 0, p;\n}"
      : "=r"(ok)
      : "r"(bar), "r"(parity)
      : "memory");
  return ok != 0;
}
// The named barrier of both warpgroups.
#define NB_BOTH 1

DEVICE void stmatrix4(u32 addr, const u32* r) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(addr), "r"(r[0]), "r"(r[1]),
               "r"(r[2]), "r"(r[3])
               : "memory");
}

// ---- producer warp ----

// The order in which the panels of a block of warpgroup w are loaded and used: w's
// own half of V, which is freed first, the other half, the rope.
DEVICE u32 panel_at(u32 w, int i) { return i == 8 ? 8 : 4 * (i < 4 ? w : w ^ 1) + (i & 3); }

// One block, of which `valid` slots are filled, into its buffer; each half as soon as its last reader is done.
DEVICE void load_block(u32 smem, u32 g, const u16* block, int valid, u64 policy) {
  u32 buf = g & 1, kv = smem + SM_KV + buf * TILE_BYTES;
#pragma unroll
  for (int i = 0; i < PANELS; i++) {
    u32 panel = panel_at(buf, i);
    if ((i == 0 || i == 4) && g >= 2) mbar_wait(smem + BAR_EMPTY(buf, i == 0 ? buf : buf ^ 1), ((g >> 1) & 1) ^ 1);
    const u32 at = kv + panel * PANEL, bytes = valid * 128, full = smem + BAR_FULL(buf, panel);
    bulk_load_hint(at, (const char*)block + panel * PANEL, bytes, full, policy);
    if (bytes < PANEL) bulk_load_hint(at + bytes, absorb_zeros, PANEL - bytes, full, policy);
  }
}

// The tile's query rows from row0 on into swizzled panels.
DEVICE void load_queries(u32 smem, const u16* q, int row0, int lane) {
  const int rows = min(64, ROWS - row0);
#pragma unroll 2
  for (int row = 0; row < rows; row++) {
    const u16* src = q + (i64)(row0 + row) * DIM;
#pragma unroll
    for (int i = 0; i < 3; i++) {
      int c = lane + 32 * i; // of 72 chunks of 16 bytes
      if (c < DIM / 8)
        cp_async16(smem + SM_Q + (c >> 3) * PANEL + row * 128 + (((c & 7) ^ (row & 7)) << 4), src + c * 8, 16);
    }
  }
  cp_async_commit();
  cp_async_wait<0>();
  fence_proxy_async();
  mbar_arrive(smem + BAR_Q_FULL);
}

// Rows of the tile that no query has are zero for good. By the 256 consumers.
DEVICE void clear_queries(u32 smem, int row0) {
  const int rows = min(64, ROWS - row0);
  for (int i = rows * 8 + threadIdx.x; i < 64 * 8; i += 256)
#pragma unroll
    for (int j = 0; j < PANELS; j++)
      asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(smem + SM_Q + j * PANEL + i * 16), "r"(0)
                   : "memory");
  fence_proxy_async();
  named_barrier(NB_BOTH, 256);
}

// Blocks that lie whole before this step's tokens are asked for while the launch
// before this one still runs: nothing in the step writes them.
DEVICE void produce(const AbsorbParams& p, u32 smem, int team, int tile, int lane) {
  u64 policy = l2_evict_first();
  u32 g = 0;
  bool waited = false;
  auto wait = [&]() {
    if (!waited) grid_wait(), grid_launch_dependents(); // combine waits for the whole grid anyway
    waited = true;
  };
  Work work = team_work(p, team);
  Segment s;
  for (u32 turn = 0; next_segment(p, work, s); turn++) {
    const int* table = p.block_table + (i64)s.batch * p.max_blocks + s.begin;
    int n = s.end - s.begin, ids = 0, old = (s.len - SQ) / BLOCK - s.begin;
    for (int k = 0; k < n; k++, g++) {
      if ((k & 31) == 0) ids = k + lane < n ? table[k + lane] : 0;
      int id = __shfl_sync(0xffffffffu, ids, k & 31);
      if (k >= old && !waited) {
        if (lane < PANELS) prefetch_bulk(p.cache + (i64)id * (BLOCK * DIM) + lane * (PANEL / 2), PANEL);
        wait();
      }
      if (lane == 0) load_block(smem, g, p.cache + (i64)id * (BLOCK * DIM), min(64, s.len - (s.begin + k) * 64), policy);
      __syncwarp();
      if (k == (n > 1 ? 1 : 0)) { // the first blocks are on their way: now the queries
        wait();
        if (turn > 0) mbar_wait(smem + BAR_Q_EMPTY, (turn - 1) & 1);
        load_queries(smem, p.q + (i64)s.batch * ROWS * DIM, tile * 64, lane);
      }
    }
  }
  wait();
}

// ---- consumer warpgroups ----

// Warpgroup w owns the V columns from 256 w on and the blocks in buffer w.
struct Consumer {
  u32 smem;
  int w;
  int warp, lane; // in the warpgroup
  float m[2];     // running maximum of rows lane/4 and +8, in log2 units
  float l[2];     // this warpgroup's part of the sum
};

// S (+)= Q K^T over COUNT panels from the FIRST on, in the order they arrive in.
// One wgmma group a panel.
template <int FIRST, int COUNT>
DEVICE void issue_s(const Consumer& c, float (&s)[32], u32 g) {
  u32 kv = c.smem + SM_KV + c.w * TILE_BYTES;
#pragma unroll
  for (int i = FIRST; i < FIRST + COUNT; i++) {
    u32 panel = panel_at(c.w, i);
    mbar_wait(c.smem + BAR_FULL(c.w, panel), (g >> 1) & 1);
    wgmma_fence();
    u64 a = matrix(c.smem + SM_Q + panel * PANEL), b = matrix(kv + panel * PANEL);
#pragma unroll
    for (int k = 0; k < 4; k++) wgmma_qk(s, a + 2 * k, b + 2 * k, i + k != 0);
    wgmma_commit();
  }
}

// Gives half `half` of buffer `buf` back to its producer and arms its barriers again.
DEVICE void release(const Consumer& c, int buf, int half) {
  if (c.lane == 0) {
    if (c.warp == 0) {
#pragma unroll
      for (int j = 0; j < 4; j++) mbar_arrive_expect(c.smem + BAR_FULL(buf, 4 * half + j), PANEL);
      if (buf != half) mbar_arrive_expect(c.smem + BAR_FULL(buf, 8), PANEL);
    }
    mbar_arrive(c.smem + BAR_EMPTY(buf, half));
  }
}

// issue_s behind a P V group, and half `half` of buffer `buf` given back as soon as
// that group is done, without a gap between the two where S's first panel is there.
template <int FIRST, int COUNT>
DEVICE void issue_s_release(const Consumer& c, float (&s)[32], u32 g, int buf, int half) {
  bool waits = !mbar_test(c.smem + BAR_FULL(c.w, panel_at(c.w, FIRST)), (g >> 1) & 1);
  if (waits) {
    wgmma_wait<0>();
    release(c, buf, half);
  }
  issue_s<FIRST, 1>(c, s, g);
  if (!waits) {
    wgmma_wait<1>();
    release(c, buf, half);
  }
  issue_s<FIRST + 1, COUNT - 1>(c, s, g);
}

DEVICE void rescale(Consumer& c, float (&o)[128], float m0, float m1) {
  if (__any_sync(0xffffffffu, m0 != c.m[0] || m1 != c.m[1])) {
    float f0 = exp2_fast(c.m[0] - m0), f1 = exp2_fast(c.m[1] - m1);
#pragma unroll
    for (int j = 0; j < 128; j += 4) o[j] *= f0, o[j + 1] *= f0, o[j + 2] *= f1, o[j + 3] *= f1;
    c.l[0] *= f0, c.l[1] *= f1;
    c.m[0] = m0, c.m[1] = m1;
  }
}

// P = exp2(S scale - m) as the A operand's registers.
DEVICE void softmax(Consumer& c, float (&s)[32], float (&o)[128], u32 (&a)[16], float scale, int token,
                    int len, int row0) {
  if (token + 64 > len - (SQ - 1)) { // row (t, head) sees the first len - SQ + 1 + t keys
    int row = row0 + c.warp * 16 + (c.lane >> 2), first = len - (SQ - 1) - token - 2 * (c.lane & 3);
    int limit[2] = {first + min(row / HEADS, SQ - 1), first + min((row + 8) / HEADS, SQ - 1)};
#pragma unroll
    for (int j = 0; j < 32; j++)
      if ((j >> 2) * 8 + (j & 1) >= limit[(j >> 1) & 1]) s[j] = NEG_INF;
  }
  float x0 = fmaxf(s[0], s[1]), x1 = fmaxf(s[2], s[3]);
#pragma unroll
  for (int j = 4; j < 32; j += 4) x0 = fmaxf(x0, fmaxf(s[j], s[j + 1])), x1 = fmaxf(x1, fmaxf(s[j + 2], s[j + 3]));
#pragma unroll
  for (int d = 1; d < 4; d *= 2) {
    x0 = fmaxf(x0, __shfl_xor_sync(0xffffffffu, x0, d));
    x1 = fmaxf(x1, __shfl_xor_sync(0xffffffffu, x1, d));
  }
  x0 *= scale, x1 *= scale;
  rescale(c, o, x0 > c.m[0] + RESCALE ? x0 : c.m[0], x1 > c.m[1] + RESCALE ? x1 : c.m[1]);
#pragma unroll
  for (int j = 0; j < 32; j += 4) {
    float p0 = exp2_fast(s[j] * scale - c.m[0]), p1 = exp2_fast(s[j + 1] * scale - c.m[0]);
    float p2 = exp2_fast(s[j + 2] * scale - c.m[1]), p3 = exp2_fast(s[j + 3] * scale - c.m[1]);
    c.l[0] += p0 + p1, c.l[1] += p2 + p3;
    a[j / 2] = pack_bf16(p0, p1), a[j / 2 + 1] = pack_bf16(p2, p3);
  }
}

// O += P V, this warpgroup's own P from registers.
DEVICE void issue_own(const Consumer& c, float (&o)[128], const u32 (&a)[16]) {
  u64 b = turned_matrix(c.smem + SM_KV + c.w * TILE_BYTES + 4 * c.w * PANEL);
  settle(o);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4; k++) wgmma_pv_rs(o, a + 4 * k, b + k * (2048 >> 4), 1);
  wgmma_commit();
}

// O += P V, the other warpgroup's P from its buffer's rope panel.
DEVICE void issue_other(const Consumer& c, float (&o)[128]) {
  u32 kv = c.smem + SM_KV + (c.w ^ 1) * TILE_BYTES;
  u64 a = matrix(kv + 8 * PANEL), b = turned_matrix(kv + 4 * c.w * PANEL);
  settle(o);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4; k++) wgmma_pv_ss(o, a + 2 * k, b + k * (2048 >> 4), 1);
  wgmma_commit();
}

// P and the maximum it refers to, for the other warpgroup. Every thread arrives for itself: compute-sanitizer's racecheck
// takes one lane's arrival for that lane's stores only, and bar.arrive for nothing.
DEVICE void publish(const Consumer& c, const u32 (&a)[16]) {
  u32 panel = c.smem + SM_KV + c.w * TILE_BYTES + 8 * PANEL;
  int row = c.warp * 16 + (c.lane & 15), chunk = c.lane >> 4;
#pragma unroll
  for (int k = 0; k < 4; k++) stmatrix4(panel + row * 128 + (((2 * k + chunk) ^ (row & 7)) << 4), a + 4 * k);
  if ((c.lane & 3) == 0) {
    u32 m = c.smem + SM_MAX + (c.w * 64 + c.warp * 16 + (c.lane >> 2)) * 4;
    asm volatile("st.shared.f32 [%0], %1;\n st.shared.f32 [%0 + 32], %2;" ::"r"(m), "f"(c.m[0]), "f"(c.m[1])
                 : "memory");
  }
  fence_proxy_async();
  mbar_arrive(c.smem + BAR_P(c.w));
}

// Waits for the other warpgroup's P, of block g, and takes over its maximum.
DEVICE void accept(Consumer& c, float (&o)[128], u32 g) {
  mbar_wait(c.smem + BAR_P(c.w ^ 1), (g >> 1) & 1);
  u32 m = c.smem + SM_MAX + ((c.w ^ 1) * 64 + c.warp * 16 + (c.lane >> 2)) * 4;
  float m0, m1;
  asm volatile("ld.shared.f32 %0, [%2];\n ld.shared.f32 %1, [%2 + 32];" : "=f"(m0), "=f"(m1) : "r"(m) : "memory");
  rescale(c, o, m0, m1);
}

// Between lanes `lanes` apart: the lower keeps a and gets the other's a as b, the
// upper keeps b and gets the other's b as a.
DEVICE void trade(u32& a, u32& b, bool upper, int lanes) {
  u32 got = __shfl_xor_sync(0xffffffffu, upper ? a : b, lanes);
  if (upper)
    a = got;
  else
    b = got;
}

DEVICE void write_rows(const AbsorbParams& p, const Consumer& c, const float (&o)[128], const Segment& s, int row0,
                       int team, u32 turn) {
  float l[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    l[i] = c.l[i];
    l[i] += __shfl_xor_sync(0xffffffffu, l[i], 1);
    l[i] += __shfl_xor_sync(0xffffffffu, l[i], 2);
  }
  int r = c.warp * 16 + (c.lane >> 2);
  u32 sums = c.smem + SM_SUM + (turn & 1) * 512 + r * 4; // [warpgroup][64]
  if ((c.lane & 3) == 0)
    asm volatile("st.shared.f32 [%0], %1;\n st.shared.f32 [%0 + 32], %2;" ::"r"(sums + c.w * 256), "f"(l[0]), "f"(l[1])
                 : "memory");
  named_barrier(NB_BOTH, 256);
  bool whole = p.seq[s.batch].y == 1;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    float other;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(other) : "r"(sums + (c.w ^ 1) * 256 + i * 32) : "memory");
    float sum = l[i] + other, inv = sum > 0.0f ? 1.0f / sum : 0.0f;
    int row = row0 + r + 8 * i;
    // Lanes of a quad trade pieces so that each stores 16 bytes of one 8-column tile.
    const int q = c.lane & 3;
    if (whole) {
      u16* dst = p.out + ((i64)s.batch * ROWS + row) * VDIM + 256 * c.w + 8 * q;
#pragma unroll
      for (int j = 0; j < 32; j += 4) {
        u32 x[4];
#pragma unroll
        for (int k = 0; k < 4; k++) x[k] = pack_bf16(o[4 * (j + k) + 2 * i] * inv, o[4 * (j + k) + 2 * i + 1] * inv);
        trade(x[0], x[1], q & 1, 1), trade(x[2], x[3], q & 1, 1); // columns 4 (q/2).. of tile j + q%2, and + 2
        trade(x[0], x[2], q & 2, 2), trade(x[1], x[3], q & 2, 2);
        if (row < ROWS) *(uint4*)(dst + 8 * j) = make_uint4(x[0], x[1], x[2], x[3]);
      }
    } else {
      i64 part = (i64)(s.batch + team) * ROWS + row;
      float* dst = p.part_o + part * VDIM + 256 * c.w + 8 * (q & 1) + 4 * (q >> 1);
#pragma unroll
      for (int j = 0; j < 32; j += 2) {
        u32 x[4];
#pragma unroll
        for (int k = 0; k < 4; k++) x[k] = __float_as_uint(o[4 * (j + k / 2) + 2 * i + k % 2] * inv);
        trade(x[0], x[2], q & 1, 1), trade(x[1], x[3], q & 1, 1);
        if (row < ROWS) *(uint4*)(dst + 8 * j) = make_uint4(x[0], x[1], x[2], x[3]);
      }
      if (row < ROWS && c.w == 0 && q == 0) p.part_lse[part] = sum > 0.0f ? c.m[i] + log2_fast(sum) : NEG_INF;
    }
  }
}

// Warpgroup w's part of a team's work for one row tile.
DEVICE void consume(const AbsorbParams& p, u32 smem, int team, int row0, int w) {
  Consumer c;
  c.smem = smem;
  c.w = w;
  c.warp = __shfl_sync(0xffffffffu, ((int)threadIdx.x >> 5) & 3, 0);
  c.lane = threadIdx.x & 31;
  clear_queries(smem, row0);
  float scale = p.scale * LOG2E;
  float o[128], s[32];
  u32 a[16];
  u32 g0 = 0; // blocks before this segment
  Work work = team_work(p, team);
  Segment seg;
  for (u32 turn = 0; next_segment(p, work, seg); turn++) {
    int len = seg.len, n = seg.end - seg.begin;
    c.m[0] = c.m[1] = -1e30f, c.l[0] = c.l[1] = 0.0f;
#pragma unroll
    for (int j = 0; j < 128; j++) o[j] = 0.0f;

    mbar_wait(smem + BAR_Q_FULL, turn & 1);
    // Own blocks are k, k + 2, ..; -1 stands for none where the first is the other's.
    int k = (g0 & 1) == (u32)w ? 0 : -1;
    if (k == 0) {
      issue_s<0, 9>(c, s, g0);
      wgmma_wait<0>();
      settle(s);
    }
    while (true) {
      int token = (seg.begin + k) * 64;
      if (k >= 0) {
        softmax(c, s, o, a, scale, token, len, row0);
        issue_own(c, o, a);
        publish(c, a);
        wgmma_wait<0>();
        settle(o);
        release(c, w, w);
      }
      if (k + 2 < n) {
        issue_s<0, 4>(c, s, g0 + k + 2); // runs while the other is at its softmax
        accept(c, o, g0 + k + 1);
        issue_other(c, o);
        issue_s_release<4, 5>(c, s, g0 + k + 2, w ^ 1, w);
        settle(o);
        wgmma_wait<0>();
        settle(s);
        k += 2;
      } else { // no more of its own
        if (k + 1 < n) {
          accept(c, o, g0 + k + 1);
          issue_other(c, o);
          wgmma_wait<0>();
          settle(o);
          release(c, w ^ 1, w);
        }
        break;
      }
    }
    if (c.lane == 0) mbar_arrive(smem + BAR_Q_EMPTY);
    write_rows(p, c, o, seg, row0, team, turn);
    g0 += n;
  }
}

// Grid: teams * ROW_TILES CTAs of THREADS, one to a multiprocessor; dynamic shared
// memory SMEM_BYTES. teams = max(1, multiprocessors / ROW_TILES).
// Before it absorb_plan (or split_plan) for `teams`, once a step, and complete before
// this launch begins; after it combine.
extern "C" __global__ void __launch_bounds__(THREADS, 1) absorb_decode(const __grid_constant__ AbsorbParams p) {
  extern __shared__ __align__(1024) u8 dynamic_smem[];
  u32 smem = smem_addr(dynamic_smem);
  int tile = blockIdx.x % ROW_TILES, team = blockIdx.x / ROW_TILES;

  if (threadIdx.x == 0) {
    for (int b = 0; b < 2; b++) {
      for (int j = 0; j < PANELS; j++) mbar_init(smem + BAR_FULL(b, j), 1);
      for (int h = 0; h < 2; h++) mbar_init(smem + BAR_EMPTY(b, h), 4);
      mbar_init(smem + BAR_P(b), 128);
    }
    mbar_init(smem + BAR_Q_FULL, 32);
    mbar_init(smem + BAR_Q_EMPTY, 8);
    mbar_init_fence();
    for (int b = 0; b < 2; b++)
      for (int j = 0; j < PANELS; j++) mbar_arrive_expect(smem + BAR_FULL(b, j), PANEL);
  }
  __syncthreads();

  if (threadIdx.x >= 256) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x < 288) produce(p, smem, team, tile, threadIdx.x & 31);
  } else if (threadIdx.x < 128) { // a copy each: shared addresses are constants then
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    consume(p, smem, team, tile * 64, 0);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    consume(p, smem, team, tile * 64, 1);
  }
}
