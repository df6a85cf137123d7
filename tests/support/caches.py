"""What a cache holds."""

import numpy as np

from localrun.network.cache import Cache


def rows_of(cache: Cache) -> list[np.ndarray]:
    """All rows in use."""
    return [np.array(part[: cache.length]) for parts in cache._layers for part in parts]
