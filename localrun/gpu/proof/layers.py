"""A dense layer and one with experts, a prompt and a step, against the CPU's network; then logits of a prompt.

Both sides get the same inputs and choose the same experts: a choice between two that score alike may go either way (the
router has been compared by itself), and would change a token's result altogether.

How far apart they may be, as a part of the range of what is compared. The CPU rounds activations to 8 bits for
quantised matrices: steps of 1/127 of the largest of 32, which is some three times their root mean square, so
3 / 127 / sqrt(12) = 0.7% of a product; up to six of them in a row make 1.7%, and the worst of thousands of results is
within their whole range: 3%. Through many layers, each of which adds as much by itself to what grows alike: 5% of the
logits' range. Without 8-bit activations what is left is float16: caches, and operands of many tokens, 2^-11 each: 0.5%.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from localrun.cpu.model import NativeModel
from localrun.gpu.caches.cache import AnyCache
from localrun.gpu.caches.cache import new_cache as device_cache
from localrun.gpu.experts.routed import Mode
from localrun.gpu.hybrid import HybridModel
from localrun.gpu.proof import compressed
from localrun.gpu.proof.subject import Subject, given_choices, noted_choices
from localrun.gpu.proof.task import Findings
from localrun.network.cache import new_cache as host_cache
from quant.decode.program import MOST_TOKENS

_LAYER, _LOGITS, _EXACT = 0.03, 0.05, 0.005
_TOKENS = 3 * MOST_TOKENS  # of a prompt: more than a step takes, few enough for the CPU to be quick


def prove(subject: Subject, findings: Findings) -> None:
    """All of it."""
    findings.doing("loading")
    with subject.hybrid() as model, subject.native() as native, torch.inference_mode(), subject.device.errors():
        kinds = compressed.layers(subject).values() if subject.config.compress_ratios else ()
        compare_layers(subject, findings, model, native, sorted({0, *kinds, subject.before}))
        compare_logits(subject, findings, model, native, "logits of the first layers", bound(subject))
    if subject.config.num_hidden_layers == subject.whole.num_hidden_layers:
        return
    fits = not subject.placement(whole=True).short and subject.whole_file.file_size <= subject.effort.whole_bytes
    findings.figures["whole model"] = "compared" if fits else "not compared: it takes longer to read than this may"
    if fits:
        findings.doing("loading the whole model")
        with subject.hybrid(whole=True) as model, subject.native(whole=True) as native:
            most = _LOGITS if subject.integer else _EXACT
            compare_logits(subject, findings, model, native, "logits of the whole model", most)


def bound(subject: Subject) -> float:
    """How far a few layers' results may be apart."""
    return _LAYER if subject.integer else _EXACT


def compare_layers(
    subject: Subject, findings: Findings, model: HybridModel, native: NativeModel, indices: Sequence[int]
) -> None:
    """Steps and a prompt through some layers, each by itself."""
    here, there = model.network, native.network
    for index in indices:
        for n_tokens, mode in (
            (1, Mode.STEP),
            (max(subject.effort.steps), Mode.STEP),
            (_prompt(subject), Mode.PREFILL),
        ):
            kind = "with experts" if index in subject.moe_layers else "dense"
            what = f"layer {index} ({kind}), {n_tokens} tokens"
            findings.doing(what)
            x, ids = _inputs(subject, n_tokens)
            caches = _caches(subject, n_tokens)
            model.routed.mode = mode
            with noted_choices(here) as choices:
                found = _layer(model, index, x, ids, caches[0], mode)
            with given_choices(there, choices):
                right = there.layers[index](x, caches[1], ids)
            findings.bounded(what, apart(found - x, right - x), bound(subject))


def _caches(subject: Subject, n_tokens: int):
    c = subject.config
    return device_cache(c, n_tokens, subject.device.torch, 16), host_cache(c, n_tokens, False)


def _prompt(subject: Subject) -> int:
    """Tokens of a prompt: one more than a pooled row is of, at least."""
    return max(_TOKENS, 1 + max(subject.config.compress_ratios, default=0))


def _inputs(subject: Subject, n_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a layer takes, vectors or streams, and of which tokens."""
    c, ids = subject.config, torch.tensor(subject.ids(n_tokens, n_tokens))
    if not c.hc_mult:
        return subject.vectors(n_tokens, c.hidden_size, n_tokens), ids
    return subject.vectors(n_tokens, c.hc_mult * c.hidden_size, n_tokens).unflatten(1, (c.hc_mult, -1)), ids


def _layer(
    model: HybridModel, index: int, x: torch.Tensor, ids: torch.Tensor, cache: AnyCache, mode: Mode
) -> torch.Tensor:
    """A layer's result on the host."""
    layer, device = model.network.layers[index], model.device
    x, ids = x.to(device.torch), ids.to(device.torch)
    if mode is Mode.STEP:
        with model.pool.exclusive():
            out = layer(x, cache.places(len(ids)), ids)
            device.synchronize()
    else:
        out = layer(x, cache, ids)
    return out.cpu()


def compare_logits(
    subject: Subject, findings: Findings, model: HybridModel, native: NativeModel, what: str, most: float
) -> None:
    """Of a fixed prompt."""
    findings.doing(what)
    ids = subject.ids(_TOKENS)
    with noted_choices(model.network) as choices:
        found = model.forward(ids, model.new_cache(len(ids)), all_logits=True)
    with given_choices(native.network, choices):
        right = native.forward(ids, native.new_cache(len(ids), exact=True), all_logits=True)
    findings.bounded(what, apart(found, right), most)


def apart(found: torch.Tensor | np.ndarray, right: torch.Tensor | np.ndarray) -> float:
    """The largest difference as a part of the range."""
    found, right = np.asarray(found), np.asarray(right)
    return float(np.abs(found - right).max() / np.ptp(right))
