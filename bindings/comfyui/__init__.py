"""gquant's nodes for ComfyUI. They are in the Python package gquant; this folder goes into ComfyUI's custom_nodes."""

import os

try:
    import gquant.comfy
except ModuleNotFoundError as e:
    if e.name != "gquant":
        raise
    raise ImportError("gquant is not installed in the Python that ComfyUI runs with; README.md says how") from None

from gquant.comfy.nodes import NODES, Extension

if os.environ.get("GQUANT_PATCH_CORE") == "1":
    from gquant.comfy import patch

    patch.install()

# Both conventions: ComfyUI asks for the mappings first, then for the entry point.
NODE_CLASS_MAPPINGS = {node.GET_SCHEMA().node_id: node for node in NODES}
NODE_DISPLAY_NAME_MAPPINGS = {node.GET_SCHEMA().node_id: node.GET_SCHEMA().display_name for node in NODES}


async def comfy_entrypoint() -> Extension:
    return Extension()
