"""`python -m gquant` is the command line: it becomes the program in this package."""

import os
import sys
from pathlib import Path

program = Path(__file__).with_name("gquant")
if not program.exists():
    sys.exit(f"{program} is not there: only the wheel has it; in a source tree use bin/gquant")
os.execv(program, ["gquant", *sys.argv[1:]])
