// RMSNorm of rows of D, one CTA a row; with RESIDUAL, residual = bf16(residual + delta) first.
//
// Virtual lane 8 t + e of the square sum is element e of thread t: thread t holds elements 1024 c + 8 t .. + 7 for each c, a chain
// over c in each lane, then the tree of adjacent pairs: in the thread, over the warp, over the four warps.
//
// Macros: D UNIT_OFFSET RESIDUAL
#define CHUNKS ((D + 1023) / 1024)

__device__ __forceinline__ uint4 load8(const bf16* row, int i) {
    if (D % 8 == 0) return i < D ? *(const uint4*)(row + i) : make_uint4(0, 0, 0, 0);
    u32 v[4];
#pragma unroll
    for (int p = 0; p < 4; p++) v[p] = (i + 2 * p < D ? (u32)row[i + 2 * p] : 0) | (i + 2 * p + 1 < D ? (u32)row[i + 2 * p + 1] << 16 : 0);
    return make_uint4(v[0], v[1], v[2], v[3]);
}
__device__ __forceinline__ void store8(bf16* row, int i, uint4 v) {
    if (D % 8 == 0) {
        if (i < D) *(uint4*)(row + i) = v;
        return;
    }
    const u32 w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int e = 0; e < 8; e++)
        if (i + e < D) row[i + e] = (bf16)(w[e / 2] >> (e % 2 * 16));
}
// f on each of 8 pairs of elements.
template <class F> __device__ __forceinline__ uint4 zip8(uint4 a, uint4 b, F f) {
    auto pair = [&](u32 a, u32 b) { return pack_bf16(f(lo_bf16(a), lo_bf16(b)), f(hi_bf16(a), hi_bf16(b))); };
    return make_uint4(pair(a.x, b.x), pair(a.y, b.y), pair(a.z, b.z), pair(a.w, b.w));
}

extern "C" __global__ void __launch_bounds__(128)
    rms_norm(bf16* x, const bf16* __restrict__ delta, const bf16* __restrict__ w, bf16* __restrict__ out, float eps) {
    __shared__ float warp_sums[4];
    launch_dependents();
    const int first = 8 * threadIdx.x;
    uint4 weight[CHUNKS]; // the previous kernel does not write it
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) weight[c] = load8(w, 1024 * c + first);
    wait_for_producers();
    bf16* const row = x + (u64)blockIdx.x * D;
    uint4 v[CHUNKS];
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) v[c] = load8(row, 1024 * c + first);
    if (RESIDUAL) {
        const bf16* const add = delta + (u64)blockIdx.x * D;
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            v[c] = zip8(v[c], load8(add, 1024 * c + first), [](float r, float d) { return __fadd_rn(r, d); });
            store8(row, 1024 * c + first, v[c]);
        }
    }
    float lanes[8] = {0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        const u32 p[4] = {v[c].x, v[c].y, v[c].z, v[c].w};
#pragma unroll
        for (int e = 0; e < 8; e++) {
            const float value = e % 2 ? hi_bf16(p[e / 2]) : lo_bf16(p[e / 2]);
            lanes[e] = __fmaf_rn(value, value, lanes[e]); // elements past D are +0 and change nothing
        }
    }
    const float sum = warp_tree(tree_of(lanes));
    if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = sum;
    __syncthreads();
    const float total = __fadd_rn(__fadd_rn(warp_sums[0], warp_sums[1]), __fadd_rn(warp_sums[2], warp_sums[3]));
    const float r = rms_scale(total, D, eps);
    bf16* const to = out + (u64)blockIdx.x * D;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        auto scale = [&](float x, float w) { return rms_scaled<UNIT_OFFSET>(x, r, w); };
        store8(to, 1024 * c + first, zip8(v[c], weight[c], scale));
    }
}
