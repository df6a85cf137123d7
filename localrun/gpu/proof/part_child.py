"""The child process of child.py: `python -m localrun.gpu.proof.part_child PART PARENT`, a task on stdin.

Ends with its parent, however that ends: Linux sends it a signal then.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from typing import Any, BinaryIO

from localrun.gpu.proof.task import Findings, Task

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent(parent: int) -> None:
    """Have the system end this process when the other one ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before
            os._exit(1)


def send(out: BinaryIO, message: dict[str, Any]) -> None:
    """A line."""
    out.write(json.dumps(message).encode() + b"\n")
    out.flush()


def main() -> None:
    """Do the part."""
    name, parent = sys.argv[1], int(sys.argv[2])
    end_with_parent(parent)
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever else is printed
    task = Task.of(json.load(sys.stdin))
    from localrun.gpu.proof.parts import carry_out

    findings = Findings(lambda what: send(out, {"doing": what}))
    carry_out(name, task, findings)
    send(out, {"faults": findings.faults, "figures": findings.figures, "choices": findings.choices})
    os._exit(0)  # a card in a bad state may have the usual end wait for ever


if __name__ == "__main__":
    main()
