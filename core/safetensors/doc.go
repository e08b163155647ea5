// Package safetensors reads and writes safetensors files: strictly, without mmap and without ever holding a
// model in memory.
//
// A file is
//
//	8 bytes   N, the length of the header, little-endian
//	N bytes   the header: one JSON object, padded with spaces
//	the rest  the data section: every tensor's bytes, back to back
//
// and the header is
//
//	{"__metadata__": {"format": "pt"},
//	 "layer.weight": {"dtype": "BF16", "shape": [4096, 4096], "data_offsets": [0, 33554432]}}
//
// where data_offsets count from the start of the data section. Sorted by their offsets, the tensors must cover
// the data section exactly: no gap, no overlap, nothing after the last one.
//
// The reader accepts what the official Rust reader accepts, except where that one lets a file through that two
// programs could read differently or that no program can use: a tensor or metadata key that occurs twice, an
// unknown field, an entry written as an array, "__metadata__": null, a name with control characters, more than 64
// dimensions or one above 2^48. Lengths are checked before memory is allocated for them, and offsets are computed
// in unsigned 64 bits.
//
// Data are read with pread: a file that shrinks under a reader gives an error, where a mapping would kill the
// process with SIGBUS.
//
// The JSON tokens come from github.com/bytedance/sonic or, under the build tag nosonic, from encoding/json; sonic
// maps executable memory when the process starts, which hardened services forbid. Every rule is checked here and
// not by those libraries, so the two builds give the same verdict on every file.
package safetensors
