"""Several cards together: each has a run of the first layers, one after the other.

A prompt and steps against the CPU's network, with the same experts chosen, bounded as in layers.py; and captured steps
as in steps.py: what one card hands to the next must be there, and be this step's. Not proven here: how much memory the
split takes (memory.py does it with one card, by the same rules), and its speed.
"""

from __future__ import annotations

import numpy as np

from localrun.cpu.model import NativeModel
from localrun.gpu.hybrid import HybridModel
from localrun.gpu.proof import layers, steps
from localrun.gpu.proof.subject import Subject, given_choices, noted_choices
from localrun.gpu.proof.task import Findings
from quant.decode.program import MOST_TOKENS


def prove(subject: Subject, findings: Findings) -> None:
    """All of it."""
    findings.doing("loading")
    bound = layers.bound(subject)
    with subject.hybrid() as model, subject.native() as native:
        findings.figures["layers"] = [len(part.layers) for part in model.parts]
        layers.compare_logits(subject, findings, model, native, "a prompt through all cards", bound)
        _steps(subject, findings, model, native, bound)
        steps.same_bits(subject, findings, model)


def _steps(subject: Subject, findings: Findings, model: HybridModel, native: NativeModel, bound: float) -> None:
    """Three steps that follow each other, launched one by one: choices are noted on the host."""
    what = "steps through all cards"
    findings.doing(what)
    ids = subject.ids(3 * MOST_TOKENS, seed=8)
    chunks = [ids[first : first + MOST_TOKENS] for first in range(0, len(ids), MOST_TOKENS)]
    cache, on_cpu = model.new_cache(len(ids)), native.new_cache(len(ids), exact=True)
    with steps.launched_one_by_one(model), noted_choices(model.network) as choices:
        found = np.concatenate([model.forward(chunk, cache, all_logits=True) for chunk in chunks])
    with given_choices(native.network, choices):
        right = np.concatenate([native.forward(chunk, on_cpu, all_logits=True) for chunk in chunks])
    findings.bounded(what, layers.apart(found, right), bound)
