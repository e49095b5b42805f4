// Prefill: causal grouped-query attention over the paged cache in the hopper order (NUMERICS.md), on wgmma. The bits of attention_paged.cu.
//
// A block works on one item of 128 rows (attention.cuh): two consumer warpgroups own 64 each, queries in registers. A producer warp streams
// tiles into a ring (attention_ring.cuh), whose swizzle is wgmma's: K is a K-major operand, V a transposed one.
//
// A consumer's turn: the scores of tile j + 1 are queued behind the output of tile j - 1, and softmax of j runs while both are under way. The
// tiles that causality cuts come last; there only the output of j - 1 is. The fold of the splits so far lies in shared memory.
//
// Macros: D GROUP KV_HEADS SLOTS
#define ROWS 128
#define CONSUMERS 256
#define ACC (D / 2)       // output floats a thread
#define SCALED 0x1p-22f   // of the exponents of weights
static_assert(D == 64 || D == 128, "scores, weights, queries and outputs of larger heads do not fit registers");
static_assert(SLOTS >= 4, "keys are waited for while the values two tiles before them hold a slot");

// Operands of an asm with 32 or 64 sums, from d[i] on.
#define SUMS_8(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define SUMS_32(d, i) SUMS_8(d, i), SUMS_8(d, i + 8), SUMS_8(d, i + 16), SUMS_8(d, i + 24)
#define REGISTERS_32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define REGISTERS_64 REGISTERS_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
// d = a b + (scale_d ? d : 0): 64 rows, 16 products; a in registers, b in shared memory, TRANSPOSED: its rows are products.
template <int TRANSPOSED> __device__ __forceinline__ void wgmma_rs(float (&d)[32], const u32 (&a)[4], u64 b, int scale_d) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" REGISTERS_32 "}, {%32, %33, %34, %35}, %36, p, 1, 1, %38;\n}"
        : SUMS_32(d, 0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(scale_d), "n"(TRANSPOSED));
}
#if D == 128
template <int TRANSPOSED> __device__ __forceinline__ void wgmma_rs(float (&d)[64], const u32 (&a)[4], u64 b, int scale_d) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" REGISTERS_64 "}, {%64, %65, %66, %67}, %68, p, 1, 1, %70;\n}"
        : SUMS_32(d, 0), SUMS_32(d, 32)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(scale_d), "n"(TRANSPOSED));
}
#endif

__device__ __forceinline__ void smem_store16(u32 addr, uint4 v) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(addr), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
__device__ __forceinline__ uint4 smem_load16(u32 addr) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(addr) : "memory");
    return v;
}
// Keeps the compiler from moving what uses these registers over the wait for the products that write them.
template <int N> __device__ __forceinline__ void settled(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// __shfl_xor_sync without the branch that the compiler puts round it where it cannot see that the warp is whole; blocks of code that it
// would split stay one.
__device__ __forceinline__ float shuffle_xor(float x, int mask) {
    float r;
    asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 0x1f, 0xffffffff;" : "=f"(r) : "f"(x), "r"(mask));
    return r;
}

// exp2_poly3(t), given t * 2^-22. A product of that by 2^-127 is t as a multiple of the smallest denormal: it rounds t to an integer, and its bits are
// that integer. Adding 1.5 * 2^23 takes an instruction more, and the tensor core waits for fp32 instructions. All scaling is by powers of two.
__device__ __forceinline__ float exp2_poly3_scaled(float t) {
    constexpr u32 C[4] = {0x3F800000u, 0x3F317AFDu + (22u << 23), 0x3E780626u + (44u << 23), 0x3D61512Au + (66u << 23)};
    const float n = __fmul_rn(t, __uint_as_float(0x00400000u)), f = __fmaf_rn(n, -__uint_as_float(0x7F000000u), t);
    return __uint_as_float(__float_as_uint(horner(C, f)) + __float_as_uint(n) * 0xFF800000u); // n <= 0: less its bits << 23; the sign drops out
}

// Weights of a tile's two rows of this thread, side by side: of each four scores the first two and the last two. s becomes P; l goes on.
// MASKED: some keys are behind `last`, counted from this lane's first.
template <bool MASKED>
__device__ __forceinline__ void weigh(float (&s)[32], float m0, float m1, float& l0, float& l1, float scale_log2, int last0, int last1) {
    const float c = __fmul_rn(scale_log2, SCALED), minus0 = __fmul_rn(m0, -SCALED), minus1 = __fmul_rn(m1, -SCALED);
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            float &x = s[4 * n + e], &y = s[4 * n + 2 + e];
            x = exp2_poly3_scaled(fmaxf(-125.f * SCALED, __fmaf_rn(x, c, minus0)));
            y = exp2_poly3_scaled(fmaxf(-125.f * SCALED, __fmaf_rn(y, c, minus1)));
            if (MASKED && 8 * n + e > last0) x = 0.f;
            if (MASKED && 8 * n + e > last1) y = 0.f;
            l0 = __fadd_rn(l0, x), l1 = __fadd_rn(l1, y);
        }
}

// Softmax of a tile. m and l go on; `rescale` are the factors for what came before.
template <bool MASKED>
__device__ __forceinline__ void soften(float (&s)[32], float& m0, float& m1, float& l0, float& l1, float& rescale0, float& rescale1, float scale_log2, int last0,
                                       int last1) {
    if (MASKED) {
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                if (8 * n + e > last0) s[4 * n + e] = -INFINITE;
                if (8 * n + e > last1) s[4 * n + 2 + e] = -INFINITE;
            }
    }
    float best0 = fmaxf(s[0], s[1]), best1 = fmaxf(s[2], s[3]);
#pragma unroll
    for (int n = 1; n < 8; n++) best0 = fmaxf(best0, fmaxf(s[4 * n], s[4 * n + 1])), best1 = fmaxf(best1, fmaxf(s[4 * n + 2], s[4 * n + 3]));
#pragma unroll
    for (int mask = 1; mask <= 2; mask *= 2) {
        const float x = shuffle_xor(best0, mask), y = shuffle_xor(best1, mask);
        best0 = fmaxf(best0, x), best1 = fmaxf(best1, y);
    }
    const float next0 = fmaxf(m0, ceilf(__fmul_rn(best0, scale_log2))), next1 = fmaxf(m1, ceilf(__fmul_rn(best1, scale_log2)));
    rescale0 = pow2i(__fsub_rn(m0, next0)), rescale1 = pow2i(__fsub_rn(m1, next1));
    m0 = next0, m1 = next1;
    l0 = __fmul_rn(l0, rescale0), l1 = __fmul_rn(l1, rescale1);
    weigh<MASKED>(s, m0, m1, l0, l1, scale_log2, last0, last1);
}

extern "C" __global__ void __launch_bounds__(CONSUMERS + 128, 1)
    attention(const bf16* __restrict__ q, const u8* __restrict__ kv, bf16* __restrict__ out, const Seq* __restrict__ seqs,
              const Item* __restrict__ items, const u32* __restrict__ tables, float scale_log2, float* partials, u32* arrived) {
    extern __shared__ __align__(1024) u8 smem[];
    const TileRing ring(smem_addr(smem));
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, kv_head = blockIdx.y;
    launch_dependents();
    const Item item = items[blockIdx.z];
    const Rows rows(item, seqs[item.seq], ROWS);
    if (rows.count <= 0) return;
    const int end = rows.end();
    const int tiles = (end + TILE - 1) / TILE, splits = (tiles + SPLIT_TILES - 1) / SPLIT_TILES;

    if (threadIdx.x == 0) ring.init(CONSUMERS / 32);
    __syncthreads();

    if (warp >= CONSUMERS / 32) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (warp > CONSUMERS / 32) return;
        ring.stream(kv, tables + rows.table, kv_head, 0, tiles, rows.context, lane);
        return;
    }

    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    const int g = lane / 4, t = lane % 4;
    const int row0 = warp * 16 + g, row1 = row0 + 8; // this lane's rows in the item
    const int pos0 = rows.position(row0), pos1 = rows.position(row1), low_pos = rows.position(warp * 16);
    wait_for_producers();
    // This warp's part of the fold's memory first holds its queries and at last its outputs, 16 rows of D elements: 16 bytes `chunk` of a row.
    const u32 fold_memory = ring.end(), rows_memory = fold_memory + warp * 512;
    auto chunk_at = [&](int row, int chunk) { return rows_memory + row % 8 * (CONSUMERS * 16) + row / 8 * 256 + ((chunk ^ row % 8) * 16); };
    const int matrix_row = lane % 8 + lane / 8 % 2 * 8, matrix_chunk = lane / 16; // of four matrices of 8 rows and 8 elements: rows first
    u32 query[D / 16][4];
    {
        uint4 loaded[D / 16];
#pragma unroll
        for (int i = 0; i < D / 16; i++) {
            const int row = (i * 32 + lane) / (D / 8), chunk = lane % (D / 8);
            loaded[i] = make_uint4(0, 0, 0, 0);
            if (warp * 16 + row < rows.count) loaded[i] = *(const uint4*)(q + rows.element(warp * 16 + row, kv_head) + chunk * 8);
        }
#pragma unroll
        for (int i = 0; i < D / 16; i++) smem_store16(chunk_at((i * 32 + lane) / (D / 8), lane % (D / 8)), loaded[i]);
        __syncwarp();
#pragma unroll
        for (int k = 0; k < D / 16; k++) ldmatrix4(query[k], chunk_at(matrix_row, 2 * k + matrix_chunk));
        __syncwarp();
    }

    float s[32], s_next[32], o[ACC];
    u32 p[4][4];
    float l0 = 0.f, l1 = 0.f, m0 = -INFINITE, m1 = -INFINITE; // l: of this lane's keys
    Weights total0 = {-INFINITE, 0.f}, total1 = {-INFINITE, 0.f};
    const u32 folded = fold_memory + threadIdx.x * 16; // this thread's part of the fold so far
    auto wait_slot = [&](int i) { ring.wait(i); };
    auto release_slot = [&](int i) { // the products that read it have been waited for
        if (lane == 0) ring.hand_back(i);
    };
    auto queue_scores = [&](float (&s)[32], int tile) {
        wait_slot(2 * tile);
        const u64 k = wgmma_desc(ring.tile(2 * tile));
        wgmma_fence();
#pragma unroll
        for (int c = 0; c < D / 16; c++) wgmma_rs<0>(s, query[c], k + (c / 4 * (SLAB >> 4) + c % 4 * 2), c > 0);
        wgmma_commit();
    };
    auto queue_output = [&](int tile, bool last) {
        wait_slot(2 * tile + 1);
        const u32 v = ring.tile(2 * tile + 1);
        if (last && end % TILE != 0) { // values past the last key are garbage, and 0 * NaN is NaN
            for (int i = threadIdx.x; i < D / 64 * (TILE - end % TILE) * 8; i += CONSUMERS) {
                const int chunk = i % 8, key = end % TILE + i / 8 % (TILE - end % TILE), slab = i / 8 / (TILE - end % TILE);
                smem_store4(v + slab * SLAB + key * 128 + chunk * 16, 0.f, 0.f, 0.f, 0.f);
            }
            async_proxy_fence();
            asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory");
        }
        const u64 desc = wgmma_desc_slabs(v, SLAB);
        wgmma_fence();
#pragma unroll
        for (int c = 0; c < 4; c++) wgmma_rs<1>(o, p[c], desc + c * (16 * 128 >> 4), c > 0 || tile % SPLIT_TILES != 0);
        wgmma_commit();
    };
    float rescale0, rescale1;
    auto soften_tile = [&](float (&s)[32], int tile) {
        const int key0 = tile * TILE + 2 * t; // this lane's first
        if (tile * TILE + TILE - 1 > low_pos) soften<true>(s, m0, m1, l0, l1, rescale0, rescale1, scale_log2, pos0 - key0, pos1 - key0);
        else soften<false>(s, m0, m1, l0, l1, rescale0, rescale1, scale_log2, 0, 0);
    };
    auto pack = [&](float (&s)[32]) {
#pragma unroll
        for (int c = 0; c < 4; c++) {
            p[c][0] = pack_bf16(s[8 * c], s[8 * c + 1]), p[c][1] = pack_bf16(s[8 * c + 2], s[8 * c + 3]);
            p[c][2] = pack_bf16(s[8 * c + 4], s[8 * c + 5]), p[c][3] = pack_bf16(s[8 * c + 6], s[8 * c + 7]);
        }
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

    // Softmax of `tile` is done and so is the output of those before it: it is rescaled, or its split ends. of0, of1: weights of those.
    auto carry_on = [&](int tile, Weights of0, Weights of1) {
        if (tile % SPLIT_TILES == 0) {
            if (tile == 0) return;
            of0.l = quad_sum(of0.l), of1.l = quad_sum(of1.l);
            end_split(tile == SPLIT_TILES, false, of0, of1);
            return;
        }
        // By 1 it changes nothing.
        if (__any_sync(0xFFFFFFFFu, rescale0 != 1.f)) {
#pragma unroll
            for (int j = 0; j < D / 8; j++) o[4 * j] = __fmul_rn(o[4 * j], rescale0), o[4 * j + 1] = __fmul_rn(o[4 * j + 1], rescale0);
        }
        if (__any_sync(0xFFFFFFFFu, rescale1 != 1.f)) {
#pragma unroll
            for (int j = 0; j < D / 8; j++) o[4 * j + 2] = __fmul_rn(o[4 * j + 2], rescale1), o[4 * j + 3] = __fmul_rn(o[4 * j + 3], rescale1);
        }
    };
    auto enter = [&](int tile) {
        if (tile % SPLIT_TILES == 0) l0 = l1 = 0.f, m0 = m1 = -INFINITE;
    };
    // A tile that nothing cuts: its scores are in `now`, those of the next one are queued into `next`.
    auto turn = [&](float (&now)[32], float (&next)[32], int tile) {
        queue_scores(next, tile + 1);
        const Weights of0 = {m0, l0}, of1 = {m1, l1};
        enter(tile);
        soften<false>(now, m0, m1, l0, l1, rescale0, rescale1, scale_log2, 0, 0);
        wgmma_wait<0>(); // not <1>: ptxas serialises products if sums are read while some queued in another round of the loop may be under way
        settled(o);
        settled(next);
        if (tile > 0) release_slot(2 * tile - 1);
        release_slot(2 * tile + 2);
        carry_on(tile, of0, of1);
        pack(now);
        queue_output(tile, false);
    };

    queue_scores(s, 0);
    wgmma_wait<0>();
    settled(s);
    release_slot(0);
    int tile = 0; // its scores are in s
    const int uncut = (rows.position(0) + 1) / TILE; // tiles
#pragma unroll 1
    for (; tile + 1 < uncut && tile + 2 < tiles; tile += 2) {
        turn(s, s_next, tile);
        turn(s_next, s, tile + 1);
    }
#pragma unroll 1
    for (; tile + 1 < tiles; tile++) {
        const Weights of0 = {m0, l0}, of1 = {m1, l1};
        enter(tile);
        soften_tile(s, tile);
        wgmma_wait<0>();
        settled(o);
        if (tile > 0) release_slot(2 * tile - 1);
        carry_on(tile, of0, of1);
        pack(s);
        queue_scores(s, tile + 1);
        queue_output(tile, false);
        wgmma_wait<1>();
        settled(s);
        release_slot(2 * tile + 2);
    }
    {
        const Weights of0 = {m0, l0}, of1 = {m1, l1};
        enter(tile);
        soften_tile(s, tile);
        wgmma_wait<0>();
        settled(o);
        carry_on(tile, of0, of1);
        pack(s);
    }
    queue_output(tile, true);
    wgmma_wait<0>();
    settled(o);
    end_split(splits == 1, true, {m0, quad_sum(l0)}, {m1, quad_sum(l1)});

    const float inverse0 = __frcp_rn(total0.l), inverse1 = __frcp_rn(total1.l);
    __syncwarp();
#pragma unroll
    for (int j = 0; j < D / 8; j += 2) {
        u32 r[4];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float* x = o + 4 * (j + i);
            r[2 * i] = pack_bf16(finish(x[0], inverse0), finish(x[1], inverse0)), r[2 * i + 1] = pack_bf16(finish(x[2], inverse1), finish(x[3], inverse1));
        }
        stmatrix4(chunk_at(matrix_row, j + matrix_chunk), r[0], r[1], r[2], r[3]);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
        const int row = (i * 32 + lane) / (D / 8), chunk = lane % (D / 8);
        if (warp * 16 + row < rows.count) *(uint4*)(out + rows.element(warp * 16 + row, kv_head) + chunk * 8) = smem_load16(chunk_at(row, chunk));
    }
}
