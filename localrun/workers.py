"""How many worker threads a command or a model gets: one a physical core, or as many as the user asks for."""

from __future__ import annotations

import threading
from typing import Any

from localrun import hardware
from localrun.arguments import whole
from localrun.errors import LocalrunError

MOST_THREADS = 512  # GGML_MAX_N_THREADS (ggml.h): llama.cpp aborts beyond


def n_workers(threads: Any) -> int:
    """Worker threads for the option `threads`; None for one a physical core that this process may use.

    Raises LocalrunError if it is no number from 1 to MOST_THREADS, or so many can't run at once.
    """
    if threads is None:
        count = min(hardware.usable_cores(), MOST_THREADS)
    else:
        count = whole("threads", threads, f"1 to {MOST_THREADS}", low=1, high=MOST_THREADS)
    _try(count)
    return count


def _try(count: int) -> None:
    """Start so many threads at once, and end them: what starts them later leaves some behind, or aborts."""
    enough = threading.Event()
    threads = [threading.Thread(target=enough.wait, daemon=True) for _ in range(count)]
    try:
        for thread in threads:
            thread.start()
    except RuntimeError:
        raise LocalrunError(f"{count} threads can't be started here, for want of memory; ask for fewer (-t)") from None
    finally:
        enough.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
