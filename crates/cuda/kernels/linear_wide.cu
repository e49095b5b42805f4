// Linear for many tokens: Y[M, N] = X[M, K] W[N, K]^T in the hopper order (ascending steps of 16 k, LEAVES equal
// chains, joined as a balanced tree or a left fold in fp32, one rounding to bf16; logits stay fp32).
//
// A CTA computes tiles of 128 tokens x TB outputs. One warp feeds a ring of STAGES blocks of 64 k by TMA; two consumer
// warpgroups own 64 tokens each. CLUSTER CTAs share a weight tile, of which each loads a part for all by multicast.
// A tile's result leaves the accumulator when it is done; it is written piece by piece behind the blocks of the next
// tile's first leaf, so that the tensor core never waits for it.
//
// Leaves need running sums: a tree computed depth first keeps one set for each level, a fold keeps one. REGS0..2 of
// each level's TB / 2 floats a thread stay in registers, the rest in shared memory. For 128 x 256 a fold fits, for
// 128 x 192 a tree of 4, for 128 x 128 a tree of 8.
//
// Macros: N K LEAVES TREE LOGITS [SILU] TB STAGES CLUSTER OUT_COLS GROUP REGS0 REGS1 REGS2
#define A_BYTES (128 * 128)
#define B_BYTES (TB * 128)
#define STAGE_BYTES (A_BYTES + B_BYTES)
#define LEAF_BLOCKS ((K + 64 * LEAVES - 1) / (64 * LEAVES))
#define BLOCKS (LEAVES * LEAF_BLOCKS)
#define ACC (TB / 2) // floats a thread
#define SPILL (ACC - REGS0 + (LEVELS > 1 ? ACC - REGS1 : 0) + (LEVELS > 2 ? ACC - REGS2 : 0))
// A warp's shared memory: 16 rows x OUT_COLS columns of bf16 output, and sums.
#define AREA (OUT_COLS * 32 + SPILL * 128)
static_assert(LEAVES == 1 || K % (64 * LEAVES) == 0, "a leaf is whole blocks of 64 k");
static_assert(TB % 32 == 0 && TB / CLUSTER % 8 == 0, "shape");
static_assert(!SILU || (N % 16 == 0 && TB / CLUSTER % 16 == 0 && !LOGITS), "gates and ups alternate, 8 by 8");
static_assert(!LOGITS || N % 2 == 0, "logits are written in pairs");
#define OUTPUTS (SILU ? TB / 2 : TB) // of a tile
static_assert(LOGITS || OUTPUTS % OUT_COLS == 0, "whole buffers");
// What is written behind one block: 16 columns of the tile, of gates and ups 8 outputs.
#define UNITS (TB / 16)

// Unrolled, a tree's levels are known at each leaf; a fold's loop keeps the accumulator in one block of registers.
constexpr int LEAF_UNROLL = TREE && LEAVES > 2 ? LEAVES : 1;

__device__ __forceinline__ void release(u32 bar, int lane) {
    if (CLUSTER == 1) {
        if (lane == 0) mbar_arrive(bar);
    } else if (lane < CLUSTER) {
        mbar_arrive_cluster(bar, lane);
    }
}

// Unit `unit` of a finished tile: bf16 through swizzled shared memory and TMA, which clips what is past the matrix; logits straight from registers.
__device__ __forceinline__ void write_unit(int unit, const Level<ACC, REGS0>& tile, u32 area, const TensorMap* map, void* y, int tokens, int row0, int col0,
                                           int lane) {
    if (LOGITS) {
        const int g = lane / 4, t = lane % 4;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float4 v = tile.get(unit * 8 + half * 4);
            const int n = col0 + unit * 16 + half * 8 + 2 * t, m = row0 + g;
            float* const at = (float*)y + (long)m * N + n;
            if (n < N && m < tokens) *(float2*)at = make_float2(v.x, v.y);
            if (n < N && m + 8 < tokens) *(float2*)(at + 8 * (long)N) = make_float2(v.z, v.w);
        }
        return;
    }
    constexpr int COLS = SILU ? 8 : 16, UNITS_OF_BUFFER = OUT_COLS / COLS;
    const int of_buffer = unit % UNITS_OF_BUFFER, chunk = unit / UNITS_OF_BUFFER;
    if (of_buffer == 0) {
        if (lane == 0) bulk_wait_read<0>();
        __syncwarp();
    }
    const int row = lane & 15, swizzle = OUT_COLS == 64 ? row & 7 : OUT_COLS == 32 ? (row >> 1) & 3 : (row >> 2) & 1;
    auto at = [&](int eight) { return area + row * (OUT_COLS * 2) + ((eight ^ swizzle) << 4); };
    const float4 u = tile.get(unit * 8), v = tile.get(unit * 8 + 4);
    if (SILU) { // 8 columns of 8 rows, of the next 8 rows
        const uint2 r = silu_mul_quad(u, v);
        stmatrix2(at(of_buffer), r.x, r.y);
    } else { // and of the next 8 columns
        stmatrix4(at(2 * of_buffer + (lane >> 4)), pack_bf16(u.x, u.y), pack_bf16(u.z, u.w), pack_bf16(v.x, v.y), pack_bf16(v.z, v.w));
    }
    if (of_buffer == UNITS_OF_BUFFER - 1) {
        async_proxy_fence();
        __syncwarp();
        if (lane == 0) {
            const int col = col0 + chunk * OUT_COLS;
            if (col < (SILU ? N / 2 : N)) tma_store_2d(map, col, row0, area);
            bulk_commit();
        }
    }
}

extern "C" __global__ void __launch_bounds__(384, 1) __cluster_dims__(CLUSTER, 1, 1)
    linear(const __grid_constant__ TensorMap map_x, const __grid_constant__ TensorMap map_w, const __grid_constant__ TensorMap map_y, void* __restrict__ y, int tokens) {
    extern __shared__ __align__(1024) u8 smem[];
    const u32 stage0 = smem_addr(smem), areas = stage0 + STAGES * STAGE_BYTES;
    const u32 full = areas + 8 * AREA, empty = full + 8 * STAGES;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, wg = threadIdx.x / 128;
    const u32 rank = CLUSTER > 1 ? cluster_rank() : 0;
    // A cluster's CTAs take neighbouring token tiles of one weight tile.
    const int a_tiles = (tokens + 128 * CLUSTER - 1) / (128 * CLUSTER), b_tiles = (N + TB - 1) / TB;
    const int tiles = a_tiles * b_tiles, first = blockIdx.x / CLUSTER, step = gridDim.x / CLUSTER;

    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            mbar_init(full + 8 * s, 1);
            mbar_init(empty + 8 * s, 8 * CLUSTER);
        }
        mbar_init_fence();
    }
    launch_dependents();
    if (CLUSTER > 1) cluster_sync();
    else __syncthreads();

    if (wg == 2) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (warp == 8 && lane == 0 && first < tiles) {
            int row_x, row_w; // of this CTA's parts of the tile
            auto turn_to = [&](int tile) {
                int a, b;
                tile_at(tile, a_tiles, b_tiles, a, b);
                row_x = (a * CLUSTER + rank) * 128, row_w = b * TB + rank * (TB / CLUSTER);
            };
            auto load_x = [&](int kb, u32 slot) { tma_load_2d(stage0 + slot * STAGE_BYTES, &map_x, kb * 64, row_x, full + 8 * slot, CACHE_EVICT_NORMAL); };
            auto load_w = [&](int kb, u32 slot) {
                const u32 dst = stage0 + slot * STAGE_BYTES + A_BYTES + rank * (B_BYTES / CLUSTER), bar = full + 8 * slot;
                if (CLUSTER == 1) load_weights(dst, &map_w, kb * 64, row_w, bar, CACHE_EVICT_NORMAL);
                else load_weights_multicast(dst, &map_w, kb * 64, row_w, bar, (u16)((1 << CLUSTER) - 1), CACHE_EVICT_NORMAL);
            };
            // The first weights are on their way while the previous kernel in the stream still writes x.
            constexpr int EARLY = STAGES < BLOCKS ? STAGES : BLOCKS;
            turn_to(first);
            for (int kb = 0; kb < EARLY; kb++) {
                mbar_expect_tx(full + 8 * kb, STAGE_BYTES);
                load_w(kb, kb);
            }
            wait_for_producers();
            for (int kb = 0; kb < EARLY; kb++) load_x(kb, kb);
            Ring ring = {EARLY % STAGES, EARLY == STAGES ? 0u : 1u}; // the first pass over the ring finds every slot free
            for (int tile = first, kb = EARLY; tile < tiles; tile += step, kb = 0) {
                turn_to(tile);
                for (; kb < BLOCKS; kb++, ring.next()) {
                    mbar_wait(empty + 8 * ring.slot, ring.phase);
                    mbar_expect_tx(full + 8 * ring.slot, STAGE_BYTES);
                    load_x(kb, ring.slot);
                    load_w(kb, ring.slot);
                }
            }
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        const u32 area = areas + warp * AREA;
        Ring ring = {0, 0};
        Sums<ACC, REGS0, REGS1, REGS2> sums;
        sums.place(area + OUT_COLS * 32, lane);
        u32 previous = 0; // the slot whose products are under way
        auto block = [&](bool fresh) {
            const u32 s = ring.slot;
            mbar_wait(full + 8 * s, ring.phase);
            const u64 a = wgmma_desc(stage0 + s * STAGE_BYTES + wg * 64 * 128);
            const u64 b = wgmma_desc(stage0 + s * STAGE_BYTES + A_BYTES);
            wgmma_fence();
#pragma unroll
            for (int c = 0; c < 4; c++) wgmma_tb(sums.acc, a + 2 * c, b + 2 * c, !(fresh && c == 0));
            wgmma_commit();
        };
        // The slot of the block before the one under way is free.
        auto retire = [&] {
            wgmma_wait<1>();
            release(empty + 8 * previous, lane);
        };
        auto advance = [&] {
            previous = ring.slot;
            ring.next();
        };
        auto rest_of_leaf = [&](int done) {
#pragma unroll 1
            for (int kb = done; kb < LEAF_BLOCKS; kb++) {
                block(false);
                retire();
                advance();
            }
            wgmma_wait<0>();
            release(empty + 8 * previous, lane);
        };
        int row0 = 0, col0 = 0; // of the finished tile, in this warp's output
        auto place_output = [&](int tile) {
            int a, b;
            tile_at(tile, a_tiles, b_tiles, a, b);
            row0 = (a * CLUSTER + rank) * 128 + warp * 16, col0 = b * OUTPUTS;
        };
        auto write = [&](int unit) { write_unit(unit, sums.level0, area, &map_y, y, tokens, row0, col0, lane); };
        for (int tile = first; tile < tiles; tile += step) {
            constexpr int STEPS = UNITS < LEAF_BLOCKS ? UNITS : LEAF_BLOCKS;
#pragma unroll
            for (int kb = 0; kb < STEPS; kb++) {
                block(kb == 0);
                if (tile != first) {
#pragma unroll
                    for (int unit = kb * UNITS / STEPS; unit < (kb + 1) * UNITS / STEPS; unit++) write(unit);
                }
                if (kb > 0) retire();
                advance();
            }
            rest_of_leaf(STEPS);
            sums.join(0, LEAVES);
#pragma unroll LEAF_UNROLL
            for (int leaf = 1; leaf < LEAVES; leaf++) {
                block(true);
                advance();
                rest_of_leaf(1);
                sums.join(leaf, LEAVES);
            }
            place_output(tile);
        }
        if (first < tiles) {
#pragma unroll
            for (int unit = 0; unit < UNITS; unit++) write(unit);
        }
        if (lane == 0) bulk_wait<0>();
    }
    if (CLUSTER > 1) cluster_sync(); // no CTA leaves while a peer may still send to it or arrive at its barriers
}
