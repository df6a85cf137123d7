"""Faults of a layer: rotation and rows of the cache, experts' sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gpu_faults.fault import OFF, Fault

if TYPE_CHECKING:
    import pytest


def _rows_and_queries(change: Callable[..., Any]):
    """A fault of rotation and the cache's rows: change(original, *arguments)."""

    def install(patch: pytest.MonkeyPatch) -> None:
        import gpu_torch

        from localrun.gpu.attention import latent

        original = gpu_torch.turn_and_append
        patch.setattr(latent, "turn_and_append", lambda *arguments: change(original, *arguments))

    return install


def _unturned_queries(original: Any, q: Any, kv: Any, norm: Any, turns: Any, cache: Any, layer: int, c: Any) -> Any:
    nope, _ = original(q, kv, norm, turns, cache, layer, c)
    rope = q.view(q.shape[0], c.num_attention_heads, -1)[..., c.qk_nope_head_dim :]
    return nope, rope.flip(0) if q.shape[0] > 1 else -rope


def _unnormed(original: Any, q: Any, kv: Any, norm: Any, turns: Any, cache: Any, layer: int, c: Any) -> Any:
    return original(q, kv, norm * 1.5, turns, cache, layer, c)


def _first_layer(original: Any, q: Any, kv: Any, norm: Any, turns: Any, cache: Any, layer: int, c: Any) -> Any:
    if layer:
        import gpu_torch

        for rows in gpu_torch.rows_at(cache.places(q.shape[0]), layer, q.shape[0] - 1, c):
            rows.zero_()
    return original(q, kv, norm, turns, cache, 0, c)


def _no_shared_experts(patch: pytest.MonkeyPatch) -> None:
    from localrun.gpu import weights

    has = weights.DeviceWeights.has
    patch.setattr(weights.DeviceWeights, "has", lambda self, name: "shexp" not in name and has(self, name))


def _twice(patch: pytest.MonkeyPatch) -> None:
    from localrun.gpu.experts import on_host

    join = on_host.StepExperts._join
    patch.setattr(on_host.StepExperts, "_join", lambda self, *arguments: 2 * join(self, *arguments))


FAULTS = (
    Fault("queries that are not turned", "layers", rf"layer 0 .*{OFF}", _rows_and_queries(_unturned_queries)),
    Fault("latents with another norm", "layers", rf"layer 0 .*{OFF}", _rows_and_queries(_unnormed)),
    Fault("rows in another layer's cache", "layers", rf"layer 1 .*{OFF}", _rows_and_queries(_first_layer)),
    Fault("no shared experts", "layers", rf"layer 1 .*{OFF}", _no_shared_experts),
    Fault("the workers' sum added twice", "layers", rf"layer 1 .*{OFF}", _twice),
)  # fmt: skip
