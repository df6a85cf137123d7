"""Compiles kernels beside the process that needs them; run as a script by warmup.py, never imported.

Reads {"path", "kernels"} as a line of JSON from stdin. All go through the same list and leave out what is kept
and what another one is at. Ends when its stdin does, so with its parent: nobody would wait for the rest.
"""

import json
import select
import sys

if __name__ == "__main__":
    request = json.loads(sys.stdin.buffer.readline())
    sys.path[:] = request["path"]

    from localrun.cpu.warmup import Kernels, needed
    from quant.target import jit

    for kernel, _ in needed(Kernels(**request["kernels"])):
        if select.select([sys.stdin], [], [], 0)[0]:
            break
        jit.keep_unless_taken(kernel)
