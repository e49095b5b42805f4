//! What the examples share.

/// A kernel that fills bf16 memory with numbers in [-scale, scale).
pub const FILL: &str = r#"
extern "C" __global__ void fill(bf16* p, u64 n, u32 seed, float scale) {
    for (u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x; i < n; i += (u64)gridDim.x * blockDim.x) {
        u32 h = (u32)i * 2654435761u ^ (u32)(i >> 32) * 40503u ^ seed;
        h ^= h >> 16, h *= 0x85ebca6b, h ^= h >> 13, h *= 0xc2b2ae35, h ^= h >> 16;
        p[i] = (bf16)pack_bf16(((int)(h & 0xffff) - 32768) * scale / 32768.f, 0.f);
    }
}
"#;
