/*
 * gquant.h: the C interface of libgquant.
 *
 * The library quantizes model weights to 4 and 8 bits with the bytes of bitsandbytes' CUDA backend, reads and
 * writes quantized safetensors models, and decodes them. This header is its whole interface and its manual.
 *
 * EXAMPLE: quantize a matrix to NF4 and decode it again.
 *
 *     #include <gquant.h>
 *     #include <stdio.h>
 *     #include <stdlib.h>
 *
 *     int main(void) {
 *         enum { ROWS = 128, COLS = 256, N = ROWS * COLS, BLOCKSIZE = 64 };
 *         static float weight[N], restored[N], absmax[N / BLOCKSIZE];
 *         static unsigned char packed[N / 2];
 *         for (int i = 0; i < N; i++) weight[i] = (float)rand() / (float)RAND_MAX - 0.5f;
 *
 *         gq_status status = gq_quantize_nf4(GQ_ADDR(weight), GQ_F32, N, BLOCKSIZE, GQ_ADDR(absmax), N / BLOCKSIZE,
 *                                            GQ_ADDR(packed), sizeof packed, NULL);
 *         if (status != GQ_OK) {
 *             fprintf(stderr, "%s\n", gq_last_error());
 *             return 1;
 *         }
 *
 *         int64_t shape[2] = {ROWS, COLS};
 *         gq_state_desc desc = GQ_STATE_DESC_INIT;
 *         desc.format = GQ_FORMAT_NF4;
 *         desc.dtype = GQ_F32;
 *         desc.blocksize = BLOCKSIZE;
 *         desc.shape = GQ_ADDR(shape);
 *         desc.ndim = 2;
 *         desc.parts.packed = GQ_ADDR(packed);
 *         desc.parts.packed_bytes = sizeof packed;
 *         desc.parts.absmax = GQ_ADDR(absmax);
 *         desc.parts.absmax_bytes = sizeof absmax;
 *         gq_state *state = NULL;
 *         status = gq_state_create(&desc, &state);
 *         if (status == GQ_OK) status = gq_dequantize(state, GQ_ADDR(restored), sizeof restored, GQ_F32, NULL);
 *         if (status != GQ_OK) fprintf(stderr, "%s\n", gq_last_error());
 *         else printf("%g became %g\n", weight[0], restored[0]);
 *         gq_state_free(state);
 *         return status != GQ_OK;
 *     }
 *
 * RULES that hold for every function
 *
 * - It returns a gq_status; GQ_OK is 0. After any other status gq_last_error() describes, for this thread, what was
 *   tried, on what, and what was wanted. The library never prints, aborts or exits.
 * - Out-parameters come last. On failure they are set to NULL or 0. Output buffers are untouched when an argument is refused,
 *   and unspecified when reading or writing a file fails.
 * - Buffers are addresses with sizes. The library checks sizes, never frees a caller's buffer, and keeps none after the
 *   call unless the function says "borrows". A buffer of 0 bytes may be NULL. Buffers of float32 and int64 are aligned to
 *   their elements; weights, codes and bytes need not be.
 * - Handles (gq_state, gq_model, gq_job) are made by the library. A handle that was freed or never made gives
 *   GQ_ERROR_INVALID_HANDLE, NULL GQ_ERROR_INVALID_ARGUMENT, and a number that a list does not have GQ_ERROR_NOT_FOUND. Every …_free accepts NULL.
 * - Structs of options start with struct_size, which GQ_…_INIT sets. A caller built with an older, shorter struct gets the
 *   defaults for what it does not know; bytes behind what the library knows must be zero.
 * - Any function may be called from any thread, several may run on one handle at the same time, and freeing a handle waits
 *   for the calls that use it.
 * - A process that was forked after the library was loaded gets GQ_ERROR_FORKED: start children with spawn or exec.
 * - Statuses, dtypes, formats and all other numbers below never change their meaning.
 */
#ifndef GQUANT_H
#define GQUANT_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define GQ_API __attribute__((visibility("default")))
#else
#define GQ_API
#endif

/* ---- statuses ------------------------------------------------------------------------------------------------ */

typedef int32_t gq_status;

enum {
    GQ_OK = 0,
    GQ_ERROR_INVALID_ARGUMENT = 1, /* an argument is NULL, out of range, of the wrong size, or fits no other */
    GQ_ERROR_INVALID_HANDLE = 2,   /* a handle was freed or never made */
    GQ_ERROR_NOT_FOUND = 3,        /* no such file, tensor or layer */
    GQ_ERROR_IO = 4,               /* the system refused to read or write */
    GQ_ERROR_BAD_FILE = 5,         /* a file's content breaks the rules of its format */
    GQ_ERROR_UNSUPPORTED = 6,      /* valid, but not something this build or device can do */
    GQ_ERROR_OUT_OF_MEMORY = 7,    /* memory of the host or of a device */
    GQ_ERROR_CANCELLED = 8,        /* the job was cancelled */
    GQ_ERROR_FAILED = 9,           /* a job ran and found what it looked for: see its result */
    GQ_ERROR_DEVICE = 10,          /* the driver reported an error; the message has its text */
    GQ_ERROR_FORKED = 11,          /* this process was forked after the library was loaded */
    GQ_ERROR_INTERNAL = 12         /* a defect of the library; after it every call fails with this status */
};

/* The name of a status, such as "GQ_ERROR_IO"; "GQ_ERROR_UNKNOWN" for other numbers. Static text. */
GQ_API const char *gq_status_name(gq_status status);

/* What went wrong in this thread's last call that failed; "" if none did. Valid until this thread's next call. */
GQ_API const char *gq_last_error(void);

/* ---- the library --------------------------------------------------------------------------------------------- */

/* Version of the library, such as "0.1.0". Static text. */
GQ_API const char *gq_version(void);

/* Version of this interface. It grows by 1 when something is added; GQ_ABI_VERSION is this header's. */
#define GQ_ABI_VERSION 4
GQ_API int32_t gq_abi_version(void);

/* How the library was built and what it runs on, as JSON: version, go, cpu level, and the CUDA architectures that it has kernels
 * for (none in a build without CUDA). Does not touch a device. The text belongs to the library and stays valid. */
GQ_API const char *gq_build_info(void);

/* ---- addresses, dtypes, where to run ----------------------------------------------------------------------------- */

/* The address of a buffer in host memory, or in a device's memory (a CUdeviceptr). Where a function runs on a device, all its gq_addr
 * are device memory, unless its comment says otherwise; with GQUANT_CHECK=1 in the environment each is checked to be. */
typedef uint64_t gq_addr;
#define GQ_ADDR(pointer) ((gq_addr)(uintptr_t)(pointer))

/* A buffer with its size. */
typedef struct gq_buffer {
    gq_addr address;
    uint64_t bytes;
} gq_buffer;

/* The element types of safetensors. */
typedef int32_t gq_dtype;
enum {
    GQ_BOOL = 1, GQ_F4 = 2, GQ_F6_E2M3 = 3, GQ_F6_E3M2 = 4, GQ_U8 = 5, GQ_I8 = 6, GQ_F8_E5M2 = 7, GQ_F8_E4M3 = 8,
    GQ_F8_E8M0 = 9, GQ_F8_E4M3FNUZ = 10, GQ_F8_E5M2FNUZ = 11, GQ_I16 = 12, GQ_U16 = 13, GQ_F16 = 14, GQ_BF16 = 15,
    GQ_I32 = 16, GQ_U32 = 17, GQ_F32 = 18, GQ_C64 = 19, GQ_F64 = 20, GQ_I64 = 21, GQ_U64 = 22
};

/* Where a function runs. NULL stands for the CPU with all cores. On a device a function only puts work on the stream, in the
 * device's primary context, which torch and the CUDA runtime use too: it neither waits nor allocates, and after
 * gq_device_prepare it can be captured in a graph. Functions that read files are the exception: they return when the bytes
 * are there. */
#define GQ_CPU (-1)
typedef struct gq_exec {
    uint32_t struct_size;
    int32_t device;           /* GQ_CPU, or the ordinal of a CUDA device */
    uint64_t stream;          /* a CUstream; 0 is the legacy default stream */
    gq_addr workspace;        /* device memory for functions that ask for some */
    uint64_t workspace_bytes;
    int32_t threads;          /* on the CPU, or that read files for a device; 0 = all cores, for a device at most 16 */
    uint32_t flags;           /* GQ_EXEC_… */
} gq_exec;
#define GQ_EXEC_INIT {sizeof(gq_exec), GQ_CPU, 0, 0, 0, 0, 0}

/* For gq_linear on a device; others ignore it. A promise that nothing on the stream is still to write the state's parts: the stream was idle
 * after they were last written, or gq_linear was called on it since then (in a graph: the graph does not write them, or called it since).
 * From Hopper on gq_linear then reads them while the kernel before it ends, and is 1 µs faster. */
enum { GQ_EXEC_SETTLED = 1 };

/* ---- devices ------------------------------------------------------------------------------------------------------ */

/* The number of CUDA devices; 0 without a driver or a device, or in a build without CUDA, which is no error. */
GQ_API gq_status gq_device_count(int32_t *count);

typedef struct gq_device_info {
    uint32_t struct_size;
    int32_t major, minor;    /* compute capability: 9 and 0 for an H100 */
    int32_t multiprocessors;
    int32_t driver_version;  /* the CUDA version that the driver supports: 13000 for 13.0 */
    uint32_t reserved;
    uint64_t memory_bytes;   /* in all */
    char name[256];
} gq_device_info;
#define GQ_DEVICE_INFO_INIT {sizeof(gq_device_info), 0, 0, 0, 0, 0, 0, {0}}

/* Describes a device. info->struct_size must be set. NOT_FOUND if there is no such device; UNSUPPORTED if there is none at all, with
 * the reason. */
GQ_API gq_status gq_device_get_info(int32_t device, gq_device_info *info);

/* Loads the kernels into a device, which the first call that uses it does otherwise, but cannot while a graph is captured.
 * UNSUPPORTED says what is missing: a driver, a newer driver, kernels for the device's architecture. */
GQ_API gq_status gq_device_prepare(int32_t device);

/* ---- formats ------------------------------------------------------------------------------------------------------ */

/* How numbers are stored. */
typedef int32_t gq_format;
enum {
    GQ_FORMAT_NF4 = 1,       /* bitsandbytes NF4: 4 bits, absmax per block */
    GQ_FORMAT_FP4 = 2,       /* bitsandbytes FP4 */
    GQ_FORMAT_INT8 = 3,      /* LLM.int8: one absmax ("SCB") per row */
    GQ_FORMAT_BLOCKWISE8 = 4 /* 8-bit codes into a table of 256 values, absmax per block */
};

/* The number of formats, which are numbered from 1. */
GQ_API gq_status gq_format_count(int32_t *count);

typedef struct gq_format_info {
    uint32_t struct_size;
    gq_format format;
    const char *name;      /* "nf4"; static text */
    int32_t bits;          /* of a code */
    int32_t codebook_size; /* entries of the table of values: 16, 256, or 0 */
} gq_format_info;
#define GQ_FORMAT_INFO_INIT {sizeof(gq_format_info), 0, NULL, 0, 0}

/* Describes a format. info->struct_size must be set. INVALID_ARGUMENT for an unknown format. */
GQ_API gq_status gq_format_get_info(gq_format format, gq_format_info *info);

/* The format with a name such as "nf4". NOT_FOUND if there is none. */
GQ_API gq_status gq_format_by_name(const char *name, gq_format *format);

/* ---- flat kernels -------------------------------------------------------------------------------------------------- */

/* gq_quantize_nf4 and gq_quantize_fp4 quantize n elements in blocks, in flat order.
 *
 *   src      n elements of dtype GQ_F32, GQ_F16 or GQ_BF16, at any alignment
 *   absmax   float32, one per block: absmax_count = ceil(n / blocksize)
 *   packed   packed_bytes = ceil(n / 2); element 2i is in the high nibble of byte i
 *
 * blocksize is 32, 64, 128, … or 4096. n may be 0. NaN and Inf are quantized as bitsandbytes does; nothing counts them.
 * Returns INVALID_ARGUMENT for NULL buffers, sizes that differ from the above and other dtypes and blocksizes. */
GQ_API gq_status gq_quantize_nf4(gq_addr src, gq_dtype dtype, int64_t n, int64_t blocksize, gq_addr absmax, int64_t absmax_count,
                                 gq_addr packed, size_t packed_bytes, const gq_exec *exec);
GQ_API gq_status gq_quantize_fp4(gq_addr src, gq_dtype dtype, int64_t n, int64_t blocksize, gq_addr absmax, int64_t absmax_count,
                                 gq_addr packed, size_t packed_bytes, const gq_exec *exec);

/* Quantizes n elements to 8 bits: for each the entry of a table that is nearest to element/absmax.
 *
 *   table    256 ascending float32 from -1 (or 0) to 1; 0 stands for bitsandbytes' signed dynamic map
 *   absmax   float32, ceil(n / blocksize)
 *   codes    n bytes
 */
GQ_API gq_status gq_quantize_blockwise(gq_addr src, gq_dtype dtype, int64_t n, int64_t blocksize, gq_addr table, gq_addr absmax,
                                       int64_t absmax_count, gq_addr codes, size_t codes_bytes, const gq_exec *exec);

/* Quantizes the rows of a matrix as LLM.int8 does: codes = round(x * 127 / absmax), ties to even, in float16, to which other dtypes
 * are rounded first.
 *
 *   src       rows * cols elements of dtype GQ_F32, GQ_F16 or GQ_BF16
 *   threshold above 0, elements of this magnitude or more are outliers: they do not count for absmax, and columns with
 *             one get code 0 in all rows
 *   absmax    rows float32
 *   codes     rows * cols int8
 *   outliers  cols bytes: 1 for a column with an outlier, else 0; 0 with 0 bytes if nobody asks. With a threshold on a device it is
 *             needed
 */
GQ_API gq_status gq_quantize_rows_int8(gq_addr src, gq_dtype dtype, int64_t rows, int64_t cols, float threshold, gq_addr absmax,
                                       int64_t absmax_count, gq_addr codes, size_t codes_bytes, gq_addr outliers,
                                       size_t outliers_bytes, const gq_exec *exec);

/* bitsandbytes' tables of 256 float32: "dynamic" (signed), "dynamic_unsigned", "linear", "linear_unsigned",
 * "fp8_e4m3" and "fp8_e5m2". count is 256. NOT_FOUND for other names. */
GQ_API gq_status gq_codebook(const char *name, float *table, int64_t count);

/* Packs n codes, one per byte (0…15), into ceil(n / 2) bytes, and back. order says which element of a pair is in the high
 * nibble. An odd n leaves the last nibble 0. INVALID_ARGUMENT if a code is above 15; a device takes its lower 4 bits. */
enum {
    GQ_HIGH_NIBBLE_FIRST = 0, /* bitsandbytes, NVFP4 */
    GQ_LOW_NIBBLE_FIRST = 1   /* comfy-kitchen's INT4 */
};
GQ_API gq_status gq_pack_4bit(gq_addr codes, int64_t n, int32_t order, gq_addr packed, size_t packed_bytes, const gq_exec *exec);
GQ_API gq_status gq_unpack_4bit(gq_addr packed, size_t packed_bytes, int32_t order, gq_addr codes, int64_t n, const gq_exec *exec);

/* ---- any format ---------------------------------------------------------------------------------------------------- */

/* The buffers of a quantized weight. What a format does not have is 0 with 0 bytes. */
typedef struct gq_parts {
    gq_addr packed; /* codes */
    uint64_t packed_bytes;
    gq_addr absmax; /* float32 per block (or row), or uint8 per block when nested */
    uint64_t absmax_bytes;
    gq_addr nested_absmax; /* float32 per 256 absmax */
    uint64_t nested_absmax_bytes;
    gq_addr nested_codebook; /* 256 float32; 0 = the signed dynamic map */
    uint64_t nested_codebook_bytes;
    gq_addr offset; /* one float32: the mean of absmax, when nested */
    uint64_t offset_bytes;
    gq_addr codebook; /* 16 or 256 float32: the table of values. BLOCKWISE8 computes with it (0 = the signed dynamic map); for NF4
                       * and FP4 it is the quant_map that files hold: written if there is room for it, never needed */
    uint64_t codebook_bytes;
} gq_parts;
#define GQ_PARTS_INIT {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}

typedef struct gq_quantize_options {
    uint32_t struct_size;
    int32_t nested;    /* 1: quantize absmax too (bitsandbytes' compress_statistics) */
    int64_t blocksize; /* elements per absmax; 0 = 64 */
} gq_quantize_options;
#define GQ_QUANTIZE_OPTIONS_INIT {sizeof(gq_quantize_options), 0, 0}

/* The sizes of the parts that a weight of this shape becomes: fills the …_bytes of *layout and sets its addresses to 0.
 * shape has ndim dimensions in host memory. options may be NULL. */
GQ_API gq_status gq_quantized_layout(gq_format format, const int64_t *shape, int32_t ndim, const gq_quantize_options *options,
                                     gq_parts *layout);

/* The workspace that gq_quantize needs on a device: nested statistics want a float32 per block and some more. 0 on the CPU. */
GQ_API gq_status gq_quantize_workspace_size(gq_format format, const int64_t *shape, int32_t ndim, const gq_quantize_options *options,
                                            int32_t device, uint64_t *bytes);

/* Quantizes a whole weight into the caller's buffers, whose sizes must be those of gq_quantized_layout. nonfinite, if not
 * NULL, receives the number of NaN and Inf elements (CPU only; -1 on a device). On a device exec->workspace has the bytes of
 * gq_quantize_workspace_size, at an address divisible by 16. */
GQ_API gq_status gq_quantize(gq_format format, gq_addr src, gq_dtype dtype, const int64_t *shape, int32_t ndim,
                             const gq_quantize_options *options, const gq_parts *parts, const gq_exec *exec, int64_t *nonfinite);

/* ---- states ---------------------------------------------------------------------------------------------------------- */

/* A quantized weight: what it was, and where its parts are. */
typedef struct gq_state gq_state;

typedef struct gq_state_desc {
    uint32_t struct_size;
    gq_format format;
    gq_dtype dtype;           /* of the weight before: GQ_F32, GQ_F16 or GQ_BF16 */
    int32_t ndim;
    gq_addr shape;            /* ndim int64 in host memory; copied */
    int64_t blocksize;        /* elements per absmax; for INT8 the row length */
    int64_t nested_blocksize; /* 256, or 0 if not nested */
    gq_parts parts;           /* on the host, or all on one device; codes at any address, statistics aligned to their elements */
    int32_t device;           /* GQ_CPU, or the device that holds the parts */
    uint32_t reserved;        /* 0 */
} gq_state_desc;
#define GQ_STATE_DESC_INIT {sizeof(gq_state_desc), 0, 0, 0, 0, 0, 0, GQ_PARTS_INIT, GQ_CPU, 0}

/* Makes a state that borrows the parts until gq_state_free: they must be valid during calls that use the state, and may change
 * between them. Functions that use the state run where its parts are: exec says the same device. */
GQ_API gq_status gq_state_create(const gq_state_desc *desc, gq_state **state);

/* Waits for calls that use the state, then ends it. The parts stay the caller's. */
GQ_API gq_status gq_state_free(gq_state *state);

/* Describes a state. desc->struct_size must be set; desc->shape is an address inside the state, valid until it is freed. */
GQ_API gq_status gq_state_get_desc(gq_state *state, gq_state_desc *desc);

/* bitsandbytes' JSON of a 4-bit state, the bytes of its quant_state tensor. Writes at most capacity bytes, with no NUL, and
 * always sets *length to the length of the whole text; with capacity 0, text may be NULL. For a nested state the offset is
 * read from host memory; UNSUPPORTED if it is on a device. */
GQ_API gq_status gq_state_json(gq_state *state, char *text, size_t capacity, size_t *length);

/* Decodes the whole weight: out holds its elements as dtype GQ_F32, GQ_F16 or GQ_BF16, out_bytes exactly. */
GQ_API gq_status gq_dequantize(gq_state *state, gq_addr out, size_t out_bytes, gq_dtype dtype, const gq_exec *exec);

/* Decodes count elements of the flat weight from element first on. */
GQ_API gq_status gq_dequantize_range(gq_state *state, int64_t first, int64_t count, gq_addr out, size_t out_bytes, gq_dtype dtype,
                                     const gq_exec *exec);

/* What gq_linear does on a device with m rows of x, and the workspace with which it is fastest; bytes or packed may be NULL.
 *
 * *packed is 1 where it multiplies with the packed weight (always so on the CPU). *bytes is then room for sums that are shared between
 * multiprocessors, often 0; with less it is slower. Where *packed is 0 the weight is decoded in slabs of rows, each 64 to 128 MiB of elements of
 * dtype or the whole weight if that is less, and 32 MiB (before Hopper 4 MiB) are cuBLASLt's own. gq_linear takes less, down to room for 128
 * rows (or all if there are fewer), and is slower then; what is more makes slabs larger, up to the whole weight.
 *
 * x, bias and y are taken to be aligned to 16 bytes: if they are not, gq_linear may decode where this says that it does not, and its
 * message says how much workspace it needs. exec's own workspace is not looked at. The first call that asks for the bytes where the weight is
 * decoded loads libcublasLt, which takes a while and allocates memory; afterwards gq_linear can be captured in a graph. UNSUPPORTED if it is not
 * there, as for gq_linear. */
GQ_API gq_status gq_linear_workspace_size(gq_state *state, int64_t m, gq_dtype dtype, const gq_exec *exec, uint64_t *bytes,
                                          int32_t *packed);

/* The linear layer y = x · Wᵀ + bias with the 4-bit weight W [n, k] of a state, packed as it is: x is [m, k], bias [n] or 0, y [m, n], all
 * contiguous, of one dtype, GQ_F32, GQ_F16 or GQ_BF16. Sums are float32 and have a fixed order, which on a device depends on whether the
 * workspace is as large as gq_linear_workspace_size says.
 *
 * CPU: a weight is its value times absmax in float32.
 * Device, GQ_F16 or GQ_BF16, blocksizes from 64 on, k a multiple of 64 and of the blocksize, x, the codes and absmax aligned to 16 bytes, Ampere or
 * newer, up to as many rows as a table says that was measured for the architecture (`gquant tune` makes one; GQUANT_TUNE in the
 * environment names another): the packed weight is multiplied with. With few rows weights are values times absmax in float32, the 16 values
 * rounded (NF4's by 0.0008 in GQ_BF16, 0.00008 in GQ_F16); with more, the product is rounded to dtype as well.
 * Device, all else: the weight is decoded to dtype, as by gq_dequantize, and cuBLASLt multiplies, without TF32; it may round a
 * sum to dtype before it adds the bias. The sums' order depends
 * on the size of the workspace and the alignment of addresses too. exec->workspace is at an address divisible by 16; see
 * gq_linear_workspace_size. libcublasLt.so.13 or .12 is found where the process has it already (torch brings one) or the system looks for
 * libraries, or where GQUANT_CUBLASLT in the environment says.
 *
 * INVALID_ARGUMENT if the workspace is too small, with the bytes that are needed, if the state has no 2 dimensions, or is on another
 * device than exec says. UNSUPPORTED if libcublasLt is needed and not there, or cannot do it, or x, y or bias is not aligned to its
 * elements: decode with gq_dequantize and multiply with what you have. */
GQ_API gq_status gq_linear(gq_state *state, gq_addr x, int64_t m, gq_dtype dtype, gq_addr bias, gq_addr y, const gq_exec *exec);

/* ---- models ------------------------------------------------------------------------------------------------------------ */

/* An opened safetensors model: a file, a shard index, or a folder. */
typedef struct gq_model gq_model;

typedef struct gq_load_options {
    uint32_t struct_size;
    int32_t device;      /* GQ_CPU: tensors are read when asked for; a device: all are read into its memory */
    const char *prefix;  /* only tensors whose names start with it, which is cut off; NULL = all */
    const char *include; /* only tensors and layers that match these globs, separated by commas; NULL = all */
} gq_load_options;
#define GQ_LOAD_OPTIONS_INIT {sizeof(gq_load_options), GQ_CPU, NULL, NULL}

/* Opens a model and finds its quantized layers, in bitsandbytes', GPTQModel's and LLM.int8's naming. On the CPU it reads headers and
 * states, no weights; with a device it reads everything into one allocation of device memory, which gq_free_model releases: gq_tensor_info
 * and gq_model_state then give addresses there. NOT_FOUND if path does not exist, BAD_FILE if a file or layer breaks the rules,
 * IO, OUT_OF_MEMORY. options may be NULL. */
GQ_API gq_status gq_load_model(const char *path, const gq_load_options *options, gq_model **model);

/* Waits for calls that use the model, then closes its files. States made from it must be freed before. */
GQ_API gq_status gq_free_model(gq_model *model);

/* A tensor of the model as stored. Texts and arrays belong to the model and stay valid until it is freed. */
typedef struct gq_tensor_info {
    uint32_t struct_size;
    gq_dtype dtype;
    const char *name; /* as in the file, less the prefix of the options */
    const int64_t *shape;
    int32_t ndim;
    uint32_t reserved;
    uint64_t bytes;
    const char *file;    /* path of the file that holds it */
    uint64_t file_offset; /* of its first byte */
    gq_addr address;      /* of its bytes in the memory of the device that the model was loaded to; else 0 */
} gq_tensor_info;
#define GQ_TENSOR_INFO_INIT {sizeof(gq_tensor_info), 0, NULL, NULL, 0, 0, 0, NULL, 0, 0}

/* Tensors that belong to no quantized layer, by number and by name (NOT_FOUND if there is none). */
GQ_API gq_status gq_model_tensor_count(gq_model *model, int64_t *count);
GQ_API gq_status gq_model_tensor(gq_model *model, int64_t index, gq_tensor_info *info);
GQ_API gq_status gq_model_find_tensor(gq_model *model, const char *name, int64_t *index);

/* Reads bytes first … first+out_bytes of a tensor into memory of the host, or of exec's device. */
GQ_API gq_status gq_model_read(gq_model *model, int64_t index, uint64_t first, gq_addr out, size_t out_bytes, const gq_exec *exec);

/* A quantized layer. */
typedef struct gq_layer_info {
    uint32_t struct_size;
    gq_format format;
    const char *name; /* of the weight it stands for, such as "blocks.0.attn.q.weight", less the prefix */
    const char *convention; /* "bitsandbytes" or "gptqmodel" */
    const int64_t *shape;
    int32_t ndim;
    gq_dtype dtype;   /* before it was quantized */
    int64_t blocksize;
    int64_t nested_blocksize; /* 0 if not nested */
    gq_parts sizes;   /* the bytes of its parts; addresses are 0 */
} gq_layer_info;
#define GQ_LAYER_INFO_INIT {sizeof(gq_layer_info), 0, NULL, NULL, NULL, 0, 0, 0, 0, GQ_PARTS_INIT}

GQ_API gq_status gq_model_layer_count(gq_model *model, int64_t *count);
GQ_API gq_status gq_model_layer(gq_model *model, int64_t index, gq_layer_info *info);
GQ_API gq_status gq_model_find_layer(gq_model *model, const char *name, int64_t *index);

/* Reads the parts of a layer into the caller's buffers, each of exactly the size in gq_layer_info.sizes; parts whose address is 0
 * are skipped. */
GQ_API gq_status gq_model_read_layer(gq_model *model, int64_t index, const gq_parts *parts, const gq_exec *exec);

/* Reads many tensors and layers at once, which is the fast way to a device: tensors[i] takes tensor i, layers[i] the parts of layer i,
 * for all tensors and layers of the model. What has the address 0 is skipped; other sizes must be those of gq_tensor_info and
 * gq_layer_info. Work that exec's stream has before the call is done before memory is written. */
GQ_API gq_status gq_model_read_all(gq_model *model, const gq_buffer *tensors, int64_t tensor_count, const gq_parts *layers,
                                   int64_t layer_count, const gq_exec *exec);

/* Makes a state of a layer, with memory of its own that gq_state_free releases, or over the memory of a model that was loaded to
 * a device. */
GQ_API gq_status gq_model_state(gq_model *model, int64_t index, gq_state **state);

/* Decodes rows first_row … first_row+rows of a layer (the first dimension; 1-D layers have rows of one element) straight from the
 * file, on the CPU. out_bytes is rows times the row length times the size of dtype. */
GQ_API gq_status gq_model_dequantize(gq_model *model, int64_t index, int64_t first_row, int64_t rows, gq_addr out, size_t out_bytes,
                                     gq_dtype dtype, const gq_exec *exec);

/* Header metadata, by number; texts are valid until the model is freed. */
GQ_API gq_status gq_model_metadata_count(gq_model *model, int64_t *count);
GQ_API gq_status gq_model_metadata(gq_model *model, int64_t index, const char **key, const char **value);

/* ---- work on whole files ---------------------------------------------------------------------------------------------- */

/* A job runs on threads of the library. Requests and results are JSON; the fields of a request are the flags of the command of
 * the same name (docs/requests.md lists them), and unknown fields are INVALID_ARGUMENT. */
typedef struct gq_job gq_job;

GQ_API gq_status gq_convert(const char *request, gq_job **job);    /* {"source", "output", "mode", "block_size", …} */
GQ_API gq_status gq_dequantize_model(const char *request, gq_job **job); /* {"source", "output", "dtype", …} */
GQ_API gq_status gq_verify(const char *request, gq_job **job);     /* {"source", "sha256", "strict", "threads"} */
GQ_API gq_status gq_diff(const char *request, gq_job **job);       /* {"a", "b", "threads"} */
GQ_API gq_status gq_inspect(const char *request, gq_job **job);    /* {"source"} */

typedef struct gq_job_progress {
    uint32_t struct_size;
    int32_t finished;     /* 1 when gq_job_wait will not wait */
    uint64_t done_bytes;  /* of the source */
    uint64_t total_bytes; /* 0 while unknown */
} gq_job_progress;
#define GQ_JOB_PROGRESS_INIT {sizeof(gq_job_progress), 0, 0, 0}

GQ_API gq_status gq_job_poll(gq_job *job, gq_job_progress *progress);

/* Asks the job to stop; it ends with CANCELLED unless it was done. */
GQ_API gq_status gq_job_cancel(gq_job *job);

/* Waits for the end, at most timeout_ms milliseconds (-1 = for ever), and gives the job's status: OK, or what went wrong with
 * gq_last_error. *finished is 0 if the time ran out, and then the status is OK. */
GQ_API gq_status gq_job_wait(gq_job *job, int64_t timeout_ms, int32_t *finished);

/* The JSON result of a finished job, as --json prints it; NUL-terminated, valid until the job is freed. "" before. */
GQ_API gq_status gq_job_result(gq_job *job, const char **json);

/* Cancels the job if it runs, waits for it, and ends it. */
GQ_API gq_status gq_job_free(gq_job *job);

#ifdef __cplusplus
}
#endif

#endif
