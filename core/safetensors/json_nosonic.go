//go:build nosonic

package safetensors

var walkDefault walker = walkStd
