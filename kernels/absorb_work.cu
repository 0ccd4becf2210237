// What the two kernels of absorb decode attention for Hopper have in common: their
// parameters, and a team's share of the paged latent cache (one key of DC + DR = 576
// columns a token, whose first DC = 512 columns are the value too). Their text follows
// this one.
//
// -D HEADS (local heads), SQ (query rows a sequence); DC, DR and BLOCK are 512, 64
// and 64 here, absorb_decode_portable.cu takes any.

#ifndef SQ
#define SQ 1
#endif
#if (defined(DC) && DC != 512) || (defined(DR) && DR != 64) || BLOCK != 64
#error "absorb_decode is for 512 + 64 columns in blocks of 64; use absorb_decode_portable"
#endif

#define DIM 576                                  // key columns
#define VDIM 512                                 // value columns
#define PANEL 8192                               // bytes: 64 tokens x 64 columns
#define PANELS 9
#define ROWS (HEADS * SQ)                        // query rows of a sequence
#define RESCALE 8.0f                             // log2 growth of the maximum that is let pass

struct AbsorbParams {
  const u16* q;           // bf16 [batch*SQ, HEADS, 576]
  const u16* cache;       // bf16 [num_blocks] tiles 64 x 576, swizzled panels
  const int* block_table; // [batch, max_blocks]
  const int* lens;        // [batch], tokens with the SQ new ones; 0 = padding
  const int4* team;       // [teams] {first sequence, its first block, blocks in all, tokens of that sequence}
  const int2* seq;        // [batch] {first partial result, number of them}
  u16* out;               // bf16 [batch*SQ, HEADS, 512], of sequences that one team has alone
  float* part_o;          // f32 [batch + teams, SQ, HEADS, 512], normalised: the others
  float* part_lse;        // f32 [batch + teams, SQ, HEADS], base 2
  int max_blocks;
  float scale;
};

// As common.cuh's matrix, but MN-major: 64-column panels 8 KiB apart, groups of 8 k 1024 bytes apart.
DEVICE u64 turned_matrix(u32 addr) { return (1ull << 62) | (64ull << 32) | ((u64)(PANEL / 16) << 16) | (u64)(addr >> 4); }

// A team's work: the blocks of its run, a sequence at a time.
struct Segment {
  int batch, begin, end; // blocks [begin, end) of sequence batch
  int len;               // its tokens
};
struct Work {
  int batch, block, left, len; // len 0: not known yet
};
DEVICE Work team_work(const AbsorbParams& p, int team) {
  int4 t = p.team[team];
  return Work{t.x, t.y, t.z, t.w};
}
DEVICE bool next_segment(const AbsorbParams& p, Work& w, Segment& s) {
  if (w.left <= 0) return false;
  while (true) {
    s.len = w.len > 0 ? w.len : p.lens[w.batch];
    if (ceil_div(s.len, BLOCK) > w.block) break;
    w.batch++, w.block = 0;
  }
  s.batch = w.batch, s.begin = w.block, s.end = min(ceil_div(s.len, BLOCK), w.block + w.left);
  w.left -= s.end - s.begin;
  w.batch++, w.block = 0, w.len = 0;
  return true;
}

// What stands in for slots past the end, which may hold NaN: 0 * NaN is NaN.
__device__ __align__(128) u8 absorb_zeros[PANEL];
