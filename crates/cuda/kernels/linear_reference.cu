// The plainest linear in the hopper order: one warp a tile of 16 outputs x 8 tokens, leaf after leaf, straight from
// global memory. The referee of the fast kernels on the device itself, and part of the self-check.
//
// Macros: N K LEAVES TREE LOGITS [SILU]
extern "C" __global__ void __launch_bounds__(32) linear(const bf16* __restrict__ x, const bf16* __restrict__ w, void* __restrict__ y, int tokens) {
    const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
    launch_dependents();
    wait_for_producers();
    const int n0 = blockIdx.x * 16;
    const long m0 = (long)blockIdx.y * 8;
    auto pair = [](const bf16* p, bool row_exists, int k) -> u32 {
        u32 lo = row_exists && k < K ? p[k] : 0, hi = row_exists && k + 1 < K ? p[k + 1] : 0;
        return lo | hi << 16;
    };
    // SILU: rows 0 to 7 are gates, 8 to 15 their ups.
    const int row = SILU ? n0 / 2 + g : n0 + g;
    const bool a0 = row < N, a1 = SILU || row + 8 < N, b0 = m0 + g < tokens;
    const bf16 *w0 = w + (long)row * K, *w1 = w0 + (SILU ? N / 2 : 8) * (long)K, *x0 = x + (m0 + g) * K;
    constexpr int LEAF = (K + LEAVES - 1) / LEAVES;
    float v[4][LEAVES];
#pragma unroll
    for (int leaf = 0; leaf < LEAVES; leaf++) {
        float c[4] = {0.f, 0.f, 0.f, 0.f};
        for (int k = leaf * LEAF; k < (leaf + 1) * LEAF; k += 16) {
            int p = k + 2 * t;
            mma_16816(c, pair(w0, a0, p), pair(w1, a1, p), pair(w0, a0, p + 8), pair(w1, a1, p + 8), pair(x0, b0, p), pair(x0, b0, p + 8));
        }
        for (int q = 0; q < 4; q++) v[q][leaf] = c[q];
    }
    for (int q = 0; q < 4; q++) {
        join_leaves(v[q]);
        long m = m0 + 2 * t + (q & 1);
        int n = n0 + g + (q >> 1) * 8;
        if (m >= tokens || n >= N) continue;
        if (SILU) {
            if (q < 2) ((bf16*)y)[m * (N / 2) + n0 / 2 + g] = (bf16)silu_mul_pair(v[q][0], v[q + 2][0], 0.f, 0.f);
        } else write_output(y, m, n, v[q][0]);
    }
}
