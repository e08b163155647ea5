package convert

import (
	"testing"

	"github.com/gquant/gquant/core/dtype"
	"github.com/gquant/gquant/core/safetensors"
)

// Names and shapes of published checkpoints: BERT, Llama, GPT-2, T5, Flux (original and diffusers), SDXL, Wan.
func TestDefaultRule(t *testing.T) {
	for _, c := range []struct {
		name   string
		dtype  dtype.DType
		shape  []int64
		reason string
	}{
		{"encoder.layer.0.attention.self.query.weight", dtype.F32, []int64{384, 384}, ""},
		{"pooler.dense.weight", dtype.F32, []int64{384, 384}, ""},
		{"model.layers.0.mlp.shared_expert.gate_proj.weight", dtype.BF16, []int64{512, 512}, ""},
		{"double_blocks.0.img_mod.lin.weight", dtype.BF16, []int64{18432, 3072}, ""},
		{"transformer_blocks.0.norm1.linear.weight", dtype.BF16, []int64{18432, 3072}, ""},
		{"model.diffusion_model.time_embed.0.weight", dtype.F16, []int64{1280, 320}, ""},
		{"time_text_embed.timestep_embedder.linear_1.weight", dtype.F16, []int64{3072, 256}, ""},
		{"blocks.0.normal_proj.weight", dtype.F16, []int64{256, 256}, ""},

		{"embeddings.word_embeddings.weight", dtype.F32, []int64{30522, 384}, "embedding"},
		{"model.embed_tokens.weight", dtype.BF16, []int64{32000, 4096}, "embedding"},
		{"transformer.wte.weight", dtype.F32, []int64{50257, 768}, "embedding"},
		{"shared.weight", dtype.F16, []int64{32128, 4096}, "embedding"},
		{"text_model.embeddings.position_embedding.weight", dtype.F16, []int64{77, 768}, "embedding"},
		{"lm_head.weight", dtype.BF16, []int64{32000, 4096}, "output head"},
		{"encoder.layer.0.attention.output.LayerNorm.weight", dtype.F32, []int64{384}, "norm"},
		{"model.layers.0.input_layernorm.weight", dtype.BF16, []int64{4096}, "norm"},
		{"h.0.ln_1.weight", dtype.F32, []int64{768}, "norm"},
		{"double_blocks.0.img_attn.norm.query_norm.scale", dtype.BF16, []int64{128}, "norm"},
		{"blocks.0.norm_q.weight", dtype.BF16, []int64{5120}, "norm"},
		{"encoder.layer.0.attention.self.query.bias", dtype.F32, []int64{384}, "bias"},
		{"input_blocks.0.0.weight", dtype.F16, []int64{320, 4, 3, 3}, "convolution"},
		{"patch_embedding.weight", dtype.F16, []int64{5120, 16, 1, 2, 2}, "embedding"},
		{"blocks.0.modulation", dtype.BF16, []int64{1, 6, 5120}, "not a weight"},
		{"scale.weight", dtype.F32, []int64{4096}, "1-D"},
		{"head.weight", dtype.F32, []int64{32, 32}, "tiny"},
		{"embeddings.position_ids", dtype.I64, []int64{1, 512}, "not f32, f16 or bf16"},
		{"blocks.0.attn.q.weight", dtype.F8E4M3, []int64{3072, 3072}, "not f32, f16 or bf16"},
	} {
		tensor := &safetensors.Tensor{Name: c.name, DType: c.dtype, Shape: c.shape}
		if got := keepReason(tensor); got != c.reason {
			t.Errorf("%s %s %v: reason %q, want %q", c.name, c.dtype, c.shape, got, c.reason)
		}
	}
}
