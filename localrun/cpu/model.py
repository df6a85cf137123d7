"""The native backend's model: which of its two ways tokens take through the network, and the caches that both share.

A few tokens, or some more of a small model, go through the decode step; more go through the network in torch, which is
imported only then.
"""

import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from localrun import hardware
from localrun.cpu.compressed import decode_step
from localrun.cpu.torch_threads import TorchThreads, torch_at_work
from localrun.gguf.file import GGUFFile
from localrun.gguf.residency import Near, Resident, within
from localrun.limits import cut, prefill_chunk
from localrun.models import names
from localrun.models.config import Config
from localrun.models.dspark import read_dspark
from localrun.models.mtp_file import read_mtp_config
from localrun.models.summary import weight_bytes_per_token
from localrun.models.tensors import GGUFTensors
from localrun.network.cache import Cache, new_cache
from quant.decode.program import MOST_TOKENS
from quant.threads.pool import Pool

if TYPE_CHECKING:
    from localrun.cpu.dspark import Drafter
    from localrun.cpu.mtp import MTP
    from localrun.network.model import MTPBlock, Network
    from localrun.ranks.readers import Readers
    from localrun.ranks.remote import Remote
    from localrun.ranks.world import World

# Prompts this short go through the step: that takes some 0.2 s, importing torch 1 to 2.
_STEP_TOKENS = 96
_STEP_BYTES = 1 << 34  # of weights read for all of them, if each read its own
# So many do in any case: three steps of eight take less time than torch takes for 24 (16B shape, two cores: 0.98 and
# 1.04 s), and no number of tokens takes longer than in proportion to fewer, which those who choose chunks rely on.
_LEAST_STEPS = 3 * MOST_TOKENS


class NativeModel:
    """A model of a declared architecture over the tensors of a file.

    Attributes:
        vocab_size: logits a token.
        most_together: contexts that can share a step.
        least_chunk: with grouped-query attention, tokens that go through the network in torch, not through the step.
        keep_hidden: whether forward() is to leave `hidden` behind.
        hidden: float32 (T, hidden_size), what the head reads (after the final norm) of the last forward()'s tokens;
            with a drafter, what that reads.
        drafter: what drafts blocks of tokens, once take_dspark() has been called.
        remote: other ranks that have shares of the experts; None where all are here.
        readers: other processes that read prompts; None where this one does.
    """

    def __init__(
        self,
        config: Config,
        file: GGUFFile,
        n_threads: int,
        remote: "Remote | None" = None,
        warm_up: Callable[[], None] = lambda: None,
        readers: "World | None" = None,
        cache_bits: int = 16,
    ):
        """Lay out the decode step.

        Args:
            remote: others that have shares of the experts, and are ready.
            warm_up: gets the network's kernels, before it is laid out; without it each is compiled when it is used.
            readers: in which localrun.cpu.reader.serve_reading() runs.
            cache_bits: of a cached value, 16 or 8.
        """
        self.config, self.file, self.vocab_size = config, file, config.vocab_size
        nodes, self._cache_bits = hardware.usable_nodes(), cache_bits
        affordable = _STEP_BYTES // weight_bytes_per_token(file, config)
        is_latent = config.attention == "mla"
        least_steps = _LEAST_STEPS if is_latent else MOST_TOKENS
        self._most_steps = max(least_steps, min(_STEP_TOKENS, affordable))  # tokens that go through it
        # Latent attention rounds by the chunk's length anyway, so that there is no reason for long ones.
        self.least_chunk = MOST_TOKENS if is_latent else self._most_steps + 1
        self.most_together = MOST_TOKENS
        self.keep_hidden = False
        self.hidden = np.empty((0, config.hidden_size), np.float32)
        self.drafter: Drafter | None = None
        self._mtp: MTP | None = None
        self._mtp_file, self._n_mtp = file, config.num_nextn_predict_layers
        self._network: Network | None = None
        self._warm_up = warm_up
        self._release_torch: weakref.finalize | None = None
        self.remote = remote
        with ExitStack() as undo:
            self._pool = Pool(n_threads, tuple(nodes.values()))
            undo.callback(self._pool.close)
            self._tensors = GGUFTensors(file, self.remote.own if self.remote else None)
            self._step = decode_step(config, self._tensors, self._pool, self.remote, cache_bits=cache_bits)
            self._resident = self._keep_resident(nodes)
            undo.callback(self._resident.close)
            self.readers = self._take_readers(readers) if readers else None
            undo.pop_all()

    def _keep_resident(self, nodes: dict[int, tuple[int, ...]]) -> Resident:
        # What the step copied or was given by other ranks is not in the file's map, which is all that is brought near.
        near = [
            Near(node, cores, within(self._step.program.spans(i), self.file.spans))
            for i, (node, cores) in enumerate(nodes.items())
        ]
        return Resident(self.file, self.remote.share.all_spans if self.remote else None, near)

    def _take_readers(self, world: "World") -> "Readers":
        from localrun.ranks.readers import Readers

        return Readers(world, self._most_steps + 1, lambda: self.keep_hidden)

    @property
    def network(self) -> "Network":
        """The network for any number of tokens."""
        if self._network is None:
            self._warm_up()
            TorchThreads.hold(self._pool.n_workers)
            self._release_torch = weakref.finalize(self, TorchThreads.release)
            from localrun.cpu.weights import LayerWeights
            from localrun.network.model import Network

            self._network = Network(self.config, LayerWeights(self.file, self._pool, self.remote))
            self._network.watched = self.drafter.spark.target_layers if self.drafter else ()
        return self._network

    @property
    def mtp(self) -> "MTP | None":
        """The model's head for multi-token prediction, if a file has all of it."""
        config = replace(self.config, num_nextn_predict_layers=self._n_mtp)
        if self._mtp is None and names.has_mtp(self._mtp_file, config):
            from localrun.cpu.mtp import MTP

            remote = self._mtp_remote
            tensors = GGUFTensors(self._mtp_file, remote.own if remote else None)
            self._mtp = MTP(config, tensors, self._pool, self._mtp_block, remote, lambda: self._network is not None)
        return self._mtp

    def take_mtp(self, file: GGUFFile) -> None:
        """Have the head for multi-token prediction come from a file of its own.

        Raises LocalrunError if it is not this model's.
        """
        self._n_mtp = read_mtp_config(file, self.config).num_nextn_predict_layers
        self._mtp, self._mtp_file = None, file

    def take_dspark(self, file: GGUFFile) -> None:
        """Have blocks of a file draft from now on. Raises LocalrunError if they are not for this model."""
        from localrun.cpu.dspark import Drafter

        spark = read_dspark(file, self.config)
        self.drafter = Drafter(spark, file, self._pool, lambda: self.network.weights)
        self._step = decode_step(self.config, self._tensors, self._pool, self.remote, spark.target_layers)
        if self._network is not None:
            self._network.watched = spark.target_layers

    @property
    def _mtp_remote(self) -> "Remote | None":
        """The ranks that share the head's experts: none, where these are from another file."""
        return self.remote if self._mtp_file is self.file else None

    def _mtp_block(self) -> "MTPBlock":
        network = self.network  # before the import: it settles how torch's threads wait
        from localrun.cpu.weights import LayerWeights
        from localrun.network.model import MTPBlock

        weights = LayerWeights(self._mtp_file, self._pool, self._mtp_remote)
        return MTPBlock(self.config, weights, network.rope)

    def new_cache(self, capacity: int, exact: bool = False) -> Cache:
        """An empty cache for up to `capacity` tokens, of the model's bits or, if exact, of 32-bit values."""
        return new_cache(self.config, capacity, exact, self._cache_bits)

    def can_forget(self) -> bool:
        """Always."""
        return True

    def prepare(self) -> None:
        """Import torch, and lay out the network, unless others read prompts."""
        if not self.readers:
            self.network  # noqa: B018 (it is made when it is asked for)

    def chunks(self, n_tokens: int) -> list[int]:
        """How many of a prompt's n_tokens to evaluate at a time."""
        return cut(n_tokens, prefill_chunk(n_tokens, self.config.rebuilds_keys))

    def forward(self, ids: Sequence[int], cache: Cache, all_logits: bool = False) -> np.ndarray:
        """Evaluate ids after the cache's tokens; the cache then holds them too.

        Returns:
            float32 (T, vocab) logits with all_logits, else (1, vocab), those of the last token.

        Raises:
            ContextFullError: the cache has no room for them.
        """
        cache.check_room(len(ids))
        if self.readers and self.readers.takes(len(ids)) and not (cache.is_exact or all_logits):
            return self._by_readers(self.readers, ids, cache)
        if cache.is_exact or len(ids) > self._most_steps:
            return self._by_network(ids, cache, all_logits)
        with cache.all_or_none():
            return self._by_steps(ids, cache, all_logits)

    def forward_each(self, ids: Sequence[int], caches: Sequence[Cache]) -> np.ndarray:
        """As SharingModel.forward_each: each weight is read once for all tokens of a step."""
        with ExitStack() as stack:
            for cache in caches:
                stack.enter_context(cache.all_or_none())
            logits = self._step.together(ids, caches)
        if self.keep_hidden:
            self.hidden = self._step.hidden(0, len(ids))
        return logits

    def _by_network(self, ids: Sequence[int], cache: Cache, all_logits: bool) -> np.ndarray:
        network = self.network
        with torch_at_work(self._pool, self.config, len(ids)):
            hidden, logits = network.forward(ids, cache, all_logits, self.keep_hidden)
        if self.keep_hidden:
            self.hidden = hidden
        return logits

    def _by_readers(self, readers: "Readers", ids: Sequence[int], cache: Cache) -> np.ndarray:
        logits, hidden = readers.forward(ids, cache)
        if hidden is not None:
            self.hidden = hidden
        return logits

    def _by_steps(self, ids: Sequence[int], cache: Cache, all_logits: bool) -> np.ndarray:
        hidden, rows = [], []
        for first in range(0, len(ids), MOST_TOKENS):
            few = ids[first : first + MOST_TOKENS]
            is_last = first + len(few) == len(ids)
            rows.append(self._step(few, cache, len(few) if all_logits else int(is_last)))
            if self.keep_hidden:
                hidden.append(self._step.hidden(0, len(few)))
        if self.keep_hidden:
            self.hidden = np.concatenate(hidden)
        return np.concatenate(rows)

    def close(self) -> None:
        """End all threads, and what other ranks do."""
        for others in (self.remote, self.readers):
            if others:
                others.close()
        self._resident.close()
        self._pool.close()
        if self._release_torch is not None:
            self._release_torch()
