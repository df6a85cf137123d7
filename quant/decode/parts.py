"""Which weights the items of a phase read, where those are the same in every step: what can lie near who reads it."""

from collections.abc import Iterator
from dataclasses import dataclass

from quant.matrix import QuantMatrix


@dataclass(frozen=True)
class Part:
    """Rows that items of a phase read, of each group of a matrix: item first_item + i of a period reads rows
    item_rows * i and so on."""

    matrix: QuantMatrix
    item_rows: int
    first_item: int = 0

    def spans(self, first: int, count: int) -> Iterator[tuple[int, int]]:
        """(address, bytes) of what `count` items from `first` on read."""
        m, ends = self.matrix, (first - self.first_item, first - self.first_item + count)
        start, end = (min(max(item, 0) * self.item_rows, m.n_rows) for item in ends)
        if start < end:
            for group in range(m.n_groups):
                yield m.address + m.group_bytes * group + m.row_bytes * start, m.row_bytes * (end - start)


@dataclass(frozen=True)
class GroupPart:
    """A matrix whose i-th group is what item i reads."""

    matrix: QuantMatrix

    def spans(self, first: int, count: int) -> Iterator[tuple[int, int]]:
        """As Part's."""
        m = self.matrix
        for group in range(first, min(first + count, m.n_groups)):
            yield m.address + m.group_bytes * group, m.row_bytes * m.n_rows
