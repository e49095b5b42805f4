// Shared by the attention kernels: what a block works on, and how partial results join.

// Rows of a sequence in this step: its first row in the batch, their number, tokens in the cache before them, where its block table starts.
struct Seq {
    u32 first_row, rows, context, table;
};
// A piece of work: first row (token-major, head of the group), where its partial results go, in splits, and the tiles of a split where
// the host decides them (FREE).
struct Item {
    u32 seq, row, partial, split_tiles;
};

// A softmax over some keys of one row: its values and l are scaled by 2^-m.
struct Weights {
    float m, l;
};
// The factors by which two partial results join; a is the earlier one and becomes the join's own weights.
__device__ __forceinline__ float2 fold(Weights& a, Weights b) {
    const float m = larger(a.m, b.m), wa = pow2i(__fsub_rn(a.m, m)), wb = pow2i(__fsub_rn(b.m, m));
    a = {m, __fmaf_rn(a.l, wa, __fmul_rn(b.l, wb))};
    return make_float2(wa, wb);
}
__device__ __forceinline__ float join(float a, float b, float2 w) { return __fmaf_rn(a, w.x, __fmul_rn(b, w.y)); }
// The last add makes the sign of a zero canonical.
__device__ __forceinline__ float finish(float o, float inverse) { return __fadd_rn(__fmul_rn(o, inverse), 0.f); }
