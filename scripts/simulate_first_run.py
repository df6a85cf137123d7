"""When the first reply on a machine of so many cores would end, by what its parts take on this one.

    python scripts/simulate_first_run.py [--cores 2,4,8] [--no-check]

Measured: README's first command as far as its list of kernels and, with all of them kept, to its end; how long a
process that compiles takes to start; and the processor seconds of each kernel, each in a process of its own that has
compiled nothing but an empty one before. Then processes take kernels from the list as localrun.cpu.warmup's do. The
same with an empty cache on this machine's cores is run to check it. Wants a quiet machine; a minute on two cores. The
last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

from localrun.bundled import model_path
from localrun.cpu.warmup import WORTH_A_CHILD, Kernels, for_steps, needed, start_child
from localrun.gguf.file import open_gguf
from localrun.models.reader import read_config
from quant.decode.program import NOTHING

PROMPT = "Once upon a time, there was a little girl named Lily."
COMMAND = ["generate", "-p", PROMPT, "-n", "200", "--seed", "2"]
RUN = "import sys; from cli.main import main; sys.argv[0] = 'localrun'; main()"
# The same as far as the list, with an end that takes no time.
TO_THE_LIST = "import os; from localrun import opening; opening.warm_up = lambda *_: os._exit(0); " + RUN


def main() -> None:
    """Measure, reckon, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", default="2,4,8", help="with commas")
    parser.add_argument("--no-check", action="store_true", help="without the run that is compared")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LOCALRUN_CACHE"] = folder
        kernels, compiler_s = compile_times()
        clock(RUN)  # keeps what is not on the list, if anything
        found = {
            "to_the_list_s": statistics.median(clock(TO_THE_LIST) for _ in range(3)),
            "kept_s": statistics.median(clock(RUN) for _ in range(3)),
            "child_s": statistics.median(child_start() for _ in range(3)),
            "compiler_s": compiler_s,
        }
    found |= {"kernels": len(kernels), "kernels_s": sum(seconds for _, seconds in kernels)}
    longest = sorted(kernels, key=lambda kernel: -kernel[1])[:5]
    found["longest_s"] = {name: round(seconds, 3) for name, seconds in longest}
    times = [seconds for _, seconds in kernels]
    for cores in map(int, arguments.cores.split(",")):
        found[f"{cores}_cores_s"] = reckon(times, cores, found)
    if not arguments.no_check:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["LOCALRUN_CACHE"] = folder
            found["measured_s"] = clock(RUN)
    print(json.dumps({key: round(value, 3) if isinstance(value, float) else value for key, value in found.items()}))


def reckon(times: Sequence[float], cores: int, found: dict[str, float]) -> float:
    """When the reply ends: whoever is free takes the next kernel of the list, the first one after compiler_s."""
    listed, children = found["to_the_list_s"], min(cores - 1, len(times) // WORTH_A_CHILD)
    free = [listed + found["compiler_s"]] + [listed + found["child_s"] + found["compiler_s"]] * children
    for seconds in times:
        free[free.index(min(free))] += seconds  # there are more kernels than processes: each takes one
    return max(free) + found["kept_s"] - listed


def wanted() -> Kernels:
    """What the reply needs."""
    with open_gguf(model_path(None)) as file:
        types = {tensor.type.name for tensor in file.tensors.values()}
        return for_steps(read_config(file), types)


def compile_times() -> tuple[list[tuple[str, float]], float]:
    """Each kernel's name and processor seconds, and the compiler's start."""
    kernels = [kernel for kernel, _ in needed(wanted())]
    compiler_s = seconds_of(lambda: NOTHING.compiled)
    return [(kernel.__name__, in_a_process(lambda kernel=kernel: kernel.compiled)) for kernel in kernels], compiler_s


def seconds_of(do: Callable[[], object]) -> float:
    """Of this process."""
    began = time.process_time()
    do()
    return time.process_time() - began


def in_a_process(do: Callable[[], object]) -> float:
    """Seconds of a process that begins as this one is now."""
    read, write = os.pipe()
    if os.fork() == 0:
        os.write(write, str(seconds_of(do)).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        found = float(file.read())
    os.wait()
    return found


def clock(program: str) -> float:
    """Seconds from start to end of README's command."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", program, *COMMAND], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def child_start() -> float:
    """Seconds until a process that compiles has come through a list of which nothing is left."""
    kernels = wanted()
    began = time.perf_counter()
    child = start_child(kernels)
    child.wait()
    seconds = time.perf_counter() - began
    child.stdin.close()
    return seconds


if __name__ == "__main__":
    main()
