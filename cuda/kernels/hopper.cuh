// Hopper's instructions that C++ has no name for: barriers that count bytes, tensor copies, and products of a warpgroup.
#pragma once

#include "common.cuh"

// ---- mbarrier: a phase ends when all arrivals and all announced bytes are there

static DEVICE void barrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
static DEVICE void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
static DEVICE void arrive(u32 barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory"); }
// A warp's arrivals, behind all that its lanes did: one, but racecheck follows only what each thread does itself.
#ifdef GQ_RACECHECK
static constexpr int WARP_ARRIVALS = 32;
static DEVICE void arrive_together(u32 barrier) { arrive(barrier); }
#else
static constexpr int WARP_ARRIVALS = 1;
static DEVICE void arrive_together(u32 barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) arrive(barrier);
}
#endif
static DEVICE void arrive_expecting(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Waits for the end of the phase with this parity; the phase before the first counts as one of parity 1.
#define BARRIER_WAIT(name, order)                                                                    \
    static DEVICE void name(u32 barrier, u32 parity) {                                               \
        asm volatile("{\n"                                                                           \
                     ".reg .pred ended;\n"                                                           \
                     "again:\n"                                                                      \
                     "mbarrier.try_wait.parity" order ".shared::cta.b64 ended, [%0], %1;\n"          \
                     "@!ended bra again;\n"                                                          \
                     "}" ::"r"(barrier), "r"(parity) : "memory");                                    \
    }
BARRIER_WAIT(barrier_wait, "")
BARRIER_WAIT(barrier_wait_cluster, ".acquire.cluster") // for what other CTAs of the cluster did
#undef BARRIER_WAIT

// A barrier of some of the CTA's threads.
template <int ID> static DEVICE void group_sync(int threads) { asm volatile("bar.sync %0, %1;" ::"n"(ID), "r"(threads) : "memory"); }

// ---- copies by a tensor map, which the driver has made (128 bytes, aligned to 64)

struct alignas(64) TensorMap {
    u8 opaque[128];
};

// Brings a map to where copies read it.
static DEVICE void prefetch_map(const TensorMap *map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }
static DEVICE void copy_box(u32 to, const TensorMap *map, int x, int y, u32 barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
                 "l"(map), "r"(x), "r"(y), "r"(barrier)
                 : "memory");
}
static DEVICE void copy_box(u32 to, const TensorMap *map, int x, int y, int z, u32 barrier) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to),
                 "l"(map), "r"(x), "r"(y), "r"(z), "r"(barrier)
                 : "memory");
}
static DEVICE void prefetch_box(const TensorMap *map, int x, int y, int z) {
    asm volatile("cp.async.bulk.prefetch.tensor.3d.L2.global.tile [%0, {%1, %2, %3}];" ::"l"(map), "r"(x), "r"(y), "r"(z) : "memory");
}

// ---- clusters: CTAs that run at the same time and reach each other's shared memory. A launch without has clusters of one.

#define REGISTER(name, special)                          \
    static DEVICE u32 name() {                           \
        u32 r;                                           \
        asm("mov.u32 %0, %%" special ";" : "=r"(r));     \
        return r;                                        \
    }
REGISTER(cluster_number, "clusterid.x")
REGISTER(cluster_rank, "cluster_ctarank") // the CTA's number in its cluster
REGISTER(clusters, "nclusterid.x")
#undef REGISTER

// All threads of a cluster that have not ended arrive, and may wait until all have.
static DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
static DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// What has this address here, in the CTA of that rank.
static DEVICE u32 remote(u32 address, u32 rank) {
    u32 r;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(address), "r"(rank));
    return r;
}
// 16 bytes into a CTA, a barrier of which counts them.
static DEVICE void store_remote(u32 to, uint4 v, u32 barrier) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z),
                 "r"(v.w), "r"(barrier)
                 : "memory");
}

// ---- wgmma: d += a · b, a is 64×16 in registers (rows 16w … 16w+15 in warp w, as in mma.m16n8k16), b is 16×N in shared memory, where
// it lies as N rows of 128 bytes with the 128-byte swizzle. d[4j … 4j+3] are columns 8j + 2(lane%4), + 1 of rows lane/4 and lane/4 + 8.

// What wgmma knows of b: its address in units of 16 bytes, and 1024 bytes from 8 rows to the next 8.
static DEVICE uint64_t describe(u32 address) { return (uint64_t)(address >> 4) | (uint64_t)1 << 16 | (uint64_t)64 << 32 | (uint64_t)1 << 62; }

static DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
static DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> static DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory"); }

#define D0 "%0,%1,%2,%3,%4,%5,%6,%7"
#define D1 D0 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define D2 D1 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define D3 D2 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define D4 D3 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define D5 D4 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define D6 D5 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define D7 D6 ",%56,%57,%58,%59,%60,%61,%62,%63"
#define D8 D7 ",%64,%65,%66,%67,%68,%69,%70,%71"
#define D9 D8 ",%72,%73,%74,%75,%76,%77,%78,%79"
#define D10 D9 ",%80,%81,%82,%83,%84,%85,%86,%87"
#define D11 D10 ",%88,%89,%90,%91,%92,%93,%94,%95"
#define D12 D11 ",%96,%97,%98,%99,%100,%101,%102,%103"
#define D13 D12 ",%104,%105,%106,%107,%108,%109,%110,%111"
#define D14 D13 ",%112,%113,%114,%115,%116,%117,%118,%119"
#define D15 D14 ",%120,%121,%122,%123,%124,%125,%126,%127"
#define R0(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define R1 R0(0), R0(8)
#define R3 R1, R0(16), R0(24)
#define R5 R3, R0(32), R0(40)
#define R7 R5, R0(48), R0(56)
#define R11 R7, R0(64), R0(72), R0(80), R0(88)
#define R15 R11, R0(96), R0(104), R0(112), R0(120)

#define WGMMA(T, type, n, list, a, b, ...)                                                                                      \
    static DEVICE void wgmma(T, float (&d)[n / 2], const u32 *v, uint64_t where) {                                              \
        asm volatile("{.reg .pred add; setp.eq.u32 add, 0, 0;"                                                                  \
                     "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" list "}, {" a "}, " b ", add, 1, 1, 0;}" \
                     : __VA_ARGS__                                                                                              \
                     : "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]), "l"(where));                                                 \
    }
#define EACH_WGMMA(n, list, a, b, ...)             \
    WGMMA(BF16, "bf16", n, list, a, b, __VA_ARGS__) \
    WGMMA(F16, "f16", n, list, a, b, __VA_ARGS__)
EACH_WGMMA(32, D1, "%16,%17,%18,%19", "%20", R1)
EACH_WGMMA(64, D3, "%32,%33,%34,%35", "%36", R3)
EACH_WGMMA(96, D5, "%48,%49,%50,%51", "%52", R5)
EACH_WGMMA(128, D7, "%64,%65,%66,%67", "%68", R7)
EACH_WGMMA(192, D11, "%96,%97,%98,%99", "%100", R11)
EACH_WGMMA(256, D15, "%128,%129,%130,%131", "%132", R15)
