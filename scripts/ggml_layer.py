"""Routed experts by libggml's own graph, as llama.cpp builds it: what bench_types.py measures ours in turn with.

The libraries are those that llama-cpp-python carries (tests/support/ggml.py). The weights stay where they are: a
matrix of ggml's is an address in our memory, in the order of the file.
Declarations: ggml/include/ggml.h, ggml-backend.h, ggml-cpu.h; the graph: build_moe_ffn in llama.cpp's
src/llama-graph.cpp.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
import ggml

_POINTER, _SIZE, _I64, _INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64, ctypes.c_int


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", _SIZE), ("mem_buffer", _POINTER), ("no_alloc", ctypes.c_bool)]


_FUNCTIONS = {  # name: result, arguments
    "ggml_init": (_POINTER, (_InitParams,)),
    "ggml_new_tensor_3d": (_POINTER, (_POINTER, _INT, _I64, _I64, _I64)),
    "ggml_mul_mat_id": (_POINTER, (_POINTER,) * 4),
    "ggml_swiglu_split": (_POINTER, (_POINTER,) * 3),
    "ggml_mul": (_POINTER, (_POINTER,) * 3),
    "ggml_add": (_POINTER, (_POINTER,) * 3),
    "ggml_view_2d": (_POINTER, (_POINTER, _POINTER, _I64, _I64, _SIZE, _SIZE)),
    "ggml_new_graph": (_POINTER, (_POINTER,)),
    "ggml_build_forward_expand": (None, (_POINTER, _POINTER)),
    "ggml_get_data": (_POINTER, (_POINTER,)),
    "ggml_free": (None, (_POINTER,)),
    "ggml_backend_cpu_buffer_from_ptr": (_POINTER, (_POINTER, _SIZE)),
    "ggml_backend_tensor_alloc": (_INT, (_POINTER, _POINTER, _POINTER)),
    "ggml_backend_graph_compute": (_INT, (_POINTER, _POINTER)),
    "ggml_backend_buffer_free": (None, (_POINTER,)),
    "ggml_backend_free": (None, (_POINTER,)),
}
_ALIGNMENT = 64  # of memory that a buffer is made of


class GgmlExperts:
    """The experts of one layer, `top_k` of them for one token, on so many threads. close() when done."""

    def __init__(
        self, type_: str, shapes: Sequence[tuple[int, int, int]], data: Sequence[np.ndarray], top_k: int, threads: int
    ) -> None:
        """Shapes and plain weights of gate, up and down: (E, inner, hidden) twice, then (E, hidden, inner)."""
        self._lib, cpu = ggml.base(), ggml.cpu()
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(self._lib, name)
            function.restype, function.argtypes = result, list(arguments)
        cpu.ggml_backend_cpu_init.restype = _POINTER
        cpu.ggml_backend_cpu_set_n_threads.argtypes = [_POINTER, _INT]
        self._backend = cpu.ggml_backend_cpu_init()
        cpu.ggml_backend_cpu_set_n_threads(self._backend, threads)
        self._weights = self._lib.ggml_init(_InitParams(1 << 16, None, True))
        self._context = self._lib.ggml_init(_InitParams(1 << 24, None, False))  # all but the weights
        self._buffers: list[int] = []
        kind = GGMLQuantizationType[type_]
        matrices = [self._matrix(kind, *each) for each in zip(shapes, data, strict=True)]
        self._build(matrices, shapes[0][2], top_k)

    def _matrix(self, kind: GGMLQuantizationType, shape: tuple[int, int, int], data: np.ndarray) -> int:
        tensor = self._lib.ggml_new_tensor_3d(self._weights, kind, *reversed(shape))
        start = data.ctypes.data // _ALIGNMENT * _ALIGNMENT
        n_bytes = data.ctypes.data + data.nbytes - start
        self._buffers.append(self._lib.ggml_backend_cpu_buffer_from_ptr(start, n_bytes))
        self._lib.ggml_backend_tensor_alloc(self._buffers[-1], tensor, data.ctypes.data)
        return tensor

    def _new(self, kind: GGMLQuantizationType, *shape: int) -> int:
        return self._lib.ggml_new_tensor_3d(self._context, kind, *shape)

    def _build(self, matrices: list[int], hidden: int, top_k: int) -> None:
        lib, context, (gate, up, down) = self._lib, self._context, matrices
        floats = GGMLQuantizationType.F32
        x, factors = self._new(floats, hidden, 1, 1), self._new(floats, 1, top_k, 1)
        ids = self._new(GGMLQuantizationType.I32, top_k, 1, 1)
        gated = (lib.ggml_mul_mat_id(context, matrix, x, ids) for matrix in (gate, up))
        outs = lib.ggml_mul_mat_id(context, down, lib.ggml_swiglu_split(context, *gated), ids)
        outs, row = lib.ggml_mul(context, outs, factors), 4 * hidden
        out, *others = (lib.ggml_view_2d(context, outs, hidden, 1, row * top_k, row * k) for k in range(top_k))
        for other in others:
            out = lib.ggml_add(context, out, other)
        self._graph = lib.ggml_new_graph(context)
        lib.ggml_build_forward_expand(self._graph, out)
        self._inputs = [lib.ggml_get_data(tensor) for tensor in (x, ids, factors)]
        self._out = np.ctypeslib.as_array((ctypes.c_float * hidden).from_address(lib.ggml_get_data(out)))

    def __call__(self, x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Of float32 x (1, D), ids (1, K) and float32 weights (1, K): float32 (D,), which the next call overwrites."""
        for address, values in zip(self._inputs, (x, ids.astype(np.int32), weights), strict=True):
            ctypes.memmove(address, values.ctypes.data, values.nbytes)
        if self._lib.ggml_backend_graph_compute(self._backend, self._graph):
            raise RuntimeError("libggml could not compute the graph")
        return self._out

    def close(self) -> None:
        """Give its memory back; the weights' is the caller's."""
        for buffer in self._buffers:
            self._lib.ggml_backend_buffer_free(buffer)
        for context in self._weights, self._context:
            self._lib.ggml_free(context)
        self._lib.ggml_backend_free(self._backend)
