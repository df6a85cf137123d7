"""Options of ranks become a Sharing, and a file of counts goes to who has a use for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny_models

from cli.model import _start_ranks
from cli.options import LoadOptions, MessageChoice, RankOptions, ShareChoice
from localrun.cpu import repack
from localrun.errors import LocalrunError
from localrun.ranks import start
from localrun.ranks.sharing import Ranks, Sharing

COUNTS = Path("counts.gguf")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, Sharing("bf16", share="auto", usage=str(COUNTS))),
        ({"rank_share": ShareChoice.slices}, Sharing("bf16")),
        ({"rank_messages": MessageChoice.fp8, "rank_sizes": "2,1.5"}, Sharing("fp8", (2.0, 1.5), "auto", str(COUNTS))),
        ({"rank_sizes": "auto", "rank_share": ShareChoice.slices}, Sharing(by_speed=True)),
        (
            {"rank_share": ShareChoice.experts, "rank_copies": 3},
            Sharing("bf16", (), "experts", str(COUNTS), 3),
        ),
    ],
)
def test_options_are_a_sharing(options: dict[str, Any], expected: Sharing, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def started(path: Path, places: list, sharing: Sharing, threads: int | None) -> Iterator[Ranks]:
        yield Ranks(None, sharing)

    monkeypatch.setattr(start, "sharing_ranks", started)
    with ExitStack() as stack:
        load = LoadOptions(expert_usage=COUNTS, threads=1)
        ranks, threads = _start_ranks(stack, Path("model.gguf"), RankOptions(ranks="2", **options), load)
    assert (ranks.sharing, threads) == (expected, 1)


@pytest.mark.parametrize(("why", "expected"), [("", True), ("no gain here", False)])
def test_slices_are_laid_out_anew_where_that_pays(
    why: str, expected: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @contextmanager
    def started(path: Path, places: list, sharing: Sharing, threads: int | None) -> Iterator[Ranks]:
        yield Ranks(None, sharing)

    monkeypatch.setattr(start, "sharing_ranks", started)
    monkeypatch.setattr(repack, "no_gain", lambda: why)
    with ExitStack() as stack:
        load = LoadOptions(repack=True, threads=1)
        ranks, _ = _start_ranks(stack, tiny_models.shared("v3"), RankOptions(ranks="2"), load)
    assert ranks.sharing.repack is expected
    said = capsys.readouterr().err
    assert why in said and said.count("--repack has no effect") == (not expected)


def test_sizes_that_are_no_numbers() -> None:
    with ExitStack() as stack, pytest.raises(LocalrunError, match="--rank-sizes 1,x: expected auto, or numbers"):
        _start_ranks(stack, Path("model.gguf"), RankOptions(ranks="2", rank_sizes="1,x"), LoadOptions())
