"""What models on a device multiply with, and a card for the engine to find."""

from __future__ import annotations

import pytest


@pytest.fixture
def dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices on the device are dense float32 ones; the other kernels are what they are."""
    from gpu_dense import use_dense

    use_dense(monkeypatch)


@pytest.fixture
def in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels on the device are torch's, too."""
    from gpu_torch import use_torch

    use_torch(monkeypatch)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rings have 8 rows more than a window: drafts can be taken back, and tokens of these tests go round."""
    from localrun.models import config

    monkeypatch.setattr(config, "WINDOW_SPARE", 8)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that is the stand-in where there is none."""
    from gpu_device import HAS_GPU
    from gpu_models import CARD

    from localrun.gpu import hybrid
    from localrun.gpu.device import StandIn
    from localrun.placement import available

    if not HAS_GPU:
        monkeypatch.setattr(available, "find", lambda *at: CARD)
        monkeypatch.setattr(hybrid, "Cuda", StandIn)
