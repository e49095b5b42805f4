// Splits a row of qkv into heads, one warp a head: RMSNorm of query and key heads (QK_NORM), rotation of their first ROT elements, queries
// to q_out, keys and values to the row's slot of the cache (block * 64 + token; a slot of ~0 stores nothing: padding of a
// captured batch). Layout of the cache: attention_paged.cu.
//
// Macros: D HEADS KV_HEADS ROT QK_NORM UNIT_OFFSET
#define PER_LANE (D / 32)
#define ALL (HEADS + 2 * KV_HEADS)
#define WARPS 4
static_assert(D == 64 || D == 128 || D == 256, "a lane holds an aligned run of the norm's tree");
static_assert(ROT % 2 == 0 && ROT <= D, "pairs of rotated elements");

extern "C" __global__ void __launch_bounds__(32 * WARPS)
    qkv_prep(const bf16* __restrict__ qkv, const bf16* __restrict__ q_norm, const bf16* __restrict__ k_norm, float eps, const float* __restrict__ cos,
             const float* __restrict__ sin, const u32* __restrict__ positions, const u32* __restrict__ slots, u8* __restrict__ kv, bf16* __restrict__ q_out) {
    __shared__ __align__(16) bf16 rows[WARPS][D];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, head = blockIdx.x * WARPS + warp;
    const u64 token = blockIdx.y;
    launch_dependents();
    if (head >= ALL) return;
    const bool is_q = head < HEADS, is_v = head >= HEADS + KV_HEADS;
    u32* const mine = (u32*)(rows[warp] + PER_LANE * lane);
    wait_for_producers();

    u32 x[PER_LANE / 2];
    const u32* const from = (const u32*)(qkv + (token * ALL + head) * D + PER_LANE * lane);
#pragma unroll
    for (int i = 0; i < PER_LANE / 2; i++) x[i] = from[i];
    if (QK_NORM && !is_v) {
        float squares[PER_LANE];
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            const float v = i % 2 ? hi_bf16(x[i / 2]) : lo_bf16(x[i / 2]);
            squares[i] = __fmul_rn(v, v);
        }
        const float sum = warp_tree(tree_of(squares));
        const float r = __frcp_rn(__fsqrt_rn(__fmaf_rn(sum, __frcp_rn((float)D), eps)));
        const u32* const w = (const u32*)((is_q ? q_norm : k_norm) + PER_LANE * lane);
        auto scale = [&](float x, float w) { return __fmul_rn(__fmul_rn(x, r), UNIT_OFFSET ? __fadd_rn(1.f, w) : w); };
#pragma unroll
        for (int i = 0; i < PER_LANE / 2; i++) x[i] = pack_bf16(scale(lo_bf16(x[i]), lo_bf16(w[i])), scale(hi_bf16(x[i]), hi_bf16(w[i])));
    }
    if (!is_v) {
#pragma unroll
        for (int i = 0; i < PER_LANE / 2; i++) mine[i] = x[i];
        __syncwarp();
        const u64 angle = (u64)positions[token] * (ROT / 2);
        auto rotated = [&](int i) -> float {
            const float a = bf16_to_f32(rows[warp][i]);
            if (i >= ROT) return a;
            const int pair = i % (ROT / 2);
            const float b = bf16_to_f32(rows[warp][i < ROT / 2 ? i + ROT / 2 : pair]), c = cos[angle + pair], s = sin[angle + pair];
            return i < ROT / 2 ? __fmaf_rn(a, c, -__fmul_rn(b, s)) : __fmaf_rn(a, c, __fmul_rn(b, s));
        };
#pragma unroll
        for (int i = 0; i < PER_LANE / 2; i++) x[i] = pack_bf16(rotated(PER_LANE * lane + 2 * i), rotated(PER_LANE * lane + 2 * i + 1));
    }
    u32* to;
    if (is_q) to = (u32*)(q_out + (token * HEADS + head) * D + PER_LANE * lane);
    else {
        const u32 slot = slots[token];
        if (slot == ~0u) return;
        const u32 block = slot / 64, at = slot % 64, kv_head = (head - HEADS) % KV_HEADS, element = PER_LANE * lane;
        u8* const tile = kv + (((u64)block * KV_HEADS + kv_head) * 2 + is_v) * (64 * D * 2);
        to = (u32*)(tile + element / 64 * (64 * 128) + at * 128 + ((element / 8 % 8) ^ (at % 8)) * 16 + element % 8 * 2);
    }
#pragma unroll
    for (int i = 0; i < PER_LANE / 2; i++) to[i] = x[i];
}
