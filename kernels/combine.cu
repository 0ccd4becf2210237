// Joins the partial results of a split sequence: out = sum_s 2^(lse_s - lse) o_s.
// A sequence that one team computed alone was written by the attention kernel
// itself and is left as it is; a padding entry gets zeros.
//
// -D DV (width of an output row: DV on the GQA path, DC on the absorb path), SQ

#define COMBINE_WARPS 8

struct Combine {
  const float* part_o;    // [batch + teams, SQ, local_heads, DV], each normalised
  const float* part_lse;  // [batch + teams, SQ, local_heads], base 2
  const int2* seq;        // [batch] from split_plan
  u16* out;               // [batch * SQ, local_heads, DV]
  int rows;               // batch * SQ
  int heads;              // local heads
  int warps;              // warps a row and head: 1, 2, 4 or 8; more where few rows have many parts
};

constexpr int LANE_VALUES = (DV + 31) / 32;
constexpr bool WIDE = DV % 128 == 0;  // 16-byte accesses
constexpr int EARLY = LANE_VALUES <= 8 ? 4 : 2;  // parts in flight at once

// Column of a lane's i-th value.
DEVICE int combine_col(int lane, int i) { return WIDE ? (i / 4) * 128 + lane * 4 + i % 4 : i * 32 + lane; }

DEVICE void combine_store(u16* out, int lane, const float (&v)[LANE_VALUES]) {
  if (WIDE) {
#pragma unroll
    for (int i = 0; i + 3 < LANE_VALUES; i += 4)
      *(uint2*)(out + combine_col(lane, i)) = make_uint2(pack_bf16(v[i], v[i + 1]), pack_bf16(v[i + 2], v[i + 3]));
  } else {
#pragma unroll
    for (int i = 0; i < LANE_VALUES; i++)
      if (i * 32 + lane < DV) out[i * 32 + lane] = f32_to_bf16(v[i]);
  }
}

DEVICE void combine_load(const float* p, int lane, float (&v)[LANE_VALUES]) {
  if (WIDE) {
#pragma unroll
    for (int i = 0; i + 3 < LANE_VALUES; i += 4) {
      const float4 x = *(const float4*)(p + combine_col(lane, i));
      v[i] = x.x, v[i + 1] = x.y, v[i + 2] = x.z, v[i + 3] = x.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < LANE_VALUES; i++) v[i] = i * 32 + lane < DV ? p[i * 32 + lane] : 0.f;
  }
}

// grid ceil(rows * heads / (COMBINE_WARPS / warps)), block 32 * COMBINE_WARPS
extern "C" __global__ void __launch_bounds__(32 * COMBINE_WARPS) combine(const Combine a) {
  __shared__ float sums[COMBINE_WARPS][LANE_VALUES * 32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int item = blockIdx.x * (COMBINE_WARPS / a.warps) + warp / a.warps;
  const int part = warp % a.warps;
  const bool real = item < a.rows * a.heads;
  grid_launch_dependents();
  const int row = real ? item / a.heads : 0, head = item % a.heads;
  // The plan is older than the launch this one may overlap with.
  const int2 seq = a.seq[row / SQ];
  const int n = real ? seq.y : 1;
  const size_t stride = (size_t)SQ * a.heads;
  const size_t first = ((size_t)seq.x * SQ + row % SQ) * a.heads + head;

  float acc[LANE_VALUES];
#pragma unroll
  for (int i = 0; i < LANE_VALUES; i++) acc[i] = 0.f;

  grid_wait();

  if (n > 1) {
    // The first parts are on their way before their weights are known.
    float early[EARLY][LANE_VALUES], early_lse[EARLY];
#pragma unroll
    for (int i = 0; i < EARLY; i++) {
      const int s = part + i * a.warps;
      early_lse[i] = NEG_INF;
#pragma unroll
      for (int k = 0; k < LANE_VALUES; k++) early[i][k] = 0.f;
      if (s < n) {
        early_lse[i] = a.part_lse[first + s * stride];
        combine_load(a.part_o + (first + s * stride) * DV, lane, early[i]);
      }
    }
    float top = NEG_INF;
    for (int s = lane; s < n; s += 32) top = fmaxf(top, a.part_lse[first + s * stride]);
    top = warp_max(top);
    if (top == NEG_INF) top = 0.f;
    float sum = 0.f;
    for (int s = lane; s < n; s += 32) sum += exp2_fast(a.part_lse[first + s * stride] - top);
    sum = warp_sum(sum);
    const float inv = sum > 0.f ? 1.f / sum : 0.f;

#pragma unroll
    for (int i = 0; i < EARLY; i++) {
      const float w = exp2_fast(early_lse[i] - top) * inv;
#pragma unroll
      for (int k = 0; k < LANE_VALUES; k++) acc[k] += w * early[i][k];
    }
#pragma unroll EARLY
    for (int s = part + EARLY * a.warps; s < n; s += a.warps) {
      const size_t at = first + s * stride;
      float v[LANE_VALUES];
      combine_load(a.part_o + at * DV, lane, v);
      const float w = exp2_fast(a.part_lse[at] - top) * inv;
#pragma unroll
      for (int k = 0; k < LANE_VALUES; k++) acc[k] += w * v[k];
    }
  }

  if (a.warps > 1) {
#pragma unroll
    for (int i = 0; i < LANE_VALUES; i++) sums[warp][i * 32 + lane] = acc[i];
    __syncthreads();
    if (part == 0) {
      for (int w = 1; w < a.warps; w++) {
#pragma unroll
        for (int i = 0; i < LANE_VALUES; i++) acc[i] += sums[warp + w][i * 32 + lane];
      }
    }
  }
  if (part == 0 && n != 1) combine_store(a.out + ((size_t)row * a.heads + head) * DV, lane, acc);
}
