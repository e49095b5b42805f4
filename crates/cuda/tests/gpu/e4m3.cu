// out = start + a b^T in steps of 32 e4m3 products: a [64, K], b [N, K], start and out [64, N] fp32. One warpgroup, tiles in core matrices of
// 8 rows x 16 bytes without a swizzle.
//
// Macros: N K. `multiply`: one wgmma m64nNk32.
__device__ __forceinline__ u64 tile_desc(u32 addr) { return (u64)((addr & 0x3FFFF) >> 4) | ((u64)(128 >> 4) << 16) | ((u64)(256 >> 4) << 32); }
__device__ __forceinline__ void load_tile(u8* tile, const u8* rows, int count, int k) {
    for (int i = threadIdx.x; i < count * 32; i += 128) {
        const int r = i / 32, b = i % 32;
        tile[r / 8 * 256 + b / 16 * 128 + r % 8 * 16 + b % 16] = rows[r * K + k + b];
    }
}

extern "C" __global__ void __launch_bounds__(128) e4m3(const u8* a, const u8* b, const float* start, float* out) {
    __shared__ __align__(1024) u8 a_tile[64 * 32];
    __shared__ __align__(1024) u8 b_tile[N * 32];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    auto place = [&](int i) { return (16 * warp + lane / 4 + i % 4 / 2 * 8) * N + i / 4 * 8 + lane % 4 * 2 + i % 2; };
    float d[N / 2];
    for (int i = 0; i < N / 2; i++) d[i] = start[place(i)];
    for (int k = 0; k < K; k += 32) {
        load_tile(a_tile, a, 64, k);
        load_tile(b_tile, b, N, k);
        async_proxy_fence();
        __syncthreads();
        wgmma_fence();
        multiply(d, tile_desc(smem_addr(a_tile)), tile_desc(smem_addr(b_tile)));
        wgmma_commit();
        wgmma_wait<0>();
        __syncthreads();
    }
    for (int i = 0; i < N / 2; i++) out[place(i)] = d[i];
}
