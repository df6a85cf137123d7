"""The key-value cache: what attention keeps of each token, in blocks of memory, one a layer and kind of row.

Config.rows says which there are. Blocks with a window are rings, whose rows are written over: so a cache cannot go back
to every length. It can go back a few tokens, by the rings' spare rows; and to its marks, copies of what was needed to
go on from some length. They are made where the cache is told to (mark), and by itself every MARK_EVERY tokens; if they
take too much memory, those that are closest to each other go. A recurrent state is such a row, of which the next token
needs the last one.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from localrun.errors import ContextFullError, LocalrunError
from localrun.limits import MARK_BYTES, MARK_EVERY, MARK_SPARE
from localrun.models.config import Config
from localrun.models.rows import Rows
from localrun.network.block import Block, new_blocks

if TYPE_CHECKING:
    import torch


PART_BYTES = 1 << 27  # that since() gives at a time: MPI counts bytes in 31 bits


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

    def mark(self) -> None:
        """Have truncate() go back to here, or a few tokens before, whatever comes; as far as memory lasts."""

    def kept(self, length: int) -> int:
        """Tokens that truncate(length) would leave: as many, or those up to where there is a way back."""
        return min(self.length, max(0, length))

    def truncate(self, length: int) -> None:
        """Forget all tokens from `length` on, and those before that kept() says."""
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


@dataclass
class _Mark:
    """What rings held of the tokens before some position.

    Attributes:
        end: the position behind their rows.
        length: tokens that may be gone back to; fewer than `end` where the text has changed behind.
        rows: of each ring.
    """

    end: int
    length: int
    rows: list[np.ndarray]

    @property
    def n_bytes(self) -> int:
        return sum(rows.nbytes for rows in self.rows)

    def allows(self, length: int, rings: list[Block]) -> bool:
        """Whether a text can be gone on from there."""
        held = (self.end - len(rows) for rows in self.rows)
        return length <= self.length and all(r.kind.first(length) >= h for r, h in zip(rings, held, strict=True))


def exact_rows(rows: "torch.Tensor", cache: Context) -> "torch.Tensor":
    """A cache's rows in float32, and so what is computed with them, where it is to be exact."""
    return rows.float() if cache.is_exact else rows


class Cache(Context):
    """Rows for up to `capacity` tokens in every layer; memory is touched only as tokens come.

    Attributes:
        is_exact: whether values have 32 bits.
        bits: of values of those rows that may be bytes.
        addresses: int64, of the blocks of rows: layer by layer, and in a layer as its kinds.
        n_rows: int64, rows of these blocks.
        n_followed: its first tokens that another process's cache holds as well, as that one's side has set it; those
            that are forgotten no longer count.
    """

    def __init__(self, kinds: Sequence[Sequence[Rows]], capacity: int, dtype: type[np.floating], bits: int = 16):
        """kinds: of each layer's rows; bits: 8 for groups of them in bytes."""
        super().__init__(capacity)
        self.is_exact, self.n_followed, self.bits = dtype == np.float32, 0, bits
        self._touched = 0  # positions below it have been written at some time: memory that has been written to stays
        self._blocks = self._new_blocks([kind for layer in kinds for kind in layer], dtype)
        each = iter(self._blocks)
        self._layers = [[next(each) for _ in layer] for layer in kinds]
        self._rings = [block for block in self._blocks if block.is_ring]
        self._marks: list[_Mark] = []  # by length
        self.addresses = np.array([block.address for block in self._blocks], np.int64)
        self.n_rows = np.array([len(block.rows) for block in self._blocks], np.int64)

    def _new_blocks(self, kinds: Sequence[Rows], dtype: type[np.floating]) -> list[Block]:
        """One of each kind."""
        return new_blocks(kinds, self.capacity, dtype, self.bits)

    @property
    def n_bytes(self) -> int:
        """Of memory that has been written to, in whole pages."""
        marks = sum(mark.n_bytes for mark in self._marks)
        return marks + sum(block.resident(self._touched) for block in self._blocks)

    def check_room(self, n_tokens: int) -> None:
        """Raises ContextFullError unless n_tokens more fit. What they go over in rings counts as lost from now on."""
        super().check_room(n_tokens)
        last = self._marks[-1].length if self._marks else 0
        if self._rings and self.length > last and self.length + n_tokens - last > MARK_EVERY:
            self._mark(0)
        self._write_to(self.length + n_tokens)

    def _write_to(self, end: int) -> None:
        """Positions below `end` are written, or about to be."""
        self._touched = max(self._touched, end)
        for ring in self._rings:
            ring.write_to(end)

    def mark(self) -> None:
        """Have truncate() go back to here, or a few tokens before, whatever comes; as far as memory lasts."""
        if self._rings and self.length:
            self._mark(MARK_SPARE)

    def _mark(self, spare: int) -> None:
        """spare: tokens that may be gone back from there."""
        back, marks = max(0, self.length - spare), self._marks
        firsts = [max(ring.held, ring.kind.first(back)) for ring in self._rings]
        rows = [ring.get(first, self.length) for ring, first in zip(self._rings, firsts, strict=True)]
        marks[:] = [mark for mark in marks if mark.length < self.length]
        marks.append(_Mark(self.length, self.length, rows))
        while len(marks) > 2 and sum(mark.n_bytes for mark in marks) > MARK_BYTES:
            lengths = [0, *(mark.length for mark in marks)]
            del marks[min(range(len(marks) - 1), key=lambda i: lengths[i + 2] - lengths[i])]

    def kept(self, length: int) -> int:
        """Tokens that truncate(length) would leave: as many, or those up to where there is a way back."""
        length = super().kept(length)
        if self._holds(length):
            return length
        ends = (min(length, mark.length) for mark in self._marks if mark.allows(min(length, mark.length), self._rings))
        return max(ends, default=0)

    def _holds(self, length: int) -> bool:
        return all(ring.holds(length) for ring in self._rings)

    def truncate(self, length: int) -> None:
        """Forget all tokens from `length` on, and those before that kept() says.

        Those are to be evaluated anew then, which gives what they gave before.
        """
        length = self.kept(length)
        if length == self.length and self._holds(length):
            return
        if not length:
            self._marks.clear()
            for ring in self._rings:
                ring.held = 0
        elif not self._holds(length):
            self._go_back(self._marks, length)
        self.length, self.n_followed = length, min(length, self.n_followed)
        self._marks = self._marks_up_to(length)

    def _go_back(self, marks: list[_Mark], length: int) -> None:
        mark = next(mark for mark in marks if mark.allows(length, self._rings))
        for ring, rows in zip(self._rings, mark.rows, strict=True):
            ring.put(mark.end, rows)

    def _marks_up_to(self, length: int) -> list[_Mark]:
        """Those that a text can go back to which changes at `length`."""
        before = [mark for mark in self._marks if mark.length <= length]
        cut = [mark for mark in self._marks if mark.length > length and mark.allows(length, self._rings)]
        return before + [_Mark(mark.end, length, mark.rows) for mark in cut[:1]]

    def append(self, layer: int, *rows: "torch.Tensor") -> "tuple[torch.Tensor, ...]":
        """Write rows (T, width) of one layer behind `length`; returns that layer's rows so far, (length + T, width).

        Of a layer with a window those that the new tokens see, (min(length, window - 1) + T, width).
        Raises ContextFullError if they don't fit. `length` moves when advance() is called, after the last layer.
        """
        self.check_room(rows[0].shape[0])
        return tuple(self.extend(layer, part, new) for part, new in enumerate(rows))

    def extend(self, layer: int, part: int, rows: "torch.Tensor") -> "torch.Tensor":
        """The same of one kind of a layer's rows: Block.extend. check_room() must have been asked."""
        return self._layers[layer][part].extend(self.length, rows)

    def since(self, first: int) -> Iterator[tuple[int, int, np.ndarray]]:
        """What a cache of this kind lacks to go on as this one that holds the first tokens: as write() takes it.

        Of a ring all rows that the next token needs. No array has more than PART_BYTES.
        """
        for number, block in enumerate(self._blocks):
            start = block.kind.first(self.length) if block.is_ring else first
            rows, ratio = block.stored(start, self.length), 1 if block.is_ring else block.kind.ratio
            n_rows = max(1, PART_BYTES // block.rows.strides[0])
            for at in range(0, len(rows), n_rows):
                part = rows[at : at + n_rows]
                yield number, (start // ratio + at + len(part)) * ratio, part

    def write(self, block: int, end: int, rows: np.ndarray) -> None:
        """Put another cache's rows of positions before `end` into a block, by its number; tokens do not count yet.

        rows: as the block's memory has them, in any shape. check_room() must have been asked.
        """
        own = self._blocks[block]
        own.write(end, rows.view(own.rows.dtype).reshape(-1, own.rows.shape[1]))

    def window(self, layer: int, part: int) -> "torch.Tensor":
        """A ring's rows of tokens before `length` that the next one sees, (tokens, width): a copy."""
        import torch

        block = self._layers[layer][part]
        return torch.from_numpy(block.get(block.kind.first(self.length), self.length))

    def save(self) -> dict[str, np.ndarray]:
        """Name -> rows in use, for a file; of a ring those that it holds, in order, and those of marks."""
        saved = {
            f"{layer}.{part}": block.get(block.held, self.length)
            for layer, blocks in enumerate(self._layers)
            for part, block in enumerate(blocks)
        }
        names = [name for name, block in zip(saved, self._blocks, strict=True) if block.is_ring]
        for mark in self._marks:
            cut = mark.end - mark.length
            rows = (rows[: len(rows) - cut] for rows in mark.rows)
            saved |= {f"{name}@{mark.length}": part for name, part in zip(names, rows, strict=True)}
        return saved

    def copy(self, other: "Cache", length: int) -> None:
        """Hold the first kept(length) tokens of another cache of the same model and capacity. Marks are shared."""
        self.truncate(0)
        length = other.kept(length)
        if not length:
            return
        for block, source in zip(self._blocks, other._blocks, strict=True):
            count = source.kind.count(other._touched if block.is_ring else length)
            block.rows[:count], block.held = source.rows[:count], source.held
        self._touched = max(self._touched, other._touched if self._rings else length)
        if not self._holds(length):
            self._go_back(other._marks, length)
        self.length = length
        self._marks = other._marks_up_to(length)

    def load(self, tensors: dict[str, np.ndarray], length: int) -> None:
        """Take over what save() gave for `length` tokens. Raises LocalrunError if it is something else, or too long."""
        names = [f"{layer}.{part}" for layer, blocks in enumerate(self._layers) for part in range(len(blocks))]
        rings = [name for name, block in zip(names, self._blocks, strict=True) if block.is_ring]
        marks = {int(found[1]) for name in tensors if (found := re.fullmatch(r"\d+\.\d+@(\d{1,9})", name))}
        places = [(name, block, length) for name, block in zip(names, self._blocks, strict=True)]
        places += [(f"{name}@{end}", ring, end) for end in marks for name, ring in zip(rings, self._rings, strict=True)]
        if length > self.capacity:
            raise ContextFullError(f"the saved session has {length} tokens; the context holds {self.capacity}")
        fit = (_fits(tensors.get(name), block, end) for name, block, end in places)
        if len(places) != len(tensors) or max(marks, default=0) > length or not all(fit):
            raise LocalrunError(f"the saved session does not hold {length} tokens of this model")
        for name, block, end in places[: len(names)]:
            block.put(end, tensors[name])
        self.length, self._touched, self.n_followed = length, max(self._touched, length), 0
        self._marks = [_Mark(end, end, [np.array(tensors[f"{name}@{end}"]) for name in rings]) for end in sorted(marks)]


def _fits(rows: np.ndarray | None, block: Block, end: int) -> bool:
    """Whether these are a block's rows of the tokens before `end`: of a ring as many as there are, if enough."""
    if rows is None or rows.ndim != 2 or rows.dtype != block.dtype or rows.shape[1] != block.kind.width:
        return False
    if not block.is_ring:
        return len(rows) == block.kind.count(end)
    return end - block.kind.first(end) <= len(rows) <= min(end, block.kind.count(end))


def row_widths(config: Config, index: int | None = None) -> tuple[int, ...]:
    """Values of each kind of row that layer `index` keeps; None stands for the layer of multi-token prediction."""
    return tuple(kind.width for kind in config.rows(config.num_hidden_layers if index is None else index))


def new_cache(config: Config, capacity: int, exact: bool = False, bits: int = 16) -> Cache:
    """An empty cache for up to `capacity` tokens of a model, of values of 16 or 8 bits or, if exact, of 32."""
    kinds = [config.rows(index) for index in range(config.num_hidden_layers)]
    return Cache(kinds, capacity, *((np.float32, 32) if exact else (np.float16, bits)))
