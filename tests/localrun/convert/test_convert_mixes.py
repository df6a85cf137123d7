"""The type of every tensor, against what llama.cpp's own llama_model_quantize makes of the same F16 file."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import llama_quantize
import numpy as np
import pytest
import tiny_models
from cases import slow_but
from conversions import write_imatrix

from localrun.convert import Options, make_plan
from localrun.convert.mixes import MIXES, PLAIN, choose_types, needs_imatrix, parse_mix, parse_override
from localrun.convert.mixes.rules import needs_importances
from localrun.convert.plan import Plan
from localrun.errors import LocalrunError

_SMALL = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 16,
    "num_attention_heads": 2,
    "q_lora_rank": 64,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "vocab_size": 64,
    "n_routed_experts": 3,
    "num_experts_per_tok": 2,
}
_SMALL_LLAMA = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "vocab_size": 64,
}
# 256-wide rows, 32-wide ones (expert down projections) that K-quants cannot take, and the rules' special numbers.
MODELS = {
    "deepseek": tiny_models.Deepseek2(**_SMALL),
    "deepseek-wide-experts": tiny_models.Deepseek2(**_SMALL | {"moe_intermediate_size": 256, "num_hidden_layers": 9}),
    "deepseek-8-experts": tiny_models.Deepseek2(**_SMALL | {"n_routed_experts": 8, "num_hidden_layers": 8}),
    "deepseek-nextn": tiny_models.Deepseek2(**_SMALL | {"num_nextn_predict_layers": 1}),
    "deepseek-legacy-kv-b": tiny_models.Deepseek2(**_SMALL | {"split_kv_b": False}),
    "deepseek-legacy-8-experts": tiny_models.Deepseek2(**_SMALL | {"split_kv_b": False, "n_routed_experts": 8}),
    "llama": tiny_models.Llama(**_SMALL_LLAMA),
    "llama-gqa-2": tiny_models.Llama(**_SMALL_LLAMA | {"num_key_value_heads": 2, "num_hidden_layers": 32}),
    "llama-mha-tied": tiny_models.Llama(**_SMALL_LLAMA | {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "qwen3moe": tiny_models.qwen3moe(**_SMALL_LLAMA, moe_intermediate_size=256, n_routed_experts=4),
    "mixtral": tiny_models.mixtral(
        **_SMALL_LLAMA | {"intermediate_size": 256, "moe_intermediate_size": 256, "qk_rope_head_dim": 64}
    ),
    "glm4moe": tiny_models.glm4moe(
        **_SMALL_LLAMA | {"num_key_value_heads": 2, "num_hidden_layers": 9},
        **{"moe_intermediate_size": 256, "n_routed_experts": 6, "num_nextn_predict_layers": 1},
    ),
    "llama-80-layers": tiny_models.Llama(**_SMALL_LLAMA | {"num_hidden_layers": 80, "intermediate_size": 256}),
}
QUANTIZED = [name for name, mix in MIXES.items() if mix.type not in PLAIN]
MLA = re.compile(r"attn_[kv]_b\.weight$")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    folder = tmp_path_factory.mktemp("f16")
    with pytest.MonkeyPatch.context() as patch:
        for name, model in MODELS.items():
            patch.setitem(tiny_models.VARIANTS, name, model)
        yield {name: tiny_models.tiny_model(folder / f"{name}.gguf", name, type="F16") for name in MODELS}


# Run in a process of its own, whose log is ours to read: dry runs name the type of every tensor there.
_DRY_RUN = """
import ctypes, json, sys, llama_cpp, numpy as np
path, ftypes = json.loads(sys.argv[1])
params = llama_cpp.llama_model_quantize_default_params()
params.nthread, params.dry_run = 1, True
weights = np.ones(256, np.float32)  # of one tensor: the rules only look at whether there is an imatrix
entries = (llama_cpp.llama_model_imatrix_data * 2)()
entries[0].name, entries[0].size = b"output.weight", weights.size
entries[0].data = weights.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
for with_imatrix in (False, True):
    params.imatrix = entries if with_imatrix else None
    for params.ftype in ftypes:
        print("NEXT", file=sys.stderr, flush=True)
        if llama_cpp.llama_model_quantize(path.encode(), b"none.gguf", ctypes.byref(params)):
            sys.exit(1)
"""
_LINE = re.compile(r"^\[ *\d+/ *\d+\] (\S+) .* type = *(\w+), size = .*?(?:\((\w+)\))?$", re.MULTILINE)


def llama_cpp_types(source: Path, mixes: list[str] = QUANTIZED) -> dict[tuple[str, bool], dict[str, str]]:
    """(mix, whether there is an imatrix) -> tensor -> type."""
    arguments = json.dumps([str(source), [MIXES[mix].number for mix in mixes]])
    done = subprocess.run([sys.executable, "-c", _DRY_RUN, arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    logs = done.stderr.split("NEXT\n")[1:]
    found = [{name: (new or old).upper() for name, old, new in _LINE.findall(log)} for log in logs]
    assert [len(types) for types in found] == [len(gguf.GGUFReader(source).tensors)] * 2 * len(mixes)
    return dict(zip(((mix, with_) for with_ in (False, True) for mix in mixes), found, strict=True))


def plan_for(source: Path, folder: Path, mix: str = "Q4_K_M") -> Plan:
    return make_plan(source, folder / "ours.gguf", Options(mix=mix))


def types_of(plan: Plan, mix: str, *, has_imatrix: bool = False) -> dict[str, str]:
    types = choose_types(plan.targets, plan.metadata, mix, has_imatrix=has_imatrix)
    return {target.name: type_ for target, type_ in zip(plan.targets, types, strict=True)}


@pytest.mark.parametrize("model", slow_but(MODELS, {"deepseek", "llama", "qwen3moe", "llama-80-layers"}))
def test_types_are_llama_cpps_but_for_k_b_and_v_b(model: str, sources: dict[str, Path], tmp_path: Path) -> None:
    check_types(model, sources[model], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["gpt-oss", "gpt-oss-wide", "minimax-m2", "hy_v3", "bailingmoe2"])
def test_types_of_other_architectures_are_llama_cpps(variant: str, tmp_path: Path) -> None:
    check_types(variant, tiny_models.shared(variant, type="F16"), tmp_path)


def check_types(model: str, source: Path, folder: Path) -> None:
    plan = plan_for(source, folder)
    mixes = ["Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M"] if model == "llama-80-layers" else QUANTIZED
    for (mix, has_imatrix), theirs in llama_cpp_types(source, mixes).items():
        ours = types_of(plan, mix, has_imatrix=has_imatrix)
        differing = {name for name in theirs if theirs[name] != ours[name]}
        assert theirs.keys() == ours.keys()
        assert {name for name in differing if not MLA.search(name)} == set(), (mix, has_imatrix)
        # The departure: small tensors that every position passes through stay at 8 bits.
        assert {ours[name] for name in ours if MLA.search(name)} <= {"Q8_0"}


def test_an_imatrix_changes_some_mixes(sources: dict[str, Path], tmp_path: Path) -> None:
    plan = plan_for(sources["llama"], tmp_path)
    changed = {mix for mix in QUANTIZED if types_of(plan, mix, has_imatrix=True) != types_of(plan, mix)}
    assert changed == {"Q4_0", "Q5_0", "IQ3_XXS", "IQ4_XS", "IQ4_NL"}


@pytest.mark.parametrize("mix", ["F32", "F16", "BF16"])
def test_plain_types_leave_vectors_and_routers_f32(mix: str, sources: dict[str, Path], tmp_path: Path) -> None:
    plan = plan_for(sources["deepseek"], tmp_path)
    for target, type_ in zip(plan.targets, choose_types(plan.targets, plan.metadata, mix), strict=True):
        kept = len(target.shape) == 1 or "ffn_gate_inp" in target.name
        assert type_ == ("F32" if kept else mix)


def test_overrides_win_in_their_order(sources: dict[str, Path], tmp_path: Path) -> None:
    plan = plan_for(sources["deepseek"], tmp_path)
    overrides = [parse_override(r"blk\.1\.ffn_up_exps=q6_k"), parse_override(r"ffn_(up|gate)_exps=Q4_0")]
    overrides.append(parse_override("attn_k_b=F16"))
    types = dict(
        zip([t.name for t in plan.targets], choose_types(plan.targets, plan.metadata, "Q4_K_M", overrides), strict=True)
    )
    assert types["blk.1.ffn_up_exps.weight"] == "Q6_K"
    assert types["blk.2.ffn_up_exps.weight"] == types["blk.1.ffn_gate_exps.weight"] == "Q4_0"
    assert types["blk.2.attn_k_b.weight"] == "F16"
    assert types["blk.0.attn_norm.weight"] == "F32"


def test_no_override_makes_k_b_and_v_b_less_than_q8_0(sources: dict[str, Path], tmp_path: Path) -> None:
    options = Options(mix="Q4_0", overrides=[parse_override("attn_=Q4_1")])
    plan = make_plan(sources["deepseek"], tmp_path / "x.gguf", options)
    types = {target.name: type_ for target, type_ in zip(plan.targets, plan.types, strict=True)}
    assert types["blk.2.attn_k_b.weight"] == types["blk.2.attn_v_b.weight"] == "Q8_0"
    assert types["blk.2.attn_output.weight"] == "Q4_1"
    assert "attn_k_b and attn_v_b get at least Q8_0, whatever --tensor-type says" in plan.warnings


def test_an_override_that_rows_do_not_fit_falls_back_as_llama_cpps(sources: dict[str, Path], tmp_path: Path) -> None:
    """tensor_type_fallback comes after the overrides there, too."""
    options = Options(mix="Q8_0", overrides=[parse_override("down_exps=Q4_K")])
    plan = make_plan(sources["deepseek"], tmp_path / "x.gguf", options)
    types = {target.name: type_ for target, type_ in zip(plan.targets, plan.types, strict=True)}
    assert types["blk.2.ffn_down_exps.weight"] == "Q5_0"
    assert plan.warnings == [
        "--tensor-type 'down_exps=Q4_K': rows of 'blk.1.ffn_down_exps.weight' and of 14 more are 32 weights, no whole "
        "Q4_K blocks: Q5_0 instead"
    ]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("x", "expected REGEX=TYPE"),
        ("a=Q9_K", "expected REGEX=TYPE, TYPE one of"),
        ("(=Q8_0", "no regular expression"),
        ("nothing_like_that=Q8_0", "matches no tensor"),
        ("down_exps=Q8_K", "expected REGEX=TYPE"),
    ],
)
def test_a_wrong_override_is_refused(override: str, expected: str, sources: dict[str, Path], tmp_path: Path) -> None:
    plan = plan_for(sources["deepseek"], tmp_path)
    with pytest.raises(LocalrunError, match=re.escape(expected)):
        choose_types(plan.targets, plan.metadata, "Q4_K_M", [parse_override(override)])


def test_names_of_mixes() -> None:
    assert parse_mix("q4_k_m") == "Q4_K_M"
    assert parse_mix("Q4_K") == "Q4_K_M"
    with pytest.raises(LocalrunError, match="unknown type 'Q9'; expected one of F32, F16"):
        parse_mix("Q9")


def test_the_file_type_is_llama_cpps_number() -> None:
    names = {"F32": "ALL_F32"}
    for mix, (number, *_) in MIXES.items():
        assert gguf.LlamaFileType[names.get(mix, f"MOSTLY_{mix}")] == number


# --- what cannot be packed, or only badly


def refusal(source: Path, folder: Path, **options: Any) -> str:
    """The one line that make_plan refuses with."""
    with pytest.raises(LocalrunError) as caught:
        make_plan(source, folder / "x.gguf", Options(**options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def imatrix_of(plan: Plan, path: Path, but: str = "nothing") -> Path:
    """Importances of 1 for all matrices of layers whose names do not match."""
    targets = [t for t in plan.targets if len(t.shape) > 1 and t.name.startswith("blk.") and not re.search(but, t.name)]
    sums = {t.name: np.ones((t.n_rows // t.shape[-2], t.n_cols)) for t in targets}
    return write_imatrix(path, sums, {name: np.ones((len(values), 1)) for name, values in sums.items()})


def test_what_nothing_packs_is_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    text = refusal(sources["llama"], tmp_path, mix="Q8_0", overrides=[parse_override("ffn_down=NVFP4")])
    assert text.startswith("'blk.0.ffn_down.weight' would be NVFP4, which cannot be packed here; expected one of F32,")


def test_what_is_garbage_without_importances_is_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    """As llama.cpp's "this quantization requires an imatrix!" and "Missing importance matrix for tensor"."""
    text = refusal(sources["llama"], tmp_path, mix="Q2_K_S")
    assert text.startswith("'blk.0.attn_q.weight' would be Q2_K, which needs an importance matrix: --imatrix FILE")
    plan = plan_for(sources["llama"], tmp_path)
    lacking = imatrix_of(plan, tmp_path / "lacking.gguf", but=r"blk\.7\.ffn_up")
    text = refusal(sources["llama"], tmp_path, mix="Q2_K_S", imatrix=lacking)
    assert text.startswith(f"{lacking}: has no importances for 'blk.7.ffn_up.weight', which Q2_K needs")
    other_type = [parse_override("ffn_up=Q4_K")]
    make_plan(sources["llama"], tmp_path / "x.gguf", Options(mix="Q2_K_S", imatrix=lacking, overrides=other_type))
    make_plan(sources["llama"], tmp_path / "x.gguf", Options(mix="Q2_K"))  # Q2_K needs none elsewhere


@pytest.mark.parametrize("mix", QUANTIZED)
def test_llama_cpp_refuses_the_same_mixes_without_an_imatrix(mix: str, sources: dict[str, Path]) -> None:
    """Of a model whose rows all are whole blocks; its list is in tensor_requires_imatrix."""
    plan = make_plan(sources["llama"], Path("x.gguf"), Options(mix="Q8_0"))
    types = choose_types(plan.targets, plan.metadata, mix)
    needing = {type_ for t, type_ in zip(plan.targets, types, strict=True) if needs_importances(t.name, type_, mix)}
    assert bool(needing) == needs_imatrix(mix)
    assert needs_imatrix(mix) == (mix in REFUSED)


# By llama.cpp, of such a model: of fewer layers, or the runs would take seconds each.
REFUSED = {"Q2_K_S", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS"}


@pytest.mark.slow
@pytest.mark.parametrize("mix", QUANTIZED)
def test_the_refused_mixes_are_llama_cpps(mix: str, tmp_path: Path) -> None:
    source = tiny_models.shared(tiny_models.Llama(**_SMALL_LLAMA | {"num_hidden_layers": 2}), type="F16")
    if mix in REFUSED:
        with pytest.raises(llama_quantize.QuantizeError, match=r"requires an (importance matrix|imatrix)"):
            llama_quantize.quantize(source, tmp_path / "x.gguf", mix)
    else:
        llama_quantize.quantize(source, tmp_path / "x.gguf", mix)


def test_a_mix_file_says_the_types_and_the_file_type(sources: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "my.mix").write_text("base Q6_K\nffn_ Q3_K\n")
    plan = make_plan(sources["llama"], tmp_path / "x.gguf", Options(mix_file=tmp_path / "my.mix"))
    types = {target.name: type_ for target, type_ in zip(plan.targets, plan.types, strict=True)}
    assert (types["blk.3.ffn_up.weight"], types["blk.3.attn_q.weight"]) == ("Q3_K", "Q6_K")
    assert plan.mix == "Q6_K" and plan.metadata.get("general.file_type") == MIXES["Q6_K"].number
    text = refusal(sources["llama"], tmp_path, mix="Q4_K_M", mix_file=tmp_path / "my.mix")
    assert text == f"{tmp_path / 'my.mix'}: says base Q6_K; leave out --type Q4_K_M"
    (tmp_path / "all.mix").write_text("ffn_ Q3_K\n. Q6_K\n")
    overrides = [parse_override("ffn_down=Q2_K")]  # the command line comes first
    plan = make_plan(sources["llama"], tmp_path / "x.gguf", Options(mix_file=tmp_path / "all.mix", overrides=overrides))
    assert plan.mix is None and plan.metadata.get("general.file_type") == MIXES["Q3_K_M"].number
    types = {target.name: type_ for target, type_ in zip(plan.targets, plan.types, strict=True)}
    assert (types["blk.3.ffn_up.weight"], types["blk.3.ffn_down.weight"]) == ("Q3_K", "Q2_K")
