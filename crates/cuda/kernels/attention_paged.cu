// Causal grouped-query attention over the paged cache in the hopper order (NUMERICS.md), on mma.sync m16n8k16, which has wgmma's bits.
//
// A CTA works on one item of up to ROWS rows (attention.cuh). A producer warp streams tiles into a ring (attention_ring.cuh) for ROW_WARPS x
// DIM_WARPS consumer warps: each computes the scores of its 16 rows and a slice of D of the output, so no data crosses warps; scores are
// computed DIM_WARPS times over.
//
// SPLIT 1: a CTA takes one split of 512 keys, and the last one of an item to arrive folds the partial results, always in ascending order.
// SPLIT 0: it takes all of them, one after the other; the fold so far lies in shared memory.
// FREE: with SPLIT 1, splits are as long as the item says: the unconstrained mode, whose bits follow the batch.
//
// Macros: D GROUP KV_HEADS ROW_WARPS DIM_WARPS HALF SLOTS MIN_CTAS SPLIT [FREE] [RACECHECK]
#ifdef FREE
#define SPLIT_TILES ((int)item.split_tiles)
static_assert(SPLIT, "whole rows fold at the contract's splits");
#endif
#define WARPS (ROW_WARPS * DIM_WARPS)
#ifdef RACECHECK // takes an arrival as its lane's alone, __syncwarp or not
#define HANDS_BACK true
#define HAND_BACKS (32 * WARPS)
#else
#define HANDS_BACK (lane == 0)
#define HAND_BACKS WARPS
#endif
#define ROWS (HALF ? 8 : 16 * ROW_WARPS) // HALF: rows 8 to 15 of the one row tile stay empty
#define DIMS (D / DIM_WARPS)
#define NT (DIMS / 8)
#define PARTIAL_FLOATS (ROWS * (D + 2))
static_assert(DIMS % 16 == 0, "products have 16 columns of values");
static_assert(!HALF || ROW_WARPS == 1, "HALF is for one row tile");

__device__ __forceinline__ void sync_consumers() { asm volatile("bar.sync 1, %0;" ::"n"(32 * WARPS) : "memory"); }
template <int N> struct Const {
    static constexpr int value = N;
};

extern "C" __global__ void __launch_bounds__(32 * (WARPS + 1), MIN_CTAS)
    attention(const bf16* __restrict__ q, const u8* __restrict__ kv, bf16* __restrict__ out, const Seq* __restrict__ seqs,
              const Item* __restrict__ items, const u32* __restrict__ tables, float scale_log2, float* partials, u32* arrived) {
    extern __shared__ __align__(1024) u8 smem[];
    const TileRing ring(smem_addr(smem));
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int split = blockIdx.x, kv_head = blockIdx.y;
    launch_dependents();
    const Item item = items[blockIdx.z];
    const Rows rows(item, seqs[item.seq], ROWS);
    if (rows.count <= 0) return;
    const int end = rows.end();
    const int all_tiles = (end + TILE - 1) / TILE, splits = (all_tiles + SPLIT_TILES - 1) / SPLIT_TILES;
    const int first_tile = SPLIT ? split * SPLIT_TILES : 0;
    const int last_tile = SPLIT ? min(first_tile + SPLIT_TILES, all_tiles) : all_tiles;
    if (first_tile >= all_tiles) return;

    if (threadIdx.x == 0) ring.init(HAND_BACKS);
    __syncthreads();

    if (warp == WARPS) {
        ring.stream(kv, tables + rows.table, kv_head, first_tile, last_tile, rows.context, lane);
        return;
    }

    const int g = lane / 4, t = lane % 4, row_warp = warp / DIM_WARPS, dim_warp = warp % DIM_WARPS;
    const int row0 = row_warp * 16 + g, row1 = row0 + 8; // this lane's rows in the item
    const int pos0 = rows.position(row0), pos1 = rows.position(row1);
    const int low_pos = rows.position(row_warp * 16), high_pos = rows.position(row_warp * 16 + 15);
    wait_for_producers();
    u32 query[D / 16][4];
    {
        const bf16 *q0 = q + (row0 < rows.count ? rows.element(row0, kv_head) : 0) + 2 * t, *q1 = q + (row1 < rows.count ? rows.element(row1, kv_head) : 0) + 2 * t;
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
            query[k][0] = row0 < rows.count ? *(const u32*)(q0 + 16 * k) : 0;
            query[k][2] = row0 < rows.count ? *(const u32*)(q0 + 16 * k + 8) : 0;
            query[k][1] = !HALF && row1 < rows.count ? *(const u32*)(q1 + 16 * k) : 0;
            query[k][3] = !HALF && row1 < rows.count ? *(const u32*)(q1 + 16 * k + 8) : 0;
        }
    }
    // This lane's row of ldmatrix: 16 keys x 16 elements of K, 16 keys x 16 elements of V (transposed).
    const u32 k_row = (lane / 16 * 8 + lane % 8) * 128, k_chunk = lane / 8 % 2;
    const u32 v_row = (lane / 8 % 2 * 8 + lane % 8) * 128, v_chunk = dim_warp * (DIMS / 8) + lane / 16;
    auto chunk_at = [&](u32 chunk) { return chunk / 8 * (TILE * 128) + ((chunk % 8) ^ (lane % 8)) * 16; };

    float o[NT][4];
    float l0 = 0.f, l1 = 0.f, m0 = -INFINITE, m1 = -INFINITE; // l: of this lane's keys
    Weights total0 = {-INFINITE, 0.f}, total1 = {-INFINITE, 0.f};
    const u32 folded = ring.end() + threadIdx.x * 16; // this thread's part of the fold so far
#pragma unroll
    for (int j = 0; j < NT; j++) o[j][0] = o[j][1] = o[j][2] = o[j][3] = 0.f;

    auto lanes_sum = [](float l) { return quad_sum(l); };
    // Joins the split that has just ended to those before it.
    auto end_split = [&](bool first, bool last) {
        const float2 w0 = fold(total0, {m0, lanes_sum(l0)}), w1 = fold(total1, {m1, lanes_sum(l1)});
#pragma unroll
        for (int j = 0; j < NT; j++) {
            const u32 at = folded + j * (32 * WARPS * 16);
            const float4 sum = first ? make_float4(0.f, 0.f, 0.f, 0.f) : smem_load4(at);
            const float4 v = make_float4(join(sum.x, o[j][0], w0), join(sum.y, o[j][1], w0), join(sum.z, o[j][2], w1), join(sum.w, o[j][3], w1));
            if (last) o[j][0] = v.x, o[j][1] = v.y, o[j][2] = v.z, o[j][3] = v.w;
            else smem_store4(at, v.x, v.y, v.z, v.w), o[j][0] = o[j][1] = o[j][2] = o[j][3] = 0.f;
        }
        l0 = l1 = 0.f, m0 = m1 = -INFINITE;
    };

#pragma unroll 1
    for (int tile = first_tile; tile < last_tile; tile++) {
        const int i = 2 * (tile - first_tile), key0 = tile * TILE;
        if (!SPLIT && tile > 0 && tile % SPLIT_TILES == 0) end_split(tile == SPLIT_TILES, false);
        // Without the fence the arrival can overtake loads of the slot whose results nobody has used yet, and the next copy lands in the
        // middle of them (LOG.md, "a slot handed back too early").
        auto release_slot = [&](int i) {
            async_proxy_fence();
            __syncwarp();
            if (HANDS_BACK) ring.hand_back(i);
        };
        ring.wait(i);
        if (key0 > high_pos) { // masked for every row of this warp: would change no bit
            release_slot(i);
            ring.wait(i + 1);
            release_slot(i + 1);
            continue;
        }
        float s[8][4];
#pragma unroll
        for (int n = 0; n < 8; n++) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.f;
        const u32 k_tile = ring.tile(i) + k_row;
#pragma unroll
        for (int k = 0; k < D / 16; k++)
#pragma unroll
            for (int n = 0; n < 4; n++) {
                u32 b[4];
                ldmatrix4(b, k_tile + n * 16 * 128 + chunk_at(2 * k + k_chunk));
                mma_16816(s[2 * n], query[k][0], query[k][1], query[k][2], query[k][3], b[0], b[1]);
                mma_16816(s[2 * n + 1], query[k][0], query[k][1], query[k][2], query[k][3], b[2], b[3]);
            }
        const bool masked = key0 + TILE - 1 > low_pos;
        if (masked) {
#pragma unroll
            for (int n = 0; n < 8; n++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const int key = key0 + n * 8 + 2 * t + e;
                    if (key > pos0) s[n][e] = -INFINITE;
                    if (key > pos1) s[n][2 + e] = -INFINITE;
                }
        }
        // The weights of one row's tile; s becomes P, l grows, the factor for what came before is returned.
        auto soften = [&](auto half, float& m, float& l) {
            constexpr int H = half.value;
            float best = -INFINITE;
#pragma unroll
            for (int n = 0; n < 8; n++) best = fmaxf(best, fmaxf(s[n][H], s[n][H + 1]));
            best = fmaxf(best, __shfl_xor_sync(0xFFFFFFFFu, best, 1));
            best = fmaxf(best, __shfl_xor_sync(0xFFFFFFFFu, best, 2));
            const float next = fmaxf(m, ceilf(__fmul_rn(best, scale_log2))), rescale = pow2i(__fsub_rn(m, next));
            l = __fmul_rn(l, rescale), m = next;
#pragma unroll
            for (int n = 0; n < 8; n++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const float score = s[n][H + e];
                    float p = weight_of(score, scale_log2, next);
                    if (masked && score == -INFINITE) p = 0.f;
                    s[n][H + e] = p;
                    l = __fadd_rn(l, p);
                }
            return rescale;
        };
        const float rescale0 = soften(Const<0>(), m0, l0), rescale1 = HALF ? 1.f : soften(Const<2>(), m1, l1);
#pragma unroll
        for (int j = 0; j < NT; j++) {
            o[j][0] = __fmul_rn(o[j][0], rescale0), o[j][1] = __fmul_rn(o[j][1], rescale0);
            if (!HALF) o[j][2] = __fmul_rn(o[j][2], rescale1), o[j][3] = __fmul_rn(o[j][3], rescale1);
        }

        release_slot(i); // its scores are all used by now
        ring.wait(i + 1);
        const u32 v_tile = ring.tile(i + 1) + v_row;
        const bool ragged = key0 + TILE > end; // values past the last key are garbage, and 0 * NaN is NaN
#pragma unroll
        for (int c = 0; c < 4; c++) {
            const u32 a0 = pack_bf16(s[2 * c][0], s[2 * c][1]), a2 = pack_bf16(s[2 * c + 1][0], s[2 * c + 1][1]);
            const u32 a1 = HALF ? 0 : pack_bf16(s[2 * c][2], s[2 * c][3]), a3 = HALF ? 0 : pack_bf16(s[2 * c + 1][2], s[2 * c + 1][3]);
            const int left = end - key0 - 16 * c - 2 * t; // keys from this lane's first one on
            const u32 keep0 = left >= 2 ? 0xFFFFFFFFu : left == 1 ? 0xFFFFu : 0, keep1 = left >= 10 ? 0xFFFFFFFFu : left == 9 ? 0xFFFFu : 0;
#pragma unroll
            for (int j = 0; j < NT; j += 2) {
                u32 b[4];
                ldmatrix4_trans(b, v_tile + c * 16 * 128 + chunk_at(v_chunk + j));
                if (ragged) b[0] &= keep0, b[1] &= keep1, b[2] &= keep0, b[3] &= keep1;
                mma_16816(o[j], a0, a1, a2, a3, b[0], b[1]);
                mma_16816(o[j + 1], a0, a1, a2, a3, b[2], b[3]);
            }
        }
        release_slot(i + 1);
    }

    if (!SPLIT || splits == 1) {
        if (!SPLIT) end_split(splits == 1, true);
        else total0.l = lanes_sum(l0), total1.l = lanes_sum(l1);
        const float inverse0 = __frcp_rn(total0.l), inverse1 = __frcp_rn(total1.l);
        bf16 *out0 = out + (row0 < rows.count ? rows.element(row0, kv_head) : 0) + dim_warp * DIMS + 2 * t, *out1 = out + (row1 < rows.count ? rows.element(row1, kv_head) : 0) + dim_warp * DIMS + 2 * t;
#pragma unroll
        for (int j = 0; j < NT; j++) {
            if (row0 < rows.count) *(u32*)(out0 + 8 * j) = pack_bf16(finish(o[j][0], inverse0), finish(o[j][1], inverse0));
            if (!HALF && row1 < rows.count) *(u32*)(out1 + 8 * j) = pack_bf16(finish(o[j][2], inverse1), finish(o[j][3], inverse1));
        }
        return;
    }

    // [split][kv head]: weights [ROWS][m, l], then [ROWS][D].
    auto partial_of = [&](int split) { return partials + ((u64)(item.partial + split) * KV_HEADS + kv_head) * PARTIAL_FLOATS; };
    {
        float* const mine = partial_of(split);
        const float sum0 = lanes_sum(l0), sum1 = lanes_sum(l1);
        auto put = [&](int row, float m, float l, int half) {
            if (row >= rows.count) return;
            if (dim_warp == 0 && t == 0) *(float2*)(mine + 2 * row) = make_float2(m, l);
#pragma unroll
            for (int j = 0; j < NT; j++) *(float2*)(mine + 2 * ROWS + row * D + dim_warp * DIMS + 8 * j + 2 * t) = half ? make_float2(o[j][2], o[j][3]) : make_float2(o[j][0], o[j][1]);
        };
        put(row0, m0, sum0, 0);
        if (!HALF) put(row1, m1, sum1, 1);
    }
    sync_consumers();
    if (threadIdx.x == 0) *(volatile u32*)smem = last_to_arrive(arrived + blockIdx.z * KV_HEADS + kv_head, splits);
    sync_consumers();
    if (!*(volatile u32*)smem) return;
    constexpr int AT_ONCE = 8; // splits whose results are asked for together
    for (int i = threadIdx.x; i < rows.count * (D / 4); i += 32 * WARPS) {
        const int row = i / (D / 4), dim = i % (D / 4) * 4;
        Weights total = {-INFINITE, 0.f};
        float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
        for (int first = 0; first < splits; first += AT_ONCE) {
            float4 value[AT_ONCE];
            float2 weights[AT_ONCE];
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++) {
                const float* const from = partial_of(min(first + j, splits - 1));
                weights[j] = load2_l2(from + 2 * row), value[j] = load4_l2(from + 2 * ROWS + row * D + dim);
            }
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++) {
                if (first + j >= splits) break;
                const Weights next = {weights[j].x, weights[j].y};
                const float4 b = value[j];
                if (first + j == 0) {
                    total = next, v = b;
                } else {
                    const float2 w = fold(total, next);
                    v = make_float4(join(v.x, b.x, w), join(v.y, b.y, w), join(v.z, b.z, w), join(v.w, b.w, w));
                }
            }
        }
        const float inverse = __frcp_rn(total.l);
        const u32 lo = pack_bf16(finish(v.x, inverse), finish(v.y, inverse)), hi = pack_bf16(finish(v.z, inverse), finish(v.w, inverse));
        *(uint2*)(out + rows.element(row, kv_head) + dim) = make_uint2(lo, hi);
    }
}
