// The step's words, from the host's memory. They depend on no kernel: their way overlaps with the one before.
extern "C" __global__ void fetch(const u32* __restrict__ from, u32* __restrict__ to, int words) {
    launch_dependents();
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < words; i += gridDim.x * blockDim.x) to[i] = from[i];
    wait_for_producers();
}
// Its answers, to the host's memory.
extern "C" __global__ void publish(const u32* __restrict__ from, u32* __restrict__ to, int words) {
    launch_dependents();
    wait_for_producers();
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < words; i += gridDim.x * blockDim.x) to[i] = from[i];
}
