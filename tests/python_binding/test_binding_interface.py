"""The header, the library's symbols and the table in _ffi.py say the same."""

import ctypes
import subprocess

import pytest

import header
import support
from gquant import _dtypes, _errors, _ffi, quant

NUMBERS = {
    "char": ctypes.c_char,
    "float": ctypes.c_float,
    "int32_t": ctypes.c_int32,
    "uint32_t": ctypes.c_uint32,
    "int64_t": ctypes.c_int64,
    "uint64_t": ctypes.c_uint64,
    "size_t": ctypes.c_size_t,
}


def as_ctypes(spelled):
    if spelled == "char*":
        return ctypes.c_char_p
    if spelled.removesuffix("*") in header.handles():
        return ctypes.c_void_p
    if spelled.endswith("*"):
        return ctypes.POINTER(as_ctypes(spelled[:-1]))
    if spelled.endswith("]"):
        element, _, count = spelled[:-1].partition("[")
        return as_ctypes(element) * int(count)
    return NUMBERS.get(spelled) or getattr(_ffi, spelled)


def test_exported_symbols_are_the_declared_functions():
    listing = subprocess.run(["nm", "-D", "--defined-only", support.LIBRARY], capture_output=True, text=True, check=True)
    # nm also lists the version that a map file gives the symbols.
    symbols = {line.split()[-1].split("@")[0] for line in listing.stdout.splitlines() if " A " not in line}
    assert symbols == header.functions().keys()


def test_table_has_the_declared_functions():
    assert [name for name, _, _ in _ffi.FUNCTIONS] == list(header.functions())


@pytest.mark.parametrize("name, restype, argtypes", _ffi.FUNCTIONS, ids=[name for name, _, _ in _ffi.FUNCTIONS])
def test_types_of_a_function(name, restype, argtypes):
    result, arguments = header.functions()[name]
    assert restype is as_ctypes(result)
    assert list(argtypes) == [as_ctypes(a) for a in arguments]


def test_structs(tmp_path):
    declared = header.structs()
    assert {s.__name__ for s in _ffi.STRUCTS} == declared.keys()
    sizes = [f"sizeof({name})" for name in declared]
    offsets = [f"offsetof({name}, {field})" for name, fields in declared.items() for field, _ in fields]
    values = header.computed(sizes + offsets, tmp_path)
    for struct in _ffi.STRUCTS:
        name = struct.__name__
        assert struct._fields_ == [(field, as_ctypes(spelled)) for field, spelled in declared[name]]
        assert ctypes.sizeof(struct) == values[f"sizeof({name})"]
        for field, _ in struct._fields_:
            assert getattr(struct, field).offset == values[f"offsetof({name}, {field})"], (name, field)


def test_numbers(tmp_path):
    values = header.computed([*header.constants(), "GQ_ABI_VERSION", "GQ_CPU"], tmp_path)
    statuses = {name: value for name, value in values.items() if name.startswith("GQ_ERROR_")}
    assert sorted(_errors.BY_STATUS) == sorted(statuses.values())
    for name, value in statuses.items():
        words = name.removeprefix("GQ_ERROR_").split("_")
        assert _errors.BY_STATUS[value].__name__ == "".join(w.capitalize() for w in words) + "Error"
        assert _ffi.lib.gq_status_name(value).decode() == name
    for name in ("GQ_ABI_VERSION", "GQ_CPU", "GQ_EXEC_SETTLED", "GQ_HIGH_NIBBLE_FIRST", "GQ_LOW_NIBBLE_FIRST"):
        assert getattr(_ffi, name) == values[name]
    for name, value in values.items():
        if name.startswith("GQ_FORMAT_"):
            assert quant.format_number(name.removeprefix("GQ_FORMAT_").lower()) == value
    short = {"GQ_BOOL": "bool", "GQ_F4": "float4_e2m1fn", "GQ_BF16": "bfloat16", "GQ_C64": "complex64", "GQ_F8_E8M0": "float8_e8m0fnu"}
    short |= {"GQ_F6_E2M3": "float6_e2m3fn", "GQ_F6_E3M2": "float6_e3m2fn", "GQ_F8_E4M3": "float8_e4m3fn"}
    others = ("GQ_ERROR_", "GQ_FORMAT_", "GQ_ABI_", "GQ_CPU", "GQ_EXEC_", "GQ_OK", "GQ_HIGH_", "GQ_LOW_")
    dtypes = {name: value for name, value in values.items() if not name.startswith(others)}
    assert len(dtypes) == 22
    for name, value in dtypes.items():
        letter, rest = name[3], name[4:].lower()
        spelled = short.get(name) or {"F": "float", "I": "int", "U": "uint"}[letter] + rest
        assert _dtypes.from_number(value) == spelled


def test_one_class_per_status_with_a_builtin():
    classes = list(_errors.BY_STATUS.values())
    assert len(set(classes)) == len(classes)
    for c in classes:
        assert issubclass(c, _errors.GquantError)
        assert len(c.__bases__) > 1 and all(b.__module__ == "builtins" for b in c.__bases__[1:])
        assert str(c("the text")) == "the text"


def test_default_structs():
    for struct in _ffi.STRUCTS:
        made = struct()
        if hasattr(made, "struct_size"):
            assert made.struct_size == ctypes.sizeof(struct)
        if hasattr(made, "device"):
            assert made.device == _ffi.GQ_CPU


def test_execution():
    assert _ffi.execution() is None
    made = _ffi.execution(3)
    assert (made.device, made.threads, made.stream, made.workspace, made.workspace_bytes) == (_ffi.GQ_CPU, 3, 0, 0, 0)
    made = _ffi.execution(2, 1, 0x70, 0x1000, 64)
    assert (made.device, made.threads, made.stream, made.workspace, made.workspace_bytes) == (1, 2, 0x70, 0x1000, 64)
    assert _ffi.execution(device=0).device == 0
