"""The row loops of the decode kernels of formats with 16 rows interleaved (interleave.py), for one token or a few.

A lane is a row: a vector of weights holds 4 columns of 16 rows, and a token's 4 columns are repeated for all of them. A
format emits the code for a block of 256 columns; the sums of up to MAX_BATCH tokens stay in registers. A token's sums
are formed in the same order however many tokens there are, so its results are the same to the bit.
"""

from collections.abc import Callable

from llvmlite import ir
from numba import types
from numba.core import cgutils

from quant.batch import MAX_BATCH
from quant.block_format import GEMV, GEMV_BATCH
from quant.gemv.activations import IN_ORDER, K_BLOCK_BYTES, SCALES, SUMS_16, k_blocks_at
from quant.gemv.plain import AHEAD, prefetch_start, specialize
from quant.simd.core import F32, I8, I16, I32, I64, constant, define, f32x16, i8x64, i32x16, load, splat, store
from quant.simd.memory import emit_load_f16x16, emit_prefetch
from quant.simd.register_tile import register_tile, switch
from quant.simd.rows16 import VECTOR_ROWS
from quant.target import isa, tuning
from quant.target.jit import kernel

BYTES, WORDS, FLOATS = i8x64.ir, i32x16.ir, f32x16.ir
# Tokens that share the decoded weights; below AVX2 a vector is four registers or more.
TOGETHER = MAX_BATCH if isa.has("avx2") else 1


def masked(builder, words, shift: int, mask: int):
    """(words >> shift) & mask; a negative shift is one to the left. `mask` is repeated if it has 8 bits."""
    kind = words.type
    if shift:
        words = (builder.lshr if shift > 0 else builder.shl)(words, constant(kind, abs(shift)))
    return builder.and_(words, constant(kind, mask))


def merged(builder, words, others, shift: int, mask: int):
    """`words` with the bits (others >> shift) & mask set."""
    return builder.or_(words, masked(builder, others, shift, mask))


def as_bytes(builder, words):
    """32-bit lanes as 4 bytes each."""
    return builder.bitcast(words, BYTES)


class Block:
    """The code of loads from one block of 16 rows. Each line read asks for those AHEAD and near."""

    def __init__(self, builder, address, ahead, near) -> None:
        self.builder, self._address, self._ahead, self._near = builder, address, ahead, near
        self._lines: set[int] = set()

    def _load(self, offset: int, type_: ir.Type):
        self._prefetch(offset)
        return load(self.builder, self.builder.add(self._address, I64(offset)), type_)

    def _prefetch(self, offset: int) -> None:
        if offset // 64 in self._lines:
            return
        self._lines.add(offset // 64)
        for address, locality in (self._ahead, 2), (self._near, 3):
            emit_prefetch(self.builder, self.builder.add(address, I64(offset)), locality)

    def words(self, offset: int):
        """A 32-bit word of each row."""
        return self._load(offset, WORDS)

    def halves(self, offset: int):
        """A 16-bit float of each row, as float32."""
        self._prefetch(offset)
        return emit_load_f16x16(self.builder, self.builder.add(self._address, I64(offset)))

    def shorts(self, offset: int):
        """A 16-bit word of each row, in 32 bits."""
        return self.builder.zext(self._load(offset, ir.VectorType(I16, VECTOR_ROWS)), WORDS)

    def signed_bytes(self, offset: int):
        """A signed byte of each row, as float32."""
        bytes_ = self._load(offset, ir.VectorType(I8, VECTOR_ROWS))
        return self.builder.sitofp(self.builder.sext(bytes_, WORDS), FLOATS)


class Token:
    """The code of loads from one token's k-block of 256 columns."""

    def __init__(self, builder, k_block) -> None:
        self._builder, self._k_block = builder, k_block

    def _everywhere(self, offset: int, scalar: ir.Type, vector: ir.VectorType):
        address = self._builder.add(self._k_block, I64(offset))
        return splat(self._builder, load(self._builder, address, scalar), vector)

    def columns(self, k: int):
        """Columns k..k+3 for every row."""
        return as_bytes(self._builder, self._everywhere(IN_ORDER + k, I32, WORDS))

    def scale(self, block: int):
        """The scale of 32 columns."""
        return self._everywhere(SCALES + 8 * block, F32, FLOATS)

    def scaled_sum(self, block: int):
        """The sum of 32 columns times their scale."""
        return self._everywhere(SCALES + 8 * block + 4, F32, FLOATS)

    def half_sum(self, i: int):
        """The sum of columns 16i..16i+15, without a scale."""
        return self._everywhere(SUMS_16 + 4 * (4 * (i % 4) + i // 4), F32, FLOATS)


AddBlock = Callable[[Block, list[Token], list], list]


def _emit_rows(block_bytes: int, add_block: AddBlock, builder, w, n_rows, n_cols, near, q8_rows, outs) -> None:
    """outs[t][r] = row r . q8_rows[t]; lists of as many values as there are tokens."""
    n_k_blocks, n_groups = builder.lshr(n_cols, I64(8)), builder.lshr(n_rows, I64(4))
    size = I64(VECTOR_ROWS * block_bytes)
    last = builder.add(w, builder.mul(size, builder.sub(builder.mul(n_k_blocks, n_groups), I64(1))))
    here = cgutils.alloca_once_value(builder, w)

    def later(p, distance):
        """The address `distance` behind p, or that of the last block where it is over."""
        q = builder.add(p, distance)
        return builder.select(builder.icmp_signed("<", q, last), q, last)

    def add(index, totals):
        p = builder.load(here)
        block = Block(builder, p, later(p, I64(AHEAD)), later(p, near))
        at = builder.mul(index, I64(K_BLOCK_BYTES))
        tokens = [Token(builder, builder.add(q8, at)) for q8 in q8_rows]
        totals = [add_block(block, tokens, totals[0])]
        builder.store(builder.add(p, size), here)
        return totals

    with cgutils.for_range(builder, n_groups) as group:
        (totals,) = register_tile(builder, n_k_blocks, [[constant(FLOATS, 0.0)] * len(q8_rows)], add)
        for total, out in zip(totals, outs, strict=True):
            store(builder, builder.add(out, builder.mul(group.index, I64(4 * VECTOR_ROWS))), total)


def _one(block_bytes: int, add_block: AddBlock):
    """An intrinsic void(w, n_rows, n_cols, near, k_blocks, out)."""

    def emit(builder, w, n_rows, n_cols, near, k_blocks, out) -> None:
        _emit_rows(block_bytes, add_block, builder, w, n_rows, n_cols, near, [k_blocks], [out])

    return define(types.void, (types.int64,) * 6, emit)


def _batch(block_bytes: int, add_block: AddBlock):
    """An intrinsic void(w, n_rows, n_cols, near, q8_rows, outs, skipped, offset, n_tokens), up to TOGETHER."""

    def emit(builder, w, n_rows, n_cols, near, q8_rows, outs, skipped, offset, n_tokens) -> None:
        def emit_for(n: int) -> None:
            tables = [
                [builder.add(load(builder, builder.add(table, I64(8 * t)), I64), behind) for t in range(n)]
                for table, behind in ((q8_rows, skipped), (outs, offset))
            ]
            _emit_rows(block_bytes, add_block, builder, w, n_rows, n_cols, near, *tables)

        switch(builder, n_tokens, TOGETHER, emit_for)

    return define(types.void, (types.int64,) * 9, emit)


# What specialize() gives the two templates below.
BLOCK_BYTES = NEAR = 0
one = batch = None


def _gemv(w, n_rows, n_cols, q8, out):
    prefetch_start(w, n_rows * (n_cols // 256) * BLOCK_BYTES)
    one(w, n_rows, n_cols, NEAR, q8 + k_blocks_at(n_cols), out)


def _gemv_batch(w, n_rows, n_cols, q8_rows, outs, offset, n_tokens):
    prefetch_start(w, n_rows * (n_cols // 256) * BLOCK_BYTES)
    for t in range(0, n_tokens, TOGETHER):
        tokens = min(TOGETHER, n_tokens - t)
        batch(w, n_rows, n_cols, NEAR, q8_rows + 8 * t, outs + 8 * t, k_blocks_at(n_cols), offset, tokens)


def kernels(name: str, block_bytes: int, add_block: AddBlock):
    """gemv and gemv_batch of an interleaved format: as gemv.kernels, for rows that are multiples of 16.

    Args:
        name: of the format.
        block_bytes: of one row's block.
        add_block: (block, tokens, totals f32x16) -> totals, for 256 columns of 16 rows. Emits code.
    """
    names = {"BLOCK_BYTES": block_bytes, "one": _one(block_bytes, add_block), "batch": _batch(block_bytes, add_block)}
    names["NEAR"] = tuning.found().tuning.near_interleaved
    return (
        kernel(GEMV)(specialize(_gemv, f"gemv_{name}", **names)),
        kernel(GEMV_BATCH)(specialize(_gemv_batch, f"gemv_batch_{name}", **names)),
    )
