"""One k-block of the register tile (microkernel.py): 32 columns of a weight panel and of a few tokens, as LLVM IR.

Integer dot products, scaled and added to float32 totals. Layout of both panels: gemm/packed.py.
"""

from llvmlite import ir

from quant.simd.core import F32, I8, I32, I64, call, constant, load, splat
from quant.simd.dots import emit_dot_i8, emit_dot_u8, emit_pairs_i16, emit_pairs_u8
from quant.simd.floats import emit_fma
from quant.target import isa

ROWS = 32
LEVEL = isa.NEON if isa.has(isa.NEON) else "avx2"  # the lowest that there is a micro-kernel for
LANES = 16 if isa.has("avx512_vnni") else 8 if isa.has("avx2") else 4  # rows of a vector
# Vectors side by side share the loads of a token's words. The totals and as many dot products fill 24 of 32 registers;
# with AVX2, sums in 16 bits included, 9 of 16: with a fourth token they spill.
PARTS, VECTOR_TOKENS = (1, 3) if LANES == 8 else (2, 6)
# With AMX dot products come from memory, and the totals have the 24 registers for themselves. A few tokens leave most
# of a tile's rows idle.
if isa.has("amx"):
    VECTOR_TOKENS = 4
TOKENS = 12 if isa.has("amx") else VECTOR_TOKENS  # of a block at most; more than VECTOR_TOKENS go through AMX tiles
PASSES = ROWS // (PARTS * LANES)  # passes over the panels
K_BLOCK = 32  # columns between two scalings
AFFINE, SYMMETRIC, TWO_SCALES, SIGNED_BYTES, TWO_MINIMA = range(5)  # kinds of formats: see gemm/packed.py
# Weights as they lie in a panel are not above:
_MOST = {AFFINE: 31, SYMMETRIC: 31, TWO_SCALES: 63, SIGNED_BYTES: 255, TWO_MINIMA: 45}


def part_bytes(kind: int) -> int:
    """Of a k-block for 16 rows: 512 of weights, and two or three vectors of scales and minima."""
    return 16 * K_BLOCK + 64 * (3 if kind == TWO_MINIMA else 2)


K_BLOCK_BYTES = 2 * part_bytes(AFFINE)  # and of all other kinds but one
K_BLOCKS = 16  # of a weight panel at most: 20 to 22 KB, which stay in L1 while all tokens pass over them
# Behind a weight panel: what to prefetch next i64 | lines of it a k-block i64.
AHEAD = K_BLOCKS * 2 * part_bytes(TWO_MINIMA)
AMX = AHEAD + 64  # behind that, with AMX: products of two k-blocks and the tile file
TOKEN_BYTES = 44  # of a token's k-block: 32 of q, d, and two words more

# Integer sums start at the bits of 1.5 * 2**23: they are float32 numbers without a conversion, too large by that much,
# as sums of 32 products stay below 2**22. A scale has 18 bits at most, so that its product with the excess is exact.
BIAS, BIAS_FLOAT = 0x4B400000, 1.5 * 2**23

VF32, VI32, VI8 = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES), ir.VectorType(I8, 4 * LANES)


class KBlock:
    """Emits one k-block of one tile: `n` tokens, addresses of the k-block's weights and tokens."""

    def __init__(self, builder, kind: int, n: int, weights, tokens):
        self.builder, self.kind, self.n, self.weights, self.tokens = builder, kind, n, weights, tokens
        self.between = part_bytes(kind) if LANES == 16 else 4 * LANES  # bytes from a part's rows to the next one's

    def word(self, field: int, t: int, vector: ir.VectorType):
        """A word of token t in every lane: field 0 is d, 1 and 2 are the two others."""
        address = self.builder.add(self.tokens, I64(self.n * (K_BLOCK + 4 * field) + 4 * t))
        return splat(self.builder, load(self.builder, address, vector.element), vector)

    def row_floats(self, i: int) -> list:
        """Vector i of scales and minima, of each part."""
        places = [self.between * part + 16 * K_BLOCK + 64 * i for part in range(PARTS)]
        return [load(self.builder, self.builder.add(self.weights, I64(place)), VF32) for place in places]

    def columns(self, k: int, t: int):
        """The q of columns k..k+3 of token t, for every row."""
        words = load(self.builder, self.builder.add(self.tokens, I64(K_BLOCK * t + k)), I32)
        return self.builder.bitcast(splat(self.builder, words, VI32), VI8)

    def row_bytes(self, k: int, part: int):
        """The weights of columns k..k+3."""
        return load(self.builder, self.builder.add(self.weights, I64(self.between * part + 16 * k)), VI8)

    def dots(self, starts: list, columns: range) -> list:
        """[part][t]: starts[t] + weights . q over some columns, in 32 bits."""
        if LANES == 8:
            return [self.dots_avx2(starts, columns)]
        add, sums = emit_dot_u8, [list(starts) for _ in range(PARTS)]
        # Weights of 8 bits: sdot, which all CPUs of this level have; as unsigned they would need usdot (i8mm).
        is_signed = self.kind == SIGNED_BYTES and isa.has(isa.NEON)
        if is_signed:
            add, sums = emit_dot_i8, [[constant(VI32, BIAS)] * self.n for _ in range(PARTS)]
        for k in columns[::4]:
            w = [self.row_bytes(k, part) for part in range(PARTS)]
            if is_signed:
                w = [self.builder.xor(v, constant(VI8, 0x80)) for v in w]
            for t in range(self.n):
                x = self.columns(k, t)
                for part in range(PARTS):
                    sums[part][t] = add(self.builder, sums[part][t], w[part], x)
        return sums

    def dots_avx2(self, starts: list, columns: range) -> list:
        """[t]: the same without VNNI."""
        b = self.builder
        if self.kind == SIGNED_BYTES:
            return self.signed_dots_avx2(columns)
        sums = list(starts)
        width = 4 * (0x7FFF // (2 * _MOST[self.kind] * 127))  # columns whose products fit 16 bits
        for first in columns[::width]:
            products = [None] * self.n
            for k in range(first, first + width, 4):
                w = self.row_bytes(k, 0)
                for t in range(self.n):
                    product = emit_pairs_u8(b, w, self.columns(k, t))
                    products[t] = product if k == first else b.add(products[t], product)
            sums = [b.add(total, emit_pairs_i16(b, v)) for total, v in zip(sums, products, strict=True)]
        return sums

    def signed_dots_avx2(self, columns: range) -> list:
        """[t]: for weights of 8 bits, whose products don't fit: |w| times q with w's sign, at most 2*128*127."""
        b, sums = self.builder, [constant(VI32, BIAS)] * self.n
        for k in columns[::4]:
            w = b.xor(self.row_bytes(k, 0), constant(VI8, 0x80))
            magnitude = b.select(b.icmp_signed("<", w, constant(VI8, 0)), b.neg(w), w)
            for t in range(self.n):
                x = call(b, "llvm.x86.avx2.psign.b", VI8, self.columns(k, t), w)
                sums[t] = b.add(sums[t], emit_pairs_i16(b, emit_pairs_u8(b, magnitude, x)))
        return sums

    def scaled(self, dots: list, scales: list) -> list:
        """[part][t]: (dots - BIAS) * scales."""
        b = self.builder
        starts = [b.fmul(scale, constant(VF32, -BIAS_FLOAT)) for scale in scales]
        return [
            [emit_fma(b, scale, b.bitcast(dot, VF32), start) for dot in row]
            for row, scale, start in zip(dots, scales, starts, strict=True)
        ]

    def dots_of_half(self, half: int) -> list:
        """[part][t] of TWO_SCALES. The fence is the compiler's: words loaded before it would spill totals."""
        self.builder.fence("seq_cst", "singlethread")
        starts = [self.word(1 + half, t, VI32) for t in range(self.n)]
        return self.dots(starts, range(16 * half, 16 * half + 16))

    def scaled_halves(self) -> list:
        """[part][t] of TWO_SCALES: both halves' dot products, each times its scale.

        The second half's are exact in float32 without what they are too large by. Zen 5 has ports for that addition
        which products leave idle; elsewhere there are as many operations as with a scale and a token's scale a half.
        """
        b, first = self.builder, self.scaled(self.dots_of_half(0), self.row_floats(0))
        dots, scales = self.dots_of_half(1), self.row_floats(1)
        return [
            [
                emit_fma(b, scale, b.fadd(b.bitcast(dot, VF32), constant(VF32, -BIAS_FLOAT)), before)
                for dot, before in zip(row, row_before, strict=True)
            ]
            for row, scale, row_before in zip(dots, scales, first, strict=True)
        ]

    def add(self, totals: list) -> None:
        """Add this k-block to the totals."""
        n_minima = {AFFINE: 1, TWO_MINIMA: 2}.get(self.kind, 0)
        if self.kind == TWO_SCALES:
            products = self.scaled_halves()
        else:
            starts = [constant(VI32, BIAS) if n_minima else self.word(1, t, VI32) for t in range(self.n)]
            products = self.scaled(self.dots(starts, range(K_BLOCK)), self.row_floats(0))
        self.add_times(0, products, totals)
        for i in range(1, 1 + n_minima):
            self.add_times(i, [[minimum] * self.n for minimum in self.row_floats(i)], totals)

    def add_times(self, field: int, products: list, totals: list) -> None:
        """totals[part][t] += products[part][t] * a word of token t."""
        for t in range(self.n):
            word = self.word(field, t, VF32)
            for part in range(PARTS):
                totals[part][t] = emit_fma(self.builder, products[part][t], word, totals[part][t])


class KBlocks:
    """The k-blocks of one block of `n` tokens: addresses of the first's weights and tokens, and how many."""

    def __init__(self, builder, kind: int, n: int, weights, tokens, n_k_blocks):
        self.builder, self.kind, self.n = builder, kind, n
        self.weights, self.tokens, self.n_k_blocks = weights, tokens, n_k_blocks

    def addresses(self, index) -> tuple:
        """Of the weights and tokens of a k-block."""
        weights = self.builder.add(self.weights, self.builder.mul(index, I64(2 * part_bytes(self.kind))))
        return weights, self.builder.add(self.tokens, self.builder.mul(index, I64(TOKEN_BYTES * self.n)))

    def at(self, index) -> KBlock:
        """Called for every k-block in order."""
        return KBlock(self.builder, self.kind, self.n, *self.addresses(index))
