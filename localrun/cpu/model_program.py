"""Phases of a model's tensors, one after the other: vectors between them by name, and how tokens go through.

Which phases a layer has is decode.py's and compressed.py's.
"""

import ctypes
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from localrun.models import names
from localrun.models.config import Config
from localrun.models.tensors import GGUFTensors
from localrun.network.cache import Cache
from localrun.network.rope import frequencies, rotation_magnitude
from localrun.ranks.remote import Remote
from quant.decode.indexer import Room
from quant.decode.linear import Input, normed, rows_phase
from quant.decode.program import MOST_TOKENS, Phase, Program
from quant.decode.stream_rows import stream_rows_phase
from quant.matrix import QuantMatrix
from quant.threads.pool import Pool


class ModelProgram:
    """A program of a model whose phases are laid out one after the other. T: quant.decode.program.MOST_TOKENS.

    Phases have names like "blk.3.attn: queries".

    Attributes:
        x: address of float32 (T, hidden_size), the sums that layers add to; set before the first.
    """

    def __init__(
        self,
        config: Config,
        tensors: GGUFTensors,
        pool: Pool,
        embedding: QuantMatrix,
        cached: Sequence[tuple[int, ...]],
        remote: Remote | None = None,
        cache_bits: int = 16,
    ):
        """The tensors must stay mapped.

        Args:
            cached: widths of the cache rows of each layer.
            remote: ranks that have shares of the experts, if `tensors` has this one's alone.
            cache_bits: of a cached value, 16 or 8.
        """
        self._cache_bits = cache_bits
        self.config, self.tensors, self.pool, self._remote = config, tensors, pool, remote
        self._slots = [0, *accumulate(len(widths) for widths in cached)]  # of each layer's first block of cache rows
        self.program = self._new_program(embedding, self._slots[-1])
        self.x, self._x_width = self.program.x, max(1, config.hc_mult) * config.hidden_size
        self._room: dict[str, int] = {}  # floats of a token that a vector has room for
        self._vectors: dict[str, tuple[int, int]] = {}  # addresses and lengths, as used last
        self._outputs: dict[str, dict[str, tuple[int, int]]] = {}  # by phase: what it writes, "x" or others
        self._part = ""  # of the model, that phases are added for
        self._rank_room = Room()
        self._choice: dict[str, int] = {}  # of the last layer with an indexer, for Heads

    def _new_program(self, embedding: QuantMatrix, n_slots: int) -> Program:
        config, tensors = self.config, self.tensors
        factors = tensors.array(names.ROPE_FREQS) if tensors.has(names.ROPE_FREQS) else None
        return Program(self.pool, embedding, frequencies(config, factors), rotation_magnitude(config), n_slots)

    def __call__(self, ids: Sequence[int], cache: Cache, n_logits: int) -> np.ndarray:
        """Evaluate up to MOST_TOKENS ids, which the cache then holds.

        Returns:
            float32 (n_logits, vocab): the logits after the last ones.

        Raises:
            ContextFullError: the cache has no room for them.
        """
        cache.check_room(len(ids))
        first = len(ids) - n_logits
        self._run(ids, cache, head_from=first)
        cache.advance(len(ids))
        return self._logits[first : len(ids)].copy()

    def together(self, ids: Sequence[int], caches: Sequence[Cache]) -> np.ndarray:
        """Evaluate up to MOST_TOKENS ids, each after the tokens of a cache of its own, which then holds it too.

        Returns:
            float32 (T, vocab): the logits after each, to the bit those that it would have alone.

        Raises:
            ContextFullError: one of the caches has no room; all are as they were.
        """
        for cache in caches:
            cache.check_room(1)
        self._rank_room.make(max(cache.capacity for cache in caches))
        addresses, n_rows = (np.stack([getattr(c, name) for c in caches]) for name in ("addresses", "n_rows"))
        self._run_program(ids, [cache.length for cache in caches], addresses, cache_rows=n_rows)
        for cache in caches:
            cache.advance(1)
        return self._logits[: len(ids)].copy()

    def _run(self, ids: Sequence[int], cache: Cache, **options: Any) -> None:
        """A step of tokens that follow each other after the cache's."""
        self._rank_room.make(cache.capacity)
        positions = range(cache.length, cache.length + len(ids))
        self._run_program(ids, positions, cache.addresses, cache_rows=cache.n_rows, **options)

    def _run_program(self, *args: Any, **options: Any) -> None:
        """A step, as Program.run; raises RankError if other ranks have not done their part."""
        self.program.run(*args, **options)
        if self._remote:
            self._remote.check()

    def run_until(self, phase: str, ids: Sequence[int], cache: Cache) -> dict[str, np.ndarray]:
        """Evaluate up to MOST_TOKENS ids after the cache's as far as this phase: what it writes, by name, (T, n).

        The cache counts as before. Raises QuantError if no phase is called so.
        """
        self._run(ids, cache, until=phase)
        return {name: self._read(*place, len(ids)) for name, place in self._outputs[phase].items()}

    @staticmethod
    def _read(address: int, n: int, n_tokens: int) -> np.ndarray:
        floats = (ctypes.c_float * (n_tokens * n)).from_address(address)
        return np.array(floats, np.float32).reshape(n_tokens, n)

    def hidden(self, first: int, last: int) -> np.ndarray:
        """float32 (last - first, hidden_size): what the head reads of the last step's tokens first..last."""
        return normed(self._final, first, last, self.config.hidden_size)

    def _add(self, phase: Phase, name: str, *outputs: str) -> None:
        """Append a phase of the part at hand, which writes these vectors."""
        name = f"{self._part}: {name}"
        x = self.x, self._x_width
        self._outputs[name] = {output: x if output == "x" else self._vectors[output] for output in outputs}
        self.program.add(phase, name)

    def _name(self, index: int, module: str) -> str:
        """Of a tensor of a layer."""
        return names.layer(self.config.architecture, index, module)

    def _array(self, name: str) -> int:
        """Address of a 1-D tensor in float32."""
        return self.program.keep(self.tensors.array(name))

    def _bias(self, weight: str) -> int:
        """Address of what is added to a matrix's products; 0 for nothing."""
        bias = names.bias(weight)
        return self._array(bias) if self.tensors.has(bias) else 0

    def _normed(self, x: int, name: str) -> Input:
        """The vector at x after the norm `name`."""
        return Input(x, self._array(name), self.config.rms_norm_eps)

    def _vector(self, name: str, n: int) -> int:
        """Address of float32 (T, n) that all layers use in turn under this name."""
        address, _ = self._vectors.get(name, (0, 0))
        if self._room.get(name, -1) < n:
            address, self._room[name] = self.program.vector(n), n
        self._vectors[name] = address, n
        return address

    def _rows(self, name: str, input_: Input, matrices: dict[str, QuantMatrix], biases: Sequence[int] = ()) -> None:
        """A phase of matrices, by the names of the vectors that are their outputs."""
        places = [(matrix, self._vector(output, matrix.n_rows)) for output, matrix in matrices.items()]
        self._add(self._rows_phase(input_, places, biases=biases), name, *matrices)

    def _rows_phase(self, input_: Input, places: list[tuple[QuantMatrix, int]], **options: Any) -> Phase:
        make = stream_rows_phase if input_.streams else rows_phase
        return make(input_, places, self.pool.n_workers, **options)

    def _add_to_x(self, name: str, input_: Input, matrix: QuantMatrix, bias: int = 0) -> None:
        phase = rows_phase(input_, [(matrix, self.x)], self.pool.n_workers, residual=True, biases=[bias])
        self._add(phase, name, "x")

    def _head(self, norm: str, head: QuantMatrix) -> None:
        """The last phase: logits of the normed sums."""
        self._final, self._logits = self._head_input(norm), np.zeros((MOST_TOKENS, head.n_rows), np.float32)
        logits = self.program.keep(self._logits)
        self.program.add(self._rows_phase(self._final, [(head, logits)], is_head=True), "head")
        self._outputs["head"] = {"logits": (logits, head.n_rows)}
        self.program.finish()

    def _head_input(self, norm: str) -> Input:
        return self._normed(self.x, norm)
