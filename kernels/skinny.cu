// Skinny products: few rows of x, and a weight matrix that streams through once. The
// text of gemv.cu and experts.cu follows this one.
//
// Loading warps bring weights and x to a ring of stages in shared memory, eight
// warps multiply with mma.sync. A pass computes up to `Rows` weight rows (the tile's
// 16-row side) by up to `Tokens` tokens (the 8-column side) over the whole reduction,
// `Step` elements a stage. Elements of the reduction may meet in any order, as long
// as both sides agree: a lane takes 8 neighbours of its row in one 16-byte load,
// which is its share of two mma steps, and no fragment needs rearranging.

// Rows come with cp.async. (The bulk copy engine takes some 80 cycles a copy: as fast
// from 2 KiB a row on, half as fast at 512 bytes.)
//
// Room: rows of x there is room for, at most Tokens and 64.
template <int Rows, int Tokens, int Room, int Step, int Ring, int Loaders>
struct Skinny {
  static constexpr int COMPUTE = 256, THREADS = COMPUTE + 32 * (Loaders + 1);
  static constexpr int WR = Rows / 16, WT = Tokens > 32 && WR <= 4 ? 2 : 1, WK = 8 / (WR * WT);  // warps along each side
  static constexpr int NT = Tokens / 8 / WT;      // 8-token tiles a warp
  static constexpr int STRIDE = Step * 2 + 64;    // bytes of a row; neighbours lie on other banks
  static constexpr int STAGE = (Rows + Room) * STRIDE;
  static constexpr int SUM_ROW = Tokens == 8 ? 8 : Tokens + 8;
  static constexpr int SUMS = WK * Rows * SUM_ROW;  // floats
  static constexpr int BYTES = Ring * STAGE + SUMS * 4 + Ring * 16;

  static_assert(Rows % 16 == 0 && Tokens % 8 == 0 && Step % 32 == 0 && WR * WT * WK == 8, "tiles");
  static_assert(Room <= Tokens && Room <= 64, "rows of x");

  // Walks the stages of the passes that a `Work` hands out for this CTA, in an order
  // that all warps repeat:
  //   bool next(): moves to the next pass
  //   int rows(), tokens(), k(); const u16* w_row(r), x_row(t)
  //   ONCE: no other pass reads the same weights
  template <class Work>
  struct Cursor {
    Work work;
    int k0, n;  // place in the reduction; stages so far
    bool ok;
    DEVICE_MEMBER Cursor(const Work& w) : work(w), k0(0), n(0) { ok = work.next(); }
    DEVICE_MEMBER int length() const { return min(Step, work.k() - k0); }
    DEVICE_MEMBER bool first() const { return k0 == 0; }
    DEVICE_MEMBER bool last() const { return k0 + Step >= work.k(); }
    DEVICE_MEMBER void advance() {
      n++;
      k0 += Step;
      if (k0 < work.k()) return;
      k0 = 0;
      ok = work.next();
    }
  };

  static DEVICE_MEMBER u32 full(u32 base, int s) { return base + Ring * STAGE + SUMS * 4 + s * 16; }
  static DEVICE_MEMBER u32 empty(u32 base, int s) { return full(base, s) + 8; }

  static DEVICE_MEMBER void init(u32 base) {
    if (threadIdx.x == 0) {
      for (int s = 0; s < Ring; s++) {
        mbar_init(full(base, s), (Loaders + 1) * 32);
        mbar_init(empty(base, s), COMPUTE);
      }
      mbar_init_fence();
    }
    __syncthreads();
  }

  // The loading warps: the last one brings x, the others weights. Where weights are
  // known before the launch this one depends on has ended, only x has to wait for it.
  template <class Work>
  static DEVICE_MEMBER void load(const Work& w, u32 base) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 - COMPUTE / 32;
    if (warp == Loaders) {
      grid_wait();
      load_x(w, base, lane);
    } else {
      load_w(w, base, warp, lane);
    }
  }

  template <class Work>
  static DEVICE_MEMBER void wait_empty(const Cursor<Work>& c, u32 base) {
    if (c.n >= Ring) mbar_wait(empty(base, c.n % Ring), (c.n / Ring - 1) & 1);
  }

  template <bool Once>
  static DEVICE_MEMBER void copy_row(u32 dst, const u16* src, int bytes, int lane) {
#pragma unroll
    for (int i = 0; i < (Step * 2 + 511) / 512; i++) {
      const int at = i * 512 + lane * 16;
      if (at >= bytes) continue;
      if (Once) cp_async16_once(dst + at, (const u8*)src + at);
      else cp_async16(dst + at, (const u8*)src + at, 16);
    }
  }

  template <class Work>
  static DEVICE_MEMBER void load_w(const Work& w, u32 base, int warp, int lane) {
    for (Cursor<Work> c(w); c.ok; c.advance()) {
      const int s = c.n % Ring, rows = c.work.rows(), bytes = c.length() * 2;
      const u32 dst = base + s * STAGE, bar = full(base, s);
      wait_empty(c, base);
#pragma unroll 4
      for (int r = warp; r < rows; r += Loaders) copy_row<Work::ONCE>(dst + r * STRIDE, c.work.w_row(r) + c.k0, bytes, lane);
      mbar_arrive_copies(bar);
    }
  }

  template <class Work>
  static DEVICE_MEMBER void load_x(const Work& w, u32 base, int lane) {
    u64 x[2] = {0, 0};  // where this lane's rows begin
    for (Cursor<Work> c(w); c.ok; c.advance()) {
      const int s = c.n % Ring, tokens = c.work.tokens(), bytes = c.length() * 2;
      const u32 dst = base + s * STAGE + Rows * STRIDE, bar = full(base, s);
      if (c.first()) {
        if (lane < tokens) x[0] = (u64)c.work.x_row(lane);
        if (lane + 32 < tokens) x[1] = (u64)c.work.x_row(lane + 32);
      }
      wait_empty(c, base);
#pragma unroll 4
      for (int t = 0; t < min(tokens, 32); t++)
        copy_row<false>(dst + t * STRIDE, (const u16*)__shfl_sync(0xffffffffu, x[0], t) + c.k0, bytes, lane);
      if (Room > 32) {
#pragma unroll 4
        for (int t = 32; t < tokens; t++)
          copy_row<false>(dst + t * STRIDE, (const u16*)__shfl_sync(0xffffffffu, x[1], t - 32) + c.k0, bytes, lane);
      }
      mbar_arrive_copies(bar);
    }
  }

  // One warp's share of a stage, for its first `Tiles` tiles of tokens.
  template <int Tiles>
  static DEVICE_MEMBER void multiply(float (&acc)[NT][4], const u8* w, const u8* const (&x)[NT], int from, int steps) {
#pragma unroll 4
    for (int k = from; k < steps; k += WK) {
      const uint4 w0 = *(const uint4*)(w + k * 64), w1 = *(const uint4*)(w + 8 * STRIDE + k * 64);
      const u32 a0[4] = {w0.x, w1.x, w0.y, w1.y}, a1[4] = {w0.z, w1.z, w0.w, w1.w};
      uint4 b[Tiles];
#pragma unroll
      for (int j = 0; j < Tiles; j++) b[j] = *(const uint4*)(x[j] + k * 64);
#pragma unroll
      for (int j = 0; j < Tiles; j++) mma_bf16(acc[j], a0, b[j].x, b[j].y);
#pragma unroll
      for (int j = 0; j < Tiles; j++) mma_bf16(acc[j], a1, b[j].z, b[j].w);
    }
  }

  // The eight computing warps. finish(work, sums) runs on COMPUTE threads after each
  // pass: the product of row r and token t is total(sums, r, t).
  template <class Work, class Finish>
  static DEVICE_MEMBER void compute(const Work& w, u8* shared, Finish finish) {
    const u32 base = smem_addr(shared);
    float* sums = (float*)(shared + Ring * STAGE);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int wr = warp % WR, wt = warp / WR % WT, wk = warp / (WR * WT);
    const int g = lane / 4, t = lane % 4;
    float acc[NT][4];
#pragma unroll
    for (int j = 0; j < NT; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) acc[j][i] = 0.f;
    for (Cursor<Work> c(w); c.ok; c.advance()) {
      const int s = c.n % Ring;
      const u8* stage = shared + s * STAGE;
      const int tiles = min(NT, (c.work.tokens() - wt * NT * 8 + 7) / 8), steps = c.length() / 32;
      const u8* at_x[NT];
#pragma unroll
      for (int j = 0; j < NT; j++)
        at_x[j] = stage + (Rows + min((wt * NT + j) * 8 + g, Room - 1)) * STRIDE + t * 16;
      mbar_wait(full(base, s), c.n / Ring & 1);
      if (wr * 16 < c.work.rows() && tiles > 0) {
        const u8* at_w = stage + (wr * 16 + g) * STRIDE + t * 16;
        if (tiles == 1) multiply<1>(acc, at_w, at_x, wk, steps);
        else if (tiles <= (NT + 1) / 2) multiply<(NT + 1) / 2>(acc, at_w, at_x, wk, steps);
        else multiply<NT>(acc, at_w, at_x, wk, steps);
      }
      // Every lane for itself: racecheck takes one lane's arrival for that lane's reads only.
      mbar_arrive(empty(base, s));
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
    }
  }

  static DEVICE_MEMBER float total(const float* sums, int r, int t) {
    float v = 0.f;
#pragma unroll
    for (int k = 0; k < WK; k++) v += sums[(k * Rows + r) * SUM_ROW + t];
    return v;
  }
};
