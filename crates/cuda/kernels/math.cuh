// Device twins of ops::exact: every function here gives the bits of the Rust function of the same name (exp2_full of exp2, log2_full of log2,
// silu_mul of silu_mul_unrounded). No contraction (-fmad=false), no flush of denormals, IEEE division and square root (NVRTC's defaults).
// Payloads of NaNs are not part of the law.

#define LOG2_E __uint_as_float(0x3FB8AA3Bu)
#define LN2 __uint_as_float(0x3F317218u)
#define F32_MAX __uint_as_float(0x7F7FFFFFu)
#define INFINITE __uint_as_float(0x7F800000u)
// 1.5 * 2^23: adding it rounds to an integer (nearest even), which then stands in the low mantissa bits.
#define ROUND_MAGIC 12582912.f

__device__ __forceinline__ float lo_bf16(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float hi_bf16(u32 pair) { return __uint_as_float(pair & 0xFFFF0000u); }
__device__ __forceinline__ bf16 f32_to_bf16(float x) { return (bf16)pack_bf16(x, 0.f); }

// c[0] + x (c[1] + x (...)) by fma, highest power first; coefficients by their bits.
template <int COUNT> __device__ __forceinline__ float horner(const u32 (&c)[COUNT], float x) {
    float p = __uint_as_float(c[COUNT - 1]);
#pragma unroll
    for (int i = COUNT - 2; i >= 0; i--) p = __fmaf_rn(p, x, __uint_as_float(c[i]));
    return p;
}

// t = n + f, n its nearest integer, in `shift` as an addend for the exponent field.
__device__ __forceinline__ float split_integer(float t, u32& shift) {
    const float z = __fadd_rn(t, ROUND_MAGIC);
    shift = __float_as_uint(z) << 23;
    return __fsub_rn(t, __fsub_rn(z, ROUND_MAGIC));
}

// 2^t for t in [-125, 64], relative error 1.02e-4.
__device__ __forceinline__ float exp2_poly3(float t) {
    constexpr u32 C[4] = {0x3F800000u, 0x3F317AFDu, 0x3E780626u, 0x3D61512Au};
    u32 shift;
    const float f = split_integer(t, shift);
    return __uint_as_float(__float_as_uint(horner(C, f)) + shift);
}

// Of 2^f for f in [-1/2, 1/2], to full precision.
#define EXP2_COEFFICIENTS {0x3F800000u, 0x3F317218u, 0x3E75FDEEu, 0x3D6357BEu, 0x3C1D96F0u, 0x3AAF8417u, 0x3920B5AFu}

// 2^t to full precision: +0 below -126 and for NaN, infinity from 128 on.
__device__ __forceinline__ float exp2_full(float t) {
    constexpr u32 C[7] = EXP2_COEFFICIENTS;
    u32 shift;
    const float f = split_integer(t, shift);
    const float value = __uint_as_float(__float_as_uint(horner(C, f)) + shift);
    return t >= 128.f ? INFINITE : t >= -126.f ? value : 0.f;
}

// 2^d for an integer d <= 0: +0 below -126 and for NaN.
__device__ __forceinline__ float pow2i(float d) {
    u32 shift;
    split_integer(d, shift);
    return d >= -126.f ? __uint_as_float(0x3F800000u + shift) : 0.f;
}

// x = m 2^e with m in [2/3, 4/3).
__device__ __forceinline__ float split_exponent(float x, int& e) {
    e = (int)(__float_as_uint(x) - 0x3F2AAAABu) >> 23;
    return __uint_as_float(__float_as_uint(x) - ((u32)e << 23));
}

// log2(1 + f) + e.
__device__ __forceinline__ float log2_1p(float f, int e) {
    constexpr u32 C[10] = {0x3FB8AA3Bu, 0xBF38AA3Bu, 0x3EF638C7u, 0xBEB8AA54u, 0x3E93B19Bu,
                           0xBE764496u, 0x3E521A22u, 0xBE361A06u, 0x3E40A008u, 0xBE357B8Fu};
    return __fmaf_rn(f, horner(C, f), (float)e);
}

// log2(x) for a positive normal x.
__device__ __forceinline__ float log2_full(float x) {
    int e;
    const float m = split_exponent(x, e);
    return log2_1p(__fsub_rn(m, 1.f), e);
}

__device__ __forceinline__ float silu_mul(float g, float u) {
    return __fmul_rn(__fdiv_rn(g, __fadd_rn(1.f, exp2_full(__fmul_rn(-g, LOG2_E)))), u);
}
// The same of two pairs, g and u rounded to bf16 before, the results after.
__device__ __forceinline__ u32 silu_mul_pair(float g0, float u0, float g1, float u1) {
    const u32 g = pack_bf16(g0, g1), u = pack_bf16(u0, u1);
    return pack_bf16(silu_mul(lo_bf16(g), lo_bf16(u)), silu_mul(hi_bf16(g), hi_bf16(u)));
}

// g / (1 + 2^(-g log2 e)) for |g| < 80, by the steps that the compiler takes for __fdiv_rn where its check of the exponents passes. The remainder has the
// other sign: so a zero keeps its own.
__device__ __forceinline__ float silu_ordinary(float g) {
    constexpr u32 C[7] = EXP2_COEFFICIENTS; // not exp2_full: within its limits
    u32 shift;
    const float f = split_integer(__fmul_rn(-g, LOG2_E), shift);
    const float d = __fadd_rn(1.f, __uint_as_float(__float_as_uint(horner(C, f)) + shift));
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(d));
    r = __fmaf_rn(r, __fmaf_rn(-d, r, 1.f), r);
    const float q = __fmul_rn(g, r);
    return __fmaf_rn(-r, __fmaf_rn(d, q, -g), q);
}
// COUNT silu_mul_pair side by side: one branch for all quotients, as each of __fdiv_rn's own ends what can overlap.
template <int COUNT> __device__ __forceinline__ void silu_mul_pairs(const u32 (&gate)[COUNT], const u32 (&up)[COUNT], u32 (&out)[COUNT]) {
    float q[2 * COUNT];
    u32 large = 0; // the halves' highest bits: a factor is 80 and more, or no number
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        large |= (gate[i] & 0x7FFF7FFFu) + 0x10001u * (0x8000u - 0x42A0u);
        q[2 * i] = silu_ordinary(lo_bf16(gate[i])), q[2 * i + 1] = silu_ordinary(hi_bf16(gate[i]));
    }
    if (large & 0x80008000u) {
#pragma unroll 1 // it is rare and its code long
        for (int i = 0; i < 2 * COUNT; i++) {
            u32 pair = 0;
#pragma unroll
            for (int j = 0; j < COUNT; j++) pair |= gate[j] & -(u32)(i / 2 == j);
            const float value = silu_mul(i & 1 ? hi_bf16(pair) : lo_bf16(pair), 1.f);
#pragma unroll
            for (int j = 0; j < 2 * COUNT; j++) q[j] = i == j ? value : q[j];
        }
    }
#pragma unroll
    for (int i = 0; i < COUNT; i++) out[i] = pack_bf16(__fmul_rn(q[2 * i], lo_bf16(up[i])), __fmul_rn(q[2 * i + 1], hi_bf16(up[i])));
}

// The larger one; a NaN in b does not count.
__device__ __forceinline__ float larger(float a, float b) { return b > a ? b : a; }

// Adjacent-pair tree over COUNT (a power of two) values of a thread, lowest index bit first.
template <int COUNT> __device__ __forceinline__ float tree_of(const float (&v)[COUNT]) {
    if constexpr (COUNT == 1) return v[0];
    else {
        float half[COUNT / 2];
#pragma unroll
        for (int i = 0; i < COUNT / 2; i++) half[i] = __fadd_rn(v[2 * i], v[2 * i + 1]);
        return tree_of(half);
    }
}
// Adjacent-pair tree over the lanes of a warp (an add commutes, so every lane ends with the sum).
__device__ __forceinline__ float warp_tree(float v) {
#pragma unroll
    for (int bit = 1; bit < 32; bit *= 2) v = __fadd_rn(v, __shfl_xor_sync(0xFFFFFFFFu, v, bit));
    return v;
}

// What scales a row of d elements to a mean square of 1, of the sum of its squares.
__device__ __forceinline__ float rms_scale(float squares, int d, float eps) {
    return __frcp_rn(__fsqrt_rn(__fmaf_rn(squares, __frcp_rn((float)d), eps)));
}
// An element under that scale and its weight, stored LESS_ONE or as it is.
template <bool LESS_ONE> __device__ __forceinline__ float rms_scaled(float x, float scale, float w) {
    return __fmul_rn(__fmul_rn(x, scale), LESS_ONE ? __fadd_rn(1.f, w) : w);
}
