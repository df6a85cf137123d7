"""DSpark's blocks over the tensors of their file, on the CPU: a pass through torch a block (network/dspark.py)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from localrun.cpu.torch_threads import torch_at_work
from localrun.gguf.file import GGUFFile
from localrun.models.dspark import DSpark
from localrun.network.cache import Cache, new_cache
from quant.threads.pool import Pool

if TYPE_CHECKING:
    from localrun.network.dspark import DSparkNetwork
    from localrun.network.weight_source import WeightSource


class Drafter:
    """What drafts for one model.

    Attributes:
        spark: its sizes.
    """

    def __init__(self, spark: DSpark, file: GGUFFile, pool: Pool, model: "Callable[[], WeightSource]"):
        """The file must stay open. model: gives the model's weights on the CPU; called when drafts are asked for."""
        self.spark, self._file, self._pool, self._model = spark, file, pool, model
        self._made: DSparkNetwork | None = None

    def new_cache(self, capacity: int) -> Cache:
        """An empty cache for up to `capacity` positions."""
        return new_cache(self.spark.config, capacity)

    def keep(self, features: np.ndarray, cache: Cache) -> None:
        """Take float32 (T, F), what the model left in `hidden`, of the positions after the cache's.

        Raises ContextFullError: the cache has no room for them.
        """
        with self._torch(len(features)) as network:
            network.keep(features, cache)

    def draft(self, last: int, n: int, cache: Cache) -> list[int]:
        """Up to n tokens that may follow the cache's and the token `last`."""
        with self._torch(self.spark.block_size) as network:
            return network.draft(last, min(n, self.spark.block_size), cache)

    @contextmanager
    def _torch(self, n_tokens: int) -> "Iterator[DSparkNetwork]":
        """The network while torch works on so many tokens."""
        network = self._network
        with torch_at_work(self._pool, self.spark.config, n_tokens):
            yield network

    @property
    def _network(self) -> "DSparkNetwork":
        if self._made is None:
            of_model = self._model()  # before the imports: it settles how torch's threads wait
            from localrun.cpu.weights import LayerWeights
            from localrun.network.dspark import DSparkNetwork

            weights = LayerWeights(self._file, self._pool)
            weights.architecture, weights.config = self.spark.config.architecture, self.spark.config
            self._made = DSparkNetwork(self.spark, weights, of_model)
        return self._made
