"""The key-value cache: what attention keeps of each token, one block of memory a layer.

It knows widths, not meanings: multi-head latent attention keeps one row of kv_lora_rank + qk_rope_head_dim values a
token, and one of the indexer's key in layers that have an indexer; grouped-query attention a row of keys and a row of
values.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from localrun.errors import ContextFullError, LocalrunError
from localrun.models.config import Config

if TYPE_CHECKING:
    import torch


class Context:
    """How many tokens a cache holds, wherever its rows live.

    Attributes:
        capacity: the most tokens.
        length: tokens that all layers hold.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.length = 0

    def check_room(self, n_tokens: int) -> None:
        """Raises ContextFullError unless n_tokens more fit."""
        end = self.length + n_tokens
        if end > self.capacity:
            raise ContextFullError(f"the context is full: {end} tokens, room for {self.capacity}; see -c/--ctx")

    def advance(self, n_tokens: int) -> None:
        """All layers have appended n_tokens."""
        self.length += n_tokens

    def truncate(self, length: int) -> None:
        """Forget all tokens from `length` on."""
        self.length = min(self.length, max(0, length))

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """Forget what came within if anything ends it early: Ctrl-C between two steps, among others."""
        start = self.length
        try:
            yield
        except BaseException:
            self.truncate(start)
            raise

    def _check_saved(
        self, tensors: dict[str, np.ndarray], length: int, widths: list[tuple[int, ...]], dtype: type[np.floating]
    ) -> None:
        """Raises LocalrunError unless tensors are `length` tokens' rows of these widths by layer, and fit."""
        if length > self.capacity:
            raise ContextFullError(f"the saved session has {length} tokens; the context holds {self.capacity}")
        expected = {
            f"{layer}.{part}": ((length, width), np.dtype(dtype))
            for layer, parts in enumerate(widths)
            for part, width in enumerate(parts)
        }
        if {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()} != expected:
            raise LocalrunError(f"the saved session does not hold {length} tokens of this model")


class Cache(Context):
    """Rows for up to `capacity` tokens in every layer; memory is touched only as tokens come.

    Attributes:
        is_exact: whether values have 32 bits.
        addresses: int64, of the blocks of rows: layer by layer, and in a layer as its widths.
    """

    def __init__(self, widths: Sequence[tuple[int, ...]], capacity: int, dtype: type[np.floating]):
        """widths: of each layer's rows."""
        super().__init__(capacity)
        self._widths, self._dtype = list(widths), dtype
        self.is_exact = dtype == np.float32
        self._layers = [tuple(np.empty((capacity, width), dtype) for width in layer) for layer in widths]
        self.addresses = np.array([rows.ctypes.data for parts in self._layers for rows in parts], np.int64)

    def append(self, layer: int, *rows: "torch.Tensor") -> "tuple[torch.Tensor, ...]":
        """Write rows (T, width) of one layer behind `length`; returns that layer's rows so far, (length + T, width).

        Raises ContextFullError if they don't fit. `length` moves when advance() is called, after the last layer.
        """
        import torch

        end = self.length + rows[0].shape[0]
        self.check_room(rows[0].shape[0])
        parts = [torch.from_numpy(part) for part in self._layers[layer]]
        for part, new in zip(parts, rows, strict=True):
            part[self.length : end] = new
        return tuple(part[:end] for part in parts)

    def save(self) -> dict[str, np.ndarray]:
        """Name -> rows in use, for a file."""
        return {
            f"{layer}.{part}": rows[: self.length]
            for layer, parts in enumerate(self._layers)
            for part, rows in enumerate(parts)
        }

    def load(self, tensors: dict[str, np.ndarray], length: int) -> None:
        """Take over what save() gave for `length` tokens. Raises LocalrunError if it is something else, or too long."""
        self._check_saved(tensors, length, self._widths, self._dtype)
        for layer, parts in enumerate(self._layers):
            for part, rows in enumerate(parts):
                rows[:length] = tensors[f"{layer}.{part}"]
        self.length = length


def row_widths(config: Config, index: int | None = None) -> tuple[int, ...]:
    """Values that layer `index` keeps of a token: of latents, and of the indexer's key; or of keys and of values.

    None stands for the layer of multi-token prediction, whose attention is dense.
    """
    if config.attention == "mla":
        latent = config.kv_lora_rank + config.qk_rope_head_dim
        chooses = index is not None and config.chooses_rows(index)
        return (latent, config.index_head_dim) if chooses else (latent,)
    return config.num_key_value_heads * config.head_dim, config.num_key_value_heads * config.v_head_dim


def new_cache(config: Config, capacity: int, exact: bool = False) -> Cache:
    """An empty cache for up to `capacity` tokens of a model, of 16-bit values or, if exact, of 32-bit ones."""
    widths = [row_widths(config, index) for index in range(config.num_hidden_layers)]
    return Cache(widths, capacity, np.float32 if exact else np.float16)
