"""A few tokens through the whole network in one job: a program of phases that all workers go through together.

A phase is a piece of the network whose units of work don't depend on each other (rows of matrices, heads). Its record
holds the addresses of two kernels, prepare(phase, work) and run(phase, unit, work), and their arguments. Every worker
prepares a phase for itself, in work memory of its own (the norm of the input, its 8-bit form, the router's choice:
microseconds), then takes units until there are none, then waits until all are done.

There is no barrier: a phase ends when its units are done, not when all workers have come. A worker that the system
took the core from finds the phases it missed without units and passes through them. What it prepares there may be
made of vectors that others are already changing; nothing comes of it, since it gets no unit of that phase.

Tokens follow each other in one context: each sees those before it. A phase reads its weights once for all of them, and
does for each the same operations in the same order as for a token alone, so that results are the same to the bit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from quant.errors import QuantError
from quant.gemv.plain import MAX_BATCH
from quant.matrix import QuantMatrix, check_single_rows
from quant.simd.memory import bits_to_f32, load_f64, load_i64, store_f32, store_i64
from quant.target.jit import Kernel, inline, kernel
from quant.threads.atomics import atomic_add, atomic_load, call_2, call_3, wait_for
from quant.threads.pool import Pool, aligned_bytes, worker_bytes

# A phase's record: two counters on cache lines of their own, then int64 words; from ARGUMENTS on they are the kernels'.
NEXT, DONE, N_UNITS, UNITS, PER_TOKEN, PER_CHUNK, PREPARE, RUN, STATE = 0, 64, *range(128, 184, 8)
ARGUMENTS = 192
PHASE_BYTES = 1024

# The program: how many phases, where; workers' memory; then the state of the step, STATE in every phase.
N_PHASES, PHASES, WORK, WORK_BYTES, EXPAND, EMBEDDING, EMBEDDING_ROW_BYTES, EMBEDDING_BLOCKS, X = range(0, 72, 8)
X_BYTES, IDS, N_TOKENS, POSITION, HEAD_FROM, FREQUENCIES, N_FREQUENCIES, MAGNITUDE, TURNS, CACHE = range(72, 152, 8)
_PROGRAM_BYTES = 192

MOST_TOKENS = MAX_BATCH  # of a step
MOST_CHUNKS = 32  # pieces of the context that attention hands out
LEAST_CHUNK = 64  # tokens of a piece, at least; pieces are multiples of it


@inline
def tokens_of(phase):
    """How many tokens this step has."""
    return load_i64(load_i64(phase + STATE) + N_TOKENS)


@inline
def cached_by(phase, t):
    """Tokens of the context that the step's token t sees, itself included."""
    return load_i64(load_i64(phase + STATE) + POSITION) + t + 1


@inline
def chunk_length(n_cached):
    """Tokens of a piece of a context of n_cached."""
    return (n_cached + MOST_CHUNKS * LEAST_CHUNK - 1) // (MOST_CHUNKS * LEAST_CHUNK) * LEAST_CHUNK


@inline
def chunks_of(n_cached):
    """Pieces of a context of n_cached."""
    return (n_cached + chunk_length(n_cached) - 1) // chunk_length(n_cached)


@inline
def _begin_token(program, t):
    """The rotations of a token's position, and its embedding."""
    n_frequencies, magnitude = load_i64(program + N_FREQUENCIES), bits_to_f32(load_i64(program + MAGNITUDE))
    turns = load_i64(program + TURNS) + 8 * n_frequencies * t
    for i in range(n_frequencies):
        angle = (load_i64(program + POSITION) + t) * load_f64(load_i64(program + FREQUENCIES) + 8 * i)
        store_f32(turns + 8 * i, np.float32(math.cos(angle)) * magnitude)
        store_f32(turns + 8 * i + 4, np.float32(math.sin(angle)) * magnitude)
    token, n_blocks = load_i64(load_i64(program + IDS) + 8 * t), load_i64(program + EMBEDDING_BLOCKS)
    row = load_i64(program + EMBEDDING) + load_i64(program + EMBEDDING_ROW_BYTES) * token
    call_3(load_i64(program + EXPAND), row, n_blocks, load_i64(program + X) + load_i64(program + X_BYTES) * t)


@inline
def reset(program, n_tokens, n_chunks):
    """This step's units in all phases, none taken."""
    for p in range(load_i64(program + N_PHASES)):
        phase = load_i64(program + PHASES) + PHASE_BYTES * p
        n_units = load_i64(phase + UNITS)
        if load_i64(phase + PER_TOKEN) != 0:
            n_units *= n_tokens
        if load_i64(phase + PER_CHUNK) != 0:
            n_units *= n_chunks
        store_i64(phase + N_UNITS, n_units)
        store_i64(phase + NEXT, 0)
        store_i64(phase + DONE, 0)


@kernel("void(int64)")
def _begin(program):
    """Reset the counters; this step's units, rotations and embeddings."""
    n_tokens, n_chunks = load_i64(program + N_TOKENS), 1
    for t in range(n_tokens):
        _begin_token(program, t)
        n_chunks = max(n_chunks, chunks_of(load_i64(program + POSITION) + t + 1))
    reset(program, n_tokens, n_chunks)


@kernel("void(int64, int64)")
def _step(program, worker):
    """The job: all phases in order."""
    work = load_i64(program + WORK) + load_i64(program + WORK_BYTES) * worker
    for p in range(load_i64(program + N_PHASES)):
        phase = load_i64(program + PHASES) + PHASE_BYTES * p
        n_units = load_i64(phase + N_UNITS)
        if atomic_load(phase + NEXT) < n_units:
            call_2(load_i64(phase + PREPARE), phase, work)
            finished = 0
            unit = atomic_add(phase + NEXT, 1)
            while unit < n_units:
                call_3(load_i64(phase + RUN), phase, unit, work)
                finished += 1
                unit = atomic_add(phase + NEXT, 1)
            atomic_add(phase + DONE, finished)
        wait_for(phase + DONE, n_units)


@kernel("void(int64, int64)")
def _nothing(phase, work):
    pass


NOTHING = _nothing  # to prepare where there is nothing to
STEP = _step  # the job of all programs


def float_bits(value: float) -> int:
    """A float32 as a word of a phase's arguments; kernels read it with bits_to_f32."""
    return int(np.float32(value).view(np.int32))


def padded(n_bytes: int) -> int:
    """n_bytes rounded up to whole cache lines."""
    return -(-n_bytes // 64) * 64


@dataclass
class Phase:
    """What a worker does between two points where all must have arrived.

    Attributes:
        prepare, run: void(phase, work) and void(phase, unit, work).
        n_units: units of work; with per_token, times the step's tokens; with per_chunk, times the pieces of the
            longest of their contexts. Some of those may turn out to have no work.
        arguments: int64 words for the kernels.
        work_bytes: memory that a worker needs for it.
    """

    prepare: Kernel
    run: Kernel
    n_units: int
    arguments: list[int]
    work_bytes: int
    per_token: bool = False
    per_chunk: bool = False


class Phases:
    """Phases that follow each other, in memory that workers read.

    Attributes:
        address: of the program, the argument of STEP.
    """

    def __init__(self, pool: Pool):
        self.pool = pool
        self._memory: list[object] = []
        self._phases: list[Phase] = []
        self._program = aligned_bytes(_PROGRAM_BYTES).view(np.int64)
        self.address = self._program.ctypes.data

    def _set(self, words: dict[int, int]) -> None:
        for offset, value in words.items():
            self._program[offset // 8] = value

    def keep(self, owner: np.ndarray) -> int:
        """The address of an array that lives as long as the program."""
        self._memory.append(owner)
        return owner.ctypes.data

    def vector(self, n: int) -> int:
        """Address of float32 (MOST_TOKENS, n) that phases share, zero at first."""
        return self.keep(aligned_bytes(padded(4 * n * MOST_TOKENS)))

    def add(self, phase: Phase) -> None:
        """Append a phase."""
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
        words = aligned_bytes(PHASE_BYTES * len(self._phases)).view(np.int64).reshape(len(self._phases), -1)
        for row, phase in zip(words, self._phases, strict=True):
            row[UNITS // 8], row[PER_TOKEN // 8], row[PER_CHUNK // 8] = phase.n_units, phase.per_token, phase.per_chunk
            row[PREPARE // 8], row[RUN // 8] = phase.prepare.address, phase.run.address
            row[STATE // 8] = self.address
            row[ARGUMENTS // 8 : ARGUMENTS // 8 + len(phase.arguments)] = phase.arguments
        per_worker = self.work_bytes
        work = self.keep(aligned_bytes(per_worker * self.pool.n_workers) if work is None else work)
        self._set({N_PHASES: len(words), PHASES: self.keep(words), WORK: work, WORK_BYTES: per_worker})


class Program(Phases):
    """A network's phases. One step at a time.

    Args:
        embedding: rows by token id.
        frequencies: float64 (R/2,), radians a position.
        magnitude: the length of the rotated unit vector.
        n_cache_rows: how many blocks of cache rows there are (attend phases name them by index).

    Attributes:
        x: address of float32 (MOST_TOKENS, embedding.n_cols), the tokens' embeddings when a step begins.

    Raises:
        QuantError: the embedding's rows are interleaved.
    """

    def __init__(
        self, pool: Pool, embedding: QuantMatrix, frequencies: np.ndarray, magnitude: float, n_cache_rows: int
    ):
        super().__init__(pool)
        check_single_rows(embedding)
        self._memory.append(embedding)
        self._frequencies = np.ascontiguousarray(frequencies, np.float64)
        self.cache = np.zeros(n_cache_rows, np.int64)
        self._ids = np.zeros(MOST_TOKENS, np.int64)
        self.x = self.vector(embedding.n_cols)
        self._set(
            {
                EXPAND: embedding.format.expand_address,
                EMBEDDING: embedding.address,
                EMBEDDING_ROW_BYTES: embedding.row_bytes,
                EMBEDDING_BLOCKS: embedding.n_cols // embedding.format.block,
                X: self.x,
                X_BYTES: 4 * embedding.n_cols,
                IDS: self._ids.ctypes.data,
                FREQUENCIES: self._frequencies.ctypes.data,
                N_FREQUENCIES: self._frequencies.size,
                MAGNITUDE: float_bits(magnitude),
                TURNS: self.vector(2 * self._frequencies.size),
                CACHE: self.cache.ctypes.data,
            }
        )

    def run(self, ids: Sequence[int], position: int, cache: np.ndarray, head_from: int = 0) -> None:
        """One step: tokens `ids` from `position` on.

        Args:
            cache: int64 addresses of the blocks of cache rows.
            head_from: the first of the tokens that phases of the head have anything to do for.

        Raises:
            QuantError: more than MOST_TOKENS, or none.
        """
        if not 1 <= len(ids) <= MOST_TOKENS:
            raise QuantError(f"{len(ids)} tokens in a step; it takes 1 to {MOST_TOKENS}")
        self._ids[: len(ids)] = ids
        self.cache[:] = cache
        self._set({N_TOKENS: len(ids), POSITION: position, HEAD_FROM: head_from})
        _begin.ctypes(self.address)
        self.pool.run(STEP.address, self._program)
