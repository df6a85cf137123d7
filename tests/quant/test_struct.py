"""Structs: what Python packs is what kernels read, by name; and the loop over work items."""

from __future__ import annotations

import kernels
import numpy as np
import pytest

from quant.simd.struct import (
    address,
    address_of,
    array,
    atomic,
    boolean,
    f32,
    f64,
    i64,
    pointer,
    struct,
)
from quant.target.jit import inline, kernel
from quant.threads.work_items import rows_of_item, work_items

POINT = struct("Point", x=i64, y=f32)
ALL = struct(
    "All", n=i64, point=POINT, scale=f32, flag=boolean, start=pointer(i64), halves=pointer(f32), doubles=pointer(f64),
    points=pointer(POINT), counter=atomic, parts=array(POINT, 3), last=address,
)  # fmt: skip


def packed(**values: object) -> np.ndarray:
    point = POINT.pack(x=3, y=1.5)
    fields = {
        "n": 2, "point": point, "scale": 0.25, "flag": True, "start": 0, "halves": 0, "doubles": 0, "points": 0,
        "counter": 5, "parts": [point], "last": 7,
    }  # fmt: skip
    return ALL.pack(**fields | values)


@inline
def _length(a, i):
    return a.start[i + 1] - (a.start + i)[0]


@kernel("void(int64, int64)")
def _read(at, out):
    a, found = ALL(at), FOUND(out)
    found.lengths = _length(a, 0) + 100 * _length(a, a.n - 1)
    found.nested = a.point.x + a.parts[0].x + a.points[1].x
    found.floats = a.scale * a.point.y + a.halves[1] + a.parts[0].y
    found.double = np.float32(a.doubles[1])
    found.flag = not a.flag
    found.counter = a.counter - address_of(a)
    found.last = a.last


FOUND = struct("Found", lengths=i64, nested=i64, floats=f32, double=f32, flag=boolean, counter=i64, last=i64)


@pytest.mark.parametrize("flag", [False, True])
def test_kernels_read_what_was_packed(flag: bool) -> None:
    start, halves, doubles = np.array([1, 5, 14]), np.array([0, 0.5], np.float32), np.array([0, 2.0**-20])
    points = np.concatenate([POINT.pack(x=10, y=0), POINT.pack(x=20, y=0)])
    arrays = {"start": start, "halves": halves, "doubles": doubles, "points": points}
    a, found = packed(flag=flag, **{name: values.ctypes.data for name, values in arrays.items()}), FOUND.zeros()
    kernels.call(_read, a, found)
    expected = FOUND.pack(
        lengths=4 + 900, nested=3 + 3 + 20, floats=0.25 * 1.5 + 0.5 + 1.5, double=2.0**-20, flag=not flag,
        counter=ALL.offset("counter"), last=7,
    )  # fmt: skip
    assert np.array_equal(found, expected)


@kernel("void(int64)")
def _write(at):
    a = ALL(at)
    a.n = 9
    a.scale = np.float32(8.0)
    a.flag = False
    a.point.y = np.float32(4.0)
    a.parts[1].x = 11
    a.start[1] = 12
    a.halves[0] = np.float32(0.5)
    a.start = a.start + 1


def test_kernels_write_fields_and_elements() -> None:
    start, halves = np.zeros(3, np.int64), np.zeros(2, np.float32)
    a = packed(start=start.ctypes.data, halves=halves.ctypes.data)
    kernels.call(_write, a)
    point, other = POINT.pack(x=3, y=4.0), POINT.pack(x=11, y=0)
    expected = packed(
        n=9, scale=8.0, flag=False, point=point, parts=[POINT.pack(x=3, y=1.5), other],
        start=start.ctypes.data + 8, halves=halves.ctypes.data,
    )  # fmt: skip
    assert np.array_equal(a, expected)
    assert start.tolist() == [0, 12, 0] and halves.tolist() == [0.5, 0]


def test_an_atomic_has_a_cache_line_to_itself() -> None:
    at, words = ALL.offset("counter"), packed()
    assert at % 64 == 0 and ALL.offset("points") < at and ALL.offset("parts") >= at + 64
    assert ALL.size % 64 == 0 and all(packed().ctypes.data % 64 == 0 for _ in range(20))
    assert words[at // 8] == 5 and not words[at // 8 + 1 : at // 8 + 8].any()


def test_some_fields_can_be_rewritten() -> None:
    words = packed()
    ALL.write(words, n=4, scale=2.0, parts=[POINT.pack(x=1, y=0)] * 3)
    assert np.array_equal(words, packed(n=4, scale=2.0, parts=[POINT.pack(x=1, y=0)] * 3))


def test_a_missing_field_is_named() -> None:
    with pytest.raises(TypeError, match=r"struct Point lacks y$"):
        POINT.pack(x=1)


def test_an_unknown_field_is_named() -> None:
    with pytest.raises(TypeError, match=r"struct Point has no z$"):
        POINT.pack(x=1, y=2, z=3)
    with pytest.raises(TypeError, match=r"struct Point has no z$"):
        POINT.write(POINT.zeros(), z=3)


@pytest.mark.parametrize("values", [{"point": POINT.zeros()[:1]}, {"parts": [POINT.zeros()] * 4}], ids=str)
def test_what_does_not_fit_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(TypeError, match=r"All\.\w+ takes \d+ bytes; found \d+"):
        packed(**values)


def test_an_unknown_field_does_not_compile() -> None:
    @kernel("void(int64)")
    def mistaken(at):
        POINT(at).z = 1

    with pytest.raises(Exception, match="z"):
        mistaken.address  # noqa: B018 (asking is compiling)


def test_structs_of_one_name_and_different_layout_are_different_types() -> None:
    """Or a kernel compiled for one would read the other's fields where it has its own."""
    assert struct("Point", y=f32, x=i64).kind.type != POINT.kind.type == struct("Point", x=i64, y=f32).kind.type


# ---- work items ------------------------------------------------------------------------------------------------------

TAKEN = struct("Taken", counter=atomic, n=i64, stride=i64, out=pointer(i64))


@kernel("void(int64)")
def _take(at):
    a = TAKEN(at)
    for first in work_items(a.counter, a.n, a.stride):
        a.out[first] += 1


@pytest.mark.parametrize(("n", "stride"), [(0, 1), (1, 1), (7, 1), (7, 3), (6, 3), (2, 9)])
def test_work_items(n: int, stride: int) -> None:
    out = np.zeros(n + 1, np.int64)
    a = TAKEN.pack(counter=0, n=n, stride=stride, out=out.ctypes.data)
    for _ in range(2):  # the second time there are none left
        kernels.call(_take, a)
    assert out.tolist() == [int(i < n and i % stride == 0) for i in range(n + 1)]


@pytest.mark.parametrize("n_workers", [1, 2, 64])
@pytest.mark.parametrize("multiple", [4, 16])
def test_rows_of_an_item(n_workers: int, multiple: int) -> None:
    """A multiple; no more bytes than are read at a time, and items for all workers, but for what kernels like best."""
    for row_bytes, n_rows in ((100, 10), (1000, 5000), (1 << 14, 100_000), (1 << 20, 1000)):
        rows = rows_of_item(row_bytes, n_rows, n_workers, multiple)
        assert rows % multiple == 0 and rows > 0
        assert rows <= max(8, multiple) or (rows * row_bytes <= 1 << 19 and n_workers * (rows - 8) < n_rows)
