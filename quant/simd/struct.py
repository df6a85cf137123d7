"""Structs in memory: Python packs them by field names, kernels read them as attributes of a view.

    MULTIPLY = struct("Multiply", matrix=MATRIX, n_rows=i64, scale=f32, start=pointer(i64), x=address, counter=atomic)

    words = MULTIPLY.pack(matrix=..., n_rows=8, scale=0.5, start=..., x=..., counter=0)     # in Python
    a = MULTIPLY(address); begin, end = a.start[expert], a.start[expert + 1]                # in a kernel

A view is an address. Reading a field is one load at a constant offset, or none of what lies within. Kinds of fields:

    i64, address    an integer
    f32             a float32
    boolean         whether the word is not 0
    pointer(kind)   an address, set from an integer; a.start[i] reads or writes element i, a.start + i points to it
    atomic          the address of an int64 that has a cache line to itself (of a block that begins on one)
    a struct        a view of it: it lies within
    array(s, n)     up to n structs that lie within; a.parts[i] is a view of one

Every field but the last three takes 8 bytes.
"""

import operator
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from struct import Struct as Packer
from struct import calcsize, pack_into

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.typeconv import Conversion
from numba.core.typing.templates import AbstractTemplate, AttributeTemplate, infer_getattr, infer_global, signature
from numba.extending import (
    intrinsic,
    lower_builtin,
    lower_cast,
    lower_getattr_generic,
    lower_setattr_generic,
    models,
    register_model,
    type_callable,
)

from quant.simd.core import F32, I64, load, store

_LINE = 64  # bytes of a cache line


@dataclass(frozen=True)
class Kind:
    """What a field or an element is.

    Attributes:
        name: of the kind, part of the layout.
        type: Numba's, of the value.
        size: bytes from one to the next behind a pointer.
        code: how Python's struct module packs it as a field.
        read: emits the value from (builder, address).
        write: emits a store from (builder, address, value); None of what lies within.
        align: bytes.
    """

    name: str
    type: types.Type
    size: int
    code: str
    read: Callable
    write: Callable | None = None
    align: int = 8


def _address_itself(builder, address):
    return address


class Pointer(types.Type):
    """The Numba type of an address of elements of one kind."""

    def __init__(self, element: Kind):
        self.element = element
        super().__init__(f"pointer({element.name})")

    def can_convert_from(self, context, other):
        """An integer is an address."""
        if isinstance(other, types.Integer):
            return Conversion.unsafe


class View(types.Type):
    """The Numba type of a struct's address."""

    def __init__(self, name: str, fields: dict[str, tuple[int, Kind]]):
        self.fields = fields
        super().__init__(name)


@register_model(Pointer)
@register_model(View)
class _AddressModel(models.PrimitiveModel):
    def __init__(self, manager, type_):
        super().__init__(manager, type_, I64)


i64 = Kind("i64", types.int64, 8, "q", lambda b, p: load(b, p, I64), store)
address = i64
f32 = Kind("f32", types.float32, 4, "f4x", lambda b, p: load(b, p, F32), store)
f64 = Kind("f64", types.float64, 8, "d", lambda b, p: load(b, p, ir.DoubleType()), store)
boolean = Kind(
    "boolean", types.boolean, 8, "q",
    lambda b, p: b.icmp_signed("!=", load(b, p, I64), I64(0)),
    lambda b, p, v: store(b, p, b.zext(v, I64)),
)  # fmt: skip
atomic = Kind("atomic", types.int64, _LINE, f"q{_LINE - 8}x", _address_itself, align=_LINE)


def pointer(element: "Kind | Struct") -> Kind:
    """The address of elements elsewhere."""
    type_ = Pointer(element.kind if isinstance(element, Struct) else element)
    return Kind(type_.name, type_, 8, "q", lambda b, p: load(b, p, I64), store)


def array(element: "Struct", count: int) -> Kind:
    """Up to `count` structs, one behind the other. Packed from a list of packed ones; those left out are zero."""
    size = element.size * count
    return Kind(f"{element.kind.name}[{count}]", Pointer(element.kind), size, f"{size}s", _address_itself)


class Struct:
    """A layout: what struct() returns. In a kernel STRUCT(address) is a view.

    Attributes:
        size: bytes, a multiple of a cache line if the struct has atomics.
        kind: of a struct as a field or an element.
    """

    def __init__(self, name: str, fields: "dict[str, Kind | Struct]"):
        self.name, self._fields, code, end, align = name, {}, "=", 0, 8
        for field, kind in fields.items():
            kind = kind.kind if isinstance(kind, Struct) else kind
            begin = -(-end // kind.align) * kind.align
            self._fields[field] = begin, kind
            code += f"{begin - end}x{kind.code}"
            end, align = begin + calcsize(f"={kind.code}"), max(align, kind.align)
        self._packer, self.size = Packer(code), -(-end // align) * align
        layout = " ".join(f"{field}:{kind.name}@{begin}" for field, (begin, kind) in self._fields.items())
        # Two structs are the same type to Numba if they have the same name, in this process and in a cache's.
        view = View(f"{name}.{zlib.crc32(layout.encode()):08x}", self._fields)
        self.kind = Kind(view.name, view, self.size, f"{self.size}s", _address_itself, align=align)
        type_callable(self)(lambda context: lambda address: view)
        lower_builtin(self, types.int64)(lambda context, builder, sig, args: args[0])

    def __call__(self, address: int):
        """A view, in kernels only."""
        raise TypeError(f"{self.name} at an address is for kernels")

    def zeros(self) -> np.ndarray:
        """int64 (size / 8,): a struct of zeros, aligned as its fields want it."""
        memory = np.zeros((self.size + _LINE) // 8, np.int64)
        start = -memory.ctypes.data % _LINE // 8
        return memory[start : start + self.size // 8]

    def pack(self, **values: object) -> np.ndarray:
        """int64 (size / 8,): a struct of these values, of all fields; nested ones and arrays' are packed themselves.

        Raises TypeError naming fields that are missing or unknown.
        """
        if values.keys() != self._fields.keys():
            missing = [f"lacks {field}" for field in self._fields if field not in values]
            raise TypeError(f"struct {self.name} {', '.join(missing + self._unknown(values))}")
        words = self.zeros()
        self._packer.pack_into(words, 0, *(self._plain(field, values[field]) for field in self._fields))
        return words

    def write(self, words: np.ndarray, **values: object) -> None:
        """Change some fields of a packed struct, which `words` begins with. Raises TypeError naming unknown fields."""
        if unknown := self._unknown(values):
            raise TypeError(f"struct {self.name} {', '.join(unknown)}")
        for field, value in values.items():
            begin, kind = self._fields[field]
            pack_into(f"={kind.code}", words, begin, self._plain(field, value))

    def offset(self, field: str) -> int:
        """Bytes from the struct's address to a field."""
        return self._fields[field][0]

    def _unknown(self, values: dict[str, object]) -> list[str]:
        return [f"has no {field}" for field in values if field not in self._fields]

    def _plain(self, field: str, value):
        """A number as it is, what lies within as bytes. Raises TypeError on too many, or too few for a struct."""
        if not isinstance(value, list | np.ndarray):
            return value
        data, size = b"".join(value) if isinstance(value, list) else value.tobytes(), self._fields[field][1].size
        if len(data) > size or (len(data) < size and not isinstance(value, list)):
            raise TypeError(f"{self.name}.{field} takes {size} bytes; found {len(data)}")
        return data


def struct(name: str, **fields: "Kind | Struct") -> Struct:
    """A struct of these fields, in this order."""
    return Struct(name, fields)


@intrinsic
def address_of(context, view):
    """The address that a view or a pointer is."""
    if isinstance(view, View | Pointer):
        return types.int64(view), lambda context, builder, sig, args: args[0]


# ---- how Numba types and compiles a.field, a.field = v, p[i], p[i] = v and p + i ------------------------------------


@lower_cast(types.Integer, Pointer)
def _integer_to_pointer(context, builder, source, target, value):
    return context.cast(builder, value, source, types.int64)


@infer_getattr
class _Fields(AttributeTemplate):
    key = View

    def generic_resolve(self, view, field):
        if field in view.fields:
            return view.fields[field][1].type


@lower_getattr_generic(View)
def _get_field(context, builder, view, value, field):
    begin, kind = view.fields[field]
    return kind.read(builder, builder.add(value, I64(begin)))


@lower_setattr_generic(View)
def _set_field(context, builder, sig, args, field):
    begin, kind = sig.args[0].fields[field]
    kind.write(builder, builder.add(args[0], I64(begin)), args[1])


@infer_global(operator.getitem)
class _Element(AbstractTemplate):
    def generic(self, args, kws):
        if isinstance(args[0], Pointer) and isinstance(args[1], types.Integer):
            return signature(args[0].element.type, args[0], types.int64)


@infer_global(operator.add)
class _Advance(AbstractTemplate):
    def generic(self, args, kws):
        if isinstance(args[0], Pointer) and isinstance(args[1], types.Integer):
            return signature(args[0], args[0], types.int64)


@infer_global(operator.setitem)
class _SetElement(AbstractTemplate):
    def generic(self, args, kws):
        if isinstance(args[0], Pointer) and isinstance(args[1], types.Integer):
            return signature(types.void, args[0], types.int64, args[0].element.type)


def _element_at(builder, sig, args):
    element = sig.args[0].element
    return element, builder.add(args[0], builder.mul(args[1], I64(element.size)))


@lower_builtin(operator.add, Pointer, types.Integer)
def _advanced(context, builder, sig, args):
    return _element_at(builder, sig, args)[1]


@lower_builtin(operator.getitem, Pointer, types.Integer)
def _get_element(context, builder, sig, args):
    element, at = _element_at(builder, sig, args)
    return element.read(builder, at)


@lower_builtin(operator.setitem, Pointer, types.Integer, types.Any)
def _set_element(context, builder, sig, args):
    element, at = _element_at(builder, sig, args)
    element.write(builder, at, args[2])
    return context.get_dummy_value()
