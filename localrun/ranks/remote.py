"""Rank 0's side: what the other ranks add to the experts of a layer, in a step or of many tokens.

Letters: T tokens, K experts per token, D hidden_size.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import numpy as np

from localrun.gguf.file import GGUFFile
from localrun.limits import PREFILL_CHUNK
from localrun.models.config import Config
from localrun.models.tensors import GGUFTensors
from localrun.placement.placement import Placement
from localrun.ranks import many
from localrun.ranks.division import decide
from localrun.ranks.owners import assign
from localrun.ranks.sharing import Ranks, Share, n_bytes
from localrun.ranks.world import RankError
from quant.decode.exchange import N_TIMES, Exchange
from quant.decode.experts import NOBODY, Told
from quant.decode.host_node import OtherRanks
from quant.decode.message_sizes import HEADER_BYTES
from quant.decode.messages import END, HEADER, TO
from quant.decode.program import Phase
from quant.decode.streams import Streams
from quant.matrix import ExpertMatrices
from quant.threads.links import LinkError, Request

READY = b"ready"
_END_S = 1.0  # that ranks may take to hear of the end
_AT_ONCE = 2  # batches of a prompt that are on their way
_Sums = list[tuple[np.ndarray, np.ndarray]]  # of each rank: int64 tokens of a batch, and their float32 sums


class Remote:
    """The ranks beside this one, with their shares of a file's experts.

    Attributes:
        ranks: they, and how they share.
        share: this rank's own; none before get_ready().
    """

    share: Share

    def __init__(self, file: GGUFFile, config: Config, ranks: Ranks, n_threads: int, placement: Placement):
        """Tells them what each is to have: they copy it and compile while this rank does. To be closed.

        Args:
            n_threads, placement: as decide() has them.

        Raises LocalrunError: the model can't be shared so, or a rank is gone.
        """
        self.ranks, self._file, self._config = ranks, file, config
        self._world, self._others = ranks.world, range(1, ranks.world.size)
        self._division = decide(file, config, ranks, n_threads, placement)
        self._numbers = {index: number for number, index in enumerate(self._division.layers)}
        self._threads = ThreadPoolExecutor(_AT_ONCE, "localrun-ranks")
        self._in_order = threading.Lock()
        self._many_bytes, self._many_s = np.zeros(2, np.int64), np.zeros(2)  # sent, received; computing, waiting

    @property
    def own_part(self) -> float:
        """Of the bytes of the model's layers that are shared, what this rank has."""
        tensors, parts = GGUFTensors(self._file), self._division.parts(self._world.rank)
        sizes = {i: n_bytes(tensors.expert_matrices(i)) for i in self._numbers if i < self._config.num_hidden_layers}
        return sum(sizes[i] * parts[self._numbers[i]] for i in sizes) / sum(sizes.values())

    def get_ready(self) -> None:
        """Copy this rank's share, and wait until all others have theirs.

        Raises LocalrunError: there is no room for it, or a rank is gone.
        """
        self.share = Share(self._file, self._config, self._world, self.ranks.sharing, self._division)
        self._exchange = Exchange(
            self._world.links, len(self._others), self.share.type, self.share.hidden, self.share.top_k,
            differ=self._division.owners is not None,
        )  # fmt: skip
        for rank in self._others:
            if self._world.receive(rank) != READY:
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

    def owners(self, index: int) -> int:
        """Address of a layer's int64 (E,), bits of the ranks that have each expert; 0 where all experts are here."""
        if self.share.owners is None or not self.has(index):
            return 0
        return self.share.owners[self._numbers[index]].ctypes.data

    def others(self, index: int) -> OtherRanks | None:
        """The same of a layer for ExpertNodes; none, of a layer that is not shared."""
        if not self.has(index):
            return None
        return OtherRanks(self.told(index), self.owners(index), self._exchange.collect_phase)

    def collect_phase(self, out: int, into: Streams | None) -> Phase:
        """As Exchange.collect_phase."""
        return self._exchange.collect_phase(out, into)

    def check(self) -> None:
        """After a step, or before: raises RankError if a rank did not answer. Nothing can be computed from then on."""
        if self._exchange.failure:
            self._world.note(self._world.error(*self._exchange.failure))
        self._world.check()

    # ---- many tokens -------------------------------------------------------------------------------------------------

    def begin_many(
        self, index: int, x_TD: np.ndarray, ids_TK: np.ndarray, weights_TK: np.ndarray
    ) -> tuple[np.ndarray, Callable[[np.ndarray], None]]:
        """Have the others start on a layer's experts of float32 x_TD, int64 ids_TK and float32 weights_TK.

        PREFILL_CHUNK tokens to a message, which bounds their work memory and how long they are not heard of.

        Returns: what this rank is to compute, as ids_TK; what waits for the others' sums and adds them to float32
        (T, D). Raises RankError, as that does.
        """
        self.check()
        number = self._numbers[index]
        ids = self._ids_by_rank(number, ids_TK)
        jobs = []
        for piece in (slice(first, first + PREFILL_CHUNK) for first in range(0, len(x_TD), PREFILL_CHUNK)):
            others = [ids_of_rank[piece] for ids_of_rank in ids[1:]]
            job = self._threads.submit(self._exchange_many, number, x_TD[piece], others, weights_TK[piece])
            jobs.append((piece, job))
        return ids[0], partial(self._add_many, jobs, time.perf_counter())

    def _ids_by_rank(self, number: int, ids_TK: np.ndarray) -> list[np.ndarray]:
        """What each rank is to compute, as ids_TK; of slices all are to compute all."""
        if self.share.owners is None:
            return [ids_TK] * self._world.size
        ranks_TK = assign(ids_TK, self.share.owners[number])
        return [np.where(ranks_TK == rank, ids_TK, -1) for rank in range(self._world.size)]

    def _exchange_many(self, number: int, x_TD: np.ndarray, ids: list[np.ndarray], weights_TK: np.ndarray) -> _Sums:
        """The tokens that each of the others had anything to do for, and their sums, in the order of ranks."""
        parts = [self._part(number, x_TD, ids_TK, weights_TK) for ids_TK in ids]
        requests: list[tuple[int, Request]] = []
        with self._in_order:  # so that messages of two batches go in pairs
            for rank, part in zip(self._others, parts, strict=True):
                if part.tokens.size:
                    with self._world.reaching(rank):
                        requests += [(rank, request) for request in part.start(self._world.links, rank)]
        for rank, request in requests:
            with self._world.reaching(rank):
                self._world.links.finish(request)
        self._many_bytes += sum(part.sent_bytes for part in parts), sum(part.back.nbytes for part in parts)
        return [(part.tokens, many.unpack_sums(self.share.type, part.back, self.share.hidden)) for part in parts]

    def _part(self, number: int, x_TD: np.ndarray, ids_TK: np.ndarray, weights_TK: np.ndarray) -> many.Part:
        tokens = np.flatnonzero((ids_TK >= 0).any(1))
        if tokens.size < len(x_TD):
            x_TD, ids_TK, weights_TK = x_TD[tokens], ids_TK[tokens], weights_TK[tokens]
        return many.Part(self.share.type, number, tokens, x_TD, ids_TK, weights_TK)

    def _add_many(self, jobs: Sequence[tuple[slice, Future[_Sums]]], began: float, out_TD: np.ndarray) -> None:
        asked = time.perf_counter()
        try:
            for piece, job in jobs:
                for tokens, sums_TD in job.result():
                    out_TD[piece][tokens] += sums_TD
        except RankError as error:
            raise self._world.note(error) from None
        self._many_s += asked - began, time.perf_counter() - asked

    # ---- figures, and the end ----------------------------------------------------------------------------------------

    @property
    def times(self) -> np.ndarray:
        """Of the last exchanges of steps, as Exchange.times has them."""
        n, times = self._exchange.n_exchanges, self._exchange.times
        return times if n >= N_TIMES else times[1 : n + 1]  # they are counted from 1 on, and go round

    def figures(self) -> dict[str, float]:
        """What was sent and received so far, and what messages cost.

        Of the last N_TIMES exchanges of steps: message_us is what neither this rank's nor the busiest other's computing
        explains, wait_us how long this rank had nothing to do; overlap is the part of the others' time in which this
        one computed as well. many_overlap: the same of prompts.
        """
        n = self._exchange.n_exchanges
        sent, own, waited, busy = self.times.T
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
