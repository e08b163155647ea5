"""Files to state dicts: the tensors of a quantized file, under the names and in the pieces that ComfyUI wants.

While names change, a 4-bit weight is a Weight: its codes and their state. What was read from a file stays where it is, codes
are views of it; nothing is decoded but what says so in a notice.
"""

import bisect
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Optional, Union

import torch
from torch import Tensor

from .. import quant
from .._errors import BadFileError
from ..torch import QuantState, dequantize_4bit, quantize_4bit

_STATE = ".quant_state.bitsandbytes__"
_STATISTICS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_ROW_ABSMAX, _INT8_LAYOUT = "SCB", "weight_format"
_DESCRIPTION = ".comfy_quant"  # ComfyUI's; of our formats it says nothing that the state does not

Rows = tuple[str, int, int]  # of a tensor: its name, the first, and behind the last


@dataclass(eq=False)
class Weight:
    """A 4-bit weight: the codes, uint8 of any shape, and the state that decodes them."""

    packed: Tensor
    state: QuantState

    @property
    def shape(self) -> torch.Size:
        return self.state.shape

    def dequantize(self) -> Tensor:
        return dequantize_4bit(self.packed, self.state)

    def absmax(self) -> Tensor:
        """The absmax of every block, float32 [blocks]; the exact values that nested statistics stand for."""
        state, nested = self.state, self.state.state2
        if nested is None:
            return state.absmax
        return quant.dequantize_blockwise(state.absmax, nested.absmax, nested.code, blocksize=nested.blocksize) + state.offset


Value = Union[Tensor, Weight]


def weights(tensors: Mapping[str, Tensor], notices: list[str], known: Mapping[str, Weight] = MappingProxyType({})) -> dict[str, Value]:
    """Takes what belongs to a weight together.

    tensors: with bitsandbytes' names, as in its files. LLM.int8 weights are decoded to float16, what they were. known: weights that are together
    already, and perhaps still being read. notices: gets what the user should know. BadFileError for statistics that are NaN or Inf, but
    those of known.
    """
    found: dict[str, Value] = {**tensors, **known}
    for key in [key for key in tensors if _STATE in key]:
        name = key.partition(_STATE)[0]
        if name not in found:
            raise BadFileError(f"{key} describes a weight that is not there: {name}")
        parts = {part: found.pop(f"{name}.{part}") for part in _STATISTICS if f"{name}.{part}" in found}
        parts[key[len(name) + 1 :]] = found.pop(key)
        packed = found[name].view(torch.uint8)
        found[name] = Weight(packed, QuantState.from_dict(parts, device=packed.device))
    for name in [name for name, value in found.items() if isinstance(value, Weight)]:
        found.pop(name.removesuffix(".weight") + _DESCRIPTION, None)
    check_statistics({name: value for name, value in found.items() if isinstance(value, Weight) and name not in known})
    decoded = [name for name in tensors if name.endswith("." + _ROW_ABSMAX)]
    for key in decoded:
        module = key.removesuffix(_ROW_ABSMAX)
        codes, absmax = found[module + "weight"], found.pop(key)
        found.pop(module + _INT8_LAYOUT, None)
        state = quant.QuantState("int8", tuple(codes.shape), codes.shape[1], "float16", codes.contiguous(), absmax)
        found[module + "weight"] = state.dequantize()
    if decoded:
        notices.append(f"{len(decoded)} LLM.int8 weights were decoded to float16, which takes twice the memory")
    return found


def check_statistics(weights: Mapping[str, Weight]) -> None:
    """BadFileError for statistics that are NaN or Inf."""
    sums = {}
    for name, weight in weights.items():
        state, nested = weight.state, weight.state.state2
        # In float64 the sum of finite float32 is finite; isfinite and all take a device four times as many steps.
        sums[name] = state.absmax.sum(dtype=torch.float64) if nested is None else nested.absmax.sum(dtype=torch.float64) + state.offset
    finite = torch.stack(list(sums.values())).isfinite().tolist() if sums else []  # a device is waited for once
    bad = [name for name, good in zip(sums, finite) if not good]
    if bad:
        raise BadFileError(
            f"{bad[0]}{f' and {len(bad) - 1} more weights' if len(bad) > 1 else ''} would decode to NaN or Inf, because the "
            "statistics hold such values. The file is damaged, or the model was before it was quantized: get it again, or "
            "convert it with `gquant convert --strict`, which refuses such weights"
        )


def row_map(convert: Callable[[dict[str, Tensor]], Optional[dict[str, Tensor]]], values: Mapping[str, Value]) -> Optional[dict[str, list[Rows]]]:
    """Where the rows of every tensor come from that convert makes: runs of rows of values, in their order.

    convert: a function that renames, cuts and joins the tensors of a state dict along their first dimension; it is shown numbers
    instead of rows, so that it need not know what a 4-bit weight is. None where it returns None.
    """
    names = list(values)
    sizes = [(value.shape or (1,))[0] for value in values.values()]
    # The rows of all tensors are counted through, and one number between two tensors is left out.
    offsets = [0, *itertools.accumulate(size + 1 for size in sizes)]
    numbered = {}
    for name, size, offset in zip(names, sizes, offsets):
        numbered[name] = torch.arange(offset, offset + size).reshape(size, *[1] * (len(values[name].shape) - 1))
    converted = convert(numbered)
    if converted is None:
        return None
    unused = torch.ones(offsets[-1], dtype=torch.bool)
    unused[torch.tensor(offsets[1:]) - 1] = False
    maps: dict[str, list[Rows]] = {}
    for target, tensor in converted.items():
        numbers = tensor.reshape(-1)
        # A row that convert never wrote holds whatever was in memory.
        outside = ((numbers < 0) | (numbers >= len(unused))).any()
        if outside or not unused[numbers].all() or len(numbers.unique()) < len(numbers):
            raise BadFileError(f"parts of {target} are missing in the file: is it one of several? Get it again, whole")
        unused[numbers] = False
        ends = [*(numbers.diff() != 1).nonzero().flatten().add(1).tolist(), len(numbers)]
        runs = maps[target] = []
        for start, end in zip([0, *ends], ends):
            first = int(numbers[start])
            i = bisect.bisect(offsets, first) - 1
            runs.append((names[i], first - offsets[i], first - offsets[i] + end - start))
    return maps


def rearranged(values: Mapping[str, Value], maps: Mapping[str, list[Rows]], notices: list[str]) -> dict[str, Value]:
    """The tensors that maps, of row_map, describe.

    4-bit weights of one format and blocksize are joined as they are, if they are cut at borders of blocks, as they are where
    the row length is divisible by the blocksize; nested statistics, whose offsets differ, become the float32 that they stand for. Else
    they are decoded and, if all of them were 4-bit, quantized again, which a notice says.
    """
    requantized, dense, made = [], [], {}
    for target, runs in maps.items():
        parts = [(values[name], first, last) for name, first, last in runs]
        value, first, last = parts[0]
        if len(parts) == 1 and (first, last) == (0, (value.shape or (1,))[0]):
            made[target] = value
        elif (joined := _join(parts)) is not None:
            made[target] = joined
        else:
            rows = torch.cat([_plain(value)[first:last] for value, first, last in parts])
            quantized = [value for value, _, _ in parts if isinstance(value, Weight)]
            if len(quantized) == len(parts):
                state = quantized[0].state
                rows = Weight(*quantize_4bit(rows, state.blocksize, state.nested, state.quant_type))
            (requantized if len(quantized) == len(parts) else dense).append(target)
            made[target] = rows
    if requantized:
        notices.append(f"{len(requantized)} joined weights had to be quantized a second time, such as {requantized[0]}: their rows are no whole blocks")
    if dense:
        notices.append(f"{len(dense)} weights were decoded to be joined with parts that are not quantized, such as {dense[0]}")
    return made


def _plain(value: Value) -> Tensor:
    return value.dequantize() if isinstance(value, Weight) else value


def _join(parts: list[tuple[Value, int, int]]) -> Optional[Value]:
    """The rows one after the other, nothing decoded; None if that cannot be."""
    if not any(isinstance(value, Weight) for value, _, _ in parts):
        return torch.cat([value[first:last] for value, first, last in parts])
    if not all(isinstance(value, Weight) for value, _, _ in parts):
        return None
    state, columns = parts[0][0].state, parts[0][0].shape[1:].numel()
    blocksize, count = state.blocksize, 0
    codes, absmax = [], []
    for weight, first, last in parts:
        start, end = first * columns, last * columns
        # Every part begins a block; only the last may end within one, where its weight ends.
        if count % blocksize or start % blocksize or (end % blocksize and last != weight.shape[0]):
            return None
        if (weight.state.quant_type, weight.state.blocksize, weight.shape[1:]) != (state.quant_type, blocksize, parts[0][0].shape[1:]):
            return None
        codes.append(weight.packed.reshape(-1)[start // 2 : (end + 1) // 2])
        absmax.append(weight.absmax()[start // blocksize : -(end // -blocksize)])
        count += end - start
    shape = torch.Size((sum(last - first for _, first, last in parts), *parts[0][0].shape[1:]))
    joined = QuantState(torch.cat(absmax), shape, state.code, blocksize, state.quant_type, state.dtype)
    return Weight(torch.cat(codes), joined)
