// Causal attention of chunks of query rows over the paged cache, both layouts, any
// dimensions, any GPU from sm_80 on: prefill, and decode where no faster kernel
// takes the latent layout's dimensions.
//
// The rows of a group are its (position, head) pairs, cut into tiles of 16 MT. A warp
// owns 16 rows and every logit of theirs, and a VS-th part of the value's columns; K
// and V of a block are read once for the 16 MT rows. Where VS is 2 (wide latents)
// two warps compute the same logits: that is cheaper than passing them on.
//
// -D LATENT 0: DN, DR (0: no rope key), DV, GS heads a group.
//           1: DC, DR; GS = the rank's heads; groups = 1. K is the tile, V its first DC columns.
// -D EXPANDED 1, with LATENT 0 and DC, INTERLEAVE as in append_latent.cu: keys and values
//           were expanded from latents and are a matrix's rows, the rope key is the latent
//           cache's, and the queries' rope parts are turned here.
// -D MT row tiles a CTA, VS value splits, STAGES 1 or 2.
// grid (most row tiles of a span / MT, groups, spans), block PREFILL_THREADS,
// dynamic shared memory PREFILL_SMEM.

#ifndef EXPANDED
#define EXPANDED 0
#endif

struct Prefill {
  const u16* q;            // [rows, heads, DQ]
  const u16* cache;        // blocks, as gqa_decode.cu and absorb_decode.cu describe them
  u16* out;                // [rows, heads, DV]
  const int* block_table;  // [spans, max_blocks]
  const int* lens;         // [spans] tokens in the cache, the new ones included; 0 is padding
  const int* first;        // [spans] first row
  const int* rows;         // [spans] rows
  int groups;
  int max_blocks;
  float scale;             // of the logits, > 0
#if EXPANDED               // q is the first group's first head, and so is out
  const u16* kv;           // [blocks, BLOCK] rows of kv_stride: [groups, DN + DV]
  const int* before;       // [spans] blocks of the spans before, from any number on
  const float* cos_table;  // [positions, DR / 2]
  const float* sin_table;  // [positions, DR / 2]
  int q_stride, kv_stride; // elements from a row to the next
  int heads;               // of a row of out
#endif
};

#if LATENT
constexpr int DQ = DC + DR, VALUE = DC;
#else
constexpr int DQ = DN + DR, VALUE = DV;
#endif
constexpr int DQP = (DQ + 15) / 16 * 16, DVP = (VALUE + 16 * VS - 1) / (16 * VS) * (16 * VS);
constexpr int K_ROW = DQP + 8;  // elements; the 8 keep ldmatrix off equal banks
constexpr int V_ROW = LATENT ? K_ROW : DVP + 8;
constexpr int V_AT = LATENT ? 0 : BLOCK * K_ROW;
constexpr int STAGE_ELEMS = BLOCK * K_ROW + (LATENT ? 0 : BLOCK * V_ROW);
constexpr int Q_ELEMS = 16 * MT * K_ROW;
constexpr int COLS = DVP / VS;  // a warp's columns of the value

constexpr int WARPS = MT * VS;
constexpr int PREFILL_THREADS = 32 * WARPS;
constexpr int PREFILL_SMEM = (Q_ELEMS + STAGES * STAGE_ELEMS) * 2;

static_assert(COLS <= 256, "the accumulators must fit in registers");
static_assert(DVP <= DQP || !LATENT, "the value lies within the key");

// Copies BLOCK rows of D elements to padded rows; rows from `valid` on become zero. at(row, col)
// is an element's place in src. WIDE: 16 bytes at a time.
template <int D, bool WIDE, class At>
DEVICE void copy_rows(u16* dst, int row_elems, const u16* src, int valid, At at) {
  constexpr int N = D > 0 ? D : 1;
  if (WIDE) {
    constexpr int CHUNKS = D / 8 > 0 ? D / 8 : 1;
    for (int i = threadIdx.x; i < BLOCK * (D / 8); i += PREFILL_THREADS) {
      const int row = i / CHUNKS, col = i % CHUNKS * 8;
      cp_async16(smem_addr(dst + row * row_elems + col), src + at(row, col), row < valid ? 16 : 0);
    }
  } else {
    for (int i = threadIdx.x; i < BLOCK * D; i += PREFILL_THREADS) {
      const int row = i / N, col = i % N;
      dst[row * row_elems + col] = row < valid ? src[at(row, col)] : 0;
    }
  }
}

// The same of a tile.
template <int D, bool WIDE>
DEVICE void copy_tile(u16* dst, int row_elems, const u16* src, int valid) {
  copy_rows<D, WIDE>(dst, row_elems, src, valid, [](int row, int col) { return tile_index<D>(row, col); });
}

// expanded: the block's place among the expanded ones.
DEVICE void copy_block(const Prefill& a, u16* stage, int block, int expanded, int group, int valid) {
#if EXPANDED
  const size_t stride = a.kv_stride;
  const u16* kv = a.kv + (size_t)expanded * BLOCK * stride + group * (DN + DV);
  constexpr bool WIDE = DN % 8 == 0 && DV % 8 == 0;
  const auto at = [=](int row, int col) { return row * stride + col; };
  copy_rows<DN, WIDE>(stage, K_ROW, kv, valid, at);
  copy_rows<DR, DN % 8 == 0 && DR % 8 == 0 && DC % 8 == 0>(
      stage + DN, K_ROW, a.cache + (size_t)block * BLOCK * (DC + DR), valid,
      [](int row, int col) { return tile_index<DC + DR>(row, DC + col); });
  copy_rows<DV, WIDE>(stage + V_AT, V_ROW, kv + DN, valid, at);
#elif LATENT
  copy_tile<DQ, DQ % 8 == 0>(stage, K_ROW, a.cache + (size_t)block * BLOCK * DQ, valid);
#else
  const u16* src = a.cache + (size_t)block * BLOCK * (DR + a.groups * (DN + DV));
  const u16* kv = src + (size_t)BLOCK * (DR + group * (DN + DV));
  constexpr bool WIDE = DN % 8 == 0 && DR % 8 == 0;
  copy_tile<DN, WIDE>(stage, K_ROW, kv, valid);
  copy_tile<DR, WIDE>(stage + DN, K_ROW, src, valid);
  copy_tile<DV, DV % 8 == 0 && DN % 8 == 0 && DR % 8 == 0>(stage + V_AT, V_ROW, kv + BLOCK * DN, valid);
#endif
  cp_async_commit();
}

// Element c of a query at position pos.
DEVICE u16 query(const Prefill& a, const u16* q, int c, int pos) {
#if EXPANDED
  if (c >= DN) {
    float v[1];
    rope_turn<DR, 1, INTERLEAVE>(q + DN, c - DN, a.cos_table + (size_t)pos * (DR / 2), a.sin_table + (size_t)pos * (DR / 2), v);
    return f32_to_bf16(v[0]);
  }
#endif
  return q[c];
}

extern "C" __global__ void __launch_bounds__(PREFILL_THREADS) prefill(const Prefill a) {
  extern __shared__ __align__(16) unsigned char dynamic[];
  u16* queries = (u16*)dynamic;
  u16* stages = queries + Q_ELEMS;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int tile = warp / VS, split = warp % VS;
  const int group = blockIdx.y, span = blockIdx.z;
#if EXPANDED
  const int heads = a.heads, q_stride = a.q_stride, expanded = a.before[span] - a.before[0];
#else
  const int heads = a.groups * GS, q_stride = heads * DQ, expanded = 0;
#endif
  const float scale2 = a.scale * LOG2E;
  grid_wait();
  grid_launch_dependents();

  const int len = a.lens[span], rows = a.rows[span], first = a.first[span];
  const int tile_row = blockIdx.x * 16 * MT;  // of the span's rows * GS
  if (len <= 0 || tile_row >= rows * GS) return;
  const int last = min(tile_row + 16 * MT, rows * GS) - 1;
  const int blocks = (len - rows + last / GS) / BLOCK + 1;
  const int* table = a.block_table + (size_t)span * a.max_blocks;

  // Columns beyond DQ and the value, and rows beyond the span, are zero.
  for (int i = threadIdx.x; i < PREFILL_SMEM / 16; i += PREFILL_THREADS) ((uint4*)dynamic)[i] = make_uint4(0, 0, 0, 0);
  __syncthreads();
  for (int i = threadIdx.x; i < 16 * MT * DQ; i += PREFILL_THREADS) {
    const int r = i / DQ, c = i % DQ, row = tile_row + r;
    if (row < rows * GS)
      queries[r * K_ROW + c] = query(a, a.q + ((size_t)first + row / GS) * q_stride + (group * GS + row % GS) * DQ, c,
                                     len - rows + row / GS);
  }
  copy_block(a, stages, table[0], expanded, group, len);

  float o[COLS / 8][4];
#pragma unroll
  for (int n = 0; n < COLS / 8; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) o[n][i] = 0.f;
  float top[2] = {NEG_INF, NEG_INF}, sum[2] = {0.f, 0.f};
  const int row0 = tile_row + tile * 16 + lane / 4;  // this lane's rows are row0 and row0 + 8
  const u32 q_at = smem_addr(queries) + ((tile * 16 + lane % 16) * K_ROW + lane / 16 * 8) * 2;

  for (int b = 0; b < blocks; b++) {
    if (STAGES == 1 && b > 0) copy_block(a, stages, table[b], expanded + b, group, len - b * BLOCK);
    if (STAGES == 2 && b + 1 < blocks) {
      copy_block(a, stages + (b + 1) % 2 * STAGE_ELEMS, table[b + 1], expanded + b + 1, group, len - (b + 1) * BLOCK);
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();
    const u32 k_tile = smem_addr(stages + b % STAGES * STAGE_ELEMS), v_tile = k_tile + V_AT * 2;

    float p[BLOCK / 8][4];
#pragma unroll
    for (int n = 0; n < BLOCK / 8; n++)
#pragma unroll
      for (int j = 0; j < 4; j++) p[n][j] = 0.f;
#pragma unroll 4
    for (int k = 0; k < DQP / 16; k++) {
      u32 q[4];
      ldmatrix4(q, q_at + k * 32);
#pragma unroll
      for (int n = 0; n < BLOCK / 16; n++) {
        u32 w[4];  // tokens 0-7 | 8-15 by columns 0-7 | 8-15
        ldmatrix4(w, k_tile + ((n * 16 + lane / 16 * 8 + lane % 8) * K_ROW + k * 16 + lane / 8 % 2 * 8) * 2);
        mma_bf16(p[2 * n], q, w[0], w[1]);
        mma_bf16(p[2 * n + 1], q, w[2], w[3]);
      }
    }
#pragma unroll
    for (int n = 0; n < BLOCK / 8; n++)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int key = b * BLOCK + n * 8 + lane % 4 * 2 + j % 2;
        if (key > len - rows + (row0 + j / 2 * 8) / GS || key >= len) p[n][j] = NEG_INF;
      }
    softmax_step(p, o, top, sum, scale2);
#pragma unroll
    for (int n = 0; n < BLOCK / 16; n++) {
      const u32 pa[4] = {pack_bf16(p[2 * n][0], p[2 * n][1]), pack_bf16(p[2 * n][2], p[2 * n][3]),
                         pack_bf16(p[2 * n + 1][0], p[2 * n + 1][1]), pack_bf16(p[2 * n + 1][2], p[2 * n + 1][3])};
#pragma unroll
      for (int d = 0; d < COLS / 16; d++) {
        u32 w[4];
        ldmatrix4_trans(w, v_tile + ((n * 16 + lane % 16) * V_ROW + split * COLS + d * 16 + lane / 16 * 8) * 2);
        mma_bf16(o[2 * d], pa, w[0], w[1]);
        mma_bf16(o[2 * d + 1], pa, w[2], w[3]);
      }
    }
    __syncthreads();
  }

#pragma unroll
  for (int r = 0; r < 2; r++) {
    sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 1);
    sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 2);
    const int row = row0 + 8 * r;
    if (row >= rows * GS) continue;
    const float inv = sum[r] > 0.f ? 1.f / sum[r] : 0.f;
    u16* to = a.out + (((size_t)first + row / GS) * heads + group * GS + row % GS) * VALUE;
#pragma unroll
    for (int n = 0; n < COLS / 8; n++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int col = split * COLS + n * 8 + lane % 4 * 2 + i;
        if (col < VALUE) to[col] = f32_to_bf16(o[n][2 * r + i] * inv);
      }
  }
}
