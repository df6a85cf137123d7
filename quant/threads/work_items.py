"""How workers share a job: a counter in memory that each takes the next work items from.

    for item in work_items(a.counter, n_items): ...             # 0, 1, 2, .. below n_items, each for one worker
    for first in work_items(a.counter, n_rows, step): ...       # 0, step, 2 * step, .. below n_rows

The loop compiles to an atomic addition and a comparison. The counter is 0 before the job; it ends beyond n_items.
"""

from numba import types
from numba.core import cgutils
from numba.core.imputils import RefType, iternext_impl
from numba.extending import intrinsic, lower_builtin, models, register_model

from quant.simd.core import I64, pointer
from quant.target.jit import inline

# Weights of an item. Its start is read without prefetching, so items should be few, but workers should end together.
ITEM_BYTES = 1 << 19


def rows_of_item(row_bytes: int, n_rows: int, n_workers: int, multiple: int, per_worker: int = 4) -> int:
    """Rows of weights that an item should have: a multiple, and so few that each worker gets per_worker items or more,
    then up to half as many where workers end more evenly: with many of them a phase is a few rounds of items.

    n_rows: of all matrices that the workers share.
    """
    most = max(multiple, min(ITEM_BYTES // row_bytes, n_rows // (per_worker * n_workers)) // multiple * multiple)
    fewer = range(most, most // 2, -multiple)
    return max(fewer, key=lambda rows: evenness(-(-n_rows // rows), n_workers))


def evenness(n_items: int, n_workers: int) -> float:
    """What part of the workers' time has work, where all items take as long: in hundredths, to prefer large items."""
    return round(n_items / (n_workers * -(-n_items // n_workers)), 2) if n_items else 1.0


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
