// The header, and names for its const types: cgo writes exported prototypes without const, and these typedefs put it
// back, so that they agree with the header's.
#ifndef GQUANT_TYPES_H
#define GQUANT_TYPES_H

#include "../include/gquant.h"
#include "guard.h"

typedef const char gq_const_char;
typedef const int64_t gq_const_int64;
typedef const gq_exec gq_const_exec;
typedef const gq_buffer gq_const_buffer;
typedef const gq_parts gq_const_parts;
typedef const gq_quantize_options gq_const_quantize_options;
typedef const gq_state_desc gq_const_state_desc;
typedef const gq_load_options gq_const_load_options;

#endif
