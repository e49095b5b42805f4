// out[r][i] = bf16((g / (1 + exp2(-g log2 e))) u), g = x[r][i], u = x[r][INNER + i].
//
// Macros: INNER
extern "C" __global__ void __launch_bounds__(256) silu(const bf16* __restrict__ x, bf16* __restrict__ out) {
    launch_dependents();
    wait_for_producers();
    const bf16 *const g = x + (u64)blockIdx.y * 2 * INNER, *const u = g + INNER;
    bf16* const to = out + (u64)blockIdx.y * INNER;
    if (INNER % 8 == 0) {
        const int i = blockIdx.x * 256 + threadIdx.x;
        if (i >= INNER / 8) return;
        const uint4 a = ((const uint4*)g)[i], b = ((const uint4*)u)[i];
        auto pair = [](u32 a, u32 b) { return pack_bf16(silu_mul(lo_bf16(a), lo_bf16(b)), silu_mul(hi_bf16(a), hi_bf16(b))); };
        ((uint4*)to)[i] = make_uint4(pair(a.x, b.x), pair(a.y, b.y), pair(a.z, b.z), pair(a.w, b.w));
    } else {
        for (int i = (blockIdx.x * 256 + threadIdx.x) * 8, e = i + 8; i < e && i < INNER; i++) to[i] = f32_to_bf16(silu_mul(bf16_to_f32(g[i]), bf16_to_f32(u[i])));
    }
}
