"""deepseek4's layer for multi-token prediction, which takes streams and has a file of its own, as in llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny_deepseek4 as tiny
from closeness import error

import localrun
from localrun.engine import Engine
from localrun.errors import LocalrunError
from localrun.gguf.file import open_gguf
from localrun.network.cache import Cache

MODEL = tiny.Deepseek4(compress_ratios=(0, 4), num_hash_layers=1, num_nextn_predict_layers=1)
OF_LAYER, OTHERS = r"blk\.2\.", r"blk\.[01]\."
TOLERANCE = 1e-5  # float32 in another order
ROW_TOLERANCE = 1e-3
TYPES = np.float16, np.float32  # of caches: the step's, and torch's
N_TOKENS = 40  # more than the window's
GREEDY = localrun.Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("mtp")
    alone = tiny.write(folder / "model.gguf", tiny.replace(MODEL, num_nextn_predict_layers=0))
    return alone, tiny.write(folder / "mtp.gguf", MODEL, leave_out=OTHERS)


@pytest.fixture(scope="module")
def engine(files: tuple[Path, Path]) -> Iterator[Engine]:
    with localrun.load(files[0], draft=files[1], speculative=3, device="cpu", threads=2, ctx=128) as engine:
        yield engine


def rms(x: np.ndarray, weight: np.ndarray | float = 1.0) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + MODEL.rms_norm_eps) * weight


def expected(streams: np.ndarray, next_ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Logits and streams of all positions: the layer by transformers, what stands around it from its description."""
    w, nextn = tiny.tensors(MODEL), "blk.2.nextn."
    token = rms(w["token_embd.weight"][next_ids], w[nextn + "enorm.weight"])
    both = np.concatenate([np.repeat(token[:, None], 4, 1), rms(streams, w[nextn + "hnorm.weight"])], -1)
    out = tiny.hf_mtp_layer(MODEL, (both @ w[nextn + "eh_proj.weight"].T).astype(np.float32))
    mixed = rms(out.reshape(len(out), -1)) @ w["output_hc_fn.weight"].T * w["output_hc_scale.weight"]
    pre = 1 / (1 + np.exp(-(mixed + w["output_hc_base.weight"]))) + MODEL.hc_eps
    normed = rms((pre[..., None] * out).sum(1), w[nextn + "shared_head_norm.weight"])
    return normed @ w["output.weight"].T, out.reshape(len(out), -1)


@pytest.mark.slow
def test_the_layer_is_transformers(engine: Engine) -> None:
    """In one go and one by one; the last one's streams go on to the next draft."""
    generator = np.random.default_rng(0)
    streams = generator.standard_normal((N_TOKENS, 4, MODEL.hidden_size), dtype=np.float32)
    ids = tiny.token_ids(N_TOKENS)
    logits, out = expected(streams, ids)
    mtp, flat = engine.model.mtp, streams.reshape(N_TOKENS, -1)
    cache = Cache([engine.config.rows(2)], N_TOKENS, np.float32)
    found, hidden = mtp.forward(ids[:30], flat[:30], cache)
    assert error(found, logits[29:30]) < TOLERANCE and error(hidden, out[29:30]) < TOLERANCE
    rows = [mtp.forward(ids[t : t + 1], flat[t : t + 1], cache)[0] for t in range(30, N_TOKENS)]
    assert error(np.concatenate(rows), logits[30:]) < TOLERANCE


def test_its_step_is_torchs(engine: Engine) -> None:
    """Of a few positions, over rows of 16 bits: where one is rounded apart, by 2^-11 of it."""
    generator = np.random.default_rng(0)
    streams = generator.standard_normal((N_TOKENS, 4 * MODEL.hidden_size), dtype=np.float32)
    ids, caches = tiny.token_ids(N_TOKENS), [Cache([engine.config.rows(2)], N_TOKENS, kind) for kind in TYPES]
    for first in range(0, N_TOKENS, 4):
        some = slice(first, first + 4)
        found, wanted = (engine.model.mtp.forward(ids[some], streams[some], cache) for cache in caches)
        assert error(found[0], wanted[0]) < ROW_TOLERANCE and error(found[1], wanted[1]) < ROW_TOLERANCE


def test_replies_are_the_same_with_its_drafts(engine: Engine) -> None:
    ids = tiny.token_ids(50)
    session = engine.session()
    assert type(session.speculation.draft).__name__ == "MTPDraft"
    found = list(session.tokens(ids, GREEDY, max_tokens=12))
    assert session.stats.drafted_tokens > 10
    assert found == list(engine.session("off").tokens(ids, GREEDY, max_tokens=12))


def test_its_file_counts_as_memory(engine: Engine, files: tuple[Path, Path]) -> None:
    """What it is made of is in RAM, the embedding and the head that it brings along as well."""
    with open_gguf(files[1]) as file:
        expected = sum(tensor.n_bytes for tensor in file.tensors.values())
    assert engine.placement.n_bytes("RAM", "multi-token prediction") == expected > 100_000


def test_another_models_layer_is_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    for change, message in [({"sliding_window": 8}, "sliding_window is 8"), ({"n_routed_experts": 8}, "n_routed_ex")]:
        path = tiny.write(tmp_path / "mtp.gguf", tiny.replace(MODEL, **change), leave_out=OTHERS)
        with pytest.raises(LocalrunError, match=f"another model's: {message}"):
            localrun.load(files[0], draft=path, device="cpu", threads=1, ctx=16)
    path = tiny.write(tmp_path / "mtp.gguf", MODEL, leave_out=OTHERS + r"|blk\.2\.nextn\.enorm")
    with pytest.raises(LocalrunError, match="lacks a part"):
        localrun.load(files[0], draft=path, device="cpu", threads=1, ctx=16)
