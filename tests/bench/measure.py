"""Runs a command and prints its seconds, peak memory in MiB and exit code as JSON; its own output is dropped.

    python -S measure.py COMMAND…

A process of its own, because Linux counts the memory of the process that starts another one as the other's peak.
This one is small; one that has torch loaded is not.
"""

import json
import os
import sys
import time

null = os.open(os.devnull, os.O_WRONLY)
start = time.perf_counter()
pid = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, null, 1)])
_, status, usage = os.wait4(pid, 0)
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "peak": usage.ru_maxrss / 1024, "code": os.waitstatus_to_exitcode(status)}))
