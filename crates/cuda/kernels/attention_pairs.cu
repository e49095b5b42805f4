// Prefill: causal grouped-query attention over the paged cache in the hopper order (NUMERICS.md), on wgmma. The bits of attention_paged.cu.
//
// A block works on one item of 128 query rows of one sequence and one key/value head, a row being a (token, head of the group) pair, token-major;
// two consumer warpgroups own 64 rows each, queries in shared memory. Tiles of 64 keys go in pairs. A producer warp streams the keys, then the values
// of a pair into one of two stages by bulk copies: a block of the cache is [kv head][K, V][D / 64][64 tokens][64 elements] in the 128-byte
// swizzle, which is wgmma's: a pair's keys lie as [D / 64][128], a K-major operand of 128 columns; V is a transposed one, tile by tile. A second tile
// that does not exist is a masked one.
//
// A consumer's turn: scores of pair j and the output of pair j - 1 are queued together; softmax of j runs while the latter is
// under way. The fold of the splits so far lies in shared memory.
//
// Macros: D GROUP KV_HEADS
#define HEADS (GROUP * KV_HEADS)
#define TILE 64
#define PAIR 128
#define SPLIT_PAIRS 4
#define ROWS 128
#define CONSUMERS 256
#define TILE_BYTES (TILE * D * 2)
#define STAGE_BYTES (4 * TILE_BYTES) // K, K, V, V
#define SLAB (TILE * 128)            // 64 elements of every key of a tile
#define Q_BYTES (64 * D * 2)         // a warpgroup's queries
#define ACC (D / 2)                  // output floats a thread
static_assert(D == 64 || D == 128, "scores, weights, queries and outputs of larger heads do not fit registers");

// d = a b + (scale_d ? d : 0): 64 rows, 16 products; a in registers, b in shared memory, TRANSPOSED: its rows are products.
#if D == 64
template <int TRANSPOSED> __device__ __forceinline__ void wgmma_rs(float (&d)[32], const u32 (&a)[4], u64 b, int scale_d) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, p, 1, 1, %38;\n}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(scale_d), "n"(TRANSPOSED));
}
#else
template <int TRANSPOSED> __device__ __forceinline__ void wgmma_rs(float (&d)[64], const u32 (&a)[4], u64 b, int scale_d) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, {%64, %65, %66, %67}, %68, p, 1, 1, %70;\n}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(scale_d), "n"(TRANSPOSED));
}
#endif

// Descriptor of V: 16 keys x D elements from `addr` on, slabs of 64 elements, 8 keys every 1024 bytes.
__device__ __forceinline__ u64 value_desc(u32 addr) { return (u64)((addr & 0x3FFFF) >> 4) | ((u64)(SLAB >> 4) << 16) | ((u64)64 << 32) | ((u64)1 << 62); }
// Keeps the compiler from moving what uses these registers over the wait for the products that write them.
template <int N> __device__ __forceinline__ void settled(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// Softmax of one row's pair of tiles. s becomes P; m and l go on; the factors for what came before each tile are returned. H: the half of
// each four scores that is this row's. MASKED: some keys are behind `last`, counted from this lane's first.
template <int H, bool MASKED> __device__ __forceinline__ float2 soften(float (&s)[64], float& m, float& l, float scale_log2, int last) {
    float best[2];
#pragma unroll
    for (int tile = 0; tile < 2; tile++) {
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int e = 0; e < 2; e++)
                if (MASKED && TILE * tile + 8 * n + e > last) s[32 * tile + 4 * n + H + e] = -INFINITE;
        best[tile] = fmaxf(s[32 * tile + H], s[32 * tile + H + 1]);
#pragma unroll
        for (int n = 1; n < 8; n++) best[tile] = fmaxf(best[tile], fmaxf(s[32 * tile + 4 * n + H], s[32 * tile + 4 * n + H + 1]));
    }
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2) {
        const float x = __shfl_xor_sync(0xFFFFFFFFu, best[0], bit), y = __shfl_xor_sync(0xFFFFFFFFu, best[1], bit);
        best[0] = fmaxf(best[0], x), best[1] = fmaxf(best[1], y);
    }
    const float first = fmaxf(m, ceilf(__fmul_rn(best[0], scale_log2))), second = fmaxf(first, ceilf(__fmul_rn(best[1], scale_log2)));
    const float2 rescale = make_float2(pow2i(__fsub_rn(m, first)), pow2i(__fsub_rn(first, second)));
    m = second;
#pragma unroll
    for (int tile = 0; tile < 2; tile++) {
        const float minus = tile ? -second : -first;
        l = __fmul_rn(l, tile ? rescale.y : rescale.x);
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float& score = s[32 * tile + 4 * n + H + e];
                float p = exp2_poly3(fmaxf(-125.f, __fmaf_rn(score, scale_log2, minus)));
                if (MASKED && TILE * tile + 8 * n + e > last) p = 0.f;
                score = p;
                l = __fadd_rn(l, p);
            }
    }
    return rescale;
}

extern "C" __global__ void __launch_bounds__(384, 1)
    attention(const bf16* __restrict__ q, const u8* __restrict__ kv, bf16* __restrict__ out, const Seq* __restrict__ seqs,
              const Item* __restrict__ items, const u32* __restrict__ tables, float scale_log2, float* partials, u32* arrived) {
    extern __shared__ __align__(1024) u8 smem[];
    const u32 stages = smem_addr(smem) + 2 * Q_BYTES, full = stages + 2 * STAGE_BYTES, empty = full + 32; // a barrier for each stage's K and V
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, kv_head = blockIdx.y;
    launch_dependents();
    const Item item = items[blockIdx.z];
    const Seq seq = seqs[item.seq];
    const int rows = min((int)(seq.rows * GROUP) - (int)item.row, ROWS); // of this item
    if (rows <= 0) return;
    const int end = seq.context + (item.row + rows - 1) / GROUP + 1; // keys that any row attends to
    const int tiles = (end + TILE - 1) / TILE, pairs = (tiles + 1) / 2;

    if (threadIdx.x == 0) {
        for (int b = 0; b < 4; b++) mbar_init(full + 8 * b, 1), mbar_init(empty + 8 * b, CONSUMERS / 32);
        mbar_init_fence();
    }
    __syncthreads();

    if (warp >= CONSUMERS / 32) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (warp > CONSUMERS / 32) return;
        const u32* table = tables + seq.table;
        const u8* const from = kv + (u64)kv_head * 2 * TILE_BYTES;
        u32 blocks = 0;
        bool waited = false;
        for (int pair = 0; pair < pairs; pair++) {
            const int tile = 2 * pair, stage = pair % 2;
            if (pair % 16 == 0) blocks = tile + lane < tiles ? table[tile + lane] : 0;
            const u32 block0 = __shfl_sync(0xFFFFFFFFu, blocks, tile % 32), block1 = __shfl_sync(0xFFFFFFFFu, blocks, tile % 32 + 1);
            // Only this step's own keys come from the previous kernel.
            if (!waited && (pair + 1) * PAIR > (int)seq.context) wait_for_producers(), waited = true;
#pragma unroll
            for (int which = 0; which < 2; which++) {
                const u32 bar = 8 * (2 * stage + which), at = stages + stage * STAGE_BYTES + which * 2 * TILE_BYTES;
                mbar_wait(empty + bar, pair / 2 & 1 ^ 1);
                if (lane == 0) {
                    const bool both = tile + 1 < tiles;
                    mbar_expect_tx(full + bar, both ? 2 * TILE_BYTES : TILE_BYTES);
                    for (int tile = 0; tile < (both ? 2 : 1); tile++) {
                        const u8* const source = from + ((u64)(tile ? block1 : block0) * KV_HEADS * 2 + which) * TILE_BYTES;
                        if (which) bulk_load(at + tile * TILE_BYTES, source, TILE_BYTES, full + bar);
                        else
                            for (int slab = 0; slab < D / 64; slab++) bulk_load(at + (2 * slab + tile) * SLAB, source + slab * SLAB, SLAB, full + bar);
                    }
                }
                __syncwarp();
            }
        }
        return;
    }

    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    const int g = lane / 4, t = lane % 4;
    const int row0 = warp * 16 + g, row1 = row0 + 8; // this lane's rows in the item
    // Rows past the item do as the last one does; nothing of them is written.
    auto position = [&](int row) { return (int)(seq.context + (item.row + min(row, rows - 1)) / GROUP); };
    const int pos0 = position(row0), pos1 = position(row1), low_pos = position(warp * 16);
    auto element = [&](int row) { // index of the row's first element in q and out
        const u32 r = item.row + row;
        return ((u64)(seq.first_row + r / GROUP) * HEADS + kv_head * GROUP + r % GROUP) * D;
    };
    wait_for_producers();
    // This warpgroup's queries, [D / 64][64 rows][64 elements], swizzled; rows past the item are zeros.
    const u32 queries = smem_addr(smem) + warp / 4 * Q_BYTES;
    for (int i = threadIdx.x % 128; i < 64 * (D / 8); i += 128) {
        const int row = i / (D / 8), chunk = i % (D / 8), in_item = warp / 4 * 64 + row;
        float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
        if (in_item < rows) v = *(const float4*)(q + element(in_item) + 8 * chunk);
        smem_store4(queries + chunk / 8 * SLAB + row * 128 + ((chunk % 8) ^ (row % 8)) * 16, v.x, v.y, v.z, v.w);
    }
    async_proxy_fence();
    asm volatile("bar.sync %0, 128;" ::"r"(4 + warp / 4) : "memory");
    const u64 query = wgmma_desc(queries);

    float s[64], o[ACC];
    u32 p[8][4];
    float l0 = 0.f, l1 = 0.f, m0 = -INFINITE, m1 = -INFINITE; // l: of this lane's keys
    Weights total0 = {-INFINITE, 0.f}, total1 = {-INFINITE, 0.f};
    float2 rescale0 = make_float2(1.f, 1.f), rescale1 = rescale0; // before a pair's first and second tile
    const u32 folded = empty + 32 + threadIdx.x * 16; // this thread's part of the fold so far
    auto lanes_sum = [&](float l) {
        l = __fadd_rn(l, __shfl_xor_sync(0xFFFFFFFFu, l, 1));
        return __fadd_rn(l, __shfl_xor_sync(0xFFFFFFFFu, l, 2));
    };
    auto wait_full = [&](int pair, int which) { mbar_wait(full + 8 * (pair % 2 * 2 + which), pair / 2 & 1); };
    auto release = [&](int pair, int which) { // the products that read it have been waited for
        if (lane == 0) mbar_arrive(empty + 8 * (pair % 2 * 2 + which));
    };
    auto queue_scores = [&](int pair) {
        wait_full(pair, 0);
        const u64 k = wgmma_desc(stages + pair % 2 * STAGE_BYTES);
        wgmma_fence();
#pragma unroll
        for (int c = 0; c < D / 16; c++) wgmma_tb(s, query + (c / 4 * (SLAB >> 4) + c % 4 * 2), k + (c / 4 * (2 * SLAB >> 4) + c % 4 * 2), c > 0);
        wgmma_commit();
    };
    auto rescale = [&](float by0, float by1) { // by 1 it changes nothing
#pragma unroll
        for (int j = 0; j < D / 8; j++) {
            o[4 * j] = __fmul_rn(o[4 * j], by0), o[4 * j + 1] = __fmul_rn(o[4 * j + 1], by0);
            o[4 * j + 2] = __fmul_rn(o[4 * j + 2], by1), o[4 * j + 3] = __fmul_rn(o[4 * j + 3], by1);
        }
    };
    auto queue_output = [&](int pair) {
        const u64 v = value_desc(stages + pair % 2 * STAGE_BYTES + 2 * TILE_BYTES);
        wgmma_fence();
#pragma unroll
        for (int c = 0; c < 4; c++) wgmma_rs<1>(o, p[c], v + c * (16 * 128 >> 4), c > 0 || pair % SPLIT_PAIRS != 0);
        wgmma_commit();
        // A warp's own affair: what all warps of a warpgroup must do together stays outside.
        if (__any_sync(0xFFFFFFFFu, rescale0.y != 1.f || rescale1.y != 1.f)) {
            wgmma_wait<0>();
            settled(o);
            rescale(rescale0.y, rescale1.y);
        }
        wgmma_fence();
#pragma unroll
        for (int c = 0; c < 4; c++) wgmma_rs<1>(o, p[4 + c], v + (TILE_BYTES >> 4) + c * (16 * 128 >> 4), 1);
        wgmma_commit();
    };
    auto soften_pair = [&](int pair) {
        const int key0 = pair * PAIR + 2 * t; // this lane's first
        if (pair * PAIR + PAIR - 1 > low_pos) {
            rescale0 = soften<0, true>(s, m0, l0, scale_log2, pos0 - key0), rescale1 = soften<2, true>(s, m1, l1, scale_log2, pos1 - key0);
        } else {
            rescale0 = soften<0, false>(s, m0, l0, scale_log2, 0), rescale1 = soften<2, false>(s, m1, l1, scale_log2, 0);
        }
    };
    auto pack = [&]() {
#pragma unroll
        for (int c = 0; c < 8; c++)
#pragma unroll
            for (int r = 0; r < 4; r++) p[c][r] = pack_bf16(s[8 * c + 2 * r], s[8 * c + 2 * r + 1]);
    };
    // Joins o, a split of weights `of0` and `of1`, to those before it.
    auto end_split = [&](bool first, bool last, Weights of0, Weights of1) {
        const float2 w0 = fold(total0, of0), w1 = fold(total1, of1);
#pragma unroll
        for (int j = 0; j < D / 8; j++) {
            const u32 at = folded + j * (CONSUMERS * 16);
            const float4 sum = first ? make_float4(0.f, 0.f, 0.f, 0.f) : smem_load4(at);
            const float4 v = make_float4(join(sum.x, o[4 * j], w0), join(sum.y, o[4 * j + 1], w0), join(sum.z, o[4 * j + 2], w1), join(sum.w, o[4 * j + 3], w1));
            if (last) o[4 * j] = v.x, o[4 * j + 1] = v.y, o[4 * j + 2] = v.z, o[4 * j + 3] = v.w;
            else smem_store4(at, v.x, v.y, v.z, v.w);
        }
    };

    queue_scores(0);
    wgmma_wait<0>();
    settled(s);
    release(0, 0);
    soften_pair(0);
    pack();
    // The warpgroups queue their products in turns, so that one's softmax runs beside the other's products.
    const int mine = 2 + warp / 4, other = 5 - mine;
    if (warp >= 4) asm volatile("bar.arrive %0, %1;" ::"r"(other), "n"(CONSUMERS) : "memory");
#pragma unroll 1
    for (int pair = 1; pair < pairs; pair++) {
        asm volatile("bar.sync %0, %1;" ::"r"(mine), "n"(CONSUMERS) : "memory");
        queue_scores(pair);
        wait_full(pair - 1, 1);
        queue_output(pair - 1);
        asm volatile("bar.arrive %0, %1;" ::"r"(other), "n"(CONSUMERS) : "memory");
        wgmma_wait<2>();
        settled(s);
        release(pair, 0);
        const bool next_split = pair % SPLIT_PAIRS == 0;
        const Weights of0 = {m0, l0}, of1 = {m1, l1}; // of the pairs before this one
        if (next_split) l0 = l1 = 0.f, m0 = m1 = -INFINITE;
        soften_pair(pair);
        wgmma_wait<0>();
        settled(o);
        release(pair - 1, 1);
        if (next_split) {
            end_split(pair == SPLIT_PAIRS, false, {of0.m, lanes_sum(of0.l)}, {of1.m, lanes_sum(of1.l)});
        } else if (__any_sync(0xFFFFFFFFu, rescale0.x != 1.f || rescale1.x != 1.f)) {
            rescale(rescale0.x, rescale1.x);
        }
        pack();
    }
    wait_full(pairs - 1, 1);
    const int left = end - (pairs - 1) * PAIR;
    if (left < PAIR) { // values past the last key are garbage, and 0 * NaN is NaN
        const u32 v = stages + (pairs - 1) % 2 * STAGE_BYTES + 2 * TILE_BYTES;
        for (int i = threadIdx.x; i < D / 8 * (PAIR - left); i += CONSUMERS) {
            const int chunk = i % (D / 8), key = left + i / (D / 8);
            smem_store4(v + key / TILE * TILE_BYTES + chunk / 8 * SLAB + key % TILE * 128 + chunk % 8 * 16, 0.f, 0.f, 0.f, 0.f);
        }
        async_proxy_fence();
        asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory");
    }
    queue_output(pairs - 1);
    wgmma_wait<0>();
    settled(o);
    end_split(pairs <= SPLIT_PAIRS, true, {m0, lanes_sum(l0)}, {m1, lanes_sum(l1)});

    const float inverse0 = __frcp_rn(total0.l), inverse1 = __frcp_rn(total1.l);
    bf16 *out0 = out + (row0 < rows ? element(row0) : 0) + 2 * t, *out1 = out + (row1 < rows ? element(row1) : 0) + 2 * t;
#pragma unroll
    for (int j = 0; j < D / 8; j++) {
        if (row0 < rows) *(u32*)(out0 + 8 * j) = pack_bf16(finish(o[4 * j], inverse0), finish(o[4 * j + 1], inverse0));
        if (row1 < rows) *(u32*)(out1 + 8 * j) = pack_bf16(finish(o[4 * j + 2], inverse1), finish(o[4 * j + 3], inverse1));
    }
}
