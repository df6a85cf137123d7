"""What the network asks of its weights: modules by GGUF name, wherever they run.

localrun.cpu.weights and localrun.gpu.weights provide them. Letters: T tokens, G groups (attention heads), E experts,
K experts per token, D hidden_size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from localrun.models import names
from localrun.models.config import Config
from quant.simd.gated import Activation

Module = Callable[[torch.Tensor], torch.Tensor]
Finish = Callable[[], torch.Tensor]


class HeadLinear(Protocol):
    """One matrix a head: W (G, out, in).

    Attributes:
        may_expand: whether dense() may be asked for: not where the matrices' inputs are to be observed.
    """

    may_expand: bool

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """float32 (T, G, in) -> (T, G, out): W[g] x[t, g]."""

    def transposed(self, x: torch.Tensor) -> torch.Tensor:
        """float32 (T, G, out) -> (T, G, in): W[g]^T x[t, g]."""

    def dense(self, first: int, count: int) -> torch.Tensor:
        """float32 (count, out, in): the matrices of heads first..first+count."""


class RoutedExperts(Protocol):
    """The routed experts of a layer, of one kind or another: here or elsewhere, at once or meanwhile."""

    def begin(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Finish:
        """Start on float32 (T, D) with int64 (T, K) and float32 (T, K); an id of -1 is an expert that is not here.

        Returns: what waits for the weighted sum, float32 (T, D), and gives it.
        """


class Attend(Protocol):
    """softmax(scale * q k^T) v of the last T of S tokens; each sees itself and those before.

    Keys and values of 32 bits are multiplied in float32; those of a cache of 16 may be so in 16-bit integers.

    window: it sees so many, itself included; 0 for all. sinks_H: a logit more of each head's softmax, without a value.
    """

    def __call__(
        self,
        parts: Sequence[tuple[torch.Tensor, torch.Tensor]],
        v_SGV: torch.Tensor,
        scale: float,
        out_THV: torch.Tensor,
        window: int = 0,
        sinks_H: torch.Tensor | None = None,
    ) -> None:
        """Write out_THV. parts: queries (T, H, d) and keys (S, G, d) or (S, 1, d), whose products are added."""


@dataclass(frozen=True)
class Seen:
    """Rows of the cache that T tokens attend to, float16 or float32; values are the first part of keys.

    Attributes:
        n_before: tokens in the cache before these.
        keys_SW: rows of the whole context; or none.
        ratio: tokens of one of them. A token sees those that end with itself or before.
        chosen_TK: int32, of these the ones that each token attends to: network.indexer.Choice's; or all that it sees.
        window_SW: rows of single tokens, the last T of which are of these; or none.
        window: so many of them a token sees, at most, its own included.
    """

    n_before: int
    keys_SW: torch.Tensor | None = None
    ratio: int = 1
    chosen_TK: torch.Tensor | None = None
    window_SW: torch.Tensor | None = None
    window: int = 0


@dataclass(frozen=True)
class Turned:
    """What attention does to queries as they are projected: network.compressed.

    Attributes:
        turns: of the tokens' positions, complex64 (T, 1, R / 2). The last R values of a query, whose root mean square
            is 1 by then, are turned; those of what is mixed are turned back.
        epsilon: of the queries' norm.
    """

    turns: torch.Tensor
    epsilon: float


class AttendRebuilt(Protocol):
    """Latent attention of the last T of S tokens: keys and values of each head are rebuilt from the 16-bit cache."""

    def __call__(
        self,
        parts: Sequence[torch.Tensor],
        rows_SW: torch.Tensor,
        k_b: HeadLinear,
        v_b: HeadLinear,
        k_b_transposed: bool,
        scale: float,
        out_THV: torch.Tensor,
    ) -> None:
        """Write out_THV.

        Args:
            parts: queries (T, H, P) and (T, H, R), of keys that are k_b latent and of those that all heads share.
            rows_SW: float16 latents, and behind them the shared keys.
            k_b, v_b: (H, P, C), or (H, C, P) if k_b_transposed; (H, V, C).
        """


class AttendChosen(Protocol):
    """softmax(scale * q k^T) v of T tokens, each over rows of its own."""

    def __call__(
        self,
        parts: Sequence[torch.Tensor],
        seen: Seen,
        scale: float,
        out_THV: torch.Tensor,
        sinks_H: torch.Tensor | None = None,
        turned: Turned | None = None,
    ) -> None:
        """Write out_THV: the V first values of rows, mixed. It may be the queries' memory.

        parts: queries (T, H, d), which lie behind each other in keys. sinks_H: as of Attend.
        """


class ChooseRows(Protocol):
    """Which rows each of the last T of S tokens attends to: network.indexer.choose_rows, in any order."""

    def __call__(
        self, q_TId: torch.Tensor, weights_TI: torch.Tensor, keys_Sd: torch.Tensor, top_k: int
    ) -> torch.Tensor:
        """int32 (T, K)."""


class WeightSource(Protocol):
    """A model's tensors as modules.

    Attributes:
        activation: of all feed-forward layers.
        attend, attend_rebuilt, attend_chosen, choose_rows: of attention in torch; a device's attention has its own, and
            never asks for them. attend_rebuilt is None where the CPU lacks its products.
    """

    activation: Activation
    attend: Attend
    attend_rebuilt: AttendRebuilt | None
    attend_chosen: AttendChosen
    choose_rows: ChooseRows

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name."""

    def array(self, name: str) -> np.ndarray:
        """A 1-D tensor on the host, float32."""

    def vector(self, name: str) -> torch.Tensor:
        """A tensor that is no matrix, float32."""

    def embedding(self, name: str) -> Module:
        """Rows by token id: int64 (T,) -> float32 (T, D)."""

    def linear(self, name: str) -> Module:
        """A matrix (out, in): float32 (T, in) -> (T, out)."""

    def heads(self, name: str, n_groups: int | None = None) -> HeadLinear:
        """One matrix a head, (H, out, in); of a plain matrix its rows in so many groups."""

    def split_heads(self, name: str, n_heads: int, rows: tuple[int, int]) -> tuple[HeadLinear, HeadLinear]:
        """A matrix of n_heads * sum(rows) rows as two: each head's first rows[0] rows, and its last rows[1]."""

    def expert_ids(self, index: int) -> np.ndarray:
        """int32 (vocab, K): the experts of each token in layer `index`, of which there is a table."""

    def joined_mlp(self, gate: str, up: str, down: str) -> Module | None:
        """down of the activation of gate and up, in one call, where there is one: (T, D) -> (T, D)."""

    def experts(self, index: int) -> RoutedExperts:
        """The routed experts of layer `index`."""

    def expert_table(self, index: int) -> torch.Tensor:
        """The same in torch."""

    def gated(self, activation: Activation, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Of float32 (T, I): localrun.network.moe.gated."""

    def mix_streams(
        self,
        computed_Tm: torch.Tensor,
        scale: torch.Tensor,
        base_m: torch.Tensor,
        streams_TnD: torch.Tensor,
        norm_D: torch.Tensor,
        config: Config,
    ) -> tuple[torch.Tensor, Module]:
        """What a sublayer reads of streams, normed, and where its output goes: localrun.network.hyper.mix_streams."""

    def choose_experts(
        self, logits_TE: torch.Tensor, bias_E: torch.Tensor | None, config: Config, ids_TK: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids (T, K) and weights (T, K) by the router's logits: localrun.network.moe.choose_experts."""


def biased_linear(weights: WeightSource, name: str) -> Module:
    """A matrix as WeightSource.linear; what it gives has the matrix's bias added, where the file has one."""
    linear = weights.linear(name)
    if not weights.has(names.bias(name)):
        return linear
    bias = weights.vector(names.bias(name))
    return lambda x: linear(x) + bias
