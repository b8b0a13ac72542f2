// Instructions that Hopper (sm_90a) has beside mma.sync: tiles that the copy engine brings, products of a warpgroup that read them, and the
// barriers between both. PTX ISA, "Asynchronous warpgroup level matrix instructions" and "Tensor copies".
#pragma once

// A CUtensorMap, which the driver makes.
struct alignas(64) TensorMap {
    u64 opaque[16];
};

// Tiles begin at multiples of this, so that a swizzle depends on the place in the tile alone.
static const int ALIGNMENT = 1024, MAX_SHARED_BYTES = 226 * 1024;

extern __shared__ uint4 dynamic[];

__device__ __forceinline__ u32 aligned_shared() {
    return ((u32)__cvta_generic_to_shared(dynamic) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}
__device__ __forceinline__ const void *shared_pointer(u32 address) { return __cvta_shared_to_generic(address); }

// Returns a number that is equal in all lanes of a warp, and lets the compiler know that it is.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }

// Barriers in shared memory: a phase ends when `count` threads have arrived and all bytes that were announced are there.
__device__ __forceinline__ void barrier_init(u32 barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
// Between the initialization of barriers and their use by the copy engine.
__device__ __forceinline__ void barriers_begin() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_arrive_expecting(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    asm volatile("{\n.reg .pred done;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra WAIT;\n}" ::"r"(
                     barrier), "r"(parity) : "memory");
}

// Starts to copy one number, or puts 0.
__device__ __forceinline__ void copy_word(u32 to, const void *from, bool there) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(there ? 4 : 0) : "memory");
}
// This thread arrives when its numbers are there.
__device__ __forceinline__ void barrier_arrive_after_words(u32 barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// The next one of N buffers, and the parity of its phase.
template <int N> struct Ring {
    u32 index = 0, parity = 0;
    __device__ __forceinline__ void next() {
        if (++index == N) index = 0, parity ^= 1;
    }
};

// Starts to copy a box whose first element is (column, row); what lies outside of the tensor becomes zeros.
__device__ __forceinline__ void copy_box(u32 to, const TensorMap &map, int column, int row, u32 barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3}], [%4];" ::"r"(to), "l"(&map), "r"(column), "r"(row), "r"(barrier) : "memory");
}

// Two blocks that run side by side and reach each other's shared memory.
static const int PAIR = 2;

// This block's number in its pair.
__device__ __forceinline__ u32 pair_rank() {
    u32 rank;
    asm volatile("mov.u32 %0, %cluster_ctarank;" : "=r"(rank));
    return rank;
}
// All threads of both blocks wait for each other.
__device__ __forceinline__ void pair_wait() {
    __syncwarp();
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Returns the same place in the shared memory of the block with this number.
__device__ __forceinline__ u32 shared_of(u32 address, u32 rank) {
    u32 there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
}
// Writes a number and tells a barrier of the same block that its four bytes are there; both places are those that shared_of returns.
__device__ __forceinline__ void send_word(u32 to, u32 word, u32 barrier) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(to), "r"(word), "r"(barrier) : "memory");
}
// `barrier` is what shared_of returns.
__device__ __forceinline__ void barrier_arrive_there(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// As copy_box, to the same place in both blocks, whose barriers are both told.
__device__ __forceinline__ void copy_box_to_pair(u32 to, const TensorMap &map, int column, int row, u32 barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
                 "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to), "l"(&map), "r"(column), "r"(row), "r"(barrier), "h"((u16)3) : "memory");
}

// A tile [ROWS, D] in shared memory: blocks of COLUMNS columns, one behind the other, whose rows of SWIZZLE bytes have their
// 16-byte chunks swizzled as copies and products want it.
template <int D, int ROWS> struct Tile {
    static const int SWIZZLE = D % 64 == 0 ? 128 : 64, COLUMNS = SWIZZLE / 2, BLOCK_BYTES = ROWS * SWIZZLE, BYTES = ROWS * D * 2;
    static const u64 LAYOUT = SWIZZLE == 128 ? 1 : 2;

    // Maps are made for boxes of BOX_ROWS rows and COLUMNS columns.
    static const int BOX_ROWS = 64;
    static __device__ __forceinline__ void copy(u32 to, const TensorMap &map, int column, int row, u32 barrier) {
#pragma unroll
        for (int block = 0; block < D / COLUMNS; block++)
#pragma unroll
            for (int i = 0; i < ROWS; i += BOX_ROWS)
                copy_box(to + block * BLOCK_BYTES + i * SWIZZLE, map, column + block * COLUMNS, row + i, barrier);
    }
    static __device__ __forceinline__ u64 descriptor(u32 at, u32 leading) {
        return (u64)(at >> 4) | (u64)(leading >> 4) << 16 | (u64)(8 * SWIZZLE >> 4) << 32 | LAYOUT << 62;
    }
    // Operand whose k runs along the tile's rows: rows from `row` on, the 16 columns of step `k`.
    static __device__ __forceinline__ u64 by_columns(u32 tile, int row, int k) {
        return descriptor(tile + k * 16 / COLUMNS * BLOCK_BYTES + row * SWIZZLE + k * 16 % COLUMNS * 2, 16);
    }
    // Operand whose k runs down the tile: the 16 rows of step `k`, all columns.
    static __device__ __forceinline__ u64 by_rows(u32 tile, int k) { return descriptor(tile + k * 16 * SWIZZLE, BLOCK_BYTES); }
};

// Between what a warpgroup writes to registers and its products that use them; products form groups that are waited for in order.
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keeps what is read and written of an accumulator on the right side of what waits for it.
template <int N> __device__ __forceinline__ void pin(float (&c)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(c[i])::"memory");
}

#define F4(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define F16(i) F4(i), F4(i + 4), F4(i + 8), F4(i + 12)
#define R16_0 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define R16_1 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define R16_2 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define R16_3 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

// c [64, N] = (accumulate ? c : 0) + A [64, 16] · B [16, N]; A from shared memory or as four registers of a thread, B from shared
// memory; A_ROWS, B_ROWS: the operand's k runs down its tile.
template <int N, int A_ROWS = 0, int B_ROWS = 0> struct Product;
#define PRODUCT(N, LIST, FLOATS, A0, A1, A2, A3, B, P4, P5)                                                                     \
    template <int A_ROWS, int B_ROWS> struct Product<N, A_ROWS, B_ROWS> {                                                       \
        static __device__ __forceinline__ void run(float (&c)[N / 2], u64 a, u64 b, bool accumulate) {                          \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " A2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." ACT_NAME  \
                         "." ACT_NAME " {" LIST "}, " A0 ", " A1 ", p, 1, 1, " A3 ", " B ";\n}"                                 \
                         : FLOATS : "l"(a), "l"(b), "r"((int)accumulate), "n"(A_ROWS), "n"(B_ROWS));                            \
        }                                                                                                                       \
        static __device__ __forceinline__ void run(float (&c)[N / 2], const u32 (&a)[4], u64 b, bool accumulate) {              \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P4 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." ACT_NAME  \
                         "." ACT_NAME " {" LIST "}, {" A0 ", " A1 ", " A2 ", " A3 "}, " B ", p, 1, 1, " P5 ";\n}"               \
                         : FLOATS : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)accumulate), "n"(B_ROWS));     \
        }                                                                                                                       \
    };
#define R16_4 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define R16_5 ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define R16_6 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111"
#define R16_7 ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define LIST32 F16(0), F16(16)
#define LIST48 F16(0), F16(16), F16(32)
#define LIST64 F16(0), F16(16), F16(32), F16(48)
#define LIST128 LIST64, F16(64), F16(80), F16(96), F16(112)
PRODUCT(64, R16_0 R16_1, LIST32, "%32", "%33", "%34", "%35", "%36", "%37", "%38")
PRODUCT(96, R16_0 R16_1 R16_2, LIST48, "%48", "%49", "%50", "%51", "%52", "%53", "%54")
PRODUCT(128, R16_0 R16_1 R16_2 R16_3, LIST64, "%64", "%65", "%66", "%67", "%68", "%69", "%70")
PRODUCT(256, R16_0 R16_1 R16_2 R16_3 R16_4 R16_5 R16_6 R16_7, LIST128, "%128", "%129", "%130", "%131", "%132", "%133", "%134")

// Threads that wait for each other by a number: `arrive` does not wait.
__device__ __forceinline__ void named_wait(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
template <int REGISTERS> __device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS> __device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// Work is drawn in order, so that whoever is done first takes the next; −1 when there is none. Who does it changes no result. The
// last block to find none leaves 0 for the next launch, which must not begin before: launches of a kernel are on one stream.
__device__ __forceinline__ int draw(u32 *ticket, u32 total, u32 num_drawers) {
    u32 mine = atomicAdd(ticket, 1u);
    if (mine == total + num_drawers - 1) *ticket = 0;
    return mine < total ? (int)mine : -1;
}

// Divides a block of three warpgroups. The first one keeps FEW registers and calls `produce`; the other two, which compute, take
// MANY, and to them this returns true.
template <int FEW, int MANY, class F> __device__ __forceinline__ bool divide_block(F produce) {
    if (threadIdx.x < 128) {
        give_registers<FEW>();
        produce();
        return false;
    }
    take_registers<MANY>();
    return true;
}

// Waits until the rows of the next piece of work are there, which is returned; −1 when there is none.
__device__ __forceinline__ int next_work(u32 rows_full, u32 parity, const int &drawn) {
    barrier_wait(rows_full, parity);
    return uniform(drawn);
}
