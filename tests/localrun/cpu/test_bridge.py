"""Matrices over torch's tensors."""

from __future__ import annotations

import kernels
import numpy as np
import pytest
import torch

from localrun.cpu import bridge
from localrun.cpu.bridge import JoinedMLP, Linear
from localrun.network.attention import in_groups
from quant.matrix import ExpertMatrices
from quant.threads.pool import Pool

HIDDEN, INNER = 64, 96


@pytest.mark.parametrize("kind", [Linear, JoinedMLP])
def test_many_tokens_go_through_a_matrix_in_pieces(pool: Pool, monkeypatch: pytest.MonkeyPatch, kind: type) -> None:
    """Each with the result that all at once have."""
    rng = np.random.default_rng(0)
    shapes = (INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)
    gate, up, down = (kernels.random_weight("Q8_0", shape, rng)[0] for shape in shapes)
    module = Linear(pool, gate) if kind is Linear else JoinedMLP(pool, ExpertMatrices(gate, up, down))
    x, pieces = torch.randn(70, HIDDEN, generator=torch.Generator().manual_seed(0)), []
    whole = module(x)
    monkeypatch.setattr(bridge, "_TOGETHER", 30 * HIDDEN + 1)
    monkeypatch.setattr(bridge, "in_groups", lambda *sizes: pieces.extend(in_groups(*sizes)) or pieces)
    assert torch.equal(module(x), whole) and pieces == [(0, 30), (30, 30), (60, 10)]
