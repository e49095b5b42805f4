// Linear for few tokens (up to 16): Y[M, N] = X[M, K] W[N, K]^T in the hopper order, on 16-row mma.sync tiles, which have wgmma's bits and
// are small enough to keep every multiprocessor streaming weights.
//
// One warp a (tile of 16 outputs, leaf); TILES tiles a CTA, persistent over N. Weights come by TMA boxes of 16 rows x 64 k
// into the warp's own ring of STAGES slots; activations lie in shared memory, rows padded by 32 bytes. Inside a
// 16-chunk k is permuted (lane t holds k = 4t..4t+3, one 8-byte load a row), which leaves the bits as they are.
//
// Macros: N K LEAVES TREE LOGITS TILES NT STAGES
#define WARPS (LEAVES * TILES)
#define LEAF_K ((K + LEAVES - 1) / LEAVES)
#define LEAF_BLOCKS ((LEAF_K + 63) / 64)
#define PADDED_K (LEAVES * LEAF_BLOCKS * 64)
#define X_PITCH (PADDED_K * 2 + 32)
#define SLOT 2048
static_assert(K % 8 == 0, "rows are multiples of 16 bytes");

extern "C" __global__ void __launch_bounds__(32 * WARPS, 1)
    linear(const __grid_constant__ TensorMap map_w, const bf16* __restrict__ x, void* __restrict__ y, int tokens) {
    extern __shared__ __align__(1024) u8 smem[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int tile_of_cta = warp / LEAVES, leaf = warp % LEAVES;
    const u32 base = smem_addr(smem), ring = base + warp * STAGES * SLOT;
    u8* const xs = smem + WARPS * STAGES * SLOT;
    const u32 bars = smem_addr(xs) + NT * 8 * X_PITCH, x_bar = bars + WARPS * STAGES * 8;
    float* const part = (float*)(xs + NT * 8 * X_PITCH + WARPS * STAGES * 8 + 16); // [WARPS][NT][4][32]
    const u32 mine = bars + warp * STAGES * 8;

    constexpr int N_TILES = (N + 15) / 16;
    const int rounds = (N_TILES - (int)blockIdx.x * TILES + (int)gridDim.x * TILES - 1) / ((int)gridDim.x * TILES);
    auto tile_at = [&](int round) { return (blockIdx.x + round * gridDim.x) * TILES + tile_of_cta; };
    const int my_rounds = tile_at(rounds - 1) < N_TILES ? rounds : rounds - 1, total = my_rounds * LEAF_BLOCKS;
    auto request = [&](int i) {
        const int s = i % STAGES;
        mbar_expect_tx(mine + 8 * s, SLOT);
        tma_load_2d(ring + s * SLOT, &map_w, leaf * LEAF_K + i % LEAF_BLOCKS * 64, tile_at(i / LEAF_BLOCKS) * 16, mine + 8 * s, CACHE_EVICT_FIRST);
    };
    if (lane == 0) {
        for (int s = 0; s < STAGES; s++) mbar_init(mine + 8 * s, 1);
        if (warp == 0) mbar_init(x_bar, 1);
        mbar_init_fence();
        for (int i = 0; i < STAGES && i < total; i++) request(i);
    }
    if (PADDED_K > K) { // weights past K read as zero; so must activations, lest they be NaN
        constexpr int PAD = PADDED_K > K ? PADDED_K - K : 1;
        for (int i = threadIdx.x; i < NT * 8 * PAD; i += 32 * WARPS) ((bf16*)(xs + i / PAD * X_PITCH))[K + i % PAD] = 0;
    }
    launch_dependents();
    __syncthreads();
    wait_for_producers();
    if (threadIdx.x == 0) {
        mbar_expect_tx(x_bar, tokens * K * 2);
        for (int m = 0; m < tokens; m++) bulk_load(smem_addr(xs) + m * X_PITCH, x + (long)m * K, K * 2, x_bar);
    }
    mbar_wait(x_bar, 0);

    struct Fragments {
        uint4 w[4];
        uint2 x[4][NT];
    };
    const u8* const my_x = xs + g * X_PITCH + leaf * LEAF_K * 2 + 8 * t;
    auto fetch = [&](int i, Fragments& f) {
        const int s = i % STAGES, b = i % LEAF_BLOCKS;
        mbar_wait(mine + 8 * s, i / STAGES & 1);
        const u8* p = smem + (ring - base) + s * SLOT + g * 128;
#pragma unroll
        for (int c = 0; c < 4; c++) {
            const int at = (((2 * c + (t >> 1)) ^ g) << 4) | ((t & 1) << 3); // 128-byte swizzle; rows g and g + 8 share it
            const uint2 lo = *(const uint2*)(p + at), hi = *(const uint2*)(p + 8 * 128 + at);
            f.w[c] = make_uint4(lo.x, hi.x, lo.y, hi.y);
#pragma unroll
            for (int j = 0; j < NT; j++) f.x[c][j] = *(const uint2*)(my_x + j * 8 * X_PITCH + b * 128 + c * 32);
        }
    };
    for (int round = 0, i = 0; round < rounds; round++) {
        const int tile = tile_at(round);
        const bool on = tile < N_TILES;
        float acc[NT][4];
#pragma unroll
        for (int j = 0; j < NT; j++)
#pragma unroll
            for (int q = 0; q < 4; q++) acc[j][q] = 0.f;
        if (on) {
            Fragments f[2];
            auto multiply = [&](const Fragments& f) {
#pragma unroll
                for (int c = 0; c < 4; c++)
#pragma unroll
                    for (int j = 0; j < NT; j++) mma_16816(acc[j], f.w[c].x, f.w[c].y, f.w[c].z, f.w[c].w, f.x[c][j].x, f.x[c][j].y);
            };
            // Fragments of the next block are on their way while this one is multiplied; its slot is refilled at once.
            auto turn = [&](int b, const Fragments& now, Fragments& next) {
                if (b + 1 < LEAF_BLOCKS) fetch(i + 1, next);
                // Orders this warp's loads of the slot before the copy that refills it (LOG.md, "a slot handed back too early").
                async_proxy_fence();
                __syncwarp();
                if (lane == 0 && i + STAGES < total) request(i + STAGES);
                multiply(now);
                i++;
            };
            fetch(i, f[0]);
#pragma unroll 1
            for (int b = 0; b < LEAF_BLOCKS; b += 2) {
                turn(b, f[0], f[1]);
                if (b + 1 < LEAF_BLOCKS) turn(b + 1, f[1], f[0]);
            }
        }
        auto store = [&](long m, int n, float v) {
            if (m >= tokens || n >= N) return;
            write_output(y, m, n, v);
        };
        if (LEAVES == 1) {
            if (on)
#pragma unroll
                for (int j = 0; j < NT; j++)
#pragma unroll
                    for (int q = 0; q < 4; q++) store(j * 8 + 2 * t + (q & 1), tile * 16 + g + (q >> 1) * 8, acc[j][q]);
        } else {
#pragma unroll
            for (int j = 0; j < NT; j++)
#pragma unroll
                for (int q = 0; q < 4; q++) part[((warp * NT + j) * 4 + q) * 32 + lane] = acc[j][q];
            __syncthreads();
            for (int e = threadIdx.x; e < TILES * NT * 128; e += 32 * WARPS) {
                const int of = e / (NT * 128), at = e % (NT * 128), j = at / 128, q = at / 32 % 4, l = at % 32;
                float v[LEAVES];
#pragma unroll
                for (int k = 0; k < LEAVES; k++) v[k] = part[(of * LEAVES + k) * NT * 128 + at];
                join_leaves(v);
                store(j * 8 + 2 * (l % 4) + (q & 1), (tile - tile_of_cta + of) * 16 + l / 4 + (q >> 1) * 8, v[0]);
            }
            __syncthreads();
        }
    }
}
