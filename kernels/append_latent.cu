// Both latents of a layer: their norms, and on the absorb path the append of the
// latent and the turned rope key to the latent cache (tiles as tile_index in
// common.cuh describes). A CTA has one of a row's parts: the latent, the rope key
// (append_latent), the query latent.
//
// -D Q (width of the query latent; 0 where there is none to norm), DC, DR;
//    INTERLEAVE 1 to turn pairs (2i, 2i+1), 0 to turn (i, i + DR/2)
// norm_latents:  grid (rows, 1 + (Q > 0)); block LATENT_THREADS
// append_latent: grid (rows, 2 + (Q > 0)); block LATENT_THREADS
//                rows whose row_seq is negative are padding: nothing is appended

struct Latents {
  const u16* latent;       // row r at latent + r * stride: [DC]
  const u16* k_rope;       // row r at k_rope + r * key_stride: [DR] (append_latent)
  const u16* q;            // row r at q + r * q_stride: [Q]
  const float* weight;     // [DC], or null: the latent is taken as it is
  const float* q_weight;   // [Q]
  u16* latent_out;         // row r at latent_out + r * out_stride: [DC] (norm_latents)
  u16* q_out;              // row r at q_out + r * q_out_stride: [Q]
  const float* cos_table;  // [positions, DR / 2]
  const float* sin_table;  // [positions, DR / 2]
  const int* positions;    // [rows]
  const int* row_seq;      // [rows] index into block_table, negative for padding
  const int* block_table;  // [sequences, max_blocks]
  u16* cache;              // [blocks] of BLOCK x (DC + DR)
  int stride, key_stride, q_stride, out_stride, q_out_stride;  // elements
  int max_blocks;
  float eps;
};

constexpr int WIDEST = Q > DC ? Q : DC;
constexpr int LATENT_VEC = Q % 8 == 0 && DC % 8 == 0 && DR % 8 == 0 ? 8 : 1;
constexpr int LATENT_LANES = (WIDEST / LATENT_VEC + 31) / 32 * 32;
constexpr int LATENT_THREADS = LATENT_LANES < 1024 ? LATENT_LANES : 1024;
constexpr int KEY_VEC = DC % 8 == 0 && DR % 16 == 0 ? 8 : 1;

// x[WIDTH] normed, handed out as put(column, values).
template <int WIDTH, class Put>
DEVICE void norm_row(const u16* x, const float* weight, float eps, Put put) {
  constexpr int VEC = LATENT_VEC, PER = (WIDTH + VEC * LATENT_THREADS - 1) / (VEC * LATENT_THREADS);
  __shared__ float sums[32];
  float v[PER][VEC], w[PER][VEC];
  auto column = [](int i) { return (i * LATENT_THREADS + (int)threadIdx.x) * VEC; };
#pragma unroll
  for (int i = 0; i < PER; i++)
#pragma unroll
    for (int k = 0; k < VEC; k++) w[i][k] = weight && column(i) < WIDTH ? weight[column(i) + k] : 0.f;
  grid_wait();
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < PER; i++) {
#pragma unroll
    for (int k = 0; k < VEC; k++) v[i][k] = 0.f;
    if (column(i) < WIDTH) load_bf16(x + column(i), v[i]);
#pragma unroll
    for (int k = 0; k < VEC; k++) sum += v[i][k] * v[i][k];
  }
  if (weight) {
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = warp_sum((int)threadIdx.x % 32 < LATENT_THREADS / 32 ? sums[threadIdx.x % 32] : 0.f);
    const float scale = rsqrtf(sum / WIDTH + eps);
#pragma unroll
    for (int i = 0; i < PER; i++)
#pragma unroll
      for (int k = 0; k < VEC; k++) v[i][k] *= scale * w[i][k];
  }
#pragma unroll
  for (int i = 0; i < PER; i++)
    if (column(i) < WIDTH) put(column(i), v[i]);
}

template <bool APPEND>
DEVICE void latents(const Latents& a) {
  const int row = blockIdx.x;
  grid_launch_dependents();
  if (blockIdx.y > (APPEND ? 1 : 0)) {
    if constexpr (Q > 0) {
      u16* out = a.q_out + (size_t)row * a.q_out_stride;
      norm_row<Q>(a.q + (size_t)row * a.q_stride, a.q_weight, a.eps,
                  [&](int at, const float(&v)[LATENT_VEC]) { store_bf16(out + at, v); });
    }
    return;
  }
  const u16* latent = a.latent + (size_t)row * a.stride;
  if (!APPEND) {
    u16* out = a.latent_out + (size_t)row * a.out_stride;
    norm_row<DC>(latent, a.weight, a.eps, [&](int at, const float(&v)[LATENT_VEC]) { store_bf16(out + at, v); });
    return;
  }
  // Positions and block tables came with the step, before any of its launches.
  const int seq = a.row_seq[row], pos = a.positions[row], slot = pos % BLOCK;
  if (seq < 0) return grid_wait();
  u16* tile = a.cache + (size_t)a.block_table[(size_t)seq * a.max_blocks + pos / BLOCK] * (BLOCK * (DC + DR));
  if (blockIdx.y == 0) {
    norm_row<DC>(latent, a.weight, a.eps, [&](int at, const float(&v)[LATENT_VEC]) {
      store_bf16(tile + tile_index<DC + DR>(slot, at), v);
    });
    return;
  }
  const size_t angles = (size_t)pos * (DR / 2);
  const u16* key = a.k_rope + (size_t)row * a.key_stride;
  grid_wait();
  for (int at = threadIdx.x * KEY_VEC; at < DR; at += LATENT_THREADS * KEY_VEC) {
    float v[KEY_VEC];
    rope_turn<DR, KEY_VEC, INTERLEAVE>(key, at, a.cos_table + angles, a.sin_table + angles, v);
    store_bf16(tile + tile_index<DC + DR>(slot, DC + at), v);
  }
}

extern "C" __global__ void __launch_bounds__(LATENT_THREADS) norm_latents(const Latents a) { latents<false>(a); }
extern "C" __global__ void __launch_bounds__(LATENT_THREADS) append_latent(const Latents a) { latents<true>(a); }
