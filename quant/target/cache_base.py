"""Where what is kept between runs lies."""

import os
from pathlib import Path


def cache_base() -> Path | None:
    """$LOCALRUN_CACHE, else the user's cache; None where there is no home folder."""
    base = os.environ.get("LOCALRUN_CACHE") or os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return None if base.startswith("~") else Path(base) / "localrun"
