"""AMX tiles spelt out in AVX-512 VNNI code on a tile file in memory: a check of the kernels, not a way to run them.

As the manual's pseudo-code has it (amx.py), faults included: where a processor would raise one, the process aborts. So
do configurations with a start row, which the kernels never have. A file: the configuration of LDTILECFG, all zero in
the initial state, then the registers.
"""

from collections.abc import Callable, Sequence

from llvmlite import ir
from numba.core import cgutils

from quant.simd.core import I8, I16, I32, I64, call, load, pointer, splat, store
from quant.simd.dots import emit_dot_u8
from quant.target.amx import CONFIG_BYTES, MOST_BYTES, MOST_ROWS, TILES, Tiles

_ROW_BYTES_AT, _ROWS_AT = 16, 48  # in a configuration
_RESERVED = [*range(1, 16), *range(_ROW_BYTES_AT + 2 * TILES, _ROWS_AT), *range(_ROWS_AT + TILES, CONFIG_BYTES)]
_TILE_BYTES = MOST_ROWS * MOST_BYTES

_BYTES, _WORDS = ir.VectorType(I8, 64), ir.VectorType(I32, 16)


class EmulatedTiles(Tiles):
    """The same operations, each a call of a function in the same module."""

    FILE_BYTES = CONFIG_BYTES + TILES * _TILE_BYTES

    def _call(self, name: str, *operands: ir.Value) -> None:
        self.builder.call(_function(self.builder.module, name, operands), (self.file, *operands))


def _function(module: ir.Module, name: str, operands: Sequence[ir.Value]) -> ir.Function:
    """The emulation of an instruction: void(file, *operands)."""
    types = [I64, *(operand.type for operand in operands)]
    function = cgutils.get_or_insert_function(module, ir.FunctionType(ir.VoidType(), types), f"emulated_{name}")
    if function.is_declaration:
        function.linkage = "internal"
        function.attributes.add("noinline")  # there are a hundred calls of it
        builder = ir.IRBuilder(function.append_basic_block())
        _BODIES[name](builder, *function.args)
        builder.ret_void()
    return function


def _fault_if(builder: ir.IRBuilder, condition: ir.Value) -> None:
    with builder.if_then(condition, likely=False):
        call(builder, "llvm.trap", ir.VoidType())


class _Register:
    """One tile in a file. Creating it faults unless it is configured."""

    def __init__(self, builder: ir.IRBuilder, file: ir.Value, number: ir.Value):
        number = builder.zext(number, I64)
        at_row_bytes = builder.add(file, builder.add(I64(_ROW_BYTES_AT), builder.shl(number, I64(1))))
        self.builder = builder
        self.rows = builder.zext(load(builder, builder.add(file, builder.add(I64(_ROWS_AT), number)), I8), I64)
        self.row_bytes = builder.zext(load(builder, at_row_bytes, I16), I64)
        self.first = builder.add(file, builder.add(I64(CONFIG_BYTES), builder.mul(number, I64(_TILE_BYTES))))
        _fault_if(builder, builder.icmp_unsigned("==", self.rows, I64(0)))

    def row(self, i: ir.Value) -> ir.Value:
        """The address of row i."""
        return self.builder.add(self.first, self.builder.mul(i, I64(MOST_BYTES)))

    def clear(self) -> None:
        """All of it, beyond its shape too."""
        cgutils.memset(self.builder, pointer(self.builder, self.first, I8), I64(_TILE_BYTES), 0)


def _configure(builder: ir.IRBuilder, file: ir.Value, source: ir.Value) -> None:
    def byte(i: int) -> ir.Value:
        return builder.load(builder.gep(source, [I64(i)]))

    wrong = builder.icmp_unsigned("!=", byte(0), I8(1))  # palette 0 is left to TILERELEASE
    for i in _RESERVED:
        wrong = builder.or_(wrong, builder.icmp_unsigned("!=", byte(i), I8(0)))
    for t in range(TILES):
        low, high = (builder.zext(byte(_ROW_BYTES_AT + 2 * t + i), I16) for i in range(2))
        row_bytes, rows = builder.or_(low, builder.shl(high, I16(8))), byte(_ROWS_AT + t)
        empty = (builder.icmp_unsigned("==", value, value.type(0)) for value in (rows, row_bytes))
        wrong = builder.or_(wrong, builder.icmp_unsigned("!=", *empty))
        wrong = builder.or_(wrong, builder.icmp_unsigned(">", rows, I8(MOST_ROWS)))
        wrong = builder.or_(wrong, builder.icmp_unsigned(">", row_bytes, I16(MOST_BYTES)))
    _fault_if(builder, wrong)
    _release(builder, file)
    cgutils.raw_memcpy(builder, pointer(builder, file, I8), source, I64(CONFIG_BYTES), 1)


def _release(builder: ir.IRBuilder, file: ir.Value) -> None:
    cgutils.memset(builder, pointer(builder, file, I8), I64(EmulatedTiles.FILE_BYTES), 0)


def _zero(builder: ir.IRBuilder, file: ir.Value, number: ir.Value) -> None:
    _Register(builder, file, number).clear()


def _copy_rows(builder: ir.IRBuilder, tile: _Register, memory: ir.Value, stride: ir.Value, to_memory: bool) -> None:
    with cgutils.for_range(builder, tile.rows) as loop:
        there = builder.gep(memory, [builder.mul(loop.index, stride)])
        here = pointer(builder, tile.row(loop.index), I8)
        target, source = (there, here) if to_memory else (here, there)
        cgutils.raw_memcpy(builder, target, source, tile.row_bytes, 1)


def _load(builder: ir.IRBuilder, file: ir.Value, number: ir.Value, memory: ir.Value, stride: ir.Value) -> None:
    tile = _Register(builder, file, number)
    tile.clear()
    _copy_rows(builder, tile, memory, stride, to_memory=False)


def _store(builder: ir.IRBuilder, file: ir.Value, number: ir.Value, memory: ir.Value, stride: ir.Value) -> None:
    _copy_rows(builder, _Register(builder, file, number), memory, stride, to_memory=True)


def _add_product(builder: ir.IRBuilder, file: ir.Value, *numbers: ir.Value) -> None:
    c, a, b = (_Register(builder, file, number) for number in numbers)
    for first, second in ((0, 1), (0, 2), (1, 2)):
        _fault_if(builder, builder.icmp_unsigned("==", numbers[first], numbers[second]))
    for tile in (c, a, b):
        _fault_if(builder, builder.icmp_unsigned("!=", builder.and_(tile.row_bytes, I64(3)), I64(0)))
    depth = builder.lshr(a.row_bytes, I64(2))
    for found, wanted in ((c.rows, a.rows), (b.rows, depth), (c.row_bytes, b.row_bytes)):
        _fault_if(builder, builder.icmp_unsigned("!=", found, wanted))
    with cgutils.for_range(builder, c.rows) as row:
        total = cgutils.alloca_once_value(builder, load(builder, c.row(row.index), _WORDS))
        with cgutils.for_range(builder, depth) as k:
            four = load(builder, builder.add(a.row(row.index), builder.shl(k.index, I64(2))), I32)
            x = builder.bitcast(splat(builder, four, _WORDS), _BYTES)
            u = load(builder, b.row(k.index), _BYTES)
            added = emit_dot_u8(builder, builder.load(total), u, x)
            builder.store(added, total)
        store(builder, c.row(row.index), builder.load(total))  # beyond its width all three are zero


_BODIES: dict[str, Callable] = {
    "ldtilecfg": _configure,
    "tilerelease": _release,
    "tilezero": _zero,
    "tileloadd64": _load,
    "tilestored64": _store,
    "tdpbsud": _add_product,
}
