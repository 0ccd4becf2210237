// GQA path: rotates queries, and appends keys, values and the shared rope key to
// the grouped cache (tiles as tile_index in common.cuh describes).
//
// -D DN, DR (0: no shared rope key, and the whole of each query and key turns), DV;
//    INTERLEAVE 1 to turn pairs (2i, 2i+1), 0 to turn (i, i + dim/2)
// rope_append_grouped: grid (ROPE_GRID_X = ceil(units / 128), rows); block 128;
//   units = heads * (DN + DR) + DR + groups * (DN + DV), divided by 8 if DN, DR and DV
//   are multiples of 8 (of 16, the turning one, where halves turn)
// Rows whose row_seq is negative are padding: nothing is written for them.

struct RopeAppendGrouped {
  const u16* q;            // row r at q + r * q_stride: [heads, DN + DR]
  const u16* kv;           // row r at kv + r * kv_stride: [groups, DN + DV]
  const u16* k_rope;       // row r at k_rope + r * k_rope_stride: [DR]; null where DR is 0
  const float* cos_table;  // [positions, TURN / 2], TURN = DR, or DN where DR is 0
  const float* sin_table;  // [positions, TURN / 2]
  const int* positions;    // [rows]
  const int* row_seq;      // [rows] index into block_table, negative for padding
  const int* block_table;  // [sequences, max_blocks]
  u16* q_out;              // [rows, heads, DN + DR]
  u16* cache;              // [blocks] of { rope key BLOCK x DR, groups x { K BLOCK x DN, V BLOCK x DV } }
  int q_stride, kv_stride, k_rope_stride;  // elements
  int heads, groups;       // on this rank
  int max_blocks;
};

constexpr int TURN = DR > 0 ? DR : DN;
constexpr int DQ = DN + DR;
constexpr bool VECTORS = DN % 8 == 0 && DR % 8 == 0 && DV % 8 == 0 && (INTERLEAVE || TURN % 16 == 0);
constexpr int VEC = VECTORS ? 8 : 1;

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

DEVICE void store_values(u16* p, const float (&v)[VEC]) {
  if (VEC == 8) {
    u32 w[4];
#pragma unroll
    for (int i = 0; i + 1 < VEC; i += 2) w[i / 2] = pack_bf16(v[i], v[i + 1]);
    *(uint4*)p = make_uint4(w[0], w[1], w[2], w[3]);
  } else {
    p[0] = f32_to_bf16(v[0]);
  }
}

// Elements at .. at + VEC of the turned vector x[TURN].
DEVICE void turned(const u16* x, int at, const float* cs, const float* sn, float (&v)[VEC]) {
  constexpr int HALF = TURN / 2;
  if (INTERLEAVE) {
    if (VEC == 8) {
      float p[VEC];
      load_values(x + at, p);
#pragma unroll
      for (int i = 0; i + 1 < VEC; i += 2) {
        const float c = cs[(at + i) / 2], s = sn[(at + i) / 2];
        v[i] = p[i] * c - p[i + 1] * s;
        v[i + 1] = p[i + 1] * c + p[i] * s;
      }
    } else {
      const float own = bf16_to_f32(x[at]), other = bf16_to_f32(x[at ^ 1]);
      v[0] = own * cs[at / 2] + (at & 1 ? other : -other) * sn[at / 2];
    }
  } else {
    const bool upper = at >= HALF;
    float own[VEC], other[VEC];
    load_values(x + at, own);
    load_values(x + (upper ? at - HALF : at + HALF), other);
    const int pair = upper ? at - HALF : at;
#pragma unroll
    for (int i = 0; i < VEC; i++) v[i] = own[i] * cs[pair + i] + (upper ? other[i] : -other[i]) * sn[pair + i];
  }
}

extern "C" __global__ void __launch_bounds__(128) rope_append_grouped(const RopeAppendGrouped a) {
  grid_launch_dependents();
  // The step's tables are older than the launch this one may overlap with.
  const int row = blockIdx.y, seq = a.row_seq[row];
  if (seq < 0) return;
  const int pos = a.positions[row], slot = pos % BLOCK;
  const float* cs = a.cos_table + (size_t)pos * (TURN / 2);
  const float* sn = a.sin_table + (size_t)pos * (TURN / 2);
  const size_t block_elems = (size_t)BLOCK * (DR + a.groups * (DN + DV));
  u16* block = a.cache + (size_t)a.block_table[(size_t)seq * a.max_blocks + pos / BLOCK] * block_elems;
  grid_wait();
  int unit = (blockIdx.x * 128 + threadIdx.x) * VEC;
  float v[VEC];
  if (unit < a.heads * DQ) {
    const u16* src = a.q + (size_t)row * a.q_stride + unit;
    const int col = unit % DQ;
    if (DR == 0) {
      turned(src - col, col, cs, sn, v);
    } else if (col >= DN) {
      turned(src - (col - DN), col - DN, cs, sn, v);
    } else {
      load_values(src, v);
    }
    store_values(a.q_out + (size_t)row * a.heads * DQ + unit, v);
    return;
  }
  unit -= a.heads * DQ;
  if (unit < DR) {
    turned(a.k_rope + (size_t)row * a.k_rope_stride, unit, cs, sn, v);
    store_values(block + tile_index<DR + (DR == 0)>(slot, unit), v);
    return;
  }
  unit -= DR;
  if (unit < a.groups * (DN + DV)) {
    const u16* src = a.kv + (size_t)row * a.kv_stride + unit;
    const int group = unit / (DN + DV), col = unit % (DN + DV);
    u16* k_tile = block + (size_t)BLOCK * (DR + group * (DN + DV));
    if (col < DN) {
      if (DR == 0) turned(src - col, col, cs, sn, v); else load_values(src, v);
      store_values(k_tile + tile_index<DN>(slot, col), v);
    } else {
      load_values(src, v);
      store_values(k_tile + BLOCK * DN + tile_index<DV>(slot, col - DN), v);
    }
  }
}
