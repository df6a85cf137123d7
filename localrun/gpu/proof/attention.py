"""Attention over a cache, against softmax in float64; an indexer's scores, its choice, and attention over that.

A part of kernels.py, whose bounds these are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from localrun.gpu.attention import indexer
from localrun.gpu.attention.flash_decoding import attend, heads_together, pieces_for
from localrun.gpu.attention.grouped import attend_grouped
from localrun.gpu.caches.cache import new_cache
from localrun.gpu.proof.bounds import HALF, SINGLE, compare, half_on, softmax
from localrun.gpu.proof.subject import Subject
from localrun.gpu.proof.task import Findings
from localrun.models.config import Config


def prove_attention(subject: Subject, findings: Findings) -> None:
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


def prove_indexer(subject: Subject, findings: Findings) -> None:
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
