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

from localrun.cpu.decode import Layers
from localrun.models import names
from localrun.models.config import Config
from localrun.models.tensors import GGUFTensors
from localrun.network.cache import Cache, row_widths
from quant.decode.linear import Input, rows_phase
from quant.decode.program import MOST_TOKENS
from quant.threads.pool import Pool

if TYPE_CHECKING:
    from localrun.network.model import MTPBlock

_STEP_TOKENS = 32  # as many go through the step, more through torch


class MTPStep(Layers):
    """The head's program, for a few tokens at once."""

    def __init__(self, config: Config, tensors: GGUFTensors, pool: Pool):
        """The tensors must stay mapped."""
        index = config.num_hidden_layers
        name = partial(names.layer, config.architecture, index)
        embed_tokens, lm_head = names.mtp_shared(tensors.has, config)
        super().__init__(config, tensors, pool, tensors.matrix(embed_tokens), [row_widths(config)])
        embedded, self.x = self.program.x, self.program.vector(config.hidden_size)
        self._hidden = np.zeros((MOST_TOKENS, config.hidden_size), np.float32)
        both = Input(
            embedded,
            self._array(name("enorm")),
            config.rms_norm_eps,
            beside=self.program.keep(self._hidden),
            beside_norm=self._array(name("hnorm")),
        )
        eh_proj = tensors.matrix(name("eh_proj"))
        self.program.add(rows_phase(both, [(eh_proj, self.x)], pool.n_workers), f"blk.{index}: eh_proj")
        self._layer(index, 0)
        self._head(name("shared_head.norm"), tensors.matrix(lm_head))

    def follow(self, next_ids: Sequence[int], hidden_TD: np.ndarray, cache: Cache, n_logits: int) -> np.ndarray:
        """Evaluate up to MOST_TOKENS positions: float32 (n_logits, vocab) of the last. Raises ContextFullError."""
        self._hidden[: len(next_ids)] = hidden_TD
        return self(next_ids, cache, n_logits)


class MTP:
    """The head for multi-token prediction of one model."""

    def __init__(self, config: Config, tensors: GGUFTensors, pool: Pool, network: "Callable[[], MTPBlock]"):
        """The tensors must stay mapped. network: gives the head for many tokens; called when they come."""
        self.config, self._pool = config, pool
        self._step = None if config.hc_mult else MTPStep(config, tensors, pool)
        self._get_network, self._network = network, None

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
        if self._step is None or len(next_ids) > _STEP_TOKENS:
            if self._network is None:
                self._network = self._get_network()
            with self._pool.passive_wait():  # torch's threads want the cores
                return self._network.forward(next_ids, hidden, cache)
        with cache.all_or_none():
            return self._by_steps(next_ids, hidden, cache)

    def _by_steps(self, next_ids: Sequence[int], hidden: np.ndarray, cache: Cache) -> tuple[np.ndarray, np.ndarray]:
        for first in range(0, len(next_ids), MOST_TOKENS):
            last = min(first + MOST_TOKENS, len(next_ids))
            logits = self._step.follow(next_ids[first:last], hidden[first:last], cache, int(last == len(next_ids)))
        return logits, self._step.hidden(last - first - 1, last - first)
