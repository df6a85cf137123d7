"""How kernels cut their work into tiles: candidates among which a card's proof chooses by time (proof/tiles.py).

Results are within the same bounds whichever is in use. Compiled for cards that are not there, none needs more shared
memory than they have (tests/localrun/gpu/test_gpu_compile.py). No torch.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace

from localrun.errors import LocalrunError


@dataclass(frozen=True)
class Few:
    """Of products of a few tokens (gemv.py).

    The order in which a row's products are summed depends on `units` and on the parts that columns are split into,
    never on the number of tokens: a token's results are those it would have alone.

    Attributes:
        rows: of a tile for up to 4 tokens; half as many for more, each of which keeps a sum a token in registers.
        units: of 32 columns (formats/blocks.py) of a tile, where words have 4 bytes; of shorter words as many less.
        programs: a multiprocessor: enough of them keep the memory busy.
    """

    rows: int = 32
    units: int = 16
    warps: int = 4
    programs: int = 4


@dataclass(frozen=True)
class Many:
    """Of products of many tokens (gemm.py).

    Attributes:
        tokens: of a tile, at the most.
        units: as of Few; a plane's half is 32 columns then, two of tl.dot's smallest steps.
        stages: of loads under way: more of them want more shared memory than consumer cards have.
    """

    tokens: int = 64
    rows: int = 64
    units: int = 8
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True)
class Attention:
    """Of a few tokens' attention (attention/flash_decoding.py).

    Attributes:
        heads: of a program, at the most. 1 does without tensor cores, and reads each row of the cache for every head.
        programs: a multiprocessor, for one token.
    """

    heads: int = 32
    programs: int = 1


@dataclass(frozen=True)
class Tiles:
    """Of all kernels."""

    few: Few = Few()
    many: Many = Many()
    attention: Attention = Attention()


# By the fields of Tiles. "small" is for a multiprocessor's 64 KiB of shared memory, and what Triton has no tensor
# cores for: compute capability 7.5.
CANDIDATES: dict[str, dict[str, Few] | dict[str, Many] | dict[str, Attention]] = {
    "few": {"usual": Few(), "low": Few(rows=16, programs=8), "eight warps": Few(warps=8), "small": Few()},
    "many": {
        "usual": Many(), "narrow": Many(units=4), "three stages": Many(units=4, stages=3),
        "eight warps": Many(warps=8), "small": Many(tokens=16, warps=8, stages=1),
    },
    "attention": {
        "usual": Attention(), "two pieces": Attention(programs=2), "16 heads": Attention(heads=16),
        "small": Attention(heads=1),
    },
}  # fmt: skip
USUAL, SMALL = "usual", "small"
_in_use: dict[Hashable, Tiles] = {}


def of(device: Hashable) -> Tiles:
    """Those in use on a torch.device."""
    return _in_use.get(device, Tiles())


def use(device: Hashable, tiles: Tiles) -> None:
    """Have kernels that are launched, or recorded, from now on have these."""
    _in_use[device] = tiles


def named(names: Mapping[str, str], base: str = USUAL) -> Tiles:
    """By names of CANDIDATES, all others by `base`. Raises LocalrunError if there is no such one."""
    for kind, name in names.items():
        if not isinstance(name, str) or name not in CANDIDATES.get(kind, {}):
            raise LocalrunError(f"there are no tiles {str(name)[:40]!r} of {str(kind)[:40]!r}")
    return replace(Tiles(), **{kind: found[names.get(kind, base)] for kind, found in CANDIDATES.items()})
