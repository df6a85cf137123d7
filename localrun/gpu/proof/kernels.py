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

from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from localrun.gpu.attention.attention import attention_on
from localrun.gpu.proof import compressed
from localrun.gpu.proof.attention import prove_attention, prove_indexer
from localrun.gpu.proof.bounds import HALF, SINGLE, compare, few_bound, finite, many_bound
from localrun.gpu.proof.experts import prove_experts
from localrun.gpu.proof.rows import expanded, largest_of_32, numbers_of_tokens, sample
from localrun.gpu.proof.subject import Subject
from localrun.gpu.proof.task import Findings
from localrun.gpu.weights import DeviceWeights
from localrun.network import moe
from localrun.network.model import Network
from quant.matrix import QuantMatrix
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
        """As "Q4_K, 16 of 128 by 512": format, groups, rows, columns."""
        groups = f"{self.weight.n_groups} of " if self.weight.n_groups > 1 else ""
        return f"{self.weight.format.name}, {groups}{self.weight.n_rows} by {self.weight.n_cols}"


class NotedWeights(DeviceWeights):
    """Notes what the network asks for."""

    def __init__(self, *arguments: Any):
        self.uses: list[Use] = []
        super().__init__(*arguments)

    def linear(self, name: str) -> Any:
        """As DeviceWeights, noted."""
        return self._note("matrix", name, self.matrix(name), super().linear(name))

    def heads(self, name: str, n_groups: int | None = None) -> Any:
        """As DeviceWeights, noted."""
        matrix = self.matrix(name) if n_groups is None else self.grouped(name, n_groups)
        return self._note("heads", name, matrix, super().heads(name, n_groups))

    def embedding(self, name: str) -> Any:
        """As DeviceWeights, noted."""
        return self._note("embedding", name, self.matrix(name), super().embedding(name))

    def split_heads(self, name: str, n_heads: int, rows: tuple[int, int]) -> Any:
        """As DeviceWeights, both noted."""
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
                prove_attention(subject, findings)
                prove_indexer(subject, findings)
            prove_experts(subject, findings, pool)
        finally:
            weights.routed[0].close()


def _groups(weight: QuantMatrix) -> list[int]:
    return sorted({0, weight.n_groups // 2, weight.n_groups - 1})


def _products(subject: Subject, findings: Findings, pool: Pool, use: Use) -> None:
    """y = W x."""
    weight, device = use.weight, subject.device.torch
    groups, rows = _groups(weight), sample(weight.n_rows, subject.effort.rows)
    w = {group: expanded(pool, weight, group, rows) for group in groups}
    for n_tokens, is_few in numbers_of_tokens(subject):
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
