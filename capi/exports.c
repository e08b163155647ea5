// The functions of the header. Each clears what it returns through pointers and, in a forked child, stops there: entering Go
// can hang in a process where Go's other threads are gone. The work is in the Go function of the same name with go_
// before it.

#include <stdio.h>

#include "_cgo_export.h"

static gq_status refuse(const char *function) {
    char message[256];
    snprintf(message, sizeof message,
             "%s: this process was forked after libgquant was loaded, which the Go runtime does not survive; start it with "
             "spawn, forkserver or exec",
             function);
    gq_guard_set_error(message);
    return GQ_ERROR_FORKED;
}

// Go keeps both texts when it starts, which may be after the first call.
const char *gq_version(void) { return gq_guard_version || gq_guard_forked ? gq_guard_version : go_gq_version(); }

const char *gq_build_info(void) { return gq_guard_build_info || gq_guard_forked ? gq_guard_build_info : go_gq_build_info(); }

gq_status gq_device_count(int32_t *count) {
    if (count) *count = 0;
    return gq_guard_forked ? refuse("gq_device_count") : go_gq_device_count(count);
}

gq_status gq_device_get_info(int32_t device, gq_device_info *info) {
    return gq_guard_forked ? refuse("gq_device_get_info") : go_gq_device_get_info(device, info);
}

gq_status gq_device_prepare(int32_t device) {
    return gq_guard_forked ? refuse("gq_device_prepare") : go_gq_device_prepare(device);
}

gq_status gq_format_count(int32_t *count) {
    if (count) *count = 0;
    return gq_guard_forked ? refuse("gq_format_count") : go_gq_format_count(count);
}

gq_status gq_format_get_info(gq_format format, gq_format_info *info) {
    return gq_guard_forked ? refuse("gq_format_get_info") : go_gq_format_get_info(format, info);
}

gq_status gq_format_by_name(const char *name, gq_format *format) {
    if (format) *format = 0;
    return gq_guard_forked ? refuse("gq_format_by_name") : go_gq_format_by_name(name, format);
}

gq_status gq_quantize_nf4(gq_addr src, gq_dtype dtype, int64_t n, int64_t blocksize, gq_addr absmax, int64_t absmax_count,
                          gq_addr packed, size_t packed_bytes, const gq_exec *exec) {
    return gq_guard_forked ? refuse("gq_quantize_nf4") : go_gq_quantize_nf4(src, dtype, n, blocksize, absmax, absmax_count, packed, packed_bytes, exec);
}

gq_status gq_quantize_fp4(gq_addr src, gq_dtype dtype, int64_t n, int64_t blocksize, gq_addr absmax, int64_t absmax_count,
                          gq_addr packed, size_t packed_bytes, const gq_exec *exec) {
    return gq_guard_forked ? refuse("gq_quantize_fp4") : go_gq_quantize_fp4(src, dtype, n, blocksize, absmax, absmax_count, packed, packed_bytes, exec);
}

gq_status gq_quantize_blockwise(gq_addr src, gq_dtype dtype, int64_t n, int64_t blocksize, gq_addr table, gq_addr absmax,
                                int64_t absmax_count, gq_addr codes, size_t codes_bytes, const gq_exec *exec) {
    return gq_guard_forked ? refuse("gq_quantize_blockwise") : go_gq_quantize_blockwise(src, dtype, n, blocksize, table, absmax, absmax_count, codes, codes_bytes, exec);
}

gq_status gq_quantize_rows_int8(gq_addr src, gq_dtype dtype, int64_t rows, int64_t cols, float threshold, gq_addr absmax,
                                int64_t absmax_count, gq_addr codes, size_t codes_bytes, gq_addr outliers, size_t outliers_bytes,
                                const gq_exec *exec) {
    return gq_guard_forked ? refuse("gq_quantize_rows_int8") : go_gq_quantize_rows_int8(src, dtype, rows, cols, threshold, absmax, absmax_count, codes, codes_bytes, outliers, outliers_bytes, exec);
}

gq_status gq_codebook(const char *name, float *table, int64_t count) {
    return gq_guard_forked ? refuse("gq_codebook") : go_gq_codebook(name, table, count);
}

gq_status gq_pack_4bit(gq_addr codes, int64_t n, int32_t order, gq_addr packed, size_t packed_bytes, const gq_exec *exec) {
    return gq_guard_forked ? refuse("gq_pack_4bit") : go_gq_pack_4bit(codes, n, order, packed, packed_bytes, exec);
}

gq_status gq_unpack_4bit(gq_addr packed, size_t packed_bytes, int32_t order, gq_addr codes, int64_t n, const gq_exec *exec) {
    return gq_guard_forked ? refuse("gq_unpack_4bit") : go_gq_unpack_4bit(packed, packed_bytes, order, codes, n, exec);
}

gq_status gq_quantized_layout(gq_format format, const int64_t *shape, int32_t ndim, const gq_quantize_options *options,
                              gq_parts *layout) {
    return gq_guard_forked ? refuse("gq_quantized_layout") : go_gq_quantized_layout(format, shape, ndim, options, layout);
}

gq_status gq_quantize_workspace_size(gq_format format, const int64_t *shape, int32_t ndim, const gq_quantize_options *options,
                                     int32_t device, uint64_t *bytes) {
    if (bytes) *bytes = 0;
    return gq_guard_forked ? refuse("gq_quantize_workspace_size") : go_gq_quantize_workspace_size(format, shape, ndim, options, device, bytes);
}

gq_status gq_quantize(gq_format format, gq_addr src, gq_dtype dtype, const int64_t *shape, int32_t ndim,
                      const gq_quantize_options *options, const gq_parts *parts, const gq_exec *exec, int64_t *nonfinite) {
    if (nonfinite) *nonfinite = 0;
    return gq_guard_forked ? refuse("gq_quantize") : go_gq_quantize(format, src, dtype, shape, ndim, options, parts, exec, nonfinite);
}

gq_status gq_state_create(const gq_state_desc *desc, gq_state **state) {
    if (state) *state = NULL;
    return gq_guard_forked ? refuse("gq_state_create") : go_gq_state_create(desc, state);
}

gq_status gq_state_free(gq_state *state) {
    return gq_guard_forked ? refuse("gq_state_free") : go_gq_state_free(state);
}

gq_status gq_state_get_desc(gq_state *state, gq_state_desc *desc) {
    return gq_guard_forked ? refuse("gq_state_get_desc") : go_gq_state_get_desc(state, desc);
}

gq_status gq_state_json(gq_state *state, char *text, size_t capacity, size_t *length) {
    if (length) *length = 0;
    return gq_guard_forked ? refuse("gq_state_json") : go_gq_state_json(state, text, capacity, length);
}

gq_status gq_dequantize(gq_state *state, gq_addr out, size_t out_bytes, gq_dtype dtype, const gq_exec *exec) {
    return gq_guard_forked ? refuse("gq_dequantize") : go_gq_dequantize(state, out, out_bytes, dtype, exec);
}

gq_status gq_dequantize_range(gq_state *state, int64_t first, int64_t count, gq_addr out, size_t out_bytes, gq_dtype dtype,
                              const gq_exec *exec) {
    return gq_guard_forked ? refuse("gq_dequantize_range") : go_gq_dequantize_range(state, first, count, out, out_bytes, dtype, exec);
}

gq_status gq_linear_workspace_size(gq_state *state, int64_t m, gq_dtype dtype, const gq_exec *exec, uint64_t *bytes, int32_t *packed) {
    if (bytes) *bytes = 0;
    if (packed) *packed = 0;
    return gq_guard_forked ? refuse("gq_linear_workspace_size") : go_gq_linear_workspace_size(state, m, dtype, exec, bytes, packed);
}

gq_status gq_linear(gq_state *state, gq_addr x, int64_t m, gq_dtype dtype, gq_addr bias, gq_addr y, const gq_exec *exec) {
    return gq_guard_forked ? refuse("gq_linear") : go_gq_linear(state, x, m, dtype, bias, y, exec);
}

gq_status gq_load_model(const char *path, const gq_load_options *options, gq_model **model) {
    if (model) *model = NULL;
    return gq_guard_forked ? refuse("gq_load_model") : go_gq_load_model(path, options, model);
}

gq_status gq_free_model(gq_model *model) {
    return gq_guard_forked ? refuse("gq_free_model") : go_gq_free_model(model);
}

gq_status gq_model_tensor_count(gq_model *model, int64_t *count) {
    if (count) *count = 0;
    return gq_guard_forked ? refuse("gq_model_tensor_count") : go_gq_model_tensor_count(model, count);
}

gq_status gq_model_tensor(gq_model *model, int64_t index, gq_tensor_info *info) {
    return gq_guard_forked ? refuse("gq_model_tensor") : go_gq_model_tensor(model, index, info);
}

gq_status gq_model_find_tensor(gq_model *model, const char *name, int64_t *index) {
    if (index) *index = 0;
    return gq_guard_forked ? refuse("gq_model_find_tensor") : go_gq_model_find_tensor(model, name, index);
}

gq_status gq_model_read(gq_model *model, int64_t index, uint64_t first, gq_addr out, size_t out_bytes, const gq_exec *exec) {
    return gq_guard_forked ? refuse("gq_model_read") : go_gq_model_read(model, index, first, out, out_bytes, exec);
}

gq_status gq_model_layer_count(gq_model *model, int64_t *count) {
    if (count) *count = 0;
    return gq_guard_forked ? refuse("gq_model_layer_count") : go_gq_model_layer_count(model, count);
}

gq_status gq_model_layer(gq_model *model, int64_t index, gq_layer_info *info) {
    return gq_guard_forked ? refuse("gq_model_layer") : go_gq_model_layer(model, index, info);
}

gq_status gq_model_find_layer(gq_model *model, const char *name, int64_t *index) {
    if (index) *index = 0;
    return gq_guard_forked ? refuse("gq_model_find_layer") : go_gq_model_find_layer(model, name, index);
}

gq_status gq_model_read_layer(gq_model *model, int64_t index, const gq_parts *parts, const gq_exec *exec) {
    return gq_guard_forked ? refuse("gq_model_read_layer") : go_gq_model_read_layer(model, index, parts, exec);
}

gq_status gq_model_read_all(gq_model *model, const gq_buffer *tensors, int64_t tensor_count, const gq_parts *layers,
                            int64_t layer_count, const gq_exec *exec) {
    return gq_guard_forked ? refuse("gq_model_read_all") : go_gq_model_read_all(model, tensors, tensor_count, layers, layer_count, exec);
}

gq_status gq_model_state(gq_model *model, int64_t index, gq_state **state) {
    if (state) *state = NULL;
    return gq_guard_forked ? refuse("gq_model_state") : go_gq_model_state(model, index, state);
}

gq_status gq_model_dequantize(gq_model *model, int64_t index, int64_t first_row, int64_t rows, gq_addr out, size_t out_bytes,
                              gq_dtype dtype, const gq_exec *exec) {
    return gq_guard_forked ? refuse("gq_model_dequantize") : go_gq_model_dequantize(model, index, first_row, rows, out, out_bytes, dtype, exec);
}

gq_status gq_model_metadata_count(gq_model *model, int64_t *count) {
    if (count) *count = 0;
    return gq_guard_forked ? refuse("gq_model_metadata_count") : go_gq_model_metadata_count(model, count);
}

gq_status gq_model_metadata(gq_model *model, int64_t index, const char **key, const char **value) {
    if (key) *key = NULL;
    if (value) *value = NULL;
    return gq_guard_forked ? refuse("gq_model_metadata") : go_gq_model_metadata(model, index, key, value);
}

gq_status gq_convert(const char *request, gq_job **job) {
    if (job) *job = NULL;
    return gq_guard_forked ? refuse("gq_convert") : go_gq_convert(request, job);
}

gq_status gq_dequantize_model(const char *request, gq_job **job) {
    if (job) *job = NULL;
    return gq_guard_forked ? refuse("gq_dequantize_model") : go_gq_dequantize_model(request, job);
}

gq_status gq_verify(const char *request, gq_job **job) {
    if (job) *job = NULL;
    return gq_guard_forked ? refuse("gq_verify") : go_gq_verify(request, job);
}

gq_status gq_diff(const char *request, gq_job **job) {
    if (job) *job = NULL;
    return gq_guard_forked ? refuse("gq_diff") : go_gq_diff(request, job);
}

gq_status gq_inspect(const char *request, gq_job **job) {
    if (job) *job = NULL;
    return gq_guard_forked ? refuse("gq_inspect") : go_gq_inspect(request, job);
}

gq_status gq_job_poll(gq_job *job, gq_job_progress *progress) {
    return gq_guard_forked ? refuse("gq_job_poll") : go_gq_job_poll(job, progress);
}

gq_status gq_job_cancel(gq_job *job) {
    return gq_guard_forked ? refuse("gq_job_cancel") : go_gq_job_cancel(job);
}

gq_status gq_job_wait(gq_job *job, int64_t timeout_ms, int32_t *finished) {
    if (finished) *finished = 0;
    return gq_guard_forked ? refuse("gq_job_wait") : go_gq_job_wait(job, timeout_ms, finished);
}

gq_status gq_job_result(gq_job *job, const char **json) {
    if (json) *json = NULL;
    return gq_guard_forked ? refuse("gq_job_result") : go_gq_job_result(job, json);
}

gq_status gq_job_free(gq_job *job) {
    return gq_guard_forked ? refuse("gq_job_free") : go_gq_job_free(job);
}
