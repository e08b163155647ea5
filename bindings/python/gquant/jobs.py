"""Work on whole models: the commands of the command line.

Each function returns when the work is done, with what the command prints for --json. Ctrl-C cancels it. progress is True for a
line on stderr if that is a terminal, False, or a function of the bytes done and the bytes in all (0 while unknown).
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from ctypes import byref, c_char_p, c_int32, c_void_p
from typing import Any, Union

from . import _ffi
from ._errors import FailedError
from ._ffi import lib
from .model import Path

Progress = Union[bool, Callable[[int, int], None]]
Result = dict[str, Any]

_POLL_MS = 100


def convert(
    source: Path,
    output: Path = "",
    mode: str = "nf4",
    *,
    block_size: int = 64,
    double_quant: bool = False,
    quant_storage: str = "uint8",
    exclude: Sequence[str] = (),
    include: Sequence[str] = (),
    convention: str = "bitsandbytes",
    max_shard_size: int = 0,
    resume: bool = False,
    force: bool = False,
    strict: bool = False,
    device: str = "cpu",
    threads: int = 0,
    progress: Progress = True,
) -> Result:
    """Quantizes a model: `gquant convert`.

    output: "" = beside the source, with the mode in its name. mode: "nf4" or "fp4". block_size: weights per absmax.
    double_quant: quantize absmax too. quant_storage: dtype label of the codes. exclude, include: globs of tensors to leave, or
    to quantize whatever the default rule says. max_shard_size: bytes per file, 0 = one file. resume: continue an interrupted
    run. force: replace output that is there. strict: fail on NaN and Inf. device: what quantizes, "cpu" or a CUDA device such as
    "cuda:0"; the bytes are the same. threads: 0 = all cores.
    """
    request = {
        "source": os.fsdecode(source),
        "output": os.fsdecode(output),
        "mode": mode,
        "block_size": block_size,
        "double_quant": double_quant,
        "quant_storage": quant_storage,
        "exclude": list(exclude),
        "include": list(include),
        "convention": convention,
        "max_shard_size": max_shard_size,
        "resume": resume,
        "force": force,
        "strict": strict,
        "device": device,
        "threads": threads,
    }
    return _run("gq_convert", request, progress)


def dequantize_model(
    source: Path,
    output: Path = "",
    *,
    dtype: str = "",
    max_shard_size: int = 0,
    resume: bool = False,
    force: bool = False,
    threads: int = 0,
    progress: Progress = True,
) -> Result:
    """Restores plain weights: `gquant dequantize`. output: "" = beside the source. dtype: "f32", "f16", "bf16", or "" for what each weight was."""
    request = {
        "source": os.fsdecode(source),
        "output": os.fsdecode(output),
        "dtype": dtype,
        "max_shard_size": max_shard_size,
        "resume": resume,
        "force": force,
        "threads": threads,
    }
    return _run("gq_dequantize_model", request, progress)


def verify(source: Path, *, sha256: bool = False, strict: bool = False, threads: int = 0, progress: Progress = True) -> Result:
    """Checks structure, layers and numbers of a model: `gquant verify`. What is wrong is in the result's "problems"."""
    return _run("gq_verify", {"source": os.fsdecode(source), "sha256": sha256, "strict": strict, "threads": threads}, progress)


def diff(a: Path, b: Path, *, threads: int = 0, progress: Progress = True) -> Result:
    """The error of every tensor of b against a: `gquant diff`."""
    return _run("gq_diff", {"a": os.fsdecode(a), "b": os.fsdecode(b), "threads": threads}, progress)


def inspect(source: Path) -> Result:
    """Layers, tensors and metadata of a model: `gquant inspect`."""
    return _run("gq_inspect", {"source": os.fsdecode(source)}, False)


def _run(function: str, request: dict[str, Any], progress: Progress) -> Result:
    report = progress if callable(progress) else _Line() if progress and sys.stderr.isatty() else None
    job = c_void_p()
    getattr(lib, function)(json.dumps(request).encode(), byref(job))
    try:
        state, finished, text = _ffi.gq_job_progress(), c_int32(), c_char_p()
        while not finished.value:
            try:
                lib.gq_job_wait(job, _POLL_MS, byref(finished))
            except FailedError:
                lib.gq_job_result(job, byref(text))
                if not text.value:  # nothing was found out
                    raise
            if report:
                lib.gq_job_poll(job, byref(state))
                report(state.done_bytes, state.total_bytes)
        lib.gq_job_result(job, byref(text))
        return json.loads(text.value or b"")
    finally:
        lib.gq_job_free(job)  # cancels a job that an exception, such as Ctrl-C, interrupted
        if isinstance(report, _Line):
            report.clear()


class _Line:
    """A progress line on a terminal."""

    def __call__(self, done: int, total: int) -> None:
        if total:
            sys.stderr.write(f"\r{100 * done // total:3d} %  {done / 1e9:.1f} of {total / 1e9:.1f} GB\x1b[K")
            sys.stderr.flush()

    def clear(self) -> None:
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()
