package convert

import (
	"fmt"
	"regexp"
	"strings"

	"github.com/gquant/gquant/core/dtype"
	"github.com/gquant/gquant/core/safetensors"
)

// minElements is the size below which quantizing a weight saves nothing worth its error: a 64×64 matrix.
const minElements = 4096

// rules decide, first match first, which tensors stay as they are. What no rule holds back is a 2-D weight of a
// linear layer and is quantized. The names are those of the usual PyTorch, Hugging Face, ComfyUI and original
// checkpoints.
var rules = []struct {
	reason string
	keep   func(t *safetensors.Tensor) bool
}{
	{"not f32, f16 or bf16", func(t *safetensors.Tensor) bool { return !quantizable(t.DType) }},
	{"bias", func(t *safetensors.Tensor) bool { return strings.HasSuffix(t.Name, "bias") }},
	{"norm", module(`[a-z]*norms?\d*|ln\d*`)},
	{"embedding", module(`emb|embed|embedder|embedding|embeddings|embs|wte|wpe`)},
	{"embedding", module(`^shared`)}, // T5's name for its token embedding; not shared_expert
	{"output head", module(`^lm_head`)},
	{"not a weight", func(t *safetensors.Tensor) bool { return lastWord(t.Name) != "weight" }},
	{"1-D", func(t *safetensors.Tensor) bool { return len(t.Shape) < 2 }},
	{"convolution", func(t *safetensors.Tensor) bool { return len(t.Shape) > 2 }},
	{"tiny", func(t *safetensors.Tensor) bool { return t.Elements() < minElements }},
}

// quantizable says whether the formats take this source dtype.
func quantizable(d dtype.DType) bool { return d == dtype.F32 || d == dtype.F16 || d == dtype.BF16 }

// keepReason says why the default rule leaves the tensor as it is; "" if it is to be quantized.
func keepReason(t *safetensors.Tensor) string {
	for _, r := range rules {
		if r.keep(t) {
			return r.reason
		}
	}
	return ""
}

// module matches the module that holds the tensor, "<…>.<module>.weight", or the tensor's own name where a module
// holds it directly: one of the words between its underscores or, for a pattern that starts with ^, the whole.
// Modules further up don't count: the linear layer "norm1.linear" of an adaptive norm is a linear layer.
func module(pattern string) func(t *safetensors.Tensor) bool {
	start, end := `(^|_)`, `($|_)`
	if whole, ok := strings.CutPrefix(pattern, "^"); ok {
		pattern, start, end = whole, "^", "$"
	}
	re := regexp.MustCompile(fmt.Sprintf(`(?i)%s(%s)%s`, start, pattern, end))
	return func(t *safetensors.Tensor) bool {
		words := strings.FieldsFunc(t.Name, func(r rune) bool { return r == '.' || r == '/' })
		for _, w := range words[max(0, len(words)-2):] {
			if re.MatchString(w) {
				return true
			}
		}
		return false
	}
}

func lastWord(name string) string { return name[strings.LastIndexByte(name, '.')+1:] }
