"""Adds the built library and program to the wheel. An sdist would need Go, so there is none."""

import os
import platform
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class AddBinaries(BuildHookInterface):
    def initialize(self, version, build_data):
        root = Path(self.root).parents[1]
        library = Path(os.environ.get("GQUANT_LIBRARY", root / "lib" / "libgquant.so"))
        for built, name in ((library, "libgquant.so"), (root / "bin" / "gquant", "gquant")):
            if not built.exists():
                raise FileNotFoundError(f"{built} is not there: run `make lib build` first")
            build_data["force_include"][str(built)] = f"gquant/{name}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-manylinux_2_34_{platform.machine()}"
