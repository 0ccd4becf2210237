// Decode attention over grouped cache blocks, Hopper: limited by memory alone.
//
// A CTA walks its team's run of cache blocks (split_plan) for one row group: NG
// neighbouring KV groups of the rank. One warp keeps STAGES whole tiles in
// flight with the bulk copy engine, one mends the tiles where a sequence ends, and
// the others multiply with mma.sync. The query rows of a group (GS heads x SQ
// positions) fill RT tiles of 16 rows, so K and V are read once whatever SQ is. A
// warp owns one row tile and every SLICES-th part of a block's tokens, with its own
// running maximum and sum: the warps meet only when a sequence's part ends, to add
// up their slices.
//
// The split and the step's tables are older than the launch that this one may overlap
// with (the host launches it serially after split_plan), and so are all tiles but those
// that hold the step's own tokens: they are asked for before that launch has ended.
// With APPEND this launch rotates and appends too, as rope_append_grouped.cu does: then
// all tiles are older, and the step's tokens are put into them here.
//
// The rope key tile is common to all groups. The CTAs of a team read it at about
// the same time, and L2 keeps it longer than K and V, which nobody reads twice.
//
// -D DN, DR (0: no rope key), DV: multiples of 64; GS heads a group; SQ 1..4;
//    NG groups a CTA, dividing the rank's groups; APPEND, with INTERLEAVE as in
//    rope_append_grouped.cu.
// grid: number of multiprocessors; block: GQA_THREADS;
// dynamic shared memory: GQA_SMEM.

#ifndef NG
#define NG 1
#endif
#ifndef APPEND
#define APPEND 0
#define INTERLEAVE 0
#endif

struct GqaDecode {
  const u16* q;            // row r at q + r * q_stride: [local_heads, DN + DR], to be turned where APPEND
  u16* cache;              // [num_blocks] of { rope key BLOCK x DR, local_groups x { K BLOCK x DN, V BLOCK x DV } }
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
  // So far as gqa_decode_portable.cu has it.
  const u16* kv;           // APPEND: row r at kv + r * kv_stride: [local_groups, DN + DV]; rows lie at 16 bytes
  const u16* k_rope;       // APPEND: row r at k_rope + r * k_rope_stride: [DR]; the same
  const float* cos_table;  // APPEND: [positions, TURN / 2]
  const float* sin_table;  // APPEND: [positions, TURN / 2]
  int q_stride, kv_stride, k_rope_stride;  // elements
};

constexpr int DQ = DN + DR;
constexpr int TURN = DR > 0 ? DR : DN;          // columns of a query that turn: the last ones
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
// the loading and the mending warp come with two idle ones, and the four give theirs away.
constexpr bool SHIFT_REGISTERS = WARPS == 8;
constexpr int GQA_THREADS = 32 * (WARPS + (SHIFT_REGISTERS ? 4 : 2));
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

// A sequence's first block that is not as the copy engine finds it: the mending warp has it before it is full.
DEVICE int first_mended(int len) { return (APPEND ? len - SQ : len) / BLOCK; }

// ---- the warp that loads ----

DEVICE void produce(const GqaDecode& a, u32 stages, u32 full, u32 empty, u32 landed) {
  const int lane = threadIdx.x % 32;
  const int row_groups = a.groups / NG;
  const size_t block_elems = (size_t)BLOCK * (DR + a.groups * (DN + DV));
  const u64 once = l2_evict_first();
  int stage = 0, mended = 0;
  u32 phase = 0;
  bool waited = APPEND;

  for (int job = blockIdx.x; job < a.teams * row_groups; job += gridDim.x) {
    int4 work = a.team[job / row_groups];
    const int group0 = job % row_groups * NG;
    Part part;
    while (next_part(a, work, part)) {
      const int* table = a.block_table + (size_t)part.seq * a.max_blocks + part.first;
      int ids = 0, ids_next = lane < part.count ? table[lane] : 0;
      if (APPEND) {  // the angles of the queries, while there is time
        const size_t at = (size_t)(part.len - SQ) * (TURN / 2);
        if (lane < SQ * TURN / 64) {
          prefetch_l2(a.cos_table + at + lane * 32);
          prefetch_l2(a.sin_table + at + lane * 32);
        }
      }
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
        const bool mend = part.first + i >= first_mended(part.len);
        if (lane == 0) {
          const u32 dst = stages + stage * STAGE_BYTES;
          const u32 bar = mend ? landed + mended % STAGES * 8 : full + stage * 8;
          mbar_wait(empty + stage * 8, phase ^ 1);
          mbar_arrive_expect(bar, STAGE_BYTES);
          if (!mend) mbar_arrive_for(bar, 31);  // as many as the mending warp has lanes
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
        mended += mend;
        if (++stage == STAGES) stage = 0, phase ^= 1;
      }
    }
  }
}

// ---- the warp that mends ----

// A new token's values for this CTA, as a stage and a block of the cache have them: the rope key, then K and V of
// NG groups. The functions below are about the eight from value `at` on.
constexpr int TOKEN_VALUES = DR + NG * (DN + DV);
constexpr int LANE_VALUES = (TOKEN_VALUES * SQ / 8 + 31) / 32;
constexpr int HELD = SHIFT_REGISTERS ? 1 : LANE_VALUES < 4 ? LANE_VALUES : 4;  // eights a lane asks for at once

// Their place in a stage, in elements.
DEVICE int place(int at, int slot) {
  if (at < DR) return tile_index<DR>(slot, at);
  const int group = (at - DR) / (DN + DV), col = (at - DR) % (DN + DV);
  const int tile = BLOCK * (DR + group * (DN + DV));
  return tile + (col < DN ? tile_index<DN>(slot, col) : BLOCK * DN + tile_index<DV>(slot, col - DN));
}

// What rope_append_grouped.cu writes of row `row`.
DEVICE uint4 new_values(const GqaDecode& a, int row, int position, int group0, int at) {
  const float* cs = a.cos_table + (size_t)position * (TURN / 2);
  const float* sn = a.sin_table + (size_t)position * (TURN / 2);
  float v[8];
  if (at < DR) {
    rope_turn<TURN, 8, INTERLEAVE>(a.k_rope + (size_t)row * a.k_rope_stride, at, cs, sn, v);
  } else {
    const u16* src = a.kv + (size_t)row * a.kv_stride + group0 * (DN + DV) + at - DR;
    const int col = (at - DR) % (DN + DV);
    if (DR > 0 || col >= DN) return *(const uint4*)src;
    rope_turn<TURN, 8, INTERLEAVE>(src - col, col, cs, sn, v);
  }
  return make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
}

// Puts the step's own tokens into their slots, there and in the cache for later steps, and zeroes V's rows after a
// sequence's end as far as they are multiplied: 0 x NaN would not be 0.
DEVICE void mend(const GqaDecode& a, unsigned char* stage_mem, u32 full, u32 landed) {
  const int lane = threadIdx.x % 32;
  const int row_groups = a.groups / NG;
  const size_t block_elems = (size_t)BLOCK * (DR + a.groups * (DN + DV));
  int seen = 0, mended = 0;  // blocks
  if (APPEND) grid_wait();

  for (int job = blockIdx.x; job < a.teams * row_groups; job += gridDim.x) {
    int4 work = a.team[job / row_groups];
    const int group0 = job % row_groups * NG;
    Part part;
    while (next_part(a, work, part)) {
      for (int i = max(0, first_mended(part.len) - part.first); i < part.count; i++, mended++) {
        const int stage = (seen + i) % STAGES, begin = (part.first + i) * BLOCK, valid = part.len - begin;
        const u32 bar = landed + mended % STAGES * 8, phase = mended / STAGES & 1;
        unsigned char* tile = stage_mem + stage * STAGE_BYTES;
        if (APPEND) {
          const int first = max(begin, part.len - SQ), count = min(begin + BLOCK, part.len) - first;
          u16* block = a.cache + a.block_table[(size_t)part.seq * a.max_blocks + part.first + i] * block_elems;
          for (int from = 0; from < count * (TOKEN_VALUES / 8); from += 32 * HELD) {
            uint4 v[HELD];
#pragma unroll
            for (int j = 0; j < HELD; j++) {
              const int chunk = from + j * 32 + lane, token = first + chunk / (TOKEN_VALUES / 8);
              if (token < first + count)
                v[j] = new_values(a, part.seq * SQ + token - (part.len - SQ), token, group0, chunk % (TOKEN_VALUES / 8) * 8);
            }
            if (from == 0) mbar_wait(bar, phase);
#pragma unroll
            for (int j = 0; j < HELD; j++) {
              const int chunk = from + j * 32 + lane, token = first + chunk / (TOKEN_VALUES / 8);
              if (token >= first + count) continue;
              const int at = chunk % (TOKEN_VALUES / 8) * 8, to = place(at, token % BLOCK);
              *(uint4*)(tile + to * 2) = v[j];
              if (at >= DR) *(uint4*)(block + (size_t)BLOCK * group0 * (DN + DV) + to) = v[j];
              else if (group0 == 0) *(uint4*)(block + to) = v[j];
            }
          }
        } else {
          mbar_wait(bar, phase);
        }
        const int clear = (valid < BLOCK ? ceil_div(valid, STEP) * STEP - valid : 0) * (DV / 8);
#pragma unroll
        for (int g = 0; g < NG; g++)
          for (int j = lane; j < clear; j += 32)
            *(uint4*)(tile + place(DR + g * (DN + DV) + DN + j % (DV / 8) * 8, valid + j / (DV / 8)) * 2) = make_uint4(0, 0, 0, 0);
        fence_proxy_async();
        mbar_arrive(full + stage * 8);
      }
      seen += part.count;
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

// (x, y) turned by the angle with cosine c and sine s.
DEVICE void turn(float& x, float& y, float c, float s) {
  const float x0 = x;
  x = x * c + -y * s;
  y = y * c + x0 * s;
}

// Turns a lane's share of its rows by the angles from `cs` and `sn` on, of the sequence's first row.
DEVICE void turn_queries(const Lane& w, const float* cs, const float* sn, u32 (&q)[DQ / 16][4]) {
  constexpr int FIRST = (DQ - TURN) / 16, HALF = TURN / 32;  // in mma's steps of 16 columns
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int row = SQ > 1 ? min(w.row[i % 2], ROWS - 1) / GS : 0, col = i / 2 * 8 + w.lane % 4 * 2;
#pragma unroll
    for (int k = 0; k < (INTERLEAVE ? 2 * HALF : HALF); k++) {
      const int at = row * (TURN / 2) + (k * 16 + col) / (INTERLEAVE ? 2 : 1);
      u32 &x = q[FIRST + k][i], &y = q[FIRST + k + (INTERLEAVE ? 0 : HALF)][i];
      if (INTERLEAVE) {
        float lo = bf16_lo(x), hi = bf16_hi(x);
        turn(lo, hi, cs[at], sn[at]);
        x = pack_bf16(lo, hi);
      } else {
        const float2 c = *(const float2*)(cs + at), s = *(const float2*)(sn + at);
        float x0 = bf16_lo(x), x1 = bf16_hi(x), y0 = bf16_lo(y), y1 = bf16_hi(y);
        turn(x0, y0, c.x, s.x);
        turn(x1, y1, c.y, s.y);
        x = pack_bf16(x0, x1), y = pack_bf16(y0, y1);
      }
    }
  }
}

DEVICE void load_queries(const GqaDecode& a, const Lane& w, int seq, int head0, u32 (&q)[DQ / 16][4]) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int row = w.row[i];
    const u16* head = a.q + ((size_t)seq * SQ + row / GS) * a.q_stride + (head0 + row % GS) * DQ;
    const u32* src = (const u32*)head + w.lane % 4;
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
  int stage = 0;
  u32 phase = 0;
  bool waited = false;

  for (int job = blockIdx.x; job < a.teams * row_groups; job += gridDim.x) {
    const int team = job / row_groups;
    const int head0 = (job % row_groups * NG + w.group) * GS;
    int4 work = a.team[team];
    Part part;
    while (next_part(a, work, part)) {
      if (!waited) grid_wait();
      waited = true;
      u32 q[DQ / 16][4];
      load_queries(a, w, part.seq, head0, q);
      if (APPEND) {
        const size_t at = (size_t)(part.len - SQ) * (TURN / 2);
        turn_queries(w, a.cos_table + at, a.sin_table + at, q);
      }
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
  if (!waited) grid_wait();
}

// For the host: block, dynamic shared memory, groups a CTA.
extern "C" __device__ const int gqa_decode_launch[3] = {GQA_THREADS, GQA_SMEM, NG};

extern "C" __global__ void __launch_bounds__(GQA_THREADS, 1) gqa_decode(const GqaDecode a) {
  extern __shared__ __align__(1024) unsigned char dynamic[];
  __shared__ u64 bars[3 * STAGES];
  __shared__ float2 stats[WARPS][16];
  unsigned char* stage_mem = dynamic + ((1024 - smem_addr(dynamic) % 1024) % 1024);
  const u32 full = smem_addr(bars), empty = full + STAGES * 8, landed = empty + STAGES * 8;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      mbar_init(full + i * 8, 32);
      mbar_init(empty + i * 8, WARPS);
      mbar_init(landed + i * 8, 1);
    }
    mbar_init_fence();
  }
  __syncthreads();
  grid_launch_dependents();

  if (threadIdx.x / 32 >= WARPS) {
    if (SHIFT_REGISTERS) asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
    if (threadIdx.x / 32 == WARPS) produce(a, smem_addr(stage_mem), full, empty, landed);
    if (threadIdx.x / 32 == WARPS + 1) mend(a, stage_mem, full, landed);
  } else {
    if (SHIFT_REGISTERS) asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
    consume(a, stage_mem, full, empty, stats);
  }
}
