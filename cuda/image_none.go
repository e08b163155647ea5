//go:build !cuda

package cuda

import "embed"

// In a build without CUDA there are no kernels.
var (
	images        embed.FS
	architectures string
)
