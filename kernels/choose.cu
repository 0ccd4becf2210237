// The token of each output row: the best of logit + temperature * noise, ties to the
// lower token, and NaN never; temperature 0 takes the largest logit. The noise is
// Gumbel's and a function of the row's key and the token alone, made of operations
// that round as src/backend/draw.rs does it: the same bits on host and GPU.
//
// First over CHOOSE_PARTS parts of a row, then over the parts, then over the ranks:
// pushed to each other's memory as one_shot_all_reduce.cu does it, or gathered by NCCL.
//
// choose_parts: grid (CHOOSE_PARTS, rows); block 256
// choose_join:  grid rows; block 32
// choose_ranks: grid rows; block 32

#define CHOOSE_PARTS 32

// A candidate: its score's bits and its token.
struct Choose {
  const float* logits;        // [rows, vocab]
  const u32* keys;            // [rows] {low, high}
  const float* temperatures;  // [rows]
  uint2* parts;               // [rows, CHOOSE_PARTS] workspace
  uint2* best;                // [rows] of this rank
  const uint2* gathered;      // [world, rows] best of all ranks, for choose_ranks
  int* tokens;                // [rows] of all ranks, for the next step's embedding; null to stop at `best`
  int* host;                  // [2, host_rows] the same in host memory
  const int* side;            // which half of `host`
  u32* calls;                 // [slot_rows] pushes so far; null where nothing is pushed
  volatile u32* stop;         // [2] host memory: leave if not 0; 1 + the first rank that was waited for then
  u8* slots[MAX_WORLD];       // each rank's [2][world][slot_rows] {score, flag, token, flag}
  int vocab;                  // columns on this rank
  int first;                  // token of column 0
  int rank;
  int world;
  int slot_rows;
  int host_rows;
};

DEVICE void keep_best(float& score, int& token, float s, int t) {
  if (s > score || (s == score && t < token)) score = s, token = t;
}

DEVICE void warp_best(float& score, int& token) {
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) {
    const float s = __shfl_xor_sync(0xffffffffu, score, o);
    const int t = __shfl_xor_sync(0xffffffffu, token, o);
    keep_best(score, token, s, t);
  }
}

// SplitMix64's output function on a counter, the upper half.
DEVICE u32 random_bits(u64 key, u32 index) {
  u64 z = key + ((u64)index + 1) * 0x9E3779B97F4A7C15ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return (u32)((z ^ (z >> 31)) >> 32);
}

// x as (1 + f) * 2^e with 1 + f from sqrt(1/2) to sqrt(2).
DEVICE void split(float x, float& f, float& e) {
  const u32 bits = __float_as_uint(x) - 0x3f3504f3u;
  f = __fadd_rn(__uint_as_float((bits & 0x007fffffu) + 0x3f3504f3u), -1.f);
  e = (float)((int)bits >> 23);
}

// ln((1 + f) * 2^e), as Cephes computes it.
DEVICE float log_of(float f, float e) {
  const float z = __fmul_rn(f, f);
  float p = 7.0376836e-2f;
  p = __fadd_rn(__fmul_rn(p, f), -1.151461e-1f);
  p = __fadd_rn(__fmul_rn(p, f), 1.1676999e-1f);
  p = __fadd_rn(__fmul_rn(p, f), -1.2420141e-1f);
  p = __fadd_rn(__fmul_rn(p, f), 1.4249323e-1f);
  p = __fadd_rn(__fmul_rn(p, f), -1.6668058e-1f);
  p = __fadd_rn(__fmul_rn(p, f), 2.0000715e-1f);
  p = __fadd_rn(__fmul_rn(p, f), -2.4999994e-1f);
  p = __fadd_rn(__fmul_rn(p, f), 3.333333e-1f);
  float y = __fmul_rn(__fmul_rn(f, z), p);
  y = __fadd_rn(y, __fmul_rn(e, -2.1219444e-4f));
  y = __fadd_rn(y, -__fmul_rn(0.5f, z));
  return __fadd_rn(__fadd_rn(f, y), __fmul_rn(e, 0.6933594f));
}

DEVICE float gumbel(u64 key, u32 token) {
  const u32 k = random_bits(key, token);
  float f, e;
  split(__fadd_rn(__uint2float_rn(~k), 0.5f), f, e);
  e -= 32.f;
  if (e == 0.f) f = __fmul_rn(__fadd_rn(__uint2float_rn(k), 0.5f), -2.3283064e-10f);
  split(-log_of(f, e), f, e);
  return -log_of(f, e);
}

DEVICE void publish(const Choose& a, int row, int token) {
  a.tokens[row] = token;
  a.host[(size_t)*a.side * a.host_rows + row] = token;
}

extern "C" __global__ void __launch_bounds__(256) choose_parts(const Choose a) {
  __shared__ float scores[8];
  __shared__ int tokens[8];
  grid_launch_dependents();
  const int row = blockIdx.y, part = blockIdx.x;
  const int each = ceil_div(a.vocab, CHOOSE_PARTS);
  const int first = min(part * each, a.vocab), last = min(first + each, a.vocab);
  const float* logits = a.logits + (size_t)row * a.vocab;
  float score = NEG_INF;
  int token = first < a.vocab ? a.first + first : 0x7fffffff;
  grid_wait();
  const float temperature = a.temperatures[row];
  if (temperature == 0.f) {
#pragma unroll 4
    for (int i = first + threadIdx.x; i < last; i += 256) keep_best(score, token, logits[i], a.first + i);
  } else {
    const u64 key = (u64)a.keys[2 * row + 1] << 32 | a.keys[2 * row];
    for (int i = first + threadIdx.x; i < last; i += 256) {
      const float noise = gumbel(key, (u32)(a.first + i));
      keep_best(score, token, __fadd_rn(logits[i], __fmul_rn(temperature, noise)), a.first + i);
    }
  }
  warp_best(score, token);
  if (threadIdx.x % 32 == 0) scores[threadIdx.x / 32] = score, tokens[threadIdx.x / 32] = token;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < 8; w++) keep_best(score, token, scores[w], tokens[w]);
    a.parts[row * CHOOSE_PARTS + part] = make_uint2(__float_as_uint(score), (u32)token);
  }
}

extern "C" __global__ void __launch_bounds__(32) choose_join(const Choose a) {
  grid_launch_dependents();
  grid_wait();
  const int row = blockIdx.x, lane = threadIdx.x;
  const uint2 part = a.parts[row * CHOOSE_PARTS + lane];
  float score = __uint_as_float(part.x);
  int token = (int)part.y;
  warp_best(score, token);
  if (lane == 0) a.best[row] = make_uint2(__float_as_uint(score), (u32)token);
  if (a.calls) {
    // A slot is used by every second call: a rank that pushes call n + 2 has received
    // call n + 1 of all others, and they pushed that after they had read call n.
    const u32 flag = a.calls[row] + 1;
    const size_t half = (size_t)(flag & 1) * a.world;
    if (lane < a.world && lane != a.rank) {
      u8* to = a.slots[lane] + ((half + a.rank) * a.slot_rows + row) * 16;
      asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(__float_as_uint(score)), "r"(flag),
                   "r"(token), "r"(flag)
                   : "memory");
      const u8* from = a.slots[a.rank] + ((half + lane) * a.slot_rows + row) * 16;
      u32 s, t, f, g;
      for (u32 polls = 1;; polls++) {
        asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(s), "=r"(f), "=r"(t), "=r"(g) : "l"(from) : "memory");
        if (f == flag && g == flag) break;
        if (polls % POLLS == 0 && a.stop[0]) {
          if (!a.stop[1]) a.stop[1] = lane + 1;
          break;
        }
      }
      score = __uint_as_float(s), token = (int)t;
    }
    __syncwarp();
    warp_best(score, token);
    if (lane == 0) a.calls[row] = flag;
  }
  if (lane == 0 && a.tokens) publish(a, row, token);
}

extern "C" __global__ void __launch_bounds__(32) choose_ranks(const Choose a) {
  grid_launch_dependents();
  grid_wait();
  const int row = blockIdx.x;
  float score = NEG_INF;
  int token = 0x7fffffff;
  for (int rank = threadIdx.x; rank < a.world; rank += 32) {
    const uint2 best = a.gathered[(size_t)rank * gridDim.x + row];
    keep_best(score, token, __uint_as_float(best.x), (int)best.y);
  }
  warp_best(score, token);
  if (threadIdx.x == 0) publish(a, row, token);
}
