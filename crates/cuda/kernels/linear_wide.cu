// Linear for many tokens: Y[M, N] = X[M, K] W[N, K]^T in the hopper order (ascending steps of 16 k, LEAVES equal
// chains, joined as a balanced tree or a left fold in fp32, one rounding to bf16).
//
// A CTA computes tiles of 128 tokens x TB outputs. One warp feeds a ring of STAGES blocks of 64 k by TMA, weights
// multicast to CLUSTER CTAs; two consumer warpgroups own 64 tokens each. A tile's result
// leaves the accumulator when it is done, so that its output is written while the tensor core is at the next tile.
//
// Leaves need running sums: a tree computed depth first keeps one set for each level, a fold keeps one. REGS0..2 of
// each level's TB / 2 floats a thread stay in registers, the rest in shared memory. For 128 x 256 a fold fits, for
// 128 x 192 a tree of 4, for 128 x 128 a tree of 8.
//
// Macros: N K LEAVES TREE [SILU] TB STAGES CLUSTER OUT_BUFFERS OUT_COLS GROUP REGS0 REGS1 REGS2
#define A_BYTES (128 * 128)
#define B_BYTES (TB * 128)
#define STAGE_BYTES (A_BYTES + B_BYTES)
#define LEAF_BLOCKS ((K + 64 * LEAVES - 1) / (64 * LEAVES))
#define ACC (TB / 2) // floats a thread
#define SPILL (ACC - REGS0 + (LEVELS > 1 ? ACC - REGS1 : 0) + (LEVELS > 2 ? ACC - REGS2 : 0))
// A warp's shared memory: OUT_BUFFERS buffers of 16 rows x OUT_COLS columns of output, and sums.
#define AREA (OUT_BUFFERS * OUT_COLS * 32 + SPILL * 128)
static_assert(LEAVES == 1 || K % (64 * LEAVES) == 0, "a leaf is whole blocks of 64 k");
static_assert(TB % 64 == 0, "shape");
static_assert(!LOGITS, "writes bf16");
static_assert(!SILU || N % 16 == 0, "gates and ups alternate, 8 by 8");
#define OUTPUTS (SILU ? TB / 2 : TB) // of a tile
static_assert(OUTPUTS % OUT_COLS == 0, "whole buffers");

// Unrolled, a tree's levels are known at each leaf; a fold's loop keeps the accumulator in one block of registers.
constexpr int LEAF_UNROLL = TREE && LEAVES > 2 ? LEAVES : 1;

__device__ __forceinline__ void release(u32 bar, int lane) {
    if (CLUSTER == 1) {
        if (lane == 0) mbar_arrive(bar);
    } else if (lane < CLUSTER) {
        mbar_arrive_cluster(bar, lane);
    }
}

// 16 rows x OUT_COLS columns at a time: registers -> swizzled shared memory -> TMA, which clips rows past the matrix.
__device__ __forceinline__ void write_tile(const Level<ACC, REGS0>& tile, u32 area, const TensorMap* map, int row0, int col0, int lane) {
    const int row = lane & 15;
#pragma unroll
    for (int chunk = 0; chunk < OUTPUTS / OUT_COLS; chunk++) {
        const u32 buffer = area + chunk % OUT_BUFFERS * (OUT_COLS * 32);
        if (lane == 0) bulk_wait_read<OUT_BUFFERS - 1>();
        __syncwarp();
#pragma unroll
        for (int j = 0; j < OUT_COLS / 8; j += 2) {
            u32 r[4]; // 8 columns of 8 rows, the next 8 rows, the next 8 columns
            if (SILU) {
                const int at = (chunk * (OUT_COLS / 8) + j) * 8;
#pragma unroll
                for (int side = 0; side < 2; side++) {
                    const float4 g = tile.get(at + 8 * side), u = tile.get(at + 8 * side + 4);
                    r[2 * side] = silu_mul_pair(g.x, u.x, g.y, u.y), r[2 * side + 1] = silu_mul_pair(g.z, u.z, g.w, u.w);
                }
            } else {
                const int at = (chunk * (OUT_COLS / 8) + j) * 4;
                const float4 u = tile.get(at), v = tile.get(at + 4);
                r[0] = pack_bf16(u.x, u.y), r[1] = pack_bf16(u.z, u.w), r[2] = pack_bf16(v.x, v.y), r[3] = pack_bf16(v.z, v.w);
            }
            const int unit = j + (lane >> 4), swizzle = OUT_COLS == 64 ? row & 7 : (row >> 1) & 3;
            const u32 dst = buffer + row * (OUT_COLS * 2) + ((unit ^ swizzle) << 4);
            asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(dst), "r"(r[0]), "r"(r[1]), "r"(r[2]),
                         "r"(r[3]) : "memory");
        }
        async_proxy_fence();
        __syncwarp();
        if (lane == 0) {
            if (col0 + chunk * OUT_COLS < (SILU ? N / 2 : N)) tma_store_2d(map, col0 + chunk * OUT_COLS, row0, buffer);
            bulk_commit();
        }
    }
}

extern "C" __global__ void __launch_bounds__(384, 1) __cluster_dims__(CLUSTER, 1, 1)
    linear(const __grid_constant__ TensorMap map_x, const __grid_constant__ TensorMap map_w, const __grid_constant__ TensorMap map_y, int tokens) {
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
        if (warp == 8 && lane == 0) {
            wait_for_producers();
            Ring ring = {0, 1}; // the first pass over the ring finds every slot free
            for (int tile = first; tile < tiles; tile += step) {
                int a, b;
                tile_at(tile, a_tiles, b_tiles, a, b);
                const int token0 = (a * CLUSTER + rank) * 128, out0 = b * TB + rank * (TB / CLUSTER);
                for (int kb = 0; kb < LEAVES * LEAF_BLOCKS; kb++, ring.next()) {
                    const u32 bar = full + 8 * ring.slot, at = stage0 + ring.slot * STAGE_BYTES;
                    mbar_wait(empty + 8 * ring.slot, ring.phase);
                    mbar_expect_tx(bar, STAGE_BYTES);
                    tma_load_2d(at, &map_x, kb * 64, token0, bar, CACHE_EVICT_NORMAL);
                    if (CLUSTER == 1) load_weights(at + A_BYTES, &map_w, kb * 64, out0, bar, CACHE_EVICT_NORMAL);
                    else
                        load_weights_multicast(at + A_BYTES + rank * (B_BYTES / CLUSTER), &map_w, kb * 64, out0, bar,
                                              (u16)((1 << CLUSTER) - 1), CACHE_EVICT_NORMAL);
                }
            }
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        const u32 area = areas + warp * AREA;
        Ring ring = {0, 0};
        Sums<ACC, REGS0, REGS1, REGS2> sums;
        sums.place(area + OUT_BUFFERS * OUT_COLS * 32, lane);
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
        auto rest_of_leaf = [&] {
#pragma unroll 1
            for (int kb = 1; kb < LEAF_BLOCKS; kb++) {
                block(false);
                wgmma_wait<1>();
                release(empty + 8 * previous, lane);
                previous = ring.slot;
                ring.next();
            }
            wgmma_wait<0>();
            release(empty + 8 * previous, lane);
        };
        auto first_of_leaf = [&] {
            block(true);
            previous = ring.slot;
            ring.next();
        };
        auto write = [&](int tile) {
            int a, b;
            tile_at(tile, a_tiles, b_tiles, a, b);
            write_tile(sums.level0, area, &map_y, (a * CLUSTER + rank) * 128 + warp * 16, b * OUTPUTS, lane);
        };
        for (int tile = first; tile < tiles; tile += step) {
            first_of_leaf();
            if (tile != first) write(tile - step); // while the tensor core is at the next tile
            rest_of_leaf();
            sums.join(0, LEAVES);
#pragma unroll LEAF_UNROLL
            for (int leaf = 1; leaf < LEAVES; leaf++) {
                first_of_leaf();
                rest_of_leaf();
                sums.join(leaf, LEAVES);
            }
        }
        if (first < tiles) write(first + (tiles - 1 - first) / step * step);
        if (lane == 0) bulk_wait<0>();
    }
    if (CLUSTER > 1) cluster_sync(); // no CTA leaves while a peer may still send to it or arrive at its barriers
}
