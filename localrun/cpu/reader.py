"""Reading prompts for another process, which decodes meanwhile: what localrun.ranks.readers asks for."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing

import numpy as np

from localrun.cpu.torch_threads import TorchThreads, torch_at_work
from localrun.cpu.warmup import for_prompts, warm_up
from localrun.gguf.file import GGUFFile
from localrun.gguf.residency import Resident
from localrun.models.config import Config
from localrun.models.names import INTEGERS
from localrun.network.cache import Cache
from localrun.ranks.readers import ASK, END, HIDDEN, LOGITS, Asked, receive, send
from localrun.ranks.remote import READY
from localrun.ranks.world import World
from quant.threads.pool import Pool

_FIELDS = len(Asked._fields)


def serve_reading(file: GGUFFile, config: Config, world: World, n_threads: int) -> None:
    """Get the network ready, say so, and read chunks of prompts for rank 0 until it closes its engine.

    Raises RankError: rank 0 can't be reached any more.
    """
    types = {tensor.type.name for name, tensor in file.tensors.items() if not INTEGERS.fullmatch(name)}
    for bits in (16, 8):  # caches of either may come
        warm_up(for_prompts(config, types, bits), None, lambda line: None)
    TorchThreads.hold(n_threads)
    try:
        with closing(Pool(n_threads)) as pool, closing(Resident(file)), ThreadPoolExecutor(1) as sender:
            _Reader(file, config, world, pool, sender).run()
    finally:
        TorchThreads.release()


class _Reader:
    def __init__(self, file: GGUFFile, config: Config, world: World, pool: Pool, sender: ThreadPoolExecutor):
        from localrun.cpu.weights import LayerWeights
        from localrun.network.model import Network

        self._config, self._world, self._pool, self._sender = config, world, pool, sender
        self._network = Network(config, LayerWeights(file, pool))
        self._sent: list[Future[None]] = []

    def run(self) -> None:
        """Until the end."""
        self._world.send(0, READY)
        cache: _SentCache | None = None
        while (part := receive(self._world, 0)).kind != END:
            assert part.kind == ASK
            numbers = part.content.view(np.int64).tolist()
            asked, ids = Asked(*numbers[:_FIELDS]), numbers[_FIELDS:]
            if cache is None or (cache.capacity, cache.bits) != (asked.capacity, asked.bits):
                cache = _SentCache(self._config, asked.capacity, asked.bits, self._send)
            cache.length = asked.length
            cache.check_room(len(ids))
            for _ in range(asked.n_parts):
                rows = receive(self._world, 0)
                cache.write(rows.kind, rows.end, rows.content)
            self._read(ids, cache, bool(asked.wants_hidden))

    def _read(self, ids: list[int], cache: _SentCache, wants_hidden: bool) -> None:
        began, cache.end = time.perf_counter_ns(), cache.length + len(ids)
        with torch_at_work(self._pool, self._config, len(ids)):
            hidden, logits = self._network.forward(ids, cache, all_hidden=wants_hidden)
        busy_ns = time.perf_counter_ns() - began
        if wants_hidden:
            self._send(HIDDEN, hidden)
        self._send(LOGITS, logits, busy_ns)
        while self._sent:
            self._sent.pop().result()

    def _send(self, kind: int, content: np.ndarray, end: int = 0) -> None:
        """In another thread, in order: this one computes the next layer."""
        self._sent.append(self._sender.submit(send, self._world, 0, kind, content, end))


class _SentCache(Cache):
    """A cache whose new rows go to rank 0 as soon as a layer has them.

    Attributes:
        end: tokens that it is to hold once all layers have theirs.
    """

    def __init__(self, config: Config, capacity: int, bits: int, send_rows: Callable[[int, np.ndarray, int], None]):
        kinds = [config.rows(index) for index in range(config.num_hidden_layers)]
        super().__init__(kinds, capacity, np.float16, bits)
        numbers = iter(range(len(self._blocks)))
        self._numbers = [[next(numbers) for _ in layer] for layer in kinds]
        self._send_rows, self.end = send_rows, 0

    def extend(self, layer, part, rows):
        """As Cache.extend."""
        found = super().extend(layer, part, rows)
        block = self._layers[layer][part]
        first = max(self.length, self.end - len(block.rows)) if block.is_ring else self.length
        new = block.stored(first, self.end)
        if len(new):
            self._send_rows(self._numbers[layer][part], new, self.end)
        return found
