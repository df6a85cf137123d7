"""What a cache holds."""

import numpy as np

from localrun.network.cache import Cache


def rows_of(cache: Cache) -> list[np.ndarray]:
    """A copy of all rows in use."""
    return [rows.copy() for rows in cache.save().values()]
