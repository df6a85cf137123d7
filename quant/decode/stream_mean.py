"""The mean of each token's streams behind a layer, which drafts read (DSpark of DeepSeek-V4)."""

import numpy as np

from quant.decode.program import HEADER, NOTHING, PHASE, Phase
from quant.decode.streams import N_STREAMS
from quant.simd.memory import load_f32, store_f32
from quant.simd.struct import address, i64, struct
from quant.target.jit import kernel

MEAN = struct(
    "StreamMean",
    phase=PHASE,
    x=address,  # float32 (MOST_TOKENS, N_STREAMS, width)
    width=i64,
    out=address,  # float32 (MOST_TOKENS, out_width), of which the first `width` are written
    out_width=i64,
)


@kernel("void(int64, int64, int64)")
def _run_mean(phase, item, work):
    """Item t: token t's mean."""
    a, t = MEAN(phase), item
    row = 4 * a.width
    x, out = a.x + N_STREAMS * row * t, a.out + 4 * a.out_width * t
    for i in range(0, row, 4):
        total = load_f32(x + i) + load_f32(x + row + i) + load_f32(x + 2 * row + i) + load_f32(x + 3 * row + i)
        store_f32(out + i, total * np.float32(1 / N_STREAMS))


def stream_mean_phase(x: int, width: int, out: int, out_width: int) -> Phase:
    """Means of streams at x, (T, N_STREAMS, width), to `width` values at `out` of rows out_width long."""
    arguments = MEAN.pack(phase=HEADER, x=x, width=width, out=out, out_width=out_width)
    return Phase(NOTHING, _run_mean, 1, arguments, 0, per_token=True)
