"""Any type for any matrix: models whose matrices all have different types, against the same weights in float64."""

from __future__ import annotations

import naive
import numpy as np
import pytest
import tiny_models
from cases import slow_but
from closeness import QUANTIZED_TOLERANCE, error
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

import localrun
from quant.formats import registry

# The router is named, so that it does not stay F32. Experts come before what their names begin with.
ROLES = {
    "wide": (
        *("token_embd", "attn_q_a", "attn_q_b", "attn_kv_a_mqa", "attn_k_b", "attn_v_b", "attn_output", "ffn_gate_inp"),
        *("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps", "ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"),
        *("ffn_gate", "ffn_up", "ffn_down", "^output"),
    ),
    "llama-wide": (
        *("token_embd", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "^output"),
    ),
}
WIDTHS = {"attn_k_b": 64}  # columns, where they are not a multiple of 256
STEP = 5  # types that lie between those of one role and the next


def types_of(variant: str, first: int) -> dict[str, str]:
    """A type for each role; over all values of `first` each role has every type that fits its rows."""
    types = {}
    for i, role in enumerate(ROLES[variant]):
        n_cols = WIDTHS.get(role, 256)
        fitting = [name for name in registry.NAMES if n_cols % GGML_QUANT_SIZES[GGMLQuantizationType[name]][0] == 0]
        types[rf"{role}\.weight"] = fitting[(first + STEP * i) % len(fitting)]
    return types


N_TYPES = len(registry.NAMES)
# A dense model has the same kinds of matrices but for the experts'.
ROUNDS = [("wide", first) for first in range(N_TYPES)] + [("llama-wide", first) for first in range(0, N_TYPES, 4)]
# Plain numbers in the middle of quantised experts, and experts of three kinds of panels.
FAST = {("wide", registry.NAMES.index("F16")), ("llama-wide", 4)}


@pytest.mark.parametrize(("variant", "first"), slow_but(ROUNDS, FAST))
def test_every_matrix_has_another_type(variant: str, first: int) -> None:
    """The step's logits and the prompt's, against the float64 reference on the same weights."""
    types = types_of(variant, first)
    path, plain = tiny_models.shared(variant, type=types), tiny_models.shared(variant)
    ids = naive.steady_prompt(path, 16, like=plain)
    expected = naive.Naive(path).logits(ids)
    with localrun.load(path, device="cpu", threads=2, ctx=64, backend="native") as model:
        prompt, cache = model.logits(ids), model.new_cache()
        step = np.concatenate([model.model.forward([token], cache) for token in ids])
    found = {name: round(error(logits, expected), 4) for name, logits in (("prompt", prompt), ("step", step))}
    assert max(found.values()) < QUANTIZED_TOLERANCE, f"{found}: {types}"
