"""A step of a few tokens through the whole network: recorded once for a cache and a number of tokens, then replayed.

On a GPU that is a CUDA graph with the CPU's experts as host nodes, so that a token costs neither Python nor launches
between layers. What changes from step to step lies in memory: ids in page-locked memory that the graph's first node
copies up, the position in the cache. Logits and hidden states of all tokens come back the same way.

Letters: T tokens, D hidden_size.
"""

from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary, ref

import numpy as np
import torch
from torch.nn.functional import rms_norm

from localrun.gpu.cache import DeviceContext
from localrun.gpu.device import Cuda, StandIn
from localrun.gpu.routed import Mode, Routed
from localrun.network.model import Network
from quant.decode.program import MOST_TOKENS
from quant.threads.pool import Pool


class DecodeStep:
    """The step of one model. Its buffers hold a few tokens of one context, so one step at a time."""

    def __init__(self, device: Cuda | StandIn, pool: Pool, network: Network, routed: Routed):
        """network: of modules on the device, with the experts `routed`."""
        self._device, self._pool, self._network, self._routed = device, pool, network, routed
        c = network.config
        self._ids_on_host = device.pinned((MOST_TOKENS,), torch.int64)
        self._ids = torch.zeros(MOST_TOKENS, dtype=torch.int64, device=device.torch)
        self._hidden = device.pinned((MOST_TOKENS, c.hidden_size), torch.float32)
        self._logits = device.pinned((MOST_TOKENS, c.vocab_size), torch.float32)
        self._recorded: WeakKeyDictionary[DeviceContext, dict[int, Callable[[], None]]] = WeakKeyDictionary()

    def __call__(self, ids: Sequence[int], cache: DeviceContext) -> tuple[np.ndarray, np.ndarray]:
        """Evaluate up to MOST_TOKENS ids after the cache's, which has room for them; it then holds them too.

        Returns:
            Of each: what the head reads, float32 (T, D), and logits (T, vocab).
        """
        n_tokens = len(ids)
        self.load(ids)
        with self._pool.exclusive():
            try:
                self._replay(cache, n_tokens)()
            finally:  # until then, host nodes use the workers and the graph its buffers, whatever happened here
                self._device.synchronize()
        cache.advance(n_tokens)
        return self._hidden[:n_tokens].numpy().copy(), self._logits[:n_tokens].numpy().copy()

    def load(self, ids: Sequence[int]) -> None:
        """The ids of the next queue() or replay."""
        self._ids_on_host[: len(ids)] = torch.tensor(ids, dtype=torch.int64)

    def _replay(self, cache: DeviceContext, n_tokens: int) -> Callable[[], None]:
        """What queues the step: recorded when it is first asked for, which runs it a few times."""
        recorded = self._recorded.setdefault(cache, {})
        if n_tokens not in recorded:
            of_cache = ref(cache)  # or its own record would keep it

            def step() -> None:
                found = of_cache()
                assert found is not None
                self.queue(found, n_tokens)

            recorded[n_tokens] = self._device.capture(step)
        return recorded[n_tokens]

    def queue(self, cache: DeviceContext, n_tokens: int) -> None:
        """The step's work, launch by launch. Within Pool.exclusive(), until it is done."""
        network, c = self._network, self._network.config
        self._routed.mode = Mode.STEP
        self._routed.start()
        ids = self._ids[:n_tokens]
        ids.copy_(self._ids_on_host[:n_tokens], non_blocking=True)
        x_TD = network.embed_tokens(ids)
        for layer in network.layers:
            x_TD = layer(x_TD, cache)
        x_TD = rms_norm(x_TD, (c.hidden_size,), network.norm, c.rms_norm_eps)
        self._hidden[:n_tokens].copy_(x_TD, non_blocking=True)
        self._logits[:n_tokens].copy_(network.lm_head(x_TD), non_blocking=True)
        self._routed.end()
