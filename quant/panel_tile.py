"""The register tile of the many-token products: 32 rows of a weight panel times a few tokens of a token panel.

Integer dot products of 32 columns, one float32 multiplication by the product of their scales, float32 sums that
stay in registers over all columns of the panels. Layout of both panels: panel.py.

With VNNI: 6 tokens, bound by the two vector ports: 8 vpdpbusd and 3 or 4 float operations for 32 columns. With AVX2
4 tokens and 8 rows at a time, the products of 8 bits added in 16 bits as long as they fit (docs/lab-notes.md).
"""

from itertools import chain

from llvmlite import ir
from numba import types
from numba.core import cgutils

from quant import isa
from quant.jit import kernel
from quant.simd import F32, I8, I16, I32, I64, call, constant, define, load, pointer, splat, store

ROWS = 32
LANES = 16 if isa.has("avx512_vnni") else 8  # rows of a vector
# Vectors side by side share the loads of a token's words. The totals and as many dot products fill 24 of 32 registers;
# with AVX2 12 of 16, sums in 16 bits included.
PARTS, TOKENS = (2, 6) if isa.has("avx512_vnni") else (1, 4)
GROUPS = ROWS // (PARTS * LANES)  # passes over the panels
STEP = 32  # columns between two scalings
PART_BYTES = 640  # of a step for 16 rows: 512 of weights, two vectors of scales
STEP_BYTES = 2 * PART_BYTES
STEPS = 16  # of a weight panel at most: 20 KB, which stay in L1 while all tokens pass over them
AHEAD = STEPS * STEP_BYTES  # behind a weight panel: what to prefetch next i64 | lines of it a step i64
TOKEN_BYTES = 44  # of a token's step: 32 of q, d, and two words more

MINIMUM, OFFSET, HALVES, BYTES = range(4)  # kinds of formats: see panel.py
_MOST = {MINIMUM: 31, OFFSET: 31, HALVES: 63, BYTES: 255}  # weights as they lie in a panel are not above

_F32, _I32, _I8 = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES), ir.VectorType(I8, 4 * LANES)


def _multiply_add_16(builder, u, x):
    """u * x of neighbours added, i16; u unsigned. Saturates."""
    return call(builder, "llvm.x86.avx2.pmadd.ub.sw", ir.VectorType(I16, 2 * LANES), u, x)


def _add_neighbours(builder, v):
    """i16 -> i32, half as many."""
    return call(builder, "llvm.x86.avx2.pmadd.wd", _I32, v, constant(v.type, 1))


class _Step:
    """Emits one step of one tile: `n` tokens, addresses of the step's weights and tokens."""

    def __init__(self, builder, kind: int, n: int, weights, tokens):
        self.builder, self.kind, self.n, self.weights, self.tokens = builder, kind, n, weights, tokens

    def word(self, field: int, t: int, vector: ir.VectorType):
        """A word of token t in every lane: field 0 is d, 1 and 2 are the two others."""
        address = self.builder.add(self.tokens, I64(self.n * (STEP + 4 * field) + 4 * t))
        return splat(self.builder, load(self.builder, address, vector.element), vector)

    def row_floats(self, i: int) -> list:
        """The first or second vector of scales, of each part."""
        return [
            load(self.builder, self.builder.add(self.weights, I64(PART_BYTES * part + 16 * STEP + 64 * i)), _F32)
            for part in range(PARTS)
        ]

    def columns(self, k: int, t: int):
        """The q of columns k..k+3 of token t, for every row."""
        words = load(self.builder, self.builder.add(self.tokens, I64(STEP * t + k)), I32)
        return self.builder.bitcast(splat(self.builder, words, _I32), _I8)

    def row_bytes(self, k: int, part: int):
        """The weights of columns k..k+3."""
        return load(self.builder, self.builder.add(self.weights, I64(PART_BYTES * part + 16 * k)), _I8)

    def dots(self, starts: list, columns: range) -> list:
        """[part][t]: starts[t] + weights . q over some columns, in 32 bits."""
        if not isa.has("avx512_vnni"):
            return [self.dots_avx2(starts, columns)]
        sums = [list(starts) for _ in range(PARTS)]
        for k in columns[::4]:
            w = [self.row_bytes(k, part) for part in range(PARTS)]
            for t in range(self.n):
                x = self.columns(k, t)
                for part in range(PARTS):
                    operands = sums[part][t], w[part], x
                    sums[part][t] = call(self.builder, "llvm.x86.avx512.vpdpbusd.512", _I32, *operands)
        return sums

    def dots_avx2(self, starts: list, columns: range) -> list:
        """[t]: the same without VNNI."""
        b = self.builder
        if self.kind == BYTES:
            return self.signed_dots_avx2(columns)
        sums = list(starts)
        width = 4 * (0x7FFF // (2 * _MOST[self.kind] * 127))  # columns whose products fit 16 bits
        for first in columns[::width]:
            products = [None] * self.n
            for k in range(first, first + width, 4):
                w = self.row_bytes(k, 0)
                for t in range(self.n):
                    product = _multiply_add_16(b, w, self.columns(k, t))
                    products[t] = product if k == first else b.add(products[t], product)
            sums = [b.add(total, _add_neighbours(b, v)) for total, v in zip(sums, products, strict=True)]
        return sums

    def signed_dots_avx2(self, columns: range) -> list:
        """[t]: for weights of 8 bits, whose products don't fit: |w| times q with w's sign, at most 2*128*127."""
        b, sums = self.builder, [constant(_I32, 0)] * self.n
        for k in columns[::4]:
            w = b.xor(self.row_bytes(k, 0), constant(_I8, 0x80))
            magnitude = b.select(b.icmp_signed("<", w, constant(_I8, 0)), b.neg(w), w)
            for t in range(self.n):
                x = call(b, "llvm.x86.avx2.psign.b", _I8, self.columns(k, t), w)
                sums[t] = b.add(sums[t], _add_neighbours(b, _multiply_add_16(b, magnitude, x)))
        return sums

    def add_scaled(self, totals: list, dots: list, scales: list) -> None:
        """totals[part][t] += dots[part][t] * scales[part] * d[t]"""
        b = self.builder
        for t in range(self.n):
            d = self.word(0, t, _F32)
            for part in range(PARTS):
                dot = b.sitofp(dots[part][t], _F32)
                totals[part][t] = fma(b, b.fmul(scales[part], d), dot, totals[part][t])

    def add(self, totals: list) -> None:
        """Add this step to the totals."""
        if self.kind == HALVES:
            for half in range(2):
                starts = [self.word(1 + half, t, _I32) for t in range(self.n)]
                dots = self.dots(starts, range(16 * half, 16 * half + 16))
                self.add_scaled(totals, dots, self.row_floats(half))
            return
        starts = [self.word(1, t, _I32) if self.kind != MINIMUM else constant(_I32, 0) for t in range(self.n)]
        self.add_scaled(totals, self.dots(starts, range(STEP)), self.row_floats(0))
        if self.kind == MINIMUM:
            minima = self.row_floats(1)
            for t in range(self.n):
                s = self.word(1, t, _F32)
                for part in range(PARTS):
                    totals[part][t] = fma(self.builder, minima[part], s, totals[part][t])


def fma(builder, a, b, c):
    """a*b + c, rounded once."""
    return call(builder, f"llvm.fma.v{LANES}f32", _F32, a, b, c)


def _prefetch(builder, address, n_bytes) -> None:
    """The lines from `address` on. A few a step: a burst would hold the buffers that the tile's own loads need."""
    with cgutils.for_range_slice(builder, I64(0), n_bytes, I64(64), I64) as (offset, _):
        line = pointer(builder, builder.add(address, offset), I8)
        call(builder, "llvm.prefetch.p0", ir.VoidType(), line, I32(0), I32(2), I32(1))


def _tile(kind: int):
    """An intrinsic void(weights, tokens, sums, n_steps, n_tokens): sums[t] f32[32] += weights . tokens[t]."""

    def emit_for(builder, n: int, weights, tokens, sums, n_steps, ahead) -> None:
        at = [[builder.add(sums, I64(4 * ROWS * t + 64 * part)) for t in range(n)] for part in range(PARTS)]
        totals = [[cgutils.alloca_once_value(builder, load(builder, a, _F32)) for a in row] for row in at]
        stride = builder.mul(load(builder, builder.add(ahead, I64(8)), I64), I64(64))
        first_line = load(builder, ahead, I64)
        with cgutils.for_range(builder, n_steps) as loop:
            _prefetch(builder, builder.add(first_line, builder.mul(loop.index, stride)), stride)
            w = builder.add(weights, builder.mul(loop.index, I64(STEP_BYTES)))
            x = builder.add(tokens, builder.mul(loop.index, I64(TOKEN_BYTES * n)))
            values = [[builder.load(total) for total in row] for row in totals]
            _Step(builder, kind, n, w, x).add(values)
            for total, value in zip(chain(*totals), chain(*values), strict=True):
                builder.store(value, total)
        store(builder, ahead, builder.add(first_line, builder.mul(n_steps, stride)))
        for total, address in zip(chain(*totals), chain(*at), strict=True):
            store(builder, address, builder.load(total))

    def emit(builder, weights, tokens, sums, n_steps, n_tokens) -> None:
        done = builder.append_basic_block("done")
        switch = builder.switch(n_tokens, done)
        for n in range(1, TOKENS + 1):
            case = builder.append_basic_block(f"tokens_{n}")
            switch.add_case(I64(n), case)
            builder.position_at_end(case)
            with cgutils.for_range(builder, I64(GROUPS)) as group:
                part = builder.mul(builder.lshr(group.index, I64(1)), I64(PART_BYTES))
                half = builder.mul(builder.and_(group.index, I64(1)), I64(32))
                w, row_sums = builder.add(weights, builder.add(part, half)), builder.mul(group.index, I64(4 * LANES))
                emit_for(builder, n, w, tokens, builder.add(sums, row_sums), n_steps, builder.add(weights, I64(AHEAD)))
            builder.branch(done)
        builder.position_at_end(done)

    return define(types.void, (types.int64,) * 5, emit)


TILE = "void(int64, int64, int64, int64, int64)"
TILES: dict[int, int] = {}  # addresses by kind; none below AVX2, where their instructions would abort the process

if isa.has("avx2"):
    _minimum, _offset, _halves, _bytes = _tile(MINIMUM), _tile(OFFSET), _tile(HALVES), _tile(BYTES)

    @kernel(TILE)
    def _minimum_tile(weights, tokens, sums, n_steps, n_tokens):
        _minimum(weights, tokens, sums, n_steps, n_tokens)

    @kernel(TILE)
    def _offset_tile(weights, tokens, sums, n_steps, n_tokens):
        _offset(weights, tokens, sums, n_steps, n_tokens)

    @kernel(TILE)
    def _halves_tile(weights, tokens, sums, n_steps, n_tokens):
        _halves(weights, tokens, sums, n_steps, n_tokens)

    @kernel(TILE)
    def _bytes_tile(weights, tokens, sums, n_steps, n_tokens):
        _bytes(weights, tokens, sums, n_steps, n_tokens)

    TILES[MINIMUM], TILES[OFFSET] = _minimum_tile.address, _offset_tile.address
    TILES[HALVES], TILES[BYTES] = _halves_tile.address, _bytes_tile.address
