"""Which of the candidates for tiles (localrun.gpu.tiles) are fastest on this card: for what is proven after this.

Timed on what a step has of each kind: the model's matrices of the first layers with a token each, or with many of
them, and their attention to the last token of the whole context. One after the other, so that a card's cache holds no
more of them than in use. What does not fit is left out; being wrong is found by the parts that follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import torch
from triton.errors import TritonError

from localrun.gpu import tiles
from localrun.gpu.attention.flash_decoding import attend, dtype_of_products, pieces_for
from localrun.gpu.attention.grouped import attend_grouped
from localrun.gpu.caches.cache import new_cache
from localrun.gpu.formats.layout import LAYOUTS
from localrun.gpu.matrices import gemm, gemv
from localrun.gpu.matrices.matrix import Matrix, upload
from localrun.gpu.proof import compressed
from localrun.gpu.proof.speed import seconds
from localrun.gpu.proof.subject import Subject, fill
from localrun.gpu.proof.task import Findings
from localrun.models.names import EMBED_TOKENS, LM_HEAD
from localrun.models.tensors import GGUFTensors

_WORTH = 0.97  # of the time by the usual ones: less is noise
Work = Callable[[], object]


def prove(subject: Subject, findings: Findings) -> None:
    """figures and choices: tiles."""
    findings.doing("loading")
    with torch.inference_mode(), subject.device.errors():
        matrices = _matrices(subject)
        inner = [matrix for name, matrix in matrices.items() if name != LM_HEAD]  # of a prompt the head takes one token
        works = {
            "few": partial(_products, subject, list(matrices.values()), gemv.multiply, 1),
            "many": partial(_products, subject, inner, gemm.multiply, max(subject.effort.many)),
            "attention": partial(_attention, subject),
        }
        chosen = {kind: _fastest(subject, findings, kind, prepare) for kind, prepare in works.items()}
        subject.device.cut(chosen)
    findings.choices["tiles"] = chosen


def _fastest(subject: Subject, findings: Findings, kind: str, prepare: Callable[[], Work]) -> str:
    """The name of a candidate. What prepares the work is called with each in use."""
    device, base, times = subject.device, subject.device.tiles, {}
    for name, tile in tiles.CANDIDATES[kind].items():
        if name != base and tile == tiles.CANDIDATES[kind][base]:
            continue
        findings.doing(f"tiles, {kind}: {name}")
        device.cut({kind: name})
        try:
            work = prepare()
            work()
            device.synchronize()
        except TritonError:  # it does not fit
            continue
        times[name] = _seconds(subject, work)
    findings.figures[kind] = {name: round(1e6 * found, 1) for name, found in times.items()}
    best = min(times, key=lambda name: times[name], default=base)
    return best if base not in times or times[best] < _WORTH * times[base] else base


def _seconds(subject: Subject, work: Work) -> float:
    """Of what was captured, so that launches take nothing."""
    device = subject.device
    replay = device.capture(lambda: _all([work]))

    def run() -> None:
        replay()
        device.synchronize()

    return seconds(run, subject.effort.runs)


def _matrices(subject: Subject) -> dict[str, Matrix]:
    """Of attention, dense layers, shared experts and the head, by name."""
    tensors = GGUFTensors(subject.file)
    names = [
        name
        for name, tensor in subject.file.tensors.items()
        if len(tensor.shape) == 2 and name != EMBED_TOKENS and tensor.type.name in LAYOUTS
    ]
    return {name: upload(tensors.matrix(name), subject.device.torch) for name in names}


def _products(
    subject: Subject,
    matrices: list[Matrix],
    multiply: Callable[[Matrix, torch.Tensor], torch.Tensor],
    n_tokens: int,
) -> Work:
    widths = {matrix.n_cols for matrix in matrices}
    x = {width: subject.vectors(n_tokens, width)[:, None].to(subject.device.torch) for width in widths}
    return lambda: _all(partial(multiply, matrix, x[matrix.n_cols]) for matrix in matrices)


def _all(works: Iterable[Work]) -> None:
    """One after the other; what each gives is dropped, so that the next one may have its memory."""
    for work in works:
        work()


def _attention(subject: Subject) -> Work:
    """Of all the first layers."""
    if subject.config.attention == "compressed":
        return compressed.attention_work(subject)
    c, device, task = replace(subject.config, index_topk=0), subject.device.torch, subject.task
    cache = new_cache(c, task.ctx, device, task.cache_bits)
    fill(cache, task.ctx - 1)
    dtype = dtype_of_products(device)
    layers, pieces = range(c.num_hidden_layers), pieces_for(c, device)
    if c.attention == "mla":
        widths = c.kv_lora_rank, c.qk_rope_head_dim
        q = [subject.vectors(c.num_attention_heads, width)[None].to(device) for width in widths]
        return lambda: _all(partial(attend, *q, cache, layer, c, 1.0, pieces, dtype) for layer in layers)
    q_THd = subject.vectors(c.num_attention_heads, c.head_dim)[None].to(device)
    given = 1.0, pieces, dtype
    return lambda: _all(partial(attend_grouped, q_THd, cache, layer, c, *given, c.window(layer)) for layer in layers)
