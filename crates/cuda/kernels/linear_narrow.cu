// Linear for some tokens (up to some 200): Y[M, N] = X[M, K] W[N, K]^T in the hopper order, as in linear_wide.cu, with the weights
// on the 64-row side of the tensor core and the tokens on its n = TB side.
//
// A cluster of KSPLIT CTAs computes one tile of 64 * WGS outputs x TB tokens; each CTA has an equal run of leaves, and
// partial tiles join through distributed shared memory (of a fold, every leaf's). Weights are requested before the previous kernel in the stream has ended.
//
// Macros: N K LEAVES TREE LOGITS [SILU] TB WGS STAGES KSPLIT MIN_CTAS LEVELS
#define ROWS (64 * WGS)
#define A_BYTES (ROWS * 128)
#define B_BYTES (TB * 128)
#define STAGE_BYTES (A_BYTES + B_BYTES)
#define CTA_LEAVES (LEAVES / KSPLIT)
#define LEAF_BLOCKS ((K + 64 * LEAVES - 1) / (64 * LEAVES))
#define CTA_BLOCKS (CTA_LEAVES * LEAF_BLOCKS)
#define ACC (TB / 2)
#define THREADS (128 * WGS + 32)
#define PITCH (ROWS + 4) // of the fp32 tile [TB][ROWS + 4] in shared memory
#define TILE_FLOATS (TB * PITCH)
// Partial tiles of a CTA: of a tree its subtree's sum, of a shared fold each leaf.
#define PARTS (KSPLIT > 1 && !TREE ? CTA_LEAVES : 1)
// The last part lies where the ring was.
#define RING_BYTES (STAGES * STAGE_BYTES > TILE_FLOATS * 4 ? STAGES * STAGE_BYTES : TILE_FLOATS * 4)
#define PART_AT(part) ((part) == PARTS - 1 ? 0 : RING_BYTES + (part) * TILE_FLOATS * 4)
static_assert(TB % KSPLIT == 0, "each CTA of a cluster writes as many tokens");
static_assert(!SILU || KSPLIT == 1, "gates and ups are one block's");

// Blocks behind the ring's that come to the second-level cache while the launches ahead still run: of gates and ups whose tiles all run at once. With more
// tiles than that the later ones lose more than the first ones gain, in other layers nothing is gained (LOG.md, "a decode step taken apart").
constexpr int MULTIPROCESSORS = 132;
constexpr int AHEAD = SILU && TB == 8 && MIN_CTAS == 2 && N <= ROWS * MIN_CTAS * MULTIPROCESSORS ? 4 : 0;

constexpr int LEAF_UNROLL = TREE && CTA_LEAVES > 2 ? CTA_LEAVES : 1;

// Every warp's products have read their slots. The warp that asks for copies comes too: racecheck takes who missed a barrier for one barrier behind.
__device__ __forceinline__ void ring_is_read() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory"); }

extern "C" __global__ void __launch_bounds__(THREADS, MIN_CTAS) __cluster_dims__(KSPLIT, 1, 1)
    linear(const __grid_constant__ TensorMap map_x, const __grid_constant__ TensorMap map_w, void* __restrict__ y, int tokens) {
    extern __shared__ __align__(1024) u8 smem[];
    const u32 stage0 = smem_addr(smem);
    const u32 full = stage0 + RING_BYTES + (PARTS - 1) * TILE_FLOATS * 4, empty = full + 8 * STAGES;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, wg = threadIdx.x / 128;
    const u32 rank = KSPLIT > 1 ? cluster_rank() : 0;
    constexpr int N_TILES = (N + ROWS - 1) / ROWS;
    const int tile = blockIdx.x / KSPLIT, n0 = tile % N_TILES * ROWS, m0 = tile / N_TILES * TB;

    // Block i of 64 k, into a slot at `at`.
    auto load_w = [&](int i, u32 at, u32 bar) { load_weights(at, &map_w, (rank * CTA_BLOCKS + i) * 64, n0, bar, CACHE_EVICT_FIRST); };
    auto load_x = [&](int i, u32 at, u32 bar) { tma_load_2d(at + A_BYTES, &map_x, (rank * CTA_BLOCKS + i) * 64, m0, bar, CACHE_EVICT_LAST); };

    if (threadIdx.x == 128 * WGS) {
        for (int s = 0; s < STAGES; s++) {
            mbar_init(full + 8 * s, 1);
            mbar_init(empty + 8 * s, 4 * WGS);
        }
        mbar_init_fence();
        constexpr int EARLY = STAGES < CTA_BLOCKS ? STAGES : CTA_BLOCKS;
        for (int i = 0; i < EARLY; i++) {
            mbar_expect_tx(full + 8 * i, STAGE_BYTES);
            load_w(i, stage0 + i * STAGE_BYTES, full + 8 * i);
        }
        if (SILU)
            for (int i = EARLY; i < EARLY + AHEAD && i < CTA_BLOCKS; i++) tma_prefetch_4d(&map_w, i * 64, 0, 0, n0 / 16, CACHE_EVICT_FIRST);
        wait_for_producers();
        for (int i = 0; i < EARLY; i++) load_x(i, stage0 + i * STAGE_BYTES, full + 8 * i);
    }
    launch_dependents();
    __syncthreads();

    if (warp == 4 * WGS) {
        if (lane == 0) {
            Ring ring = {0, 0};
            for (int i = STAGES; i < CTA_BLOCKS; i++, ring.next()) {
                const u32 bar = full + 8 * ring.slot, at = stage0 + ring.slot * STAGE_BYTES;
                mbar_wait(empty + 8 * ring.slot, ring.phase);
                mbar_expect_tx(bar, STAGE_BYTES);
                load_w(i, at, bar);
                load_x(i, at, bar);
            }
        }
        __syncwarp(); // a warp arrives whole at a barrier
        ring_is_read();
    } else {
        Ring ring = {0, 0};
        Sums<ACC, ACC, ACC, ACC> sums;
        auto publish = [&](const float* v, int part) {
            float* const out = (float*)(smem + PART_AT(part));
            const int g = lane / 4, t = lane % 4;
            if (part == PARTS - 1) ring_is_read();
#pragma unroll
            for (int j = 0; j < TB / 8; j++)
#pragma unroll
                for (int q = 0; q < 4; q++) out[(j * 8 + 2 * t + (q & 1)) * PITCH + warp * 16 + g + (q >> 1) * 8] = v[j * 4 + q];
        };
#pragma unroll LEAF_UNROLL
        for (int leaf = 0; leaf < CTA_LEAVES; leaf++) {
            u32 previous = 0;
#pragma unroll 1
            for (int kb = 0; kb < LEAF_BLOCKS; kb++) {
                const u32 s = ring.slot;
                mbar_wait(full + 8 * s, ring.phase);
                const u64 a = wgmma_desc(stage0 + s * STAGE_BYTES + wg * 64 * 128);
                const u64 b = wgmma_desc(stage0 + s * STAGE_BYTES + A_BYTES);
                wgmma_fence();
#pragma unroll
                for (int c = 0; c < 4; c++) wgmma_tb(sums.acc, a + 2 * c, b + 2 * c, kb | c);
                wgmma_commit();
                wgmma_wait<1>();
                if (kb > 0 && lane == 0) mbar_arrive(empty + 8 * previous);
                previous = s;
                ring.next();
            }
            wgmma_wait<0>();
            if (lane == 0) mbar_arrive(empty + 8 * previous);
            if (PARTS > 1) publish(sums.acc, leaf);
            else if (CTA_LEAVES > 1) sums.join(leaf, CTA_LEAVES);
        }
        if (PARTS == 1) publish(CTA_LEAVES > 1 ? sums.level0.reg : sums.acc, 0);
    }
    if (KSPLIT > 1) cluster_sync();
    else __syncthreads();
    if (SILU) { // 4 outputs a thread, from 4 gates and the 4 ups 8 rows on
        for (int i = threadIdx.x; i < TB * (ROWS / 8); i += THREADS) {
            const int token = i / (ROWS / 8), col = i % (ROWS / 8) * 4, n = n0 / 2 + col;
            const long m = m0 + token;
            if (m >= tokens || n >= N / 2) continue;
            const u32 at = stage0 + (token * PITCH + col / 8 * 16 + col % 8) * 4;
            const float4 g = smem_load4(at), u = smem_load4(at + 32);
            const u32 gate[2] = {pack_bf16(g.x, g.y), pack_bf16(g.z, g.w)}, up[2] = {pack_bf16(u.x, u.y), pack_bf16(u.z, u.w)};
            u32 out[2];
            silu_mul_pairs(gate, up, out);
            *(uint2*)((bf16*)y + m * (N / 2) + n) = make_uint2(out[0], out[1]);
        }
        return;
    }
    // CTA r joins and writes every KSPLIT-th token, 4 outputs a thread.
    for (int i = threadIdx.x; i < TB / KSPLIT * (ROWS / 4); i += THREADS) {
        const int token = i / (ROWS / 4) * KSPLIT + rank, col = i % (ROWS / 4) * 4;
        const long m = m0 + token;
        const int n = n0 + col;
        if (m >= tokens || n >= N) continue;
        const u32 at = stage0 + (token * PITCH + col) * 4;
        float4 v[KSPLIT * PARTS];
#pragma unroll
        for (int r = 0; r < KSPLIT * PARTS; r++) v[r] = KSPLIT == 1 ? smem_load4(at) : cluster_load4(at + PART_AT(r % PARTS), r / PARTS);
        join_leaves(v);
        if (N % 4 == 0) {
            if (LOGITS) *(float4*)((float*)y + m * N + n) = v[0];
            else *(uint2*)((bf16*)y + m * N + n) = make_uint2(pack_bf16(v[0].x, v[0].y), pack_bf16(v[0].z, v[0].w));
        } else {
            const float e[4] = {v[0].x, v[0].y, v[0].z, v[0].w};
            for (int q = 0; q < 4 && n + q < N; q++) write_output(y, m, n + q, e[q]);
        }
    }
    if (KSPLIT > 1) cluster_sync(); // a peer may still read this CTA's tile
}
