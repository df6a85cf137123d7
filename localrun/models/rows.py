"""Rows that a layer keeps of a text in a cache: how wide, for how many tokens each, and how far back."""

from dataclasses import dataclass

KV_BYTES = 2  # of a value of the cache
GROUP = 16  # values that share a scale are a multiple of it
_SCALE_BYTES = 4  # of a group of values in 8 bits, or of a row of integers


@dataclass(frozen=True)
class Rows:
    """One kind of row.

    Attributes:
        width: values.
        ratio: tokens that a row stands for.
        window: rows, of a token each, that a next token may need, in a ring; 0 for all rows there are.
        spare: rows more in the ring.
        pools: what the window begins at is a multiple of this: tokens that are pooled together.
        is_exact: whether values have 32 bits in any cache.
        group: values that share a scale in a cache of 8 bits; what is left behind whole groups keeps 16 bits, and all
            where it is 0.
        is_scaled: whether a cache of 16 bits on the CPU has integers with a scale a row (quant/gemv/rows_i16.py).
    """

    width: int
    ratio: int = 1
    window: int = 0
    spare: int = 0
    pools: int = 1
    is_exact: bool = False
    group: int = 0
    is_scaled: bool = False

    def count(self, n_tokens: int) -> int:
        """Rows of so many tokens, which a cache of that capacity has room for."""
        return min(n_tokens, self.window + self.spare) if self.window else n_tokens // self.ratio

    def first(self, position: int) -> int:
        """The first position whose row the token at `position` needs."""
        return max(0, (position // self.pools + 1) * self.pools - self.window) if self.window else 0

    def row_bytes(self, bits: int = 16) -> int:
        """Of a cache of so many bits, 16 or 8; the scale of a row of integers, one part in 300, is left out."""
        if bits == 8 and self.group:
            n_groups, rest = divmod(self.width, self.group)
            return n_groups * (self.group + _SCALE_BYTES) + KV_BYTES * rest
        return self.width * (4 if self.is_exact else KV_BYTES)

    def stored_bytes(self, bits: int = 16) -> int:
        """Of a row in memory, from one to the next, on the CPU."""
        return self.row_bytes(bits) + (_SCALE_BYTES if self.is_scaled and bits == 16 else 0)
