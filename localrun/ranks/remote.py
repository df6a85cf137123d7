"""Rank 0's side: what the other ranks add to the experts of a layer, in a step or of many tokens.

Letters: T tokens, K experts per token, D hidden_size.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import numpy as np

from localrun.gguf.file import GGUFFile
from localrun.models.config import Config
from localrun.ranks import many
from localrun.ranks.sharing import Ranks, Share
from localrun.ranks.world import RankError
from quant.decode.exchange import N_TIMES, Exchange
from quant.decode.experts import NOBODY, Told
from quant.decode.message_sizes import HEADER_BYTES, back_bytes
from quant.decode.messages import BACK_MANY, END, HEADER, MANY, TO, TO_MANY
from quant.decode.program import Phase
from quant.decode.streams import Streams
from quant.matrix import ExpertMatrices
from quant.threads.links import LinkError

READY = b"ready"
_START_S, _END_S = 900.0, 1.0  # that ranks may take to copy their share and compile kernels; to hear of the end
_AT_ONCE = 2  # batches of a prompt that are on their way


class Remote:
    """The ranks beside this one, ready with their shares of a file's experts.

    Attributes:
        share: this rank's own.
    """

    def __init__(self, file: GGUFFile, config: Config, ranks: Ranks):
        """Waits until all are ready. Raises LocalrunError: the model can't be shared so, or a rank is gone."""
        self._world, self._others = ranks.world, range(1, ranks.world.size)
        self.share = Share(file, config, ranks.world, ranks.sharing)
        self._numbers = {index: number for number, index in enumerate(self.share.layers)}
        self._exchange = Exchange(
            self._world.links, len(self._others), self.share.type, self.share.hidden, self.share.top_k
        )
        self._threads = ThreadPoolExecutor(_AT_ONCE, "localrun-ranks")
        self._in_order = threading.Lock()
        self._many_bytes, self._many_s = np.zeros(2, np.int64), np.zeros(2)  # sent, received; computing, waiting
        for rank in self._others:
            if self._world.receive(rank, _START_S) != READY:
                raise RankError(rank, f"{self._world.names[rank]}: does not say that it is ready")

    def own(self, index: int, whole: ExpertMatrices) -> ExpertMatrices:
        """What is here of a layer's experts; all, of a layer that is not shared."""
        return self.share.layers.get(index, whole)

    def has(self, index: int) -> bool:
        """Whether a layer is shared."""
        return index in self._numbers

    # ---- a step ------------------------------------------------------------------------------------------------------

    def told(self, index: int) -> Told:
        """What a layer's first phase is to tell the others; nothing, of a layer that is not shared."""
        return Told(self._exchange.send, self._exchange.address, self._numbers[index]) if self.has(index) else NOBODY

    def collect_phase(self, out: int, into: Streams | None) -> Phase:
        """As Exchange.collect_phase."""
        return self._exchange.collect_phase(out, into)

    def check(self) -> None:
        """After a step, or before: raises RankError if a rank did not answer. Nothing can be computed from then on."""
        if self._exchange.failure:
            self._world.note(self._world.error(*self._exchange.failure))
        if self._world.failure:
            raise self._world.failure

    # ---- many tokens -------------------------------------------------------------------------------------------------

    def begin_many(
        self, index: int, x_TD: np.ndarray, ids_TK: np.ndarray, weights_TK: np.ndarray
    ) -> Callable[[np.ndarray], None]:
        """Have the others start on a layer's experts of float32 x_TD, int64 ids_TK and float32 weights_TK.

        Returns: what waits for their sums and adds them to float32 (T, D). Raises RankError, as that does.
        """
        self.check()
        job = self._threads.submit(self._exchange_many, self._numbers[index], x_TD, ids_TK, weights_TK)
        return partial(self._add_many, job, time.perf_counter())

    def _exchange_many(
        self, number: int, x_TD: np.ndarray, ids_TK: np.ndarray, weights_TK: np.ndarray
    ) -> list[np.ndarray]:
        """The others' sums, float32 (T, D) each, in the order of ranks."""
        n_tokens, type_, links = len(x_TD), self.share.type, self._world.links
        header = np.zeros(HEADER_BYTES, np.uint8)
        HEADER.write(header.view(np.int64), kind=MANY, layer=number, n_tokens=n_tokens)
        message = many.pack(type_, x_TD, ids_TK, weights_TK)
        size = back_bytes(type_.name, self.share.hidden, n_tokens) - HEADER_BYTES
        backs, requests = [np.empty(size, np.uint8) for _ in self._others], []
        with self._in_order:  # so that messages of two batches go in pairs
            for rank, back in zip(self._others, backs, strict=True):
                with self._world.reaching(rank):
                    requests += [
                        (rank, links.start_receive(back, rank, BACK_MANY)),
                        (rank, links.start_send(header, rank, TO)),
                        (rank, links.start_send(message, rank, TO_MANY)),
                    ]
        for rank, request in requests:
            with self._world.reaching(rank):
                links.finish(request)
        self._many_bytes += len(backs) * (header.nbytes + message.nbytes), len(backs) * size
        return [many.unpack_sums(type_, back, self.share.hidden) for back in backs]

    def _add_many(self, job: Future[list[np.ndarray]], began: float, out_TD: np.ndarray) -> None:
        asked = time.perf_counter()
        try:
            for sums_TD in job.result():
                out_TD += sums_TD
        except RankError as error:
            raise self._world.note(error) from None
        self._many_s += asked - began, time.perf_counter() - asked

    # ---- figures, and the end ----------------------------------------------------------------------------------------

    def figures(self) -> dict[str, float]:
        """What was sent and received so far, and what messages cost.

        Of the last N_TIMES exchanges of steps: message_us is what neither this rank's nor the busiest other's computing
        explains, wait_us how long this rank had nothing to do; overlap is the part of the others' time in which this
        one computed as well. many_overlap: the same of prompts.
        """
        n = self._exchange.n_exchanges
        sent, own, waited, busy = self._exchange.times[: min(n, N_TIMES)].T
        message_us, wait_us = (sent + own + waited - np.maximum(own, busy)) / 1e3, waited / 1e3
        n_bytes = self._many_bytes + self._exchange.n_bytes
        found = {"exchanges": n, "bytes_out": int(n_bytes[0]), "bytes_back": int(n_bytes[1])}
        for name, us in (("message_us", message_us), ("wait_us", wait_us)) if n else ():
            found |= {f"{name}_median": float(np.median(us)), f"{name}_p90": float(np.quantile(us, 0.9))}
        for name, (computed, idle) in (("overlap", (own.sum(), waited.sum())), ("many_overlap", self._many_s)):
            if computed + idle > 0:
                found[name] = float(computed / (computed + idle))
        return found

    def close(self) -> None:
        """Tell the others that there is nothing more to do."""
        self._threads.shutdown()
        header = np.zeros(HEADER_BYTES, np.uint8)
        HEADER.write(header.view(np.int64), kind=END)
        for rank in self._others:
            with suppress(LinkError):  # one that is gone need not be told
                self._world.links.finish(self._world.links.start_send(header, rank, TO), _END_S)
