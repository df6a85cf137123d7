"""deepseek4's declaration: files as llama.cpp's converter writes them, files of before, files with faults."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import config_models
import gguf_builder as b
import pytest
import tiny_deepseek4 as tiny
from gguf import GGMLQuantizationType as Type

from localrun.errors import GGUFError, UnsupportedModelError
from localrun.gguf.file import open_gguf
from localrun.models.names import expected_shapes, has_mtp
from localrun.models.reader import read_config

_KINDS = {bool: b.BOOL, int: b.U32, float: b.F32, str: b.STRING}
FLASH = tiny.Deepseek4(
    compress_ratios=(0, 0, *[4 if i % 2 == 0 else 128 for i in range(41)]), num_hash_layers=3, head_dim=512,
    sliding_window=128, index_n_heads=64, index_head_dim=128, index_topk=512,
)  # fmt: skip


def made_up(m: tiny.Deepseek4 = tiny.SHARED) -> config_models.Model:
    """Keys and shapes alone."""
    keys: dict[str, config_models.Value] = {}
    for name, value in tiny.metadata(m).items():
        if isinstance(value, list):
            keys[name] = (b.ARRAY, (b.F32 if isinstance(value[0], float) else b.I32, value))
        else:
            keys[name] = (_KINDS[type(value)], value)
    tensors = {name: values.shape for name, values in tiny.tensors(m).items()}
    types = {name: Type.I32 for name in tensors if "tid2eid" in name}
    return config_models.Model("deepseek4", keys, tensors, types=types)


def made_up_config(m: tiny.Deepseek4):
    with open_gguf(tiny.shared()) as file:
        small = read_config(file)
    return replace(
        small, num_hidden_layers=m.num_hidden_layers, compress_ratios=m.compress_ratios, head_dim=m.head_dim,
        v_head_dim=m.head_dim, sliding_window=m.sliding_window, index_head_dim=m.index_head_dim,
        index_topk=m.index_topk,
    )  # fmt: skip


def config_of(model: config_models.Model, path: Path):
    with open_gguf(model.write(path)) as file:
        return read_config(file), set(expected_shapes(file, read_config(file))) ^ set(file.tensors)


def test_every_tensor_has_a_place(tmp_path: Path) -> None:
    config, different = config_of(made_up(), tmp_path / "x.gguf")
    assert not different
    assert config.compress_ratios == (0, 4, 128, 4) and config.swiglu_limit == 2 and config.num_hash_layers == 2
    with open_gguf(tiny.shared(tiny.Deepseek4(compress_ratios=(4,), num_nextn_predict_layers=1))) as file:
        assert has_mtp(file, read_config(file)) and read_config(file).num_hidden_layers == 1


def test_what_a_token_takes_in_the_cache_of_the_large_model() -> None:
    """6,880 bytes of pooled rows; the 21 layers of ratio 4 go over 512 of them, the 20 of ratio 128 over all."""
    config = made_up_config(FLASH)
    assert config.kv_bytes_per_token == 6880
    assert config.attended(1 << 20) == 43 * 128 + 21 * 512 + 20 * 8192


FAULTS = [
    ({"attention.compress_ratios": (b.ARRAY, (b.I32, [0, 4, 64, 4]))}, {}, GGUFError, "expected 0, 4 or 128"),
    ({"attention.compress_ratios": (b.ARRAY, (b.I32, [0, 4, 128]))}, {}, GGUFError, "for each of 4 layers"),
    ({"attention.compress_ratios": (b.U32, 4)}, {}, GGUFError, "expected an array"),
    ({"hyper_connection.count": (b.U32, 2)}, {}, UnsupportedModelError, "2 hyper-connections"),
    ({"swiglu_clamp_exp": (b.ARRAY, (b.F32, [1.0, 2.0, 2.0, 2.0]))}, {}, UnsupportedModelError, "swiglu_clamp"),
    ({"expert_gating_func": (b.U32, 2)}, {}, UnsupportedModelError, "gating function 2"),
    ({"attention.head_count_kv": (b.U32, 2)}, {}, GGUFError, "expected 1"),
    ({}, {"blk.0.attn_kv_latent.weight": (64, 128)}, UnsupportedModelError, "convert the model anew"),
    ({}, {"output_hc_fn.weight": None}, GGUFError, "output_hc_fn.weight' not found"),
]


@pytest.mark.parametrize(("keys", "tensors", "kind", "message"), FAULTS, ids=[fault[3] for fault in FAULTS])
def test_faults_are_told(keys: dict, tensors: dict, kind: type, message: str, tmp_path: Path) -> None:
    model = made_up()
    with pytest.raises(kind) as caught:
        config_models.config_of(model.changed(keys, tensors, model.types).write(tmp_path / "x.gguf"))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_table_of_experts_is_whole_numbers(tmp_path: Path) -> None:
    """Checked before the weights are looked at: llama.cpp's quantiser makes floats of it."""
    from localrun.models.names import check_types

    model = made_up()
    path = model.changed({}, {}, {}).write(tmp_path / "x.gguf")
    with open_gguf(path) as file, pytest.raises(GGUFError, match="expected I32"):
        check_types(file)
    with open_gguf(model.write(tmp_path / "y.gguf")) as file:
        check_types(file)
