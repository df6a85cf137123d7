"""SIMD vectors as Numba types: what they are, how operations on them are defined, and their operators.

A vector is a Numba type whose data model is an LLVM vector; an operation is a Numba intrinsic that emits LLVM IR, or a
machine instruction where isa.LEVEL allows one. LLVM splits vectors that are wider than the machine's, so every
operation here is right on any CPU; the instructions only make it fast.

The operations themselves: memory.py, floats.py, ints.py, rows16.py (16 rows of weights side by side) and exact.py (for
quantising). An operation has one name for all types that it takes; types are in the name where the arguments don't tell
them: load_f32x16. Names of types: i8x32 is 32 lanes of 8 bits. Intrinsics' names and types as of LLVM 22.

Operators, lane by lane:
    float vectors     + - * /  unary -  abs()  < >   Rounded once each, never fused: fma(a, b, c) is asked for by name.
    integer vectors   + - & | ^ << >>                They wrap. Lanes have no sign, so >> fills with zeros.
One side may be a scalar, which is put in every lane: float32 or an integer beside float vectors, an integer, cut to the
lanes' bits, beside integer ones. float64 is refused: where a number is rounded to float32 shall be seen.
"""

import operator
from collections.abc import Callable, Sequence

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global
from numba.extending import intrinsic, lower_builtin, models, register_model

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()


class Vector(types.Type):
    """A Numba type standing for an LLVM vector of `lanes` elements."""

    def __init__(self, element: ir.Type, lanes: int, name: str):
        self.ir = ir.VectorType(element, lanes)
        self.is_float = element == F32
        self.scalar = types.float32 if self.is_float else types.int64  # as which a scalar meets it
        super().__init__(name=name)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, vector: Vector):
        super().__init__(manager, vector, vector.ir)


i8x16, i8x32, i8x64 = (Vector(I8, lanes, f"i8x{lanes}") for lanes in (16, 32, 64))
i32x8, i32x16 = (Vector(I32, lanes, f"i32x{lanes}") for lanes in (8, 16))
f32x8, f32x16, f32x32 = (Vector(F32, lanes, f"f32x{lanes}") for lanes in (8, 16, 32))
FLOATS_BY_LANES = {vector.ir.count: vector for vector in (f32x8, f32x16, f32x32)}
_MASKS = {lanes: Vector(I1, lanes, f"i1x{lanes}") for lanes in FLOATS_BY_LANES}  # what comparisons give: for where()

# ---- definitions of operations ---------------------------------------------------------------------------------------


def define_typed(arity: int, typed: Callable):
    """An intrinsic of so many arguments: typed(*argument types) -> (signature, emit), or None if it takes no such.

    emit(builder, *values) -> value, None for void.
    """

    def typer(*arguments):
        found = typed(*arguments)
        if found is None:
            return None
        signature, emit = found

        def codegen(context, builder, _, values):
            value = emit(builder, *values)
            return context.get_dummy_value() if value is None else value

        return signature, codegen

    typers = (  # Numba reads an intrinsic's arity from its Python signature
        lambda context: typer(),
        lambda context, a: typer(a),
        lambda context, a, b: typer(a, b),
        lambda context, a, b, c: typer(a, b, c),
        lambda context, a, b, c, d: typer(a, b, c, d),
        lambda context, a, b, c, d, e: typer(a, b, c, d, e),
        lambda context, a, b, c, d, e, f: typer(a, b, c, d, e, f),
        lambda context, a, b, c, d, e, f, g: typer(a, b, c, d, e, f, g),
        lambda context, a, b, c, d, e, f, g, h: typer(a, b, c, d, e, f, g, h),
        lambda context, a, b, c, d, e, f, g, h, i: typer(a, b, c, d, e, f, g, h, i),
    )
    return intrinsic(typers[arity])


def define(result: types.Type, arguments: tuple[types.Type, ...], emit: Callable):
    """An intrinsic `result(*arguments)` whose body is emit(builder, *values) -> value."""
    signature = result(*arguments)
    return define_typed(len(arguments), lambda *_: (signature, emit))


def define_for_all(arity: int, emit: Callable, result: Callable[[Vector], types.Type] = lambda vector: vector):
    """An intrinsic of `arity` vectors of one type, whichever; all but one may be scalars, put in every lane.

    emit: (builder, *LLVM vectors) -> value. result: the type of what it gives.
    """

    def typed(*arguments):
        vector = _common(arguments)
        if vector is None:
            return None
        return _signature(result(vector), vector, arguments), _of_vectors(vector, emit)

    return define_typed(arity, typed)


def _common(arguments: Sequence[types.Type]) -> Vector | None:
    """The one vector type among the arguments, if the others are scalars that can meet it."""
    vectors = {argument for argument in arguments if isinstance(argument, Vector)}
    if len(vectors) != 1:
        return None
    (vector,) = vectors
    takes = (Vector, types.Integer, types.Float) if vector.is_float else (Vector, types.Integer)
    fits = all(isinstance(argument, takes) and argument != types.float64 for argument in arguments)
    return vector if fits else None


def _signature(result: types.Type, vector: Vector, arguments: Sequence[types.Type]):
    return result(*(vector if isinstance(argument, Vector) else vector.scalar for argument in arguments))


def _of_vectors(vector: Vector, emit: Callable) -> Callable:
    """emit, with scalars among its values put in every lane."""
    return lambda builder, *values: emit(builder, *(spread(builder, value, vector.ir) for value in values))


# ---- LLVM code -------------------------------------------------------------------------------------------------------


def call(builder, name: str, result: ir.Type, *values):
    """Call the LLVM function `name`, declared on first use."""
    function_type = ir.FunctionType(result, [v.type for v in values])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), values)


def pointer(builder, address, element: ir.Type):
    """The int64 `address` as a pointer to `element`."""
    return builder.inttoptr(address, element.as_pointer())


def load(builder, address, type_: ir.Type):
    """An unaligned load."""
    value = builder.load(pointer(builder, address, type_))
    value.align = 1
    return value


def store(builder, address, value) -> None:
    """An unaligned store."""
    builder.store(value, pointer(builder, address, value.type)).align = 1


def shuffle(builder, a, b, lanes):
    """Pick `lanes` from the concatenation of a and b (b None: from a)."""
    other = ir.Constant(a.type, ir.Undefined) if b is None else b
    return builder.shuffle_vector(a, other, ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes)))


def splat(builder, scalar, vector: ir.VectorType):
    """A vector with `scalar` in every lane."""
    undefined = ir.Constant(ir.VectorType(scalar.type, vector.count), ir.Undefined)
    return shuffle(builder, builder.insert_element(undefined, scalar, I32(0)), None, [0] * vector.count)


def spread(builder, value, vector: ir.VectorType):
    """A vector as it is; a scalar in every lane, an integer cut to the lanes' bits."""
    if isinstance(value.type, ir.VectorType):
        return value
    if value.type != vector.element:
        value = builder.trunc(value, vector.element)
    return splat(builder, value, vector)


def constant(vector: ir.VectorType, value):
    """A constant vector with `value` in every lane."""
    return ir.Constant(vector, [value] * vector.count)


def half(builder, v, i: int):
    """The first (0) or second (1) half of the lanes."""
    count = v.type.count // 2
    return shuffle(builder, v, None, range(count * i, count * (i + 1)))


def by_halves(builder, emit: Callable, *vectors):
    """emit(*halves) for the first and for the second halves of all vectors, joined."""
    low, high = (emit(*(half(builder, v, i) for v in vectors)) for i in range(2))
    return shuffle(builder, low, high, range(2 * low.type.count))


# ---- operators -------------------------------------------------------------------------------------------------------


def _define_operator(function: Callable, of_floats: Callable | None, of_ints: Callable | None, compares: bool = False):
    """Let `function` (of the module operator, or a builtin) take vectors as define_for_all's intrinsics do.

    Its assignment (+=) means the same: vectors are values.
    """
    assignment = getattr(operator, f"i{function.__name__.strip('_')}", None)

    def emit_of(vector: Vector | None) -> Callable | None:
        return vector and (of_floats if vector.is_float else of_ints)

    class _Typing(AbstractTemplate):
        def generic(self, args, kws):
            vector = _common(args)
            if emit_of(vector) is None:
                return None
            return _signature(_MASKS[vector.ir.count] if compares else vector, vector, args)

    def lower(context, builder, signature, values):
        vector = _common(signature.args)
        return _of_vectors(vector, emit_of(vector))(builder, *values)

    for name in filter(None, (function, assignment)):
        infer_global(name)(_Typing)
        for arguments in (Vector,), (Vector, Vector), (Vector, types.Number), (types.Number, Vector):
            lower_builtin(name, *arguments)(lower)


_define_operator(operator.add, lambda b, x, y: b.fadd(x, y), lambda b, x, y: b.add(x, y))
_define_operator(operator.sub, lambda b, x, y: b.fsub(x, y), lambda b, x, y: b.sub(x, y))
_define_operator(operator.mul, lambda b, x, y: b.fmul(x, y), lambda b, x, y: b.mul(x, y))
_define_operator(operator.truediv, lambda b, x, y: b.fdiv(x, y), None)
_define_operator(operator.neg, lambda b, x: b.fneg(x), None)
_define_operator(abs, lambda b, x: call(b, f"llvm.fabs.v{x.type.count}f32", x.type, x), None)
_define_operator(operator.lt, lambda b, x, y: b.fcmp_ordered("<", x, y), None, compares=True)
_define_operator(operator.gt, lambda b, x, y: b.fcmp_ordered(">", x, y), None, compares=True)
_define_operator(operator.and_, None, lambda b, x, y: b.and_(x, y))
_define_operator(operator.or_, None, lambda b, x, y: b.or_(x, y))
_define_operator(operator.xor, None, lambda b, x, y: b.xor(x, y))
_define_operator(operator.lshift, None, lambda b, x, y: b.shl(x, y))
_define_operator(operator.rshift, None, lambda b, x, y: b.lshr(x, y))
