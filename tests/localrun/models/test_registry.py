"""The declarations of architectures: what holds for all of them, without a file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from cases import slow_but

from localrun.models.architecture import RATIO_128, Architecture
from localrun.models.config import Config
from localrun.models.indexer import UNUSED
from localrun.models.names import layer
from localrun.models.registry import ARCHITECTURES
from localrun.plan.known import load_data
from localrun.plan.shapes import from_config, known_config, known_models, load_model

FIELDS = {field.name for field in dataclasses.fields(Config)}


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_a_module_is_called_as_its_architecture_declares(architecture: Architecture) -> None:
    for tensor in architecture.layer:
        assert layer(architecture.name, 7, tensor.module) == f"blk.7.{tensor.name}"
    assert layer(architecture.name, 0, "self_attn.kv_b_proj") == "blk.0.attn_kv_b.weight"  # whether it has one or not


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_names_are_given_once(architecture: Architecture) -> None:
    fields = [key.field for key in architecture.keys if key.field]
    used = [t for t in architecture.layer if t not in UNUSED and t.layers != RATIO_128]  # called as others elsewhere
    for tensors in (architecture.ends, used):
        for names in ([tensor.name for tensor in tensors], [tensor.module for tensor in tensors]):
            assert len(set(names)) == len(names)
    for names in ([key.name for key in architecture.keys], fields):
        assert len(set(names)) == len(names)
    assert {*fields, *architecture.constants} <= FIELDS
    assert {"attention", "rope"} <= architecture.constants.keys()


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_presence_depends_on_modules_of_the_layer(architecture: Architecture) -> None:
    for tensors in (architecture.ends, architecture.layer):
        modules = {tensor.module for tensor in tensors}
        assert {name for t in tensors for name in (t.with_module, t.without_module) if name} <= modules


# One of each class of checkpoints is in the fast suite.
FIRST = {load_data("models")[name]["config"]["architectures"][0]: name for name in reversed(known_models())}.values()


@pytest.mark.parametrize("name", slow_but(known_models(), FIRST))
def test_a_configuration_goes_to_config_json_and_back(name: str) -> None:
    """What `localrun plan` makes its probes of. With a quarter of many experts: the way back names all tensors."""
    # Hy3's file says otherwise how many layers are dense.
    known = load_model(name).config if name == "hy3" else known_config(name)
    n_experts = known.n_routed_experts // 4 if known.n_routed_experts >= 128 else known.n_routed_experts
    config = dataclasses.replace(known, rope_scaling=None, rope_theta=10000.0, n_routed_experts=n_experts)
    values = ARCHITECTURES[config.architecture].settings(config)
    assert from_config(values | {"tie_word_embeddings": False}, Path(name)).config == config
