"""A step of a few tokens through the whole network: recorded once for a number of tokens, then replayed.

On a GPU that is a CUDA graph with the CPU's experts as host nodes, so that a token costs neither Python nor launches
between layers. On several it is one for each, replayed in order: what a card's last layer gives goes to the next card
through page-locked memory, once it is there; so no card needs to reach another one's memory. What changes from step to
step lies in page-locked memory that a graph's first node copies up: ids, positions, and where each token's cache is. So
the tokens may follow each other in one context, or be of as many, and contexts may come and go. Logits and hidden
states of all tokens come back the same way.

Letters: T tokens, D hidden_size.
"""

import ctypes
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from localrun.gpu.caches.cache import AnyCache
from localrun.gpu.caches.places import ENTRIES, Places
from localrun.gpu.device import Cuda, StandIn
from localrun.gpu.experts.routed import Mode, Routed
from localrun.models.config import INDEXED_RATIO
from localrun.network.model import Network
from localrun.ranks.remote import Remote
from quant.decode.program import MOST_TOKENS
from quant.threads.pool import CONTROL, Pool


@dataclass(frozen=True)
class Part:
    """Layers that follow each other, and the device that they are on.

    Attributes:
        layers: their indices.
        routed: their experts.
    """

    device: Cuda | StandIn
    layers: range
    routed: Routed


class DecodeStep:
    """The step of one model. Its buffers hold a few tokens, so one step at a time.

    Attributes:
        recorded: number of tokens, bits of their caches' values, Places.most, part -> what queues that part of a step.
    """

    def __init__(self, parts: Sequence[Part], pool: Pool, network: Network, remote: Remote | None = None):
        """network: of modules on the parts' devices. remote: other ranks that have shares of the experts."""
        self._parts, self._pool, self._network, self._remote = parts, pool, network, remote
        self._jobs = ctypes.c_int64.from_address(pool.control + CONTROL.offset("generation"))  # of the workers, so far
        c, pinned = network.config, parts[0].device.pinned
        shape = 2 + ENTRIES * c.num_hidden_layers, MOST_TOKENS  # ids, positions, a table of Places
        self._inputs_on_host = pinned(shape, torch.int64)
        self._inputs = [torch.zeros(shape, dtype=torch.int64, device=part.device.torch) for part in parts]
        # What each part gives: the last one what `hidden` is made of.
        width = max(1, c.hc_mult) * c.hidden_size
        self._hidden = [pinned((MOST_TOKENS, width), torch.float32) for _ in parts]
        # Of each layer that is watched, a whole copy: one into columns could not be captured.
        self._means = pinned((len(network.watched), MOST_TOKENS, c.hidden_size), torch.float32)
        self._logits = pinned((MOST_TOKENS, c.vocab_size), torch.float32)
        self.recorded: dict[tuple[int, int, int, int], Callable[[], None]] = {}

    def __call__(self, ids: Sequence[int], cache: AnyCache) -> tuple[np.ndarray, np.ndarray]:
        """Evaluate up to MOST_TOKENS ids after the cache's, which has room for them; it then holds them too.

        Returns:
            Of each: what the head reads, float32 (T, D), or of streams what they are before, (T, n * D), or their
            means behind watched layers; and logits (T, vocab).

        Raises:
            RankError: another rank has not done its part.
        """
        results = self._run(ids, [cache] * len(ids), range(cache.length, cache.length + len(ids)))
        cache.advance(len(ids))
        return results

    def together(self, ids: Sequence[int], caches: Sequence[AnyCache]) -> tuple[np.ndarray, np.ndarray]:
        """Evaluate up to MOST_TOKENS ids, each after those of a cache of its own, which then holds it too.

        The caches have room, and values of as many bits. Returns and raises as a call.
        """
        results = self._run(ids, caches, [cache.length for cache in caches])
        for cache in caches:
            cache.advance(1)
        return results

    def _run(
        self, ids: Sequence[int], caches: Sequence[AnyCache], positions: Iterable[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        n_tokens, positions = len(ids), list(positions)
        self.load(ids, caches, positions)
        kind = n_tokens, caches[0].bits, self.most(max(positions))
        with self._pool.exclusive():
            for index, part in enumerate(self._parts):
                with part.device.errors():
                    try:
                        self._replay(*kind, index)()
                    finally:  # until then, host nodes use the workers and the graph its buffers, whatever happened here
                        part.device.synchronize(lambda: self._jobs.value)
        if self._remote:
            self._remote.check()
        hidden = self._means[:, :n_tokens] if self._network.watched else self._hidden[-1][None, :n_tokens]
        return np.concatenate(list(hidden.numpy()), 1), self._logits[:n_tokens].numpy().copy()

    def load(self, ids: Sequence[int], caches: Sequence[AnyCache], positions: Iterable[int]) -> None:
        """The tokens of the next queue() or replay, their caches, and their positions there."""
        inputs = self._inputs_on_host.numpy()[:, : len(ids)]
        inputs[0], inputs[1] = ids, list(positions)
        inputs[2:] = np.stack([cache.addresses for cache in caches], 1)

    def most(self, position: int) -> int:
        """Places.most of a step up to a position: what an indexer goes over has twice the size at twice the context."""
        c = self._network.config
        chosen = c.index_topk * (INDEXED_RATIO if c.attention == "compressed" else 1)  # tokens, of which all are seen
        return max(chosen, 1 << position.bit_length()) if chosen else 0

    def _replay(self, *kind: int) -> Callable[[], None]:
        """What queues a part of it: recorded when it is first asked for, which runs it a few times."""
        if kind not in self.recorded:
            self.recorded[kind] = self._parts[kind[-1]].device.capture(partial(self.queue, *kind))
        return self.recorded[kind]

    def queue(self, n_tokens: int, bits: int, most: int = 0, index: int = 0) -> None:
        """The work of one part, launch by launch. Within Pool.exclusive(), until it is done."""
        network, part = self._network, self._parts[index]
        part.routed.mode = Mode.STEP
        part.routed.start()
        self._inputs[index].copy_(self._inputs_on_host, non_blocking=True)
        inputs = self._inputs[index][:, :n_tokens]
        places = Places(inputs[1], inputs[2:], bits, most)
        x_TD = network.first(inputs[0]) if index == 0 else self._from_before(index, n_tokens)
        for layer, module in enumerate(network.layers[part.layers.start : part.layers.stop], part.layers.start):
            x_TD = module(x_TD, places, inputs[0])
            if layer in network.watched:
                means = self._means[network.watched.index(layer), :n_tokens]
                means.copy_(x_TD.mean(1), non_blocking=True)
        hidden = x_TD.flatten(1)
        if index == len(self._parts) - 1:
            hidden, x_TD = network.last(x_TD)
            self._logits[:n_tokens].copy_(network.lm_head(x_TD), non_blocking=True)
        self._hidden[index][:n_tokens].copy_(hidden, non_blocking=True)
        part.routed.end()

    def _from_before(self, index: int, n_tokens: int) -> torch.Tensor:
        """What the part before has given, on this one's device."""
        c, given = self._network.config, self._hidden[index - 1][:n_tokens]
        x = torch.empty(given.shape, device=self._parts[index].device.torch)
        x.copy_(given, non_blocking=True)
        return x.unflatten(1, (c.hc_mult, c.hidden_size)) if c.hc_mult else x
