"""Calls quant's kernels from NumPy arrays, and makes weights of every format for their tests."""

import ctypes

import ggml
import gguf
import numpy as np

from quant.block_format import Format, halves
from quant.formats import registry
from quant.gemv import activations
from quant.matrix import QuantMatrix, quant_matrix
from quant.ops import linear
from quant.target.jit import Kernel, kernel
from quant.threads.pool import Pool, aligned_bytes

_INT64 = ctypes.c_int64
_BYTE_SCALES = {"MXFP4": (1, 118, 126), "NVFP4": (4, 0, 56)}  # how many a block begins with; their range near 1/64
COLS = 1536  # six blocks of 256: the four that kernels take together, and two


def call(kernel_: Kernel, *arguments: int | np.ndarray) -> None:
    """Call a kernel of int64 arguments; arrays go by their addresses."""
    values = [a.ctypes.data if isinstance(a, np.ndarray) else a for a in arguments]
    ctypes.CFUNCTYPE(None, *[_INT64] * len(values))(kernel_.address)(*values)


@kernel("void(int64, int64, int64, int64)")
def _record(x, n_cols, integer, record):
    activations.write_q8(x, 0, n_cols, n_cols, integer != 0, record)


def record(x: np.ndarray, format_: Format) -> np.ndarray:
    """The activation record of float32 (K,)."""
    out = aligned_bytes(activations.q8_bytes(x.size))
    call(_record, x, x.size, int(format_.integer), out)
    return out


def rounded(x: np.ndarray, format_: Format) -> np.ndarray:
    """float32 (..., K) as a format's kernels see it: to 8 bits and back, or unchanged."""
    if not format_.integer:
        return x
    q, d = activations.q8_ref(x)
    return (q.reshape(*d.shape, activations.Q8_BLOCK) * d[..., None]).reshape(x.shape)


def scales_of(format_: Format) -> list[slice]:
    """The bytes of a block that hold its scales: f16 numbers, IQ1_M's of all kinds, or those of _BYTE_SCALES."""
    if format_.name == "IQ1_M":
        return [slice(48, 56)]
    return [slice(at, at + 2) for at in halves(format_.layout)] or [slice(0, _BYTE_SCALES[format_.name][0])]


def random_blocks(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """uint8 (..., row bytes): every bit pattern of the quants, with scales near 1/64 so that sums stay finite."""
    format_ = registry.get(name)
    if not format_.integer:
        values = rng.standard_normal(shape).astype(np.float32)
        return gguf.quants.quantize(values, gguf.GGMLQuantizationType[name]).view(np.uint8).reshape(*shape[:-1], -1)
    raw = rng.integers(0, 256, (*shape[:-1], format_.row_bytes(shape[-1])), dtype=np.uint8)
    blocks = raw.reshape(-1, format_.block_bytes)
    if name in _BYTE_SCALES:
        count, low, high = _BYTE_SCALES[name]
        blocks[:, :count] = rng.integers(low, high, (len(blocks), count))
        return raw
    if name == "IQ1_M":
        d = (rng.standard_normal(len(blocks)) / 64).astype(np.float16).view(np.uint16)
        words = blocks[:, 48:].view(np.uint16)
        words[:] = words & 0x0FFF | (d[:, None] >> [0, 4, 8, 12]).astype(np.uint16) << 12
        return raw
    for at in halves(format_.layout):
        scales = (rng.standard_normal(len(blocks)) / 64).astype(np.float16)
        blocks[:, at : at + 2] = scales[:, None].view(np.uint8)
    return raw


def random_weight(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> tuple[QuantMatrix, np.ndarray]:
    """A quantised matrix of `shape`, and its values by gguf's dequantize, float64."""
    raw = random_blocks(name, shape, rng)
    values = oracle(name, raw).reshape(shape).astype(np.float64)
    return quant_matrix(np.ascontiguousarray(raw).reshape(-1), registry.get(name), shape), values


def multiply(pool: Pool, weight: QuantMatrix, x: np.ndarray) -> np.ndarray:
    """linear.multiply on float32 (T, G, in) -> (T, G, out)."""
    out = np.full((*x.shape[:2], weight.n_rows), np.nan, np.float32)
    linear.multiply(pool, weight, x.ctypes.data, x.shape[0], out.ctypes.data)
    return out


def oracle(name: str, raw: np.ndarray) -> np.ndarray:
    """float32 by gguf's dequantize, or libggml's where the package has none."""
    kind = gguf.GGMLQuantizationType[name]
    with np.errstate(all="ignore"):
        return ggml.dequantize(raw, kind) if name == "Q1_0" else gguf.quants.dequantize(raw, kind)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal to the bit, but for the payload of NaNs."""
    return np.array_equal(np.isnan(a), np.isnan(b)) and np.array_equal(
        np.nan_to_num(a).view(np.uint32), np.nan_to_num(b).view(np.uint32)
    )


def any_bytes(name: str, rng: np.random.Generator) -> np.ndarray:
    """Blocks of random bytes: scales that are NaN, infinite, subnormal or negative included."""
    raw = rng.integers(0, 256, (50, registry.get(name).row_bytes(COLS)), dtype=np.uint8)
    raw[0] = 0
    raw[1] = 255
    return raw


def floats(address: int, *shape: int) -> np.ndarray:
    """float32 memory as an array."""
    n = int(np.prod(shape))
    return np.frombuffer((ctypes.c_float * n).from_address(address), np.float32).reshape(shape)
