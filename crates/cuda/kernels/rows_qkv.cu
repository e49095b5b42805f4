// Splits a row of qkv into heads, one warp a head: RMSNorm of query and key heads (QK_NORM), rotation of their first ROT elements, queries
// to q_out, keys and values to the row's slot of the cache (block * 64 + token; a slot of ~0 stores nothing: padding of a
// captured batch). Layout of the cache: attention_ring.cuh. A block takes `share` neighbouring rows, one after the other.
//
// Macros: D HEADS KV_HEADS ROT QK_NORM UNIT_OFFSET
#define PER_LANE (D / 32)
#define WORDS (PER_LANE / 2)
#define ALL (HEADS + 2 * KV_HEADS)
#define WARPS 4
static_assert(D == 64 || D == 128 || D == 256, "a lane holds an aligned run of the norm's tree");
static_assert(ROT % 2 == 0 && ROT <= D, "pairs of rotated elements");

// A lane's elements, in one access.
__device__ __forceinline__ void load(u32 (&x)[WORDS], const bf16* from) {
    if constexpr (WORDS == 4) {
        const uint4 v = *(const uint4*)from;
        x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
    } else if constexpr (WORDS == 2) {
        const uint2 v = *(const uint2*)from;
        x[0] = v.x, x[1] = v.y;
    } else {
        x[0] = *(const u32*)from;
    }
}
__device__ __forceinline__ void store(void* to, const u32 (&x)[WORDS]) {
    if constexpr (WORDS == 4) *(uint4*)to = make_uint4(x[0], x[1], x[2], x[3]);
    else if constexpr (WORDS == 2) *(uint2*)to = make_uint2(x[0], x[1]);
    else *(u32*)to = x[0];
}
__device__ __forceinline__ float element(const u32 (&x)[WORDS], int i) { return i % 2 ? hi_bf16(x[i / 2]) : lo_bf16(x[i / 2]); }

// A lane's cosines or sines, where neighbours of the lane's elements are all rotated.
__device__ __forceinline__ void load_angles(float (&x)[PER_LANE], const float* from) {
    if constexpr (PER_LANE == 2) {
        const float2 v = *(const float2*)from;
        x[0] = v.x, x[1] = v.y;
    } else {
#pragma unroll
        for (int i = 0; i < PER_LANE; i += 4) {
            const float4 v = *(const float4*)(from + i);
            x[i] = v.x, x[i + 1] = v.y, x[i + 2] = v.z, x[i + 3] = v.w;
        }
    }
}
// Element i of a head by its partner in the pair, which lies ROT / 2 behind or before it.
__device__ __forceinline__ float rotated(int i, float a, float partner, float c, float s) {
    return i < ROT / 2 ? __fmaf_rn(a, c, -__fmul_rn(partner, s)) : __fmaf_rn(a, c, __fmul_rn(partner, s));
}

extern "C" __global__ void __launch_bounds__(32 * WARPS)
    qkv_prep(const bf16* __restrict__ qkv, const bf16* __restrict__ q_norm, const bf16* __restrict__ k_norm, float eps, const float* __restrict__ cos,
             const float* __restrict__ sin, const u32* __restrict__ positions, const u32* __restrict__ slots, u8* __restrict__ kv, bf16* __restrict__ q_out, u32 rows,
             u32 share) {
    __shared__ __align__(16) bf16 heads[WARPS][D];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, head = blockIdx.x * WARPS + warp, mine = PER_LANE * lane;
    launch_dependents();
    if (head >= ALL) return;
    const bool is_q = head < HEADS, is_v = head >= HEADS + KV_HEADS;
    u32 weight[WORDS]; // the previous kernel does not write it
    if (QK_NORM && !is_v) load(weight, (is_q ? q_norm : k_norm) + mine);
    wait_for_producers();

    const u32 first = blockIdx.y * share, end = min(first + share, rows);
#pragma unroll 2
    for (u64 token = first; token < end; token++) {
        u32 x[WORDS];
        load(x, qkv + (token * ALL + head) * D + mine);
        if (QK_NORM && !is_v) {
            float squares[PER_LANE];
#pragma unroll
            for (int i = 0; i < PER_LANE; i++) squares[i] = __fmul_rn(element(x, i), element(x, i));
            const float sum = warp_tree(tree_of(squares));
            const float r = rms_scale(sum, D, eps);
            auto scale = [&](float x, float w) { return rms_scaled<UNIT_OFFSET>(x, r, w); };
#pragma unroll
            for (int i = 0; i < WORDS; i++) x[i] = pack_bf16(scale(lo_bf16(x[i]), lo_bf16(weight[i])), scale(hi_bf16(x[i]), hi_bf16(weight[i])));
        }
        if (!is_v) {
            const u64 angle = (u64)positions[token] * (ROT / 2);
            float y[PER_LANE];
            if constexpr (ROT == D) {
                u32 partner[WORDS];
                float c[PER_LANE], s[PER_LANE];
                load_angles(c, cos + angle + mine % (ROT / 2));
                load_angles(s, sin + angle + mine % (ROT / 2));
#pragma unroll
                for (int i = 0; i < WORDS; i++) partner[i] = __shfl_xor_sync(~0u, x[i], 16);
#pragma unroll
                for (int i = 0; i < PER_LANE; i++) y[i] = rotated(mine + i, element(x, i), element(partner, i), c[i], s[i]);
            } else {
                store(heads[warp] + mine, x);
                __syncwarp();
#pragma unroll
                for (int i = 0; i < PER_LANE; i++) {
                    const int at = mine + i;
                    const u64 pair = angle + at % (ROT / 2);
                    y[i] = element(x, i);
                    if (at < ROT) y[i] = rotated(at, y[i], bf16_to_f32(heads[warp][(at + ROT / 2) % ROT]), cos[pair], sin[pair]);
                }
                __syncwarp(); // before the next row's elements
            }
#pragma unroll
            for (int i = 0; i < WORDS; i++) x[i] = pack_bf16(y[2 * i], y[2 * i + 1]);
        }
        if (is_q) {
            store(q_out + (token * HEADS + head) * D + mine, x);
            continue;
        }
        const u32 slot = slots[token];
        if (slot == ~0u) continue;
        const u32 block = slot / 64, at = slot % 64, kv_head = (head - HEADS) % KV_HEADS;
        u8* const tile = kv + (((u64)block * KV_HEADS + kv_head) * 2 + is_v) * (64 * D * 2);
        store(tile + mine / 64 * (64 * 128) + at * 128 + ((mine / 8 % 8) ^ (at % 8)) * 16 + mine % 8 * 2, x);
    }
}
