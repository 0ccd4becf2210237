// The end of a decode step's latent attention, Hopper: joins the partial results of
// split sequences as combine.cu does, and takes them through W_UV as absorb_output
// does, without a launch between.
//
// A cluster of SPLIT CTAs has a tile of (row, head of the group) pairs. Each joins its
// share of the latent's columns and hands it to all; each then computes its share of
// the output's columns from the whole latent.
//
// -D SQ, DN, DV (a multiple of 64); the latent is DC = 512 wide
//    SPLIT  CTAs of a cluster: 8 for few pairs, 4 for many
// grid (SPLIT, ceil(rows * most / tile), groups); block 512; dynamic shared memory
// COMBINE_OUTPUT_SMEM; most = min(heads, heads_per_group)

#define DC 512

struct CombineOutput {
  const u16* kv_up;       // [groups, DN + DV, DC]: a group's W_UK [DN, DC], then its W_UV [DV, DC]
  const float* part_o;    // [batch + teams, SQ, heads, DC], each normalised
  const float* part_lse;  // [batch + teams, SQ, heads], base 2
  const int2* seq;        // [batch] {first partial result, number of them}
  const u16* whole;       // [batch * SQ, heads, DC], of sequences with one partial result
  u16* out;               // [batch * SQ, heads, DV]
  int rows;               // batch * SQ
  int heads;                // on this rank
  int heads_per_group;      // in the whole model
  int first_head_in_group;  // heads of the first group that other ranks have
  int tile;                 // pairs of a cluster, at most 16
};

constexpr int SHARE = DC / SPLIT;         // latent columns that a CTA joins
constexpr int THREADS_PAIR = SHARE / 4;   // threads that have those of a pair, 4 each
constexpr int SLICE = DV / SPLIT;         // output columns of a CTA
constexpr int N_TILES = SLICE / 8;        // in tiles of 8
constexpr int K_WARPS = 16 / N_TILES;     // warps that share the reduction of one
constexpr int ROW = DC + 8;               // elements; the 8 keep ldmatrix off equal banks
constexpr int X_BYTES = 16 * ROW * 2, W_BYTES = SLICE * ROW * 2;
constexpr int SUM_BYTES = 512 * 24;       // each thread's sum of parts; later the tile's sums, 8 KiB
constexpr int COMBINE_OUTPUT_SMEM = X_BYTES + W_BYTES + SUM_BYTES;

// The running sum of a pair's partial results, over four columns.
struct Joined {
  float top, sum, v[4];
};
static_assert(K_WARPS * 16 * SLICE * 4 <= SUM_BYTES && sizeof(Joined) == 24, "one room for both sums");
static_assert((SPLIT == 4 || SPLIT == 8) && DV % 64 == 0 && 16 % N_TILES == 0, "tiles of 8 columns for every warp");

// Thread `lane` of `lanes` adds up its partial results of a pair: first, first + stride, .. (n of them).
DEVICE Joined join_parts(const float* part_o, const float* part_lse, size_t first, size_t stride, int n, int lane,
                         int lanes) {
  constexpr int AT_ONCE = SPLIT == 4 ? 4 : 6;  // many pairs have few parts each
  Joined j = {NEG_INF, 0.f, {0.f, 0.f, 0.f, 0.f}};
  for (int s0 = lane; s0 < n; s0 += AT_ONCE * lanes) {
    float4 x[AT_ONCE];
    float lse[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      const int s = s0 + i * lanes;
      lse[i] = NEG_INF, x[i] = make_float4(0.f, 0.f, 0.f, 0.f);
      if (s < n) {
        const size_t at = first + s * stride;
        lse[i] = part_lse[at];
        x[i] = *(const float4*)(part_o + at * DC);
      }
    }
    float up = j.top;
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) up = fmaxf(up, lse[i]);
    if (up == NEG_INF) continue;
    const float old = exp2_fast(j.top - up);
    j.top = up, j.sum *= old;
#pragma unroll
    for (int k = 0; k < 4; k++) j.v[k] *= old;
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      const float w = exp2_fast(lse[i] - up);
      j.sum += w, j.v[0] += w * x[i].x, j.v[1] += w * x[i].y, j.v[2] += w * x[i].z, j.v[3] += w * x[i].w;
    }
  }
  return j;
}

// The sums of a pair's `lanes` threads, THREADS_PAIR apart.
DEVICE Joined add_lanes(const Joined* of, int lanes) {
  Joined j = {NEG_INF, 0.f, {0.f, 0.f, 0.f, 0.f}};
#pragma unroll 4
  for (int i = 0; i < lanes; i++) j.top = fmaxf(j.top, of[THREADS_PAIR * i].top);
  if (j.top == NEG_INF) return j;
#pragma unroll 4
  for (int i = 0; i < lanes; i++) {
    const float w = exp2_fast(of[THREADS_PAIR * i].top - j.top);
    j.sum += w * of[THREADS_PAIR * i].sum;
#pragma unroll
    for (int k = 0; k < 4; k++) j.v[k] += w * of[THREADS_PAIR * i].v[k];
  }
  return j;
}

extern "C" __global__ void __cluster_dims__(SPLIT, 1, 1) __launch_bounds__(512, 2)
    combine_output(const CombineOutput a) {
  extern __shared__ __align__(16) u8 combine_shared[];
  u16* const xs = (u16*)combine_shared;                              // [16][ROW]
  u16* const ws = (u16*)(combine_shared + X_BYTES);                  // [SLICE][ROW]
  float* const sums = (float*)(combine_shared + X_BYTES + W_BYTES);  // [K_WARPS][16][SLICE]
  Joined* const joined = (Joined*)sums;                              // [512]
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  const int share = blockIdx.x, group = blockIdx.z;
  const int first = max(0, group * a.heads_per_group - a.first_head_in_group);
  const int last = min(a.heads, (group + 1) * a.heads_per_group - a.first_head_in_group);
  const int mine = last - first, m0 = blockIdx.y * a.tile, pairs = min(a.tile, a.rows * mine - m0);
  grid_launch_dependents();
  if (mine <= 0 || pairs <= 0) return;  // all of a cluster alike

  // Weights do not depend on the launch before this one, so they are asked for first.
  const u16* w = a.kv_up + ((size_t)group * (DN + DV) + DN + share * SLICE) * DC;
#pragma unroll
  for (int i = 0; i < SLICE / 8; i++) {
    const int at = i * 512 + tid, r = at / 64, c = at % 64 * 8;
    cp_async16(smem_addr(ws + r * ROW + c), w + (size_t)r * DC + c, 16);
  }
  cp_async_commit();
  cluster_arrive();

  // `lanes` times THREADS_PAIR threads share a pair's parts.
  const int lanes = (a.tile > 8 ? 1 : a.tile > 4 ? 2 : a.tile > 2 ? 4 : 8) * (SPLIT / 4);
  const int p = tid / THREADS_PAIR / lanes, in_pair = tid / THREADS_PAIR % lanes;
  const int col = share * SHARE + tid % THREADS_PAIR * 4;
  const bool live = p < pairs;
  const int row = live ? (m0 + p) / mine : 0, head = first + (live ? (m0 + p) % mine : 0);
  const int2 seq = a.seq[row / SQ];  // the plan is older than the launch this one may overlap with
  const int parts = live ? seq.y : 0;
  grid_wait();
  const size_t from = ((size_t)seq.x * SQ + row % SQ) * a.heads + head;
  Joined j = join_parts(a.part_o + col, a.part_lse, from, (size_t)SQ * a.heads, parts > 1 ? parts : 0, in_pair, lanes);
  u32 x = 0, y = 0;
  if (parts == 1) {
    const uint2 whole = *(const uint2*)(a.whole + ((size_t)row * a.heads + head) * DC + col);
    x = whole.x, y = whole.y;
  }
  if (lanes > 1) {
    joined[tid] = j;
    __syncthreads();
    if (in_pair == 0 && parts > 1) j = add_lanes(joined + tid, min(lanes, parts));
  }
  if (parts > 1) {
    const float inv = j.sum > 0.f ? 1.f / j.sum : 0.f;
    x = pack_bf16(j.v[0] * inv, j.v[1] * inv), y = pack_bf16(j.v[2] * inv, j.v[3] * inv);
  }
  cluster_wait();  // all are there to be written to
  if (live && in_pair == 0) {
    const u32 to = smem_addr(xs + p * ROW + col);
#pragma unroll
    for (int r = 0; r < SPLIT; r++) cluster_store(cluster_addr(to, r), x, y);
  }
  cp_async_wait<0>();
  cluster_arrive();
  cluster_wait();

  // Rows past the last pair are whatever lay there: they are rows of their own, and not written.
  const int n0 = warp % N_TILES * 8, k0 = warp / N_TILES * (DC / K_WARPS);
  float acc[2][4] = {{0.f, 0.f, 0.f, 0.f}, {0.f, 0.f, 0.f, 0.f}};  // even and odd steps
#pragma unroll
  for (int k = k0; k < k0 + DC / K_WARPS; k += 32) {
    u32 b[4], f[4];
    const u32 at = smem_addr(xs + lane % 16 * ROW + k + lane / 16 * 8);
    ldmatrix4(b, smem_addr(ws + (n0 + lane % 8) * ROW + k + lane / 8 * 8));
    ldmatrix4(f, at);
    mma_bf16(acc[0], f, b[0], b[1]);
    ldmatrix4(f, at + 32);
    mma_bf16(acc[1], f, b[2], b[3]);
  }
  float* const own = sums + warp / N_TILES * (16 * SLICE) + n0 + lane % 4 * 2;
#pragma unroll
  for (int h = 0; h < 2; h++)
    *(float2*)(own + (h * 8 + lane / 4) * SLICE) =
        make_float2(acc[0][2 * h] + acc[1][2 * h], acc[0][2 * h + 1] + acc[1][2 * h + 1]);
  __syncthreads();
  for (int i = tid; i < pairs * (SLICE / 2); i += 512) {
    const int p = i / (SLICE / 2), c = i % (SLICE / 2) * 2, pair = m0 + p;
    float x = 0.f, y = 0.f;
#pragma unroll
    for (int k = 0; k < K_WARPS; k++) {
      const float2 s = *(const float2*)(sums + (k * 16 + p) * SLICE + c);
      x += s.x, y += s.y;
    }
    const size_t at = (size_t)(pair / mine) * a.heads + first + pair % mine;
    *(u32*)(a.out + at * DV + share * SLICE + c) = pack_bf16(x, y);
  }
}
