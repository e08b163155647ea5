//go:build cuda

package cuda

import "embed"

// images are the kernels, one fatbin per .cu file: make builds them (kernels.mk).
//
//go:embed image/*.fatbin
var images embed.FS

// architectures are those that the images have code for: machine code (sm_…), and PTX (compute_…) that the driver compiles for
// newer ones. kernels.mk reads the same file.
//
//go:embed architectures
var architectures string
