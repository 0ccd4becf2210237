// Decode attention over grouped cache blocks, Hopper: limited by memory alone.
//
// A CTA walks its team's run of cache blocks (split_plan) for one row group: NG
// neighbouring KV groups of the rank. One warp keeps STAGES whole tiles in
// flight with the bulk copy engine; the others multiply with mma.sync. The query
// rows of a group (GS heads x SQ positions) fill RT tiles of 16 rows, so K and V
// are read once whatever SQ is. A warp owns one row tile and every SLICES-th part
// of a block's tokens, with its own running maximum and sum: the warps meet only
// when a sequence's part ends, to add up their slices.
//
// The split and the step's tables are older than the launch that this one may overlap
// with (the host launches it serially after split_plan), and so are all tiles but those
// that hold the step's own tokens: they are asked for before that launch has ended.
//
// The rope key tile is common to all groups. The CTAs of a team read it at about
// the same time, and L2 keeps it longer than K and V, which nobody reads twice.
//
// -D DN, DR (0: no rope key), DV: multiples of 64; GS heads a group; SQ 1..4;
//    NG groups a CTA, dividing the rank's groups.
// grid: number of multiprocessors; block: GQA_THREADS;
// dynamic shared memory: GQA_SMEM.

#ifndef NG
#define NG 1
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
constexpr int RT = (ROWS + 15) / 16;            // tiles of 16 query rows
constexpr int MAX_WARPS = DV > 128 || NG * RT <= 2 ? 4 : 8;  // the accumulators take DV / 2 registers
constexpr int SLICES = MAX_WARPS / (NG * RT) >= 4 ? 4 : MAX_WARPS / (NG * RT) >= 2 ? 2 : 1;
constexpr int WARPS = NG * RT * SLICES;         // that compute
constexpr int SLICE = BLOCK / SLICES;           // tokens of a block a warp sees
constexpr int STEP = SLICE < 32 ? SLICE : 32;   // tokens it takes at a time
constexpr int CHAINS = STEP == 16 ? 2 : 1;      // independent sums of one logit, against mma latency

constexpr int PANEL = BLOCK * 128;              // bytes
constexpr int K_BYTES = BLOCK * DN * 2, V_BYTES = BLOCK * DV * 2, R_BYTES = BLOCK * DR * 2;
constexpr int KV_BYTES = K_BYTES + V_BYTES;
constexpr int STAGE_BYTES = R_BYTES + NG * KV_BYTES;
// About 128 KiB in flight a multiprocessor. More only queues up in the memory
// system, arrives in bursts, and leaves a heap of tiles to compute at the end.
constexpr int FIT = 128 * 1024 / STAGE_BYTES;
constexpr int STAGES = FIT < 2 ? 2 : FIT > 8 ? 8 : FIT;

// Eight computing warps want more registers than an even share leaves them, so
// the loading warp comes with three idle ones, and the four give theirs away.
constexpr bool SHIFT_REGISTERS = WARPS == 8;
constexpr int GQA_THREADS = 32 * (WARPS + (SHIFT_REGISTERS ? 4 : 1));
constexpr int GQA_SMEM = STAGES * STAGE_BYTES + 1024;

static_assert(DN % 64 == 0 && DR % 64 == 0 && DV % 64 == 0, "swizzled tiles only");
static_assert(NG * RT <= MAX_WARPS, "too many query rows: a job for the portable kernel");
static_assert(GQA_SMEM <= 225 * 1024, "two stages must fit");
static_assert(SLICES == 1 || NG * RT * (SLICES / 2) * 16 * DV * 4 <= STAGE_BYTES, "slices are added up in a stage");

// A stretch of one sequence's blocks.
struct Part {
  int seq, len;      // tokens of the sequence
  int first, count;  // blocks
  bool whole;        // the sequence has no other part
};

DEVICE bool next_part(const GqaDecode& a, int4& work, Part& part) {
  while (work.z > 0) {
    part.seq = work.x;
    part.len = work.w > 0 ? work.w : a.lens[work.x];
    part.first = work.y;
    const int blocks = ceil_div(part.len, BLOCK);
    part.count = min(blocks - work.y, work.z);
    part.whole = part.count == blocks;
    work = make_int4(work.x + 1, 0, work.z - max(part.count, 0), 0);
    if (part.count > 0) return true;
  }
  return false;
}

// ---- the warp that loads ----

DEVICE void produce(const GqaDecode& a, u32 stages, u32 full, u32 empty) {
  const int lane = threadIdx.x % 32;
  const int row_groups = a.groups / NG;
  const size_t block_elems = (size_t)BLOCK * (DR + a.groups * (DN + DV));
  const u64 once = l2_evict_first();
  int stage = 0;
  u32 phase = 0;
  bool waited = false;

  for (int job = blockIdx.x; job < a.teams * row_groups; job += gridDim.x) {
    int4 work = a.team[job / row_groups];
    const int group0 = job % row_groups * NG;
    Part part;
    while (next_part(a, work, part)) {
      const int* table = a.block_table + (size_t)part.seq * a.max_blocks + part.first;
      int ids = 0, ids_next = lane < part.count ? table[lane] : 0;
      for (int i = 0; i < part.count; i++) {
        if (i % 32 == 0) {  // the table's next 32 entries are on their way before they are needed
          ids = ids_next;
          ids_next = i + 32 + lane < part.count ? table[i + 32 + lane] : 0;
        }
        const u16* src = a.cache + (size_t)__shfl_sync(0xffffffffu, ids, i % 32) * block_elems;
        // Only what this step appends is written by the launch before this one; all else can come at once.
        if (!waited && (part.first + i + 1) * BLOCK > part.len - SQ) {
          grid_wait();
          waited = true;
        }
        if (lane == 0) {
          const u32 dst = stages + stage * STAGE_BYTES, bar = full + stage * 8;
          mbar_wait(empty + stage * 8, phase ^ 1);
          mbar_arrive_expect(bar, STAGE_BYTES);
          const u16* kv = src + (size_t)BLOCK * (DR + group0 * (DN + DV));
          if (DR > 0 && row_groups > 1) bulk_load(dst, src, R_BYTES, bar);
          if (DR > 0 && row_groups == 1) bulk_load_hint(dst, src, R_BYTES, bar, once);
#pragma unroll
          for (int g = 0; g < NG; g++) {
            const u32 to = dst + R_BYTES + g * KV_BYTES;
            bulk_load_hint(to, kv + (size_t)g * BLOCK * (DN + DV), K_BYTES, bar, once);
            bulk_load_hint(to + K_BYTES, kv + (size_t)g * BLOCK * (DN + DV) + BLOCK * DN, V_BYTES, bar, once);
          }
        }
        __syncwarp();
        if (++stage == STAGES) stage = 0, phase ^= 1;
      }
    }
  }
}

// ---- the warps that compute ----

// A warp's running softmax over 16 rows; this lane has rows lane / 4 and lane / 4 + 8.
struct Softmax {
  float o[DV / 8][4];   // mma accumulators
  float top[2], sum[2]; // of base-2 logits; the sum is this lane's share until the end
};

struct Lane {
  int lane, group, tile, slice, row[2];
  u32 k_off, v_off;     // ldmatrix addresses within a tile's first panel, panel columns to be XORed in
};

DEVICE void load_queries(const GqaDecode& a, const Lane& w, int seq, int head0, u32 (&q)[DQ / 16][4]) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int row = w.row[i];
    const size_t at = ((size_t)seq * SQ + row / GS) * (a.groups * GS) + head0 + row % GS;
    const u32* src = (const u32*)(a.q + at * DQ) + w.lane % 4;
#pragma unroll
    for (int k = 0; k < DQ / 16; k++) {
      q[k][i] = row < ROWS ? src[k * 8] : 0;
      q[k][i + 2] = row < ROWS ? src[k * 8 + 4] : 0;
    }
  }
}

// STEP tokens of a tile, from token `from` of the block; `limit` is the first key
// of the block that a row must not see.
DEVICE void attend(const Lane& w, const u32 (&q)[DQ / 16][4], Softmax& s, u32 rope, u32 kv, int from, bool masked,
                   const int (&limit)[2], float scale2) {
  float x[CHAINS][STEP / 8][4];
#pragma unroll
  for (int c = 0; c < CHAINS; c++)
#pragma unroll
    for (int n = 0; n < STEP / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) x[c][n][i] = 0.f;

#pragma unroll
  for (int k = 0; k < DQ / 16; k++) {
    const u32 panel = k * 16 < DN ? kv + k / 4 * PANEL : rope + (k - DN / 16) / 4 * PANEL;
    const u32 at = panel + from * 128 + (w.k_off ^ (k % 4 * 32));
#pragma unroll
    for (int n = 0; n < STEP / 16; n++) {
      u32 b[4];
      ldmatrix4(b, at + n * 16 * 128);
      mma_bf16(x[k % CHAINS][2 * n], q[k], b[0], b[1]);
      mma_bf16(x[k % CHAINS][2 * n + 1], q[k], b[2], b[3]);
    }
  }
  float(&p)[STEP / 8][4] = x[0];
  if (CHAINS == 2) {
#pragma unroll
    for (int n = 0; n < STEP / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) p[n][i] += x[CHAINS - 1][n][i];
  }

  if (masked) {
#pragma unroll
    for (int n = 0; n < STEP / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (from + n * 8 + w.lane % 4 * 2 + i % 2 >= limit[i / 2]) p[n][i] = NEG_INF;
  }

  softmax_step(p, s.o, s.top, s.sum, scale2);

#pragma unroll
  for (int t = 0; t < STEP / 16; t++) {
    const u32 pa[4] = {pack_bf16(p[2 * t][0], p[2 * t][1]), pack_bf16(p[2 * t][2], p[2 * t][3]),
                       pack_bf16(p[2 * t + 1][0], p[2 * t + 1][1]), pack_bf16(p[2 * t + 1][2], p[2 * t + 1][3])};
#pragma unroll
    for (int d = 0; d < DV / 16; d++) {
      u32 b[4];
      ldmatrix4_trans(b, kv + K_BYTES + d / 4 * PANEL + (from + t * 16) * 128 + (w.v_off ^ (d % 4 * 32)));
      mma_bf16(s.o[2 * d], pa, b[0], b[1]);
      mma_bf16(s.o[2 * d + 1], pa, b[2], b[3]);
    }
  }
}

// Zeroes V's rows first..last of a tile: 0 x NaN would not be 0.
DEVICE void clear_values(unsigned char* v, int lane, int first, int last) {
  for (int i = lane; i < (last - first) * (DV / 8); i += 32) {
    const int row = first + i / (DV / 8), chunk = i % (DV / 8);
    *(uint4*)(v + chunk / 8 * PANEL + row * 128 + chunk % 8 * 16) = make_uint4(0, 0, 0, 0);
  }
}

// Adds up the slices of each row tile; slice 0 ends with the whole. `scratch` is a
// stage that every warp is done with once all have passed the first barrier.
DEVICE void add_slices(const Lane& w, Softmax& s, float4* scratch, float2 (&stats)[WARPS][16]) {
  const int tile = threadIdx.x / 32 / SLICES;
  if (w.lane % 4 == 0) {
#pragma unroll
    for (int r = 0; r < 2; r++) stats[threadIdx.x / 32][w.lane / 4 + 8 * r] = make_float2(s.top[r], s.sum[r]);
  }
  named_barrier(1, 32 * WARPS);
  float fade[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float2 each[SLICES];
    float top = NEG_INF, sum = 0.f;
#pragma unroll
    for (int i = 0; i < SLICES; i++) {
      each[i] = stats[tile * SLICES + i][w.lane / 4 + 8 * r];
      top = fmaxf(top, each[i].x);
    }
    const float base = top == NEG_INF ? 0.f : top;
#pragma unroll
    for (int i = 0; i < SLICES; i++) sum += each[i].y * exp2_fast(each[i].x - base);
    fade[r] = exp2_fast(s.top[r] - base);
    s.top[r] = top, s.sum[r] = sum;
  }
#pragma unroll
  for (int n = 0; n < DV / 8; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) s.o[n][i] *= fade[i / 2];

  constexpr int BUFFER = DV / 8 * 32;  // float4s of one warp's accumulators
#pragma unroll
  for (int half = SLICES / 2; half >= 1; half /= 2) {
    // The first writers use the readers' buffers, later ones their own, which only they have read.
    const int owner = w.slice < half ? (half == SLICES / 2 ? w.slice : w.slice + half)
                                     : (half == SLICES / 2 ? w.slice - half : w.slice);
    float4* buffer = scratch + (tile * (SLICES / 2) + owner) * BUFFER + w.lane;
    if (w.slice >= half && w.slice < 2 * half) {
#pragma unroll
      for (int n = 0; n < DV / 8; n++) buffer[n * 32] = make_float4(s.o[n][0], s.o[n][1], s.o[n][2], s.o[n][3]);
    }
    named_barrier(1, 32 * WARPS);
    if (w.slice < half) {
#pragma unroll
      for (int n = 0; n < DV / 8; n++) {
        const float4 x = buffer[n * 32];
        s.o[n][0] += x.x, s.o[n][1] += x.y, s.o[n][2] += x.z, s.o[n][3] += x.w;
      }
    }
  }
}

DEVICE void write_rows(const GqaDecode& a, const Lane& w, const Softmax& s, const Part& part, int team, int head0) {
  const int heads = a.groups * GS;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int row = w.row[r];
    if (row >= ROWS) continue;
    const float inv = s.sum[r] > 0.f ? 1.f / s.sum[r] : 0.f;
    const size_t in_seq = (size_t)(row / GS) * heads + head0 + row % GS;
    if (part.whole) {
      u16* to = a.out + ((size_t)part.seq * SQ * heads + in_seq) * DV + w.lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < DV / 8; n++)
        *(u32*)(to + n * 8) = pack_bf16(s.o[n][2 * r] * inv, s.o[n][2 * r + 1] * inv);
    } else {
      const size_t at = (size_t)(part.seq + team) * SQ * heads + in_seq;
      float* to = a.part_o + at * DV + w.lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < DV / 8; n++)
        *(float2*)(to + n * 8) = make_float2(s.o[n][2 * r] * inv, s.o[n][2 * r + 1] * inv);
      if (w.lane % 4 == 0) a.part_lse[at] = s.sum[r] > 0.f ? s.top[r] + log2_fast(s.sum[r]) : NEG_INF;
    }
  }
}

DEVICE void consume(const GqaDecode& a, unsigned char* stage_mem, u32 full, u32 empty, float2 (&stats)[WARPS][16]) {
  Lane w;
  const int warp = threadIdx.x / 32;
  w.lane = threadIdx.x % 32;
  w.slice = warp % SLICES;
  w.tile = warp / SLICES % RT;
  w.group = warp / (SLICES * RT);
  w.row[0] = w.tile * 16 + w.lane / 4;
  w.row[1] = w.row[0] + 8;
  // K: matrices are tokens 0-7 | 8-15 by columns 0-7 | 8-15; V (transposed): columns by tokens.
  w.k_off = (w.lane / 16 * 8 + w.lane % 8) * 128 + ((w.lane / 8 % 2) ^ (w.lane % 8)) * 16;
  w.v_off = (w.lane / 8 % 2 * 8 + w.lane % 8) * 128 + ((w.lane / 16) ^ (w.lane % 8)) * 16;

  const int row_groups = a.groups / NG;
  const float scale2 = a.scale * LOG2E;
  const u32 stages = smem_addr(stage_mem);
  grid_wait();
  int stage = 0;
  u32 phase = 0;

  for (int job = blockIdx.x; job < a.teams * row_groups; job += gridDim.x) {
    const int team = job / row_groups;
    const int head0 = (job % row_groups * NG + w.group) * GS;
    int4 work = a.team[team];
    Part part;
    while (next_part(a, work, part)) {
      u32 q[DQ / 16][4];
      load_queries(a, w, part.seq, head0, q);
      Softmax s;
#pragma unroll
      for (int n = 0; n < DV / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) s.o[n][i] = 0.f;
      s.top[0] = s.top[1] = NEG_INF;
      s.sum[0] = s.sum[1] = 0.f;

      for (int i = 0; i < part.count; i++) {
        const int valid = part.len - (part.first + i) * BLOCK;  // tokens from this block's start on
        const bool masked = valid - SQ + 1 < BLOCK;
        int limit[2];
#pragma unroll
        for (int r = 0; r < 2; r++) limit[r] = valid - SQ + 1 + w.row[r] / GS;
        const u32 rope = stages + stage * STAGE_BYTES, kv = rope + R_BYTES + w.group * KV_BYTES;
        mbar_wait(full + stage * 8, phase);
        if (valid < BLOCK) {  // the sequence's last block
          const int first = max(valid, w.slice * SLICE), last = (w.slice + 1) * SLICE;
          if (w.tile == 0 && first < last)
            clear_values(stage_mem + stage * STAGE_BYTES + R_BYTES + w.group * KV_BYTES + K_BYTES, w.lane, first, last);
          fence_proxy_async();
          if (RT > 1) named_barrier(1, 32 * WARPS);  // the row tiles share V
          else __syncwarp();
        }
#pragma unroll 1
        for (int from = w.slice * SLICE; from < (w.slice + 1) * SLICE; from += STEP)
          if (from < valid) attend(w, q, s, rope, kv, from, masked, limit, scale2);
        if (SLICES > 1 && i == part.count - 1) break;  // the last tile's stage is needed below
        __syncwarp();
        if (w.lane == 0) mbar_arrive(empty + stage * 8);
        if (++stage == STAGES) stage = 0, phase ^= 1;
      }

#pragma unroll
      for (int r = 0; r < 2; r++) {
        s.sum[r] += __shfl_xor_sync(0xffffffffu, s.sum[r], 1);
        s.sum[r] += __shfl_xor_sync(0xffffffffu, s.sum[r], 2);
      }
      if (SLICES > 1) {
        add_slices(w, s, (float4*)(stage_mem + stage * STAGE_BYTES), stats);
        fence_proxy_async();
        __syncwarp();
        if (w.lane == 0) mbar_arrive(empty + stage * 8);
        if (++stage == STAGES) stage = 0, phase ^= 1;
      }
      if (w.slice == 0) write_rows(a, w, s, part, team, head0);
    }
  }
}

// For the host: block, dynamic shared memory, groups a CTA.
extern "C" __device__ const int gqa_decode_launch[3] = {GQA_THREADS, GQA_SMEM, NG};

extern "C" __global__ void __launch_bounds__(GQA_THREADS, 1) gqa_decode(const GqaDecode a) {
  extern __shared__ __align__(1024) unsigned char dynamic[];
  __shared__ u64 bars[2 * STAGES];
  __shared__ float2 stats[WARPS][16];
  unsigned char* stage_mem = dynamic + ((1024 - smem_addr(dynamic) % 1024) % 1024);
  const u32 full = smem_addr(bars), empty = full + STAGES * 8;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      mbar_init(full + i * 8, 1);
      mbar_init(empty + i * 8, WARPS);
    }
    mbar_init_fence();
  }
  __syncthreads();
  grid_launch_dependents();

  if (threadIdx.x / 32 >= WARPS) {
    if (SHIFT_REGISTERS) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x / 32 == WARPS) produce(a, smem_addr(stage_mem), full, empty);
  } else {
    if (SHIFT_REGISTERS) asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    consume(a, stage_mem, full, empty, stats);
  }
}
