"""What DSpark's blocks read of a prompt: the means of its tokens' streams behind a few layers.

They stay on the device until all layers are through: copies in between would have the host wait for it.

Letters: T tokens, n streams, D hidden_size, F values of all watched layers.
"""

from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch

from localrun.gpu.prefill import Layer
from localrun.network.cache import Context


class Watched:
    """A layer of one prompt that leaves means of what it gives: float32 (T, D) of each batch, in their order."""

    def __init__(self, layer: Layer):
        self._layer = layer
        self.means: list[torch.Tensor] = []

    def begin(self, x_TnD: torch.Tensor, cache: Context, ids_T: torch.Tensor) -> Callable[[], torch.Tensor]:
        """As prefill.Layer.begin."""
        finish = self._layer.begin(x_TnD, cache, ids_T)

        def finish_and_leave() -> torch.Tensor:
            x_TnD = finish()
            self.means.append(x_TnD.mean(1))
            return x_TnD

        return finish_and_leave


def watch(layers: Sequence[Layer], indices: Collection[int]) -> list[Layer]:
    """The same layers for one prompt, of which these leave their means."""
    return [Watched(layer) if index in indices else layer for index, layer in enumerate(layers)]


def features(layers: Sequence[Layer]) -> np.ndarray:
    """float32 (T, F) on the host: what the watched ones have left."""
    return np.concatenate([torch.cat(layer.means).cpu().numpy() for layer in layers if isinstance(layer, Watched)], 1)
