"""Mixes written down: what a file means, what it must not say, and the lines that inspect --mix makes of a model."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import SCRIPTS

from localrun.convert.layout import tensor_bytes
from localrun.convert.mixes import PLAIN, choose_types, file_type, mix_lines, notes_on, read_mix_file
from localrun.convert.mixes.written import numbers_pattern
from localrun.convert.targets import Target
from localrun.errors import LocalrunError
from localrun.plan.shapes import Conversion, load_model


def mix_file(folder: Path, text: str) -> Path:
    path = folder / "my.mix"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def lite() -> Conversion:
    return load_model("deepseek-v2-lite").conversion


def types_by(path: Path, model: Conversion, mix: str | None = None) -> dict[str, str]:
    written = read_mix_file(path)
    types = choose_types(model.targets, model.metadata, mix or written.base, written.overrides)
    return {target.name: type_ for target, type_ in zip(model.targets, types, strict=True)}


def test_the_first_line_that_matches_counts(lite: Conversion, tmp_path: Path) -> None:
    lines = [
        "\ufeff# comment",
        "",
        r"  blk\.1\.ffn_up_exps  iq2_xxs # why",
        "ffn_(up|gate)_exps=Q3_K",
        "base q4_k",
        "ffn_down_exps Q8_0",
    ]
    types = types_by(mix_file(tmp_path, "\n".join(lines)), lite)
    assert types["blk.1.ffn_up_exps.weight"] == "IQ2_XXS"
    assert types["blk.1.ffn_gate_exps.weight"] == types["blk.11.ffn_up_exps.weight"] == "Q3_K"
    base = dict(zip([target.name for target in lite.targets], lite.types("Q4_K_M"), strict=True))
    assert types == base | {name: type_ for name, type_ in types.items() if "_exps" in name}


def test_without_a_base_lines_have_to_say_everything(lite: Conversion, tmp_path: Path) -> None:
    path = mix_file(tmp_path, "ffn_ Q4_0")
    with pytest.raises(LocalrunError, match=r"--mix: no line matches 'token_embd.weight'"):
        types_by(path, lite)
    assert types_by(path, lite, "Q8_0")["token_embd.weight"] == "Q8_0"
    types = types_by(mix_file(tmp_path, "ffn_ Q4_0\n. Q5_0"), lite)
    assert (types["token_embd.weight"], types["blk.0.ffn_up.weight"], types["output_norm.weight"]) == (
        *("Q5_0", "Q4_0"),
        "F32",
    )


def test_what_is_no_matrix_changes_only_by_a_line_of_its_own(lite: Conversion, tmp_path: Path) -> None:
    types = types_by(mix_file(tmp_path, "blk\\.2\\. BF16\nffn_gate_inp Q8_0\nattn_norm F16\n. Q4_0"), lite)
    assert (types["blk.2.ffn_gate_inp.weight"], types["blk.2.attn_norm.weight"]) == ("Q8_0", "F16")
    assert (types["blk.2.ffn_norm.weight"], types["blk.2.ffn_up_exps.weight"]) == ("F32", "BF16")


def test_rows_that_do_not_fit_get_the_rules_fallback_and_a_note(lite: Conversion, tmp_path: Path) -> None:
    written = read_mix_file(mix_file(tmp_path, "ffn_down_exps Q2_K\nattn_k_b Q4_0\n. Q4_K"))
    types = types_by(written.path, lite)
    assert types["blk.1.ffn_down_exps.weight"] == "Q4_0" and types["blk.1.attn_k_b.weight"] == "Q4_0"
    name = tmp_path / "my.mix"
    assert notes_on(lite.targets, written.overrides) == [
        f"{name}: line 3: rows of 'blk.0.ffn_down.weight' are 10944 weights, no whole Q4_K blocks: Q5_0 instead",
        f"{name}: line 1: rows of 'blk.1.ffn_down_exps.weight' and of 25 more are 1408 weights, no whole Q2_K blocks: "
        "Q4_0 instead",
        f"{name}: line 2: attn_k_b and attn_v_b are small and all positions pass through them; Q8_0 is safer",
        f"{name}: line 3: attn_k_b and attn_v_b are small and all positions pass through them; Q8_0 is safer",
    ]


WRONG = {
    "no type": ("ffn_down", "line 1: is 'ffn_down'; expected REGEX TYPE, TYPE one of F32, F16,"),
    "unknown type": ("# x\nffn_down Q9_K", "line 2: is 'ffn_down Q9_K'; expected REGEX TYPE"),
    "activations' type": ("ffn_down Q8_K", "expected REGEX TYPE"),
    "no regex": ("ffn_(down Q4_K", "line 1: no regular expression: missing )"),
    "no pattern": ("=Q4_K", "line 1: is '=Q4_K'"),
    "huge repeat": ("a{99999999999999999999} Q4_K", "line 1: no regular expression"),
    "unknown base": ("base Q9\n. Q4_0", "line 1: unknown type 'Q9'; expected one of"),
    "two bases": ("base Q2_K\nbase Q4_K\n. Q4_0", "line 2: names another base"),
    "nothing": ("# only this\nbase Q4_K", "names no types"),
    "of no effect": (". Q4_0\nffn_up Q4_K", "line 2: matches no tensor (or an earlier one did)"),
    "no such tensor": ("ffn_side Q4_K\n. Q4_0", "line 1: matches no tensor"),
    "vector": ("ffn_norm Q4_K\n. Q4_0", "line 1: 'blk.0.ffn_norm.weight' is a vector; expected one of F32, F16, BF16"),
}


@pytest.mark.parametrize(("text", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_file_is_one_line(text: str, message: str, lite: Conversion, tmp_path: Path) -> None:
    path = mix_file(tmp_path, text)
    with pytest.raises(LocalrunError, match=re.escape(message)) as caught:
        types_by(path, lite)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\xff\xfe")
    with pytest.raises(LocalrunError, match="is not UTF-8 text"):
        read_mix_file(tmp_path / "x")
    with pytest.raises(LocalrunError, match="none: cannot be read: No such file"):
        read_mix_file(tmp_path / "none")


# --- the mix of a file


@dataclass(frozen=True)
class Tensor:
    name: str
    shape: tuple[int, ...]


def written_and_read(tensors: list[Tensor], types: list[str], folder: Path) -> list[str]:
    """The types that the lines give to the same tensors."""
    targets = [Target(tensor.name, tensor.shape, "F32") for tensor in tensors]
    lines = mix_lines(tensors, types)
    if not lines:
        return ["F32"] * len(targets)
    path = mix_file(folder, "\n".join(f"{line.pattern} {line.type}" for line in lines))
    overrides = read_mix_file(path).overrides
    assert len(overrides) == len(lines) and sum(line.n_tensors for line in lines) <= len(tensors)
    return choose_types(targets, _ANY, None, overrides)


_ANY = load_model("deepseek-v2-lite").conversion.metadata
_WORDS = st.sampled_from(
    ["attn", "q", "ffn", "up", "down", "exps", "gate_inp", "norm", "weight", "bias", "#", "é ", "("]
)
_NAMES = st.tuples(
    st.sampled_from(["", "blk.{}.", "blk.{}.", "blk.{}.", "blk.0{}.", "v.blk.{}.", "blk.{}"]),
    st.integers(0, 130),
    st.lists(_WORDS, min_size=1, max_size=4),
    st.sampled_from([".", "_"]),
).map(lambda parts: parts[0].format(parts[1]) + parts[3].join(parts[2]))
_SHAPES = st.sampled_from([(256,), (4, 256), (4, 256), (2, 4, 256), (1, 256)])
_MATRIX_TYPES = ["F32", "BF16", "Q4_K", "Q2_K", "IQ2_XXS", "Q8_0"]


@given(st.dictionaries(_NAMES, st.tuples(_SHAPES, st.sampled_from(_MATRIX_TYPES)), max_size=40))
@settings(max_examples=80)
def test_lines_give_back_any_types_of_any_names(model: dict[str, tuple[tuple[int, ...], str]]) -> None:
    tensors = [Tensor(name, shape) for name, (shape, _) in model.items()]
    types = [type_ if len(shape) > 1 or type_ in PLAIN else "F16" for shape, type_ in model.values()]
    with tempfile.TemporaryDirectory() as folder:
        assert written_and_read(tensors, types, Path(folder)) == types


@given(st.data())
@settings(max_examples=20)
def test_lines_give_back_any_types_of_a_deep_model(data: st.DataObject) -> None:
    """61 layers of a few kinds, some of whose types change from layer to layer."""
    tensors, types = [Tensor("token_embd.weight", (64, 256))], ["Q4_K"]
    for kind in ("attn_q.weight", "ffn_up_exps.weight", "ffn_down_exps.weight", "ffn_gate_inp.weight"):
        chosen = data.draw(st.lists(st.sampled_from(_MATRIX_TYPES), min_size=1, max_size=3))
        of_layer = data.draw(st.lists(st.sampled_from(chosen), min_size=61, max_size=61))
        tensors += [Tensor(f"blk.{layer}.{kind}", (4, 256)) for layer in range(61)]
        types += of_layer
    with tempfile.TemporaryDirectory() as folder:
        assert written_and_read(tensors, types, Path(folder)) == types


@given(st.sets(st.integers(0, 1200), min_size=1, max_size=60))
def test_numbers_as_a_pattern(numbers: set[int]) -> None:
    pattern = re.compile(numbers_pattern(numbers))
    assert {number for number in range(1300) if pattern.fullmatch(str(number))} == numbers


def test_a_pattern_is_short() -> None:
    assert numbers_pattern(range(3, 61)) == "[3-9]|[1-5][0-9]|60"
    assert numbers_pattern([7]) == "7" and numbers_pattern([1, 2, 11, 12, 21, 22]) == "[12]|[12][12]"


def joined_kv_b(model: Conversion) -> list[Target]:
    """The model's tensors as they were before April 2025, without the layer for multi-token prediction."""
    targets = []
    for target in model.targets:
        if target.name.startswith("blk.61.") or "attn_v_b" in target.name:
            continue
        if "attn_k_b" in target.name:
            heads, rank = target.shape[0], target.shape[1]
            targets.append(Target(target.name.replace("attn_k_b", "attn_kv_b"), (heads * 256, rank), "BF16"))
        else:
            targets.append(target)
    return targets


@pytest.mark.parametrize(
    ("name", "counts", "gib", "number"),
    [
        ("ud-q2_k_xl", {"F32": 361, "Q2_K": 171, "Q3_K": 3, "Q4_K": 306, "Q6_K": 184}, 211.0, 10),
        ("ud-iq2_xxs", {"F32": 361, "IQ2_XXS": 116, "Q3_K": 55, "Q4_K": 193, "Q5_K": 116, "Q6_K": 184}, 203.6, 19),
    ],
)
def test_published_mixes_of_v3_have_the_published_counts(
    name: str, counts: dict[str, int], gib: float, number: int, tmp_path: Path
) -> None:
    """Also the size, where it is known (203.6 GiB); and few lines say the same again."""
    model = load_model("deepseek-v3").conversion
    targets, written = joined_kv_b(model), read_mix_file(SCRIPTS / "mixes" / f"{name}.mix")
    types = choose_types(targets, model.metadata, written.base, written.overrides)
    assert Counter(types) == counts
    assert sum(map(tensor_bytes, targets, types)) / 2**30 == pytest.approx(gib, abs=0.05)
    assert file_type(None, targets, types) == number
    assert notes_on(targets, written.overrides) == []
    tensors = [Tensor(target.name, target.shape) for target in targets]
    assert len(mix_lines(tensors, types)) <= len(written.overrides)
    assert written_and_read(tensors, types, tmp_path) == types
