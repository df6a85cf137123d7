"""Loops whose running totals stay in registers: the inner loops of all products of matrices. Emits code.

A tile is some rows of vectors of totals. A Python loop over vector variables can't be unrolled, so the whole loop is
emitted, once for each size of tile that is needed.
"""

from collections.abc import Callable, Iterable

from numba.core import cgutils

from quant.simd.core import I64
from quant.simd.floats import emit_fma


def register_tile(builder, n, totals: list[list], add: Callable) -> list[list]:
    """The totals (rows of vectors) after totals = add(index, totals) for each index in 0..n-1.

    LLVM keeps them in registers if they and what add() loads fit: 32 of AVX-512, 16 of AVX2.
    """
    places = [[cgutils.alloca_once_value(builder, total) for total in row] for row in totals]
    with cgutils.for_range(builder, n) as loop:
        values = add(loop.index, [[builder.load(place) for place in row] for row in places])
        for row, row_values in zip(places, values, strict=True):
            for place, value in zip(row, row_values, strict=True):
                builder.store(value, place)
    return [[builder.load(place) for place in row] for row in places]


def add_products(builder, totals: list[list], rows: Iterable, columns: list) -> list[list]:
    """totals[r][c] + rows[r] * columns[c]. Of rows, the code of one after the other, each with its products."""
    return [
        [emit_fma(builder, a, b, total) for b, total in zip(columns, row_totals, strict=True)]
        for a, row_totals in zip(rows, totals, strict=True)
    ]


def switch(builder, n, most: int, emit: Callable[[int], None]) -> None:
    """The code of emit(i) for each i in 1..most, of which that of the int64 `n` runs; none if `n` is another number."""
    done = builder.append_basic_block("done")
    cases = builder.switch(n, done)
    for i in range(1, most + 1):
        case = builder.append_basic_block(f"case_{i}")
        cases.add_case(I64(i), case)
        builder.position_at_end(case)
        emit(i)
        builder.branch(done)
    builder.position_at_end(done)
