// Rows of D bf16 gathered by index: embedding lookups and the rows whose logits are wanted. An index past `table_rows` gives a row of
// zeros: padding of a captured batch.
//
// Macros: D
extern "C" __global__ void __launch_bounds__(128) gather(const bf16* __restrict__ table, const u32* __restrict__ index, bf16* __restrict__ out, u32 table_rows) {
    launch_dependents();
    wait_for_producers();
    const u32 from = index[blockIdx.x];
    const bool exists = from < table_rows;
    const bf16* const src = table + (u64)(exists ? from : 0) * D;
    bf16* const dst = out + (u64)blockIdx.x * D;
    if (D % 8 == 0) {
        for (int i = threadIdx.x; i < D / 8; i += 128) ((uint4*)dst)[i] = exists ? ((const uint4*)src)[i] : make_uint4(0, 0, 0, 0);
    } else {
        for (int i = threadIdx.x; i < D; i += 128) dst[i] = exists ? src[i] : (bf16)0;
    }
}
