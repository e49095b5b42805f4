// Shared by the warpgroup linears: weights' copies, the ring of TMA slots, the stack of running sums.
//
// Macros: TREE LOGITS SILU STAGES LEVELS (sets of running sums beside the accumulator)

// Weights of a tile from its row n0 on, 64 of k. SILU: 8 gate rows, the 8 up rows of the same outputs, the next 8 gate rows and so on (a
// tensor map of rank 4 reads them so), so that a thread has both factors of an output.
__device__ __forceinline__ void load_weights(u32 dst, const TensorMap* map, int k, int n0, u32 bar, u64 policy) {
    if (SILU) tma_load_4d(dst, map, k, 0, 0, n0 / 16, bar, policy);
    else tma_load_2d(dst, map, k, n0, bar, policy);
}
__device__ __forceinline__ void load_weights_multicast(u32 dst, const TensorMap* map, int k, int n0, u32 bar, u16 mask, u64 policy) {
    if (SILU) tma_load_4d_multicast(dst, map, k, 0, 0, n0 / 16, bar, mask, policy);
    else tma_load_2d_multicast(dst, map, k, n0, bar, mask, policy);
}

struct Ring {
    u32 slot, phase;
    __device__ __forceinline__ void next() {
        if (++slot == STAGES) slot = 0, phase ^= 1;
    }
};

// Running sums of one level: S floats a thread, the first R in registers, the others in shared memory, 512 bytes a
// warp for every four.
template <int S, int R> struct Level {
    float reg[R > 0 ? R : 1];
    u32 spill; // this lane's 16 bytes
    __device__ __forceinline__ float4 get(int i) const {
        return i < R ? make_float4(reg[i], reg[i + 1], reg[i + 2], reg[i + 3]) : smem_load4(spill + (i - R) * 128);
    }
    __device__ __forceinline__ void put(int i, float4 v) {
        if (i < R) reg[i] = v.x, reg[i + 1] = v.y, reg[i + 2] = v.z, reg[i + 3] = v.w;
        else smem_store4(spill + (i - R) * 128, v.x, v.y, v.z, v.w);
    }
};

// An accumulator of S floats a thread and the sums of the leaves before it.
template <int S, int R0, int R1, int R2> struct Sums {
    float acc[S];
    Level<S, R0> level0; // after the last leaf: the result, so that acc is free for the next tile
    Level<S, R1> level1;
    Level<S, R2> level2;

    // `area`: this warp's shared memory for sums.
    __device__ __forceinline__ void place(u32 area, int lane) {
        level0.spill = area + lane * 16;
        level1.spill = level0.spill + (S - R0) * 128;
        level2.spill = level1.spill + (LEVELS > 1 ? S - R1 : 0) * 128;
    }

    // acc holds leaf `leaf` of `leaves`: join it with what it completes.
    __device__ __forceinline__ void join(int leaf, int leaves) {
        if (!TREE) {
            // Zero plus the first leaf is that leaf (no chain ends in -0), and a copy would tie two sets of registers together.
            if (leaf == 0) step<1, 0, true>();
            else step<1, 1, false>();
        } else if (leaf + 1 == leaves) { // leaf, leaves are compile-time constants here
            step<1, LEVELS, false>();
        } else if (!(leaf & 1)) step<1, 0, false>();
        else if (!(leaf & 2)) step<2, 1, false>();
        else step<3, 2, false>();
    }

    // acc holds the last leaf: four floats of the sum of all. Zero plus the only leaf is that leaf, as in join.
    __device__ __forceinline__ float4 total(int i) const {
        float4 v = make_float4(acc[i], acc[i + 1], acc[i + 2], acc[i + 3]);
        if (LEVELS == 0 && LOGITS) v = add(make_float4(0.f, 0.f, 0.f, 0.f), v);
        if (LEVELS > 0) v = add(level0.get(i), v);
        if (LEVELS > 1) v = add(level1.get(i), v);
        if (LEVELS > 2) v = add(level2.get(i), v);
        return v;
    }

private:
    // Adds the sums of the first ADD levels to acc, or zero; the result goes to level TO - 1.
    template <int TO, int ADD, bool ZERO> __device__ __forceinline__ void step() {
#pragma unroll
        for (int i = 0; i < S; i += 4) {
            float4 v = make_float4(acc[i], acc[i + 1], acc[i + 2], acc[i + 3]);
            if (ZERO) v = add(make_float4(0.f, 0.f, 0.f, 0.f), v);
            if (ADD > 0) v = add(level0.get(i), v);
            if (ADD > 1) v = add(level1.get(i), v);
            if (ADD > 2) v = add(level2.get(i), v);
            if (TO == 1) level0.put(i, v);
            if (TO == 2) level1.put(i, v);
            if (TO == 3) level2.put(i, v);
        }
    }
};
