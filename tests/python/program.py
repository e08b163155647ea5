"""Runs the program that the tests are about."""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GQUANT = ROOT / "bin" / "gquant"


def gquant(*args, timeout=120, env=None, **options):
    """The finished process; env adds to the environment."""
    return subprocess.run(
        [GQUANT, *map(str, args)], capture_output=True, text=True, timeout=timeout, env={**os.environ, **(env or {})}, **options
    )


def ok(*args, **options):
    """What a command that must succeed prints."""
    p = gquant(*args, **options)
    assert p.returncode == 0, f"gquant {args}: exit {p.returncode}\n{p.stderr}"
    return p.stdout


def ok_json(*args, **options):
    return json.loads(ok(*args, "--json", **options))


def start(*args, env=None, **options):
    return subprocess.Popen(
        [GQUANT, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **(env or {})}, **options
    )


def peak_memory(*args):
    """The MiB that a command which must succeed had in memory at most."""
    measure = ROOT / "tests" / "bench" / "measure.py"
    p = subprocess.run([sys.executable, "-S", measure, GQUANT, *map(str, args)], stdout=subprocess.PIPE, check=True)
    result = json.loads(p.stdout)
    assert result["code"] == 0
    return result["peak"]


def wait_until_written(process, size, limit=60):
    """Waits until the process has written so many bytes; false if it ended before."""
    deadline = time.monotonic() + limit
    while process.poll() is None:
        assert time.monotonic() < deadline, f"less than {size} bytes written in {limit} s"
        try:
            counters = dict(line.split(": ") for line in Path(f"/proc/{process.pid}/io").read_text().splitlines())
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(counters["wchar"]) >= size:
            return True
    return False


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def listing(folder):
    """Every file below a folder with its content's hash: what must not change when a command fails."""
    return {str(p.relative_to(folder)): sha256(p) if p.is_file() else "" for p in sorted(Path(folder).rglob("*"))}
