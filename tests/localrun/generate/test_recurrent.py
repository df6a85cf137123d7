"""Recurrent networks, which llama.cpp runs: their state can't forget single tokens."""

from pathlib import Path

import gguf
import numpy as np
import pytest

import localrun

HIDDEN, INNER, STATE, CONVOLUTION, RANK, VOCABULARY, LAYERS = 32, 64, 16, 4, 8, 64, 2
GREEDY = localrun.Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def mamba(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mamba of random weights. Tensors and keys: llama.cpp 3f545becc, src/models/mamba.cpp."""
    path = tmp_path_factory.mktemp("mamba") / "mamba.gguf"
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_string("tokenizer.ggml.model", "none")
    counts = {
        "vocab_size": VOCABULARY,
        "context_length": 256,
        "embedding_length": HIDDEN,
        "feed_forward_length": 0,
        "attention.head_count": 0,
        "block_count": LAYERS,
        "ssm.conv_kernel": CONVOLUTION,
        "ssm.inner_size": INNER,
        "ssm.state_size": STATE,
        "ssm.time_step_rank": RANK,
    }
    for key, value in counts.items():
        writer.add_uint32(f"mamba.{key}", value)
    writer.add_float32("mamba.attention.layer_norm_rms_epsilon", 1e-5)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(name, random.standard_normal(shape).astype(np.float32) / 4)

    add("token_embd.weight", VOCABULARY, HIDDEN)
    add("output_norm.weight", HIDDEN)
    for layer in range(LAYERS):
        add(f"blk.{layer}.attn_norm.weight", HIDDEN)
        add(f"blk.{layer}.ssm_in.weight", 2 * INNER, HIDDEN)
        add(f"blk.{layer}.ssm_conv1d.weight", INNER, CONVOLUTION)
        add(f"blk.{layer}.ssm_conv1d.bias", INNER)
        add(f"blk.{layer}.ssm_x.weight", RANK + 2 * STATE, INNER)
        add(f"blk.{layer}.ssm_dt.weight", INNER, RANK)
        add(f"blk.{layer}.ssm_dt.bias", INNER)
        writer.add_tensor(f"blk.{layer}.ssm_a", -np.exp(random.standard_normal((INNER, STATE)).astype(np.float32)))
        add(f"blk.{layer}.ssm_d", INNER)
        add(f"blk.{layer}.ssm_out.weight", HIDDEN, INNER)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_it_generates_without_drafts(mamba: Path) -> None:
    with localrun.load(mamba, threads=1, ctx=64) as model:
        assert model.backend == "llama.cpp" and model.speculative == "off"
        reply = list(model.generate([1, 2, 3], GREEDY, max_tokens=10))
        assert len(reply) == 10 and reply == list(model.generate([1, 2, 3], GREEDY, max_tokens=10))


@pytest.mark.parametrize("setting", [1, 4])
def test_drafts_are_refused(mamba: Path, setting: int) -> None:
    with pytest.raises(localrun.LocalrunError, match=r"mamba\.gguf: its state can't forget single tokens"):
        localrun.load(mamba, threads=1, ctx=64, speculative=setting)


@pytest.mark.parametrize("setting", ["auto", 2])
def test_draft_models_are_refused(mamba: Path, setting: str | int) -> None:
    with pytest.raises(localrun.LocalrunError, match=r"its state can't forget single tokens"):
        localrun.load(mamba, threads=1, ctx=64, speculative=setting, draft=mamba)


def test_a_turn_that_shares_a_beginning_is_evaluated_anew(mamba: Path) -> None:
    with localrun.load(mamba, threads=1, ctx=64) as model:
        session = model.session()
        list(session.tokens([1, 2, 3, 4, 5], GREEDY, max_tokens=4))
        continued = list(session.tokens([1, 2, 3, 9], GREEDY, max_tokens=8))
        assert continued == list(model.generate([1, 2, 3, 9], GREEDY, max_tokens=8))
