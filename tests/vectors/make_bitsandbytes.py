#!/usr/bin/env python3
"""Makes the golden files in bitsandbytes/ again, with the real bitsandbytes on a CUDA GPU.

The files hold their own inputs. Every output is computed from them once more, compared, and with differences the
file is written back:

    python make_bitsandbytes.py            # update what differs
    python make_bitsandbytes.py --check    # only compare; exit code 1 if anything differs
    python make_bitsandbytes.py --list     # what belongs to what; needs no GPU

Needs torch with CUDA, bitsandbytes 0.50 and safetensors. Takes a few seconds.

What may differ on another GPU, and is no defect: a nested offset, since it is a mean whose order of summation
depends on the device, and with it the statistics that follow from it.
"""

import argparse
import hashlib
import json
import re
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

FOLDER = Path(__file__).resolve().parent / "bitsandbytes"
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
TYPES = ("nf4", "fp4")


def functional():
    """bitsandbytes is imported late: --list works without it."""
    import bitsandbytes.functional

    return bitsandbytes.functional


# ---- one function per file: from its tensors to those of them that are outputs, computed again


def quantize4(x, quant_type, blocksize):
    """packed, absmax and dequantized values of one tensor, flat."""
    F = functional()
    packed, state = F.quantize_4bit(x.cuda(), blocksize=blocksize, compress_statistics=False, quant_type=quant_type)
    return {"packed": packed.flatten(), "absmax": state.absmax, "dequant": F.dequantize_4bit(packed, state).flatten()}


def blockwise4(t):
    """<dtype>.input; <dtype>.<type>.<blocksize>.{packed,absmax,dequant}; some dequant are left out to save space."""
    for name in t:
        if m := re.fullmatch(r"(\w+)\.(nf4|fp4)\.(\d+)\.packed", name):
            for part, value in quantize4(t[f"{m[1]}.input"], m[2], int(m[3])).items():
                yield f"{m[1]}.{m[2]}.{m[3]}.{part}", value


def tails4(t):
    """<dtype>.<n>.input; <dtype>.<n>.<type>.<blocksize>.{packed,absmax,dequant}"""
    for name in t:
        if m := re.fullmatch(r"(\w+\.\d+)\.(nf4|fp4)\.(\d+)\.packed", name):
            for part, value in quantize4(t[f"{m[1]}.input"], m[2], int(m[3])).items():
                yield f"{m[1]}.{m[2]}.{m[3]}.{part}", value


def special4(t):
    """<dtype>.input, a row of 64 per case of __metadata__'s rows; <dtype>.<type>.{packed,absmax,dequant}"""
    for dtype in DTYPES:
        for quant_type in TYPES:
            for part, value in quantize4(t[f"{dtype}.input"], quant_type, 64).items():
                yield f"{dtype}.{quant_type}.{part}", value


def thresholds4(t):
    """Values on and beside the thresholds; the codebooks as bitsandbytes stores them."""
    F = functional()
    for quant_type in TYPES:
        yield f"{quant_type}.code", F.get_4bit_type(quant_type, device="cuda")
        for part, value in quantize4(t[f"{quant_type}.f32.input"], quant_type, 64).items():
            yield f"{quant_type}.f32.{part}", value
    yield "dynamic.code", F.create_dynamic_map()


def nested8(t):
    """b8.<dtype>.<blocksize>: 8-bit blockwise with the dynamic map. nested.<dtype>.<type>: nested statistics."""
    F = functional()
    for name in t:
        x = t[name]
        if m := re.fullmatch(r"(b8\.\w+\.(\d+))\.input", name):
            codes, state = F.quantize_blockwise(x.cuda(), blocksize=int(m[2]))
            yield f"{m[1]}.codes", codes
            yield f"{m[1]}.absmax", state.absmax
            yield f"{m[1]}.dequant", F.dequantize_blockwise(codes, state)
        elif m := re.fullmatch(r"(nested\.\w+\.(nf4|fp4))\.input", name):
            x = x.cuda()
            plain = F.quantize_4bit(x, compress_statistics=False, quant_type=m[2])[1]
            packed, state = F.quantize_4bit(x, compress_statistics=True, quant_type=m[2])
            yield f"{m[1]}.packed", packed.flatten()
            yield f"{m[1]}.absmax_f32", plain.absmax
            yield f"{m[1]}.absmax_u8", state.absmax
            yield f"{m[1]}.nested_absmax", state.state2.absmax
            yield f"{m[1]}.offset", state.offset.reshape(1)
            yield f"{m[1]}.dequant", F.dequantize_4bit(packed, state)


def int8(t):
    """row.<threshold>: LLM.int8 row-wise quantization. mm: its matrix product and the rescaling."""
    F = functional()
    for name in t:
        if m := re.fullmatch(r"row\.(\d+\.\d+)\.input", name):
            # A copy: bitsandbytes may change its argument.
            codes, stats, columns = F.int8_vectorwise_quant(t[name].cuda().clone(), threshold=float(m[1]))
            yield f"row.{m[1]}.codes", codes
            yield f"row.{m[1]}.stats", stats
            yield f"row.{m[1]}.outlier_cols", torch.empty(0, dtype=torch.int64) if columns is None else columns
    acc = F.int8_linear_matmul(t["mm.a"].cuda(), t["mm.w"].cuda())
    yield "mm.acc", acc
    yield "mm.out_f16", F.int8_mm_dequant(acc, t["mm.a_stats"].cuda(), t["mm.w_stats"].cuda())


def modules(t):
    """State dicts of modules; only <case>.reference, their dequantized weight, is an output."""
    F = functional()
    for name in t:
        if not (case := name.removesuffix(".reference")) or case == name:
            continue
        parts = {k[len(case) + 8 :]: v.cuda() for k, v in t.items() if k.startswith(f"{case}.weight.")}
        state = F.QuantState.from_dict(parts, device="cuda")
        yield name, F.dequantize_4bit(t[f"{case}.weight"].cuda(), state)


# ---- the JSON files


def exhaustive_input(dtype, exponents, mantissa):
    """Every value down to 2^-exponents of an absmax whose mantissa field is the given one, in blocks of 64.

    A block is the absmax and 63 values. The values are x, -x for x = 2^-e·(1 + m/M), e from 0 up and m from 0 up,
    without those above the absmax 1 + mantissa/M; zeros fill the last block.
    """
    count = 1 << {torch.bfloat16: 7, torch.float16: 10}[dtype]
    e = torch.arange(exponents + 1, dtype=torch.float64)[:, None]
    m = torch.arange(count, dtype=torch.float64)[None, :]
    x = (2.0**-e * (1 + m / count)).flatten()
    absmax = 1 + mantissa / count
    x = x[x <= absmax]
    x = torch.stack([x, -x], dim=1).flatten()
    x = torch.nn.functional.pad(x, (0, -len(x) % 63)).reshape(-1, 63)
    return torch.nn.functional.pad(x, (1, 0), value=absmax).to(dtype)


def exhaustive4(old):
    """SHA-256 of the packed bytes for every mantissa of the absmax."""
    F = functional()
    new = {k: v for k, v in old.items() if k in ("meta", "note")}
    for name in ("bf16", "f16"):
        exponents = old[name]["E"]
        new[name] = {"E": exponents}
        inputs = [exhaustive_input(DTYPES[name], exponents, i).cuda() for i in range(len(old[name]["nf4"]))]
        for quant_type in TYPES:
            packed = [F.quantize_4bit(x, blocksize=64, quant_type=quant_type)[0] for x in inputs]
            new[name][quant_type] = [hashlib.sha256(p.cpu().numpy().tobytes()).hexdigest() for p in packed]
    return new


def rcp_approx(old):
    """How far rcp.approx.ftz.f32, which --use_fast_math makes of bitsandbytes' 1/absmax, is from 1/absmax."""
    approximate = torch.cuda.jiterator._create_jit_fn(
        'template <typename T> T rcp(T x) { T y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }'
    )
    new = dict(old)
    for name, bits in (("bf16", 7), ("f16", 10)):
        x = 1 + torch.arange(1 << bits, dtype=torch.float32) / (1 << bits)
        exact = (1 / x.double()).float()  # correctly rounded: no quotient of so short numbers is near a tie
        ulps = approximate(x.cuda()).cpu().view(torch.int32) - exact.view(torch.int32)
        if ulps.abs().max() > 1:
            raise SystemExit("rcp.approx is more than one ulp off on this GPU: the table has no sign for that")
        new[name] = "".join("-0+"[i + 1] for i in ulps.tolist())
    return new


# ---- compare and write


def same(a, b):
    """Bit for bit, except that a NaN is a NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.dtype.is_floating_point:
        nan = a.isnan()
        if not torch.equal(nan, b.isnan()):
            return False
        a, b = a.masked_fill(nan, 0), b.masked_fill(nan, 0)
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)) if a.dim() else torch.equal(a, b)


def here():
    """What the results come from."""
    import bitsandbytes

    return {
        "source": f"bitsandbytes {bitsandbytes.__version__} CUDA backend",
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }


def remake_safetensors(path, compute, check):
    with safe_open(path, "pt") as f:
        metadata = f.metadata()
        tensors = {name: f.get_tensor(name) for name in f.keys()}
    differing, seen = [], 0
    for name, value in compute(dict(tensors)):
        if name not in tensors:
            continue
        seen += 1
        value = value.cpu().reshape(tensors[name].shape) if value.numel() == tensors[name].numel() else value.cpu()
        if not same(value, tensors[name]):
            differing.append(name)
            tensors[name] = value.contiguous()
    if seen == 0:
        raise SystemExit(f"{path.name}: nothing was computed; have its names changed?")
    if differing and not check:
        save_file(tensors, path, metadata={**metadata, **here()})
    return seen, differing


def remake_json(path, compute, check):
    old = json.loads(path.read_text())
    new = compute(old)
    differing, seen = [], 0
    for name in ("bf16", "f16"):
        for part, values in new[name].items() if isinstance(new[name], dict) else [("", new[name])]:
            if part == "E":
                continue
            before = old[name][part] if part else old[name]
            seen += len(values)
            differing += [f"{name}.{part}[{i}]" for i, (a, b) in enumerate(zip(values, before, strict=True)) if a != b]
    if differing and not check:
        if "meta" in new:
            new["meta"] |= here()
        else:
            new["device"] = here()["device"]
        path.write_text(json.dumps(new))
    return seen, differing


FILES = {
    "blockwise4.safetensors": blockwise4,
    "tails4.safetensors": tails4,
    "special4.safetensors": special4,
    "thresholds4.safetensors": thresholds4,
    "nested8.safetensors": nested8,
    "int8.safetensors": int8,
    "modules.safetensors": modules,
    "exhaustive4.json": exhaustive4,
    "rcp_approx.json": rcp_approx,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="only compare; exit code 1 if anything differs")
    parser.add_argument("--list", action="store_true", help="print the files and what they hold")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the golden files are")
    args = parser.parse_args()
    if args.list:
        for name, compute in FILES.items():
            print(f"{name}: {compute.__doc__}")
        return 0
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA GPU: these files are bitsandbytes' CUDA results and are made by it only")
    failed = False
    for name, compute in FILES.items():
        remake = remake_json if name.endswith(".json") else remake_safetensors
        seen, differing = remake(args.folder / name, compute, args.check)
        print(f"{name}: {seen} outputs, {len(differing)} differ", *differing[:10], flush=True)
        failed |= bool(differing)
    return 1 if failed and args.check else 0


if __name__ == "__main__":
    sys.exit(main())
