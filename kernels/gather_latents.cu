// Cached latents, block after block, as the rows of a matrix, for their product with
// kv_b. Slots past a sequence's end are copied as they are.
//
// -D DC, DR
// gather_latents: grid (blocks), block GATHER_THREADS: CTA i copies block from + i of
//   the spans' blocks, counted one span after the other; past the last it does nothing

struct GatherLatents {
  const u16* cache;        // blocks of BLOCK x (DC + DR), as tile_index in common.cuh describes
  u16* out;                // [blocks, BLOCK, DC]
  const int* block_table;  // [spans, max_blocks]
  const int* lens;         // [spans] tokens in the cache
  const int* before;       // [spans] blocks of the spans before, from any number on
  int spans;
  int from;
  int max_blocks;
};

constexpr int GATHER_THREADS = 256;
constexpr int GATHER_VEC = DC % 8 == 0 && DR % 8 == 0 ? 8 : 1;

extern "C" __global__ void __launch_bounds__(GATHER_THREADS) gather_latents(const GatherLatents a) {
  grid_launch_dependents();
  // What came with the step is older than the launch before this one.
  const int block = a.from + blockIdx.x, base = a.before[0];
  int span = 0;
  while (span + 1 < a.spans && a.before[span + 1] - base <= block) span++;
  const int own = block - (a.before[span] - base);
  const bool live = own * BLOCK < a.lens[span];
  const u16* tile = a.cache + (live ? (size_t)a.block_table[(size_t)span * a.max_blocks + own] * (BLOCK * (DC + DR)) : 0);
  u16* out = a.out + (size_t)blockIdx.x * (BLOCK * DC);
  grid_wait();
  if (!live) return;
  constexpr int ROW = DC / GATHER_VEC;
#pragma unroll 4
  for (int i = threadIdx.x; i < BLOCK * ROW; i += GATHER_THREADS) {
    const int row = i / ROW, col = i % ROW * GATHER_VEC;
    const u16* src = tile + tile_index<DC + DR>(row, col);
    if (GATHER_VEC == 8) *(uint4*)(out + row * DC + col) = *(const uint4*)src;
    else out[row * DC + col] = *src;
  }
}
