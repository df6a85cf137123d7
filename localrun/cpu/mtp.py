"""Multi-token prediction: a model's own head for the token after the next, one layer behind its last.

At position i the embedding of token i + 1 and what the model's head reads at i (after the final norm) lie side by side,
both normed; a layer of the model's kind follows, over a cache of its own, and a norm and a head: the logits of token
i + 2. For one draft more its own normed output takes the place of the model's.
Source: DeepSeek-V3 (arXiv 2412.19437, section 2.2); which vectors meet and in which order: vLLM @03356f8,
model_executor/models/deepseek_mtp.py, and SGLang @0114f9c, srt/models/deepseek_nextn.py. The two differ in what is
chained, before (vLLM) or after the norm (SGLang); the model's own vectors come after one, so these do.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from localrun.cpu.compressed import StreamLayers
from localrun.cpu.decode import Layers
from localrun.cpu.torch_threads import torch_at_work
from localrun.models import names
from localrun.models.config import Config
from localrun.models.tensors import GGUFTensors
from localrun.network.cache import Cache, row_widths
from localrun.ranks.remote import Remote
from quant.decode.linear import Input, rows_phase
from quant.decode.program import MOST_TOKENS
from quant.threads.pool import Pool

if TYPE_CHECKING:
    from localrun.network.model import MTPBlock

_WITHOUT_TORCH = 512  # positions that go through steps where nothing has needed torch so far


class MTPStep(Layers):
    """The head's program, for a few tokens at once.

    Attributes:
        most_tokens: at once.
        most_positions: as many go through steps, more through torch.
    """

    most_tokens, most_positions = MOST_TOKENS, 32

    def __init__(self, config: Config, tensors: GGUFTensors, pool: Pool, remote: Remote | None = None):
        """The tensors must stay mapped. remote: as Layers has it."""
        index = config.num_hidden_layers
        name = partial(names.layer, config.architecture, index)
        embed_tokens, lm_head = names.mtp_shared(tensors.has, config)
        super().__init__(config, tensors, pool, tensors.matrix(embed_tokens), [row_widths(config)], remote)
        embedded, self.x = self.program.x, self.program.vector(self._x_width)
        self._hidden = np.zeros((self.most_tokens, self._x_width), np.float32)
        hidden, eh_proj = self.program.keep(self._hidden), tensors.matrix(name("eh_proj"))
        norms = self._array(name("enorm")), self._array(name("hnorm"))
        for stream in range(0, self._x_width, config.hidden_size):
            both = Input(embedded, norms[0], config.rms_norm_eps, beside=hidden + 4 * stream, beside_norm=norms[1])
            phase = rows_phase(both, [(eh_proj, self.x + 4 * stream)], pool.n_workers)
            self.program.add(phase, f"blk.{index}: eh_proj {stream // config.hidden_size}")
        self._layer(index, 0)
        self._head(name("shared_head.norm"), tensors.matrix(lm_head))

    def follow(self, next_ids: Sequence[int], hidden_TD: np.ndarray, cache: Cache, n_logits: int) -> np.ndarray:
        """Evaluate up to most_tokens positions: float32 (n_logits, vocab) of the last. Raises ContextFullError."""
        self._hidden[: len(next_ids)] = hidden_TD
        return self(next_ids, cache, n_logits)


class StreamMTPStep(StreamLayers, MTPStep):
    """The same of a model with streams, of which each meets the embedding: of one token, whose streams lie together."""

    most_tokens, most_positions = 1, MOST_TOKENS


class MTP:
    """The head for multi-token prediction of one model."""

    def __init__(
        self,
        config: Config,
        tensors: GGUFTensors,
        pool: Pool,
        network: "Callable[[], MTPBlock]",
        remote: Remote | None = None,
        is_ready: Callable[[], bool] = lambda: True,
    ):
        """The tensors must stay mapped.

        Args:
            network: gives the head for many tokens; called when they come.
            remote: as Layers has it.
            is_ready: whether torch is there for it; importing it takes longer than many steps.
        """
        self.config, self._pool = config, pool
        self._step = (StreamMTPStep if config.hc_mult else MTPStep)(config, tensors, pool, remote)
        self._get_network, self._network, self._is_ready = network, None, is_ready

    def new_cache(self, capacity: int) -> Cache:
        """An empty cache for up to `capacity` positions, of 16-bit values."""
        return Cache([self.config.rows(self.config.num_hidden_layers)], capacity, np.float16)

    def forward(self, next_ids: Sequence[int], hidden: np.ndarray, cache: Cache) -> tuple[np.ndarray, np.ndarray]:
        """Evaluate the positions after the cache's; the cache then holds them too.

        Args:
            next_ids: T tokens, each behind its position.
            hidden: float32 (T, hidden_size), what the model's head reads at these positions, or what forward() gave;
                of streams all of them, (T, hc_mult * hidden_size).

        Returns:
            Of the last position: float32 (1, vocab) logits, and what to go on from with a drafted token, as `hidden`.

        Raises:
            ContextFullError: the cache has no room for them.
        """
        cache.check_room(len(next_ids))
        most = self._step.most_positions if self._is_ready() else _WITHOUT_TORCH
        if cache.is_exact or len(next_ids) > most:
            if self._network is None:
                self._network = self._get_network()
            with torch_at_work(self._pool, self.config, len(next_ids)):
                return self._network.forward(next_ids, hidden, cache)
        with cache.all_or_none():
            return self._by_steps(next_ids, hidden, cache)

    def _by_steps(self, next_ids: Sequence[int], hidden: np.ndarray, cache: Cache) -> tuple[np.ndarray, np.ndarray]:
        for first in range(0, len(next_ids), self._step.most_tokens):
            last = min(first + self._step.most_tokens, len(next_ids))
            logits = self._step.follow(next_ids[first:last], hidden[first:last], cache, int(last == len(next_ids)))
        return logits, self._step.hidden(last - first - 1, last - first)
