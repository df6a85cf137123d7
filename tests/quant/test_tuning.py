"""What is chosen by CPU: where it comes from, what it may be, and that results do not depend on it."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import kernels
import numpy as np
import pytest

from quant.batch import MAX_BATCH
from quant.formats import registry
from quant.formats.interleave import interleave
from quant.gemm import packed
from quant.gemv.plain import with_near
from quant.target import kernel_cache, tuning
from quant.target.kernel import Kernel
from quant.target.tuning import Tuning

N_ROWS = 32


@pytest.fixture(name="kept")
def kept_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a tuning is looked for."""
    monkeypatch.setenv("LOCALRUN_CACHE", str(tmp_path))
    path = tuning.kept_path()
    assert path is not None and path.is_relative_to(tmp_path)
    path.parent.mkdir(parents=True)
    return path


def found() -> tuning.Found:
    return tuning._of_this_cpu.__wrapped__()


def test_a_kept_tuning_counts(kept: Path) -> None:
    before, mine = found(), Tuning(near_one=4096, packed_from=7, interleaving_pays=False)
    assert before.source in ("table", "default")
    kept.write_text(json.dumps({"tuning": tuning.as_json(mine)}))
    assert found() == tuning.Found(mine, "tuned")


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"tuning": 1}', '{"tuning": {"near_one": 1}}', "[" * 100_000, "\0"],
    ids=["empty", "list", "nothing", "number", "one", "deep", "nul"],
)
def test_a_damaged_one_does_not(text: str, kept: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept.write_text(text)
    with caplog.at_level(logging.WARNING):
        assert found().source != "tuned"
    assert f"{kept} is not used" in caplog.text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("near_one", 0), ("near_few", 1 << 17), ("near_interleaved", 1.5), ("packed_from", True)),
        *(("packed_from", -1), ("packed_from_interleaved", 65), ("interleaving_pays", 1), ("near_one", None)),
    ],
)
def test_numbers_beyond_sense_are_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        tuning.read(tuning.as_json(Tuning()) | {name: value})


def test_what_is_compiled_in_names_the_kernels_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def name(chosen: Tuning) -> str:
        monkeypatch.setattr(tuning, "_of_this_cpu", lambda: tuning.Found(chosen, "tuned"))
        return kernel_cache._fingerprint()

    names = {name(replace(Tuning(), **{field: 64})) for field in ("near_one", "near_few", "near_interleaved")}
    assert len({*names, name(Tuning())}) == 4
    assert name(Tuning(packed_from=9)) == name(Tuning())  # that is asked for at run time


def products(gemv: Kernel, gemv_batch: Kernel, data: np.ndarray, q8: np.ndarray, n_cols: int) -> np.ndarray:
    """float32 (1 + MAX_BATCH, N_ROWS): of the first q8 row alone, then of all together."""
    out = np.full((1 + len(q8), N_ROWS), np.nan, np.float32)
    kernels.call(gemv, data, N_ROWS, n_cols, q8[0], out[0])
    tables = [np.array([row.ctypes.data for row in rows], np.int64) for rows in (q8, out[1:])]
    kernels.call(gemv_batch, data, N_ROWS, n_cols, *tables, 0, len(q8))
    return out


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q8_0", "MXFP4", "IQ2_XXS", "F16", "Q4_K_R16", "Q6_K_R16"])
def test_results_are_the_same_to_the_bit_at_every_distance(name: str) -> None:
    random, format_ = np.random.default_rng(7), registry.get(name)
    data = kernels.random_blocks(name.removesuffix("_R16"), (N_ROWS, kernels.COLS), random)
    if format_.rows > 1:
        data = interleave(format_, data.reshape(-1), N_ROWS, data.shape[1])
    x = random.standard_normal((MAX_BATCH, kernels.COLS), np.float32)
    q8 = np.stack([kernels.record(row, format_) for row in x])
    expected = products(format_.gemv, format_.gemv_batch, data, q8, kernels.COLS)
    assert np.isfinite(expected).all()
    for near in (64, 6144, 8192, 60_000):  # the last one behind the end of the weights from the start
        loops = with_near(format_.gemv, near), with_near(format_.gemv_batch, near)
        assert kernels.same_bits(products(*loops, data, q8, kernels.COLS), expected)


def test_when_repacking_begins_is_asked_for_at_run_time() -> None:
    plain, interleaved = registry.get("Q4_K"), registry.get("Q4_K_R16")
    with tuning.using(Tuning(packed_from=3, packed_from_interleaved=9)):
        assert (packed.tokens_from(plain), packed.tokens_from(interleaved)) == (3, 9)
        assert packed.tokens_from(plain, interleaved) == 3
    assert tuning.current() == tuning.found().tuning
