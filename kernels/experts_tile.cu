// Experts' weights in the order in which experts_hopper.cu brings them to shared
// memory: tiles of 32 rows x 64 columns, [rows / 32, columns / 64], each in wgmma's
// 128-byte swizzle. Once, when they are loaded.
//
// experts_tile: grid any; block 256
// rows is a multiple of 32, columns of 64.

struct TileJob {
  const u16* from;  // [rows, columns]
  u16* to;          // [rows / 32, columns / 64, 32 * 64]
  int rows, columns;
  int gated;        // rows are gate's and then up's; a tile has 16 of each, in the order below
};

// Row r of a gated tile: gate and up of a column are neighbours, and a lane of the
// product, which has two columns of every eight, gets four columns in a row.
DEVICE int gated_row(int tile, int r, int rows) {
  const int column = tile * 16 + (r % 8) / 2 * 4 + r / 8;
  return r % 2 ? rows / 2 + column : column;
}

extern "C" __global__ void __launch_bounds__(256) experts_tile(const TileJob a) {
  const int panels = a.columns / 64;
  const i64 chunks = (i64)a.rows * a.columns / 8;  // of 16 bytes
  for (i64 i = (i64)blockIdx.x * 256 + threadIdx.x; i < chunks; i += (i64)gridDim.x * 256) {
    const int c = i % 8, r = i / 8 % 32, panel = i / 256 % panels, tile = i / 256 / panels;
    const int row = a.gated ? gated_row(tile, r, a.rows) : tile * 32 + r;
    const uint4 v = *(const uint4*)(a.from + (size_t)row * a.columns + panel * 64 + c * 8);
    *(uint4*)(a.to + i / 256 * (32 * 64) + r * 64 + (c ^ (r % 8)) * 8) = v;
  }
}
