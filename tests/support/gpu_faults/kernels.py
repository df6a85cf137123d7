"""Faults of kernels: products, tiles, the router, attention, experts in VRAM."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import gpu_proofs

from gpu_faults.fault import OFF, Fault

if TYPE_CHECKING:
    import pytest


def _modules(change: Callable[[Any, Any, Any, Any], Any], name: str = "Linear", method: str = "__call__"):
    """A fault of matrices: change(weight, x, y, apply) in place of their result y, where apply multiplies anew."""

    def install(patch: pytest.MonkeyPatch) -> None:
        from localrun.gpu import weights

        base = getattr(weights, name)

        class Faulty(base):
            def __init__(self, weight: Any, device: Any):
                super().__init__(weight, device)
                self._faulty_weight = weight

        def call(self: Any, x: Any, *more: Any) -> Any:
            apply = lambda x: getattr(base, method)(self, x, *more)  # noqa: E731
            return change(self._faulty_weight, x, apply(x), apply)

        setattr(Faulty, method, call)
        patch.setattr(weights, name, Faulty)

    return install


def _wrong_scale(weight: Any, x: Any, y: Any, apply: Any) -> Any:
    return y * 1.01 if weight.format.name == "Q8_0" else y


def _cut_rows(weight: Any, x: Any, y: Any, apply: Any) -> Any:
    x = x.clone()
    x[..., -16:] = 0
    return apply(x)


def _lost_row(weight: Any, x: Any, y: Any, apply: Any) -> Any:
    y = y.clone()
    y[..., -1] = 0
    return y


def _repeated_row(weight: Any, x: Any, y: Any, apply: Any) -> Any:
    y = y.clone()
    y[..., -1] = y[..., -2]
    return y


def _nan_of_many(weight: Any, x: Any, y: Any, apply: Any) -> Any:
    return y * float("nan") if x.shape[0] >= 16 else y


def _nan_between(weight: Any, x: Any, y: Any, apply: Any) -> Any:
    """Outside of the rows that are compared."""
    from localrun.gpu.proof.rows import sample

    y, rows = y.clone(), sample(y.shape[-1], gpu_proofs.SMALL.rows)
    left = [row for row in range(y.shape[-1]) if row not in rows]
    y[..., left[:1]] = float("nan")
    return y


def _mixed_tokens(weight: Any, x: Any, y: Any, apply: Any) -> Any:
    return apply(x[:1].expand_as(x))


def _half_products(weight: Any, x: Any, y: Any, apply: Any) -> Any:
    return y.half().float()


def _rolled_heads(weight: Any, x: Any, y: Any, apply: Any) -> Any:
    return y.roll(1, 1)


def _coarse(weight: Any, x: Any, y: Any, apply: Any) -> Any:
    import torch

    return y.to(torch.bfloat16).to(y.dtype)


def _next_row(weight: Any, x: Any, y: Any, apply: Any) -> Any:
    return apply((x + 1).clamp_max(weight.n_rows - 1))


def _illegal_access(weight: Any, x: Any, y: Any, apply: Any) -> Any:
    if x.shape[0] >= 16:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be reported")
    return y


def _too_much_shared_memory(weight: Any, x: Any, y: Any, apply: Any) -> Any:
    from triton.runtime.errors import OutOfResources

    raise OutOfResources(131_072, 101_376, "shared memory")


_LOW = {"few": "low", "many": "usual", "attention": "usual"}


def _wrong_tiles(patch: pytest.MonkeyPatch) -> None:
    """Those that were fastest are wrong."""
    from localrun.gpu import tiles
    from localrun.gpu.proof import tiles as part

    patch.setattr(part, "_fastest", lambda subject, findings, kind, prepare: _LOW[kind])
    low = tiles.CANDIDATES["few"]["low"]
    _modules(lambda weight, x, y, apply: y * 1.01 if tiles.of(x.device).few == low else y)(patch)


def _router(change: Callable[[Any], dict[str, Any]], without_bias: bool = False):
    """A fault of the router: a configuration that differs by change(config)."""

    def install(patch: pytest.MonkeyPatch) -> None:
        from localrun.gpu import weights
        from localrun.network.moe import choose_experts

        def choose(logits: Any, bias: Any, config: Any, ids: Any = None) -> Any:
            bias = None if without_bias else bias
            return choose_experts(logits, bias, replace(config, **change(config)), ids)

        patch.setattr(weights.DeviceWeights, "choose_experts", staticmethod(choose))

    return install


def _attention(change: Callable[..., dict[str, Any]]):
    """A fault of attention's kernel: other arguments."""

    def install(patch: pytest.MonkeyPatch) -> None:
        import gpu_torch

        from localrun.gpu.attention import flash_decoding

        names = ("queries", "places", "layer", "config", "scale", "n_pieces", "dtype")

        def attend(*arguments: Any, **more: Any) -> Any:
            given = dict(zip(names, arguments, strict=True)) | more
            return gpu_torch.attend_over(**given | change(**given))

        patch.setattr(flash_decoding, "attend_over", attend)

    return install


def _without_the_newest(places: Any, **_: Any) -> dict[str, Any]:
    """Of tokens that attend: the last one's row is hidden, the first ones' are."""
    return {"places": replace(places, positions=(places.positions - 1).clamp_min(0))}


def _without_the_end(places: Any, **_: Any) -> dict[str, Any]:
    """Of a long context the first 32 rows are seen."""
    return {"places": replace(places, positions=places.positions.clamp_max(31))}


def _experts(change: Callable[[Any, Any, Any], tuple[Any, Any]]):
    """A fault of experts in VRAM: other ids and weights."""

    def install(patch: pytest.MonkeyPatch) -> None:
        import gpu_torch

        from localrun.gpu.experts import in_vram

        class Faulty(gpu_torch.TorchExperts):
            def begin(self, x: Any, ids: Any, weights: Any) -> Any:
                return super().begin(x, *change(self, ids, weights))

        patch.setattr(in_vram, "Experts", Faulty)

    return install


def _swapped(experts: Any, ids: Any, weights: Any) -> tuple[Any, Any]:
    first, *_, last = experts.w
    swapped = ids.clone()
    swapped[ids == first], swapped[ids == last] = last, first
    return swapped, weights


_HEADS = "HeadLinear"
FAULTS = (
    Fault("a wrong scale in one format", "kernels", rf"Q8_0, .* tokens{OFF}", _modules(_wrong_scale), "Q8_0"),
    Fault("fast tiles that are wrong", "kernels", rf"F32, .* tokens{OFF}", _wrong_tiles, choices={"tiles": _LOW}),
    Fault("the end of each row left out", "kernels", rf"F32, .*{OFF}", _modules(_cut_rows)),
    Fault("a last row that is not written", "kernels", rf"F32, .*{OFF}", _modules(_lost_row)),
    Fault("a tile that repeats a row", "kernels", rf"F32, .*{OFF}", _modules(_repeated_row)),
    Fault("NaN at large shapes alone", "kernels", r"F32, .*, 16 tokens: \d+ of \d+ results are no numbers",
          _modules(_nan_of_many)),
    Fault("NaN in a row between", "kernels", r"F32, .*: \d+ of \d+ results are no numbers", _modules(_nan_between)),
    Fault("every token gets the first one's result", "kernels", rf"F32, .*, 5 tokens{OFF}", _modules(_mixed_tokens)),
    Fault("products of float16 for few tokens", "kernels", rf"F32, .*{OFF}", _modules(_half_products)),
    Fault("heads that are shifted by one", "kernels", rf"F32, blk.0.attn_k_b.*{OFF}", _modules(_rolled_heads, _HEADS)),
    Fault("a wrong transposed product", "kernels", rf"F32, .*transposed{OFF}",
          _modules(_half_products, _HEADS, "transposed")),
    Fault("rows expanded to eight bits", "kernels", rf"F32, .*expanded{OFF}", _modules(_coarse, _HEADS, "dense")),
    Fault("the next token's embedding", "kernels", rf"F32, token_embd.weight, embedding{OFF}",
          _modules(_next_row, "Embedding")),
    Fault("a router without its bias", "kernels", "router, .*: other experts than the CPU's",
          _router(lambda c: {}, without_bias=True)),
    Fault("a router without groups", "kernels", "router, .*: other experts than the CPU's",
          _router(lambda c: {"n_group": 1})),
    Fault("router weights that are not normalised", "kernels", rf"router, .*{OFF}",
          _router(lambda c: {"norm_topk_prob": False})),
    Fault("attention that sees no newest token", "kernels", rf"attention, .*{OFF}", _attention(_without_the_newest)),
    Fault("attention that drops a long context's end", "kernels", rf"attention, 40 tokens .*{OFF}",
          _attention(_without_the_end)),
    Fault("attention with another scale", "kernels", rf"attention, .*{OFF}",
          _attention(lambda scale, **_: {"scale": 1.1 * scale})),
    Fault("experts in each other's slots", "kernels", rf"experts of F32, .*{OFF}", _experts(_swapped)),
    Fault("experts without their weights", "kernels", rf"experts of F32, .*{OFF}",
          _experts(lambda experts, ids, weights: (ids, weights * 0 + 1))),
    Fault("experts that count what is not theirs", "kernels", rf"experts of F32, .*{OFF}",
          _experts(lambda experts, ids, weights: (ids.clamp_min(0), weights))),
    Fault("an illegal memory access", "kernels", "RuntimeError: CUDA error: an illegal memory access was encountered",
          _modules(_illegal_access)),
    Fault("a kernel that does not fit", "kernels", "OutOfResources: out of resource: shared memory.*",
          _modules(_too_much_shared_memory)),
)  # fmt: skip
