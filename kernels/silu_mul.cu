// out = silu(gate) * up, for rows that hold the gate first and then up.
//
// silu_mul: grid (ceil(width / 2048), rows); block 256

struct SiluMul {
  const u16* gate_up;  // row r begins at gate_up + r * stride: [2 * width]
  u16* out;            // row r begins at out + r * out_stride: [width]
  int width;
  int stride;          // elements, at least 2 * width
  int out_stride;      // elements, at least width
};

extern "C" __global__ void __launch_bounds__(256) silu_mul(const SiluMul a) {
  grid_launch_dependents();
  grid_wait();
  const size_t row = blockIdx.y;
  const u16* gate = a.gate_up + row * a.stride;
  const u16* up = gate + a.width;
  u16* out = a.out + row * a.out_stride;
  const int col = (blockIdx.x * 256 + threadIdx.x) * 8;
  if (a.width % 8 == 0 && a.stride % 8 == 0 && a.out_stride % 8 == 0) {
    if (col >= a.width) return;
    const uint4 g = *(const uint4*)(gate + col), u = *(const uint4*)(up + col);
    const u32 x[4] = {g.x, g.y, g.z, g.w}, y[4] = {u.x, u.y, u.z, u.w};
    u32 r[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
      r[i] = pack_bf16(silu(bf16_lo(x[i])) * bf16_lo(y[i]), silu(bf16_hi(x[i])) * bf16_hi(y[i]));
    *(uint4*)(out + col) = make_uint4(r[0], r[1], r[2], r[3]);
  } else {
    for (int i = col; i < min(col + 8, a.width); i++)
      out[i] = f32_to_bf16(silu(bf16_to_f32(gate[i])) * bf16_to_f32(up[i]));
  }
}
