// Gathers rows: out[i] = x[rows[i]].
//
// select_rows: grid outputs; block 256

struct SelectRows {
  const u16* x;     // [*, width]
  const int* rows;  // [outputs]; a negative index is padding and leaves its row as it is
  u16* out;         // [outputs, width]
  int width;
};

extern "C" __global__ void __launch_bounds__(256) select_rows(const SelectRows a) {
  grid_launch_dependents();
  grid_wait();
  const int row = a.rows[blockIdx.x];
  if (row < 0) return;
  const u16* src = a.x + (size_t)row * a.width;
  u16* dst = a.out + (size_t)blockIdx.x * a.width;
  if (a.width % 8 == 0) {
    for (int i = threadIdx.x; i < a.width / 8; i += 256) ((uint4*)dst)[i] = ((const uint4*)src)[i];
  } else {
    for (int i = threadIdx.x; i < a.width; i += 256) dst[i] = src[i];
  }
}
