// Shared by the sampler's kernels: what a row asks for, what it gets, the order of tokens, the noise.
//
// Macros: VOCAB
#define UNIT 2048 // tokens that a block of the row passes takes at a time
#define UNITS ((VOCAB + UNIT - 1) / UNIT)
#define GROUP 128 // neighbours that a warp of the row passes takes at a time
#define GROUPS ((VOCAB + GROUP - 1) / GROUP)
#define THREADS 256
#define CHUNKS ((VOCAB + 1023) / 1024)
#define GUMBEL_MAX 22.875f
#define ALL_LANES 0xFFFFFFFFu

// Row::flags
#define CHOOSE 1u       // a token is chosen, not only scored
#define GREEDY 2u       // by the largest logit
#define SCALED 4u       // the temperature divides
#define RACE 8u         // Gumbel-max over the whole row, without min-p: in the first pass
#define LATE_RACE 16u   // the same with min-p, which needs the row's maximum: in the second
#define STORE 32u       // changed logits are kept for later passes: they are more than raw ones over the temperature
#define LOGPROBS 64u
#define REPETITION 128u // a repetition penalty
#define COUNTED 256u    // a frequency or presence penalty
#define MASKED 512u
#define SCORED 1024u    // logprobs are those of `token`
#define WHOLE_SUM 2048u // top-p without top-k: weights are summed over the whole row
#define SEARCHED 4096u  // later passes look for large ones among the changed logits

// What a row asks for (sampler/layout.rs). Lists are ranges of the step's words.
struct Row {
    u32 logits, position, flags, kept; // rows of logits and of changed logits
    float temperature, top_p, min_p, presence, frequency, repetition;
    u32 top_k, seed_low, seed_high;
    u32 mask, mask_len, bias, bias_len, forbidden, forbidden_len, prompt, prompt_len, output, output_len;
    u32 token, top, top_at;
};

// What is known of a row; all zeros before the first pass.
struct Answer {
    u64 best;     // entry of the largest changed logit; 0: none above negative infinity
    u64 race;     // entry of the winning score; 0: nobody ran
    u32 raw_best; // ordered value of the largest logit; 0: none above negative infinity
    u32 nan;
    u32 better; // tokens before the reported one
    float log_sum_exp;
    u32 own; // bits of the reported token's logit
    u32 unused;
};

__device__ __forceinline__ float cap(float x) { return x > F32_MAX ? F32_MAX : x; }
// What became NaN is excluded.
__device__ __forceinline__ float settle(float x) { return x != x ? -INFINITE : cap(x); }

// Ordered like the capped value, -0 and +0 alike.
__device__ __forceinline__ u32 value_key(float x) {
    const u32 bits = __float_as_uint(__fadd_rn(cap(x), 0.f));
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float value_of(u32 key) { return __uint_as_float(key >> 31 ? key & 0x7FFFFFFFu : ~key); }
// Larger is earlier in the order of all filters: value descending, id ascending.
__device__ __forceinline__ u64 entry(float x, u32 id) { return (u64)value_key(x) << 32 | (u32)~id; }
__device__ __forceinline__ u32 id_of(u64 entry) { return ~(u32)entry; }

// The token whose logprob is reported.
__device__ __forceinline__ u32 reported(const Row& row, const Answer& answer) {
    if (row.flags & SCORED) return row.token;
    if ((row.flags & CHOOSE) && !(row.flags & GREEDY) && answer.race) return id_of(answer.race);
    return answer.best ? id_of(answer.best) : 0;
}
// Neither a NaN in the row nor nothing to choose from.
__device__ __forceinline__ bool has_answer(const Row& row, const Answer& answer) { return !answer.nan && (answer.best || !(row.flags & CHOOSE)); }

// Four neighbours from i, a multiple of 4, on; negative infinity past the row.
__device__ __forceinline__ void load4(const float* row, int i, float (&x)[4]) {
    if (VOCAB % 4 == 0) {
        const float4 v = i < VOCAB ? *(const float4*)(row + i) : make_float4(-INFINITE, -INFINITE, -INFINITE, -INFINITE);
        x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
    } else {
#pragma unroll
        for (int e = 0; e < 4; e++) x[e] = i + e < VOCAB ? row[i + e] : -INFINITE;
    }
}

// What processing made of a row's logits.
struct Changed {
    const float* x;
    float temperature;
    bool scaled; // by the temperature, when read

    __device__ __forceinline__ void load(int i, float (&v)[4]) const {
        load4(x, i, v);
        if (!scaled) return;
#pragma unroll
        for (int e = 0; e < 4; e++) v[e] = settle(__fdiv_rn(cap(v[e]), temperature));
    }
};
__device__ __forceinline__ Changed changed(const Row& row, const float* logits, const float* kept) {
    if (row.flags & STORE) return {kept + (u64)row.kept * VOCAB, 1.f, false};
    return {logits + (u64)row.logits * VOCAB, row.temperature, (row.flags & SCALED) != 0};
}
__device__ __forceinline__ float largest_of(const float (&x)[4]) { return fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3])); }

// The weight of a logit against the row's largest.
__device__ __forceinline__ float weight(float x, float max) { return exp2_full(__fmul_rn(__fsub_rn(cap(x), max), LOG2_E)); }
__device__ __forceinline__ bool passes_min_p(float x, float max, float min_p) { return !(min_p > 0.f) || weight(x, max) >= min_p; }

// Whether anything up to x may pass: rounding makes a smaller value's weight larger by a few units of the last place at most.
__device__ __forceinline__ bool may_pass_min_p(float x, float max, float min_p) { return !(min_p > 0.f) || weight(x, max) >= __fmul_rn(0.999f, min_p); }

// Philox4x32-10 at counter (position, block, 0, 0): the words of tokens 4 block .. 4 block + 3.
__device__ __forceinline__ void philox(const Row& row, u32 block, u32 (&out)[4]) {
    u32 c0 = row.position, c1 = block, c2 = 0, c3 = 0, k0 = row.seed_low, k1 = row.seed_high;
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const u64 p0 = (u64)c0 * 0xD2511F53u, p1 = (u64)c2 * 0xCD9E8D57u;
        c0 = (u32)(p1 >> 32) ^ c1 ^ k0, c1 = (u32)p1, c2 = (u32)(p0 >> 32) ^ c3 ^ k1, c3 = (u32)p0;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}
__device__ __forceinline__ float gumbel(u32 word) {
    float w = __fmaf_rn(__uint2float_rn(word), __uint_as_float(0x2F800000u), __uint_as_float(0x2F000000u)); // 2^-32, 2^-33
    if (!(w < 1.f)) w = __uint_as_float(0x3F7FFFFFu);
    int e;
    const float m = split_exponent(__fsub_rn(1.f, w), e), f = e == 0 ? -w : __fsub_rn(m, 1.f);
    const float exponential = -__fmul_rn(LN2, log2_1p(f, e));
    return -__fmul_rn(LN2, log2_full(exponential));
}
// Never below the noise of a word, at most 0.07 above it.
__device__ __forceinline__ float noise_bound(u32 word) {
    const float log2_word = __fsub_rn(__fmul_rn(__int2float_rn(__float_as_int(__uint2float_rn(word))), 1.f / 8388608.f), 127.f);
    return __fadd_rn(__fmul_rn(__fsub_rn(32.f, log2_word), LN2), 1e-3f);
}

// A thread's part of a Gumbel race: its leader, and a score that the warp has already seen.
struct Leader {
    float score = -INFINITE, seen = -INFINITE;
    u32 token = 0;

    // Four neighbours from id `first` on. To be called by a whole warp.
    template <class Passes> __device__ __forceinline__ void run(const Row& row, const float (&x)[4], u32 first, Passes passes) {
        // Rounding is monotone: a smaller value and less noise cannot give a larger score.
        const float top = cap(largest_of(x));
        if (!__any_sync(ALL_LANES, __fadd_rn(top, GUMBEL_MAX) >= seen)) return;
        u32 words[4];
        philox(row, first / 4, words);
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const float value = cap(x[e]);
            if (!(__fadd_rn(value, noise_bound(words[e])) >= seen)) continue;
            const float s = __fadd_rn(value, gumbel(words[e]));
            const u32 id = first + e;
            if ((s > score || (s == score && id < token)) && passes(value, id)) score = s, token = id;
        }
        seen = value_of(__reduce_max_sync(ALL_LANES, value_key(score)));
    }
    __device__ __forceinline__ u64 key() const { return score > -INFINITE ? entry(score, token) : 0; }
};

__device__ __forceinline__ u64 warp_max(u64 v) {
#pragma unroll
    for (int bit = 1; bit < 32; bit *= 2) {
        const u64 other = __shfl_xor_sync(ALL_LANES, v, bit);
        v = other > v ? other : v;
    }
    return v;
}
