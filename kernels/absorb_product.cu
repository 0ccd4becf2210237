// The absorb path's products with kv_b, batched over groups, on the tensor cores.
// A CTA computes TILE (row, head of the group) pairs by 64 columns; the heads of a
// group are rows of one product, so a group's weights are never repeated.
//
// -D DN, DR, DC, DV; INTERLEAVE as in append_latent.cu; TILE 64, or 16 for few pairs
// absorb_query:  out[.., ..DC] = q_nope W_UK[g], out[.., DC..] = q_rope, turned
//                grid (ceil(DC / 64), tiles, groups); block 128
// absorb_output: out = latent W_UV[g]^T
//                grid (ceil(DV / 64), tiles, groups); block 128
// dynamic shared memory: QUERY_SMEM, OUTPUT_SMEM
//   tiles = ceil(rows * most / TILE), most = min(heads, heads_per_group)

struct AbsorbProduct {
  const u16* kv_up;  // [groups, DN + DV, DC]: a group's W_UK [DN, DC], then its W_UV [DV, DC]
  const u16* in;     // row r at in + r * in_stride; absorb_query: [heads, DN + DR]; absorb_output: [heads, DC]
  u16* out;          // absorb_query: [rows, heads, DC + DR]; absorb_output: [rows, heads, DV]
  const float* cos_table;  // [positions, DR / 2] (absorb_query)
  const float* sin_table;  // [positions, DR / 2] (absorb_query)
  const int* positions;    // [rows] (absorb_query)
  int in_stride;            // elements
  int rows;
  int heads;                // on this rank
  int heads_per_group;      // in the whole model
  int first_head_in_group;  // heads of the first group that other ranks have
};

constexpr int COLS = 64, ROW = COLS + 8;      // elements; the 8 keep ldmatrix off equal banks
constexpr int X_ELEMS = TILE * ROW, W_ELEMS = COLS * ROW;
template <int K>
struct Reduction {
  static constexpr int STEPS = (K + COLS - 1) / COLS, MOST = SHARED_KIB < 100 ? 4 : 6;
  static constexpr int BUFFERS = STEPS + 1 < MOST ? STEPS + 1 : MOST, BYTES = BUFFERS * (X_ELEMS + W_ELEMS) * 2;
};
constexpr int QUERY_SMEM = Reduction<DN>::BYTES, OUTPUT_SMEM = Reduction<DC>::BYTES;
constexpr int WARPS_DOWN = TILE / 16;         // warps along the pairs; the others share out the columns
constexpr int N_TILES = 2 * WARPS_DOWN;       // 8-column tiles a warp

// 8 elements to shared memory, those from `valid` on zero. Unaligned rows go one element at a time.
template <bool WIDE>
DEVICE void copy8(u16* dst, const u16* src, int valid) {
  if (WIDE) {
    cp_async16(smem_addr(dst), src, valid > 0 ? 16 : 0);
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) dst[i] = i < valid ? src[i] : 0;
  }
}

// OUTPUT false: weights [K, N] (rows are the reduction); true: [N, K].
template <bool OUTPUT>
DEVICE void absorb(const AbsorbProduct& a) {
  constexpr int K = OUTPUT ? DC : DN, N = OUTPUT ? DV : DC;
  constexpr int IN = OUTPUT ? DC : DN + DR, OUT = OUTPUT ? DV : DC + DR;
  constexpr bool WIDE_W = DC % 8 == 0;
  constexpr bool WIDE_X = DC % 8 == 0 && (OUTPUT || (DN % 8 == 0 && DR % 8 == 0));
  constexpr int STEPS = Reduction<K>::STEPS, BUFFERS = Reduction<K>::BUFFERS;
  extern __shared__ __align__(16) u16 absorb_shared[];
  u16* const xs = absorb_shared;
  u16* const ws = absorb_shared + BUFFERS * X_ELEMS;
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  const int down = warp % WARPS_DOWN * 16, across = warp / WARPS_DOWN * (N_TILES * 8);
  const int group = blockIdx.z, n0 = blockIdx.x * COLS;
  const int first = max(0, group * a.heads_per_group - a.first_head_in_group);
  const int last = min(a.heads, (group + 1) * a.heads_per_group - a.first_head_in_group);
  const int mine = last - first, pairs = a.rows * mine, m0 = blockIdx.y * TILE;
  grid_launch_dependents();
  if (mine <= 0 || m0 >= pairs) return;
  const u16* w = a.kv_up + ((size_t)group * (DN + DV) + (OUTPUT ? DN : 0)) * DC;

  // A thread copies 8 columns of every 16th row of a tile.
  const int c = tid % 8 * 8;
  const u16* x_row[TILE / 16];  // null past the last pair
#pragma unroll
  for (int j = 0; j < TILE / 16; j++) {
    const int p = m0 + tid / 8 + 16 * j;
    x_row[j] = p < pairs ? a.in + (size_t)(p / mine) * a.in_stride + (first + p % mine) * IN : nullptr;
  }
  auto load_w = [&](int step) {
    u16* dst = ws + step % BUFFERS * W_ELEMS;
    const int k0 = step * COLS;
#pragma unroll
    for (int j = 0; j < COLS / 16; j++) {
      const int r = tid / 8 + 16 * j;
      const int wr = (OUTPUT ? n0 : k0) + r, wc = (OUTPUT ? k0 : n0) + c;
      const bool in = wr < (OUTPUT ? N : K) && wc < DC;
      copy8<WIDE_W>(dst + r * ROW + c, w + (in ? (size_t)wr * DC + wc : 0), in ? DC - wc : 0);
    }
  };
  auto load_x = [&](int step) {
    u16* dst = xs + step % BUFFERS * X_ELEMS;
    const int k0 = step * COLS;
#pragma unroll
    for (int j = 0; j < TILE / 16; j++) {
      const bool in = x_row[j] != nullptr && k0 + c < K;
      copy8<WIDE_X>(dst + (tid / 8 + 16 * j) * ROW + c, in ? x_row[j] + k0 + c : a.in, in ? K - k0 - c : 0);
    }
  };

  float acc[N_TILES][4];
#pragma unroll
  for (int n = 0; n < N_TILES; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) acc[n][i] = 0.f;

  // Weights do not depend on the launch before this one, so they are asked for first.
#pragma unroll
  for (int s = 0; s < BUFFERS - 1; s++)
    if (s < STEPS) load_w(s);
  grid_wait();
#pragma unroll
  for (int s = 0; s < BUFFERS - 1; s++) {
    if (s < STEPS) load_x(s);
    cp_async_commit();  // the first group has all weights so far: harmless
  }

  // The rope parts pass by and turn on the way; the CTAs of a row tile share them.
  if constexpr (!OUTPUT && DR > 0) {
    constexpr int VEC = DN % 8 == 0 && DR % 16 == 0 && DC % 8 == 0 ? 8 : 1, CHUNKS = DR / VEC;
    for (int i = blockIdx.x * 128 + tid; i < TILE * CHUNKS; i += gridDim.x * 128) {
      const int p = m0 + i / CHUNKS, col = i % CHUNKS * VEC;
      if (p >= pairs) break;
      const int row = p / mine, head = first + p % mine;
      const size_t angles = (size_t)a.positions[row] * (DR / 2);
      float v[VEC];
      rope_turn<DR, VEC, INTERLEAVE>(a.in + (size_t)row * a.in_stride + head * IN + DN, col, a.cos_table + angles,
                                     a.sin_table + angles, v);
      store_bf16(a.out + ((size_t)row * a.heads + head) * OUT + DC + col, v);
    }
  }

  for (int s = 0; s < STEPS; s++) {
    cp_async_wait<BUFFERS - 2>();
    __syncthreads();
    if (s + BUFFERS - 1 < STEPS) {
      load_w(s + BUFFERS - 1);
      load_x(s + BUFFERS - 1);
    }
    cp_async_commit();
    const u16* x = xs + s % BUFFERS * X_ELEMS + down * ROW;
    const u16* b = ws + s % BUFFERS * W_ELEMS;
#pragma unroll
    for (int k = 0; k < COLS; k += 16) {
      u32 f[4];
      ldmatrix4(f, smem_addr(x + lane % 16 * ROW + k + lane / 16 * 8));
#pragma unroll
      for (int n = 0; n < N_TILES; n += 2) {
        const int col = across + n * 8;
        u32 t[4];
        if (OUTPUT) {
          ldmatrix4(t, smem_addr(b + (col + lane / 16 * 8 + lane % 8) * ROW + k + lane / 8 % 2 * 8));
        } else {
          ldmatrix4_trans(t, smem_addr(b + (k + lane % 16) * ROW + col + lane / 16 * 8));
        }
        mma_bf16(acc[n], f, t[0], t[1]);
        mma_bf16(acc[n + 1], f, t[2], t[3]);
      }
    }
  }

#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int p = m0 + down + h * 8 + lane / 4;
    if (p >= pairs) continue;
    u16* out = a.out + ((size_t)(p / mine) * a.heads + first + p % mine) * OUT;
#pragma unroll
    for (int n = 0; n < N_TILES; n++) {
      const int col = n0 + across + n * 8 + lane % 4 * 2;
      if (OUT % 2 == 0 && col + 1 < N) {
        *(u32*)(out + col) = pack_bf16(acc[n][2 * h], acc[n][2 * h + 1]);
      } else {
        if (col < N) out[col] = f32_to_bf16(acc[n][2 * h]);
        if (col + 1 < N) out[col + 1] = f32_to_bf16(acc[n][2 * h + 1]);
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(128) absorb_query(const AbsorbProduct a) { absorb<false>(a); }
extern "C" __global__ void __launch_bounds__(128) absorb_output(const AbsorbProduct a) { absorb<true>(a); }
