// Second pass over rows whose maximum is known: sums of weights, ranks, and Gumbel-max with min-p. Grid: (parts of a row, rows of `list`).
//
// A warp sums runs of 128 weights, four a lane: the lower seven levels of the tree of adjacent pairs over a chunk of 1024. `runs` holds
// eight of them a chunk; who reads them adds the upper three levels and folds the chunks. Over raw logits it also leaves the largest of each group.

#define TOGETHER 2 // groups that a warp loads at a time for a race

extern "C" __global__ void __launch_bounds__(THREADS, 6)
    weigh(const float* __restrict__ logits, const float* __restrict__ kept, const Row* __restrict__ rows, const u32* __restrict__ list, int raw,
          float* __restrict__ runs, u32* __restrict__ largest, Answer* answers) {
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
    launch_dependents();
    wait_for_producers();
    const u32 r = list[blockIdx.y];
    const Row& row = rows[r];
    Answer& answer = answers[r];
    if (!has_answer(row, answer)) return;
    const float* const raw_row = logits + (u64)row.logits * VOCAB;
    const Changed from = raw ? Changed{raw_row, 1.f, false} : changed(row, logits, kept);
    const float max = value_of(raw ? answer.raw_best : (u32)(answer.best >> 32));
    const u32 token = raw ? reported(row, answer) : 0;
    const float own = raw ? cap(raw_row[token]) : 0.f;
    const bool sums = raw ? answer.raw_best != 0 : (row.flags & WHOLE_SUM) != 0, race = !raw && (row.flags & LATE_RACE);
    float* const to = runs + (u64)r * CHUNKS * 8;
    u32* const of_groups = largest + (u64)r * GROUPS;

    Leader leader;
    u32 better = 0;
    if (race) {
        // A warp's share of groups is a lane's each, all warps having equally many; of these few have anybody who may pass.
        const int warps = gridDim.x * (THREADS / 32), shares = (GROUPS + 32 * warps - 1) / (32 * warps) * warps, share = (GROUPS + shares - 1) / shares;
        for (int first = share * (blockIdx.x * (THREADS / 32) + warp); first < GROUPS; first += share * warps) {
            const bool may = lane < share && first + lane < GROUPS && may_pass_min_p(value_of(of_groups[first + lane]), max, row.min_p);
            for (u32 left = __ballot_sync(ALL_LANES, may); left != 0;) {
                float x[TOGETHER][4];
                int id[TOGETHER];
#pragma unroll
                for (int j = 0; j < TOGETHER; j++) {
                    id[j] = left ? GROUP * (first + __ffs(left) - 1) + 4 * lane : GROUPS * GROUP;
                    left &= left - 1;
                    if (id[j] < GROUPS * GROUP) from.load(id[j], x[j]);
                }
#pragma unroll
                for (int j = 0; j < TOGETHER; j++)
                    if (id[j] < GROUPS * GROUP) leader.run(row, x[j], id[j], [&](float value, u32) { return passes_min_p(value, max, row.min_p); });
            }
        }
    }
    for (int unit = blockIdx.x; unit < UNITS && !race; unit += gridDim.x) {
        float x[UNIT / 1024][4];
#pragma unroll
        for (int j = 0; j < UNIT / 1024; j++) from.load(unit * UNIT + 1024 * j + 4 * tid, x[j]);
#pragma unroll
        for (int j = 0; j < UNIT / 1024; j++) {
            const int first = unit * UNIT + 1024 * j, id = first + 4 * tid;
            if (sums) {
                const float four[4] = {weight(x[j][0], max), weight(x[j][1], max), weight(x[j][2], max), weight(x[j][3], max)};
                const float run = warp_tree(tree_of(four));
                if (lane == 0 && first < CHUNKS * 1024) to[first / 128 + warp] = run;
            }
            if (!raw) continue;
            if (row.top > 0) {
                const u32 of_group = __reduce_max_sync(ALL_LANES, value_key(largest_of(x[j])));
                if (lane == 0 && id < VOCAB) of_groups[id / GROUP] = of_group;
            }
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const float value = cap(x[j][e]);
                better += id + e < VOCAB && (id + e < token ? value >= own : value > own);
            }
        }
    }
    better = __reduce_add_sync(ALL_LANES, better);
    const u64 winner = warp_max(leader.key());
    if (lane == 0 && better) atomicAdd(&answer.better, better);
    if (lane == 0 && winner) atomicMax(&answer.race, winner);
    if (raw && blockIdx.x == 0 && tid == 0) answer.own = __float_as_uint(raw_row[token]);
}
