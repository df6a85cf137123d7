"""Two processes that want the same kernel."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

from quant.decode import program

TWO = """
import time
from quant.target import jit
class Slow(jit._KeptCFunc):
    def compile(self):
        time.sleep(0.3)  # as long as two processes need to meet
        super().compile()
jit._KeptCFunc = Slow
from quant.decode import program
print(program._nothing.compiled.cache_hits)
"""


def test_two_processes_do_not_compile_the_same_kernel(tmp_path: Path) -> None:
    """The second waits, and finds the kernel in the cache."""
    environment = os.environ | {"LOCALRUN_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", TWO]
    both = [subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert sorted(process.communicate()[0].split() for process in both) == [["0"], ["1"]]


def test_a_helper_inside_kernels_is_not_called_by_python() -> None:
    """Also once a kernel has it: there is no machine code to call."""
    program._step.compiled  # noqa: B018 (asking is compiling)
    with pytest.raises(TypeError, match="reset exists inside compiled functions alone"):
        program.reset(0, 1, 1)
