// Linear for many tokens: Y[M, N] = X[M, K] W[N, K]^T in the hopper order (ascending steps of 16 k, LEAVES equal
// chains, joined as a balanced tree or a left fold in fp32, one rounding to bf16; logits stay fp32).
//
// A CTA computes tiles of 128 tokens x TB outputs. One warp feeds a ring of STAGES blocks of 64 k by TMA; two consumer
// warpgroups own 64 tokens each. CLUSTER CTAs share a weight tile, of which each loads a part for all by multicast.
// A tile's result leaves the accumulator when it is done, rounded to bf16 (logits as they are); it is written piece by piece
// behind the blocks of the next tile's first leaf, so that the tensor core never waits for it. The last tile's goes all
// at once, through the ring, which nobody needs any more.
//
// Leaves need running sums: a tree computed depth first keeps one set for each level, a fold keeps one. REGS0..2 of
// each level's TB / 2 floats a thread stay in registers, the rest in shared memory. For 128 x 256 a fold fits, for
// 128 x 192 a tree of 4, for 128 x 128 a tree of 8.
//
// Macros: N K LEAVES TREE LOGITS [SILU] TB STAGES CLUSTER OUT_COLS RASTER REGS0 REGS1 REGS2 LEVELS
#define A_BYTES (128 * 128)
#define B_BYTES (TB * 128)
#define STAGE_BYTES (A_BYTES + B_BYTES)
#define LEAF_BLOCKS ((K + 64 * LEAVES - 1) / (64 * LEAVES))
#define BLOCKS (LEAVES * LEAF_BLOCKS)
#define ACC (TB / 2) // floats a thread
// One leaf has no running sums; logits wait where those would be.
#define SPILL (LEAVES == 1 && !LOGITS ? 0 : ACC - REGS0 + (LEVELS > 1 ? ACC - REGS1 : 0) + (LEVELS > 2 ? ACC - REGS2 : 0))
// A warp's shared memory: 16 rows x OUT_COLS columns of bf16 output, and sums.
#define AREA (OUT_COLS * 32 + SPILL * 128)
static_assert(TB % 32 == 0 && TB / CLUSTER % 8 == 0, "shape");
static_assert(!SILU || TB / CLUSTER % 16 == 0, "gates and ups alternate, 8 by 8");
static_assert(!LOGITS || N % 2 == 0, "logits are written in pairs");
#define OUTPUTS (SILU ? TB / 2 : TB) // of a tile
static_assert(LOGITS || OUTPUTS % OUT_COLS == 0, "whole buffers");
// What is written behind one block: 16 columns of the tile, of gates and ups 8 outputs.
#define UNITS (TB / 16)
#define UNITS_OF_BUFFER (OUT_COLS / (SILU ? 8 : 16))
static_assert(OUTPUTS * 256 <= STAGES * STAGE_BYTES, "the last tile's output finds room in the ring");

// Unrolled, a tree's levels are known at each leaf; a fold's loop keeps the accumulator in one block of registers.
constexpr int LEAF_UNROLL = TREE && LEAVES > 2 ? LEAVES : 1;

__device__ __forceinline__ void release(u32 bar, int lane) {
    if (CLUSTER == 1) {
        if (lane == 0) mbar_arrive(bar);
    } else if (lane < CLUSTER) {
        mbar_arrive_cluster(bar, lane);
    }
}

// Tiles in their order: RASTER token tiles (a) share the weight tiles (b) that stream past them.
__device__ __forceinline__ void tile_at(int tile, int a_tiles, int b_tiles, int& a, int& b) {
    int per_group = RASTER * b_tiles, group = tile / per_group, rest = tile % per_group;
    int height = min(RASTER, a_tiles - group * RASTER);
    a = group * RASTER + rest % height;
    b = rest / height;
}

// What a finished tile leaves, in the order of the sums in registers.
struct Pairs {
    u32 pair[ACC / 2];
    __device__ __forceinline__ void put(int i, float4 v) { pair[i / 2] = pack_bf16(v.x, v.y), pair[i / 2 + 1] = pack_bf16(v.z, v.w); }
};
#if LOGITS
typedef Level<ACC, REGS0> Result;
#else
typedef Pairs Result;
#endif

// Units unit, unit + 1, .. of a finished tile: bf16 through swizzled shared memory and TMA, which clips what is past the matrix; logits straight
// from registers. place: where the lane's row is in the buffer, lane 0's its start. REUSED: it holds earlier output.
template <int COUNT, bool REUSED>
__device__ __forceinline__ void write_units(int unit, const Result& result, u32 place, const TensorMap* map, void* y, int tokens, int row0, int col0,
                                            int lane) {
#if LOGITS
    const int g = lane / 4, t = lane % 4, m = row0 + g;
#pragma unroll
    for (int i = 2 * unit; i < 2 * (unit + COUNT); i++) {
        const float4 v = result.get(i * 4);
        const int n = col0 + i * 8 + 2 * t;
        float* const at = (float*)y + (long)m * N + n;
        if (n < N && m < tokens) *(float2*)at = make_float2(v.x, v.y);
        if (n < N && m + 8 < tokens) *(float2*)(at + 8 * (long)N) = make_float2(v.z, v.w);
    }
#else
    if (REUSED && unit % UNITS_OF_BUFFER == 0) {
        if (lane == 0) bulk_wait_read<0>();
        __syncwarp();
    }
    const u32* const pair = result.pair + 4 * unit; // of each unit two eights of columns, of those 8 rows and the next 8
#pragma unroll
    for (int i = 0; i < (SILU ? 0 : COUNT); i++)
        stmatrix4(place ^ (unit + i) % UNITS_OF_BUFFER << 5, pair[4 * i], pair[4 * i + 1], pair[4 * i + 2], pair[4 * i + 3]);
    if (SILU) {
        u32 gate[2 * COUNT], up[2 * COUNT], out[2 * COUNT];
#pragma unroll
        for (int i = 0; i < 2 * COUNT; i++) gate[i] = pair[i / 2 * 4 + i % 2], up[i] = pair[i / 2 * 4 + 2 + i % 2];
        silu_mul_pairs(gate, up, out);
#pragma unroll
        for (int i = 0; i < COUNT; i++) stmatrix2(place ^ (unit + i) % UNITS_OF_BUFFER << 4, out[2 * i], out[2 * i + 1]);
    }
    if ((unit + COUNT) % UNITS_OF_BUFFER == 0) {
        async_proxy_fence();
        __syncwarp();
        if (lane == 0) {
            const int col = col0 + unit / UNITS_OF_BUFFER * OUT_COLS;
            if (col < (SILU ? N / 2 : N)) tma_store_2d(map, col, row0, place);
            bulk_commit();
        }
    }
#endif
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
        Result result;
#if LOGITS
        result.spill = sums.level0.spill; // the next tile's sums come there when this one's are written
#endif
        const int row = lane & 15, swizzle = OUT_COLS == 64 ? row & 7 : OUT_COLS == 32 ? row >> 1 & 3 : row >> 2 & 1;
        u32 place = area + row * (OUT_COLS * 2) + ((SILU ? swizzle : swizzle ^ lane >> 4) << 4);
        asm volatile("" : "+r"(place)); // is not worth computing anew for every piece
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
        for (int tile = first; tile < tiles; tile += step) {
            constexpr int STEPS = UNITS < LEAF_BLOCKS ? UNITS : LEAF_BLOCKS;
#pragma unroll
            for (int kb = 0; kb < STEPS; kb++) {
                block(kb == 0);
                if (tile != first) {
#pragma unroll
                    for (int unit = kb * UNITS / STEPS; unit < (kb + 1) * UNITS / STEPS; unit++)
                        write_units<1, true>(unit, result, place, &map_y, y, tokens, row0, col0, lane);
                }
                if (kb > 0) retire();
                advance();
            }
            rest_of_leaf(STEPS);
            auto next_leaf = [&] {
                block(true);
                advance();
                rest_of_leaf(1);
            };
            if (LEAVES > 1) {
                sums.join(0, LEAVES);
#pragma unroll LEAF_UNROLL
                for (int leaf = 1; leaf < LEAVES - 1; leaf++) {
                    next_leaf();
                    sums.join(leaf, LEAVES);
                }
                next_leaf();
            }
#pragma unroll
            for (int i = 0; i < ACC; i += 4) result.put(i, sums.total(i));
            place_output(tile);
        }
        if (first < tiles) { // the last tile has the ring to itself, once nobody multiplies from it
            asm volatile("bar.sync 1, 256;" ::: "memory");
            const u32 ring_from_area = stage0 - area;
            constexpr int BUFFERS = LOGITS ? UNITS : OUTPUTS / OUT_COLS, COUNT = UNITS / BUFFERS;
#pragma unroll
            for (int i = 0; i < BUFFERS; i++)
                write_units<COUNT, false>(i * COUNT, result, place + ring_from_area + (warp * BUFFERS + i) * (OUT_COLS * 32), &map_y, y, tokens, row0, col0, lane);
        }
        if (lane == 0) bulk_wait<0>();
    }
    if (CLUSTER > 1) cluster_sync(); // no CTA leaves while a peer may still send to it or arrive at its barriers
}
