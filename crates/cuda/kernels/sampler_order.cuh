// A row's tokens in order, best first, by a block.
//
// Tokens are ordered by a unique 64-bit entry. The pass before left the largest value of each group of 128: what the n-th of these reaches has n
// entries and more, all in groups whose largest reaches it. So the first entries are found in a few groups. Where that does not do (more are needed
// than there are groups, too many are equal), a histogram over a range of entries finds a prefix that fits shared memory. Either batch is sorted;
// the next one starts below it. So the row is sorted only as far as it is needed. Of a long prefix whose weights' sum alone is needed most is not even
// sorted: see `pass_over`.
#define BLOCK 512
#define WARPS (BLOCK / 32)
#define BATCH 2048
#define BUCKETS 2048
#define PER_THREAD (BATCH / BLOCK)
#define BUCKETS_PER_THREAD (BUCKETS / BLOCK)
#define NEVER INFINITE
#define AHEAD 5
#define SERIAL 64  // first weights that are added one by one
#define TIE 0x80000000u

struct Shared {
    u64 batch[BATCH]; // sorted, the best first; a bucket's units while a histogram is read
    u32 bucket[BUCKETS];
    u32 largest[GROUPS]; // ordered values
    u16 listed[GROUPS];  // groups to look at
    uint2 scan[WARPS];
    u64 best;
    u32 found, count, lists;
    float sum;
};
static_assert(sizeof(Shared) <= 48 * 1024, "the vocabulary has too many groups");

// How far a row is known.
struct Walk {
    u64 high;  // the next entry is at or below; 0: none is left
    u32 taken; // entries above
    float sum; // the left fold of their weights
};
// Where a walk ends: at so large a sum or so many entries.
struct Goal {
    float max, target;
    u32 limit;
};
// The first batch of a row, while it is still in shared memory: its length (0: it is not) and where the next one starts.
struct First {
    u32 length;
    u64 next;
};

// A left fold's sum of at least 1 in units of its last place. While it stays below the next power of two the unit is fixed: adding w adds
// round(w / unit) units, where a tie goes up or down with the parity of the sum.
struct Units {
    u32 sum;
    float to, from;
    __device__ __forceinline__ explicit Units(float x) {
        const u32 exponent = __float_as_uint(x) >> 23;
        sum = (__float_as_uint(x) & 0x7FFFFFu) | 0x800000u;
        to = __uint_as_float((277u - exponent) << 23), from = __uint_as_float((exponent - 23u) << 23);
    }
    // Of w up to 1; a tie rounded down.
    __device__ __forceinline__ u32 round(float w, bool& tie) const {
        const float units = __fmul_rn(w, to), whole = __fadd_rn(units, 8388608.f); // 2^23: it rounds to an integer, which then stands in the low bits
        const float rest = __fsub_rn(units, __fsub_rn(whole, 8388608.f));
        tie = fabsf(rest) == 0.5f;
        return __float_as_uint(whole) - 0x4B000000u - (rest == -0.5f);
    }
};

// A histogram's buckets over the entries in [low, high], the best ones first: equally wide in value with a last one for all the rest, or, at a
// scale of 0, equally wide in ordered values and ids, so that any bucket can be divided further.
struct Buckets {
    u64 low, high;
    float scale; // buckets that a logit of 1 is wide
    int shift;
    __device__ __forceinline__ Buckets(u64 low, u64 high, float scale)
        : low(low), high(high), scale(scale), shift(high == low ? 0 : max(0, 53 - __clzll(high - low))) {}
    __device__ __forceinline__ u32 of_value(float x) const {
        return (u32)fminf(__fmul_rn(__fsub_rn(value_of((u32)(high >> 32)), x), scale), BUCKETS - 1.f); // the last one for a NaN
    }
    __device__ __forceinline__ u32 of(u64 key, float x) const { return scale == 0.f ? (high - key) >> shift : of_value(x); }
    // The lowest entry that buckets 0..=b may hold. For whole warps.
    __device__ u64 bottom(int b) const {
        if (b == BUCKETS - 1) return low;
        if (scale == 0.f) {
            const u64 width = ((u64)b + 1) << shift;
            return width > high - low ? low : high - width + 1;
        }
        u64 outside = 0; // the largest ordered value below, five bits at a time
        for (int bits = 30; bits >= 0; bits -= 5) {
            const u64 v = outside + ((threadIdx.x % 32 + 1ull) << bits);
            outside += (u64)__popc(__ballot_sync(ALL_LANES, v <= high >> 32 && of_value(value_of((u32)v)) > b)) << bits;
        }
        return min(high + 1, max(low, (outside + 1) << 32)); // past `high`: none, as its value has no distance from itself, an infinite one
    }
};

// The block's row.
struct Rows {
    Shared& s;
    Changed from;
    u64 best; // at or above every entry
    u32 least; // of the groups' largest
    float scale; // of histograms: most entries that matter are well apart

    __device__ Rows(Shared& s, const Changed& from, u64 best, u32 least) : s(s), from(from), best(best), least(least) {
        const float spread = __fsub_rn(value_of((u32)(best >> 32)), value_of(least));
        scale = spread > 0.f ? __fdividef(BUCKETS, fminf(4.f * spread, 16.f)) : 0.f;
    }

    // f(four neighbours, the first one's id), for whole warps, where a group's largest has an ordered value of `floor` or more. In no order.
    template <class F> __device__ __forceinline__ void visit(u32 floor, F f) const {
        const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
        __syncthreads();
        if (tid == 0) s.lists = 0;
        __syncthreads();
        for (int start = 0; start < GROUPS; start += BLOCK) {
            const bool hit = start + tid < GROUPS && s.largest[start + tid] >= floor;
            const u32 hits = __ballot_sync(ALL_LANES, hit);
            u32 at = lane == 0 && hits ? atomicAdd(&s.lists, __popc(hits)) : 0;
            at = __shfl_sync(ALL_LANES, at, 0) + __popc(hits & ((1u << lane) - 1));
            if (hit) s.listed[at] = start + tid;
        }
        __syncthreads();
        for (int n = s.lists, first = warp; first < n; first += AHEAD * WARPS) {
            float v[AHEAD][4]; // all on their way before the first is used
            int id[AHEAD];
#pragma unroll
            for (int a = 0; a < AHEAD; a++) {
                const int i = first + a * WARPS;
                id[a] = i < n ? GROUP * s.listed[i] + 4 * lane : VOCAB;
                if (i < n) from.load(id[a], v[a]);
            }
#pragma unroll
            for (int a = 0; a < AHEAD; a++)
                if (first + a * WARPS < n) f(v[a], id[a]);
        }
    }
    // f(entry, value) of every token whose entry is in [low, high].
    template <class F> __device__ __forceinline__ void each(u64 low, u64 high, F f) const {
        // One comparison settles most.
        const float floor = low >> 32 > value_key(-INFINITE) ? value_of((u32)(low >> 32)) : -INFINITE;
        visit((u32)(low >> 32), [&](const float(&v)[4], int id) {
            if (!(largest_of(v) >= floor)) return;
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const u64 key = entry(v[e], id + e);
                if (id + e < VOCAB && key >= low && key <= high) f(key, cap(v[e]));
            }
        });
    }

    // The sum of `mine` over all threads before this one.
    __device__ u32 sum_before(u32 mine) const {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        u32 upto = mine;
#pragma unroll
        for (int d = 1; d < 32; d *= 2) {
            const u32 left = __shfl_up_sync(ALL_LANES, upto, d);
            if (lane >= d) upto += left;
        }
        __syncthreads();
        if (lane == 31) s.scan[warp].x = upto;
        __syncthreads();
        u32 sum = upto - mine;
        for (int w = 0; w < warp; w++) sum += s.scan[w].x;
        return sum;
    }
    // Starts a count; another thread's adding may begin.
    __device__ void clear(u32* buckets) const {
        __syncthreads();
        for (int b = threadIdx.x; b < BUCKETS; b += BLOCK) buckets[b] = 0;
        __syncthreads();
    }
    // Of counts of single buckets: bucket[b] becomes the number in buckets 0..=b.
    __device__ void accumulate() const {
        __syncthreads();
        u32* const mine = s.bucket + BUCKETS_PER_THREAD * threadIdx.x;
        u32 sum = 0;
#pragma unroll
        for (int e = 0; e < BUCKETS_PER_THREAD; e++) sum += mine[e];
        u32 upto = sum_before(sum);
#pragma unroll
        for (int e = 0; e < BUCKETS_PER_THREAD; e++) upto += mine[e], mine[e] = upto;
        __syncthreads();
    }
    // The first bucket up to which there are at least n; the last one if there are fewer.
    __device__ int first_reaching(u32 n) const {
        if (threadIdx.x == 0) s.found = BUCKETS - 1;
        __syncthreads();
        for (int b = threadIdx.x; b < BUCKETS; b += BLOCK)
            if (s.bucket[b] >= n && (b == 0 || s.bucket[b - 1] < n)) s.found = b;
        __syncthreads();
        const int b = s.found;
        __syncthreads();
        return b;
    }

    // An ordered value that `n` groups' largest reach, to within 2^-11 the largest such; there are n groups.
    __device__ u32 reached_by(u32 n) const {
        u32 low = least, high = (u32)(best >> 32);
        for (;;) {
            const int shift = high == low ? 0 : max(0, 21 - __clz(high - low));
            clear(s.bucket);
            for (int g = threadIdx.x; g < GROUPS; g += BLOCK) {
                const u32 v = s.largest[g];
                if (v >= low && v <= high) atomicAdd(s.bucket + ((high - v) >> shift), 1u);
            }
            accumulate();
            const int b = first_reaching(n);
            const u32 above = b << shift, width = (1u << shift) - 1; // of the buckets before, of this one less 1
            n -= b > 0 ? s.bucket[b - 1] : 0;
            high -= above;
            low = high - low > width ? high - width : low;
            if (shift <= 12) return low;
        }
    }

    // Counts the entries of `part`: bucket[b] becomes the number in buckets 0..=b. With a goal also what each bucket's weights add to a sum, in `batch`.
    __device__ void histogram(const Buckets& part, const Goal* goal, const Units& units) const {
        u32* const added = (u32*)s.batch;
        clear(s.bucket);
        if (goal) clear(added);
        each(part.low, part.high, [&](u64 key, float x) {
            const u32 b = part.of(key, x);
            atomicAdd(s.bucket + b, 1u);
            if (!goal) return;
            bool tie;
            const u32 w = units.round(weight(x, goal->max), tie);
            if (w) atomicAdd(added + b, w);
            if (tie) atomicOr(added + b, TIE);
        });
        accumulate();
    }

    // Whether the weights at and below `high` can be added by buckets: all of them together stay below TIE.
    __device__ static bool by_buckets(const Walk& at, const Goal* goal) {
        return goal && at.sum >= 1.f && __fmul_rn(weight(value_of((u32)(at.high >> 32)), goal->max), Units(at.sum).to) <= (float)(TIE / 2 / VOCAB);
    }
    // Adds the last histogram's first buckets to the walk, each as a whole: in any order its weights add the same units, as long as none is a tie
    // and neither a power of two nor the goal is reached. The first bucket where that does not hold is returned; BUCKETS: none.
    __device__ int pass_over(Walk& at, const Goal& goal, const Units& units) const {
        const int first = BUCKETS_PER_THREAD * threadIdx.x;
        const u32* const added = (const u32*)s.batch + first;
        u32 mine = 0;
#pragma unroll
        for (int e = 0; e < BUCKETS_PER_THREAD; e++) mine += added[e] & ~TIE;
        if (threadIdx.x == 0) s.found = BUCKETS;
        u32 before = units.sum + sum_before(mine), at_event = 0;
        int event = BUCKETS;
#pragma unroll
        for (int e = 0; e < BUCKETS_PER_THREAD; e++) {
            if (event != BUCKETS) break;
            const u32 sum = before + (added[e] & ~TIE);
            if ((added[e] & TIE) || sum >= 1u << 24 || (float)sum * units.from >= goal.target || at.taken + s.bucket[first + e] >= goal.limit)
                event = first + e, at_event = before;
            before = sum;
        }
        if (event != BUCKETS) atomicMin(&s.found, (u32)event);
        __syncthreads();
        const int found = s.found;
        if (found == BUCKETS ? threadIdx.x == BLOCK - 1 : found == event) s.sum = (float)(found == BUCKETS ? before : at_event) * units.from;
        __syncthreads();
        at.sum = s.sum;
        at.taken += found > 0 ? s.bucket[found - 1] : 0;
        return found;
    }

    // Gathers the entries in [low, high]. Returns how many there are; more than BATCH: those that are there are not all.
    __device__ u32 gather(u64 low, u64 high) const {
        __syncthreads();
        if (threadIdx.x == 0) s.count = 0;
        each(low, high, [&](u64 key, float) {
            const u32 at = atomicAdd(&s.count, 1u);
            if (at < BATCH) s.batch[at] = key;
        });
        __syncthreads();
        return s.count;
    }
    __device__ void sort(int n) const {
        const int tid = threadIdx.x;
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
                // Up to here and from here on a warp keeps to 64 entries of its own.
                if (j > 32 || (j == 1 && k > 32)) __syncthreads();
                else __syncwarp();
            }
        __syncthreads();
    }

    // The next entries of the order, sorted: at least one if there is one, `want` if they fit, but it may be more or fewer. The walk's `high` moves below
    // them. On the way to a goal many entries may be passed over first; these are taken.
    __device__ u32 next(Walk& at, u32 want, const Goal* goal) const {
        u64 low = 1;
        if (at.taken + want <= GROUPS) {
            low = (u64)reached_by(at.taken + want) << 32;
            const u32 n = gather(low, at.high);
            if (n <= BATCH) {
                sort(n);
                at.high = low - 1;
                return n;
            }
        }
        for (float by_value = scale; at.high != 0;) {
            const Buckets part(low, at.high, by_value);
            const bool sums = by_buckets(at, goal);
            const Units units(at.sum);
            histogram(part, sums ? goal : nullptr, units);
            const int first = sums ? pass_over(at, *goal, units) : 0;
            const u32 before = first > 0 ? s.bucket[first - 1] : 0;
            if (s.bucket[BUCKETS - 1] == before) { // nothing more in this part
                at.high = low - 1, low = 1, by_value = scale;
                continue;
            }
            const int b = first_reaching(before + want), last = s.bucket[b] - before > BATCH ? b - 1 : b;
            if (last < first || s.bucket[last] == before) { // one bucket holds too many
                if (b > 0) at.high = part.bottom(b - 1) - 1;
                low = part.bottom(b), by_value = 0.f;
            } else {
                if (first > 0) at.high = part.bottom(first - 1) - 1;
                low = part.bottom(last);
                const u32 n = gather(low, at.high);
                sort(n);
                at.high = low - 1;
                return n;
            }
        }
        return 0;
    }

    // The entry of rank k, 1 being the best; the row has k entries.
    __device__ u64 kth(u32 k) const {
        u64 low = k <= GROUPS ? (u64)reached_by(k) << 32 : 1, high = best;
        for (float by_value = scale;; by_value = 0.f) {
            const Buckets part(low, high, by_value);
            histogram(part, nullptr, Units(1.f));
            const int b = first_reaching(k);
            const u32 before = b > 0 ? s.bucket[b - 1] : 0, inside = s.bucket[b] - before;
            if (b > 0) high = part.bottom(b - 1) - 1;
            low = part.bottom(b), k -= before;
            if (inside <= BATCH) {
                sort(gather(low, high));
                return s.batch[k - 1];
            }
        }
    }

    // Adds the weights of batch[0..n) to `sum`, from left to right, until it reaches the target. Returns how many were added if it did, else 0.
    //
    // An addition is a map from the sum's parity to units; such maps compose, and a parallel scan gives every partial sum bit for bit. Where the sum
    // passes a power of two, one addition is done as such and the scan starts anew. As the first sums do that often, they are added one by one.
    __device__ u32 fold(int n, const Goal& goal, float& sum) const {
        const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
        auto weight_at = [&](int i) { return weight(value_of((u32)(s.batch[i] >> 32)), goal.max); };
        int start = 0;
        if (sum == 0.f) {
            float* const first = (float*)s.bucket;
            __syncthreads();
            if (tid < SERIAL) first[tid] = tid < n ? weight_at(tid) : 0.f;
            __syncthreads();
            for (; start < min(n, SERIAL); start += 4) {
                const float4 w = *(const float4*)(first + start);
                const float a = __fadd_rn(sum, w.x), b = __fadd_rn(a, w.y), c = __fadd_rn(b, w.z), d = __fadd_rn(c, w.w);
                if (d >= goal.target) {
                    sum = a >= goal.target ? a : b >= goal.target ? b : c >= goal.target ? c : d;
                    return start + (a >= goal.target ? 1 : b >= goal.target ? 2 : c >= goal.target ? 3 : 4);
                }
                sum = d;
            }
        }
        while (start < n) {
            const Units units(sum);
            auto unit = [&](uint2 f, u32 parity) { return parity & 1 ? f.y : f.x; };
            // More than 2^24 units are past the power of two, by however much.
            auto compose = [&](uint2 f, uint2 g) {
                return make_uint2(min(f.x + unit(g, f.x), 1u << 26), min(f.y + unit(g, f.y + 1), 1u << 26));
            };
            uint2 step[PER_THREAD], mine = make_uint2(0, 0);
#pragma unroll
            for (int e = 0; e < PER_THREAD; e++) {
                const int i = start + PER_THREAD * tid + e;
                bool tie;
                const u32 whole = units.round(i < n ? weight_at(i) : 0.f, tie);
                step[e] = make_uint2(whole + (tie && (whole & 1)), whole + (tie && !(whole & 1)));
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
            u32 at = units.sum + unit(before, units.sum), event = ~0u, last = at;
            if (at < 1u << 24) {
#pragma unroll
                for (int e = 0; e < PER_THREAD; e++) {
                    const int i = start + PER_THREAD * tid + e;
                    if (event != ~0u || i >= n) break;
                    last = at, at += unit(step[e], at);
                    if (at >= 1u << 24 || (float)at * units.from >= goal.target) event = i;
                }
            }
            if (event != ~0u) atomicMin(&s.found, event);
            __syncthreads();
            const u32 found = s.found;
            if (found == ~0u) {
                if (tid == BLOCK - 1) s.sum = (float)at * units.from;
            } else if (found == event) {
                s.sum = __fadd_rn((float)last * units.from, weight_at(event));
            }
            __syncthreads();
            sum = s.sum;
            if (found == ~0u) return 0;
            start = found + 1;
            if (sum >= goal.target) return start;
        }
        return 0;
    }

    // A prefix of the order: where its weights' left fold over at most `limit` entries reaches `target`.
    struct Prefix {
        float sum;
        u64 last;  // its last entry if known, else 0
        u32 batch; // it is the first so many of `batch`; 0: it is longer than that
    };
    __device__ Prefix walk(const Goal& goal, First& first) const {
        Walk at = {best, 0, 0.f};
        for (u32 want = SERIAL; at.high != 0 && at.taken < goal.limit; want = min(want * 4, (u32)BATCH)) {
            const bool start = at.taken == 0, known = start && first.length > 0;
            const u32 n = known ? first.length : next(at, min(want, goal.limit - at.taken), &goal), use = min(n, goal.limit - at.taken);
            if (known) at.high = first.next;
            first = {start ? n : 0, at.high};
            if (use == 0) break;
            // Weights fall to within rounding: these and all later ones are below half a unit of the sum.
            if (!start && __fadd_rn(at.sum, __fmul_rn(4.f, weight(value_of((u32)(s.batch[0] >> 32)), goal.max))) == at.sum) return {at.sum, 0, 0};
            const u32 reached = fold(use, goal, at.sum), count = reached ? reached : use;
            if (reached || at.taken + use == goal.limit) return {at.sum, reached || goal.limit < VOCAB ? s.batch[count - 1] : 0, start ? count : 0};
            at.taken += use;
        }
        return {at.sum, 0, 0};
    }
};

// The chunks of 1024 weights, folded left, from runs of 128.
__device__ float fold_chunks(Shared& s, const float* runs) {
    float* const chunk = (float*)s.batch;
    static_assert(CHUNKS + 3 <= 2 * BATCH, "chunks fit the batch");
    __syncthreads();
    for (int c = threadIdx.x; c < (CHUNKS + 3) / 4 * 4; c += BLOCK) {
        float eight[8] = {}; // adding zeros changes nothing
        if (c < CHUNKS) {
            const float4 a = *(const float4*)(runs + 8 * c), b = *(const float4*)(runs + 8 * c + 4);
            eight[0] = a.x, eight[1] = a.y, eight[2] = a.z, eight[3] = a.w, eight[4] = b.x, eight[5] = b.y, eight[6] = b.z, eight[7] = b.w;
        }
        chunk[c] = tree_of(eight);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        float sum = 0.f;
#pragma unroll 4
        for (int c = 0; c < CHUNKS; c += 4) {
            const float4 w = *(const float4*)(chunk + c);
            sum = __fadd_rn(__fadd_rn(__fadd_rn(__fadd_rn(sum, w.x), w.y), w.z), w.w);
        }
        s.sum = sum;
    }
    __syncthreads();
    const float sum = s.sum;
    __syncthreads();
    return sum;
}

// The groups' largest; the least of them is returned.
__device__ __forceinline__ u32 load_largest(Shared& s, const u32* largest) {
    u32 least = ~0u;
    for (int g = threadIdx.x; g < GROUPS; g += BLOCK) {
        const u32 v = largest[g];
        s.largest[g] = v, least = min(least, v);
    }
    least = __reduce_min_sync(ALL_LANES, least);
    if (threadIdx.x % 32 == 0) s.scan[threadIdx.x / 32].x = least;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < WARPS; w++) least = min(least, s.scan[w].x);
    return least;
}
