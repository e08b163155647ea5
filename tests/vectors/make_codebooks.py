#!/usr/bin/env python3
"""Makes codebooks.json: the 8-bit codebooks that bitsandbytes' Python builds, as the bits of their float32 values.

    python make_codebooks.py            # write codebooks.json
    python make_codebooks.py --check    # only compare; exit code 1 if it would change

Needs torch and bitsandbytes 0.50; no GPU. The dynamic maps need a torch whose CPU code uses fused multiply-add, as all of
PyPI's for x86-64 and arm64 do: others differ in the last bit of some values.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from bitsandbytes import functional

PATH = Path(__file__).resolve().parent / "codebooks.json"


def codebooks():
    for signed in (True, False):
        yield {"map": "dynamic", "signed": signed}, functional.create_dynamic_map(signed)
        for bits in (4, 7, 8):
            for zero in (True, False):
                code = functional.create_linear_map(signed, bits, zero)
                yield {"map": "linear", "signed": signed, "bits": bits, "zero": zero}, code
        for bits in (4, 8):
            for exponent in range(1, bits - signed + 1):
                mantissa = bits - signed - exponent
                code = functional.create_fp8_map(signed, exponent, mantissa, bits)
                yield {"map": "fp8", "signed": signed, "exponent": exponent, "mantissa": mantissa}, code


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="only compare; exit code 1 if it would change")
    args = parser.parse_args()
    lines = []
    for fields, code in codebooks():
        bits = "".join(f"{v & 0xFFFFFFFF:08x}" for v in code.float().view(torch.int32).tolist())
        lines.append(json.dumps({**fields, "values": bits}))
    text = "[\n" + ",\n".join(lines) + "\n]\n"
    if args.check:
        return int(text != PATH.read_text())
    PATH.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
