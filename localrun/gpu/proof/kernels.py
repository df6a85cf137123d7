"""Every kernel that the model needs, at its own shapes and formats, on blocks of its file, against the CPU.

The CPU's kernels expand rows to float32, and products are summed in float64: that is what is right. How far a kernel
may be from it follows from its arithmetic, entry by entry (Higham, Accuracy and Stability of Numerical Algorithms,
3.1).
With S the sum of |w| |x| over a row, in which each weight counts as the largest of its 32 (a block's scale and minimum
are rounded by themselves, however small what is left of them):

- few tokens, float32: each of 64 lanes adds up n / 64 products, then their sums: (n / 64 + 32) 2^-24 S;
- many tokens, float16 operands on tensor cores, which may cut sums off after eight products: (2^-10 + n / 8 2^-23) S,
  and 2^-25 of each activation for weights below float16's normal range;
- rows that are only expanded: 2^-21 of the largest of their 32; in float16 2^-11 besides.

Letters: T tokens, G groups, R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from localrun.gpu.attention import indexer
from localrun.gpu.attention.attention import attention_on
from localrun.gpu.attention.flash_decoding import attend, heads_together, pieces_for
from localrun.gpu.attention.grouped import attend_grouped
from localrun.gpu.caches.cache import new_cache
from localrun.gpu.experts import in_vram
from localrun.gpu.proof import compressed
from localrun.gpu.proof.bounds import HALF, SINGLE, compare, few_bound, finite, half_on, many_bound, softmax
from localrun.gpu.proof.subject import Subject
from localrun.gpu.proof.task import Findings
from localrun.gpu.weights import DeviceWeights
from localrun.models.config import Config
from localrun.models.tensors import GGUFTensors
from localrun.network import moe
from localrun.network.model import Network
from quant.matrix import ExpertMatrices, QuantMatrix
from quant.ops import linear
from quant.simd.gated import Activation
from quant.threads.pool import Pool


@dataclass(frozen=True)
class Use:
    """A module of the network, and the matrix in the file that it is of."""

    kind: str
    name: str
    weight: QuantMatrix
    module: Any

    @property
    def shape(self) -> str:
        groups = f"{self.weight.n_groups} of " if self.weight.n_groups > 1 else ""
        return f"{self.weight.format.name}, {groups}{self.weight.n_rows} by {self.weight.n_cols}"


class NotedWeights(DeviceWeights):
    """Notes what the network asks for."""

    def __init__(self, *arguments: Any):
        self.uses: list[Use] = []
        super().__init__(*arguments)

    def linear(self, name: str) -> Any:
        return self._note("matrix", name, self.matrix(name), super().linear(name))

    def heads(self, name: str, n_groups: int | None = None) -> Any:
        matrix = self.matrix(name) if n_groups is None else self.grouped(name, n_groups)
        return self._note("heads", name, matrix, super().heads(name, n_groups))

    def embedding(self, name: str) -> Any:
        return self._note("embedding", name, self.matrix(name), super().embedding(name))

    def split_heads(self, name: str, n_heads: int, rows: tuple[int, int]) -> Any:
        both = zip(self.split_matrix(name, n_heads, rows), super().split_heads(name, n_heads, rows), strict=True)
        return tuple(self._note("heads", name, weight, module) for weight, module in both)

    def _note(self, kind: str, name: str, weight: QuantMatrix, module: Any) -> Any:
        self.uses.append(Use(kind, name, weight, module))
        return module


def prove(subject: Subject, findings: Findings) -> None:
    """All of them, each shape once."""
    findings.doing("loading")
    with closing(Pool(subject.task.threads)) as pool, torch.inference_mode(), subject.device.errors():
        weights = NotedWeights(
            subject.file, subject.config, subject.placement(), [subject.device], pool, lambda line: None
        )
        try:
            network = Network(subject.config, weights, attention_on(subject.device.torch))
            seen: set[tuple[str, str]] = set()
            for use in weights.uses:
                if (use.kind, use.shape) not in seen:
                    seen.add((use.kind, use.shape))
                    _TRIALS[use.kind](subject, findings, pool, use)
            findings.figures["shapes"] = len(seen)
            _router(subject, findings, network)
            if subject.config.attention == "compressed":
                compressed.prove(subject, findings)
            else:
                _attention(subject, findings)
                _indexer(subject, findings)
            _experts(subject, findings, pool)
        finally:
            weights.routed[0].close()


# ---- matrices --------------------------------------------------------------------------------------------------------


def sample(n: int, most: int) -> np.ndarray:
    """Up to `most` of n: the first third, the last third, and some between."""
    if n <= most:
        return np.arange(n)
    third = most // 3
    between = np.random.default_rng(n).choice(np.arange(third, n - third), most - 2 * third, replace=False)
    return np.concatenate([np.arange(third), np.sort(between), np.arange(n - third, n)])


def expanded(pool: Pool, weight: QuantMatrix, group: int, rows: np.ndarray) -> torch.Tensor:
    """Float64 (rows, n_cols) of a group, by the CPU."""
    out = torch.empty(len(rows), weight.n_cols)
    linear.expand_rows(pool, weight, np.ascontiguousarray(group * weight.n_rows + rows, np.int64), out.data_ptr())
    return out.double()


def largest_of_32(w: torch.Tensor) -> torch.Tensor:
    """|w| (R, n_cols), each the largest of its 32 columns."""
    n_cols = w.shape[-1]
    padded = torch.nn.functional.pad(w.abs(), (0, -n_cols % 32))
    return padded.unflatten(-1, (-1, 32)).amax(-1, keepdim=True).expand(-1, -1, 32).flatten(-2)[..., :n_cols]


def _groups(weight: QuantMatrix) -> list[int]:
    return sorted({0, weight.n_groups // 2, weight.n_groups - 1})


def _tokens(subject: Subject) -> Iterator[tuple[int, bool]]:
    """Numbers of tokens, and whether they are few."""
    yield from ((n, True) for n in subject.effort.few)
    yield from ((n, False) for n in subject.effort.many)


def _products(subject: Subject, findings: Findings, pool: Pool, use: Use) -> None:
    """y = W x."""
    weight, device = use.weight, subject.device.torch
    groups, rows = _groups(weight), sample(weight.n_rows, subject.effort.rows)
    w = {group: expanded(pool, weight, group, rows) for group in groups}
    for n_tokens, is_few in _tokens(subject):
        what = f"{weight.format.name}, {use.name} {weight.n_rows} by {weight.n_cols}, {n_tokens} tokens"
        findings.doing(what)
        x = subject.vectors(n_tokens * weight.n_groups, weight.n_cols, n_tokens).view(n_tokens, weight.n_groups, -1)
        y = use.module(x.to(device) if use.kind == "heads" else x[:, 0].to(device)).view(n_tokens, weight.n_groups, -1)
        finite(findings, what, y)
        y, x = y.cpu(), x.double()
        for group in groups:
            size = x[:, group].abs() @ largest_of_32(w[group]).T
            bound = (few_bound if is_few else many_bound)(weight.n_cols) * size
            if not is_few:
                bound = bound + x[:, group].abs().sum(-1, keepdim=True) * 2.0**-25
            compare(findings, what, y[:, group, rows], x[:, group] @ w[group].T, bound)


def _heads(subject: Subject, findings: Findings, pool: Pool, use: Use) -> None:
    """As matrices, transposed, and expanded."""
    _products(subject, findings, pool, use)
    weight, device = use.weight, subject.device.torch
    all_rows = np.arange(weight.n_rows)
    what = f"{weight.format.name}, {use.name} transposed"
    findings.doing(what)
    x = subject.vectors(2 * weight.n_groups, weight.n_rows).view(2, weight.n_groups, -1)
    y = use.module.transposed(x.to(device)).cpu()
    finite(findings, what, y)
    for group in _groups(weight):
        w = expanded(pool, weight, group, all_rows)
        size = x[:, group].double().abs() @ largest_of_32(w)
        right = x[:, group].double() @ w
        compare(findings, what, y[:, group], right, (weight.n_rows + 32) * SINGLE * size)  # a row after another
        for dtype in (torch.float32, torch.float16):
            found = use.module.dense(group, 1, dtype)[0]
            compare(findings, f"{weight.format.name}, {use.name} expanded", found, w, _expanded_bound(w, dtype))


def _expanded_bound(w: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (2.0**-21 + (HALF if dtype == torch.float16 else 0.0)) * largest_of_32(w) + 2.0**-25


def _embedding(subject: Subject, findings: Findings, pool: Pool, use: Use) -> None:
    what = f"{use.weight.format.name}, {use.name}, embedding"
    findings.doing(what)
    rows = sample(use.weight.n_rows, subject.effort.rows)
    found, w = use.module(torch.from_numpy(rows).to(subject.device.torch)), expanded(pool, use.weight, 0, rows)
    compare(findings, what, found, w, _expanded_bound(w, torch.float32))


_TRIALS = {"matrix": _products, "heads": _heads, "embedding": _embedding}


# ---- the router ------------------------------------------------------------------------------------------------------


def _router(subject: Subject, findings: Findings, network: Network) -> None:
    """The same experts for the same scores, and weights that differ by a few roundings of float32."""
    c, index = subject.config, subject.moe_layers[-1]  # of those that are there, the one without a table of tokens
    bias = network.layers[index].mlp.e_score_correction_bias
    for n_tokens in (*subject.effort.few, *subject.effort.many):
        what = f"router, {n_tokens} tokens"
        findings.doing(what)
        logits = subject.vectors(n_tokens, c.n_routed_experts, n_tokens)
        ids, weights = network.layers[index].mlp.choose_experts(logits.to(subject.device.torch), bias, c)
        right_ids, right = moe.choose_experts(logits, None if bias is None else bias.cpu(), c)
        ids, right_ids = ids.cpu(), right_ids
        order, right_order = ids.argsort(-1), right_ids.argsort(-1)
        if not torch.equal(ids.gather(-1, order), right_ids.gather(-1, right_order)):
            findings.fault(f"{what}: other experts than the CPU's")
        else:
            found, right = weights.cpu().gather(-1, order), right.gather(-1, right_order).double()
            compare(findings, what, found, right, 2.0**-18 * right.abs() + 1e-30)


# ---- attention -------------------------------------------------------------------------------------------------------


def _attention(subject: Subject, findings: Findings) -> None:
    """The kernel over the cache, in 16 bits and as asked for, against softmax in float64.

    Scores are off by d = 2^-11 (float16 queries; float32 sums besides) of scale * sum |q| |k|, so weights by a factor
    of e^(2 d) at most; weights and sums are rounded to float16, once more 2^-11 of each term.
    """
    c, effort = subject.config, subject.effort
    contexts = sorted({min(n, subject.task.ctx) for n in effort.contexts})
    for bits in sorted({16, subject.task.cache_bits}):
        for n_cached in contexts:
            for n_tokens in (1, max(effort.steps)):
                if n_tokens < n_cached:
                    what = f"attention, {n_cached} tokens in a cache of {bits} bits, {n_tokens} new"
                    findings.doing(what)
                    trials = {"": _latent} if c.attention == "mla" else _grouped_trials(c)
                    for where, trial in trials.items():
                        compare(findings, what + where, *trial(subject, bits, n_cached, n_tokens))


def _latent(
    subject: Subject, bits: int, n_cached: int, n_tokens: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    c, device = replace(subject.config, index_topk=0), subject.device.torch
    cache = new_cache(c, n_cached, device, bits, n_layers=1)
    rows = subject.vectors(n_cached, c.kv_lora_rank + c.qk_rope_head_dim, n_cached)
    kept = {"0.0": rows.half().numpy()}
    cache.load(kept, n_cached)
    cache.truncate(n_cached - n_tokens)
    width = c.kv_lora_rank + c.qk_rope_head_dim
    q = subject.vectors(n_tokens * c.num_attention_heads, width).view(n_tokens, -1, width)
    parts = q.to(device).split((c.kv_lora_rank, c.qk_rope_head_dim), -1)
    scale = width**-0.5
    found = attend(*parts, cache, 0, c, scale, pieces_for(c, device), half_on(subject))
    latents, rope_keys = (part.cpu().double() for part in cache.rows(0, 0, n_cached, torch.float32))
    keys = torch.cat([latents, rope_keys], -1)[:, None].expand(-1, c.num_attention_heads, -1)
    return found, *softmax(q, keys, latents[:, None].expand(-1, c.num_attention_heads, -1), scale)


def _grouped_trials(c: Config) -> dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
    """One for each kind of layer that there is: without a window, and with it."""
    layers = {c.window(index): index for index in reversed(range(c.num_hidden_layers))}
    return {f", {window} seen" if window else "": partial(_grouped, layer) for window, layer in layers.items()}


def _grouped(
    layer: int, subject: Subject, bits: int, n_cached: int, n_tokens: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of a window the rows that no token sees are NaN; sinks, if the model has them, are random."""
    c, device, window = subject.config, subject.device.torch, subject.config.window(layer)
    c = replace(c, num_hidden_layers=1, layer_types=c.layer_types[layer : layer + 1])
    cache = new_cache(c, n_cached, device, bits, n_layers=1)
    first = max(0, n_cached - n_tokens + 1 - window) if window else 0
    rows = [subject.vectors(n_cached, kind.width, i).half() for i, kind in enumerate(c.rows(0))]
    saved = [torch.cat([torch.full_like(part[:first], torch.nan), part[first:]]).numpy() for part in rows]
    n_held = len(cache.keys[0])
    cache.load({f"0.{i}": part[-n_held:] for i, part in enumerate(saved)}, n_cached)
    cache.truncate(n_cached - n_tokens)
    q = subject.vectors(n_tokens * c.num_attention_heads, c.head_dim).view(n_tokens, -1, c.head_dim)
    scale = c.head_dim**-0.5
    sinks = subject.vectors(1, c.num_attention_heads)[0] if subject.has_sinks(layer) else None
    on_device = None if sinks is None else sinks.to(device)
    found = attend_grouped(q.to(device), cache, 0, c, scale, pieces_for(c, device), half_on(subject), window, on_device)
    keys, values = (
        part.double().unflatten(-1, (c.num_key_value_heads, -1)).repeat_interleave(heads_together(c), 1)
        for part in rows
    )
    return found, *softmax(q, keys, values, scale, window, sinks)


def _indexer(subject: Subject, findings: Findings) -> None:
    """Scores, the choice that follows from them, and attention over what was chosen, in 16 bits.

    Scores are off by 2^-11 (float16 queries; float32 sums besides) of sum |weight| sum |q| |k|.
    """
    c, device, dtype = subject.config, subject.device.torch, half_on(subject)
    layer = next((index for index in range(c.num_hidden_layers) if c.chooses_rows(index)), None)
    if layer is None:
        return
    for n_cached in sorted({min(n, subject.task.ctx) for n in subject.effort.contexts}):
        n_tokens = min(2, n_cached)
        what = f"indexer, {n_cached} tokens in the cache, {n_tokens} new"
        findings.doing(what)
        cache = new_cache(c, n_cached, device, n_layers=layer + 1)
        keys = subject.vectors(n_cached, c.index_head_dim, n_cached).half()
        cache.indexer_keys[layer][:] = keys.to(device)
        rows = subject.vectors(n_cached, c.kv_lora_rank + c.qk_rope_head_dim, n_cached).half().to(device)
        cache.latents[layer], cache.rope_keys[layer] = rows.split((c.kv_lora_rank, c.qk_rope_head_dim), -1)
        cache.advance(n_cached - n_tokens)
        places = replace(cache.places(n_tokens), most=max(n_cached, c.index_topk))
        q = subject.vectors(n_tokens * c.index_n_heads, c.index_head_dim).view(n_tokens, c.index_n_heads, -1)
        factors = subject.vectors(n_tokens, c.index_n_heads, 1)
        scores = indexer.scores_of(q.to(device), factors.to(device), places, layer, dtype)
        found, positions = scores.cpu(), places.positions.cpu()
        chosen = indexer.best_rows(scores, places.positions, c.index_topk)
        if not torch.equal(chosen.cpu(), indexer.best_rows(found, positions, c.index_topk)):
            findings.fault(f"{what}: other rows than the CPU's")
        width = rows.shape[1]
        queries = subject.vectors(n_tokens * c.num_attention_heads, width).view(n_tokens, -1, width)
        parts = queries.to(device).split((c.kv_lora_rank, c.qk_rope_head_dim), -1)
        scale, pieces = width**-0.5, pieces_for(c, device)
        out = attend(*parts, places, layer, c, scale, pieces, dtype, chosen).cpu()
        for t, position in enumerate(positions.tolist()):
            seen = keys[: position + 1].double()
            right = factors[t].double() @ (q[t].double() @ seen.T).relu()
            size = factors[t].double().abs() @ (q[t].double().abs() @ seen.abs().T)
            bound = (2 * HALF + (c.index_head_dim + c.index_n_heads) * SINGLE) * size
            compare(findings, what, found[t, : position + 1], right, bound)
            mine = rows.cpu().double()[chosen[t, : position + 1].cpu().long()][:, None]
            mine = mine.expand(-1, c.num_attention_heads, -1)
            right, bound = softmax(queries[t : t + 1], mine, mine[..., : c.kv_lora_rank], scale)
            compare(findings, f"{what}, attention", out[t : t + 1], right, bound)


# ---- experts in VRAM -------------------------------------------------------------------------------------------------


def _experts(subject: Subject, findings: Findings, pool: Pool) -> None:
    """Down of gate x and up x, with the bounds of the three products carried through: silu's slope is below 1.1."""
    c, device = subject.config, subject.device.torch
    matrices = GGUFTensors(subject.file).expert_matrices(subject.moe_layers[0])
    here = sorted({int(i) for i in np.linspace(0, c.n_routed_experts - 1, subject.effort.experts)})
    layer = in_vram.Experts(matrices, device, here)
    weights = {
        expert: [expanded(pool, w, expert, np.arange(w.n_rows)) for w in (matrices.gate, matrices.up, matrices.down)]
        for expert in here
    }
    formats = " and ".join(dict.fromkeys(w.format.name for w in (matrices.gate, matrices.up, matrices.down)))
    for n_tokens, is_few in _tokens(subject):
        what = f"experts of {formats}, {n_tokens} tokens"
        findings.doing(what)
        x = subject.vectors(n_tokens, c.hidden_size, n_tokens)
        random = np.random.default_rng(n_tokens)
        ids = torch.from_numpy(random.choice([*here, -1], (n_tokens, c.num_experts_per_tok)))
        factors = torch.from_numpy(random.random((n_tokens, c.num_experts_per_tok), np.float32))
        found = layer.begin(x.to(device), ids.to(device), factors.to(device))()
        finite(findings, what, found)
        right, bound = torch.zeros_like(x, dtype=torch.float64), torch.zeros_like(x, dtype=torch.float64)
        for expert in here:
            share = (factors.double() * (ids == expert)).sum(-1, keepdim=True)
            used = share[:, 0] > 0
            y, off = _expert(x[used].double(), *weights[expert], _biases(matrices, expert), matrices.activation, is_few)
            right[used] += share[used] * y
            bound[used] += share[used] * off
        compare(findings, what, found, right, bound + 1e-20)


def _biases(matrices: ExpertMatrices, expert: int) -> list[torch.Tensor]:
    """Of an expert's gate, up and down, float64; zeros where there are none."""
    if matrices.biases is None:
        return [torch.zeros(1, dtype=torch.float64)] * 3
    return [torch.from_numpy(bias[expert]).double() for bias in matrices.biases]


def _expert(
    x: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    biases: list[torch.Tensor],
    activation: Activation,
    is_few: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Float64 (T, D), and how far a kernel may be off."""
    unit = few_bound if is_few else many_bound
    g, u = x @ gate.T + biases[0], x @ up.T + biases[1]
    g_off, u_off = (unit(x.shape[1]) * (x.abs() @ largest_of_32(w).T) for w in (gate, up))
    h = moe.gated(activation, g, u)
    # Bounds make nothing larger; of gated with another `up` the difference is what `up` is multiplied by.
    by_up = (moe.gated(activation, g, torch.ones_like(u)) - moe.gated(activation, g, torch.zeros_like(u))).abs()
    u_size = u.abs() + (activation.offset if activation.limit else 0.0)
    h_off = 1.1 * g_off * (u_size + u_off) + by_up * u_off + 2.0**-20 * h.abs()
    size = h.abs() @ largest_of_32(down).T
    extra = 0.0 if is_few else 2.0**-25 * (h.abs().sum(-1, keepdim=True) + x.abs().sum(-1, keepdim=True))
    y = h @ down.T + biases[2]
    return y, h_off @ down.abs().T + unit(h.shape[1]) * size + 2.0**-20 * (size + biases[2].abs()) + extra
