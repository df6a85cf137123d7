"""The ISA levels below this machine's, and processes that are limited to one."""

import os
import subprocess
import sys

from quant.target import isa

LOWER = [level for level in isa.LEVELS if isa.LEVELS.index(level) < isa.LEVELS.index(isa.detect())]


def run(level: str, *command: str, **variables: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"LOCALRUN_ISA": level} | variables
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=600)
