// RMS norms. The residual stream is f32: it is small beside the weights, and what
// many layers add to it is not rounded away. One CTA a row, the row in registers.
//
// -D WIDTH  columns normed; -D X_BF16=1 if the residual x is bf16
//    RESULTS, TOP_K: what is added is the weighted sum of RESULTS experts' results, of which
//    the first TOP_K have weights (experts_sum's product, not taken through memory)
// norm_rows, add_norm: grid rows; block NORM_THREADS =
//   min(1024, V / 8 rounded up to a multiple of 32), V = WIDTH if WIDTH % 8 == 0,
//   else 8 * WIDTH (then a thread takes single elements).

#ifndef X_BF16
#define X_BF16 0
#endif
#ifndef RESULTS
#define RESULTS 0
#define TOP_K 0
#endif
#if X_BF16
typedef u16 Residual;
#else
typedef float Residual;
#endif

struct Norm {
  const Residual* x;    // [rows, WIDTH]
  const float* weight;  // [WIDTH]
  u16* out;             // [rows, WIDTH]
  float eps;
};

// What a rank adds.
struct Partial {
  const u16* sum;        // [rows, WIDTH]; null where RESULTS > 0:
  const float* results;  // [rows, RESULTS, WIDTH]
  const float* weights;  // [rows, TOP_K]
  const int* ids;        // [rows, TOP_K], negative for padding, which adds zeros
};

// x += partial, summed over the ranks (+ bias); out = rmsnorm(x) * weight
struct AddNorm {
  Partial partial;
  const float* bias;    // [WIDTH] or null
  Residual* x;          // [rows, WIDTH], read and written
  const float* weight;  // [WIDTH]
  u16* out;             // [rows, WIDTH]
  float eps;
};

constexpr int VEC = WIDTH % 8 == 0 ? 8 : 1;
constexpr int LANES = ((WIDTH + VEC - 1) / VEC + 31) / 32 * 32;
constexpr int NORM_THREADS = LANES < 1024 ? LANES : 1024;
constexpr int PER = (WIDTH + VEC * NORM_THREADS - 1) / (VEC * NORM_THREADS);

DEVICE void load_values(const u16* p, float (&v)[VEC]) {
  if (VEC == 8 && ((u64)p & 15) == 0) {
    const uint4 q = *(const uint4*)p;
    const u32 w[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
    for (int i = 0; i < VEC; i++) v[i] = i & 1 ? bf16_hi(w[i / 2]) : bf16_lo(w[i / 2]);
  } else {
#pragma unroll
    for (int i = 0; i < VEC; i++) v[i] = bf16_to_f32(p[i]);
  }
}

DEVICE void load_values(const float* p, float (&v)[VEC]) {
  if (VEC == 8) {
#pragma unroll
    for (int h = 0; h < VEC / 4; h++) {
      const float4 q = *(const float4*)(p + 4 * h);
      v[4 * h] = q.x, v[4 * h + 1] = q.y, v[4 * h + 2] = q.z, v[4 * h + 3] = q.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < VEC; i++) v[i] = p[i];
  }
}

DEVICE void store_values(u16* p, const float (&v)[VEC]) {
  if (VEC == 8 && ((u64)p & 15) == 0) {
    u32 w[4];
#pragma unroll
    for (int i = 0; i + 1 < VEC; i += 2) w[i / 2] = pack_bf16(v[i], v[i + 1]);
    *(uint4*)p = make_uint4(w[0], w[1], w[2], w[3]);
  } else {
#pragma unroll
    for (int i = 0; i < VEC; i++) p[i] = f32_to_bf16(v[i]);
  }
}

DEVICE void store_values(float* p, const float (&v)[VEC]) {
  if (VEC == 8) {
#pragma unroll
    for (int h = 0; h < VEC / 4; h++)
      *(float4*)(p + 4 * h) = make_float4(v[4 * h], v[4 * h + 1], v[4 * h + 2], v[4 * h + 3]);
  } else {
#pragma unroll
    for (int i = 0; i < VEC; i++) p[i] = v[i];
  }
}

// Column of this thread's i-th vector.
DEVICE int column(int i) { return (i * NORM_THREADS + (int)threadIdx.x) * VEC; }

// Norms the row that the block holds in `v` (0 past the end) and writes it.
DEVICE void finish_norm(float (&v)[PER][VEC], const float (&w)[PER][VEC], float eps, u16* out) {
  __shared__ float sums[32];
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < PER; i++)
#pragma unroll
    for (int k = 0; k < VEC; k++) sum += v[i][k] * v[i][k];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = warp_sum((int)threadIdx.x % 32 < NORM_THREADS / 32 ? sums[threadIdx.x % 32] : 0.f);
  const float scale = rsqrtf(sum / WIDTH + eps);
#pragma unroll
  for (int i = 0; i < PER; i++) {
#pragma unroll
    for (int k = 0; k < VEC; k++) v[i][k] *= scale * w[i][k];
    if (column(i) < WIDTH) store_values(out + column(i), v[i]);
  }
}

// What this rank adds to a row from column `col` on, rounded to bf16 as sums over ranks are.
DEVICE void load_partial(const Partial& p, size_t row, int col, float (&v)[VEC]) {
#if RESULTS
  // All that is read is under way at once, even what a padded row then does not want.
  float w[RESULTS], y[RESULTS][VEC];
#pragma unroll
  for (int i = 0; i < RESULTS; i++) {
    w[i] = i < TOP_K ? p.weights[row * TOP_K + i] : 1.f;
    load_values(p.results + (row * RESULTS + i) * WIDTH + col, y[i]);
  }
  const bool live = p.ids[row * TOP_K] >= 0;
#pragma unroll
  for (int k = 0; k < VEC; k++) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < RESULTS; i++) sum += w[i] * y[i][k];
    v[k] = live ? bf16_to_f32(f32_to_bf16(sum)) : 0.f;
  }
#else
  load_values(p.sum + row * WIDTH + col, v);
#endif
}

// The weights do not depend on the launch before this one.
DEVICE void load_weights(const float* weight, float (&w)[PER][VEC]) {
#pragma unroll
  for (int i = 0; i < PER; i++) {
#pragma unroll
    for (int k = 0; k < VEC; k++) w[i][k] = 0.f;
    if (column(i) < WIDTH) load_values(weight + column(i), w[i]);
  }
}

extern "C" __global__ void __launch_bounds__(NORM_THREADS) norm_rows(const Norm a) {
  const size_t row = blockIdx.x;
  float v[PER][VEC], w[PER][VEC];
  grid_launch_dependents();
  load_weights(a.weight, w);
  grid_wait();
#pragma unroll
  for (int i = 0; i < PER; i++) {
#pragma unroll
    for (int k = 0; k < VEC; k++) v[i][k] = 0.f;
    if (column(i) < WIDTH) load_values(a.x + row * WIDTH + column(i), v[i]);
  }
  finish_norm(v, w, a.eps, a.out + row * WIDTH);
}

extern "C" __global__ void __launch_bounds__(NORM_THREADS) add_norm(const AddNorm a) {
  const size_t row = blockIdx.x;
  float v[PER][VEC], w[PER][VEC];
  grid_launch_dependents();
  load_weights(a.weight, w);
  grid_wait();
#pragma unroll
  for (int i = 0; i < PER; i++) {
#pragma unroll
    for (int k = 0; k < VEC; k++) v[i][k] = 0.f;
    const int col = column(i);
    if (col < WIDTH) {
      float add[VEC];
      load_values(a.x + row * WIDTH + col, v[i]);
      load_partial(a.partial, row, col, add);
#pragma unroll
      for (int k = 0; k < VEC; k++) v[i][k] += add[k];
      if (a.bias) {
        load_values(a.bias + col, add);
#pragma unroll
        for (int k = 0; k < VEC; k++) v[i][k] += add[k];
      }
      store_values(a.x + row * WIDTH + col, v[i]);
    }
  }
  finish_norm(v, w, a.eps, a.out + row * WIDTH);
}
