"""The same as gpu_torch of DeepSeek-V4's kernels: hyper-connections, rows, pooling, attention.

Letters: T tokens, H heads, W head_dim.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import rms_norm

from localrun.gpu import weights
from localrun.gpu.attention import compressed_decoding, compressed_rows
from localrun.gpu.caches.compressed import INDEX_OPEN, INDEX_POOLED, OPEN, POOLED, WINDOW, ring_rows
from localrun.network import hyper


def mix_each(computed, scale, base, streams, norm, config):
    """As gpu.streams.mix_streams: each token has the bits that it has alone."""
    parts = zip(computed.split(1), streams.split(1), strict=True)
    mixed = [hyper.mix_streams(some, scale, base, stream, norm, config) for some, stream in parts]

    def expand(y_TD):
        return torch.cat([each(y) for (_, each), y in zip(mixed, y_TD.split(1), strict=True)])

    return torch.cat([x for x, _ in mixed]), expand


def turned_heads(q_THW, positions_T, turns, rope_dim, epsilon):
    """As gpu.attention.compressed_rows.turned_heads."""
    outs = []
    for q_1HW, position in zip(q_THW.split(1), positions_T.split(1), strict=True):
        q_1HW = q_1HW if epsilon is None else rms_norm(q_1HW, q_1HW.shape[2:], None, epsilon)
        outs.append(turns.rope.rotate_last(q_1HW, turns.at(position)))
    return torch.cat(outs)


def append(kv_TW, norm_W, openings, turns, places, layer, config):
    """As gpu.attention.compressed_rows.append."""
    for t, position in enumerate(places.positions.tolist()):
        row_1W = rms_norm(kv_TW[t : t + 1], kv_TW.shape[1:], norm_W, config.rms_norm_eps)
        ring, at = _window(places, layer, t, config), turns.at(places.positions[t : t + 1])
        ring[position % len(ring)] = turns.rope.rotate_last(row_1W[:, None], at)[0, 0]
    entries = (OPEN, POOLED), (INDEX_OPEN, INDEX_POOLED)
    for opening, (source, target) in zip(openings, entries, strict=False):
        _append_pooled(opening, source, target, turns, places, layer, config)


def _append_pooled(opening, source, target, turns, places, layer, config):
    values, gates, bias, norm_W = opening.values_TX, opening.gates_TX, opening.bias, opening.norm_W
    ratio, n_rows, width = config.compress_ratio(layer), ring_rows(config.rows(layer)[2]), len(norm_W)
    n_parts = values.shape[1] // width
    opens = []
    for t, position in enumerate(places.positions.tolist()):
        ring = _rows(places, layer, t, source, n_rows, 2 * n_parts * width, torch.float32)
        ring[position % n_rows] = torch.cat([values[t], gates[t] + bias[position % ratio]])
        opens.append(ring)
    for t, position in enumerate(places.positions.tolist()):
        if (position + 1) % ratio:
            continue
        of = torch.arange(max(0, position + 1 - n_parts * ratio), position + 1)
        part = (of - (position + 1 - n_parts * ratio)) // ratio
        rows = opens[t][of % n_rows].unflatten(1, (2, n_parts, width))[torch.arange(len(of)), :, part]
        pooled = (rows[:, 0] * rows[:, 1].softmax(0)).sum(0)
        pooled = rms_norm(pooled, (width,), norm_W, config.rms_norm_eps)
        at = turns.at(torch.tensor([position + 1 - ratio]))
        block = _rows(places, layer, t, target, (position + 1) // ratio, width)
        block[-1] = turns.rope.rotate_last(pooled[None, None], at)[0, 0]


def attend_at(how, q_THW, places, chosen_TK=None):
    """As gpu.attention.compressed_decoding.attend_at."""
    c, ratio, outs = how.config, how.config.compress_ratio(how.layer), []
    for t, position in enumerate(places.positions.tolist()):
        ring = _window(places, how.layer, t, c)
        window = ring[torch.arange(max(0, position + 1 - c.sliding_window), position + 1) % len(ring)]
        n_pooled = (position + 1) // ratio if ratio else 0
        pooled = _rows(places, how.layer, t, POOLED, n_pooled, c.head_dim) if n_pooled else window[:0]
        if chosen_TK is not None:
            pooled = pooled[chosen_TK[t, :n_pooled].long()]
        outs.append(_attend(how, q_THW[t : t + 1], position, torch.cat([pooled, window])))
    return torch.cat(outs)


def attend_seen(how, q_THW, positions_T, seen):
    """As gpu.attention.compressed_decoding.attend_seen."""
    c, outs, first = how.config, [], seen.n_before + len(q_THW) - len(seen.window_SW)
    for t, position in enumerate(positions_T.tolist()):
        window = seen.window_SW[max(0, position + 1 - c.sliding_window) - first : position + 1 - first]
        pooled = window[:0]
        if seen.ratio:
            n_pooled = (position + 1) // seen.ratio
            pooled = seen.keys_SW[:n_pooled]
            if seen.chosen_TK is not None:
                pooled = seen.keys_SW[seen.chosen_TK[t, :n_pooled].long()]
        outs.append(_attend(how, q_THW[t : t + 1], position, torch.cat([pooled, window])))
    return torch.cat(outs)


def _attend(how, q_1HW, position, rows_SW):
    """Of one token."""
    rows_SW = rows_SW.float()
    scores_HS = torch.cat([how.scale * (q_1HW[0] @ rows_SW.T), how.sinks_H[:, None]], 1)
    mixed_1HW = (scores_HS.softmax(1)[:, :-1] @ rows_SW)[None]
    return how.turns.rope.rotate_last(mixed_1HW, how.turns.at(torch.tensor([position])).conj())


def _window(places, layer, token, config):
    return _rows(places, layer, token, WINDOW, ring_rows(config.rows(layer)[0]), config.head_dim)


def _rows(places, layer, token, entry, n_rows, width, dtype=None):
    """A token's block of a layer, of the cache's type unless given."""
    from gpu_torch import block_at, entries_of

    dtype = dtype or (torch.float32 if places.is_exact else torch.float16)
    return block_at(entries_of(places, layer, token)[entry], n_rows, width, width, dtype)


def use_torch(patch: pytest.MonkeyPatch) -> None:
    """Models on a device that are loaded from now on have these."""
    for function in (turned_heads, append):
        patch.setattr(compressed_rows, function.__name__, function)
    for function in (attend_at, attend_seen):
        patch.setattr(compressed_decoding, function.__name__, function)
    patch.setattr(weights.DeviceWeights, "mix_streams", staticmethod(mix_each))
    head = hyper.HyperHead.__call__
    patch.setattr(hyper.HyperHead, "__call__", lambda self, x: torch.cat([head(self, each) for each in x.split(1)]))
