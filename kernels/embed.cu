// The embedding of a vocabulary split over the ranks: rows of the table this rank
// has, zeros for the others, so that the sum over the ranks is the embedding.
//
// -D X_BF16=1 if the residual is bf16 (default f32)
// embed: grid rows; block 256

#ifndef X_BF16
#define X_BF16 0
#endif

struct Embed {
  const int* tokens;  // [rows]; with the sign bit, a row of `chosen`
  const int* chosen;  // tokens of the last step
  const u16* table;   // [owned, hidden]
#if X_BF16
  u16* x;             // [rows, hidden]
#else
  float* x;           // [rows, hidden]
#endif
  int first;          // vocabulary index of the table's row 0
  int owned;          // rows of the table
  int hidden;
};

extern "C" __global__ void __launch_bounds__(256) embed(const Embed a) {
  grid_launch_dependents();
  grid_wait();
  const size_t row = blockIdx.x;
  int token = a.tokens[row];
  if (token < 0) token = a.chosen[token & 0x7fffffff];
  const int local = token - a.first;
  const bool mine = local >= 0 && local < a.owned;
  const u16* src = a.table + (size_t)(mine ? local : 0) * a.hidden;
#if X_BF16
  u16* dst = a.x + row * a.hidden;
  for (int i = threadIdx.x; i < a.hidden; i += blockDim.x) dst[i] = mine ? src[i] : 0;
#else
  float* dst = a.x + row * a.hidden;
  if (a.hidden % 4 == 0) {
    for (int i = threadIdx.x * 4; i < a.hidden; i += blockDim.x * 4) {
      const uint2 q = mine ? *(const uint2*)(src + i) : make_uint2(0, 0);
      *(float4*)(dst + i) = make_float4(bf16_lo(q.x), bf16_hi(q.x), bf16_lo(q.y), bf16_hi(q.y));
    }
  } else {
    for (int i = threadIdx.x; i < a.hidden; i += blockDim.x) dst[i] = mine ? bf16_to_f32(src[i]) : 0.f;
  }
#endif
}
