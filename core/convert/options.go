package convert

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/gquant/gquant/core/checkpoint"
	"github.com/gquant/gquant/core/quant"
)

// Options of a conversion. The JSON names are those of the command line's flags.
type Options struct {
	Output       string   `json:"output"`         // path of the result; "" derives it from the input's name
	Mode         string   `json:"mode"`           // format of the quantized layers: "nf4" or "fp4"
	BlockSize    int      `json:"block_size"`     // elements per absmax
	DoubleQuant  bool     `json:"double_quant"`   // quantize absmax too (bitsandbytes' compress_statistics)
	QuantStorage string   `json:"quant_storage"`  // dtype label of the packed codes: a key of checkpoint.Storages
	Exclude      []string `json:"exclude"`        // globs of tensors that are copied
	Include      []string `json:"include"`        // globs of tensors that are quantized whatever the default rule says
	Convention   string   `json:"convention"`     // "bitsandbytes" or "comfy"
	MaxShardSize int64    `json:"max_shard_size"` // bytes per output file; 0 = one file
	Resume       bool     `json:"resume"`         // keep an interrupted result and continue one
	Force        bool     `json:"force"`          // replace existing output
	Strict       bool     `json:"strict"`         // NaN or Inf in a weight is an error
	Threads      int      `json:"threads"`        // 0 = all cores
	Device       string   `json:"device"`         // where to quantize: "cpu", or "cuda:0"; who calls Run chooses the engine by it
}

// DefaultOptions are bitsandbytes' and Hugging Face's usual choices.
func DefaultOptions() Options {
	return Options{Mode: "nf4", BlockSize: 64, QuantStorage: "uint8", Convention: "bitsandbytes", Device: "cpu"}
}

// OptionError is an option with a value that it cannot have.
type OptionError struct{ error }

func badOption(format string, args ...any) error { return OptionError{fmt.Errorf(format, args...)} }

// target checks the options that say how a layer is written.
func (o Options) target() (checkpoint.Target, error) {
	t := checkpoint.Target{Blocksize: o.BlockSize, Nested: o.DoubleQuant, Convention: o.Convention}
	format, err := quant.Lookup(o.Mode)
	if err != nil || format.Bits != 4 {
		return t, badOption("mode %q is not one of nf4, fp4", o.Mode)
	}
	t.Format = format
	if !slices.Contains(quant.Blocksizes(), o.BlockSize) {
		return t, badOption("block size %d is not one of %v", o.BlockSize, quant.Blocksizes())
	}
	storage, ok := checkpoint.Storages[o.QuantStorage]
	if !ok {
		return t, badOption("quant storage %q is not one of uint8, int8, bf16, f16, f32", o.QuantStorage)
	}
	t.Storage = storage
	if !slices.Contains(checkpoint.Conventions(), o.Convention) {
		return t, badOption("convention %q is not one of %v", o.Convention, checkpoint.Conventions())
	}
	return t, nil
}

// The ends of the names of a file and of the index of several.
const (
	extension      = ".safetensors"
	indexExtension = ".safetensors.index.json"
)

// DefaultOutput names the result beside its source: model.safetensors becomes model_nf4.safetensors, and so
// does the folder "model" or the index "model.safetensors.index.json".
func DefaultOutput(source, suffix string) string {
	source = filepath.Clean(source)
	base := strings.TrimSuffix(source, ".index.json")
	base = strings.TrimSuffix(base, extension)
	return base + "_" + suffix + extension
}
