// The sum over the ranks in one step, fused with what follows it: every rank pushes
// its partial row to all others, adds up what it received in rank order in f32
// (so all ranks get the same bits), adds that to the residual and norms.
//
// x += sum of partials (+ bias); out = rmsnorm(x) * weight
//
// A word of data travels with a flag beside it, 8 bytes that arrive together, so that
// neither side needs a fence or a second message. The flag is the number of the
// row's call, which both sides count for themselves. A slot is used by every second
// call: a rank that pushes call n + 2 has received call n + 1 of all others, and they
// pushed that after they had read call n.
//
// A rank that is lost must not keep the others here for ever: the host's stop word is
// looked at every POLLS polls, which is never when all ranks come in time. What a
// kernel that leaves so has written is worthless.
//
// Text after norm.cu, whose constants it takes. WIDTH is a multiple of 8.
// -D BEGINS  1: the sum is the residual's beginning, and x only written; default 0
// one_shot_add_norm: grid rows (at most max_rows); block NORM_THREADS

#ifndef BEGINS
#define BEGINS 0
#endif

struct OneShot {
  Partial partial;       // this rank's
  const float* bias;     // [WIDTH] or null
  float* x;              // [rows, WIDTH], read and written
  const float* weight;   // [WIDTH]
  u16* out;              // [rows, WIDTH]
  u32* calls;            // [max_rows] calls so far
  u32* stop;             // [2] host memory: leave if not 0; 1 + the first rank that was waited for then
  u8* slots[MAX_WORLD];  // each rank's [2][world][max_rows][WIDTH / 2] {word, flag}
  int rank;
  int world;
  int max_rows;
  float eps;
};

DEVICE void push(u8* to, u32 a, u32 b, u32 flag) {
  asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(a), "r"(flag), "r"(b), "r"(flag)
               : "memory");
}

// Whether the host wants the kernel to end; `rank` is the one that has not come.
DEVICE bool stopped(volatile u32* stop, int rank) {
  if (!stop[0]) return false;
  if (!stop[1]) stop[1] = rank + 1;
  return true;
}

// N pieces of rank `rank`, all of them under way at once.
template <int N>
DEVICE void pull(const u8* const (&from)[N], uint2 (&got)[N], u32 flag, int rank, u32* stop) {
  for (u32 polls = 1;; polls++) {
    bool here = true;
#pragma unroll
    for (int i = 0; i < N; i++) {
      u32 f, g;
      asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(got[i].x), "=r"(f), "=r"(got[i].y), "=r"(g)
                   : "l"(from[i])
                   : "memory");
      here = here && f == flag && g == flag;
    }
    if (here || (polls % POLLS == 0 && stopped(stop, rank))) return;
  }
}

#if WIDTH % 8 == 0 && !X_BF16
extern "C" __global__ void __launch_bounds__(NORM_THREADS) one_shot_add_norm(const OneShot a) {
  const size_t row = blockIdx.x;
  float v[PER][VEC], w[PER][VEC];
  uint4 mine[PER];
  grid_launch_dependents();
  load_weights(a.weight, w);
  grid_wait();
  const u32 flag = a.calls[row] + 1;
  const size_t half = (size_t)(flag & 1) * a.world;
  auto slot = [&](int to, int from) { return a.slots[to] + ((half + from) * a.max_rows + row) * (WIDTH * 4); };
  // A warp's 16-byte pieces lie side by side, first the lower halves of its vectors: what a warp stores in one go is
  // contiguous, and travels as whole packets.
  const int lane = threadIdx.x % 32;
  auto place = [&](int col) { return (col - lane * VEC) * 4 + lane * 16; };
  auto upper = [&](int col) { return min(32, (WIDTH - (col - lane * VEC)) / VEC) * 16; };

#pragma unroll
  for (int i = 0; i < PER; i++) {
    const int col = column(i);
    if (col >= WIDTH) continue;
#if RESULTS
    load_partial(a.partial, row, col, v[i]);
    mine[i] = make_uint4(pack_bf16(v[i][0], v[i][1]), pack_bf16(v[i][2], v[i][3]), pack_bf16(v[i][4], v[i][5]),
                         pack_bf16(v[i][6], v[i][7]));
#else
    mine[i] = *(const uint4*)(a.partial.sum + row * WIDTH + col);
#endif
    for (int p = 1; p < a.world; p++) {
      const int to = (a.rank + p) % a.world;
      u8* at = slot(to, a.rank) + place(col);
      push(at, mine[i].x, mine[i].y, flag);
      push(at + upper(col), mine[i].z, mine[i].w, flag);
    }
  }
#pragma unroll
  for (int i = 0; i < PER; i++) {
    const int col = column(i);
#pragma unroll
    for (int k = 0; k < VEC; k++) v[i][k] = 0.f;
    if (col >= WIDTH) continue;
    float residual[VEC];
    if (!BEGINS) load_values(a.x + row * WIDTH + col, residual);
    for (int from = 0; from < a.world; from++) {
      uint4 q = mine[i];
      if (from != a.rank) {
        const u8* at = slot(a.rank, from) + place(col);
        const u8* const pieces[2] = {at, at + upper(col)};
        uint2 got[2];
        pull(pieces, got, flag, from, a.stop);
        q = make_uint4(got[0].x, got[0].y, got[1].x, got[1].y);
      }
      const u32 words[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
      for (int k = 0; k < VEC; k++) v[i][k] += k & 1 ? bf16_hi(words[k / 2]) : bf16_lo(words[k / 2]);
    }
#pragma unroll
    for (int k = 0; k < VEC && !BEGINS; k++) v[i][k] += residual[k];
    if (a.bias) {
      load_values(a.bias + col, residual);
#pragma unroll
      for (int k = 0; k < VEC; k++) v[i][k] += residual[k];
    }
    store_values(a.x + row * WIDTH + col, v[i]);
  }
  finish_norm(v, w, a.eps, a.out + row * WIDTH);
  if (threadIdx.x == 0) a.calls[row] = flag;
}
#endif
