"""The assembly of the kernels of level amx, compiled for a CPU that has it, on any machine: nothing of it is run.

python amx_assembly.py prints {kernel: assembly} as JSON. LOCALRUN_CACHE must be empty: Numba keeps no assembly.
"""

import json

from numba import config

from quant.target import isa

# What quant.target.isa finds on a Sapphire Rapids, before the kernels are compiled at import.
config.CPU_NAME = "sapphirerapids"
config.CPU_FEATURES = ",".join(f"+{feature}" for feature in sorted(isa.FEATURES["amx"] | {"avx", "bmi", "popcnt"}))
isa.LEVEL = "amx"

from quant.gemm import linear as packed_linear  # noqa: E402
from quant.gemm import microkernel  # noqa: E402

KERNELS = {
    "minimum": microkernel._minimum_tile,
    "offset": microkernel._offset_tile,
    "halves": microkernel._halves_tile,
    "bytes": microkernel._bytes_tile,
    "minima": microkernel._minima_tile,
    "multiply": packed_linear._multiply,
}

if __name__ == "__main__":
    print(json.dumps({name: kernel.compiled._library.get_asm_str() for name, kernel in KERNELS.items()}))
