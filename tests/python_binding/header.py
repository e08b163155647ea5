"""include/gquant.h as a C parser sees it."""

import functools
import subprocess

from pycparser import CParser, c_ast

import support

_TYPES = """
typedef signed char int8_t; typedef unsigned char uint8_t; typedef int int32_t; typedef unsigned int uint32_t;
typedef long int64_t; typedef unsigned long uint64_t; typedef unsigned long uintptr_t; typedef unsigned long size_t;
"""


@functools.cache
def _tree():
    text = support.HEADER.read_text().replace("#include <stddef.h>", "").replace("#include <stdint.h>", "")
    command = ["cc", "-E", "-P", "-D__attribute__(x)=", "-xc", "-"]
    return CParser().parse(subprocess.run(command, input=_TYPES + text, capture_output=True, text=True, check=True).stdout)


def _typedefs():
    return {node.name: node.type for node in _tree().ext if isinstance(node, c_ast.Typedef)}


def _spell(node):
    """A type as text: what it is behind typedefs of numbers, such as "int32_t", "const char *", "gq_state **", "char[256]"."""
    if isinstance(node, c_ast.PtrDecl):
        return _spell(node.type) + "*"
    if isinstance(node, c_ast.ArrayDecl):
        return f"{_spell(node.type)}[{node.dim.value}]"
    if isinstance(node, c_ast.TypeDecl):
        return _spell(node.type)
    if isinstance(node, c_ast.Struct):
        return node.name
    name = " ".join(node.names)
    alias = _typedefs().get(name)
    if name.startswith("gq_") and isinstance(alias, c_ast.TypeDecl) and isinstance(alias.type, c_ast.IdentifierType):
        return _spell(alias)  # gq_status, gq_addr, …
    return name


def functions():
    """{name: (result, [arguments])}"""
    found = {}
    for node in _tree().ext:
        if isinstance(node, c_ast.Decl) and isinstance(node.type, c_ast.FuncDecl):
            arguments = [_spell(p.type) for p in node.type.args.params]
            found[node.name] = (_spell(node.type.type), [a for a in arguments if a != "void"])
    return found


def structs():
    """{name: [(field, type)]}, of the structs whose fields are known."""
    return {
        name: [(field.name, _spell(field.type)) for field in node.type.decls]
        for name, node in _typedefs().items()
        if isinstance(node, c_ast.TypeDecl) and isinstance(node.type, c_ast.Struct) and node.type.decls
    }


def handles():
    """The names of structs that only pointers are known of."""
    return {
        name
        for name, node in _typedefs().items()
        if isinstance(node, c_ast.TypeDecl) and isinstance(node.type, c_ast.Struct) and not node.type.decls
    } - structs().keys()


def constants():
    """The names of all enumerators."""
    enums = [node.type for node in _tree().ext if isinstance(node, c_ast.Decl) and isinstance(node.type, c_ast.Enum)]
    return [value.name for enum in enums for value in enum.values.enumerators]


def computed(expressions, folder):
    """The values of C expressions of integers, by their text, as the C compiler finds them."""
    source, program = folder / "values.c", folder / "values"
    lines = "".join(f'    printf("%lld\\n", (long long)({e}));\n' for e in expressions)
    source.write_text(f"#include <gquant.h>\n#include <stdio.h>\nint main(void) {{\n{lines}    return 0;\n}}\n")
    subprocess.run(["cc", f"-I{support.HEADER.parent}", "-o", program, source], check=True)
    output = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    return dict(zip(expressions, map(int, output.split()), strict=True))
