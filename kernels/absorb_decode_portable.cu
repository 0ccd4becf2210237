// Absorb decode attention for any latent width, sm_80 and up: what absorb_decode.cu
// does for 512 + 64 on Hopper, on mma.sync and in the plain order: load a block,
// S = Q K^T, softmax, O += P V, next block.
//
// -D DC, DR (multiples of 8), HEADS (local heads), SQ; TILE_ROWS (16 or 32) query
// rows a CTA. Rows of a sequence are its SQ*HEADS (position, head) pairs.

#ifndef SQ
#define SQ 1
#endif
#ifndef TILE_ROWS
#define TILE_ROWS 16
#endif

#define DIM (DC + DR)
#define PAD_DIM ((DIM + 15) / 16 * 16) // whole k steps; the columns past DIM are zero
#define STRIDE (PAD_DIM + 8)           // elements; 16 bytes more keep ldmatrix free of conflicts
#define ROWS (HEADS * SQ)
#define ROW_TILES ((ROWS + TILE_ROWS - 1) / TILE_ROWS)
#define WARPS 8
#define THREADS (32 * WARPS)
#define M_TILES (TILE_ROWS / 16)
#define N_TILES ((DC / 8 + WARPS - 1) / WARPS) // 8-column output tiles a warp
#define S_STRIDE (BLOCK + 4)
#define P_STRIDE (BLOCK + 8)

// Bytes of dynamic shared memory, in this order.
#define SM_K 0                                        // bf16 [BLOCK][STRIDE]
#define SM_Q (SM_K + BLOCK * STRIDE * 2)              // bf16 [TILE_ROWS][STRIDE]
#define SM_S (SM_Q + TILE_ROWS * STRIDE * 2)          // f32 [TILE_ROWS][S_STRIDE]
#define SM_P (SM_S + TILE_ROWS * S_STRIDE * 4)        // bf16 [TILE_ROWS][P_STRIDE]
#define SM_STAT (SM_P + TILE_ROWS * P_STRIDE * 2)     // f32 [3][TILE_ROWS]: maximum, sum, factor
#define SMEM_BYTES (SM_STAT + 3 * TILE_ROWS * 4)      // what the launch must grant

struct AbsorbParams {
  const u16* q;           // bf16 [batch*SQ, HEADS, DC+DR]
  const u16* cache;       // bf16 [num_blocks] tiles BLOCK x (DC+DR)
  const int* block_table; // [batch, max_blocks]
  const int* lens;        // [batch], tokens with the SQ new ones; 0 = padding
  const int4* team;       // [teams] {first sequence, its first block, blocks in all, tokens of that sequence}
  const int2* seq;        // [batch] {first partial result, number of them}
  u16* out;               // bf16 [batch*SQ, HEADS, DC], of sequences that one team has alone
  float* part_o;          // f32 [batch + teams, SQ, HEADS, DC], normalised: the others
  float* part_lse;        // f32 [batch + teams, SQ, HEADS], base 2
  int max_blocks;
  float scale;
};

// Rows of DIM from `src(row)` into shared memory; rows from `live` on are zero.
template <int N, class Source>
DEVICE void load_rows(u32 dst, int live, Source src) {
  for (int i = threadIdx.x; i < N * (DIM / 8); i += THREADS) {
    const int row = i / (DIM / 8), col = i % (DIM / 8) * 8;
    const bool real = row < live;
    cp_async16(dst + (row * STRIDE + col) * 2, src(real ? row : 0, col), real ? 16 : 0);
  }
}

// Grid: teams * ROW_TILES CTAs of THREADS. Before it absorb_plan or split_plan, after
// it combine.
extern "C" __global__ void __launch_bounds__(THREADS) absorb_decode_portable(const AbsorbParams p) {
  extern __shared__ __align__(16) u8 dynamic_smem[];
  u16* k_tile = (u16*)(dynamic_smem + SM_K);
  u16* q_tile = (u16*)(dynamic_smem + SM_Q);
  float* scores = (float*)(dynamic_smem + SM_S);
  u16* probs = (u16*)(dynamic_smem + SM_P);
  float *top = (float*)(dynamic_smem + SM_STAT), *sum = top + TILE_ROWS, *factor = sum + TILE_ROWS;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row0 = blockIdx.x % ROW_TILES * TILE_ROWS, team = blockIdx.x / ROW_TILES;
  const float scale = p.scale * LOG2E;
  grid_wait();

  if (PAD_DIM != DIM) // nothing else writes there
    for (int i = threadIdx.x; i < BLOCK + TILE_ROWS; i += THREADS)
      for (int c = DIM; c < PAD_DIM; c++) k_tile[i * STRIDE + c] = 0; // the queries follow the keys

  const int4 work = p.team[team];
  int batch = work.x, block = work.y, left = work.z;
  for (; left > 0; batch++, block = 0) {
    const int len = p.lens[batch], blocks = ceil_div(len, BLOCK);
    if (block >= blocks) continue;
    const int end = min(blocks, block + left);
    left -= end - block;

    float o[M_TILES][N_TILES][4];
#pragma unroll
    for (int m = 0; m < M_TILES; m++)
#pragma unroll
      for (int j = 0; j < N_TILES; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) o[m][j][i] = 0.0f;

    __syncthreads(); // the last sequence is done with shared memory
    if (threadIdx.x < TILE_ROWS) top[threadIdx.x] = -1e30f, sum[threadIdx.x] = 0.0f;
    const u16* q = p.q + ((i64)batch * ROWS + row0) * DIM;
    load_rows<TILE_ROWS>(smem_addr(q_tile), ROWS - row0, [&](int row, int col) { return q + (i64)row * DIM + col; });

    for (; block < end; block++) {
      const int token = block * BLOCK;
      const u16* tile = p.cache + (i64)p.block_table[(i64)batch * p.max_blocks + block] * (BLOCK * DIM);
      // Slots past the end may hold NaN and become zeros here.
      load_rows<BLOCK>(smem_addr(k_tile), len - token,
                       [&](int row, int col) { return tile + tile_index<DIM>(row, col); });
      cp_async_commit();
      cp_async_wait<0>();
      __syncthreads();

      // S: 8 tokens a warp.
      float s[M_TILES][4];
#pragma unroll
      for (int m = 0; m < M_TILES; m++) s[m][0] = s[m][1] = s[m][2] = s[m][3] = 0.0f;
      const u16* key = k_tile + (warp * 8 + lane / 4) * STRIDE + 2 * (lane % 4);
      const u32 query = smem_addr(q_tile) + (lane % 16 * STRIDE + lane / 16 * 8) * 2;
#pragma unroll 4
      for (int k = 0; k < PAD_DIM; k += 16) {
        const u32 b0 = *(const u32*)(key + k), b1 = *(const u32*)(key + k + 8);
#pragma unroll
        for (int m = 0; m < M_TILES; m++) {
          u32 a[4];
          ldmatrix4(a, query + (m * 16 * STRIDE + k) * 2);
          mma_bf16(s[m], a, b0, b1);
        }
      }
#pragma unroll
      for (int m = 0; m < M_TILES; m++) {
        float* at = scores + (m * 16 + lane / 4) * S_STRIDE + warp * 8 + 2 * (lane % 4);
        at[0] = s[m][0], at[1] = s[m][1], at[8 * S_STRIDE] = s[m][2], at[8 * S_STRIDE + 1] = s[m][3];
      }
      __syncthreads();

      // Softmax: a row a warp at a time; row (t, head) sees the first len - SQ + 1 + t keys.
      for (int r = warp; r < TILE_ROWS; r += WARPS) {
        const int seen = len - SQ + 1 + min((row0 + r) / HEADS, SQ - 1) - token;
        const float x0 = lane < seen ? scores[r * S_STRIDE + lane] * scale : NEG_INF;
        const float x1 = lane + 32 < seen ? scores[r * S_STRIDE + lane + 32] * scale : NEG_INF;
        const float was = top[r], now = fmaxf(was, warp_max(fmaxf(x0, x1)));
        const float p0 = exp2_fast(x0 - now), p1 = exp2_fast(x1 - now), add = warp_sum(p0 + p1);
        probs[r * P_STRIDE + lane] = f32_to_bf16(p0), probs[r * P_STRIDE + lane + 32] = f32_to_bf16(p1);
        __syncwarp();
        if (lane == 0) {
          const float f = exp2_fast(was - now);
          top[r] = now, factor[r] = f, sum[r] = sum[r] * f + add;
        }
      }
      __syncthreads();

      // O: 8 columns a warp at a time.
      u32 a[M_TILES][BLOCK / 16][4];
#pragma unroll
      for (int m = 0; m < M_TILES; m++) {
#pragma unroll
        for (int k = 0; k < BLOCK / 16; k++)
          ldmatrix4(a[m][k], smem_addr(probs + (m * 16 + lane % 16) * P_STRIDE + k * 16 + lane / 16 * 8));
        const float f0 = factor[m * 16 + lane / 4], f1 = factor[m * 16 + lane / 4 + 8];
#pragma unroll
        for (int j = 0; j < N_TILES; j++) o[m][j][0] *= f0, o[m][j][1] *= f0, o[m][j][2] *= f1, o[m][j][3] *= f1;
      }
#pragma unroll
      for (int j = 0; j < N_TILES; j++) {
        const int col = (j * WARPS + warp) * 8;
        if (col >= DC) break;
#pragma unroll
        for (int k = 0; k < BLOCK / 16; k += 2) {
          u32 b[4];
          ldmatrix4_trans(b, smem_addr(k_tile + (k * 16 + lane) * STRIDE + col));
#pragma unroll
          for (int m = 0; m < M_TILES; m++) {
            mma_bf16(o[m][j], a[m][k], b[0], b[1]);
            mma_bf16(o[m][j], a[m][k + 1], b[2], b[3]);
          }
        }
      }
      __syncthreads(); // before the next block's keys
    }

    const bool whole = p.seq[batch].y == 1;
#pragma unroll
    for (int m = 0; m < M_TILES; m++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int r = m * 16 + lane / 4 + 8 * i, row = row0 + r;
        if (row >= ROWS) continue;
        const float l = sum[r], inv = l > 0.0f ? 1.0f / l : 0.0f;
        const i64 part = (i64)(batch + team) * ROWS + row;
#pragma unroll
        for (int j = 0; j < N_TILES; j++) {
          const int col = (j * WARPS + warp) * 8 + 2 * (lane % 4);
          if (col >= DC) break;
          const float x = o[m][j][2 * i] * inv, y = o[m][j][2 * i + 1] * inv;
          if (whole)
            *(u32*)(p.out + ((i64)batch * ROWS + row) * DC + col) = pack_bf16(x, y);
          else
            *(float2*)(p.part_o + part * DC + col) = make_float2(x, y);
        }
        if (!whole && warp == 0 && lane % 4 == 0) p.part_lse[part] = l > 0.0f ? top[r] + log2_fast(l) : NEG_INF;
      }
  }
}
