"""Experts of many tokens over several ranks: arrays as they travel between rank 0 and another.

A header says how many tokens; what follows is one message of ids, weights and vectors. Letters: T tokens, K experts per
token, D hidden_size.
"""

from __future__ import annotations

import numpy as np

from quant.decode.message_sizes import HEADER_BYTES, back_bytes, message_bytes, vector_bytes
from quant.decode.messages import BACK_MANY, HEADER, MANY, TO, TO_MANY, VectorType
from quant.target.kernel import Kernel
from quant.threads.links import Links, Request


class Part:
    """What one rank has to do for some tokens of a batch.

    Attributes:
        tokens: int64 (T,), which of the batch these are.
        back: uint8, where what travels back arrives.
    """

    def __init__(
        self, type_: VectorType, layer: int, tokens: np.ndarray, x_TD: np.ndarray, ids_TK: np.ndarray,
        weights_TK: np.ndarray,
    ):  # fmt: skip
        n_tokens, hidden = x_TD.shape
        self.tokens, self._header = tokens, np.zeros(HEADER_BYTES, np.uint8)
        HEADER.write(self._header.view(np.int64), kind=MANY, layer=layer, n_tokens=n_tokens)
        self._message = pack(type_, x_TD, ids_TK, weights_TK)
        self.back = np.empty(back_bytes(type_.name, hidden, n_tokens) - HEADER_BYTES, np.uint8)

    @property
    def sent_bytes(self) -> int:
        """Of a message to this rank; nothing goes where it has no token."""
        return self._header.nbytes + self._message.nbytes if self.tokens.size else 0

    def start(self, links: Links, rank: int) -> list[Request]:
        """Send it, and begin to receive: requests."""
        return [
            links.start_receive(self.back, rank, BACK_MANY),
            links.start_send(self._header, rank, TO),
            links.start_send(self._message, rank, TO_MANY),
        ]


def pack(type_: VectorType, x_TD: np.ndarray, ids_TK: np.ndarray, weights_TK: np.ndarray) -> np.ndarray:
    """uint8: what travels of float32, int64 and float32 arrays."""
    n_tokens, hidden = x_TD.shape
    ids, weights = (np.ascontiguousarray(a).view(np.uint8).reshape(-1) for a in (ids_TK, weights_TK))
    size = message_bytes(type_.name, hidden, ids_TK.shape[1], n_tokens) - HEADER_BYTES
    out = np.empty(size, np.uint8)
    out[: ids.size], out[ids.size : ids.size + weights.size] = ids, weights
    _convert(type_, type_.pack, x_TD, 4 * hidden, out[ids.size + weights.size :], vector_bytes(type_.name, hidden))
    return out


def unpack(
    type_: VectorType, message: np.ndarray, n_tokens: int, hidden: int, top_k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x_TD, ids_TK and weights_TK of what pack() gave."""
    ids_end, weights_end = 8 * n_tokens * top_k, 12 * n_tokens * top_k
    ids = message[:ids_end].copy().view(np.int64).reshape(n_tokens, top_k)
    weights = message[ids_end:weights_end].copy().view(np.float32).reshape(n_tokens, top_k)
    x = np.empty((n_tokens, hidden), np.float32)
    _convert(type_, type_.unpack, message[weights_end:], vector_bytes(type_.name, hidden), x, 4 * hidden)
    return x, ids, weights


def pack_sums(type_: VectorType, sums_TD: np.ndarray) -> np.ndarray:
    """uint8: what travels back of float32 sums."""
    n_tokens, hidden = sums_TD.shape
    out = np.empty(back_bytes(type_.name, hidden, n_tokens) - HEADER_BYTES, np.uint8)
    back = type_.back
    _convert(back, back.pack, sums_TD, 4 * hidden, out, vector_bytes(back.name, hidden))
    return out


def unpack_sums(type_: VectorType, message: np.ndarray, hidden: int) -> np.ndarray:
    """float32 (T, D)."""
    back, size = type_.back, vector_bytes(type_.back.name, hidden)
    sums = np.empty((message.size // size, hidden), np.float32)
    _convert(back, back.unpack, message, size, sums, 4 * hidden)
    return sums


def _convert(
    type_: VectorType, kernel: Kernel, source: np.ndarray, source_bytes: int, to: np.ndarray, to_bytes: int
) -> None:
    """A kernel void(from, n, to) on all rows, so many bytes each; one side is float32 (T, D)."""
    n_tokens, hidden = (source if source.ndim == 2 else to).shape
    at, to_at = source.ctypes.data, to.ctypes.data
    if type_.columns == 1:  # what travels of a row follows that of the one before, as its columns do
        kernel.ctypes(at, n_tokens * hidden, to_at)
        return
    for t in range(n_tokens):
        kernel.ctypes(at + source_bytes * t, hidden, to_at + to_bytes * t)
