"""How Triton compiles kernels here; and tells when it does so, instead of finding one in its cache on the disk.

Both through Triton's own settings, which are environment variables (triton/knobs.py). TRITON_CACHE_MANAGER names the
class that keeps compiled kernels: triton.compile asks it for a kernel's files before it compiles one
(triton/compiler/compiler.py, 3.2.0 to 3.9.0).
"""

import os
from collections.abc import Callable
from typing import ClassVar

from triton.runtime.cache import FileCacheManager

_LINE = "compiling kernels for the GPU, which takes a while; they are kept for the next run"


class TellingCache(FileCacheManager):
    """Triton's cache; the first kernel that it lacks is told of."""

    tell: ClassVar[Callable[[str], None] | None] = None

    def get_group(self, filename: str) -> dict[str, str] | None:
        """The files of a kernel, None if it must be compiled."""
        found = super().get_group(filename)
        if not found and TellingCache.tell is not None:
            tell, TellingCache.tell = TellingCache.tell, None
            tell(_LINE)
        return found


def set_up(notice: Callable[[str], None]) -> None:
    """For kernels from now on. The user's own settings have precedence.

    Args:
        notice: called with one line as soon as a kernel has to be compiled.
    """
    # Sums of products in one instruction: from 3.10 on no longer the default, of which 3.9 warns.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    ours = f"{__name__}:{TellingCache.__name__}"
    if os.environ.setdefault("TRITON_CACHE_MANAGER", ours) == ours:
        TellingCache.tell = notice
