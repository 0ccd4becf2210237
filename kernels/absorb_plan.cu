// The work split of a decode step for the absorb path, with split_plan's outputs:
// runs of consecutive cache blocks, one a team (see split_plan.cu).
//
// Here arithmetic, not only bytes, is what a team is short of, and a part of a
// sequence costs more than its blocks: it fills and drains the pipeline, writes
// its rows in f32 and has them read again. So a sequence is cut only if that lowers
// the longest team's cost, where a whole sequence costs its blocks + 1 and a part of
// one its blocks + part_cost: 64 sequences of 8192 tokens on 66 teams stay whole.
//
// Every warp tries one limit on a team's cost, filling team after team, either
// cutting only what no team can take whole or cutting wherever a team has room left;
// the lowest limit that fits is written out.

#define PLAN_WARPS 32
#define PLAN_MAX_BATCH 4096

struct AbsorbPlan {
  const int* lens;  // [batch] tokens in the cache, the new ones included; 0 is padding
  int4* team;       // [teams] {first sequence, its first block, blocks in all, tokens of that sequence}
  int2* seq;        // [batch] {first partial result, number of them}
  int batch;        // at most PLAN_MAX_BATCH
  int teams;
  int part_cost;    // in blocks; 4 is right for one query tile of 64 rows
};

// Fills teams up to cost `limit`; false if they do not suffice. A whole warp runs it.
template <bool WRITE>
DEVICE bool fill_teams(const AbsorbPlan& a, const u16* blocks, int limit, bool cut, int lane) {
  const int most = limit - a.part_cost; // blocks of a part that has a team to itself
  if (most < 1) return false;
  int team = 0, room = limit, run = 0, run_seq = 0, run_block = 0; // the open team
  auto close = [&]() {
    if (WRITE && lane == 0) a.team[team] = make_int4(run_seq, run_block, run, a.lens[run_seq]);
    team++, room = limit, run = 0;
  };
  for (int b = 0; b < a.batch; b++) {
    int n = blocks[b], at = 0;
    if (n == 0) {
      if (WRITE && lane == 0) a.seq[b] = make_int2(0, 0);
      continue;
    }
    if (n + 1 > room) {
      // Not whole into this team: a first part of it, if that is worth its cost.
      const int here = room - a.part_cost;
      if (run > 0 && ((n + 1 <= limit && !cut) || here < a.part_cost)) close();
    }
    if (team >= a.teams) return false;
    const int first = team;
    if (run == 0) run_seq = b, run_block = 0;
    if (n + 1 <= room) {
      run += n, room -= n + 1;
    } else {
      const int here = room - a.part_cost;
      run += here, at = here, n -= here;
      close();
      const int full = (n + most - 1) / most - 1; // teams that a middle part fills
      if (team + full >= a.teams) return false;
      if (WRITE)
        for (int i = lane; i < full; i += 32) a.team[team + i] = make_int4(b, at + i * most, most, a.lens[b]);
      team += full, at += full * most, n -= full * most;
      run_seq = b, run_block = at, run = n, room = limit - n - a.part_cost;
    }
    if (WRITE && lane == 0) a.seq[b] = make_int2(b + first, team - first + 1);
  }
  if (run > 0) close();
  if (WRITE)
    for (int i = team + lane; i < a.teams; i += 32) a.team[i] = make_int4(0, 0, 0, 0);
  return true;
}

// grid 1, block 32 * PLAN_WARPS
extern "C" __global__ void __launch_bounds__(32 * PLAN_WARPS) absorb_plan(const AbsorbPlan a) {
  __shared__ u16 blocks[PLAN_MAX_BATCH];
  __shared__ int total, best;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) total = 0, best = 0x7fffffff;
  __syncthreads();
  grid_wait();

  int sum = 0;
  for (int b = threadIdx.x; b < a.batch; b += 32 * PLAN_WARPS) {
    const int n = ceil_div(max(a.lens[b], 0), BLOCK);
    blocks[b] = (u16)n;
    sum += n > 0 ? n + 1 : 0;
  }
  if (sum > 0) atomicAdd(&total, sum);
  __syncthreads();

  // No limit under the average can do. One that leaves every team two parts' cost
  // to waste always does, so the search ends in its first rounds.
  const int lowest = max(ceil_div(total, a.teams), a.part_cost + 1);
  const int slack = 2 + lowest / 64; // what cutting must save, for there is more to combine
  for (int i = warp;; i += PLAN_WARPS) {
    const bool cut = i & 1;
    const int limit = lowest + i / 2 + (cut ? 0 : slack);
    if (fill_teams<false>(a, blocks, limit, cut, lane) && lane == 0) atomicMin(&best, i);
    __syncthreads();
    const int found = best;
    if (found != 0x7fffffff) {
      if (found == i) fill_teams<true>(a, blocks, limit, cut, lane);
      return;
    }
    __syncthreads();
  }
}
