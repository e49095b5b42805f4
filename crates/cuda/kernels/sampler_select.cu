// What needs a row's tokens in order: top-k and top-p filters (`filter`), and the best tokens with their logprobs (`top`). One block a row.
//
// Tokens are ordered by a unique 64-bit entry. A histogram over a range of entries finds a prefix of the order that fits shared memory; that batch is
// sorted; the next batch starts below it. So the row is sorted only as far as it is needed.
#define BLOCK 1024
#define BATCH 4096
#define BUCKETS 2048
#define PER_THREAD (BATCH / BLOCK)
#define NEVER INFINITE
#define AHEAD 5

struct Shared {
    u64 batch[BATCH]; // sorted, the best first
    u32 bucket[BUCKETS];
    uint2 scan[BLOCK / 32];
    u64 best;
    u32 found, count;
    float sum;
};

// The first batch of a row, while it is still in shared memory: its length (0: it is not) and where the next one starts.
struct First {
    u32 length;
    u64 next;
};

// The block's row and how far it is known.
struct Rows {
    Shared& s;
    const float* x;
    u64 hint; // entries above are few: where histograms start

    // f(entry, value) of every token whose entry is in [low, high].
    template <class F> __device__ __forceinline__ void each(u64 low, u64 high, F f) const {
        // One comparison settles most.
        const float floor = low >> 32 > value_key(-INFINITE) ? value_of((u32)(low >> 32)) : -INFINITE;
        for (int start = 4 * threadIdx.x; start < VOCAB; start += AHEAD * 4 * BLOCK) {
            float v[AHEAD][4]; // all on their way before the first is used
#pragma unroll
            for (int a = 0; a < AHEAD; a++) load4(x, start + a * 4 * BLOCK, v[a]);
#pragma unroll
            for (int a = 0; a < AHEAD; a++) {
                if (!(fmaxf(fmaxf(v[a][0], v[a][1]), fmaxf(v[a][2], v[a][3])) >= floor)) continue;
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const int i = start + a * 4 * BLOCK + e;
                    if (!(v[a][e] >= floor) || i >= VOCAB) continue;
                    const u64 key = entry(v[a][e], i);
                    if (key >= low && key <= high) f(key, v[a][e]);
                }
            }
        }
    }

    // Counts the entries in [low, high] by (high - entry) >> shift; bucket[b] becomes the number in buckets 0..=b. The shift is returned.
    __device__ int histogram(u64 low, u64 high) const {
        const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, shift = high == low ? 0 : max(0, 53 - __clzll(high - low));
        __syncthreads();
        s.bucket[tid] = s.bucket[BLOCK + tid] = 0;
        __syncthreads();
        each(low, high, [&](u64 key, float) { atomicAdd(s.bucket + ((high - key) >> shift), 1u); });
        __syncthreads();
        const u32 a = s.bucket[2 * tid], b = s.bucket[2 * tid + 1];
        u32 sum = a + b;
#pragma unroll
        for (int d = 1; d < 32; d *= 2) {
            const u32 left = __shfl_up_sync(ALL_LANES, sum, d);
            if (lane >= d) sum += left;
        }
        if (lane == 31) s.scan[warp].x = sum;
        __syncthreads();
        u32 before = sum - a - b;
        for (int w = 0; w < warp; w++) before += s.scan[w].x;
        s.bucket[2 * tid] = before + a, s.bucket[2 * tid + 1] = before + a + b;
        __syncthreads();
        return shift;
    }
    // The first bucket up to which there are at least n entries; the last one if there are fewer.
    __device__ int first_reaching(u32 n) const {
        if (threadIdx.x == 0) s.found = BUCKETS - 1;
        __syncthreads();
        for (int b = threadIdx.x; b < BUCKETS; b += BLOCK)
            if (s.bucket[b] >= n && (b == 0 || s.bucket[b - 1] < n)) s.found = b;
        __syncthreads();
        return s.found;
    }
    // The lowest entry that buckets 0..=b of [low, high] may hold.
    __device__ static u64 bottom(u64 low, u64 high, int b, int shift) {
        const u64 width = ((u64)b + 1) << shift;
        return b == BUCKETS - 1 || width > high - low ? low : high - width + 1;
    }

    // Gathers the entries in [low, high], of which there are at most BATCH, and sorts them.
    __device__ int gather(u64 low, u64 high) const {
        const int tid = threadIdx.x;
        if (tid == 0) s.count = 0;
        __syncthreads();
        each(low, high, [&](u64 key, float) { s.batch[atomicAdd(&s.count, 1u)] = key; });
        __syncthreads();
        const int n = s.count;
        int padded = 2;
        while (padded < n) padded *= 2;
        for (int i = n + tid; i < padded; i += BLOCK) s.batch[i] = 0;
        __syncthreads();
        for (int k = 2; k <= padded; k *= 2)
            for (int j = k / 2; j > 0; j /= 2) {
                for (int t = tid; t < padded / 2; t += BLOCK) {
                    const int i = (t & ~(j - 1)) * 2 + (t & (j - 1));
                    const u64 a = s.batch[i], b = s.batch[i + j];
                    if ((a < b) == ((i & k) == 0)) s.batch[i] = b, s.batch[i + j] = a;
                }
                __syncthreads();
            }
        return n;
    }

    // The best entries at or below `high`: at least one if there is one, `want` if they fit, but it may be more or fewer. `high` moves
    // below them; 0 means that nothing is left.
    __device__ int next(u64& high, u32 want) const {
        u64 low = hint <= high ? hint : 1, top = high;
        while (top != 0) {
            const int shift = histogram(low, top);
            const int b = first_reaching(want), last = s.bucket[b] > BATCH ? b - 1 : b;
            if (s.bucket[BUCKETS - 1] == 0) { // nothing in the range
                top = low - 1, low = 1;
            } else if (last < 0 || s.bucket[last] == 0) { // one bucket holds too many
                const u64 below = bottom(low, top, b, shift);
                if (b > 0) top = bottom(low, top, b - 1, shift) - 1;
                low = below;
            } else {
                const u64 from = bottom(low, top, last, shift);
                high = from - 1;
                return gather(from, top);
            }
        }
        high = 0;
        return 0;
    }

    // The entry of rank k, 1 being the best; the row has k entries.
    __device__ u64 kth(u64 high, u32 k) const {
        u64 low = 1;
        for (;;) {
            const int shift = histogram(low, high), b = first_reaching(k);
            const u32 before = b > 0 ? s.bucket[b - 1] : 0, inside = s.bucket[b] - before;
            const u64 below = bottom(low, high, b, shift);
            if (b > 0) high = bottom(low, high, b - 1, shift) - 1;
            low = below, k -= before;
            if (inside <= BATCH) {
                gather(low, high);
                return s.batch[k - 1];
            }
        }
    }

    // Adds the weights of batch[0..n) to `sum`, from left to right, until it reaches `target`. Returns how many were added if it did, else 0.
    //
    // While the sum stays below the next power of two its unit u in the last place is fixed: adding w adds round(w / u) units, where a tie goes up or
    // down with the parity of the sum. So an addition is a map from parity to units, such maps compose, and a parallel scan gives
    // every partial sum bit for bit. Where the sum passes a power of two, one addition is done as such and the scan starts anew.
    __device__ u32 fold(int n, float max, float target, float& sum) const {
        const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
        for (int start = 0; start < n;) {
            auto weight_at = [&](int i) { return weight(value_of((u32)(s.batch[i] >> 32)), max); };
            if (!(sum >= 1.f)) { // before the best token's weight of 1
                sum = __fadd_rn(sum, weight_at(start++));
                if (sum >= target) return start;
                continue;
            }
            const u32 exponent = __float_as_uint(sum) >> 23, units = (__float_as_uint(sum) & 0x7FFFFFu) | 0x800000u;
            const float to_units = __uint_as_float((277u - exponent) << 23), from_units = __uint_as_float((exponent - 23u) << 23);
            auto unit = [&](uint2 f, u32 parity) { return parity & 1 ? f.y : f.x; };
            // More than 2^24 units are past the power of two, by however much.
            auto compose = [&](uint2 f, uint2 g) {
                return make_uint2(min(f.x + unit(g, f.x), 1u << 26), min(f.y + unit(g, f.y + 1), 1u << 26));
            };
            uint2 step[PER_THREAD], mine = make_uint2(0, 0);
#pragma unroll
            for (int e = 0; e < PER_THREAD; e++) {
                const int i = start + PER_THREAD * tid + e;
                const float w = i < n ? __fmul_rn(weight_at(i), to_units) : 0.f;
                const u32 whole = (u32)w;
                const float rest = __fsub_rn(w, (float)whole);
                step[e] = make_uint2(whole + (rest > 0.5f || (rest == 0.5f && (whole & 1))), whole + (rest > 0.5f || (rest == 0.5f && !(whole & 1))));
                mine = compose(mine, step[e]);
            }
            uint2 upto = mine; // inclusive over the lanes
#pragma unroll
            for (int d = 1; d < 32; d *= 2) {
                const uint2 left = make_uint2(__shfl_up_sync(ALL_LANES, upto.x, d), __shfl_up_sync(ALL_LANES, upto.y, d));
                if (lane >= d) upto = compose(left, upto);
            }
            __syncthreads();
            if (lane == 31) s.scan[warp] = upto;
            if (tid == 0) s.found = ~0u;
            __syncthreads();
            uint2 before = make_uint2(__shfl_up_sync(ALL_LANES, upto.x, 1), __shfl_up_sync(ALL_LANES, upto.y, 1));
            if (lane == 0) before = make_uint2(0, 0);
            uint2 warps = make_uint2(0, 0);
            for (int w = 0; w < warp; w++) warps = compose(warps, s.scan[w]);
            before = compose(warps, before);
            u32 at = units + unit(before, units), event = ~0u, last = at;
            if (at < 1u << 24) {
#pragma unroll
                for (int e = 0; e < PER_THREAD; e++) {
                    const int i = start + PER_THREAD * tid + e;
                    if (event != ~0u || i >= n) break;
                    last = at, at += unit(step[e], at);
                    if (at >= 1u << 24 || (float)at * from_units >= target) event = i;
                }
            }
            if (event != ~0u) atomicMin(&s.found, event);
            __syncthreads();
            const u32 found = s.found;
            if (found == ~0u) {
                if (tid == BLOCK - 1) s.sum = (float)at * from_units;
            } else if (found == event) {
                s.sum = __fadd_rn((float)last * from_units, weight_at(event));
            }
            __syncthreads();
            sum = s.sum;
            if (found == ~0u) return 0;
            start = found + 1;
            if (sum >= target) return start;
        }
        return 0;
    }

    // A prefix of the order: where its weights' left fold over at most `limit` entries reaches `target`.
    struct Prefix {
        float sum;
        u64 last;  // its last entry if known, else 0
        u32 batch; // it is the first so many of `batch`; 0: it is longer than that
    };
    __device__ Prefix walk(u64 best, u32 limit, float target, First& first) const {
        const float max = value_of((u32)(best >> 32));
        float sum = 0.f;
        u32 taken = 0, want = 256;
        for (u64 high = best; high != 0 && taken < limit;) {
            const bool known = taken == 0 && first.length > 0;
            const u32 n = known ? first.length : next(high, min(want, limit - taken)), use = min(n, limit - taken);
            if (known) high = first.next;
            first = {taken == 0 ? n : 0, high};
            if (use == 0) break;
            // Weights fall to within rounding: these and all later ones are below half a unit of the sum.
            if (taken > 0 && __fadd_rn(sum, __fmul_rn(4.f, weight(value_of((u32)(s.batch[0] >> 32)), max))) == sum) return {sum, 0, 0};
            const u32 reached = fold(use, max, target, sum);
            const u32 count = reached ? reached : use;
            if (reached || taken + use == limit) return {sum, reached || limit < VOCAB ? s.batch[count - 1] : 0, taken == 0 ? count : 0};
            taken += use;
            want = min(want * 4, (u32)BATCH);
        }
        return {sum, 0, 0};
    }
};

__device__ __forceinline__ u64 block_max(Shared& s, u64 v) {
    v = warp_max(v);
    if (threadIdx.x == 0) s.best = 0;
    __syncthreads();
    if (threadIdx.x % 32 == 0 && v) atomicMax(&s.best, v);
    __syncthreads();
    return s.best;
}

// The chunks of 1024 weights, folded left, from runs of 128.
__device__ float fold_chunks(Shared& s, const float* runs) {
    float* const chunk = (float*)s.batch;
    static_assert(CHUNKS <= 2 * BATCH, "chunks fit the batch");
    __syncthreads();
    for (int c = threadIdx.x; c < CHUNKS; c += BLOCK) {
        float eight[8];
#pragma unroll
        for (int r = 0; r < 8; r++) eight[r] = runs[8 * c + r];
        chunk[c] = tree_of(eight);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        float sum = 0.f;
        for (int c = 0; c < CHUNKS; c++) sum = __fadd_rn(sum, chunk[c]);
        s.sum = sum;
    }
    __syncthreads();
    const float sum = s.sum;
    __syncthreads();
    return sum;
}

// Entries of values more than 16 below the best are left for later: finer buckets for those that matter.
__device__ __forceinline__ u64 hint_below(u64 best) { return (u64)value_key(__fsub_rn(value_of((u32)(best >> 32)), 16.f)) << 32; }

// Top-k and top-p, then Gumbel-max (with min-p) over what is kept.
extern "C" __global__ void __launch_bounds__(BLOCK)
    filter(const float* __restrict__ kept, const Row* __restrict__ rows, const u32* __restrict__ list, const float* __restrict__ runs, Answer* answers) {
    __shared__ Shared s;
    launch_dependents();
    wait_for_producers();
    const u32 r = list[blockIdx.x];
    const Row& row = rows[r];
    if (!has_answer(row, answers[r])) return;
    const u64 best = answers[r].best;
    const float max = value_of((u32)(best >> 32));
    const Rows order = {s, kept + (u64)row.kept * VOCAB, hint_below(best)};
    const bool limited = row.top_k > 0 && row.top_k < VOCAB;
    const u32 limit = limited ? row.top_k : VOCAB;

    Rows::Prefix prefix = {0.f, 0, 0};
    First first = {0, 0};
    if (row.top_p < 1.f) {
        const float all = limited ? order.walk(best, limit, NEVER, first).sum : fold_chunks(s, runs + (u64)r * CHUNKS * 8);
        prefix = order.walk(best, limit, __fmul_rn(row.top_p, all), first);
    } else if (limit <= BATCH / 4) {
        prefix = order.walk(best, limit, NEVER, first);
    }
    if (prefix.last == 0 && limited) prefix.last = order.kth(best, limit);

    u64 leader = 0;
    auto run = [&](u64 key, float x) {
        const float value = cap(x);
        if (!(value > -INFINITE)) return;
        u32 words[4];
        philox(row, id_of(key) / 4, words);
        const u32 lane = id_of(key) % 4, word = lane & 2 ? (lane & 1 ? words[3] : words[2]) : (lane & 1 ? words[1] : words[0]);
        const u64 score = entry(__fadd_rn(value, gumbel(word)), id_of(key));
        if (score > leader && passes_min_p(value, max, row.min_p)) leader = score;
    };
    if (prefix.batch > 0) {
        for (u32 i = threadIdx.x; i < prefix.batch; i += BLOCK) run(s.batch[i], order.x[id_of(s.batch[i])]);
    } else {
        order.each(prefix.last, best, run);
    }
    leader = block_max(s, leader);
    // By definition the best token passes min-p.
    if (threadIdx.x == 0) answers[r].race = leader ? leader : best;
}

// Log-sum-exp of a row and its best tokens: (id, bits of the logit) from `tops[top_at]` on.
extern "C" __global__ void __launch_bounds__(BLOCK) top(const float* __restrict__ logits, const Row* __restrict__ rows, const u32* __restrict__ list,
                                                        const float* __restrict__ runs, uint2* __restrict__ tops, Answer* answers) {
    __shared__ Shared s;
    launch_dependents();
    wait_for_producers();
    const u32 r = list[blockIdx.x];
    const Row& row = rows[r];
    Answer& answer = answers[r];
    if (!has_answer(row, answer)) return;
    const float max = answer.raw_best ? value_of(answer.raw_best) : -INFINITE;
    const float sum = answer.raw_best ? fold_chunks(s, runs + (u64)r * CHUNKS * 8) : 0.f;
    if (threadIdx.x == 0) answer.log_sum_exp = answer.raw_best ? __fmaf_rn(LN2, log2_full(sum), max) : max;

    const u64 best = (u64)(answer.raw_best ? answer.raw_best : value_key(-INFINITE)) << 32 | 0xFFFFFFFFu;
    const Rows order = {s, logits + (u64)row.logits * VOCAB, answer.raw_best ? hint_below(best) : 1};
    const u32 wanted = min(row.top, (u32)VOCAB);
    u32 taken = 0;
    for (u64 high = best; high != 0 && taken < wanted;) {
        const u32 n = order.next(high, min(wanted - taken, (u32)BATCH)), use = min(n, wanted - taken);
        if (use == 0) break;
        for (u32 i = threadIdx.x; i < use; i += BLOCK) {
            const u32 id = id_of(s.batch[i]);
            tops[row.top_at + taken + i] = make_uint2(id, __float_as_uint(order.x[id]));
        }
        taken += use;
        __syncthreads();
    }
}
