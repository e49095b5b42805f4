// Shared by the linears: how leaves join and how an output is written.
//
// Macros: N K LEAVES TREE LOGITS [SILU]

// SILU: the matrix is gate rows, then as many up rows, and the output SiLU(gate) * up.
#ifndef SILU
#define SILU 0
#endif
static_assert(LEAVES == 1 || K % (64 * LEAVES) == 0, "a leaf is whole blocks of 64 k");
static_assert(!SILU || (LEAVES == 1 && N % 16 == 0 && !LOGITS), "gates and ups are whole sums, 8 by 8");

__device__ __forceinline__ float add(float p, float q) { return __fadd_rn(p, q); }
__device__ __forceinline__ float4 add(float4 p, float4 q) { return make_float4(add(p.x, q.x), add(p.y, q.y), add(p.z, q.z), add(p.w, q.w)); }

// v[0] becomes the sum of all, as a tree of adjacent pairs or from the first to the last: the device twin of ops::exact::join_leaves.
template <int COUNT, class T> __device__ __forceinline__ void join_leaves(T (&v)[COUNT]) {
    if (TREE) {
#pragma unroll
        for (int h = 1; h < COUNT; h *= 2)
#pragma unroll
            for (int i = 0; i < COUNT; i += 2 * h) v[i] = add(v[i], v[i + h]);
    } else {
#pragma unroll
        for (int i = 1; i < COUNT; i++) v[0] = add(v[0], v[i]);
    }
}

// Output n of row m: a logit as it is, all else rounded once.
__device__ __forceinline__ void write_output(void* y, long m, int n, float v) {
    if (LOGITS) ((float*)y)[m * N + n] = v;
    else ((bf16*)y)[m * N + n] = (bf16)pack_bf16(v, 0.f);
}
