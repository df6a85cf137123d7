"""libggml's own quantizers and dot products, called by ctypes: the oracle for block formats and kernels.

The shared libraries are the ones that llama-cpp-python carries (package folder `llama_cpp/lib`); importing this module
does not import llama_cpp. Types are gguf.GGMLQuantizationType members, whose values are ggml's type numbers.
Declarations: ggml/include/ggml.h and ggml/include/ggml-cpu.h (ggml_quantize_chunk, ggml_type_traits_cpu).
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import sys
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

NEED_IMPORTANCES = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS")  # without them quantize() would abort the process

_SUFFIX = {"linux": ".so", "darwin": ".dylib", "win32": ".dll"}[sys.platform]
_FLOAT_P = ctypes.POINTER(ctypes.c_float)
_FROM_FLOAT = ctypes.CFUNCTYPE(None, _FLOAT_P, ctypes.c_void_p, ctypes.c_int64)
_VEC_DOT = ctypes.CFUNCTYPE(
    None,
    ctypes.c_int,
    _FLOAT_P,
    ctypes.c_size_t,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
)


class _TypeTraitsCpu(ctypes.Structure):
    _fields_ = [
        ("from_float", ctypes.c_void_p),
        ("vec_dot", ctypes.c_void_p),
        ("vec_dot_type", ctypes.c_int),
        ("nrows", ctypes.c_int64),
    ]


def library_path(name: str) -> Path:
    """The shared library `name` ("ggml-base", "ggml-cpu", "llama") inside the llama_cpp package."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise ImportError("llama-cpp-python is not installed: the tests need the ggml libraries it carries")
    folder = Path(spec.origin).parent / "lib"
    for prefix in ("lib", ""):
        path = folder / f"{prefix}{name}{_SUFFIX}"
        if path.exists():
            return path
    raise FileNotFoundError(f"no {name} library in {folder}")


@functools.cache
def base() -> ctypes.CDLL:
    """libggml-base: quantizers, dequantizers."""
    lib = ctypes.CDLL(str(library_path("ggml-base")))
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        _FLOAT_P,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        _FLOAT_P,
    ]
    return lib


@functools.cache
def cpu() -> ctypes.CDLL:
    """libggml-cpu, initialised (its conversion tables are empty before ggml_cpu_init)."""
    base()  # libggml-cpu needs it loaded first where the loader does not look beside the library
    lib = ctypes.CDLL(str(library_path("ggml-cpu")))
    lib.ggml_get_type_traits_cpu.restype = ctypes.POINTER(_TypeTraitsCpu)
    lib.ggml_get_type_traits_cpu.argtypes = [ctypes.c_int]
    lib.ggml_cpu_init()
    return lib


def row_bytes(kind: GGMLQuantizationType, n_cols: int) -> int:
    """Bytes of one row of `n_cols` weights. Raises ValueError when the row is not whole blocks."""
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if n_cols % block:
        raise ValueError(f"a row of {n_cols} is not whole blocks of {kind.name} ({block})")
    return n_cols // block * block_bytes


def quantize(x: np.ndarray, kind: GGMLQuantizationType, imatrix: np.ndarray | None = None) -> np.ndarray:
    """ggml's blocks of `x`: float32 (..., n_cols) -> uint8 (..., row bytes); also for F32, F16 and BF16.

    imatrix: float32 (n_cols,), importance of each column, or None.
    """
    x = np.ascontiguousarray(x, dtype=np.float32)
    n_cols = x.shape[-1]
    n_rows = x.size // n_cols
    out = np.zeros((*x.shape[:-1], row_bytes(kind, n_cols)), dtype=np.uint8)
    if kind == GGMLQuantizationType.F32:
        out[...] = x.view(np.uint8)
        return out
    weights = None
    if imatrix is not None:
        imatrix = np.ascontiguousarray(imatrix, dtype=np.float32)
        weights = imatrix.ctypes.data_as(_FLOAT_P)
    cpu()  # the F16 tables
    source = x.ctypes.data_as(_FLOAT_P)
    n_written = base().ggml_quantize_chunk(int(kind), source, out.ctypes.data, 0, n_rows, n_cols, weights)
    if n_written != out.nbytes:
        raise RuntimeError(f"ggml_quantize_chunk({kind.name}) wrote {n_written} bytes, expected {out.nbytes}")
    return out


def dequantize(blocks: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """ggml's dequantize_row_*: uint8 (..., row bytes) of a block type -> float32 (..., n_cols)."""
    block, block_bytes = GGML_QUANT_SIZES[kind]
    blocks = np.ascontiguousarray(blocks)
    out = np.empty((*blocks.shape[:-1], blocks.shape[-1] // block_bytes * block), dtype=np.float32)
    function = getattr(base(), f"dequantize_row_{_ggml_name(kind)}")
    function.argtypes, function.restype = [ctypes.c_void_p, _FLOAT_P, ctypes.c_int64], None
    cpu()
    function(blocks.ctypes.data, out.ctypes.data_as(_FLOAT_P), out.size)
    return out


def activation_type(kind: GGMLQuantizationType) -> GGMLQuantizationType:
    """The type that ggml quantizes the other operand to before a dot product with rows of `kind`."""
    return GGMLQuantizationType(_traits(kind).vec_dot_type)


def quantize_activations(x: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """ggml-cpu's from_float for an activation type (Q8_0, Q8_1, Q8_K, ...): float32 (..., n) -> uint8 (..., bytes)."""
    x = np.ascontiguousarray(x, dtype=np.float32)
    rows = x.reshape(-1, x.shape[-1])
    out = np.zeros((len(rows), row_bytes(kind, x.shape[-1])), dtype=np.uint8)
    from_float = _FROM_FLOAT(_traits(kind).from_float)
    for row, blocks in zip(rows, out, strict=True):
        from_float(row.ctypes.data_as(_FLOAT_P), blocks.ctypes.data, row.size)
    return out.reshape(*x.shape[:-1], -1)


def vec_dot(kind: GGMLQuantizationType, row: np.ndarray, activations: np.ndarray, n_cols: int) -> np.float32:
    """ggml-cpu's dot product of one row of `kind` (uint8) with blocks of activation_type(kind) (uint8).

    Only through the type's traits, the function that llama.cpp itself calls: of the exported portable twins,
    ggml_vec_dot_q5_0_q8_0_generic returned -1105 where the answer was 22.15 (llama-cpp-python 0.3.36, x86-64).
    """
    result = ctypes.c_float()
    row, activations = np.ascontiguousarray(row), np.ascontiguousarray(activations)
    function = _VEC_DOT(_traits(kind).vec_dot)
    function(n_cols, ctypes.byref(result), 0, row.ctypes.data, 0, activations.ctypes.data, 0, 1)
    return np.float32(result.value)


def vec_dot_address(kind: GGMLQuantizationType) -> int:
    """Of the function that vec_dot calls: void(int n, float *s, size_t bs, void *x, bx, void *y, by, int n_rows)."""
    return _traits(kind).vec_dot


def _traits(kind: GGMLQuantizationType) -> _TypeTraitsCpu:
    return cpu().ggml_get_type_traits_cpu(int(kind)).contents


def _ggml_name(kind: GGMLQuantizationType) -> str:
    """ggml's spelling in symbol names: lower case but for the K of K-quants."""
    name = kind.name.lower()
    return name[:-1] + "K" if name.endswith("_k") else name
