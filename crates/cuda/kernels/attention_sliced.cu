// Few rows in all: causal grouped-query attention over the paged cache in the hopper order (NUMERICS.md). The bits of attention_paged.cu.
//
// SLICES blocks work on one split of 512 keys of one item of up to ROWS rows (attention.cuh). Nothing goes through a ring: each block asks
// for all that it needs at once, before the kernel ahead has ended where that wrote none of it. It has an equal slice of the values'
// elements and, with PEERS 1, all keys; with PEERS = SLICES a cluster of them shares the keys out by tiles and sends scores round. Each
// does the whole softmax, whose running maximum is then over eight known values, and its slice of the output, one chain of products from
// the first key to the last, as the order wants it. Keys and values are the tensor core's rows, queries its columns: it takes products of
// either side alike. The code is short on purpose: what runs once is as slow as it is fetched.
//
// JOINED > 1: so many splits share a cluster, no item of the launch has more, and they fold through distributed shared memory.
// JOINED 1: the last block of an item's slice to arrive folds the splits. Always in ascending order.
//
// Macros: D GROUP KV_HEADS ROWS SLICES PEERS JOINED
#define KEYS (TILE * SPLIT_TILES)
#define WARPS 8
#define THREADS (32 * WARPS)
#define COLUMNS (ROWS / 8)               // of 8 rows each
#define SLICE (D / SLICES)               // elements of the output
#define CLUSTER (PEERS * JOINED)
#define OUT_WARPS (SLICE / 16)           // a warp for 16 of them
#define SUM_WARP (WARPS - COLUMNS)       // from this one on they add weights up
#define OWN_TILES (SPLIT_TILES / PEERS)
#define KEY_TILES (4 * OWN_TILES)        // of 16 keys
#define VALUE_ROW (SLICE * 2 + 16)       // bytes; no two of eight rows in the same banks
#define WEIGHT_ROW (KEYS + 8)            // weights of a row, as above
#define SHARE (ROWS * (SLICE + 2))       // floats of a partial result
#define ROW_WARPS (GROUP > 4 ? 8 : GROUP > 2 ? 4 : GROUP) // rows that have warps of their own
#define ROW_PARTS (WARPS / ROW_WARPS)    // warps that share a row

// Shared memory. Weights take the keys' place.
#define KEY_BYTES (OWN_TILES * TILE_BYTES)
#define AT_EXACT 0                       // weights in fp32
#define AT_ROUNDED (ROWS * WEIGHT_ROW * 4)
#define WEIGHT_BYTES (ROWS * WEIGHT_ROW * 6)
#define AT_VALUES (KEY_BYTES > WEIGHT_BYTES ? KEY_BYTES : WEIGHT_BYTES)
#define AT_SCORES (AT_VALUES + KEYS * VALUE_ROW)
#define AT_FACTORS (AT_SCORES + ROWS * KEYS * 4) // [tile][row]
#define AT_MAXIMA (AT_FACTORS + SPLIT_TILES * ROWS * 4)
#define AT_SUMS (AT_MAXIMA + ROWS * 4)
#define AT_BARRIERS (AT_SUMS + ROWS * 4)
#define AT_LAST (AT_BARRIERS + 16)
#define AT_JOIN (AT_LAST + 16) // [split][SHARE]
static_assert(ROWS % 8 == 0 && SLICE % 16 == 0 && OUT_WARPS <= SUM_WARP && (PEERS == 1 || PEERS == SLICES) && SPLIT_TILES % PEERS == 0, "parts of a split");

// 16 bytes, zeros if not `present`.
__device__ __forceinline__ void copy16(u32 dst, const void* src, bool present) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(present ? 16 : 0) : "memory");
}
// Arrives when all copies of this thread so far have landed.
__device__ __forceinline__ void arrive_after_copies(u32 bar) { asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(bar) : "memory"); }
// Aligned barriers: all lanes of a warp come together first.
__device__ __forceinline__ void cluster_arrive() { __syncwarp(); asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { __syncwarp(); asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
__device__ __forceinline__ u32 address_in(u32 addr, u32 rank) {
    u32 r;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(addr), "r"(rank));
    return r;
}
__device__ __forceinline__ void cluster_store2(u32 addr, float x, float y) { asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(addr), "f"(x), "f"(y) : "memory"); }
__device__ __forceinline__ float smem_load(u32 addr) {
    float v;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(addr) : "memory");
    return v;
}
__device__ __forceinline__ float2 smem_load2(u32 addr) {
    float2 v;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(addr) : "memory");
    return v;
}
__device__ __forceinline__ u32 smem_load_u32(u32 addr) {
    u32 v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(addr) : "memory");
    return v;
}
__device__ __forceinline__ void smem_store2(u32 addr, float x, float y) { asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(addr), "f"(x), "f"(y) : "memory"); }
__device__ __forceinline__ void smem_store(u32 addr, float x) { asm volatile("st.shared.f32 [%0], %1;" ::"r"(addr), "f"(x) : "memory"); }
__device__ __forceinline__ void smem_store_bf16(u32 addr, bf16 x) { asm volatile("st.shared.u16 [%0], %1;" ::"r"(addr), "h"(x) : "memory"); }
// The largest of a warp's floats, none of them NaN: as integers of the same order.
__device__ __forceinline__ float warp_max(float x) {
    const int bits = __float_as_int(x), ordered = bits ^ (bits >> 31 & 0x7FFFFFFF);
    int most;
    asm volatile("redux.sync.max.s32 %0, %1, 0xffffffff;" : "=r"(most) : "r"(ordered));
    return __int_as_float(most ^ (most >> 31 & 0x7FFFFFFF));
}

extern "C" __global__ void
#if CLUSTER > 1
__cluster_dims__(CLUSTER, 1, 1)
#endif
__launch_bounds__(THREADS)
    attention(const bf16* __restrict__ q, const u8* __restrict__ kv, bf16* __restrict__ out, const Seq* __restrict__ seqs,
              const Item* __restrict__ items, const u32* __restrict__ tables, float scale_log2, float* partials, u32* arrived) {
    extern __shared__ __align__(1024) u8 smem[];
    const u32 shared = smem_addr(smem), keys_there = shared + AT_BARRIERS, values_there = keys_there + 8;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int cluster = blockIdx.x / CLUSTER, in_cluster = blockIdx.x % CLUSTER, kv_head = blockIdx.y;
    const int split = PEERS > 1 ? blockIdx.x / SLICES : cluster / SLICES * JOINED + in_cluster, slice = PEERS > 1 ? blockIdx.x % SLICES : cluster % SLICES;
    const int peer = PEERS > 1 ? slice : 0; // among those that share scores
    launch_dependents();
    const Item item = items[blockIdx.z];
    const Rows rows(item, seqs[item.seq], ROWS);
    if (rows.count <= 0) return;
    const int end = rows.end(), first_key = split * KEYS, splits = (end + KEYS - 1) / KEYS;
    if (first_key >= end) return;
    const int tiles = min((end - first_key + TILE - 1) / TILE, SPLIT_TILES);

    if (threadIdx.x == 0) {
        mbar_init(keys_there, THREADS / 2), mbar_init(values_there, THREADS / 2);
        mbar_init_fence();
    }
    __syncthreads();
    if (CLUSTER > 1) cluster_arrive(); // that this block has begun

    // The first warps ask for keys, the others for values; first for what was in the cache before this step.
    const bool asks_for_keys = warp < WARPS / 2;
    const int asker = threadIdx.x % (THREADS / 2);
#pragma unroll 1
    for (int fresh = 0; fresh < 2; fresh++) {
        if (fresh) wait_for_producers();
#pragma unroll 1
        for (int tile = asks_for_keys ? peer : 0; tile < tiles; tile += asks_for_keys ? PEERS : 1) {
            const int key0 = first_key + tile * TILE;
            if (fresh ? key0 + TILE <= (int)rows.context : key0 >= (int)rows.context) continue;
            const u8* const source = kv + ((u64)tables[rows.table + split * SPLIT_TILES + tile] * KV_HEADS + kv_head) * 2 * TILE_BYTES;
            if (asks_for_keys) {
                const u32 to = shared + tile / PEERS * TILE_BYTES;
#pragma unroll 4
                for (int chunk = asker; chunk < TILE_BYTES / 16; chunk += THREADS / 2) {
                    const int key = key0 + chunk / 8 % TILE;
                    if (key < end && (key >= (int)rows.context) == fresh) copy16(to + chunk * 16, source + chunk * 16, true);
                }
            } else {
                constexpr int CHUNKS = SLICE / 8; // of a key
#pragma unroll 4
                for (int i = asker; i < TILE * CHUNKS; i += THREADS / 2) {
                    const int in_tile = i / CHUNKS, part = i % CHUNKS, chunk = slice * CHUNKS + part, key = key0 + in_tile;
                    // Values past the last key are garbage, and 0 * NaN is NaN: zeros instead.
                    if ((key >= (int)rows.context) == fresh)
                        copy16(shared + AT_VALUES + (tile * TILE + in_tile) * VALUE_ROW + part * 16, source + TILE_BYTES + chunk / 8 * SLAB + in_tile * 128 + ((chunk % 8) ^ (in_tile % 8)) * 16, key < end);
                }
            }
        }
    }
    arrive_after_copies(asks_for_keys ? keys_there : values_there);

    // Scores: rows are keys, columns queries. Tiles of 16 keys go round the warps.
    {
        u32 query[COLUMNS][D / 16][2];
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            const bool present = 8 * c + g < rows.count;
            const bf16* const from = q + (present ? rows.element(8 * c + g, kv_head) : 0) + 2 * t;
#pragma unroll
            for (int k = 0; k < D / 16; k++) {
                query[c][k][0] = present ? *(const u32*)(from + 16 * k) : 0;
                query[c][k][1] = present ? *(const u32*)(from + 16 * k + 8) : 0;
            }
        }
        mbar_wait(keys_there, 0);
        if (CLUSTER > 1) cluster_wait(); // all blocks have begun
        constexpr int EACH = KEY_TILES < WARPS ? 1 : KEY_TILES / WARPS, BESIDE = EACH < 4 / COLUMNS ? EACH : 4 / COLUMNS; // chains of products side by side
#pragma unroll 1
        for (int first = warp * BESIDE; first < KEY_TILES; first += WARPS * BESIDE) {
            const int own_tile = first / 4, tile = own_tile * PEERS + peer;
            if (tile >= tiles) break;
            float s[BESIDE][COLUMNS][4];
#pragma unroll
            for (int i = 0; i < BESIDE; i++)
#pragma unroll
                for (int c = 0; c < COLUMNS; c++) s[i][c][0] = s[i][c][1] = s[i][c][2] = s[i][c][3] = 0.f;
            const u32 row = shared + own_tile * TILE_BYTES + (first % 4 * 16 + lane % 16) * 128;
#pragma unroll
            for (int k = 0; k < D / 16; k++) {
                const u32 chunk = 2 * k + lane / 16;
#pragma unroll
                for (int i = 0; i < BESIDE; i++) {
                    u32 a[4];
                    ldmatrix4(a, row + i * (16 * 128) + chunk / 8 * SLAB + ((chunk % 8) ^ (lane % 8)) * 16);
#pragma unroll
                    for (int c = 0; c < COLUMNS; c++) mma_16816(s[i][c], a[0], a[1], a[2], a[3], query[c][k][0], query[c][k][1]);
                }
            }
            // [key][row], rows of a key permuted so that reading one row of 32 keys meets all banks.
#pragma unroll
            for (int i = 0; i < BESIDE; i++)
#pragma unroll
                for (int c = 0; c < COLUMNS; c++)
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const int key = tile * TILE + (first % 4 + i) * 16 + 8 * half + g, turn = key / 4 % 8;
                        const u32 at = shared + AT_SCORES + c * (KEYS * 32) + key * 32 + (t ^ turn / 2) * 8;
                        const float x = s[i][c][2 * half], y = s[i][c][2 * half + 1], even = turn % 2 ? y : x, odd = turn % 2 ? x : y;
                        if (PEERS == 1) smem_store2(at, even, odd);
#pragma unroll
                        for (int to = 0; PEERS > 1 && to < PEERS; to++) cluster_store2(address_in(at, split % JOINED * PEERS + to), even, odd);
                    }
        }
    }
    if (PEERS > 1) cluster_arrive(), cluster_wait();
    else __syncthreads();

    // Softmax of a row. Lane i has keys i and 32 + i of each tile; first it has tile i's maximum.
#pragma unroll 1
    for (int row = warp % ROW_WARPS; row < rows.count; row += ROW_WARPS) {
        const int pos = rows.position(row) - first_key; // the last key it attends to, from here
        const u32 scores = shared + AT_SCORES + row / 8 * (KEYS * 32) + lane * 32 + ((row % 8) ^ (lane / 4)) * 4;
        float m = -INFINITE;
#pragma unroll
        for (int tile = 0; tile < SPLIT_TILES; tile++) {
            const int key = tile * TILE + lane;
            const float x = smem_load(scores + tile * TILE * 32), y = smem_load(scores + tile * TILE * 32 + 32 * 32);
            const float most = warp_max(fmaxf(key > pos ? -INFINITE : x, key + 32 > pos ? -INFINITE : y));
            if (lane == tile) m = most;
        }
        m = ceilf(__fmul_rn(m, scale_log2));
#pragma unroll
        for (int by = 1; by < SPLIT_TILES; by *= 2) { // the running maximum
            const float before = __shfl_up_sync(0xFFFFFFFFu, m, by);
            if (lane >= by) m = fmaxf(before, m);
        }
        if (warp < ROW_WARPS) {
            const float before = __shfl_up_sync(0xFFFFFFFFu, m, 1);
            if (lane < SPLIT_TILES) smem_store(shared + AT_FACTORS + (lane * ROWS + row) * 4, pow2i(__fsub_rn(lane ? before : -INFINITE, m)));
            if (lane == SPLIT_TILES - 1) smem_store(shared + AT_MAXIMA + row * 4, m);
        }
#pragma unroll 4
        for (int i = warp / ROW_WARPS; i < 2 * SPLIT_TILES; i += ROW_PARTS) {
            const int key = 32 * i + lane;
            const float at_most = __shfl_sync(0xFFFFFFFFu, m, i / 2);
            float p = weight_of(smem_load(scores + i * 32 * 32), scale_log2, at_most);
            if (key > pos) p = 0.f;
            smem_store(shared + AT_EXACT + (row * WEIGHT_ROW + key) * 4, p);
            smem_store_bf16(shared + AT_ROUNDED + (row * WEIGHT_ROW + key) * 2, f32_to_bf16(p));
        }
    }
    __syncthreads();

    float o[COLUMNS][4];
    if (warp < OUT_WARPS) { // 16 elements of the output: they are rows, queries columns
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) o[c][0] = o[c][1] = o[c][2] = o[c][3] = 0.f;
        mbar_wait(values_there, 0);
        const u32 value = shared + AT_VALUES + (lane / 16 * 8 + lane % 8) * VALUE_ROW + warp * 32 + lane / 8 % 2 * 16;
        const u32 weight = shared + AT_ROUNDED + (g * WEIGHT_ROW + 2 * t) * 2;
        u32 a[2][4][4], b[2][4][COLUMNS][2];
        float2 factor[2][COLUMNS];
        auto fetch = [&](int tile, int into) {
#pragma unroll
            for (int k = 0; k < 4; k++) {
                ldmatrix4_trans(a[into][k], value + (tile * TILE + 16 * k) * VALUE_ROW);
#pragma unroll
                for (int c = 0; c < COLUMNS; c++) {
                    const u32 from = weight + (c * 8 * WEIGHT_ROW + tile * TILE + 16 * k) * 2;
                    b[into][k][c][0] = smem_load_u32(from), b[into][k][c][1] = smem_load_u32(from + 16);
                }
            }
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) factor[into][c] = smem_load2(shared + AT_FACTORS + (tile * ROWS + 8 * c + 2 * t) * 4);
        };
        auto add = [&](int from) {
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) {
                o[c][0] = __fmul_rn(o[c][0], factor[from][c].x), o[c][1] = __fmul_rn(o[c][1], factor[from][c].y);
                o[c][2] = __fmul_rn(o[c][2], factor[from][c].x), o[c][3] = __fmul_rn(o[c][3], factor[from][c].y);
            }
#pragma unroll
            for (int k = 0; k < 4; k++)
#pragma unroll
                for (int c = 0; c < COLUMNS; c++) mma_16816(o[c], a[from][k][0], a[from][k][1], a[from][k][2], a[from][k][3], b[from][k][c][0], b[from][k][c][1]);
        };
        fetch(0, 0);
#pragma unroll 1
        for (int tile = 0; tile < tiles; tile += 2) { // a tile ahead; one past the split's last is read and not used
            fetch(min(tile + 1, SPLIT_TILES - 1), 1);
            add(0);
            if (tile + 1 >= tiles) break;
            fetch(min(tile + 2, SPLIT_TILES - 1), 0);
            add(1);
        }
    } else if (warp >= SUM_WARP) { // four sums of each row
        const int row = (warp - SUM_WARP) * 8 + g;
        float l = 0.f;
#pragma unroll 1
        for (int tile = 0; tile < tiles; tile++) {
            l = __fmul_rn(l, smem_load(shared + AT_FACTORS + (tile * ROWS + row) * 4));
#pragma unroll
            for (int i = 0; i < TILE / 8; i++) {
                const float2 p = smem_load2(shared + AT_EXACT + (row * WEIGHT_ROW + tile * TILE + 8 * i + 2 * t) * 4);
                l = __fadd_rn(__fadd_rn(l, p.x), p.y);
            }
        }
        l = quad_sum(l);
        if (t == 0) smem_store(shared + AT_SUMS + row * 4, l);
    }
    __syncthreads();

    if (splits == 1) {
        if (warp >= OUT_WARPS) return;
#pragma unroll
        for (int c = 0; c < COLUMNS; c++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int row = 8 * c + 2 * t + e;
                if (row >= rows.count) continue;
                const float inverse = __frcp_rn(smem_load(shared + AT_SUMS + row * 4));
                bf16* const to = out + rows.element(row, kv_head) + slice * SLICE + warp * 16 + g;
                to[0] = f32_to_bf16(finish(o[c][e], inverse)), to[8] = f32_to_bf16(finish(o[c][2 + e], inverse));
            }
        return;
    }

    // A partial result: weights [ROWS][m, l], then values [SLICE][ROWS].
#if JOINED > 1
    const u32 mine = address_in(shared + AT_JOIN + split * SHARE * 4, peer); // in the first split's block
    auto put = [&](int at, float x, float y) { cluster_store2(mine + at * 4, x, y); };
#else
    auto partial_of = [&](int split) { return partials + (((u64)(item.partial + split) * KV_HEADS + kv_head) * SLICES + slice) * SHARE; };
    float* const mine = partial_of(split);
    auto put = [&](int at, float x, float y) { *(float2*)(mine + at) = make_float2(x, y); };
#endif
    if (warp < OUT_WARPS) {
#pragma unroll
        for (int c = 0; c < COLUMNS; c++)
#pragma unroll
            for (int half = 0; half < 2; half++) put(2 * ROWS + (warp * 16 + 8 * half + g) * ROWS + 8 * c + 2 * t, o[c][2 * half], o[c][2 * half + 1]);
    } else if (warp == WARPS - 1 && lane < ROWS) {
        put(2 * lane, smem_load(shared + AT_MAXIMA + lane * 4), smem_load(shared + AT_SUMS + lane * 4));
    }
#if JOINED > 1
    cluster_arrive();
    if (split != 0) return;
    cluster_wait();
    constexpr int AT_ONCE = JOINED;
    auto weights_of = [&](int split, int row) { return smem_load2(shared + AT_JOIN + (split * SHARE + 2 * row) * 4); };
    auto value_of = [&](int split, int i) { return smem_load(shared + AT_JOIN + (split * SHARE + 2 * ROWS + i) * 4); };
#else
    __syncthreads();
    if (threadIdx.x == 0) *(volatile u32*)(smem + AT_LAST) = last_to_arrive(arrived + (blockIdx.z * KV_HEADS + kv_head) * SLICES + slice, splits);
    __syncthreads();
    if (!*(volatile u32*)(smem + AT_LAST)) return;
    constexpr int AT_ONCE = 8;
    auto weights_of = [&](int split, int row) { return load2_l2(partial_of(split) + 2 * row); };
    auto value_of = [&](int split, int i) { return load_l2(partial_of(split) + 2 * ROWS + i); };
#endif
    for (int i = threadIdx.x; i < SLICE * ROWS; i += THREADS) {
        const int row = i % ROWS, dim = i / ROWS;
        if (row >= rows.count) continue;
        Weights total = {-INFINITE, 0.f};
        float v = 0.f;
#pragma unroll 1
        for (int first = 0; first < splits; first += AT_ONCE) {
            float value[AT_ONCE];
            float2 weights[AT_ONCE];
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++) {
                const int of = min(first + j, splits - 1);
                weights[j] = weights_of(of, row), value[j] = value_of(of, i);
            }
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++) {
                if (first + j >= splits) break;
                const Weights next = {weights[j].x, weights[j].y};
                if (first + j == 0) total = next, v = value[0];
                else v = join(v, value[j], fold(total, next));
            }
        }
        out[rows.element(row, kv_head) + slice * SLICE + dim] = f32_to_bf16(finish(v, __frcp_rn(total.l)));
    }
}
