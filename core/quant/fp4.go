package quant

import "github.com/gquant/gquant/core/kernel"

// fp4 is bitsandbytes' 4-bit float: sign, two exponent bits and a mantissa bit, scaled so that the largest is the absmax
// of the block. Its codes are bit patterns; bitsandbytes' 0.0052 is 1/192.
var fp4 = format4("fp4", kernel.FP4)
