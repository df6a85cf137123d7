"""Print what the GPU half's proof finds of each deliberate fault: the fault, the part that found it, and its line.

    python scripts/gpu_faults.py [--only WORDS] [--alone]

Needs no card: faults are put into what stands in for one (tests/support/gpu_faults). All parts up to the one that
fails are run; --alone runs the part that is expected to find it, which is quicker. Exits with 1 if one goes unfound.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

import gpu_device  # noqa: F401  before triton
import pytest
from gpu_faults.every import FAULTS
from gpu_faults.proving import found


def main() -> int:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="faults whose names have these words")
    parser.add_argument("--alone", action="store_true", help="only the part that is expected to find it")
    arguments = parser.parse_args()
    unfound = 0
    for fault in FAULTS:
        if arguments.only in fault.name:
            with pytest.MonkeyPatch.context() as patch:
                verdict = found(fault, patch, arguments.alone)
            last = verdict.outcomes[-1]
            is_found = any(re.fullmatch(fault.line, line) for line in last.faults) and last.name == fault.part
            unfound += not is_found
            mark = "" if is_found else "NOT AS EXPECTED  "
            print(f"{fault.name:<48} {last.name:<8} {mark}{verdict.fault or 'passed'}", flush=True)
    return int(unfound > 0)


if __name__ == "__main__":
    sys.exit(main())
