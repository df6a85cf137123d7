"""A few tokens through the whole network in one job: a program of phases that all workers go through together.

A phase is a piece of the network whose work items don't depend on each other (rows of matrices, heads). It has two
kernels, prepare(phase, work) and run(phase, item, work), which find their arguments behind its PHASE. Every worker
prepares a phase for itself, in work memory of its own (the norm of the input, its 8-bit form, the router's choice:
microseconds). Then it takes items until there are none, then waits until all are done.

There is no barrier: a phase ends when its items are done, not when all workers have come. A worker that the system
took the core from finds the phases it missed without items and passes through them. What it prepares there may be
made of vectors that others are already changing; nothing comes of it, since it gets no item of that phase.

Each token has a cache and a position in it: tokens follow each other in one context, or belong to several. A token sees
the rows of its cache up to its own, those of the same step included. A phase reads its weights once for all tokens, and
does for each the same operations in the same order as for a token alone, so that results are the same to the bit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from quant.batch import MOST_TOKENS
from quant.decode.parts import GroupPart, Part
from quant.errors import QuantError
from quant.matrix import QuantMatrix, check_single_rows
from quant.simd.memory import store_i64
from quant.simd.struct import address, atomic, boolean, f32, f64, i64, pointer, struct
from quant.simd.vectors import copy
from quant.target.jit import inline, kernel
from quant.target.kernel import Kernel
from quant.threads.atomics import atomic_add, atomic_load, call_2, call_3, wait_for
from quant.threads.numa import LINE, NUMA, item_at, own_items
from quant.threads.pool import Pool, aligned_bytes, worker_bytes
from quant.threads.work_items import work_items

MAX_SPLITS = 32  # parts of the context that attention hands out
FEW_SPLITS = MAX_SPLITS // 2  # of contexts of up to FEW_UP_TO tokens, at most
MIN_SPLIT = 64  # tokens: as long as splits are few, a context has another one for each so many
FEW_UP_TO = MAX_SPLITS * 3 // 4 * MIN_SPLIT  # tokens; a split has at least 3/4 of MIN_SPLIT behind it
_ENDLESS = 1 << 62

# The phases, the workers' memory, then what all phases know of the step.
PROGRAM = struct(
    "Program",
    n_phases=i64,
    phases=address,  # PHASE_BYTES apart
    work=address,
    work_bytes=i64,
    n_workers=i64,
    embedding=address,
    embedding_row_bytes=i64,
    embedding_blocks=i64,  # of a row
    expand=address,  # the kernel of its format
    x=address,  # float32 (MOST_TOKENS, n_copies, x_bytes / 4): embeddings
    x_bytes=i64,
    n_copies=i64,
    ids=pointer(i64),
    n_tokens=i64,
    positions=pointer(i64),  # of each token, in its context
    head_from=i64,
    frequencies=pointer(f64),
    n_frequencies=i64,
    magnitude=f32,
    rotations=pointer(f32),  # cosine and sine of each frequency, of each token
    n_slots=i64,  # blocks of cache rows of a context
    cache=pointer(i64),  # their addresses, (MOST_TOKENS, n_slots)
    cache_rows=pointer(i64),  # rows of each; a position's is the remainder
    numa=NUMA,
)

# What a phase's arguments begin with.
PHASE = struct(
    "Phase",
    done=atomic,
    taken=address,  # a counter for each NUMA node, LINE bytes apart
    n_items=i64,  # of this step
    period=i64,  # of them are a row that is shared out by node: the same rows of weights at the same places
    items=i64,  # of one token, and one split of its context
    per_token=boolean,
    per_split=boolean,
    prepare=address,
    run=address,
    program=address,
)
PHASE_BYTES = 1536
HEADER = PHASE.zeros()  # to pack arguments with; Phases.finish() fills it


@inline
def program_of(a):
    """The PROGRAM of a phase's arguments."""
    return PROGRAM(a.phase.program)


@inline
def tokens_of(a):
    """How many tokens this step has."""
    return program_of(a).n_tokens


@inline
def cached_by(a, t):
    """Tokens of its context that the step's token t sees, itself included."""
    return program_of(a).positions[t] + 1


@inline
def cache_block(a, slot, t):
    """Address of a block of rows of the cache of the step's token t, and how many rows it has."""
    program = program_of(a)
    i = program.n_slots * t + slot
    return program.cache[i], program.cache_rows[i]


@inline
def splits_of(n_cached):
    """Splits of a context of n_cached: of long ones a power of two, as numbers of workers mostly are.

    All of them cost two workers more than they save where splits are short, so first there are half as many. A longer
    context never has fewer.
    """
    if n_cached > FEW_UP_TO:
        return MAX_SPLITS
    return min(FEW_SPLITS, (n_cached + MIN_SPLIT - 1) // MIN_SPLIT)


def most_splits(n_cached: int) -> int:
    """The same in Python."""
    return MAX_SPLITS if n_cached > FEW_UP_TO else min(FEW_SPLITS, -(-n_cached // MIN_SPLIT))


@inline
def split_begin(n_cached, split, unit):
    """The first token of a split; they are whole units of tokens, as equally long as can be."""
    return min(n_cached, (n_cached + unit - 1) // unit * split // splits_of(n_cached) * unit)


@inline
def chunk_length(n, most):
    """Rows of a chunk of n rows, whole tiles of 16: the least with as few chunks as with `most`, a multiple of 16.

    The last chunk has what is left.
    """
    count = (n + most - 1) // most
    return (n + 16 * count - 1) // (16 * count) * 16


@inline
def _begin_token(program, t):
    """The rotations of a token's position, and its embedding."""
    n_frequencies, magnitude = program.n_frequencies, program.magnitude
    rotations = program.rotations + 2 * n_frequencies * t
    for i in range(n_frequencies):
        angle = program.positions[t] * program.frequencies[i]
        rotations[2 * i] = np.float32(math.cos(angle)) * magnitude
        rotations[2 * i + 1] = np.float32(math.sin(angle)) * magnitude
    row = program.embedding + program.embedding_row_bytes * program.ids[t]
    x, n_copies = program.x + program.x_bytes * program.n_copies * t, program.n_copies
    call_3(program.expand, row, program.embedding_blocks, x)
    for i in range(1, n_copies):
        copy(x, program.x_bytes // 4, x + program.x_bytes * i)


@inline
def reset(program, n_tokens, n_splits):
    """This step's items in all phases, none taken."""
    for p in range(program.n_phases):
        phase = PHASE(program.phases + PHASE_BYTES * p)
        n_items = phase.items
        if phase.per_token:
            n_items *= n_tokens
        if phase.per_split:
            n_items *= n_splits
        phase.n_items = n_items
        for node in range(program.numa.n_nodes):
            store_i64(phase.taken + LINE * node, 0)
        store_i64(phase.done, 0)


@kernel("void(int64)")
def _begin(address):
    """Reset the counters; this step's items, rotations and embeddings."""
    program, n_splits = PROGRAM(address), 1
    for t in range(program.n_tokens):
        _begin_token(program, t)
        n_splits = max(n_splits, splits_of(program.positions[t] + 1))
    reset(program, program.n_tokens, n_splits)


@inline
def _run_items(at, node, period, first, n_own, end, work):
    """Items of one node until there are none: n_own from `first` on in each row of `period`, `end` in all; how many."""
    phase, finished = PHASE(at), 0
    for i in work_items(phase.taken + LINE * node, end):
        call_3(phase.run, at, item_at(i, first, n_own, period), work)
        finished += 1
    return finished


@kernel("void(int64, int64)")
def _step(address, worker):
    """The job: all phases in order."""
    program = PROGRAM(address)
    work, numa = program.work + program.work_bytes * worker, program.numa
    for p in range(program.n_phases):
        at = program.phases + PHASE_BYTES * p
        phase = PHASE(at)
        n_items, period, is_prepared, finished = phase.n_items, phase.period, False, 0
        for i in range(numa.n_nodes):
            node = (numa.node_of[worker] + i) % numa.n_nodes
            first, n_own = own_items(numa, period, node)
            end = n_own * (n_items // period)
            if atomic_load(phase.taken + LINE * node) < end:
                if not is_prepared:
                    call_2(phase.prepare, at, work)
                    is_prepared = True
                finished += _run_items(at, node, period, first, n_own, end, work)
        if finished > 0:
            atomic_add(phase.done, finished)
        wait_for(phase.done, n_items)


@kernel("void(int64, int64)")
def _nothing(phase, work):
    pass


NOTHING = _nothing  # to prepare where there is nothing to
STEP = _step  # the job of all programs


def padded(n_bytes: int) -> int:
    """n_bytes rounded up to whole cache lines."""
    return -(-n_bytes // 64) * 64


@dataclass
class Phase:
    """What a worker does between two points where all must have arrived.

    Attributes:
        prepare, run: void(phase, work) and void(phase, item, work).
        n_items: of work; with per_token, times the step's tokens; with per_split, times the splits of the longest of
            their contexts. Some of those may turn out to have no work.
        arguments: a packed struct whose first field is a PHASE, from HEADER.
        work_bytes: memory that a worker needs for it.
        name: what a user calls it, "blk.3.attn: queries".
        period: items that come again and again with other matrices of the same rows; 0 for n_items.
        weights: what items read that is the same in every step.
    """

    prepare: Kernel
    run: Kernel
    n_items: int
    arguments: np.ndarray
    work_bytes: int
    per_token: bool = False
    per_split: bool = False
    name: str = ""
    period: int = 0
    weights: Sequence[Part | GroupPart] = ()


class Phases:
    """Phases that follow each other, in memory that workers read.

    Attributes:
        address: of the program, the argument of STEP.
    """

    def __init__(self, pool: Pool):
        self.pool = pool
        self._memory: list[object] = []
        self._phases: list[Phase] = []
        self._program = PROGRAM.zeros()
        self.address = self._program.ctypes.data

    @property
    def names(self) -> list[str]:
        """The phases' names, in order."""
        return [phase.name for phase in self._phases]

    def keep(self, owner: np.ndarray) -> int:
        """The address of an array that lives as long as the program."""
        self._memory.append(owner)
        return owner.ctypes.data

    def vector(self, n: int) -> int:
        """Address of float32 (MOST_TOKENS, n) that phases share, zero at first."""
        return self.keep(aligned_bytes(padded(4 * n * MOST_TOKENS)))

    def add(self, phase: Phase, name: str = "") -> None:
        """Append a phase, under this name."""
        phase.name = name
        self._phases.append(phase)

    @property
    def work_bytes(self) -> int:
        """From one worker's memory, as the phases so far need it, to the next one's."""
        return worker_bytes(max(phase.work_bytes for phase in self._phases))

    def finish(self, work: np.ndarray | None = None) -> None:
        """Lay the phases out in memory; none can be added afterwards.

        Args:
            work: uint8 (at least n_workers * work_bytes,), page aligned, for programs that run one after the other.
        """
        per_worker = self.work_bytes
        work = self.keep(aligned_bytes(per_worker * self.pool.n_workers) if work is None else work)
        rows = aligned_bytes(PHASE_BYTES * len(self._phases)).view(np.int64).reshape(len(self._phases), -1)
        spread = self.pool.spread
        taken = self.keep(aligned_bytes(LINE * spread.n_nodes * len(rows)))
        for i, (row, phase) in enumerate(zip(rows, self._phases, strict=True)):
            row[: len(phase.arguments)] = phase.arguments
            PHASE.write(
                row, taken=taken + LINE * spread.n_nodes * i, period=max(1, phase.period or phase.n_items),
                items=phase.n_items, per_token=phase.per_token, per_split=phase.per_split,
                prepare=phase.prepare.address, run=phase.run.address, program=self.address,
            )  # fmt: skip
        PROGRAM.write(
            self._program, n_phases=len(rows), phases=self.keep(rows), work=work, work_bytes=per_worker,
            n_workers=self.pool.n_workers, numa=spread.struct,
        )  # fmt: skip

    def spans(self, node: int) -> list[tuple[int, int]]:
        """(address, bytes) of the weights that a NUMA node's workers read first."""
        return [
            span
            for phase in self._phases
            for part in phase.weights
            for span in part.spans(*self.pool.spread.own(phase.period or phase.n_items, node))
        ]


class Program(Phases):
    """A network's phases. One step at a time.

    Args:
        embedding: rows by token id.
        frequencies: float64 (R/2,), radians a position; or several such, one behind the other.
        magnitude: the length of the rotated unit vector.
        n_slots: how many blocks of cache rows a context has (attend phases name them by index).
        n_copies: of a token's embedding, one behind the other.

    Attributes:
        x: address of float32 (MOST_TOKENS, n_copies, embedding.n_cols), the tokens' embeddings when a step begins.

    Raises:
        QuantError: the embedding's rows are interleaved.
    """

    def __init__(
        self, pool: Pool, embedding: QuantMatrix, frequencies: np.ndarray, magnitude: float, n_slots: int,
        n_copies: int = 1,
    ):  # fmt: skip
        super().__init__(pool)
        check_single_rows(embedding)
        self._memory.append(embedding)
        self._frequencies = np.ascontiguousarray(frequencies, np.float64)
        self._cache, self._cache_rows = np.zeros((2, MOST_TOKENS, n_slots), np.int64)
        self._ids, self._positions = np.zeros((2, MOST_TOKENS), np.int64)
        self.x = self.vector(n_copies * embedding.n_cols)
        PROGRAM.write(
            self._program,
            expand=embedding.format.expand_address, embedding=embedding.address,
            embedding_row_bytes=embedding.row_bytes, embedding_blocks=embedding.n_cols // embedding.format.block,
            x=self.x, x_bytes=4 * embedding.n_cols, n_copies=n_copies, ids=self._ids.ctypes.data,
            positions=self._positions.ctypes.data, n_slots=n_slots,
            frequencies=self._frequencies.ctypes.data, n_frequencies=self._frequencies.size, magnitude=magnitude,
            rotations=self.vector(2 * self._frequencies.size), cache=self._cache.ctypes.data,
            cache_rows=self._cache_rows.ctypes.data,
        )  # fmt: skip

    def run(
        self,
        ids: Sequence[int],
        positions: Sequence[int],
        cache: np.ndarray,
        head_from: int = 0,
        until: str | None = None,
        cache_rows: np.ndarray | None = None,
    ) -> None:
        """One step. T: tokens.

        Args:
            positions: of each token in its context.
            cache: int64 (T, n_slots), addresses of the blocks of cache rows of each token's context; or (n_slots,), of
                the one context of all.
            cache_rows: rows of each, in which positions go round; None where none ends before the context.
            head_from: the first of the tokens that phases of the head have anything to do for.
            until: the name of the last phase that is to run.

        Raises:
            QuantError: more than MOST_TOKENS, or none; no phase has that name.
        """
        if not 1 <= len(ids) <= MOST_TOKENS:
            raise QuantError(f"{len(ids)} tokens in a step; it takes 1 to {MOST_TOKENS}")
        if until is not None and until not in self.names:
            raise QuantError(f"no phase is called {until!r}")
        n_phases = len(self._phases) if until is None else self.names.index(until) + 1
        tokens = slice(0, len(ids))
        self._ids[tokens], self._positions[tokens] = ids, positions
        self._cache[tokens], self._cache_rows[tokens] = cache, _ENDLESS if cache_rows is None else cache_rows
        PROGRAM.write(self._program, n_phases=n_phases, n_tokens=len(ids), head_from=head_from)
        _begin.ctypes(self.address)
        self.pool.run(STEP.address, self._program)
