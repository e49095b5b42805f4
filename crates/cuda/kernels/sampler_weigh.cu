// Second pass over rows whose maximum is known: sums of weights, ranks, and Gumbel-max with min-p. Grid: (parts of a row, rows of `list`).
//
// A warp sums runs of 128 weights, four a lane: the lower seven levels of the tree of adjacent pairs over a chunk of 1024. `runs` holds
// eight of them a chunk; who reads them adds the upper three levels and folds the chunks.

extern "C" __global__ void __launch_bounds__(THREADS, 6)
    weigh(const float* __restrict__ logits, const float* __restrict__ kept, const Row* __restrict__ rows, const u32* __restrict__ list, int raw,
          float* __restrict__ runs, Answer* answers) {
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
    launch_dependents();
    wait_for_producers();
    const u32 r = list[blockIdx.y];
    const Row& row = rows[r];
    Answer& answer = answers[r];
    if (!has_answer(row, answer)) return;
    const float* const from = raw ? logits + (u64)row.logits * VOCAB : kept + (u64)row.kept * VOCAB;
    const float max = value_of(raw ? answer.raw_best : (u32)(answer.best >> 32));
    const u32 token = raw ? reported(row, answer) : 0;
    const u64 own = raw ? entry(from[token], token) : 0;
    const bool sums = raw ? answer.raw_best != 0 : (row.flags & WHOLE_SUM) != 0, race = !raw && (row.flags & LATE_RACE);
    float* const to = runs + (u64)r * CHUNKS * 8;

    Leader leader;
    u32 better = 0;
    for (int unit = blockIdx.x; unit < UNITS; unit += gridDim.x) {
        float x[UNIT / 1024][4];
#pragma unroll
        for (int j = 0; j < UNIT / 1024; j++) load4(from, unit * UNIT + 1024 * j + 4 * tid, x[j]);
#pragma unroll
        for (int j = 0; j < UNIT / 1024; j++) {
            const int first = unit * UNIT + 1024 * j, id = first + 4 * tid;
            if (sums) {
                const float four[4] = {weight(x[j][0], max), weight(x[j][1], max), weight(x[j][2], max), weight(x[j][3], max)};
                const float run = warp_tree(tree_of(four));
                if (lane == 0 && first < CHUNKS * 1024) to[first / 128 + warp] = run;
            }
            if (raw) {
#pragma unroll
                for (int e = 0; e < 4; e++) better += id + e < VOCAB && entry(x[j][e], id + e) > own;
            }
            if (race) leader.run(row, x[j], id, [&](float value) { return passes_min_p(value, max, row.min_p); });
        }
    }
    better = __reduce_add_sync(ALL_LANES, better);
    const u64 winner = warp_max(leader.key());
    if (lane == 0 && better) atomicAdd(&answer.better, better);
    if (lane == 0 && winner) atomicMax(&answer.race, winner);
    if (raw && blockIdx.x == 0 && tid == 0) answer.own = __float_as_uint(from[token]);
}
