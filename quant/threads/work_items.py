"""How workers share a job: a counter in memory that each takes the next work items from.

    for item in work_items(a.counter, n_items): ...             # 0, 1, 2, .. below n_items, each for one worker
    for first in work_items(a.counter, n_rows, step): ...       # 0, step, 2 * step, .. below n_rows

The loop compiles to an atomic addition and a comparison. The counter is 0 before the job; it ends beyond n_items.
"""

import functools
import math
from collections.abc import Iterable, Sequence
from heapq import heapreplace

from numba import types
from numba.core import cgutils
from numba.core.imputils import RefType, iternext_impl
from numba.extending import intrinsic, lower_builtin, models, register_model

from quant.simd.core import I64, pointer
from quant.target.jit import inline

ITEM_BYTES = 1 << 19  # weights of an item, at most
_START_BYTES = 512  # what a worker would read while an item's start comes, which nothing prefetches: 100 ns at 5 GB/s
_LATE = 1 / 8  # of an item: how much later than its busiest worker a phase ends, as workers are not equally fast
_EVEN = 0.95  # of the workers' time should be work, where the number of rows allows it
_UNITS = (8, 4, 2, 1)  # rows; kernels take up to four together
_MOST_ROUNDS = 32  # of items, beyond as many as ITEM_BYTES make


def rows_of_item(row_bytes: int, n_rows: int, n_workers: int, multiple: int = 1) -> int:
    """Rows of weights that an item should have, a multiple: large items, as their starts are read without prefetching,
    but so that workers end together.

    n_rows: of all matrices that the workers share.
    """
    return rows_of_items(((n_rows, row_bytes),), n_workers, multiple)[0]


@functools.lru_cache(1024)
def rows_of_items(matrices: tuple[tuple[int, int], ...], n_workers: int, multiple: int = 1) -> tuple[int, ...]:
    """The same of several matrices, (rows, bytes of a row), whose items are handed out one matrix after the other."""
    smallest = min(row_bytes for _, row_bytes in matrices)
    share = max(1.0, sum(n_rows * row_bytes for n_rows, row_bytes in matrices) / (n_workers * smallest))
    first, chosen, best = math.ceil(share * smallest / ITEM_BYTES), (), (-1.0, -1.0)
    for unit in [unit for unit in _UNITS if unit % multiple == 0] or [multiple]:
        most = max(1, ITEM_BYTES // smallest // unit)
        for rounds in range(first, first + _MOST_ROUNDS):
            rows = min(math.ceil(share / rounds / unit), most) * unit
            divided = tuple(max(unit, rows * smallest // row_bytes // unit * unit) for _, row_bytes in matrices)
            even, busy = _shares_of_time(matrices, divided, n_workers)
            if (min(even, _EVEN), busy) > best:
                chosen, best = divided, (min(even, _EVEN), busy)
        if min(best) >= _EVEN:
            break
    return chosen


def _shares_of_time(matrices: Sequence[tuple[int, int]], divided: Sequence[int], n_workers: int) -> tuple[float, float]:
    """What part of the workers' time is work, by bytes alone and with what items cost besides: in hundredths, so that
    large items are preferred."""
    runs = []
    for (n_rows, row_bytes), rows in zip(matrices, divided, strict=True):
        items, rest = divmod(n_rows, rows)
        runs += [(items, rows * row_bytes)] + [(1, rest * row_bytes)] * (rest > 0)
    mean = sum(count * n_bytes for count, n_bytes in runs) / n_workers
    late = _LATE * max(n_bytes for _, n_bytes in runs)
    with_starts = busiest([(count, n_bytes + _START_BYTES) for count, n_bytes in runs], n_workers)
    return round(mean / max(1, busiest(runs, n_workers)), 2), round(mean / (with_starts + late), 2)


def busiest(runs: Iterable[tuple[int, int]], n_workers: int) -> int:
    """What the busiest worker has where each takes the next item when it is free: runs of so many items that cost so
    much each."""
    loads = [0] * n_workers  # a heap
    for count, cost in runs:
        if max(loads) - loads[0] <= cost:  # then everybody takes one of each round
            loads = [load + count // n_workers * cost for load in loads]
            count %= n_workers
        for _ in range(count):
            heapreplace(loads, loads[0] + cost)
    return max(loads)


class _WorkItems(types.SimpleIteratorType):
    def __init__(self):
        super().__init__("work_items", types.int64)


@register_model(_WorkItems)
class _WorkItemsModel(models.StructModel):
    def __init__(self, manager, type_):
        super().__init__(manager, type_, [(name, types.int64) for name in ("counter", "end", "step")])


@intrinsic
def _work_items(context, counter, end, step):
    def codegen(context, builder, signature, values):
        items = cgutils.create_struct_proxy(signature.return_type)(context, builder)
        items.counter, items.end, items.step = values
        return items._getvalue()

    return _WorkItems()(types.int64, types.int64, types.int64), codegen


@inline
def work_items(counter, end, step=1):
    """Iterates over the work items that this worker gets. counter: address of an int64."""
    return _work_items(counter, end, step)


@lower_builtin("iternext", _WorkItems)
@iternext_impl(RefType.UNTRACKED)
def _next(context, builder, signature, values, result):
    items = cgutils.create_struct_proxy(signature.args[0])(context, builder, values[0])
    item = builder.atomic_rmw("add", pointer(builder, items.counter, I64), items.step, "seq_cst")
    result.set_valid(builder.icmp_signed("<", item, items.end))
    result.yield_(item)
