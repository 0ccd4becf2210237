// Decode attention over grouped cache blocks for any head dimensions and any GPU
// from sm_80 on: the plain form of gqa_decode.cu without APPEND, with the same work split,
// partial results and arguments.
//
// A CTA takes one KV group and one tile of 16 query rows (GS heads x SQ
// positions); each of its four warps takes 16 tokens of every block. Tiles are
// copied to padded rows in shared memory, ragged dimensions filled up with zeros,
// one block ahead of the arithmetic.
//
// -D DN, DR (0: no rope key), DV (at most 256); GS heads a group; SQ;
//    STAGES 2, or 1 where shared memory is short.
// row groups: local_groups * ROW_TILES; grid: multiprocessors * CTAs that fit;
// block: 128; dynamic shared memory: PORTABLE_SMEM.

#ifndef STAGES
#define STAGES 2
#endif

struct GqaDecode {
  const u16* q;            // [batch * SQ, local_heads, DN + DR]
  const u16* cache;        // [num_blocks] of { rope key BLOCK x DR, local_groups x { K BLOCK x DN, V BLOCK x DV } }
  u16* out;                // [batch * SQ, local_heads, DV]
  float* part_o;           // [batch + teams, SQ, local_heads, DV], each normalised
  float* part_lse;         // [batch + teams, SQ, local_heads], base 2
  const int* block_table;  // [batch, max_blocks]
  const int* lens;         // [batch] tokens in the cache, the new ones included
  const int4* team;        // [teams] from split_plan
  int groups;              // local groups; local_heads = groups * GS
  int max_blocks;
  int teams;
  float scale;             // of the logits, > 0
};

constexpr int DQ = DN + DR;
constexpr int ROWS = GS * SQ;
constexpr int ROW_TILES = (ROWS + 15) / 16;
constexpr int DQP = (DQ + 15) / 16 * 16, DVP = (DV + 15) / 16 * 16;
constexpr int K_ROW = DQP + 8, V_ROW = DVP + 8;  // elements; the 8 keep ldmatrix off equal banks
constexpr int STAGE_ELEMS = BLOCK * (K_ROW + V_ROW);
constexpr bool WIDE = DN % 8 == 0 && DR % 8 == 0 && DV % 8 == 0;  // 16-byte copies

constexpr int WARPS = 4;
constexpr int THREADS = 32 * WARPS;
constexpr int PORTABLE_SMEM = STAGES * STAGE_ELEMS * 2;

static_assert(BLOCK == 16 * WARPS, "a warp takes 16 tokens");
static_assert(DV <= 256, "the accumulators must fit in registers");

// Copies one tile to padded rows; rows from `valid` on become zero.
template <int D>
DEVICE void copy_tile(u16* dst, int row_elems, const u16* src, int valid) {
  if (WIDE) {
    constexpr int CHUNKS = D / 8 > 0 ? D / 8 : 1;
    for (int i = threadIdx.x; i < BLOCK * (D / 8); i += THREADS) {
      const int row = i / CHUNKS, col = i % CHUNKS * 8;
      cp_async16(smem_addr(dst + row * row_elems + col), src + tile_index<D>(row, col), row < valid ? 16 : 0);
    }
  } else {
    constexpr int COLS = D > 0 ? D : 1;
    for (int i = threadIdx.x; i < BLOCK * D; i += THREADS) {
      const int row = i / COLS, col = i % COLS;
      dst[row * row_elems + col] = row < valid ? src[tile_index<D>(row, col)] : 0;
    }
  }
}

DEVICE void copy_block(const GqaDecode& a, u16* stage, int block, int group, int valid) {
  const u16* src = a.cache + (size_t)block * BLOCK * (DR + a.groups * (DN + DV));
  const u16* kv = src + (size_t)BLOCK * (DR + group * (DN + DV));
  copy_tile<DN>(stage, K_ROW, kv, valid);
  copy_tile<DR>(stage + DN, K_ROW, src, valid);
  copy_tile<DV>(stage + BLOCK * K_ROW, V_ROW, kv + BLOCK * DN, valid);
  cp_async_commit();
}

// For the host: block, dynamic shared memory, row groups a KV group.
extern "C" __device__ const int gqa_decode_portable_launch[3] = {THREADS, PORTABLE_SMEM, ROW_TILES};

extern "C" __global__ void __launch_bounds__(THREADS) gqa_decode_portable(const GqaDecode a) {
  extern __shared__ __align__(16) unsigned char dynamic[];
  __shared__ float2 stats[WARPS][16];
  u16* mem = (u16*)dynamic;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row_groups = a.groups * ROW_TILES, heads = a.groups * GS;
  const float scale2 = a.scale * LOG2E;
  grid_wait();
  grid_launch_dependents();

  for (int job = blockIdx.x; job < a.teams * row_groups; job += gridDim.x) {
    const int team = job / row_groups, group = job % row_groups / ROW_TILES;
    const int row0 = job % ROW_TILES * 16 + lane / 4;  // this lane's rows are row0 and row0 + 8
    int4 work = a.team[team];
    while (work.z > 0) {
      const int seq = work.x, first = work.y, len = a.lens[seq], blocks = ceil_div(len, BLOCK);
      const int count = min(blocks - first, work.z);
      work = make_int4(seq + 1, 0, work.z - max(count, 0), 0);
      if (count <= 0) continue;
      const int* table = a.block_table + (size_t)seq * a.max_blocks + first;

      // Columns beyond DQ and DV stay zero; the slices' sums below may have used this memory.
      __syncthreads();
      for (int i = threadIdx.x; i < STAGES * STAGE_ELEMS / 8; i += THREADS) ((uint4*)mem)[i] = make_uint4(0, 0, 0, 0);
      __syncthreads();
      copy_block(a, mem, table[0], group, len - first * BLOCK);

      u32 q[DQP / 16][4];
#pragma unroll
      for (int k = 0; k < DQP / 16; k++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int row = row0 + i % 2 * 8, col = k * 16 + i / 2 * 8 + lane % 4 * 2;
          const u16* src = a.q + (((size_t)seq * SQ + row / GS) * heads + group * GS + row % GS) * DQ + col;
          const u32 lo = row < ROWS && col < DQ ? src[0] : 0, hi = row < ROWS && col + 1 < DQ ? src[1] : 0;
          q[k][i] = lo | hi << 16;
        }
      float o[DVP / 8][4];
#pragma unroll
      for (int n = 0; n < DVP / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) o[n][i] = 0.f;
      float top[2] = {NEG_INF, NEG_INF}, sum[2] = {0.f, 0.f};

      for (int i = 0; i < count; i++) {
        if (STAGES == 1 && i > 0) copy_block(a, mem, table[i], group, len - (first + i) * BLOCK);
        if (STAGES == 2 && i + 1 < count) {
          copy_block(a, mem + (i + 1) % 2 * STAGE_ELEMS, table[i + 1], group, len - (first + i + 1) * BLOCK);
          cp_async_wait<1>();
        } else {
          cp_async_wait<0>();
        }
        __syncthreads();

        const u32 k_tile = smem_addr(mem + i % STAGES * STAGE_ELEMS), v_tile = k_tile + BLOCK * K_ROW * 2;
        float p[2][4];
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
          for (int j = 0; j < 4; j++) p[n][j] = 0.f;
#pragma unroll
        for (int k = 0; k < DQP / 16; k++) {
          u32 b[4];  // tokens 0-7 | 8-15 by columns 0-7 | 8-15
          ldmatrix4(b, k_tile + ((warp * 16 + lane / 16 * 8 + lane % 8) * K_ROW + k * 16 + lane / 8 % 2 * 8) * 2);
          mma_bf16(p[0], q[k], b[0], b[1]);
          mma_bf16(p[1], q[k], b[2], b[3]);
        }
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
          for (int j = 0; j < 4; j++) {
            const int key = (first + i) * BLOCK + warp * 16 + n * 8 + lane % 4 * 2 + j % 2;
            if (key > len - SQ + (row0 + j / 2 * 8) / GS || key >= len) p[n][j] = NEG_INF;
          }
        softmax_step(p, o, top, sum, scale2);
        const u32 pa[4] = {pack_bf16(p[0][0], p[0][1]), pack_bf16(p[0][2], p[0][3]), pack_bf16(p[1][0], p[1][1]),
                           pack_bf16(p[1][2], p[1][3])};
#pragma unroll
        for (int d = 0; d < DVP / 16; d++) {
          u32 b[4];
          ldmatrix4_trans(b, v_tile + ((warp * 16 + lane % 16) * V_ROW + d * 16 + lane / 16 * 8) * 2);
          mma_bf16(o[2 * d], pa, b[0], b[1]);
          mma_bf16(o[2 * d + 1], pa, b[2], b[3]);
        }
        __syncthreads();
      }

      // The warps' maxima and sums first, then their outputs, one warp after another.
#pragma unroll
      for (int r = 0; r < 2; r++) {
        sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 1);
        sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 2);
        if (lane % 4 == 0) stats[warp][lane / 4 + 8 * r] = make_float2(top[r], sum[r]);
      }
      __syncthreads();
      float fade[2];
#pragma unroll
      for (int r = 0; r < 2; r++) {
        float all = NEG_INF, total = 0.f;
        for (int w = 0; w < WARPS; w++) all = fmaxf(all, stats[w][lane / 4 + 8 * r].x);
        const float base = all == NEG_INF ? 0.f : all;
        for (int w = 0; w < WARPS; w++)
          total += stats[w][lane / 4 + 8 * r].y * exp2_fast(stats[w][lane / 4 + 8 * r].x - base);
        fade[r] = exp2_fast(top[r] - base);
        top[r] = all, sum[r] = total;
      }
      float4* buffer = (float4*)dynamic + lane;
#pragma unroll 1
      for (int w = WARPS - 1; w >= 0; w--) {
        if (warp == w) {
#pragma unroll
          for (int n = 0; n < DVP / 8; n++) {
            const float4 x = w < WARPS - 1 ? buffer[n * 32] : make_float4(0, 0, 0, 0);
            o[n][0] = o[n][0] * fade[0] + x.x, o[n][1] = o[n][1] * fade[0] + x.y;
            o[n][2] = o[n][2] * fade[1] + x.z, o[n][3] = o[n][3] * fade[1] + x.w;
            buffer[n * 32] = make_float4(o[n][0], o[n][1], o[n][2], o[n][3]);
          }
        }
        __syncthreads();
      }

      if (warp == 0) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
          const int row = row0 + 8 * r;
          if (row >= ROWS) continue;
          const float inv = sum[r] > 0.f ? 1.f / sum[r] : 0.f;
          const size_t in_seq = (size_t)(row / GS) * heads + group * GS + row % GS;
          const size_t whole_at = (size_t)seq * SQ * heads + in_seq, part_at = (size_t)(seq + team) * SQ * heads + in_seq;
#pragma unroll
          for (int n = 0; n < DVP / 8; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
              const int col = n * 8 + lane % 4 * 2 + i;
              if (col >= DV) continue;
              const float x = o[n][2 * r + i] * inv;
              if (count == blocks) a.out[whole_at * DV + col] = f32_to_bf16(x);
              else a.part_o[part_at * DV + col] = x;
            }
          if (count != blocks && lane % 4 == 0)
            a.part_lse[part_at] = sum[r] > 0.f ? top[r] + log2_fast(sum[r]) : NEG_INF;
        }
      }
    }
  }
}
