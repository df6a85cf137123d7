"""Experts in VRAM against the CPU's rows: a part of kernels.py, whose bounds these are."""

from __future__ import annotations

import numpy as np
import torch

from localrun.gpu.experts import in_vram
from localrun.gpu.proof.bounds import compare, few_bound, finite, many_bound
from localrun.gpu.proof.rows import expanded, largest_of_32, numbers_of_tokens
from localrun.gpu.proof.subject import Subject
from localrun.gpu.proof.task import Findings
from localrun.models.tensors import GGUFTensors
from localrun.network import moe
from quant.matrix import ExpertMatrices
from quant.simd.gated import Activation
from quant.threads.pool import Pool


def prove_experts(subject: Subject, findings: Findings, pool: Pool) -> None:
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
    for n_tokens, is_few in numbers_of_tokens(subject):
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
