"""The dot products of gemm/microkernel_k_block.py by AMX tiles, for blocks of more than VECTOR_TOKENS tokens.

The panels lie as one product wants them: a token's 32 columns of a k-block are a row of its signed operand, four
columns of 16 rows of weights a row of the unsigned one. It yields the sums of up to 16 tokens and 16 rows of weights,
which vectors read back from memory; they are scaled as ever, so the results are those of VNNI code to the bit. Where
scales change every 16 columns, so deep are the products.

A k-block is scaled while the products of the next are under way: tiles, stores and vectors have ports of their own.
What bounds it are the vector operations that remain, if tiles take 16 cycles each as documented.

All blocks of a product but the last have TOKENS tokens, so that configure() is needed once for it: both sizes have
registers of their own. Their shapes are exact; nothing behind the last token is read.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils

from quant.gemm.amx_emulated import EmulatedTiles
from quant.gemm.microkernel_k_block import (
    AMX,
    K_BLOCK,
    PARTS,
    TOKENS,
    TWO_SCALES,
    VECTOR_TOKENS,
    VI32,
    KBlock,
    KBlocks,
    part_bytes,
)
from quant.simd.core import I8, I64, define, load
from quant.target import amx, isa
from quant.target.jit import inline

Tiles = EmulatedTiles if isa.LEVEL == isa.EMULATED else amx.Tiles

_ROW = 64  # bytes of sums of a token
_PRODUCT = _ROW * TOKENS
_PRODUCTS = 2 * PARTS * _PRODUCT  # of a k-block: both halves, where there are two
FILE = AMX + 2 * _PRODUCTS
SCRATCH_END = FILE + Tiles.FILE_BYTES if isa.has("amx") else AMX


def _sums(is_last: bool, part: int) -> int:
    """The register of a block of tokens and 16 rows."""
    return 2 * is_last + part


def _tokens(is_last: bool) -> int:
    """The register of a block of tokens."""
    return 4 + is_last


def _weights(part: int) -> int:
    """The register of 16 rows."""
    return 6 + part


def shapes(depth: int, most: int, last: int) -> list[tuple[int, int]]:
    """(rows, bytes of a row) of all registers: products of `depth` columns, of `most` tokens but for the last block."""
    found = [(0, 0)] * amx.TILES
    for is_last, n in ((False, most), (True, last)):
        found[_tokens(is_last)] = n, depth
        for part in range(PARTS):
            found[_sums(is_last, part)] = n, _ROW
            found[_weights(part)] = depth // 4, _ROW
    return found


class _AmxStep(KBlock):
    """A k-block whose dot products, of both halves and parts, lie at `products`."""

    def __init__(self, builder, kind: int, n: int, weights, tokens, products):
        super().__init__(builder, kind, n, weights, tokens)
        self.products = products

    def dots(self, starts: list, columns: range) -> list:
        """[part][t]: starts[t] + weights . q over some columns."""
        first = PARTS * (2 * columns.start // K_BLOCK)
        return [self._product(first + part, starts) for part in range(PARTS)]

    def _product(self, i: int, starts: list) -> list:
        b = self.builder
        rows = (b.add(self.products, I64(_PRODUCT * i + _ROW * t)) for t in range(self.n))
        return [b.add(start, load(b, row, VI32)) for start, row in zip(starts, rows, strict=True)]


class AmxKBlocks(KBlocks):
    """Computes the products of each k-block while the one before is scaled, into two places in turn."""

    def __init__(self, builder, kind: int, n: int, weights, tokens, n_k_blocks):
        super().__init__(builder, kind, n, weights, tokens, n_k_blocks)
        self.tiles = Tiles(builder, builder.add(weights, I64(FILE)))
        self.multiply(I64(0), I64(0))

    def products(self, index):
        """Where those of a k-block lie."""
        offset = self.builder.mul(self.builder.and_(index, I64(1)), I64(_PRODUCTS))
        return self.builder.add(self.weights, self.builder.add(offset, I64(AMX)))

    def at(self, index) -> KBlock:
        """Begins the next k-block's products. Behind the last they are the last's again, which saves a branch."""
        b = self.builder
        following = b.add(index, I64(1))
        upcoming = b.select(b.icmp_signed("<", following, self.n_k_blocks), following, index)
        self.multiply(upcoming, following)
        return _AmxStep(b, self.kind, self.n, *self.addresses(index), self.products(index))

    def multiply(self, index, place) -> None:
        """The products of k-block `index`, to products(place)."""
        weights, tokens = self.addresses(index)
        b, tiles, products, is_last = self.builder, self.tiles, self.products(place), self.n < TOKENS
        x = _tokens(is_last)
        depth = K_BLOCK // 2 if self.kind == TWO_SCALES else K_BLOCK
        for first in range(0, K_BLOCK, depth):
            tiles.load(x, b.add(tokens, I64(first)), K_BLOCK)
            for part in range(PARTS):
                w, sums = _weights(part), _sums(is_last, part)
                tiles.load(w, b.add(weights, I64(part_bytes(self.kind) * part + 16 * first)), _ROW)
                tiles.zero(sums)
                tiles.add_product(sums, x, w)
                tiles.store(sums, b.add(products, I64(_PRODUCT * (PARTS * (first // depth) + part))), _ROW)


def _configure(builder, kind, n_tokens, scratch) -> None:
    """Pick one of the configurations, which lie side by side: by depth, then by the last block's tokens."""
    sizes = range(VECTOR_TOKENS + 1, TOKENS)
    table = b"".join(amx.config(shapes(depth, TOKENS, last)) for depth in (K_BLOCK, K_BLOCK // 2) for last in sizes)
    data = cgutils.global_constant(builder, "amx_configs", ir.Constant(ir.ArrayType(I8, len(table)), bytearray(table)))
    data.align = amx.CONFIG_BYTES
    row = builder.mul(builder.zext(builder.icmp_signed("==", kind, I64(TWO_SCALES)), I64), I64(len(sizes)))
    last = builder.urem(n_tokens, I64(TOKENS))
    fewer = builder.icmp_unsigned("<", last, I64(sizes.start))  # vectors do these, whatever the tiles' shapes
    column = builder.sub(builder.select(fewer, I64(sizes.start), last), I64(sizes.start))
    at = builder.mul(builder.add(row, column), I64(amx.CONFIG_BYTES))
    Tiles(builder, builder.add(scratch, I64(FILE))).configure(builder.add(builder.ptrtoint(data, I64), at))


def _release(builder, scratch) -> None:
    Tiles(builder, builder.add(scratch, I64(FILE))).release()


if isa.has("amx"):
    _configure_tiles = define(types.void, (types.int64,) * 3, _configure)
    _release_tiles = define(types.void, (types.int64,), _release)

    @inline
    def configure(kind, n_tokens, scratch):
        """Before TILES are called with the blocks of a product of n_tokens."""
        if n_tokens > VECTOR_TOKENS:
            _configure_tiles(kind, n_tokens, scratch)

    @inline
    def release(n_tokens, scratch):
        """After the last of these calls."""
        if n_tokens > VECTOR_TOKENS:
            _release_tiles(scratch)

else:

    @inline
    def configure(kind, n_tokens, scratch):
        """Nothing: there are no tiles at this level."""

    @inline
    def release(n_tokens, scratch):
        """Nothing."""
