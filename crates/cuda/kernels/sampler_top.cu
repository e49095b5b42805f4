// Log-sum-exp of a row and its best tokens: (id, bits of the logit) from `tops[top_at]` on. One block a row.

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
