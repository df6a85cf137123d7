"""The sums of squared inputs of all matrices of a transformers model, taken by hooks: the oracle for imatrix.

Where transformers joins what a file keeps apart, the inputs are worked out from the tensors around: those of down_exps
from the experts' weights, those of k_b and v_b from queries, attention weights and latents.
"""

from __future__ import annotations

from typing import Any

import hf_oracle
import numpy as np
import torch
from torch.nn.functional import linear, silu

_NAMES = {module: name for name, module in hf_oracle._LAYER.items()}


class Watched:
    """A model under watch.

    Attributes:
        squares: GGUF name -> float64 (slices, columns).
        counts: GGUF name -> float64 (slices,).
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.squares: dict[str, np.ndarray] = {}
        self.counts: dict[str, np.ndarray] = {}
        self._model = model
        self._attentions = {}
        for index, layer in enumerate(model.model.layers):
            for name, module in layer.named_modules():
                if isinstance(module, torch.nn.Linear) or name == "mlp.gate":
                    self._watch(module, f"blk.{index}.{_NAMES[f'{name}.weight']}")
                if name == "mlp.experts":
                    self._watch_experts(module, f"blk.{index}.ffn_")
            if hasattr(layer.self_attn, "kv_a_layernorm"):
                self._attentions[index] = _Latent(layer.self_attn)

    def run(self, ids: list[int]) -> None:
        """One chunk."""
        with torch.no_grad():
            weights = self._model(torch.tensor([ids]), output_attentions=True).attentions
        for index, attention in self._attentions.items():
            self._add(f"blk.{index}.attn_k_b.weight", attention.queries)
            mixed = torch.einsum("hts,sc->thc", weights[index][0], attention.latents)
            self._add(f"blk.{index}.attn_v_b.weight", mixed)

    def _add(self, name: str, x: torch.Tensor, first: int = 0, n_slices: int | None = None) -> None:
        """x (T, slices, columns): inputs of the slices from `first` on, of n_slices."""
        n_slices = n_slices or x.shape[1]
        squares = self.squares.setdefault(name, np.zeros((n_slices, x.shape[-1])))
        squares[first : first + x.shape[1]] += x.detach().double().square().sum(0).numpy()
        self.counts.setdefault(name, np.zeros(n_slices))[first : first + x.shape[1]] += len(x)

    def _watch(self, module: torch.nn.Module, name: str) -> None:
        def look(_: Any, args: tuple[torch.Tensor, ...]) -> None:
            self._add(name, args[0].reshape(-1, 1, args[0].shape[-1]))

        module.register_forward_pre_hook(look)

    def _watch_experts(self, module: torch.nn.Module, prefix: str) -> None:
        def look(module: Any, args: tuple[torch.Tensor, ...]) -> None:
            x, ids = args[:2]
            for expert, (gate_up, _) in enumerate(zip(module.gate_up_proj, module.down_proj, strict=True)):
                chosen = x[(ids == expert).any(-1)]
                gate, up = linear(chosen, gate_up).chunk(2, -1)
                for part in ("gate", "up", "gate_up"):
                    self._add(f"{prefix}{part}_exps.weight", chosen[:, None], expert, len(module.gate_up_proj))
                down = (silu(gate) * up)[:, None]
                self._add(f"{prefix}down_exps.weight", down, expert, len(module.gate_up_proj))

        module.register_forward_pre_hook(look)


class _Latent:
    """What a multi-head latent attention had last: queries (T, H, P) without rotary part, latents (T, C)."""

    def __init__(self, attention: Any) -> None:
        self.queries = self.latents = torch.empty(0)
        self._heads, self._nope = attention.num_heads, attention.qk_nope_head_dim
        query = attention.q_proj if attention.q_lora_rank is None else attention.q_b_proj
        query.register_forward_hook(self._keep_queries)
        attention.kv_a_layernorm.register_forward_hook(self._keep_latents)

    def _keep_queries(self, _: Any, __: Any, out: torch.Tensor) -> None:
        self.queries = out[0].unflatten(-1, (self._heads, -1))[..., : self._nope]

    def _keep_latents(self, _: Any, __: Any, out: torch.Tensor) -> None:
        self.latents = out.reshape(-1, out.shape[-1])
