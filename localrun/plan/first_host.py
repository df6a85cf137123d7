"""Whether a card of the first of several hosts pays: what its proof timed on one host, with the experts spread.

Without a card the shared experts are computed while messages are under way, as with one they are beside the routed
ones: so a card gains less over several hosts than on one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from localrun.gpu.proof.verdict import PROMPT, REPLY
from localrun.placement.memory_table import EXPERTS
from localrun.plan.hosts import SHARED, equal_parts, spread
from localrun.plan.link import Link
from localrun.plan.shapes import ModelShape, n_bytes
from localrun.plan.speed import Phase, Speed, used


def over_hosts(figures: Mapping[str, Any], model: ModelShape, n_hosts: int, link: Link) -> dict[str, float]:
    """What PROMPT tokens and a reply of REPLY take, by "cuda" and "cpu", with all experts in RAM in equal slices.

    figures: the proof's, of one host: "step_s" and "prompt_s" by the same two, and "prompt_tokens".
    """
    n_prompt = figures["prompt_tokens"]
    found = {}
    for side in ("cuda", "cpu"):
        prompt, step = (
            _seconds(figures[what], side, n_tokens, model, n_hosts, link)
            for what, n_tokens in (("prompt_s", n_prompt), ("step_s", 1))
        )
        found[side] = prompt * PROMPT / n_prompt + step * REPLY
    return found


def _seconds(
    one_host_s: Mapping[str, float], side: str, n_tokens: int, model: ModelShape, n_hosts: int, link: Link
) -> float:
    """Of so many tokens. The CPU's time goes to parts of the model by the bytes of them that a token reads."""
    groups = model.groups()
    left_out = {"mtp", "head", "embedding"}  # of a prompt; a step needs the head, which the embedding may be
    if n_tokens == 1:
        left_out = {"mtp", "embedding"} if "head" in groups else {"mtp"}
    read = {part: n_bytes(groups[part]) * used(model, part, 1)[0] for part in groups.keys() - left_out}
    on_cpu = (EXPERTS, SHARED) if side == "cpu" else (EXPERTS,)
    part_s = {part: one_host_s["cpu"] * read.get(part, 0) / sum(read.values()) for part in on_cpu}
    part_s[EXPERTS] = min(part_s[EXPERTS], one_host_s[side])
    phases = [Phase(part, "CPU", seconds) for part, seconds in part_s.items()]
    rest = Phase("all else", "", one_host_s[side] - sum(part_s.values()))
    alone = Speed(n_tokens, (*phases, rest))
    return spread(alone, model, n_hosts, link, equal_parts(model, n_hosts)).speed.seconds
