// The router of a mixture of experts, one launch: logits in f32, then the choice, then
// the plan of the experts' products: (row, chosen expert) pairs sorted by expert and
// cut into segments. Eight CTAs share four rows: on Hopper they are a cluster, whose
// first CTA gets the logits through distributed shared memory and chooses; elsewhere
// the CTA that arrives last does. Of those that chose, the last one plans.
//
// -D EXPERTS (at most 512), TOP_K (at most 32), GROUPS (at most 32; 1 where choice is not limited),
//    TOP_GROUPS, HIDDEN, SCORING 0 sigmoid with bias, a group scored by its two best (noaux_tc)
//                               1 softmax, the best of all
//                               2 softmax, a group scored by its best
//    NORMALISE 1: the chosen weights are divided by their sum
//    SHARED 1: every row has one more expert, number EXPERTS
//    TOKENS rows a segment
// route: grid (8, ceil(rows / 4)); block 256
// Ties go to the lower index. `scale` multiplies the weights in the end.

struct Route {
  const u16* x;       // [rows, HIDDEN]
  const u16* gate;    // [EXPERTS, HIDDEN]
  const float* bias;  // [EXPERTS] added for the choice alone (SCORING 0), or null
  float* logits;      // [rows, EXPERTS] workspace where there are no clusters
  int* ids;           // [rows, TOP_K]
  float* weights;     // [rows, TOP_K]
  const int* row_seq; // [rows] negative for padding, whose ids become -1; or null
  int* arrived;       // [1 + ceil(rows / 4)] zero before and after
  int* count;         // [2] segments of routed experts, and of the shared one
  int4* segments;     // [EXPERTS + 2 + rows * SLOTS / TOKENS] {expert, first position, rows, 0}
  int* order;         // [rows * SLOTS] pair at each position; pair = row * SLOTS + k
  int rows;
  float scale;
};

constexpr int SLOTS = TOP_K + SHARED;
constexpr int ROUTE_ROWS = 4;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define CLUSTERS 1
#else
#define CLUSTERS 0
#endif

DEVICE float dot8(uint4 a, uint4 b) {
  float s = bf16_lo(a.x) * bf16_lo(b.x) + bf16_hi(a.x) * bf16_hi(b.x);
  s += bf16_lo(a.y) * bf16_lo(b.y) + bf16_hi(a.y) * bf16_hi(b.y);
  s += bf16_lo(a.z) * bf16_lo(b.z) + bf16_hi(a.z) * bf16_hi(b.z);
  return s + bf16_lo(a.w) * bf16_lo(b.w) + bf16_hi(a.w) * bf16_hi(b.w);
}

constexpr int CHUNK = 8;                  // 16-byte loads of a gate row a lane has under way
constexpr int CHUNK_COLUMNS = CHUNK * 256;

// A warp's part of one expert's gate row, zeros past its end.
DEVICE void load_gate(const u16* gate, int base, int lane, uint4 (&g)[CHUNK]) {
#pragma unroll
  for (int i = 0; i < CHUNK; i++) {
    const int col = base + (i * 32 + lane) * 8;
    g[i] = col < HIDDEN ? *(const uint4*)(gate + col) : make_uint4(0, 0, 0, 0);
  }
}

// Adds the products with `Rows` rows from `first` on; rows past the last are counted as the last.
template <int Rows>
DEVICE void add_rows(const Route& a, int first, int base, int lane, const uint4 (&g)[CHUNK], float (&sum)[Rows]) {
#pragma unroll
  for (int r = 0; r < Rows; r++) {
    const u16* x = a.x + (size_t)min(first + r, a.rows - 1) * HIDDEN;
#pragma unroll
    for (int i = 0; i < CHUNK; i++) {
      const int col = base + (i * 32 + lane) * 8;
      if (base + i * 256 < HIDDEN) sum[r] += dot8(g[i], *(const uint4*)(x + (col < HIDDEN ? col : 0)));
    }
  }
}

// A logit of row first + r to where the choice is made: room [ROUTE_ROWS, EXPERTS] of the cluster's first CTA.
__shared__ float room[ROUTE_ROWS][EXPERTS];
__shared__ int chosen[ROUTE_ROWS * TOP_K];  // this CTA's ids
DEVICE void keep_logit(const Route& a, int first, int r, int expert, float value) {
#if CLUSTERS
  const u32 there = cluster_addr(smem_addr(&room[r][expert]), 0);
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(there), "f"(value) : "memory");
#else
  a.logits[(size_t)(first + r) * EXPERTS + expert] = value;
#endif
}

// One expert's logits of `Rows` rows, `g` being the gate's first chunk.
template <int Rows>
DEVICE void expert_logits(const Route& a, int expert, int first, int lane, const uint4 (&g)[CHUNK]) {
  float sum[Rows];
#pragma unroll
  for (int r = 0; r < Rows; r++) sum[r] = 0.f;
  add_rows<Rows>(a, first, 0, lane, g, sum);
  for (int base = CHUNK_COLUMNS; base < HIDDEN; base += CHUNK_COLUMNS) {
    uint4 next[CHUNK];
    load_gate(a.gate + (size_t)expert * HIDDEN, base, lane, next);
    add_rows<Rows>(a, first, base, lane, next, sum);
  }
#pragma unroll
  for (int r = 0; r < Rows; r++) {
    sum[r] = warp_sum(sum[r]);
    if (lane == 0 && first + r < a.rows) keep_logit(a, first, r, expert, sum[r]);
  }
}

// A warp computes some experts' logits of the CTA's rows.
DEVICE void route_logits(const Route& a, int expert, int lane) {
  const int first = blockIdx.y * ROUTE_ROWS, last = min(first + ROUTE_ROWS, a.rows);
  if (HIDDEN % 8 == 0) {
    // The gate's first part is on its way before x is known.
    uint4 g[CHUNK];
    load_gate(a.gate + (size_t)min(expert, EXPERTS - 1) * HIDDEN, 0, lane, g);
    grid_wait();
    for (; expert < EXPERTS; expert += 64) {
      if (last - first == 1) expert_logits<1>(a, expert, first, lane, g);
      else expert_logits<ROUTE_ROWS>(a, expert, first, lane, g);
      if (EXPERTS > 64 && expert + 64 < EXPERTS) load_gate(a.gate + (size_t)(expert + 64) * HIDDEN, 0, lane, g);
    }
  } else {
    grid_wait();
    for (; expert < EXPERTS; expert += 64)
      for (int r = first; r < last; r++) {
        float sum = 0.f;
        for (int col = lane; col < HIDDEN; col += 32)
          sum += bf16_to_f32(a.gate[(size_t)expert * HIDDEN + col]) * bf16_to_f32(a.x[(size_t)r * HIDDEN + col]);
        sum = warp_sum(sum);
        if (lane == 0) keep_logit(a, first, r - first, expert, sum);
      }
  }
}

constexpr int PER = (EXPERTS + 31) / 32;
constexpr int GROUP = EXPERTS / GROUPS;

// The best of the warp's values and its index, ties to the lower.
DEVICE void warp_best(float& value, int& index) {
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) {
    const float v = __shfl_xor_sync(0xffffffffu, value, o);
    const int i = __shfl_xor_sync(0xffffffffu, index, o);
    if (v > value || (v == value && i < index)) value = v, index = i;
  }
}

// What a choice needs beside the logits, asked for before they are there.
struct Known {
  float bias[PER];  // of the lane's experts
  bool padding;
  DEVICE_MEMBER Known(const Route& a, int row, int lane) {
    padding = a.row_seq && row < a.rows && a.row_seq[row] < 0;
#pragma unroll
    for (int i = 0; i < PER; i++)
      bias[i] = SCORING == 0 && a.bias && i * 32 + lane < EXPERTS ? a.bias[i * 32 + lane] : 0.f;
  }
};

// A warp chooses for one row; lane l has experts l, l + 32, ... `all`: its logits [EXPERTS], and then room to work in.
DEVICE void route_choose(const Route& a, const Known& known, int row, int lane, float* all) {
  float score[PER], choice[PER];
#pragma unroll
  for (int i = 0; i < PER; i++) {
    const int e = i * 32 + lane;
    choice[i] = known.bias[i];
    score[i] = e < EXPERTS ? (CLUSTERS ? all[e] : load_fresh(a.logits + (size_t)row * EXPERTS + e)) : NEG_INF;
  }
  if (SCORING == 0) {
#pragma unroll
    for (int i = 0; i < PER; i++) {
      score[i] = 1.f / (1.f + expf(-score[i]));
      choice[i] += score[i];
    }
  } else {
    float top = NEG_INF, sum = 0.f;
#pragma unroll
    for (int i = 0; i < PER; i++) top = fmaxf(top, score[i]);
    top = warp_max(top);
#pragma unroll
    for (int i = 0; i < PER; i++) {
      score[i] = expf(score[i] - top);
      sum += score[i];
    }
    sum = warp_sum(sum);
#pragma unroll
    for (int i = 0; i < PER; i++) choice[i] = score[i] = score[i] / sum;
  }
#pragma unroll
  for (int i = 0; i < PER; i++)
    if (i * 32 + lane >= EXPERTS) choice[i] = NEG_INF;

  if (SCORING != 1 && GROUPS > 1 && TOP_GROUPS < GROUPS) {
#pragma unroll
    for (int i = 0; i < PER; i++)
      if (i * 32 + lane < EXPERTS) all[i * 32 + lane] = choice[i];
    __syncwarp();
    float group = NEG_INF;
    if (lane < GROUPS) {
      float first = NEG_INF, second = NEG_INF;
      for (int i = 0; i < GROUP; i++) {
        const float v = all[lane * GROUP + i];
        second = fmaxf(second, fminf(first, v));
        first = fmaxf(first, v);
      }
      group = SCORING == 0 ? first + second : first;
    }
    u32 kept = 0;
    for (int k = 0; k < TOP_GROUPS; k++) {
      const bool out = lane >= GROUPS || (kept >> lane & 1);
      float v = out ? NEG_INF : group;
      int i = out ? 32 + lane : lane;
      warp_best(v, i);
      kept |= 1u << (i & 31);
    }
#pragma unroll
    for (int i = 0; i < PER; i++) {
      const int e = i * 32 + lane;
      if (e < EXPERTS && !(kept >> (e / GROUP) & 1)) choice[i] = NEG_INF;
    }
  }

  u32 taken = 0;  // bit i: this lane's i-th expert
  float weight = 0.f, sum = 0.f;
  int id = 0;
  for (int k = 0; k < TOP_K; k++) {
    float v = NEG_INF, s = 0.f;
    int e = 0x7fffffff;
#pragma unroll
    for (int i = 0; i < PER; i++) {
      const int mine = i * 32 + lane;
      if (mine < EXPERTS && !(taken >> i & 1) && (e == 0x7fffffff || choice[i] > v)) v = choice[i], e = mine, s = score[i];
    }
    warp_best(v, e);
    // Logits that are not numbers must not become an index out of range.
    if (e >= EXPERTS || e < 0) e = k;
    s = 0.f;
#pragma unroll
    for (int i = 0; i < PER; i++)
      if (i == e / 32) s = score[i];
    s = __shfl_sync(0xffffffffu, s, e % 32);
    if (lane == e % 32) taken |= 1u << (e / 32);
    if (lane == k) id = e, weight = s;
    sum += s;
  }
  if (NORMALISE) weight = weight / (sum + 1e-20f);
  if (lane < TOP_K) {
    if (known.padding) id = -1;
    a.ids[(size_t)row * TOP_K + lane] = chosen[row % ROUTE_ROWS * TOP_K + lane] = id;
    a.weights[(size_t)row * TOP_K + lane] = weight * a.scale;
  }
}

// Sorts pairs by expert. The order inside an expert is free: each pair's results
// are the same wherever it stands.
DEVICE void route_plan(const Route& a) {
  __shared__ int counts[EXPERTS + 1], starts[EXPERTS + 1], segs[EXPERTS + 1];
  const int tid = threadIdx.x;
  for (int e = tid; e <= EXPERTS; e += 256) counts[e] = 0;
  __syncthreads();
  const int pairs = a.rows * SLOTS;
  auto expert_of = [&](int p) {
    const int row = p / SLOTS, k = p % SLOTS;
    const int at = row * TOP_K + (k < TOP_K ? k : 0), e = gridDim.y == 1 ? chosen[at] : load_fresh(a.ids + at);
    return e < 0 || k < TOP_K ? e : EXPERTS;
  };
  // The first pairs of each thread are remembered: in decode there are no more.
  constexpr int KEPT = 2;
  int mine[KEPT];
#pragma unroll
  for (int i = 0; i < KEPT; i++) mine[i] = i * 256 + tid < pairs ? expert_of(i * 256 + tid) : -1;
#pragma unroll
  for (int i = 0; i < KEPT; i++)
    if (mine[i] >= 0) atomicAdd(&counts[mine[i]], 1);
  for (int p = KEPT * 256 + tid; p < pairs; p += 256) {
    const int e = expert_of(p);
    if (e >= 0) atomicAdd(&counts[e], 1);
  }
  __syncthreads();
  if (tid < 32) {
    int at = 0, seg = 0;
    for (int base = 0; base <= EXPERTS; base += 32) {
      const int e = base + tid, c = e <= EXPERTS ? counts[e] : 0, s = ceil_div(c, TOKENS);
      int x = c, y = s;
#pragma unroll
      for (int o = 1; o < 32; o <<= 1) {
        const int u = __shfl_up_sync(0xffffffffu, x, o), v = __shfl_up_sync(0xffffffffu, y, o);
        if (tid >= o) x += u, y += v;
      }
      if (e <= EXPERTS) {
        starts[e] = at + x - c;
        segs[e] = seg + y - s;
      }
      at += __shfl_sync(0xffffffffu, x, 31);
      seg += __shfl_sync(0xffffffffu, y, 31);
    }
    if (tid == 0) {
      const int shared = ceil_div(counts[EXPERTS], TOKENS);
      a.count[0] = seg - shared;
      a.count[1] = shared;
    }
  }
  __syncthreads();
  for (int e = tid; e <= EXPERTS; e += 256)
    for (int i = 0; i < counts[e]; i += TOKENS)
      a.segments[segs[e] + i / TOKENS] = make_int4(e, starts[e] + i, min(TOKENS, counts[e] - i), 0);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < KEPT; i++)
    if (mine[i] >= 0) a.order[atomicAdd(&starts[mine[i]], 1)] = i * 256 + tid;
  for (int p = KEPT * 256 + tid; p < pairs; p += 256) {
    const int e = expert_of(p);
    if (e >= 0) a.order[atomicAdd(&starts[e], 1)] = p;
  }
}

// Tells the last of `parties` CTAs, to which then everything is visible that all of them wrote.
DEVICE bool arrive_last(int* arrived, int parties) {
  __shared__ int last;
  __syncthreads();
  if (parties == 1) return true;
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(arrived, 1) == parties - 1;
    if (last) *arrived = 0;
    __threadfence();
  }
  __syncthreads();
  return last;
}

#if CLUSTERS
DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\n barrier.cluster.wait.acquire;" ::: "memory");
}
#define IN_CLUSTERS __cluster_dims__(8, 1, 1)
#else
#define IN_CLUSTERS
#endif

extern "C" __global__ void IN_CLUSTERS __launch_bounds__(256) route(const Route a) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = blockIdx.y * ROUTE_ROWS + warp;
  grid_launch_dependents();
  const Known known(a, row, lane);
#if CLUSTERS
  cluster_sync();  // the first CTA is there to be written to
  route_logits(a, blockIdx.x * 8 + warp, lane);
  cluster_sync();
  if (blockIdx.x > 0) return;
#else
  route_logits(a, blockIdx.x * 8 + warp, lane);
  if (!arrive_last(a.arrived + 1 + blockIdx.y, gridDim.x)) return;
#endif
  if (warp < ROUTE_ROWS && row < a.rows) route_choose(a, known, row, lane, room[warp]);
  if (arrive_last(a.arrived, gridDim.y)) route_plan(a);
}
