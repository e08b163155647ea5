"""The nodes. Needs ComfyUI."""

import json
import os
from collections.abc import Callable
from typing import Any, Optional

import torch

import comfy.model_management as management  # isort: skip
import comfy.sd  # isort: skip
import comfy.utils  # isort: skip
import folder_paths  # isort: skip
from comfy.cli_args import args  # isort: skip
from comfy_api.latest import ComfyExtension, io  # isort: skip

_DTYPES = {"default": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_NONE = "none"


def _dtype() -> Any:
    return io.Combo.Input(
        "dtype",
        options=list(_DTYPES),
        default="default",
        optional=True,
        tooltip="What the model computes in. The weights stay in 4 bits whatever it is. default: what ComfyUI takes on this machine.",
        advanced=True,
    )


def _device(options: list[str], tooltip: str) -> Any:
    return io.Combo.Input("device", options=options, default="default", optional=True, tooltip=tooltip, advanced=True)


_MODEL_DEVICE = (
    "default: ComfyUI moves the weights to the GPU when and as far as it needs them. gpu: they are read from the file straight into the "
    "GPU's memory, which is faster and needs the room. cpu: the model runs on the CPU."
)


class Load4BitModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Load4BitModel",
            display_name="Load 4-Bit Diffusion Model",
            category="model/loaders/4 bits",
            description=(
                "Loads a diffusion model in bitsandbytes' NF4 or FP4, as published or written by gquant, with ComfyUI's or diffusers' names. "
                "The weights stay in 4 bits in memory. LoRAs, offloading and saving work as with other models."
            ),
            search_aliases=["nf4", "fp4", "bnb", "bitsandbytes", "gquant", "load unet"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=folder_paths.get_filename_list("diffusion_models"),
                    tooltip="A file of the folder diffusion_models.",
                ),
                _dtype(),
                _device(["default", "gpu", "cpu"], _MODEL_DEVICE),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model_name: str, dtype: str = "default", device: str = "default") -> io.NodeOutput:
        from . import loaders

        path = folder_paths.get_full_path_or_raise("diffusion_models", model_name)
        return io.NodeOutput(loaders.load_model(path, _DTYPES[dtype], device))


class Load4BitCheckpoint(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Load4BitCheckpoint",
            display_name="Load 4-Bit Checkpoint",
            category="model/loaders/4 bits",
            description="Loads a diffusion model in NF4 or FP4, its text encoder and its VAE from one file. See Load 4-Bit Diffusion Model.",
            search_aliases=["nf4", "fp4", "bnb", "bitsandbytes", "gquant", "checkpoint"],
            inputs=[
                io.Combo.Input("ckpt_name", options=folder_paths.get_filename_list("checkpoints"), tooltip="A file of the folder checkpoints."),
                _dtype(),
                _device(["default", "gpu", "cpu"], _MODEL_DEVICE),
            ],
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
        )

    @classmethod
    def execute(cls, ckpt_name: str, dtype: str = "default", device: str = "default") -> io.NodeOutput:
        from . import loaders

        path = folder_paths.get_full_path_or_raise("checkpoints", ckpt_name)
        return io.NodeOutput(*loaders.load_checkpoint(path, _DTYPES[dtype], device, folder_paths.get_folder_paths("embeddings")))


class Load4BitCLIP(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        names = folder_paths.get_filename_list("text_encoders")
        more = [
            io.Combo.Input(
                f"clip_name{i}",
                options=[_NONE, *names],
                default=_NONE,
                optional=True,
                tooltip="One more encoder, for models that take several. It may be of any precision.",
            )
            for i in (2, 3, 4)
        ]
        return io.Schema(
            node_id="Load4BitCLIP",
            display_name="Load 4-Bit CLIP",
            category="model/loaders/4 bits",
            description=(
                "Loads one text encoder or those that belong together, at least one of them in NF4 or FP4: T5, CLIP, Llama, Qwen and whatever "
                "else ComfyUI knows. Which belong together says the description of ComfyUI's own CLIP loaders."
            ),
            search_aliases=["nf4", "fp4", "bnb", "bitsandbytes", "gquant", "text encoder", "t5"],
            inputs=[
                io.Combo.Input("clip_name1", options=names, tooltip="A file of the folder text_encoders."),
                io.Combo.Input(
                    "type",
                    options=[*(clip_type.name.lower() for clip_type in comfy.sd.CLIPType), "sdxl"],
                    tooltip="The kind of model whose prompts it encodes.",
                ),
                *more,
                _dtype(),
                _device(["default", "cpu"], "default: ComfyUI chooses. cpu: it runs on the CPU."),
            ],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def execute(
        cls,
        clip_name1: str,
        type: str,
        clip_name2: str = _NONE,
        clip_name3: str = _NONE,
        clip_name4: str = _NONE,
        dtype: str = "default",
        device: str = "default",
    ) -> io.NodeOutput:
        from . import loaders

        names = [name for name in (clip_name1, clip_name2, clip_name3, clip_name4) if name != _NONE]
        paths = [folder_paths.get_full_path_or_raise("text_encoders", name) for name in names]
        clip_type = getattr(comfy.sd.CLIPType, type.upper(), comfy.sd.CLIPType.STABLE_DIFFUSION)  # of sdxl, as ComfyUI has it
        return io.NodeOutput(loaders.load_clip(paths, clip_type, _DTYPES[dtype], device, folder_paths.get_folder_paths("embeddings")))


class Quantize4Bit(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Quantize4Bit",
            display_name="Quantize to 4 Bits",
            category="model/4 bits",
            description=(
                "Quantizes the linear layers of a loaded model to NF4 or FP4. LoRAs that are connected before it are quantized with the weights. "
                "`gquant convert` does the same to a file, once."
            ),
            search_aliases=["nf4", "fp4", "bnb", "bitsandbytes", "gquant", "quantize"],
            inputs=[
                io.Model.Input("model", tooltip="A model in bf16, fp16, fp32 or fp8."),
                io.Combo.Input("format", options=["nf4", "fp4"], default="nf4", tooltip="nf4 is closer to the weights of nearly every model."),
                io.Combo.Input(
                    "blocksize",
                    options=["32", "64", "128", "256", "512", "1024", "2048", "4096"],
                    default="64",
                    tooltip="Weights per scale. Smaller is more exact and larger in memory: 64 is usual, 4.5 bits per weight in all.",
                    advanced=True,
                ),
                io.Boolean.Input(
                    "double_quant", default=False, tooltip="Quantizes the scales too, which saves 0.37 bits per weight.", advanced=True
                ),
                io.String.Input(
                    "exclude",
                    default="*embed*",
                    tooltip="Weights to leave as they are: patterns such as final_layer.* and *mod.lin.weight, with commas between.",
                    advanced=True,
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any, format: str, blocksize: str = "64", double_quant: bool = False, exclude: str = "") -> io.NodeOutput:
        from . import quantize

        globs = [glob.strip() for glob in exclude.split(",") if glob.strip()]
        return io.NodeOutput(quantize.quantize_model(model, format, int(blocksize), double_quant, globs, _progress()))


class Save4BitModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Save4BitModel",
            display_name="Save 4-Bit Model",
            category="model/4 bits",
            description=(
                "Saves a 4-bit model into ComfyUI's output folder, as bitsandbytes names things. Load 4-Bit Diffusion Model opens it, with the "
                "same bytes; with clip or vae it is a checkpoint, which Load 4-Bit Checkpoint opens. LoRAs are saved in the weights."
            ),
            search_aliases=["nf4", "fp4", "bnb", "bitsandbytes", "gquant", "save model"],
            inputs=[
                io.Model.Input("model"),
                io.String.Input(
                    "filename_prefix",
                    default="diffusion_models/gquant",
                    tooltip="Below the output folder. Files in diffusion_models and checkpoints there are listed by the loaders.",
                ),
                io.Clip.Input("clip", optional=True, tooltip="Makes the file a checkpoint."),
                io.Vae.Input("vae", optional=True, tooltip="Makes the file a checkpoint."),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: Any, filename_prefix: str, clip: Any = None, vae: Any = None) -> io.NodeOutput:
        from . import save

        folder, filename, counter, _, _ = folder_paths.get_save_image_path(filename_prefix, folder_paths.get_output_directory())
        metadata: dict[str, str] = {}
        if not args.disable_metadata:
            metadata["prompt"] = json.dumps(cls.hidden.prompt)
            metadata |= {key: json.dumps(value) for key, value in (cls.hidden.extra_pnginfo or {}).items()}
        save.save_model(os.path.join(folder, f"{filename}_{counter:05}_.safetensors"), model, clip, vae, metadata)
        return io.NodeOutput()


def _progress() -> Callable[[int, int], None]:
    """Shows progress on the node, and ends the work when the user cancels it."""
    bar: Optional[Any] = None

    def report(done: int, total: int) -> None:
        nonlocal bar
        management.throw_exception_if_processing_interrupted()
        bar = bar or comfy.utils.ProgressBar(total)
        bar.update_absolute(done)

    return report


NODES = [Load4BitModel, Load4BitCheckpoint, Load4BitCLIP, Quantize4Bit, Save4BitModel]


class Extension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
