"""Small random models that ComfyUI detects as the real ones: their names and fixed sizes, with few and narrow layers.

Each function returns a state dict of bfloat16. Weights are scaled so that activations keep their size.
"""

import torch


class _Weights(dict):
    """A state dict that is filled with random layers."""

    def __init__(self, seed):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def random(self, name, *shape, scale=1.0):
        self[name] = (torch.randn(*shape, generator=self.generator) * scale).bfloat16()

    def linear(self, name, n, k, bias=True):
        self.random(f"{name}.weight", n, k, scale=k**-0.5)
        if bias:
            self.random(f"{name}.bias", n, scale=0.02)

    def ones(self, name, size):
        self[name] = torch.ones(size, dtype=torch.bfloat16)


HEAD = 128  # Flux and Wan fix the width of a head


def flux(hidden=256, double=2, single=2, context=64, pooled=64, seed=0):
    """Flux schnell: 16 latent channels in patches of 2×2, text [.., context], pooled text [pooled]."""
    sd = _Weights(seed)
    sd.linear("img_in", hidden, 64)
    sd.linear("txt_in", hidden, context)
    for name, width in (("time_in", 256), ("vector_in", pooled)):
        sd.linear(f"{name}.in_layer", hidden, width)
        sd.linear(f"{name}.out_layer", hidden, hidden)
    for i in range(double):
        for stream in ("img", "txt"):
            block = f"double_blocks.{i}.{stream}_"
            sd.linear(f"{block}attn.qkv", 3 * hidden, hidden)
            sd.linear(f"{block}attn.proj", hidden, hidden)
            sd.ones(f"{block}attn.norm.query_norm.scale", HEAD)
            sd.ones(f"{block}attn.norm.key_norm.scale", HEAD)
            sd.linear(f"{block}mlp.0", 4 * hidden, hidden)
            sd.linear(f"{block}mlp.2", hidden, 4 * hidden)
            sd.linear(f"{block}mod.lin", 6 * hidden, hidden)
    for i in range(single):
        block = f"single_blocks.{i}"
        sd.linear(f"{block}.linear1", 7 * hidden, hidden)
        sd.linear(f"{block}.linear2", hidden, 5 * hidden)
        sd.linear(f"{block}.modulation.lin", 3 * hidden, hidden)
        sd.ones(f"{block}.norm.query_norm.scale", HEAD)
        sd.ones(f"{block}.norm.key_norm.scale", HEAD)
    sd.linear("final_layer.linear", 64, hidden)
    sd.linear("final_layer.adaLN_modulation.1", 2 * hidden, hidden)
    return dict(sd)


def diffusers(model, key_map):
    """The same weights as diffusers names and cuts them; key_map: ComfyUI's, of its names by diffusers'."""
    sd = {}
    for name, target in key_map.items():
        target, part, *change = (target, None) if isinstance(target, str) else target
        if target not in model:
            target = target.replace("_norm.weight", "_norm.scale")
        if target in model:
            tensor = model[target] if part is None else model[target].narrow(*part)
            sd[name] = (change[0](tensor) if change else tensor).clone()
    return sd


def wan(dim=256, ffn=512, layers=2, channels=16, seed=1):
    """Wan 2.1, text to video: latents [.., channels, frames, h, w], text [.., 4096]."""
    sd = _Weights(seed)
    sd.random("patch_embedding.weight", dim, channels, 1, 2, 2, scale=(4 * channels) ** -0.5)
    sd.random("patch_embedding.bias", dim, scale=0.02)
    sd.linear("text_embedding.0", dim, 4096)
    sd.linear("text_embedding.2", dim, dim)
    sd.linear("time_embedding.0", dim, 256)
    sd.linear("time_embedding.2", dim, dim)
    sd.linear("time_projection.1", 6 * dim, dim)
    for i in range(layers):
        block = f"blocks.{i}"
        for attention in ("self_attn", "cross_attn"):
            for part in "qkvo":
                sd.linear(f"{block}.{attention}.{part}", dim, dim)
            sd.ones(f"{block}.{attention}.norm_q.weight", dim)
            sd.ones(f"{block}.{attention}.norm_k.weight", dim)
        sd.ones(f"{block}.norm3.weight", dim)
        sd.random(f"{block}.norm3.bias", dim, scale=0.02)
        sd.linear(f"{block}.ffn.0", ffn, dim)
        sd.linear(f"{block}.ffn.2", dim, ffn)
        sd.random(f"{block}.modulation", 1, 6, dim, scale=dim**-0.5)
    sd.random("head.modulation", 1, 2, dim, scale=dim**-0.5)
    sd.linear("head.head", 4 * channels, dim)
    return dict(sd)


def sd3(depth=2, patches=64, seed=3):
    """Stable Diffusion 3: 16 latent channels, pictures of up to 16 · patches pixels a side; text [.., 4096], pooled text [2048]."""
    sd, hidden = _Weights(seed), 64 * depth
    sd.random("pos_embed", 1, patches * patches, hidden, scale=0.1)
    sd.random("x_embedder.proj.weight", hidden, 16, 2, 2, scale=64**-0.5)
    sd.random("x_embedder.proj.bias", hidden, scale=0.02)
    for name, width in (("t_embedder", 256), ("y_embedder", 2048)):
        sd.linear(f"{name}.mlp.0", hidden, width)
        sd.linear(f"{name}.mlp.2", hidden, hidden)
    sd.linear("context_embedder", hidden, 4096)
    for i in range(depth):
        for side in ("context_block", "x_block"):
            block, last = f"joint_blocks.{i}.{side}", i == depth - 1 and side == "context_block"
            sd.linear(f"{block}.attn.qkv", 3 * hidden, hidden)
            sd.linear(f"{block}.adaLN_modulation.1", (2 if last else 6) * hidden, hidden)
            if not last:
                sd.linear(f"{block}.attn.proj", hidden, hidden)
                sd.linear(f"{block}.mlp.fc1", 4 * hidden, hidden)
                sd.linear(f"{block}.mlp.fc2", hidden, 4 * hidden)
    sd.linear("final_layer.linear", 64, hidden)
    sd.linear("final_layer.adaLN_modulation.1", 2 * hidden, hidden)
    return dict(sd)


CLIP_L = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_hidden_layers": 3}
_FULL_CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}


def full_clip_l():
    """CLIP-L's text encoder as large as it is: 123 million weights."""
    return clip_l(_FULL_CLIP_L)


def clip_l(sizes=CLIP_L, seed=2):
    """CLIP-L's text encoder, by default with the sizes of CLIP_L, which ComfyUI takes as the model option "model_config"."""
    sd, width, inner = _Weights(seed), sizes["hidden_size"], sizes["intermediate_size"]
    sd.random("text_model.embeddings.token_embedding.weight", 49408, width, scale=0.5)
    sd.random("text_model.embeddings.position_embedding.weight", 77, width, scale=0.1)
    for i in range(sizes["num_hidden_layers"]):
        layer = f"text_model.encoder.layers.{i}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            sd.linear(f"{layer}.self_attn.{part}", width, width)
        sd.linear(f"{layer}.mlp.fc1", inner, width)
        sd.linear(f"{layer}.mlp.fc2", width, inner)
        for norm in ("layer_norm1", "layer_norm2"):
            sd.ones(f"{layer}.{norm}.weight", width)
            sd.random(f"{layer}.{norm}.bias", width, scale=0.02)
    sd.ones("text_model.final_layer_norm.weight", width)
    sd.random("text_model.final_layer_norm.bias", width, scale=0.02)
    sd.linear("text_projection", width, width, bias=False)
    return dict(sd)


T5 = {"d_model": 256, "d_ff": 512, "d_kv": 64, "num_heads": 4, "num_layers": 2}


def t5(seed=5):
    """T5's encoder with the sizes of T5, which ComfyUI takes as the model option "t5base_model_config"."""
    sd, width, inner = _Weights(seed), T5["d_model"], T5["num_heads"] * T5["d_kv"]
    sd.random("shared.weight", 32128, width)
    sd.random("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", 32, T5["num_heads"])
    for i in range(T5["num_layers"]):
        block = f"encoder.block.{i}.layer"
        for part in "qkv":
            sd.linear(f"{block}.0.SelfAttention.{part}", inner, width, bias=False)
        sd.linear(f"{block}.0.SelfAttention.o", width, inner, bias=False)
        sd.linear(f"{block}.1.DenseReluDense.wi", T5["d_ff"], width, bias=False)
        sd.linear(f"{block}.1.DenseReluDense.wo", width, T5["d_ff"], bias=False)
        for j in range(2):
            sd.ones(f"{block}.{j}.layer_norm.weight", width)
    sd.ones("encoder.final_layer_norm.weight", width)
    return dict(sd)


QWEN = {"num_hidden_layers": 2, "intermediate_size": 512, "vocab_size": 32768}


def qwen3(seed=6):
    """Qwen3 0.6B with the sizes of QWEN, which ComfyUI takes as the model option "qwen3_06b_model_config"."""
    sd, width, head = _Weights(seed), 1024, 128
    sd.random("model.embed_tokens.weight", QWEN["vocab_size"], width)
    for i in range(QWEN["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for part, heads in (("q", 16), ("k", 8), ("v", 8)):
            sd.linear(f"{layer}.self_attn.{part}_proj", heads * head, width, bias=False)
        sd.linear(f"{layer}.self_attn.o_proj", width, 16 * head, bias=False)
        sd.ones(f"{layer}.self_attn.q_norm.weight", head)
        sd.ones(f"{layer}.self_attn.k_norm.weight", head)
        for part in ("gate", "up"):
            sd.linear(f"{layer}.mlp.{part}_proj", QWEN["intermediate_size"], width, bias=False)
        sd.linear(f"{layer}.mlp.down_proj", width, QWEN["intermediate_size"], bias=False)
        sd.ones(f"{layer}.input_layernorm.weight", width)
        sd.ones(f"{layer}.post_attention_layernorm.weight", width)
    sd.ones("model.norm.weight", width)
    return dict(sd)
