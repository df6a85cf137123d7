"""The ISA levels below this machine's, and processes that are limited to one.

Tests marked `levels` run again at each of them, in one process a level (quant/test_isa.py).
"""

import os
import subprocess
import sys

import pytest

from quant.target import isa

_LOWER = [level for level in isa.LEVELS if isa.LEVELS.index(level) < isa.LEVELS.index(isa.detect())]
_NONE = pytest.param("none", marks=pytest.mark.skip(reason=f"this CPU's own level is the lowest, {isa.detect()}"))

lower = pytest.mark.parametrize("level", _LOWER or [_NONE])
next_lower = pytest.mark.parametrize("level", _LOWER[-1:] or [_NONE])


def run(level: str, *command: str, **variables: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"LOCALRUN_ISA": level} | variables
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=900)
