"""What every rank but the first does: compute its share of routed experts for rank 0, until that needs no more."""

from __future__ import annotations

from contextlib import closing

import numpy as np

from localrun.errors import LocalrunError
from localrun.gguf.file import GGUFFile
from localrun.gguf.residency import Resident
from localrun.models.reader import read_config
from localrun.ranks import many
from localrun.ranks.division import hear
from localrun.ranks.remote import READY
from localrun.ranks.sharing import Share, Sharing
from localrun.ranks.world import World
from quant.decode.exchange import Served
from quant.decode.message_sizes import HEADER_BYTES, message_bytes
from quant.decode.messages import BACK_MANY, END, HEADER, MANY, TO_MANY
from quant.ops import experts as quant_experts
from quant.threads.pool import Pool

_IDLE_S = 1.0
_MANY_TOKENS = 64  # for kernels of many tokens to be compiled


def serve_share(file: GGUFFile, world: World, sharing: Sharing, n_threads: int) -> None:
    """Copy and map this rank's share, say so, and answer rank 0 until it closes its engine.

    Raises:
        LocalrunError: the model can't be shared so.
        RankError: rank 0 can't be reached any more.
    """
    config = read_config(file)
    share = Share(file, config, world, sharing, hear(file, config, world, sharing, n_threads))
    resident = Resident(file, share.spans)
    try:
        with closing(Pool(n_threads)) as pool:
            _Worker(world, share, pool).run()
    finally:
        resident.close()


class _Worker:
    def __init__(self, world: World, share: Share, pool: Pool):
        self._world, self._share, self._pool = world, share, pool
        self._layers = list(share.layers.values())
        self._served = Served(world.links, pool, self._layers, share.type, share.top_k)
        self._compile()

    def _compile(self) -> None:
        """Have the kernels of many tokens at hand, so that rank 0 does not wait for them."""
        share, formats = self._share, set()
        for layer, own in enumerate(self._layers):
            key = own.gate.format.name, own.up.format.name, own.down.format.name
            if key not in formats:
                formats.add(key)
                for n_tokens in (1, _MANY_TOKENS):
                    x, ids = np.zeros((n_tokens, share.hidden), np.float32), np.zeros((n_tokens, share.top_k), np.int64)
                    message = many.pack(share.type, x, ids, np.zeros((n_tokens, share.top_k), np.float32))
                    self._sums_of(layer, n_tokens, message)

    def run(self) -> None:
        """Answer until the end."""
        self._world.send(0, READY)
        while True:
            with self._world.reaching(0):
                has_come = self._served.serve(_IDLE_S)
            if not has_come:  # a chance for signals
                continue
            kind, layer, n_tokens = (int(self._served.header[HEADER.offset(f) // 8]) for f in _FIELDS)
            if kind == END:
                return
            if kind != MANY or not 0 <= layer < len(self._layers) or n_tokens < 1:
                raise LocalrunError(f"{self._world.names[0]}: a message of kind {kind} for layer {layer}")
            self._answer_many(layer, n_tokens)

    def _answer_many(self, layer: int, n_tokens: int) -> None:
        share, links = self._share, self._world.links
        size = message_bytes(share.type.name, share.hidden, share.top_k, n_tokens) - HEADER_BYTES
        message = np.empty(size, np.uint8)
        with self._world.reaching(0):
            self._world.watch(links.start_receive(message, 0, TO_MANY))
            self._world.watch(links.start_send(self._sums_of(layer, n_tokens, message), 0, BACK_MANY))

    def _sums_of(self, layer: int, n_tokens: int, message: np.ndarray) -> np.ndarray:
        """What to send back of a message of many tokens."""
        share = self._share
        x, ids, weights = many.unpack(share.type, message, n_tokens, share.hidden, share.top_k)
        sums = np.empty_like(x)
        quant_experts.run(self._pool, self._layers[layer], x.ctypes.data, ids, weights, sums.ctypes.data)
        return many.pack_sums(share.type, sums)


_FIELDS = ("kind", "layer", "n_tokens")
