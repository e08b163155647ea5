// What the kernels of linear layers share: instructions, and the table that decodes 4-bit weights to the 16-row operand of an mma.
#pragma once

#include "common.cuh"

// ---- instructions

static DEVICE void mma(BF16, float d[4], const u32 a[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

static DEVICE void mma(F16, float d[4], const u32 a[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

static DEVICE u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }

// Of what no longer changes, so that the compiler may load it whenever it likes.
static DEVICE u32 load_constant_shared(u32 address) {
    u32 r;
    asm("ld.shared.u32 %0, [%1];" : "=r"(r) : "r"(address));
    return r;
}

static DEVICE void copy16(u32 to, const void *from) { asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory"); }
// 4, 8 or 16 bytes that other warps will read the neighbours of.
template <int BYTES> static DEVICE void copy(u32 to, const void *from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(BYTES) : "memory");
}
static DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most PENDING of this thread's groups of copies are under way.
template <int PENDING> static DEVICE void wait_for_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

// ---- the kernel before this one on the stream, under whose end a kernel starts from Hopper on. A kernel lets the next one start when the one
// before has ended, and no earlier: all that may still be at work when a kernel starts is then the one kernel before it. So it need not
// wait for weights that are known to have been written before that one (settled).

#if __CUDA_ARCH__ >= 900
static DEVICE bool is_settled(const gq_linear_args &a) { return a.settled; }
static DEVICE void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;"); }
static DEVICE void wait_for_kernel_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
// Into L2, where a late write will be seen.
static DEVICE void prefetch(const void *p, u32 bytes) { asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes)); }
#else
static DEVICE bool is_settled(const gq_linear_args &) { return true; }
static DEVICE void let_next_kernel_start() {}
static DEVICE void wait_for_kernel_before() {}
static DEVICE void prefetch(const void *, u32) {}
#endif

// ---- the table: at byte · ENTRY + lane · 4 is the pair of values of a byte. ENTRY is 128 or 256; with 256 one PRMT makes an address.

// In the table values are times a factor, for which the scales make up. FP4's are small multiples of 1/192: 1.5 times a value needs no rounding.
// For NF4 it is the factor for which rounding to the dtype changes normal weights least: by 0.00078 of them in bf16, instead of 0.00136
// without (found by trying 1 … 2 in steps of 1/8192).
static DEVICE float table_factor(BF16, int format) { return format == GQ_FP4 ? 1.5f : 1.436767578125f; }
static DEVICE float table_factor(F16, int format) { return format == GQ_FP4 ? 1.5f : 1.3662109375f; }

// Fills it with this and other threads of the CTA, of which it is number `thread`.
template <class T, int ENTRY> static DEVICE void fill_table(u8 *table, int format, int thread, int threads) {
    const float *values = VALUES[format - GQ_NF4], factor = table_factor(T(), format);
    for (int b = thread; b < 256; b += threads) {
        const u32 pair = T::narrow2(values[b >> 4] * factor, values[b & 15] * factor); // the first of two is in the high nibble
        const uint4 four = make_uint4(pair, pair, pair, pair);
        // Each lane starts at another bank.
#pragma unroll
        for (int j = 0; j < 8; j++) *(uint4 *)(table + b * ENTRY + ((j + thread) & 7) * 16) = four;
    }
}

// The pair of byte BYTE of a word. lane_offset is lane · 4; table lies at the start of shared memory's 64 KiB, in whose address it is added.
template <int ENTRY, int BYTE> static DEVICE u32 pair(u32 table, u32 word, u32 lane_offset) {
    u32 offset;
    if (ENTRY == 256)
        asm("prmt.b32 %0, %1, %2, %3;" : "=r"(offset) : "r"(word), "r"(lane_offset), "n"(0x5504 | BYTE << 4)); // lane_offset, BYTE, 0, 0
    else
        offset = ((BYTE == 0 ? word << 7 : word >> (8 * BYTE - 7)) & 0x7f80) | lane_offset;
    return load_constant_shared(table + offset);
}

// The 16-row operand of an mma: bytes BYTE and BYTE + 1 of a word of row g and of one of row g + 8, which is 0 if it is not there.
template <int ENTRY, int BYTE> static DEVICE void operand(u32 a[4], u32 table, u32 p0, u32 p1, u32 lane_offset, bool both = true) {
    a[0] = pair<ENTRY, BYTE>(table, p0, lane_offset);
    a[1] = both ? pair<ENTRY, BYTE>(table, p1, lane_offset) : 0;
    a[2] = pair<ENTRY, BYTE + 1>(table, p0, lane_offset);
    a[3] = both ? pair<ENTRY, BYTE + 1>(table, p1, lane_offset) : 0;
}

// ---- scales

static DEVICE u32 multiply_add2(F16, u32 a, u32 b, u32 c) {
    u32 r;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}

static DEVICE u32 multiply_add2(BF16, u32 a, u32 b, u32 c) {
    u32 r;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}

// A float32 as two elements whose sum it is but for a few of its last bits, twice each.
template <class T> struct Scale {
    u32 high, low;
    DEVICE Scale(float scale) {
        high = T::narrow2(scale, scale);
        const float rest = scale - T::widen((u16)high);
        low = T::narrow2(rest, rest);
    }
    // The products of two elements, rounded once as if the scale were whole.
    DEVICE u32 times(u32 pair) const { return multiply_add2(T(), pair, high, multiply_add2(T(), pair, low, 0x80008000)); } // -0 changes no sum
};

// ---- nested statistics

// The absmax of a code, as in dequantizing: the product is bitsandbytes', the sum torch's.
static DEVICE float nested_absmax(float value, float absmax, float offset) { return mul_ftz(value, absmax) + offset; }
