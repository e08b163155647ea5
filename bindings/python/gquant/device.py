"""The CUDA devices of this machine."""

from ctypes import byref, c_int32
from dataclasses import dataclass

from . import _ffi
from ._ffi import lib


@dataclass(frozen=True)
class Device:
    """A CUDA device."""

    index: int
    name: str
    capability: tuple[int, int]  # such as (9, 0)
    multiprocessors: int
    memory_bytes: int  # in all
    driver_version: int  # the CUDA version that the driver supports: 13000 for 13.0


def devices() -> list[Device]:
    """The CUDA devices, in the order of their numbers; none without a driver, and in a build without CUDA."""
    count = c_int32()
    lib.gq_device_count(byref(count))
    return [_describe(index) for index in range(count.value)]


def _describe(index: int) -> Device:
    info = _ffi.gq_device_info()
    lib.gq_device_get_info(index, byref(info))
    return Device(
        index=index,
        name=info.name.decode(),
        capability=(info.major, info.minor),
        multiprocessors=info.multiprocessors,
        memory_bytes=info.memory_bytes,
        driver_version=info.driver_version,
    )


def prepare(device: int = 0) -> None:
    """Loads the kernels into a device, which its first use does otherwise, but cannot while a graph is captured.

    UnsupportedError says what is missing: a driver, a newer one, kernels for the device's architecture.
    """
    lib.gq_device_prepare(device)
