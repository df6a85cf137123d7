"""Perplexity: the procedure on a model whose probabilities are known by hand, and the softmax against torch's."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from localrun.errors import LocalrunError
from localrun.measure.perplexity import negative_log_probabilities, perplexity


class Tokenizer:
    def __init__(self, add_bos: bool) -> None:
        self.add_bos, self.bos_id = add_bos, 9


class Model:
    """Ten words, each after each with probability 1/10, but 2 after 1 with 1/2; records the chunks it is given."""

    def __init__(self, add_bos: bool = False, fault: float | None = None) -> None:
        self.tokenizer, self.fault = Tokenizer(add_bos), fault
        self.chunks: list[list[int]] = []

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        self.chunks.append(list(ids))
        logits = np.zeros((len(ids), 10), np.float32)
        logits[np.array(ids) == 1, 2] = math.log(9)  # after a 1, a 2 has 9/18, any other 1/18
        if self.fault is not None:
            logits[:, 0] = self.fault
        return logits


def test_the_procedure_by_hand() -> None:
    """Chunks of 6, counted from position 3 on: the predictions of tokens 4 and 5 from 3 and 4."""
    model = Model()
    ids = [0, 0, 0, 1, 2, 5, 0, 0, 0, 5, 1, 3, 7, 7, 7, 7]  # the last four are no whole chunk
    seen: list[tuple[int, int, float]] = []
    result = perplexity(model, ids, 6, progress=lambda *facts: seen.append(facts))  # type: ignore[arg-type]
    assert model.chunks == [ids[:6], ids[6:12]]
    losses = [math.log(2), math.log(10), math.log(10), math.log(18)]  # 1 -> 2, 2 -> 5; 5 -> 1, 1 -> 3
    mean = sum(losses) / 4
    assert result.running == pytest.approx([math.sqrt(20), math.exp(mean)], rel=1e-7)  # logits are float32
    assert result.ppl == result.running[-1]
    variance = sum(loss**2 for loss in losses) / 4 - mean**2
    assert result.error == pytest.approx(math.sqrt(variance / 3) * math.exp(mean), rel=1e-6)
    assert (result.n_ctx, result.n_tokens, result.n_counted) == (6, 12, 4)
    assert seen == [(1, 2, result.running[0]), (2, 2, result.running[1])]


def test_odd_chunks_count_as_llama_cpp_does() -> None:
    """n_ctx - n_ctx // 2 - 1 predictions: with 7 those from positions 3, 4 and 5."""
    assert perplexity(Model(), [0] * 14, 7).n_counted == 2 * 3  # type: ignore[arg-type]


def test_bos_replaces_the_first_token_of_every_chunk() -> None:
    model = Model(add_bos=True)
    ids = list(range(8)) + [8] * 8
    perplexity(model, ids, 8)  # type: ignore[arg-type]
    assert model.chunks == [[9, *range(1, 8)], [9] + [8] * 7]
    assert ids[0] == 0  # the caller's list is as it was


def test_fewer_chunks() -> None:
    model = Model()
    result = perplexity(model, [0] * 40, 8, 3)  # type: ignore[arg-type]
    assert len(model.chunks) == len(result.running) == 3


@pytest.mark.parametrize(
    ("n_ids", "n_ctx", "n_chunks", "message"),
    [
        (15, 8, None, "15 tokens; chunks of 8 need at least 16"),
        (16, 3, None, "chunks of 3 tokens; expected 4 or more"),
        (16, -8, None, "chunks of -8 tokens"),
        (16, 8, 0, "0 chunks; expected 1 or more"),
    ],
)
def test_refused(n_ids: int, n_ctx: int, n_chunks: int | None, message: str) -> None:
    with pytest.raises(LocalrunError, match=message):
        perplexity(Model(), [0] * n_ids, n_ctx, n_chunks)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("error")  # of NumPy: they would be lines on stderr
@pytest.mark.parametrize("fault", [math.nan, math.inf, -1e4])
def test_senseless_logits(fault: float) -> None:
    with pytest.raises(LocalrunError, match=r"chunk 1 of 2: .* make no sense"):
        perplexity(Model(fault=fault), [0] * 16, 8)  # type: ignore[arg-type]


def test_log_softmax_against_torch() -> None:
    """100 rows are several blocks; logits as large as 1e4 would overflow a naive exp."""
    generator = np.random.default_rng(0)
    logits = (
        generator.standard_normal((100, 1000)) * np.array([1, 30, 3000])[generator.integers(3, size=(100, 1))]
    ).astype(np.float32)
    targets = generator.integers(1000, size=100)
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits).double(), torch.from_numpy(targets), reduction="none"
    )
    found = negative_log_probabilities(logits, targets.tolist())
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-12, atol=1e-12)  # both float64, other summing order
