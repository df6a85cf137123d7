"""DeepSeek-V4's own kernels, one layer of each ratio: streams, rows, pooling, the indexer, attention.

What is right is computed in float64. How far a kernel may be off:

- streams: the matrix's rows and columns are normed some forty times, a rounding of float32 each, which later ones take
  back; exponentials besides: 2^-17 of what is added up;
- rows: a rounding to float16, and norms, turns and softmax in float32: 2^-10 of the value and 2^-16;
- scores and attention: as in kernels.py; two values that are turned against each other have the bounds of both.

Letters: T tokens, H heads, W head_dim, I the indexer's heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch.nn.functional import rms_norm

from localrun.gpu import streams
from localrun.gpu.attention import compressed_decoding, compressed_rows, indexer
from localrun.gpu.attention.compressed_rows import Opening
from localrun.gpu.attention.flash_decoding import pieces_for
from localrun.gpu.attention.turns import Turns
from localrun.gpu.caches.cache import new_cache
from localrun.gpu.caches.compressed import CompressedCache
from localrun.gpu.caches.places import Places
from localrun.gpu.proof.bounds import HALF, SINGLE, compare, half_on, softmax
from localrun.gpu.proof.subject import Subject, fill
from localrun.gpu.proof.task import Findings
from localrun.network import hyper
from localrun.network.rope import Rope, compressed_rope

_STREAMS, _ROWS = 2.0**-17, 2.0**-10
_LEAST = 2.0**-16


def prove(subject: Subject, findings: Findings) -> None:
    """All of it."""
    c = subject.config
    for n_tokens in (*subject.effort.few, *subject.effort.many):
        _streams(subject, findings, n_tokens)
    for ratio, layer in layers(subject).items():
        turns = _turns(subject, layer)
        _rows(subject, findings, layer, turns)
        for n_cached in sorted({min(n, subject.task.ctx) for n in subject.effort.contexts}):
            for n_tokens in (1, max(subject.effort.steps)):
                if n_tokens < n_cached:
                    what = f"attention, {n_cached} tokens in the cache, {n_tokens} new, ratio {ratio}"
                    findings.doing(what)
                    cache, places = _filled(subject, layer, n_cached, n_tokens)
                    chosen = None
                    if c.chooses_rows(layer) and c.index_topk < places.most // ratio:
                        chosen = _choice(subject, findings, layer, cache, places)
                    _attention(subject, findings, what, layer, turns, cache, places, chosen)


def layers(subject: Subject) -> dict[int, int]:
    """The first layer of each ratio."""
    c = subject.config
    return {c.compress_ratio(index): index for index in reversed(range(c.num_hidden_layers))}


def attention_work(subject: Subject) -> Callable[[], None]:
    """Attention of all the first layers to the last token of the whole context."""
    c, ctx, device = subject.config, subject.task.ctx, subject.device.torch
    cache = new_cache(c, ctx, device)
    fill(cache, ctx - 1)
    places, q_1HW = cache.places(1), subject.vectors(c.num_attention_heads, c.head_dim)[None].to(device)
    turns = {index: _turns(subject, index) for index in range(c.num_hidden_layers)}
    chosen = torch.arange(c.index_topk, dtype=torch.int32, device=device)[None]
    sinks = torch.zeros(c.num_attention_heads, device=device)

    def run() -> None:
        for index in turns:
            some = chosen if c.chooses_rows(index) and c.index_topk < places.most // c.compress_ratio(index) else None
            compressed_decoding.attend_at(_how(subject, index, turns[index], sinks), q_1HW, places, some)

    return run


def _turns(subject: Subject, layer: int) -> Turns:
    c = subject.config
    rope = compressed_rope(c) if c.compress_ratio(layer) else Rope(replace(c, rope_scaling=None))
    return Turns(rope, subject.device.torch)


def _streams(subject: Subject, findings: Findings, n_tokens: int) -> None:
    c, device = subject.config, subject.device.torch
    what = f"streams, {n_tokens} tokens"
    findings.doing(what)
    n, width = c.hc_mult, c.hidden_size
    computed, scale = subject.vectors(n_tokens, n * (n + 2), 1), subject.vectors(1, 3, 2)[0]
    base, y = subject.vectors(1, n * (n + 2), 3)[0], subject.vectors(n_tokens, width, 4)
    given = subject.vectors(n_tokens, n * width, 5).unflatten(1, (n, width))
    norm = 1 + subject.vectors(1, width, 6)[0] / 4
    on_device = (x.to(device) for x in (computed, scale, base, given, norm))
    found, expand = streams.mix_streams(*on_device, c)
    expanded = expand(y.to(device))
    inputs, norm = [x.double() for x in (computed, scale, base)], norm.double()
    right, right_expand = hyper.mix_streams(*inputs, given.double(), norm, c)
    size, size_expand = hyper.mix_streams(*inputs, given.double().abs(), norm, c)
    # Mixed magnitudes are up to 1.7 times as long as what is mixed, by which the norm shortens them.
    compare(findings, what, found, right, 2 * _STREAMS * size)
    compare(findings, f"{what}, behind", expanded, right_expand(y.double()), _STREAMS * size_expand(y.double().abs()))


def _rows(subject: Subject, findings: Findings, layer: int, turns: Turns) -> None:
    """A few tokens' rows, of which one completes a pooled one, to caches that hold random ones."""
    c, device, n_tokens = subject.config, subject.device.torch, 5
    ratio, eps = c.compress_ratio(layer), c.rms_norm_eps
    first = 2 * max(ratio, 4) - 3
    what = f"rows, ratio {ratio}"
    findings.doing(what)
    cache, places = _filled(subject, layer, first + n_tokens, n_tokens)
    blocks, positions = cache.blocks[layer], places.positions.cpu()
    kv, norm = subject.vectors(n_tokens, c.head_dim, 6), 1 + subject.vectors(1, c.head_dim, 7)[0] / 4
    openings, rings = [], []
    for at, width in ((1, c.head_dim), (3, c.index_head_dim)):
        if at < len(blocks):
            n_parts = blocks[at + 1].kind.width // (2 * width)
            values, gates = (subject.vectors(n_tokens, n_parts * width, 8 + i) for i in range(2))
            bias, of_rows = subject.vectors(ratio, n_parts * width, 10), 1 + subject.vectors(1, width, 11)[0] / 4
            ring = blocks[at + 1].rows.cpu().double()
            ring[positions % len(ring)] = torch.cat([values, gates + bias[positions % ratio]], 1).double()
            rings.append((blocks[at].rows, ring, n_parts, of_rows.double()))
            openings.append(Opening(*(x.to(device) for x in (values, gates, bias, of_rows))))
    compressed_rows.append(kv.to(device), norm.to(device), openings, turns, places, layer, c)
    right = _turned(rms_norm(kv.double(), (c.head_dim,), norm.double(), eps), turns, positions)
    found = blocks[0].rows[places.positions % len(blocks[0].rows)]
    compare(findings, what, found, right, _ROWS * right.abs() + _LEAST)
    for rows, ring, n_parts, of_rows in rings:
        for end in range(first + 1, first + n_tokens + 1):
            if end % ratio == 0:
                right = _pooled(ring, end, ratio, n_parts, of_rows, eps)
                right = _turned(right[None], turns, torch.tensor([end - ratio]))
                compare(findings, f"{what}, pooled", rows[end // ratio - 1][None], right, _ROWS * right.abs() + _LEAST)


def _pooled(ring: torch.Tensor, end: int, ratio: int, n_parts: int, norm: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Of the tokens before `end`, normed."""
    slots = torch.arange(n_parts * ratio)
    rows = ring[(slots + end - n_parts * ratio) % len(ring)].unflatten(1, (2, n_parts, -1))[slots, :, slots // ratio]
    return rms_norm((rows[:, 0] * rows[:, 1].softmax(0)).sum(0), norm.shape, norm, epsilon)


def _turned(x_TW: torch.Tensor, turns: Turns, positions_T: torch.Tensor, back: bool = False) -> torch.Tensor:
    """The last values turned, or turned back, in float64."""
    angles = positions_T[:, None].double() * torch.from_numpy(turns.rope.frequencies)
    rotation = torch.polar(torch.ones_like(angles), -angles if back else angles)
    return turns.rope.rotate_last(x_TW[:, None], rotation[:, None])[:, 0]


def _filled(subject: Subject, layer: int, n_cached: int, n_tokens: int) -> tuple[CompressedCache, Places]:
    """A cache of random rows, and the places of the last ones."""
    cache = new_cache(subject.config, n_cached, subject.device.torch, 16, layer + 1)
    for i, block in enumerate(cache.blocks[layer]):
        block.rows.copy_(subject.vectors(len(block.rows), block.kind.width, 20 + i))
    cache.advance(n_cached - n_tokens)
    return cache, cache.places(n_tokens)


def _choice(subject: Subject, findings: Findings, layer: int, cache: CompressedCache, places: Places) -> torch.Tensor:
    """Scores, and the rows that follow from them."""
    c, device, n_tokens = subject.config, subject.device.torch, len(places.positions)
    ratio, what = c.compress_ratio(layer), f"indexer, {places.most} tokens in the cache, {n_tokens} new"
    q = subject.vectors(n_tokens * c.index_n_heads, c.index_head_dim).view(n_tokens, c.index_n_heads, -1)
    factors = subject.vectors(n_tokens, c.index_n_heads, 1)
    scores = indexer.scores_of(q.to(device), factors.to(device), places, layer, half_on(subject), ratio)
    last = (places.positions + 1) // ratio - 1
    chosen = indexer.best_rows(scores, last, c.index_topk)
    if not torch.equal(chosen.cpu(), indexer.best_rows(scores.cpu(), last.cpu(), c.index_topk)):
        findings.fault(f"{what}: other rows than the CPU's")
    keys = cache.blocks[layer][3].rows.cpu().double()
    for t, n_seen in enumerate((last + 1).tolist()):
        right = factors[t].double() @ (q[t].double() @ keys[:n_seen].T).relu()
        size = factors[t].double().abs() @ (q[t].double().abs() @ keys[:n_seen].abs().T)
        bound = (2 * HALF + (c.index_head_dim + c.index_n_heads) * SINGLE) * size
        compare(findings, what, scores[t, :n_seen], right, bound)
    return chosen


def _how(subject: Subject, layer: int, turns: Turns, sinks_H: torch.Tensor) -> compressed_decoding.Attending:
    c, device = subject.config, subject.device.torch
    n_pieces = pieces_for(c, device)
    return compressed_decoding.Attending(c, layer, turns, sinks_H, c.head_dim**-0.5, n_pieces, half_on(subject))


def _attention(
    subject: Subject,
    findings: Findings,
    what: str,
    layer: int,
    turns: Turns,
    cache: CompressedCache,
    places: Places,
    chosen_TK: torch.Tensor | None,
) -> None:
    c, device, n_tokens = subject.config, subject.device.torch, len(places.positions)
    q = subject.vectors(n_tokens * c.num_attention_heads, c.head_dim).view(n_tokens, c.num_attention_heads, -1)
    sinks, ratio = subject.vectors(1, c.num_attention_heads)[0], c.compress_ratio(layer)
    how = _how(subject, layer, turns, sinks.to(device))
    out = compressed_decoding.attend_at(how, q.to(device), places, chosen_TK).cpu()
    blocks = [block.rows.cpu().double() for block in cache.blocks[layer]]
    for t, position in enumerate(places.positions.tolist()):
        seen = torch.arange(max(0, position + 1 - c.sliding_window), position + 1)
        keys = blocks[0][seen % len(blocks[0])]
        if n_pooled := (position + 1) // ratio if ratio else 0:
            pooled = blocks[1][:n_pooled] if chosen_TK is None else blocks[1][chosen_TK[t, :n_pooled].cpu().long()]
            keys = torch.cat([pooled, keys])
        rows = keys[:, None].expand(-1, c.num_attention_heads, -1)
        right, bound = softmax(q[t : t + 1], rows, rows, how.scale, 0, sinks)
        right = _turned(right[0], turns, torch.full((c.num_attention_heads,), position), back=True)
        rotated = bound[0, :, -c.qk_rope_head_dim :].unflatten(1, (-1, 2))
        rotated.copy_(rotated.sum(-1, keepdim=True).expand_as(rotated))
        compare(findings, what, out[t], right, bound[0] + _LEAST * SINGLE / HALF)
