"""Digests of the machine code of all kernels at every ISA level, names aside: to show that a change leaves it alone.

    python scripts/kernel_digest.py before.json && <change> && python scripts/kernel_digest.py after.json before.json

Compiles everything anew, in a cache of its own. The last line of stdout is one JSON document: kernels and one digest a
level, and, given an earlier file, the kernels that are not in both. Exit 1 if there are any.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Run for one level: prints "name digest" of each kernel, wherever a module keeps it: by a name, in a list, a dictionary
# or a format. Mangled names hold the module's; so do strings, section comments and the places for the
# environments of functions, inlined ones included, which are no instructions.
_CHILD = r"""
import dataclasses, hashlib, importlib, pkgutil, re
import quant
from numba.core.ccallback import CFunc
from quant.target import isa
from quant.target.jit import Kernel

def kernels_in(value):
    if isinstance(value, CFunc):
        yield value
    elif isinstance(value, Kernel):
        if isa.has(getattr(value, "level", "generic")):
            yield value.compiled
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from kernels_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from kernels_in(getattr(value, field.name))

kernels = {}
aside = re.compile(r"\s*\.(file|ident|ascii|asciz|size|string|type|comm)|\s*#")
for module in pkgutil.walk_packages(quant.__path__, "quant."):
    if not module.ispkg and not module.name.endswith("amx_emulated"):
        for value in vars(importlib.import_module(module.name)).values():
            kernels |= {id(kernel): kernel for kernel in kernels_in(value)}
for kernel in kernels.values():
    names = {}
    text = kernel._library.get_asm_str()
    lines = [line for line in text.splitlines() if not aside.match(line)]
    symbol = re.compile(r"[\w.$@]*(?:_ZN|\.const\.|numba_)[\w.$@]*")
    text = symbol.sub(lambda match: names.setdefault(match[0], f"S{len(names)}"), "\n".join(lines))
    print(kernel.__name__, hashlib.sha256(text.encode()).hexdigest()[:16])
"""


def digests(level: str) -> list[str]:
    """ "name digest" of each kernel at one level, sorted."""
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"LOCALRUN_ISA": level, "LOCALRUN_CACHE": cache, "PYTHONPATH": os.getcwd()}
        done = subprocess.run([sys.executable, "-c", _CHILD], env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"level {level}: {done.stderr[-2000:]}")
    return sorted(done.stdout.split("\n")[:-1])


def levels() -> list[str]:
    """All levels that this CPU can be limited to."""
    code = "from quant.{} import isa; print(*isa.LEVELS[: isa.LEVELS.index(isa.detect()) + 1])"
    folder = "target" if Path("quant/target").is_dir() else ""
    command = [sys.executable, "-c", code.format(folder).replace("quant. ", "quant ")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("before", type=Path, nargs="?")
    options = parser.parse_args()
    found = {level: digests(level) for level in levels()}
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    report = {}
    before = json.loads(options.before.read_text(encoding="utf-8")) if options.before else found
    for level, kernels in found.items():
        code = [kernel.split()[1] for kernel in kernels]
        earlier = Counter(kernel.split()[1] for kernel in before.get(level, []))
        changed = [kernel for kernel in kernels if kernel.split()[1] not in earlier]
        lost = [kernel for kernel in before.get(level, []) if kernel.split()[1] not in set(code)]
        whole = hashlib.sha256("\n".join(sorted(code)).encode()).hexdigest()[:16]
        report[level] = {"kernels": len(kernels), "digest": whole, "changed": changed, "lost": lost}
    print(json.dumps(report))
    return int(any(entry["changed"] or entry["lost"] for entry in report.values()))


if __name__ == "__main__":
    sys.exit(main())
