"""convert --check: a conversion that rounds nothing against transformers, then the real one's weights against it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.output import note, size
from localrun.errors import LocalrunError

if TYPE_CHECKING:
    from localrun.convert import Options, Plan

Compare = Callable[[], dict[str, Any]]


@contextmanager
def checked(plan: Plan, chosen: Options, threads: int) -> Iterator[Compare]:
    """Compare networks before the block is run, which converts; it calls what it is given to compare weights.

    That gives what was found, for --json. Raises LocalrunError, before anything is written, if logits are not those of
    transformers.
    """
    from localrun.convert.sources.checkpoint import Checkpoint

    if not isinstance(plan.source, Checkpoint):
        raise LocalrunError(f"{plan.source.path}: --check compares a checkpoint folder; a GGUF has no reference")
    with tempfile.TemporaryDirectory(prefix=".localrun-check-", dir=plan.destination.absolute().parent) as folder:
        exact = Path(folder) / "exact.gguf"
        reason, difference = _why_not(plan), 0.0
        if not reason:
            reason, difference = _compare_networks(plan, chosen, exact, threads)
        if reason:
            note(f"--check: {reason}; nothing is compared")
        yield lambda: {"check": None} if reason else _compare_weights(plan, exact, difference)


def _why_not(plan: Plan) -> str:
    """Why nothing can be compared; empty if it can."""
    from localrun.hardware import free_ram
    from localrun.measure.reference import is_available

    if plan.source.is_part:
        return "transformers would load the whole model, of which this is the text part"
    if not is_available():
        return "transformers is not installed"
    needed, free = 4 * plan.n_weights, free_ram()
    if needed > free:
        return f"transformers needs {size(needed)} of memory for weights in float32, {size(free)} are free"
    return ""


def _compare_networks(plan: Plan, chosen: Options, exact: Path, threads: int) -> tuple[str, float]:
    """Write `exact` and run it: why it could not be compared, and how far its logits are from transformers'."""
    from localrun.convert import convert, make_plan
    from localrun.measure.reference import NETWORK_TOLERANCE, TransformersError, reference

    folder, n_vocab = plan.source.path, plan.metadata.get(".vocab_size")
    note("--check: running transformers, and a conversion to F32")
    try:
        theirs = reference(folder, plan.source.config["architectures"][0], n_vocab)
    except TransformersError as error:
        return str(error), 0.0
    unrounded = replace(chosen, mix="F32", overrides=(), imatrix=None, pack=False, split_max_bytes=0)
    convert(make_plan(folder, exact, unrounded), threads=threads)
    difference = theirs.difference(exact, threads)
    if not difference <= NETWORK_TOLERANCE:
        raise LocalrunError(
            f"{folder}: logits are {difference:.2g} of their range from transformers', before any rounding; expected "
            f"at most {NETWORK_TOLERANCE:g}. Something in config.json is not understood; nothing was written"
        )
    return "", difference


def _compare_weights(plan: Plan, exact: Path, difference: float) -> dict[str, Any]:
    from localrun.measure.reference import check_weights

    error = check_weights(plan.layout.parts[0].path, exact)
    note(f"checked: logits {difference:.1e} of their range from transformers'; weights rounded by {error:.1%} at most")
    return {"check": {"logits_difference": difference, "worst_weight_error": error}}
