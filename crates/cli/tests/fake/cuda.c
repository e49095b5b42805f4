// A stand-in for libcuda, NVRTC and cuBLASLt, all in one library: memory is the host's, launches compute nothing (but that the sampler's
// first pass chooses token 7 and its words and answers are copied), and any call can be made to fail. It is strict where a card would corrupt memory silently: copies, launches and
// replays are refused with a word and abort() unless every address lies in live memory, every kernel is loaded and the context is current.
//
// FAKE_CUDA: words of NAME=NUMBER. driver (13000), nvrtc (13000), devices (1), cc (90), init (0): what the machine is.
// after=N fails=CODE of=CALL: the N-th call of CALL (any call without of=) fails with CODE; from 700 on it is as if the card were lost, and all
// calls after it fail too. count=1 prints the number of all calls and of each at the end.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <pthread.h>

typedef unsigned long long u64;
typedef unsigned int u32;
typedef void *Handle;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static __thread int bound;
static int lost;

#define DIE(...) (fprintf(stderr, "FAKE CUDA: " __VA_ARGS__), fputc('\n', stderr), abort())

static long setting(const char *name, long otherwise) {
    const char *all = getenv("FAKE_CUDA");
    size_t n = strlen(name);
    for (const char *at = all; at && *at; at += strcspn(at, " "), at += *at == ' ')
        if (!strncmp(at, name, n) && at[n] == '=') return atol(at + n + 1);
    return otherwise;
}
static int of_call(const char *call) {
    const char *of = getenv("FAKE_CUDA") ? strstr(getenv("FAKE_CUDA"), "of=") : 0;
    return !of || (!strncmp(of + 3, call, strlen(call)) && strchr(" ", of[3 + strlen(call)]));
}

// ---- counting and failing ----
static struct { const char *name; long calls; } counts[64];
static long all_calls;
static void print_counts(void) {
    fprintf(stderr, "calls %ld", all_calls);
    for (int i = 0; i < 64 && counts[i].name; i++) fprintf(stderr, " %s %ld", counts[i].name, counts[i].calls);
    fputc('\n', stderr);
}
static int enter(const char *call, int needs_context) {
    pthread_mutex_lock(&lock);
    static long seen;
    if (all_calls++ == 0 && setting("count", 0)) atexit(print_counts);
    for (int i = 0; i < 64; i++) {
        if (!counts[i].name) counts[i].name = call;
        if (!strcmp(counts[i].name, call)) {
            counts[i].calls++;
            break;
        }
    }
    long after = setting("after", 0), code = setting("fails", 700);
    int result = lost;
    if (after && of_call(call) && ++seen == after) {
        result = code;
        if (code >= 700) lost = code;
    }
    pthread_mutex_unlock(&lock);
    if (needs_context && !bound) DIE("%s without a context", call);
    return result;
}
#define CALL(name) do { int e = enter(#name, 1); if (e) return e; } while (0)
#define EARLY(name) do { int e = enter(#name, 0); if (e) return e; } while (0)
// Gives memory back whatever happened before, as a lost card's driver does with the host's part.
#define FREE(name) int failed = enter(#name, 1)

// ---- memory ----
static struct Block { u64 at; size_t bytes; struct Block *next; } *blocks;
static void live(const char *who, u64 at, size_t bytes) {
    pthread_mutex_lock(&lock);
    struct Block *b = blocks;
    while (b && !(at >= b->at && at + bytes <= b->at + b->bytes)) b = b->next;
    pthread_mutex_unlock(&lock);
    if (!b) DIE("%s: %zu bytes at %llx are nobody's", who, bytes, at);
}
static int take(u64 *at, size_t bytes) {
    struct Block *b = malloc(sizeof *b);
    void *memory = malloc(bytes);
    if (!b || !memory) return 2;
    pthread_mutex_lock(&lock);
    *b = (struct Block){(u64)memory, bytes, blocks}, blocks = b, *at = b->at;
    pthread_mutex_unlock(&lock);
    return 0;
}
static void give(const char *who, u64 at) {
    pthread_mutex_lock(&lock);
    struct Block **b = &blocks;
    while (*b && (*b)->at != at) b = &(*b)->next;
    struct Block *gone = *b;
    if (gone) *b = gone->next;
    pthread_mutex_unlock(&lock);
    if (!gone) DIE("%s of %llx, which is nobody's", who, at);
    free((void *)at), free(gone);
}

// ---- device ----
int cuDriverGetVersion(int *v) { EARLY(cuDriverGetVersion); return *v = setting("driver", 13000), 0; }
int cuInit(u32 flags) { EARLY(cuInit); return setting("init", 0); }
int cuGetErrorName(int code, const char **s) { return *s = code == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_OF_TEST", 0; }
int cuGetErrorString(int code, const char **s) { return *s = "made to fail", 0; }
int cuDeviceGetCount(int *n) { EARLY(cuDeviceGetCount); return *n = setting("devices", 1), 0; }
int cuDeviceGet(int *d, int i) { EARLY(cuDeviceGet); return *d = i, 0; }
int cuDeviceGetName(char *s, int n, int d) { EARLY(cuDeviceGetName); return snprintf(s, n, "Fake H100"), 0; }
int cuDeviceGetAttribute(int *v, int which, int d) {
    EARLY(cuDeviceGetAttribute);
    *v = which == 75 ? setting("cc", 90) / 10 : which == 76 ? setting("cc", 90) % 10 : 132;
    return 0;
}
int cuDevicePrimaryCtxRetain(Handle *c, int d) { EARLY(cuDevicePrimaryCtxRetain); return *c = (Handle)1, 0; }
int cuDevicePrimaryCtxRelease_v2(int d) {
    if (blocks && !lost) DIE("memory is left behind");
    return 0;
}
int cuCtxSetCurrent(Handle c) { EARLY(cuCtxSetCurrent); return bound = 1, 0; }
int cuMemGetInfo_v2(size_t *f, size_t *t) { CALL(cuMemGetInfo); return *f = 3ull << 30, *t = 4ull << 30, 0; }
int cuMemAlloc_v2(u64 *p, size_t n) { CALL(cuMemAlloc); return take(p, n); }
int cuMemAllocHost_v2(u64 *p, size_t n) { CALL(cuMemAllocHost); return take(p, n); }
int cuMemFree_v2(u64 p) { FREE(cuMemFree); return give("cuMemFree", p), failed; }
int cuMemFreeHost(u64 p) { FREE(cuMemFreeHost); return give("cuMemFreeHost", p), failed; }
int cuMemsetD8Async(u64 p, unsigned char v, size_t n, Handle s) {
    CALL(cuMemsetD8Async);
    live("cuMemsetD8Async", p, n);
    return memset((void *)p, v, n), 0;
}
int cuMemcpyHtoDAsync_v2(u64 to, void *from, size_t n, Handle s) {
    CALL(cuMemcpyHtoDAsync);
    live("cuMemcpyHtoDAsync", to, n);
    return memcpy((void *)to, from, n), 0;
}
int cuMemcpyDtoHAsync_v2(void *to, u64 from, size_t n, Handle s) {
    CALL(cuMemcpyDtoHAsync);
    live("cuMemcpyDtoHAsync", from, n);
    return memcpy(to, (void *)from, n), 0;
}

// ---- kernels, streams, graphs ----
// p: an address; P: one or none; f: four bytes.
static const char *const KERNELS[][2] = {{"gather", "pppf"}, {"rms_norm", "pPppf"}, {"silu", "pp"}, {"qkv_prep", "pPPfppppppff"},
    {"attention", "ppppppfpp"}, {"fetch", "ppf"}, {"scan", "pppppp"}, {"weigh", "ppppfppp"}, {"filter", "ppppppp"},
    {"top", "ppppppp"}, {"publish", "ppf"}, {"linear", ""}};
struct Module { int loaded; const char *name, *takes; };
struct Launch { struct Module *module; u64 at[16]; int n; };
struct Graph { struct Launch *launches; int n; };
static struct Graph *capturing;

int cuModuleLoadData(Handle *m, const char *image) {
    CALL(cuModuleLoadData);
    if (memcmp(image, "fake cubin", 10)) DIE("that is no cubin");
    struct Module *module = calloc(1, sizeof *module);
    return module->loaded = 1, *m = module, 0;
}
int cuModuleUnload(struct Module *m) {
    FREE(cuModuleUnload);
    if (!m->loaded) DIE("cuModuleUnload twice");
    return m->loaded = 0, failed;
}
int cuModuleGetFunction(Handle *f, struct Module *m, const char *name) {
    CALL(cuModuleGetFunction);
    for (unsigned i = 0; i < sizeof KERNELS / sizeof *KERNELS; i++)
        if (!strcmp(KERNELS[i][0], name)) return m->name = KERNELS[i][0], m->takes = KERNELS[i][1], *f = m, 0;
    return 500;
}
int cuFuncSetAttribute(Handle f, int a, int v) { CALL(cuFuncSetAttribute); return 0; }
static void check_launch(const struct Launch *l) {
    if (!l->module->loaded) DIE("launch of %s, which is unloaded", l->module->name);
    for (int i = 0; i < l->n; i++) live(l->module->name, l->at[i], 1);
}
int cuLaunchKernelEx(const u32 *config, struct Module *m, void **params, void **extra) {
    CALL(cuLaunchKernelEx);
    if (!config[0] || !config[1] || !config[2] || config[1] > 65535 || config[2] > 65535) return 1;
    struct Launch l = {m};
    for (int i = 0; m->takes[i]; i++) {
        if (m->takes[i] == 'f') continue;
        u64 at = *(u64 *)params[i];
        if (at || m->takes[i] == 'p') l.at[l.n++] = at;
    }
    check_launch(&l);
    if (capturing) {
        capturing->launches = realloc(capturing->launches, (capturing->n + 1) * sizeof l);
        capturing->launches[capturing->n++] = l;
    } else if (!strcmp(m->name, "scan")) {
        u64 *answers = *(u64 **)params[5];
        for (u32 row = 0; row < config[1]; row++) answers[5 * row] = 1ull << 63 | (u32)~7u;
    } else if (!strcmp(m->name, "fetch") || !strcmp(m->name, "publish")) {
        u64 bytes = 4 * *(u32 *)params[2];
        for (int i = 0; i < 2; i++) live(m->name, l.at[i], bytes);
        memcpy((void *)l.at[1], (void *)l.at[0], bytes);
    }
    return 0;
}
int cuStreamCreate(Handle *s, u32 f) { CALL(cuStreamCreate); return *s = (Handle)2, 0; }
int cuStreamDestroy_v2(Handle s) { FREE(cuStreamDestroy); return failed; }
int cuStreamSynchronize(Handle s) { CALL(cuStreamSynchronize); return 0; }
int cuStreamBeginCapture_v2(Handle s, int mode) {
    CALL(cuStreamBeginCapture);
    if (capturing) DIE("a capture in a capture");
    return capturing = calloc(1, sizeof *capturing), 0;
}
int cuStreamEndCapture(Handle s, struct Graph **g) {
    if (!capturing) DIE("no capture to end");
    *g = capturing, capturing = 0;
    CALL(cuStreamEndCapture);
    return 0;
}
int cuGraphInstantiateWithFlags(Handle *e, Handle g, u64 f) { CALL(cuGraphInstantiate); return *e = g, 0; }
int cuGraphLaunch(struct Graph *g, Handle s) {
    CALL(cuGraphLaunch);
    for (int i = 0; i < g->n; i++) check_launch(g->launches + i);
    return 0;
}
int cuGraphUpload(Handle g, Handle s) { CALL(cuGraphUpload); return 0; }
int cuGraphDestroy(struct Graph *g) { FREE(cuGraphDestroy); return free(g->launches), free(g), failed; }
int cuGraphExecDestroy(Handle g) { FREE(cuGraphExecDestroy); return failed; }
int cuEventCreate(Handle *e, u32 f) { CALL(cuEventCreate); return *e = (Handle)3, 0; }
int cuEventDestroy_v2(Handle e) { FREE(cuEventDestroy); return failed; }
int cuEventRecord(Handle e, Handle s) { CALL(cuEventRecord); return 0; }
int cuEventSynchronize(Handle e) { CALL(cuEventSynchronize); return 0; }
int cuEventElapsedTime(float *ms, Handle a, Handle b) { CALL(cuEventElapsedTime); return *ms = 1, 0; }
int cuTensorMapEncodeTiled(void *m, ...) { CALL(cuTensorMapEncodeTiled); return 0; }

// ---- NVRTC: takes everything ----
int nvrtcVersion(int *major, int *minor) {
    long v = setting("nvrtc", 13000);
    return *major = v / 1000, *minor = v % 1000 / 10, 0;
}
int nvrtcCreateProgram(Handle *p) { EARLY(nvrtcCreateProgram); return *p = (Handle)4, 0; }
int nvrtcDestroyProgram(Handle *p) { return 0; }
int nvrtcCompileProgram(Handle p) { EARLY(nvrtcCompileProgram); return 0; }
int nvrtcGetProgramLogSize(Handle p, size_t *n) { return *n = 1, 0; }
int nvrtcGetProgramLog(Handle p, char *log) { return *log = 0, 0; }
int nvrtcGetCUBINSize(Handle p, size_t *n) { return *n = 11, 0; }
int nvrtcGetCUBIN(Handle p, char *cubin) { return memcpy(cubin, "fake cubin", 11), 0; }

// ---- cuBLASLt ----
int cublasLtGetProperty(int which, int *v) { return *v = which == 0 ? 13 : 0, 0; }
int cublasLtCreate(Handle *h) { EARLY(cublasLtCreate); return *h = (Handle)5, 0; }
int cublasLtDestroy(Handle h) { return 0; }
#define DESCRIPTOR(what) \
    int cublasLt##what##Create(Handle *h) { EARLY(cublasLt##what##Create); return *h = malloc(1), 0; } \
    int cublasLt##what##Destroy(Handle h) { return free(h), 0; }
DESCRIPTOR(MatmulDesc)
DESCRIPTOR(MatrixLayout)
DESCRIPTOR(MatmulPreference)
int cublasLtMatmulDescSetAttribute(Handle h) { return 0; }
int cublasLtMatmulPreferenceSetAttribute(Handle h) { return 0; }
int cublasLtMatmulAlgoGetHeuristic(Handle l, Handle d, Handle a, Handle b, Handle c, Handle e, Handle p, int wanted, void *found, int *n) {
    EARLY(cublasLtMatmulAlgoGetHeuristic);
    return memset(found, 0, 96), *n = 1, 0;
}
int cublasLtMatmul(Handle l, Handle d, const float *one, u64 a, Handle la, u64 b, Handle lb, const float *zero, u64 c, Handle lc, u64 y, Handle ly,
                   const u64 *algorithm, u64 workspace, size_t bytes, Handle stream) {
    CALL(cublasLtMatmul);
    live("cublasLtMatmul", a, 1), live("cublasLtMatmul", b, 1), live("cublasLtMatmul", y, 1), live("cublasLtMatmul", workspace, bytes);
    return 0;
}
