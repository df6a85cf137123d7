"""A lost device, errors on either side and while loading: an error, no tokens, no thread that stays."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
from closeness import error
from gpu_device import HAS_GPU
from gpu_models import (
    CTX,
    MTP,
    STEP_TOLERANCE,
    exact_logits,
    ids_of,
    opened,
    two_batches,
)

from localrun.errors import LocalrunError
from localrun.gpu import hybrid
from localrun.gpu.device import StandIn
from quant.ops import experts as quant_experts


class Failing(StandIn):
    """A device that is lost when something waits for it, once `good` waits are over."""

    def __init__(self) -> None:
        super().__init__()
        self.good = 1 << 30

    def _wait(self) -> None:
        self.good -= 1
        if self.good < 0:
            raise LocalrunError("the GPU failed: CUDA error: unspecified launch failure")

    def mark(self) -> Callable[[], None]:
        return self._wait

    def synchronize(self, progress: Callable[[], int] | None = None) -> None:
        self._wait()


@pytest.mark.skipif(HAS_GPU, reason="kernels are not interpreted, so the stand-in has none")
@pytest.mark.usefixtures("dense")
@pytest.mark.parametrize("n_tokens", [2, 9])
def test_a_lost_device_is_an_error_and_no_tokens(n_tokens: int) -> None:
    device, ids = Failing(), ids_of(12)
    with opened(device=device) as (model, native):
        two_batches(model)
        cache, expected = model.new_cache(CTX), exact_logits(native, ids)
        model.forward(ids[:3], cache)
        device.good = 0
        with pytest.raises(LocalrunError, match="the GPU failed"):
            model.forward(ids[3 : 3 + n_tokens], cache)
        assert cache.length == 3
        device.good = 1 << 30
        assert error(model.forward(ids[3 : 3 + n_tokens], cache), expected[2 + n_tokens][None]) < STEP_TOLERANCE


@pytest.mark.skipif(HAS_GPU, reason="kernels are not interpreted, so the stand-in has none")
@pytest.mark.usefixtures("dense")
def test_workers_that_may_never_come_back_are_not_waited_for() -> None:
    device = StandIn()
    with opened(device=device) as (model, _):
        device.is_stuck = True
        model.close()
        assert all(thread.is_alive() for thread in model.pool._threads)
        device.is_stuck = False


@pytest.mark.usefixtures("dense")
@pytest.mark.parametrize("raised", [MemoryError("no room for the experts' sums"), KeyboardInterrupt()], ids=type)
def test_an_error_on_the_cpu_is_an_error_and_no_tokens(raised: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise raised

    ids = ids_of(12)
    with opened() as (model, native):
        cache = model.new_cache(CTX)
        model.forward(ids[:3], cache)
        with monkeypatch.context() as patch:
            patch.setattr(quant_experts, "run", fail)
            with pytest.raises(type(raised)):
                model.forward(ids[3:], cache)
        assert cache.length == 3
        assert error(model.forward(ids[3:], cache), exact_logits(native, ids)[-1:]) < STEP_TOLERANCE


@pytest.mark.usefixtures("dense")
def test_closing_ends_all_threads() -> None:
    before = set(threading.enumerate())
    with opened(MTP) as (model, _):
        model.forward(ids_of(9), model.new_cache(CTX))
        model.mtp.forward(ids_of(40), np.zeros((40, 64), np.float32), model.mtp.new_cache(CTX))
        assert len(threading.enumerate()) > len(before)
    assert set(threading.enumerate()) <= before


def test_an_error_while_loading_ends_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hybrid, "DecodeStep", lambda *arguments: pytest.fail("no room"))
    before = set(threading.enumerate())
    with pytest.raises(pytest.fail.Exception, match="no room"), opened():
        pass
    assert set(threading.enumerate()) <= before
