// The largest logit of each row and its index, ties to the lower: first over
// ARGMAX_PARTS parts of a row, then over the parts.
//
// argmax_parts: grid (ARGMAX_PARTS, rows); block 256
// argmax_join:  grid rows; block 32

#define ARGMAX_PARTS 32

struct Argmax {
  const float* logits;  // [rows, vocab]
  float* part_value;    // [rows, ARGMAX_PARTS] workspace
  int* part_index;      // [rows, ARGMAX_PARTS] workspace
  float* value;         // [rows]
  int* index;           // [rows]
  int vocab;            // columns on this rank
};

DEVICE void keep_best(float& value, int& index, float v, int i) {
  if (v > value || (v == value && i < index)) value = v, index = i;
}

DEVICE void warp_best(float& value, int& index) {
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) {
    const float v = __shfl_xor_sync(0xffffffffu, value, o);
    const int i = __shfl_xor_sync(0xffffffffu, index, o);
    keep_best(value, index, v, i);
  }
}

extern "C" __global__ void __launch_bounds__(256) argmax_parts(const Argmax a) {
  __shared__ float values[8];
  __shared__ int indices[8];
  grid_launch_dependents();
  const int row = blockIdx.y, part = blockIdx.x;
  const int each = ceil_div(a.vocab, ARGMAX_PARTS);
  const int first = min(part * each, a.vocab), last = min(first + each, a.vocab);
  const float* logits = a.logits + (size_t)row * a.vocab;
  float value = NEG_INF;
  int index = first < a.vocab ? first : 0x7fffffff;
  grid_wait();
#pragma unroll 4
  for (int i = first + threadIdx.x; i < last; i += 256) keep_best(value, index, logits[i], i);
  warp_best(value, index);
  if (threadIdx.x % 32 == 0) values[threadIdx.x / 32] = value, indices[threadIdx.x / 32] = index;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < 8; w++) keep_best(value, index, values[w], indices[w]);
    a.part_value[row * ARGMAX_PARTS + part] = value;
    a.part_index[row * ARGMAX_PARTS + part] = index;
  }
}

extern "C" __global__ void __launch_bounds__(32) argmax_join(const Argmax a) {
  grid_launch_dependents();
  grid_wait();
  const int row = blockIdx.x;
  float value = a.part_value[row * ARGMAX_PARTS + threadIdx.x];
  int index = a.part_index[row * ARGMAX_PARTS + threadIdx.x];
  warp_best(value, index);
  if (threadIdx.x == 0) a.value[row] = value, a.index[row] = index;
}
