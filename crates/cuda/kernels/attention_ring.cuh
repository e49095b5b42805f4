// Shared by the attention kernels that stream the cache: a ring of SLOTS tiles, filled by a producer warp with bulk copies.
//
// A block of the cache is [kv head][K, V][D / 64][64 tokens][64 elements] in the 128-byte swizzle, what ldmatrix and wgmma read without
// conflicts. Step i of the ring is keys (even) or values (odd) of tile first_tile + i / 2.
//
// Macros: D KV_HEADS SLOTS
struct TileRing {
    u32 tiles, full, empty; // full: a barrier a slot, its copy has landed; empty: all its readers have handed it back

    __device__ __forceinline__ TileRing(u32 at) : tiles(at), full(at + SLOTS * TILE_BYTES), empty(full + 8 * SLOTS) {}
    __device__ __forceinline__ u32 end() const { return empty + 8 * SLOTS; }
    __device__ __forceinline__ u32 tile(int i) const { return tiles + i % SLOTS * TILE_BYTES; }
    __device__ __forceinline__ void init(int readers) const {
        for (int s = 0; s < SLOTS; s++) mbar_init(full + 8 * s, 1), mbar_init(empty + 8 * s, readers);
        mbar_init_fence();
    }
    __device__ __forceinline__ void wait(int i) const { mbar_wait(full + 8 * (i % SLOTS), i / SLOTS & 1); }
    __device__ __forceinline__ void hand_back(int i) const { mbar_arrive(empty + 8 * (i % SLOTS)); }

    // The producer warp: tiles [first_tile, last_tile) of a sequence whose first `context` tokens were there before this step.
    __device__ __forceinline__ void stream(const u8* kv, const u32* table, int kv_head, int first_tile, int last_tile, int context, int lane) const {
        u32 blocks = 0;
        bool waited = false;
        for (int i = 0; i < 2 * (last_tile - first_tile); i++) {
            const int at = i / 2, slot = i % SLOTS, use = i / SLOTS;
            if (i % 64 == 0) blocks = first_tile + at + lane < last_tile ? table[first_tile + at + lane] : 0;
            const u32 block = __shfl_sync(0xFFFFFFFFu, blocks, at % 32);
            // Only this step's own keys come from the previous kernel.
            if (!waited && (first_tile + at + 1) * TILE > context) wait_for_producers(), waited = true;
            if (use > 0) mbar_wait(empty + 8 * slot, (use - 1) & 1);
            if (lane == 0) {
                mbar_expect_tx(full + 8 * slot, TILE_BYTES);
                bulk_load(tile(i), kv + (((u64)block * KV_HEADS + kv_head) * 2 + i % 2) * TILE_BYTES, TILE_BYTES, full + 8 * slot);
            }
            __syncwarp();
        }
    }
};
