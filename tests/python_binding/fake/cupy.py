"""Stands in for cupy where there is no device: arrays in the memory of tests/c/fake_cuda.c's driver, which computes nothing."""

import atexit
import contextlib
import ctypes
import math
from types import SimpleNamespace

import numpy

driver = ctypes.CDLL("libcuda.so.1")
driver.fake_cuda_count.restype = ctypes.c_int64
driver.cuInit(0)
atexit.register(driver.fake_cuda_set, b"keep")  # like cupy's pool, memory is kept to the end

_contexts = []
for _ordinal in range(2):
    _contexts.append(ctypes.c_void_p())
    assert driver.cuDevicePrimaryCtxRetain(ctypes.byref(_contexts[-1]), _ordinal) == 0

current = SimpleNamespace(device=0, stream=0)


def count(what):
    return driver.fake_cuda_count(what.encode())


@contextlib.contextmanager
def _context(device):
    assert driver.cuCtxPushCurrent_v2(_contexts[device]) == 0
    yield
    driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))


class ndarray:
    def __init__(self, shape, dtype):
        self.shape = tuple(shape) if hasattr(shape, "__len__") else (shape,)
        self.dtype, self.device = numpy.dtype(dtype), current.device
        self.nbytes = math.prod(self.shape) * self.dtype.itemsize
        self.stream = current.stream  # that the memory was made for
        address = ctypes.c_uint64()
        if self.nbytes:
            with _context(self.device):
                assert driver.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(self.nbytes)) == 0
        self.address = address.value

    @property
    def __cuda_array_interface__(self):
        data = (self.address, False)
        return {"shape": self.shape, "typestr": self.dtype.str, "data": data, "version": 3, "stream": current.stream or 1}

    def __dlpack_device__(self):
        return (2, self.device)

    def _copy(self, function, *arguments):
        if self.nbytes:
            with _context(self.device):
                assert function(*arguments, ctypes.c_size_t(self.nbytes), None) == 0
                assert driver.cuStreamSynchronize(None) == 0

    def get(self):
        host = numpy.empty(self.shape, self.dtype)
        self._copy(driver.cuMemcpyDtoHAsync_v2, ctypes.c_void_p(host.ctypes.data), ctypes.c_uint64(self.address))
        return host

    def set(self, host):
        self._copy(driver.cuMemcpyHtoDAsync_v2, ctypes.c_uint64(self.address), ctypes.c_void_p(host.ctypes.data))

    def item(self):
        return self.get().item()

    def reshape(self, *shape):
        assert shape == (-1, 1)
        other = object.__new__(ndarray)
        other.__dict__ |= self.__dict__ | {"shape": (self.nbytes // self.dtype.itemsize, 1)}
        return other


def empty(shape, dtype):
    return ndarray(shape, dtype)


def asarray(values, dtype=None):
    host = numpy.asarray(values, dtype, order="C")
    made = ndarray(host.shape, host.dtype)
    made.set(host)
    return made


@contextlib.contextmanager
def _set(name, value):
    before = getattr(current, name)
    setattr(current, name, value)
    yield
    setattr(current, name, before)


cuda = SimpleNamespace(
    Device=lambda device: _set("device", device),
    ExternalStream=lambda stream, device=-1: _set("stream", stream),
    get_current_stream=lambda: SimpleNamespace(synchronize=lambda: None),
)
