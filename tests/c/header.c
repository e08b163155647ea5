/* The header needs nothing before it: CMakeLists.txt compiles this as C99, C11 and C++17 with all warnings as errors. */
#include <gquant.h>

/* Structs have no padding, so that a compiler cannot disagree about them, and these sizes for good: they may only grow. */
#define SIZE(type, size) typedef char size_of_##type[sizeof(type) == size ? 1 : -1]
SIZE(gq_buffer, 16);
SIZE(gq_exec, 40);
SIZE(gq_device_info, 288);
SIZE(gq_format_info, 24);
SIZE(gq_parts, 96);
SIZE(gq_quantize_options, 16);
SIZE(gq_state_desc, 144);
SIZE(gq_load_options, 24);
SIZE(gq_tensor_info, 64);
SIZE(gq_layer_info, 152);
SIZE(gq_job_progress, 24);

/* Every INIT macro initializes its struct. */
gq_exec header_exec = GQ_EXEC_INIT;
gq_device_info header_device_info = GQ_DEVICE_INFO_INIT;
gq_format_info header_format_info = GQ_FORMAT_INFO_INIT;
gq_parts header_parts = GQ_PARTS_INIT;
gq_quantize_options header_quantize_options = GQ_QUANTIZE_OPTIONS_INIT;
gq_state_desc header_state_desc = GQ_STATE_DESC_INIT;
gq_load_options header_load_options = GQ_LOAD_OPTIONS_INIT;
gq_tensor_info header_tensor_info = GQ_TENSOR_INFO_INIT;
gq_layer_info header_layer_info = GQ_LAYER_INFO_INIT;
gq_job_progress header_job_progress = GQ_JOB_PROGRESS_INIT;
