// Per row of fp32 logits: log-sum-exp, the greedy choice, and whether any is NaN. One CTA a row.
//
// A warp sums a chunk of 1024 weights: 8 runs of 128, four a lane, so that the tree of adjacent pairs is: in the lane, over the warp, over the
// runs. Chunks fold left, ascending, in one thread.
//
// Macros: VOCAB
#define WARPS 32
#define CHUNKS ((VOCAB + 1023) / 1024)

struct Result {
    float log_sum_exp, best;
    u32 token, nan;
};

__device__ __forceinline__ float4 load4(const float* row, int i, float missing) {
    if (VOCAB % 4 == 0) return i < VOCAB ? *(const float4*)(row + i) : make_float4(missing, missing, missing, missing);
    return make_float4(i < VOCAB ? row[i] : missing, i + 1 < VOCAB ? row[i + 1] : missing, i + 2 < VOCAB ? row[i + 2] : missing,
                       i + 3 < VOCAB ? row[i + 3] : missing);
}
__device__ __forceinline__ float cap(float x) { return x > F32_MAX ? F32_MAX : x; }

extern "C" __global__ void __launch_bounds__(32 * WARPS) logits_row(const float* __restrict__ logits, Result* __restrict__ out) {
    __shared__ float sums[CHUNKS];
    __shared__ float best_of[WARPS];
    __shared__ u32 token_of[WARPS], nan_of[WARPS];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    launch_dependents();
    wait_for_producers();
    const float* const row = logits + (u64)blockIdx.x * VOCAB;

    float best = -INFINITE;
    u32 token = ~0u, nan = 0;
    // Ascending ids in a lane: the first of equals stays.
    auto take = [&](float x, u32 id) {
        nan |= x != x;
        x = cap(x);
        if (x > best) best = x, token = id;
    };
    for (int i = 4 * threadIdx.x; i < VOCAB; i += 128 * WARPS) {
        const float4 v = load4(row, i, -INFINITE);
        take(v.x, i), take(v.y, i + 1), take(v.z, i + 2), take(v.w, i + 3);
    }
    auto merge = [&](float other, u32 id, u32 bad) {
        nan |= bad;
        if (other > best || (other == best && id < token)) best = other, token = id;
    };
    auto merge_warp = [&]() {
#pragma unroll
        for (int bit = 1; bit < 32; bit *= 2) {
            const float other = __shfl_xor_sync(0xFFFFFFFFu, best, bit);
            const u32 id = __shfl_xor_sync(0xFFFFFFFFu, token, bit), bad = __shfl_xor_sync(0xFFFFFFFFu, nan, bit);
            merge(other, id, bad);
        }
    };
    merge_warp();
    if (lane == 0) best_of[warp] = best, token_of[warp] = token, nan_of[warp] = nan;
    __syncthreads();
    best = best_of[lane], token = token_of[lane], nan = nan_of[lane];
    merge_warp(); // every warp for itself

    for (int c = warp; c < CHUNKS; c += WARPS) {
        float runs[8];
#pragma unroll
        for (int r = 0; r < 8; r++) {
            const float4 v = load4(row, 1024 * c + 128 * r + 4 * lane, -INFINITE);
            auto weight = [&](float x) { return exp2_full(__fmul_rn(__fsub_rn(cap(x), best), LOG2_E)); };
            const float four[4] = {weight(v.x), weight(v.y), weight(v.z), weight(v.w)};
            runs[r] = warp_tree(tree_of(four));
        }
        if (lane == 0) sums[c] = tree_of(runs);
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    float sum = 0.f;
    for (int c = 0; c < CHUNKS; c++) sum = __fadd_rn(sum, sums[c]);
    const float lse = best == -INFINITE ? best : __fmaf_rn(LN2, log2_full(sum), best);
    out[blockIdx.x] = {lse, best, token, nan};
}
