// First pass over a step's rows: NaN, the largest raw and changed logit, Gumbel-max without filters. Rows that have filters leave
// their changed logits and the largest of each group for the later passes; logits themselves stay as they are. Grid: (parts of a row, rows).

// Applies bias, penalties and forbidden tokens to the block's UNIT tokens from `base` on, which pass through shared memory.
__device__ __forceinline__ void edit(const Row& row, const u32* words, int base, float (&x)[UNIT / 1024][4], float* values, u32* counts) {
    const int tid = threadIdx.x;
    __syncthreads();
#pragma unroll
    for (int j = 0; j < UNIT / 1024; j++) {
        *(float4*)(values + 1024 * j + 4 * tid) = make_float4(x[j][0], x[j][1], x[j][2], x[j][3]);
        *(uint4*)(counts + 1024 * j + 4 * tid) = make_uint4(0, 0, 0, 0);
    }
    __syncthreads();
    // Biases come sorted by id, those of one id in their order: its first one's thread adds all.
    for (u32 i = tid; i < row.bias_len; i += THREADS) {
        const u32 id = words[row.bias + 2 * i], at = id - base;
        if (at >= UNIT || (i > 0 && words[row.bias + 2 * (i - 1)] == id)) continue;
        float v = values[at];
        for (u32 k = i; k < row.bias_len && words[row.bias + 2 * k] == id; k++) v = settle(__fadd_rn(cap(v), __uint_as_float(words[row.bias + 2 * k + 1])));
        values[at] = v;
    }
    if (row.flags & (REPETITION | COUNTED)) {
        // Low bits: occurrences in the output; the top bit: in the prompt.
        for (u32 i = tid; i < row.output_len; i += THREADS) {
            const u32 at = words[row.output + i] - base;
            if (at < UNIT) atomicAdd(counts + at, 1u);
        }
        for (u32 i = tid; i < row.prompt_len; i += THREADS) {
            const u32 at = words[row.prompt + i] - base;
            if (at < UNIT) atomicOr(counts + at, 0x80000000u);
        }
        __syncthreads();
        for (int at = tid; at < UNIT; at += THREADS) {
            const u32 count = counts[at];
            if (count == 0) continue;
            float v = cap(values[at]);
            if (row.flags & REPETITION) v = settle(v > 0.f ? __fdiv_rn(v, row.repetition) : __fmul_rn(v, row.repetition));
            const u32 times = count & 0x7FFFFFFFu;
            if ((row.flags & COUNTED) && times) v = settle(__fsub_rn(__fsub_rn(v, __fmul_rn(row.frequency, __uint2float_rn(times))), row.presence));
            values[at] = v;
        }
    }
    __syncthreads();
    for (u32 i = tid; i < row.forbidden_len; i += THREADS) {
        const u32 at = words[row.forbidden + i] - base;
        if (at < UNIT) values[at] = -INFINITE;
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < UNIT / 1024; j++) {
        const float4 v = *(const float4*)(values + 1024 * j + 4 * tid);
        x[j][0] = v.x, x[j][1] = v.y, x[j][2] = v.z, x[j][3] = v.w;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 6)
    scan(const float* __restrict__ logits, const u32* __restrict__ words, const Row* __restrict__ rows, float* __restrict__ kept, u32* __restrict__ largest,
         Answer* answers) {
    __shared__ float values[UNIT];
    __shared__ u32 counts[UNIT];
    __shared__ u64 best_of[THREADS / 32], race_of[THREADS / 32];
    __shared__ float raw_of[THREADS / 32];
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
    launch_dependents();
    wait_for_producers();
    const Row& row = rows[blockIdx.y];
    const u32 flags = row.flags;
    const bool edited = row.bias_len | row.forbidden_len | (flags & (REPETITION | COUNTED));
    const float* const raw = logits + (u64)row.logits * VOCAB;

    Leader leader;
    float raw_best = -INFINITE, best = -INFINITE;
    u32 best_id = 0;
    bool nan = false;
    for (int unit = blockIdx.x; unit < UNITS; unit += gridDim.x) {
        const int base = unit * UNIT;
        float x[UNIT / 1024][4];
#pragma unroll
        for (int j = 0; j < UNIT / 1024; j++) load4(raw, base + 1024 * j + 4 * tid, x[j]);
#pragma unroll
        for (int j = 0; j < UNIT / 1024; j++) {
            const int id = base + 1024 * j + 4 * tid;
#pragma unroll
            for (int e = 0; e < 4; e++) nan |= x[j][e] != x[j][e], raw_best = fmaxf(raw_best, x[j][e]);
            if (flags & MASKED) {
                const u32 bits = (u32)id / 32 < row.mask_len ? words[row.mask + id / 32] >> id % 32 : 0;
#pragma unroll
                for (int e = 0; e < 4; e++) x[j][e] = bits >> e & 1 ? x[j][e] : -INFINITE;
            }
        }
        if (edited) edit(row, words, base, x, values, counts);
#pragma unroll
        for (int j = 0; j < UNIT / 1024; j++) {
            const int id = base + 1024 * j + 4 * tid;
            if (flags & SCALED) {
#pragma unroll
                for (int e = 0; e < 4; e++) x[j][e] = settle(__fdiv_rn(cap(x[j][e]), row.temperature));
            }
            // Ascending ids in a thread: the first of equals stays.
#pragma unroll
            for (int e = 0; e < 4; e++)
                if (cap(x[j][e]) > best) best = cap(x[j][e]), best_id = id + e;
            if (flags & SEARCHED) {
                const u32 of_group = __reduce_max_sync(ALL_LANES, value_key(largest_of(x[j])));
                if (lane == 0 && id < VOCAB) largest[(u64)blockIdx.y * GROUPS + id / GROUP] = of_group;
            }
            if (flags & STORE) {
                float* const to = kept + (u64)row.kept * VOCAB;
                if (VOCAB % 4 == 0) {
                    if (id < VOCAB) *(float4*)(to + id) = make_float4(x[j][0], x[j][1], x[j][2], x[j][3]);
                } else {
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        if (id + e < VOCAB) to[id + e] = x[j][e];
                }
            }
            if (flags & RACE) leader.run(row, x[j], id, [](float, u32) { return true; });
        }
    }

    const u64 mine = warp_max(best > -INFINITE ? entry(best, best_id) : 0), score = warp_max(leader.key());
    const u32 raw_key = __reduce_max_sync(ALL_LANES, value_key(raw_best)), any_nan = __any_sync(ALL_LANES, nan);
    if (lane == 0) best_of[warp] = mine, race_of[warp] = score, raw_of[warp] = value_of(raw_key);
    if (lane == 0 && any_nan) atomicOr(&answers[blockIdx.y].nan, 1u);
    __syncthreads();
    if (warp != 0) return;
    const bool in = lane < THREADS / 32;
    const u64 all = warp_max(in ? best_of[lane] : 0), winner = warp_max(in ? race_of[lane] : 0);
    const u32 raw_max = __reduce_max_sync(ALL_LANES, in && raw_of[lane] > -INFINITE ? value_key(raw_of[lane]) : 0);
    if (lane != 0) return;
    Answer& answer = answers[blockIdx.y];
    if (all) atomicMax(&answer.best, all);
    if (winner) atomicMax(&answer.race, winner);
    if (raw_max) atomicMax(&answer.raw_best, raw_max);
}
