// Shared by the attention kernels: what a block works on, how it reads shared memory, and how partial results join.
//
// Macros: D GROUP KV_HEADS [FREE]
#define HEADS (GROUP * KV_HEADS)
#define TILE 64                    // keys
#define TILE_BYTES (TILE * D * 2)  // of keys, or of values
#define SLAB (TILE * 128)          // 64 elements of every key of a tile
#ifndef FREE
#define SPLIT_TILES 8              // of a split: ops::contract::ATTN_SPLIT_KEYS, asserted by src/attention/tiling.rs
#endif
static_assert(D % 64 == 0, "rows of the swizzle are 64 elements");

// Rows of a sequence in this step: its first row in the batch, their number, tokens in the cache before them, where its block table starts.
struct Seq {
    u32 first_row, rows, context, table;
};
// A piece of work: first row (token-major, head of the group), where its partial results go, in splits, and the tiles of a split where
// the host decides them (FREE).
struct Item {
    u32 seq, row, partial, split_tiles;
};
// The rows of an item: (token, head of the group) pairs of one sequence and one key/value head, token-major.
struct Rows {
    u32 row, first_row, context, table;
    int count; // none or less: the item is padding
    __device__ __forceinline__ Rows(const Item& item, const Seq& seq, int most)
        : row(item.row), first_row(seq.first_row), context(seq.context), table(seq.table), count(min((int)(seq.rows * GROUP) - (int)item.row, most)) {}
    // Keys that any row attends to.
    __device__ __forceinline__ int end() const { return context + (row + count - 1) / GROUP + 1; }
    // The last key that a row attends to. Rows past the item do as the last one does; nothing of them is written.
    __device__ __forceinline__ int position(int i) const { return context + (row + min(i, count - 1)) / GROUP; }
    // Index of the row's first element in q and out.
    __device__ __forceinline__ u64 element(int i, int kv_head) const {
        const u32 r = row + i;
        return ((u64)(first_row + r / GROUP) * HEADS + kv_head * GROUP + r % GROUP) * D;
    }
};

__device__ __forceinline__ void ldmatrix4(u32 (&r)[4], u32 addr) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(addr) : "memory");
}
__device__ __forceinline__ void ldmatrix4_trans(u32 (&r)[4], u32 addr) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(addr) : "memory");
}
// Other blocks' results: past L1.
__device__ __forceinline__ float load_l2(const float* p) {
    float v;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ float2 load2_l2(const float* p) {
    float2 v;
    asm volatile("ld.global.cg.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ float4 load4_l2(const float* p) {
    float4 v;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p) : "memory");
    return v;
}
// One thread of each of `splits` blocks says that its block has written, after a barrier of the block; true for the last one, which may then
// read all they wrote, after a barrier again. Leaves `count` as it was.
__device__ __forceinline__ bool last_to_arrive(u32* count, int splits) {
    __threadfence(); // of all threads' results: the barrier came before
    const bool last = atomicAdd(count, 1) == splits - 1;
    if (last) *count = 0;
    __threadfence();
    return last;
}

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

// The sum over the four lanes that share a row of an m16n8k16 tile, in the order of the contract.
__device__ __forceinline__ float quad_sum(float v) {
    v = __fadd_rn(v, __shfl_xor_sync(0xFFFFFFFFu, v, 1));
    return __fadd_rn(v, __shfl_xor_sync(0xFFFFFFFFu, v, 2));
}
// The weight of a score under the maximum m.
__device__ __forceinline__ float weight_of(float score, float scale_log2, float m) { return exp2_poly3(fmaxf(-125.f, __fmaf_rn(score, scale_log2, -m))); }
