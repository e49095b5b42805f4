// Top-k and top-p filters, then Gumbel-max (with min-p) over what is kept. One block a row.

__device__ __forceinline__ u64 block_max(Shared& s, u64 v) {
    v = warp_max(v);
    if (threadIdx.x == 0) s.best = 0;
    __syncthreads();
    if (threadIdx.x % 32 == 0 && v) atomicMax(&s.best, v);
    __syncthreads();
    return s.best;
}

extern "C" __global__ void __launch_bounds__(BLOCK, 2)
    filter(const float* __restrict__ logits, const float* __restrict__ kept, const Row* __restrict__ rows, const u32* __restrict__ list,
           const float* __restrict__ runs, const u32* __restrict__ largest, Answer* answers) {
    __shared__ Shared s;
    launch_dependents();
    wait_for_producers();
    const u32 r = list[blockIdx.x];
    const u32 least = load_largest(s, largest + (u64)r * GROUPS);
    const Row& row = rows[r];
    if (!has_answer(row, answers[r])) return;
    const u64 best = answers[r].best;
    const float max = value_of((u32)(best >> 32));
    const Rows order(s, changed(row, logits, kept), best, least);
    const bool limited = row.top_k > 0 && row.top_k < VOCAB;
    const u32 limit = limited ? row.top_k : VOCAB;

    Rows::Prefix prefix = {0.f, 0, 0};
    if (row.top_p < 1.f) {
        First first = {0, 0};
        const float all = limited ? order.walk({max, NEVER, limit}, first).sum : fold_chunks(s, runs + (u64)r * CHUNKS * 8);
        prefix = order.walk({max, __fmul_rn(row.top_p, all), limit}, first);
    } else if (limit <= BATCH / 4) {
        Walk start = {best, 0, 0.f};
        if (order.next(start, limit, nullptr) >= limit) prefix = {0.f, s.batch[limit - 1], limit};
    }
    if (prefix.last == 0 && limited) prefix.last = order.kth(limit);

    Leader leader;
    u64 winner = 0;
    if (prefix.batch > 0) {
        for (u32 i = threadIdx.x; i < prefix.batch; i += BLOCK) {
            const u32 id = id_of(s.batch[i]);
            const float value = value_of((u32)(s.batch[i] >> 32)); // a zero without its sign: no score or weight has another value for that
            if (!(value > -INFINITE) || !passes_min_p(value, max, row.min_p)) continue;
            u32 words[4];
            philox(row, id / 4, words);
            const u32 word = id & 2 ? (id & 1 ? words[3] : words[2]) : (id & 1 ? words[1] : words[0]);
            const u64 score = entry(__fadd_rn(value, gumbel(word)), id);
            winner = score > winner ? score : winner;
        }
    } else {
        const u64 last = prefix.last;
        order.visit((u32)(last >> 32), [&](const float(&v)[4], int id) {
            leader.run(row, v, id, [&](float value, u32 token) { return entry(value, token) >= last && passes_min_p(value, max, row.min_p); });
        });
        winner = leader.key();
    }
    winner = block_max(s, winner);
    // By definition the best token passes min-p.
    if (threadIdx.x == 0) answers[r].race = winner ? winner : best;
}
