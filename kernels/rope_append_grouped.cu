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
      rope_turn<TURN, VEC, INTERLEAVE>(src - col, col, cs, sn, v);
    } else if (col >= DN) {
      rope_turn<TURN, VEC, INTERLEAVE>(src - (col - DN), col - DN, cs, sn, v);
    } else {
      load_bf16(src, v);
    }
    store_bf16(a.q_out + (size_t)row * a.heads * DQ + unit, v);
    return;
  }
  unit -= a.heads * DQ;
  if (unit < DR) {
    rope_turn<TURN, VEC, INTERLEAVE>(a.k_rope + (size_t)row * a.k_rope_stride, unit, cs, sn, v);
    store_bf16(block + tile_index<DR + (DR == 0)>(slot, unit), v);
    return;
  }
  unit -= DR;
  if (unit < a.groups * (DN + DV)) {
    const u16* src = a.kv + (size_t)row * a.kv_stride + unit;
    const int group = unit / (DN + DV), col = unit % (DN + DV);
    u16* k_tile = block + (size_t)BLOCK * (DR + group * (DN + DV));
    if (col < DN) {
      if (DR == 0) rope_turn<TURN, VEC, INTERLEAVE>(src - col, col, cs, sn, v); else load_bf16(src, v);
      store_bf16(k_tile + tile_index<DN>(slot, col), v);
    } else {
      load_bf16(src, v);
      store_bf16(k_tile + BLOCK * DN + tile_index<DV>(slot, col - DN), v);
    }
  }
}
