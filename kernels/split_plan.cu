// The work split of a decode step: one launch a step, shared by every layer and
// by both attention paths.
//
// All cached blocks of the batch, laid end to end, are cut into `teams` runs of
// equal length (to one block); or, where no run grows by more than a sixteenth,
// between sequences alone, for a sequence cut in two is written in parts that are
// read again, and every end of one leaves its CTA's pipeline empty. (64 sequences on
// two H200s: a step of 1024 tokens' Llama 1.1 % faster, of 8192 tokens' GLM 0.4 %.)
//
// A team is `row_groups` CTAs: CTA c of the attention kernel works on team
// c / row_groups and row group c % row_groups (a set of KV groups, or of query
// rows), so the row groups of one stretch of cache run side by side and what they
// share is read from memory once.
// The host picks teams = max(1, CTAs / row_groups).
//
// The part of sequence b that team t computes is partial result number b + t:
// unique, and at most batch + teams of them.

#define PLAN_THREADS 256
#define PLAN_MAX_BATCH 4096
#define PLAN_MAX_TEAMS 1024

struct SplitPlan {
  const int* lens;  // [batch] tokens in the cache, the new ones included; 0 is padding
  int4* team;       // [teams] {first sequence, its first block, blocks in all, its tokens}
  int2* seq;        // [batch] {first partial result, number of them}
  int batch;        // at most PLAN_MAX_BATCH
  int teams;
  int min_blocks;   // a team gets no fewer; 0: weigh a part's blocks against the number of parts to combine
};

// A block of a part costs the attention kernel about PART_COST times what a part
// of a sequence costs the combination; the sum of both is least here. (Seen on an
// H200 with one sequence of 1024 to 16384 tokens.)
#define PART_COST 20.f

DEVICE int balanced_teams(int blocks, int sequences) {
  const int most = max(1, min(blocks, (int)sqrtf(PART_COST * (float)blocks * (float)sequences)));
  return ceil_div(blocks, ceil_div(blocks, most));  // no more than the longest part needs
}

// Gives every team whole sequences, at most `most` blocks of them; false where the teams do not suffice.
DEVICE bool plan_whole(const SplitPlan& a, const int* start, int most) {
  __shared__ u16 next[PLAN_MAX_BATCH];        // where a team that begins with sequence b ends
  __shared__ u16 first[PLAN_MAX_TEAMS + 1];   // of team t
  __shared__ int filled;                      // teams
  const int tid = threadIdx.x, teams = min(a.teams, PLAN_MAX_TEAMS);
  for (int b = tid; b < a.batch; b += PLAN_THREADS) {
    int lo = b, hi = a.batch;
    while (lo < hi) {
      const int mid = (lo + hi + 1) >> 1;
      if (start[mid] - start[b] <= most) lo = mid; else hi = mid - 1;
    }
    next[b] = (u16)lo;
  }
  __syncthreads();
  if (tid == 0) {
    int t = 0, b = 0;
    for (; t < teams && b < a.batch && next[b] > b; b = next[b]) first[t++] = (u16)b;
    first[t] = (u16)b;
    filled = b == a.batch ? t : 0;
  }
  __syncthreads();
  if (filled == 0) return false;
  for (int t = tid; t < a.teams; t += PLAN_THREADS) {
    const int from = t < filled ? first[t] : 0, to = t < filled ? first[t + 1] : 0;
    a.team[t] = make_int4(from, 0, start[to] - start[from], t < filled ? a.lens[from] : 0);
    for (int b = from; b < to; b++) a.seq[b] = start[b + 1] > start[b] ? make_int2(b + t, 1) : make_int2(0, 0);
  }
  return true;
}

// grid 1, block PLAN_THREADS
extern "C" __global__ void __launch_bounds__(PLAN_THREADS) split_plan(const SplitPlan a) {
  __shared__ int start[PLAN_MAX_BATCH + 1];  // blocks before sequence b
  __shared__ int sequences;                  // that are not padding
  const int tid = threadIdx.x;
  grid_wait();

  for (int b = tid; b < a.batch; b += PLAN_THREADS) start[b + 1] = ceil_div(max(a.lens[b], 0), BLOCK);
  __syncthreads();
  if (tid < 32) {
    int sum = 0, filled = 0;
    for (int base = 0; base < a.batch; base += 32) {
      const int b = base + tid;
      int x = b < a.batch ? start[b + 1] : 0;
      filled += __popc(__ballot_sync(0xffffffffu, x > 0));
#pragma unroll
      for (int o = 1; o < 32; o <<= 1) {
        const int y = __shfl_up_sync(0xffffffffu, x, o);
        if (tid >= o) x += y;
      }
      if (b < a.batch) start[b + 1] = sum + x;
      sum += __shfl_sync(0xffffffffu, x, 31);
    }
    if (tid == 0) start[0] = 0, sequences = filled;
  }
  __syncthreads();

  // The first `extra` teams take `each` + 1 blocks, the others `each`.
  const int total = start[a.batch];
  const int used = max(1, min(a.teams, a.min_blocks > 0 ? total / a.min_blocks : balanced_teams(total, sequences)));
  const int each = total / used, extra = total % used;

  const int longest = ceil_div(total, used);
  if (sequences >= used - used / 16 && plan_whole(a, start, longest + longest / 16)) return;

  for (int t = tid; t < a.teams; t += PLAN_THREADS) {
    int4 w = make_int4(0, 0, 0, 0);
    if (t < used) {
      const int first = t * each + min(t, extra);
      w.z = each + (t < extra ? 1 : 0);
      int lo = 0, hi = a.batch - 1;  // the last sequence that starts at or before `first`
      while (lo < hi) {
        const int mid = (lo + hi + 1) >> 1;
        if (start[mid] <= first) lo = mid; else hi = mid - 1;
      }
      w.x = lo;
      w.y = first - start[lo];
      w.w = a.lens[lo];
    }
    a.team[t] = w;
  }

  for (int b = tid; b < a.batch; b += PLAN_THREADS) {
    int2 s = make_int2(0, 0);
    if (start[b + 1] > start[b]) {
      int owner[2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int block = i ? start[b + 1] - 1 : start[b];
        const int longer = extra * (each + 1);
        owner[i] = block < longer ? block / (each + 1) : extra + (block - longer) / max(1, each);
      }
      s = make_int2(b + owner[0], owner[1] - owner[0] + 1);
    }
    a.seq[b] = s;
  }
}
