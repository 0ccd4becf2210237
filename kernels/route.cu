// The router of a mixture of experts: logits in f32, then the choice.
//
// -D EXPERTS (at most 512), TOP_K (at most 32), GROUPS (at most 32; 1 where choice is not limited),
//    TOP_GROUPS, HIDDEN, SCORING 0 sigmoid with bias, a group scored by its two best (noaux_tc)
//                               1 softmax, the best of all
//                               2 softmax, a group scored by its best
//    NORMALISE 1: the chosen weights are divided by their sum
// route_logits: grid (ceil(EXPERTS / 8), ceil(rows / 8)); block 256
// route_choose: grid ceil(rows / 4); block 128
// Ties go to the lower index. `scale` multiplies the weights in the end.

struct Route {
  const u16* x;       // [rows, HIDDEN]
  const u16* gate;    // [EXPERTS, HIDDEN]
  const float* bias;  // [EXPERTS] added for the choice alone (SCORING 0), or null
  float* logits;      // [rows, EXPERTS] workspace
  int* ids;           // [rows, TOP_K]
  float* weights;     // [rows, TOP_K]
  const int* row_seq; // [rows] negative for padding, whose ids become -1; or null
  int rows;
  float scale;
};

constexpr int ROUTE_ROWS = 8;

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
    if (lane == 0 && first + r < a.rows) a.logits[(size_t)(first + r) * EXPERTS + expert] = sum[r];
  }
}

// A warp computes one expert's logits of eight rows.
extern "C" __global__ void __launch_bounds__(256) route_logits(const Route a) {
  const int expert = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first = blockIdx.y * ROUTE_ROWS, last = min(first + ROUTE_ROWS, a.rows);
  grid_launch_dependents();
  if (expert >= EXPERTS) return;
  if (HIDDEN % 8 == 0) {
    // The gate's first part is on its way before x is known.
    uint4 g[CHUNK];
    load_gate(a.gate + (size_t)expert * HIDDEN, 0, lane, g);
    grid_wait();
    if (a.rows == 1) {
      expert_logits<1>(a, expert, 0, lane, g);
    } else {
      for (int r = first; r < last; r += 4) expert_logits<4>(a, expert, r, lane, g);
    }
  } else {
    grid_wait();
    for (int r = first; r < last; r++) {
      float sum = 0.f;
      for (int col = lane; col < HIDDEN; col += 32)
        sum += bf16_to_f32(a.gate[(size_t)expert * HIDDEN + col]) * bf16_to_f32(a.x[(size_t)r * HIDDEN + col]);
      sum = warp_sum(sum);
      if (lane == 0) a.logits[(size_t)r * EXPERTS + expert] = sum;
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

// A warp chooses for one row; lane l has experts l, l + 32, ...
extern "C" __global__ void __launch_bounds__(128) route_choose(const Route a) {
  __shared__ float shared_choice[4][EXPERTS];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = blockIdx.x * 4 + warp;
  grid_launch_dependents();
  if (row >= a.rows) return;
  float score[PER], choice[PER];
#pragma unroll
  for (int i = 0; i < PER; i++) {
    const int e = i * 32 + lane;
    choice[i] = SCORING == 0 && a.bias && e < EXPERTS ? a.bias[e] : 0.f;
  }
  grid_wait();
#pragma unroll
  for (int i = 0; i < PER; i++) {
    const int e = i * 32 + lane;
    score[i] = e < EXPERTS ? a.logits[(size_t)row * EXPERTS + e] : NEG_INF;
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
    float* all = shared_choice[warp];
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
    a.ids[(size_t)row * TOP_K + lane] = a.row_seq && a.row_seq[row] < 0 ? -1 : id;
    a.weights[(size_t)row * TOP_K + lane] = weight * a.scale;
  }
}
