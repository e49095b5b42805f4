// What needs a row's tokens in order: top-k and top-p filters (`filter`), and the best tokens with their logprobs (`top`). One block a row.

__device__ __forceinline__ u64 block_max(Shared& s, u64 v) {
    v = warp_max(v);
    if (threadIdx.x == 0) s.best = 0;
    __syncthreads();
    if (threadIdx.x % 32 == 0 && v) atomicMax(&s.best, v);
    __syncthreads();
    return s.best;
}

// The chunks of 1024 weights, folded left, from runs of 128.
__device__ float fold_chunks(Shared& s, const float* runs) {
    float* const chunk = (float*)s.batch;
    static_assert(CHUNKS + 3 <= 2 * BATCH, "chunks fit the batch");
    __syncthreads();
    for (int c = threadIdx.x; c < (CHUNKS + 3) / 4 * 4; c += BLOCK) {
        float eight[8] = {}; // adding zeros changes nothing
        if (c < CHUNKS) {
            const float4 a = *(const float4*)(runs + 8 * c), b = *(const float4*)(runs + 8 * c + 4);
            eight[0] = a.x, eight[1] = a.y, eight[2] = a.z, eight[3] = a.w, eight[4] = b.x, eight[5] = b.y, eight[6] = b.z, eight[7] = b.w;
        }
        chunk[c] = tree_of(eight);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        float sum = 0.f;
#pragma unroll 4
        for (int c = 0; c < CHUNKS; c += 4) {
            const float4 w = *(const float4*)(chunk + c);
            sum = __fadd_rn(__fadd_rn(__fadd_rn(__fadd_rn(sum, w.x), w.y), w.z), w.w);
        }
        s.sum = sum;
    }
    __syncthreads();
    const float sum = s.sum;
    __syncthreads();
    return sum;
}

// The groups' largest; the least of them is returned.
__device__ __forceinline__ u32 load_largest(Shared& s, const u32* largest) {
    u32 least = ~0u;
    for (int g = threadIdx.x; g < GROUPS; g += BLOCK) {
        const u32 v = largest[g];
        s.largest[g] = v, least = min(least, v);
    }
    least = __reduce_min_sync(ALL_LANES, least);
    if (threadIdx.x % 32 == 0) s.scan[threadIdx.x / 32].x = least;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < WARPS; w++) least = min(least, s.scan[w].x);
    return least;
}

// Top-k and top-p, then Gumbel-max (with min-p) over what is kept.
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

// Log-sum-exp of a row and its best tokens: (id, bits of the logit) from `tops[top_at]` on.
extern "C" __global__ void __launch_bounds__(BLOCK, 2)
    top(const float* __restrict__ logits, const Row* __restrict__ rows, const u32* __restrict__ list, const float* __restrict__ runs,
        const u32* __restrict__ largest, uint2* __restrict__ tops, Answer* answers) {
    __shared__ Shared s;
    launch_dependents();
    wait_for_producers();
    const u32 r = list[blockIdx.x];
    const u32 least = load_largest(s, largest + (u64)r * GROUPS);
    const Row& row = rows[r];
    Answer& answer = answers[r];
    if (!has_answer(row, answer)) return;
    const float max = answer.raw_best ? value_of(answer.raw_best) : -INFINITE;
    const float sum = answer.raw_best ? fold_chunks(s, runs + (u64)r * CHUNKS * 8) : 0.f;
    if (threadIdx.x == 0) answer.log_sum_exp = answer.raw_best ? __fmaf_rn(LN2, log2_full(sum), max) : max;

    const u64 best = (u64)(answer.raw_best ? answer.raw_best : value_key(-INFINITE)) << 32 | 0xFFFFFFFFu;
    const float* const x = logits + (u64)row.logits * VOCAB;
    const Rows order(s, Changed{x, 1.f, false}, best, least);
    const u32 wanted = min(row.top, (u32)VOCAB);
    for (Walk at = {best, 0, 0.f}; at.high != 0 && at.taken < wanted;) {
        const u32 n = order.next(at, min(wanted - at.taken, (u32)BATCH), nullptr), use = min(n, wanted - at.taken);
        if (use == 0) break;
        for (u32 i = threadIdx.x; i < use; i += BLOCK) {
            const u32 id = id_of(s.batch[i]);
            tops[row.top_at + at.taken + i] = make_uint2(id, __float_as_uint(x[id]));
        }
        at.taken += use;
        __syncthreads();
    }
}
