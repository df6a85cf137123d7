"""What a cache holds, and caches without a model."""

import numpy as np

from localrun.models import config
from localrun.models.rows import Rows
from localrun.network.cache import Cache


def rows_of(cache: Cache) -> list[np.ndarray]:
    """A copy of all rows in use."""
    return [rows.copy() for rows in cache.save().values()]


def kinds(*widths: int, window: int = 0) -> list[Rows]:
    """Of a layer with rows of these widths."""
    return [Rows(width, window=window, spare=config.WINDOW_SPARE) for width in widths]
