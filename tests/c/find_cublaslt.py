"""Prints the path of the libcublasLt that came with torch, the newest if there are several; nothing if there is none."""

import importlib.util
from pathlib import Path

spec = importlib.util.find_spec("nvidia")
folders = [Path(folder) for folder in spec.submodule_search_locations] if spec else []
found = [path for folder in folders for path in folder.glob("*/lib/libcublasLt.so.*")]
print(max(found, key=lambda path: path.name, default=""))
