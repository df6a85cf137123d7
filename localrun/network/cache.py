"""The key-value cache: what attention keeps of each token, one block of memory a layer.

It knows widths, not meanings: multi-head latent attention keeps one row of kv_lora_rank + qk_rope_head_dim values a
token, and one of the indexer's key in layers that have an indexer; grouped-query attention a row of keys and a row of
values.

A layer with a window keeps its rows in a ring: the window and WINDOW_SPARE tokens more, in which positions go round.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from localrun.errors import ContextFullError, LocalrunError
from localrun.models import config as model_config
from localrun.models.config import Config
from localrun.models.rows import Rows

if TYPE_CHECKING:
    import torch

_PAGE, _LARGE_PAGE, _LARGE = 1 << 12, 1 << 21, 1 << 22  # bytes: NumPy asks for large pages in arrays from _LARGE on


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

    def kept(self, length: int) -> int:
        """Tokens that truncate(length) would leave."""
        return min(self.length, max(0, length))

    def truncate(self, length: int) -> None:
        """Forget all tokens from `length` on."""
        self.length = self.kept(length)

    def save(self) -> dict[str, np.ndarray]:
        """The content as named arrays."""
        raise NotImplementedError

    def load(self, tensors: dict[str, np.ndarray], length: int) -> None:
        """Take over what save() gave for `length` tokens. Raises LocalrunError if it is something else, or too long."""
        raise NotImplementedError

    def copy(self, other: "Context", length: int) -> None:
        """Hold the first kept(length) tokens of another cache of the same model and capacity."""
        self.load(other.save(), other.length)
        self.truncate(length)

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
        self,
        tensors: dict[str, np.ndarray],
        length: int,
        widths: list[tuple[int, ...]],
        dtype: type[np.floating],
        n_rows: Sequence[int] | None = None,
    ) -> None:
        """Raises LocalrunError unless tensors are rows of these widths by layer, and fit.

        n_rows: of each layer; `length` unless given.
        """
        if length > self.capacity:
            raise ContextFullError(f"the saved session has {length} tokens; the context holds {self.capacity}")
        expected = {
            f"{layer}.{part}": ((length if n_rows is None else n_rows[layer], width), np.dtype(dtype))
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
        n_rows: int64, rows of these blocks.
    """

    def __init__(
        self,
        widths: Sequence[tuple[int, ...]],
        capacity: int,
        dtype: type[np.floating],
        windows: Sequence[int] | None = None,
    ):
        """widths: of each layer's rows; windows: tokens that each layer sees; 0, or None, for all."""
        super().__init__(capacity)
        self._widths, self._dtype = list(widths), dtype
        self.is_exact = dtype == np.float32
        self._windows = [0] * len(widths) if windows is None else list(windows)
        self._written = 0  # positions below it may have been written since the cache was empty
        self._touched = 0  # or at any time: memory that has been written to stays
        self._layers = [
            tuple(np.empty((_cache_rows(window, capacity), width), dtype) for width in layer)
            for window, layer in zip(self._windows, widths, strict=True)
        ]
        blocks = [rows for parts in self._layers for rows in parts]
        self.addresses = np.array([rows.ctypes.data for rows in blocks], np.int64)
        self.n_rows = np.array([len(rows) for rows in blocks], np.int64)

    @property
    def n_bytes(self) -> int:
        """Of memory that has been written to, in whole pages."""
        return sum(_resident(rows, self._touched) for parts in self._layers for rows in parts)

    def check_room(self, n_tokens: int) -> None:
        """Raises ContextFullError unless n_tokens more fit. What they go over in rings counts as lost from now on."""
        super().check_room(n_tokens)
        self._write_to(self.length + n_tokens)

    def _write_to(self, end: int) -> None:
        """Positions below `end` are written, or about to be."""
        self._written, self._touched = max(self._written, end), max(self._touched, end)

    def kept(self, length: int) -> int:
        """Tokens that truncate(length) would leave."""
        length = super().kept(length)
        is_lost = any(self._kept_from(window) > max(0, length + 1 - window) for window in self._windows if window)
        return 0 if is_lost else length

    def truncate(self, length: int) -> None:
        """Forget all tokens from `length` on; all there are, where a ring has lost rows that the next token would see.

        Those are to be evaluated anew then, which gives what they gave before.
        """
        super().truncate(length)
        if self.length == 0:
            self._written = 0

    def _kept_from(self, window: int) -> int:
        """The first position whose row the rings of such layers still hold."""
        return max(0, self._written - _cache_rows(window, self.capacity))

    def append(self, layer: int, *rows: "torch.Tensor") -> "tuple[torch.Tensor, ...]":
        """Write rows (T, width) of one layer behind `length`; returns that layer's rows so far, (length + T, width).

        Of a layer with a window those that the new tokens see, (min(length, window - 1) + T, width).
        Raises ContextFullError if they don't fit. `length` moves when advance() is called, after the last layer.
        """
        import torch

        end = self.length + rows[0].shape[0]
        self.check_room(rows[0].shape[0])
        parts, window = [torch.from_numpy(part) for part in self._layers[layer]], self._windows[layer]
        if window:
            return tuple(self._append_to_ring(part, new, window) for part, new in zip(parts, rows, strict=True))
        for part, new in zip(parts, rows, strict=True):
            part[self.length : end] = new
        return tuple(part[:end] for part in parts)

    def _append_to_ring(self, ring: "torch.Tensor", new: "torch.Tensor", window: int) -> "torch.Tensor":
        """A copy, made before the rows of a long chunk go over what its first tokens see."""
        import torch

        n_rows, first, end = len(ring), max(0, self.length + 1 - window), self.length + len(new)
        seen = torch.cat([ring[torch.arange(first, self.length) % n_rows], new.to(ring.dtype)])
        kept = min(len(new), n_rows)
        ring[torch.arange(end - kept, end) % n_rows] = seen[-kept:]
        return seen

    def save(self) -> dict[str, np.ndarray]:
        """Name -> rows in use, for a file; of a ring those that it holds, in order."""
        return {
            f"{layer}.{part}": rows[self._places(layer, self._kept_from(window) if window else 0)]
            for layer, (window, parts) in enumerate(zip(self._windows, self._layers, strict=True))
            for part, rows in enumerate(parts)
        }

    def copy(self, other: "Cache", length: int) -> None:
        """Hold the first kept(length) tokens of another cache of the same model and capacity. Rings come whole."""
        self.truncate(0)
        self.length = other.kept(length)
        if not self.length:
            return
        for window, parts, theirs in zip(self._windows, self._layers, other._layers, strict=True):
            for rows, source in zip(parts, theirs, strict=True):
                n_rows = min(other._written, len(rows)) if window else self.length
                rows[:n_rows] = source[:n_rows]
        self._write_to(other._written if any(self._windows) else self.length)

    def _places(self, layer: int, first: int) -> slice | np.ndarray:
        """Where a layer's rows of positions `first` to `length` are."""
        if not self._windows[layer]:
            return slice(first, self.length)
        return np.arange(first, self.length) % len(self._layers[layer][0])

    def load(self, tensors: dict[str, np.ndarray], length: int) -> None:
        """Take over what save() gave for `length` tokens. Raises LocalrunError if it is something else, or too long."""
        counts = [self._count_saved(tensors, layer, length) for layer in range(len(self._layers))]
        self._check_saved(tensors, length, self._widths, self._dtype, counts)
        self.length = self._written = length
        self._touched = max(self._touched, length)
        for layer, (count, parts) in enumerate(zip(counts, self._layers, strict=True)):
            if count < length:
                self._written = max(self._written, length - count + len(parts[0]))
            for part, rows in enumerate(parts):
                rows[self._places(layer, length - count)] = tensors[f"{layer}.{part}"]

    def _count_saved(self, tensors: dict[str, np.ndarray], layer: int, length: int) -> int:
        """Rows that a file should have of a layer: of a ring as many as it has, within what there may be."""
        window = self._windows[layer]
        if not window:
            return length
        found = tensors.get(f"{layer}.0")
        n_found = len(found) if found is not None and found.ndim else 0
        return min(max(n_found, min(length, window - 1)), _cache_rows(window, length))


def _cache_rows(window: int, capacity: int) -> int:
    """Tokens whose rows a layer keeps in a cache for `capacity`; window: how many it sees, 0 for all."""
    return Rows(0, window=window, spare=model_config.WINDOW_SPARE).count(capacity)


def _resident(rows: np.ndarray, touched: int) -> int:
    """Bytes of an array's memory once its first `touched` rows have been written to; rings have fewer rows."""
    page = _LARGE_PAGE if rows.nbytes >= _LARGE else _PAGE
    written = min(touched, len(rows)) * rows.strides[0]
    return min(-(-written // page) * page, rows.nbytes)


def row_widths(config: Config, index: int | None = None) -> tuple[int, ...]:
    """Values that layer `index` keeps of a token: of latents, and of the indexer's key; or of keys and of values.

    None stands for the layer of multi-token prediction, whose attention is dense.
    """
    rows = config.rows(config.num_hidden_layers if index is None else index)
    return tuple(part.width for part in rows)


def new_cache(config: Config, capacity: int, exact: bool = False) -> Cache:
    """An empty cache for up to `capacity` tokens of a model, of 16-bit values or, if exact, of 32-bit ones."""
    widths = [row_widths(config, index) for index in range(config.num_hidden_layers)]
    return Cache(widths, capacity, np.float32 if exact else np.float16, windows(config))


def windows(config: Config) -> list[int]:
    """Tokens that each layer sees, 0 for all."""
    return [config.window(index) for index in range(config.num_hidden_layers)]
