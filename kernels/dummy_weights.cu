// Made-up weights, the same as src/checkpoint/slice.rs makes on the host: a value
// is a hash of its tensor's name, row and column, so that every slice agrees.
//
// dummy_noise:    grid (ceil(cols / 1024), rows); block 256
// dummy_constant: grid ceil(count / 256); block 256

struct DummyNoise {
  u16* out;   // [rows, cols]
  u64 seed;   // of the tensor's name
  u64 row;    // of the whole tensor, of out's first row
  u64 col;    // likewise
  u64 cols;
  float step; // the standard deviation 0.02 over sqrt(85)
};

struct DummyConstant {
  u16* out;
  u64 count;
  float value;
};

// The mixing step of splitmix64.
DEVICE u64 mix(u64 x) {
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ x >> 27) * 0x94d049bb133111ebull;
  return x ^ x >> 31;
}

extern "C" __global__ void __launch_bounds__(256) dummy_noise(const DummyNoise a) {
  const u64 row = mix(a.seed ^ mix(a.row + blockIdx.y));
  for (int i = 0; i < 4; i++) {
    const u64 at = (u64)blockIdx.x * 1024 + i * 256 + threadIdx.x;
    if (at >= a.cols) return;
    const u64 col = a.col + at;
    const u64 hash = mix(row + col / 4 * 0x9e3779b97f4a7c15ull);
    // Four sums of four digits each, 16 bits apart, for four columns.
    const u64 pairs = (hash & 0x0f0f0f0f0f0f0f0full) + (hash >> 4 & 0x0f0f0f0f0f0f0f0full);
    const u64 sums = (pairs & 0x00ff00ff00ff00ffull) + (pairs >> 8 & 0x00ff00ff00ff00ffull);
    const float sum = (float)(int)(sums >> 16 * (col % 4) & 63);
    a.out[blockIdx.y * a.cols + at] = f32_to_bf16((sum - 30.f) * a.step);
  }
}

extern "C" __global__ void __launch_bounds__(256) dummy_constant(const DummyConstant a) {
  const u64 i = (u64)blockIdx.x * 256 + threadIdx.x;
  if (i < a.count) a.out[i] = f32_to_bf16(a.value);
}
