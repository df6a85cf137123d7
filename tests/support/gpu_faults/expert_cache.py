"""Faults of VRAM as a cache of experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gpu_faults.fault import OFF, Fault

if TYPE_CHECKING:
    import pytest


def _cache(**methods: Callable[..., Any]):
    """A fault of the cache: these methods in place of its own, each called with its own one first."""

    def install(patch: pytest.MonkeyPatch) -> None:
        from localrun.gpu.experts.cache import ExpertCache

        for name, method in methods.items():
            own = getattr(ExpertCache, name)
            patch.setattr(ExpertCache, name, lambda self, *more, own=own, method=method: method(own, self, *more))

    return install


def _late_table(own: Any, self: Any) -> Callable[[], None]:
    """Only the first one is written: slots are written over while the table still names what was there."""
    if not self.__dict__.get("has_table"):
        self.has_table = True
        return own(self)
    return lambda: None


def _waits(own: Any, self: Any, n_tokens: int) -> None:
    own(self, n_tokens)
    self.wait()


def _fails(own: Any, self: Any, *swap: Any) -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def _too_early(patch: pytest.MonkeyPatch) -> None:
    """The table names experts that are still coming."""
    from localrun.gpu.experts.policy import Policy

    swaps = Policy.swaps

    def found(self: Policy, most: int) -> Any:
        coming = swaps(self, most)
        self._coming_LN[:] = False
        return coming

    patch.setattr(Policy, "swaps", found)


def _half_copied(patch: pytest.MonkeyPatch) -> None:
    from localrun.gpu.experts import cache

    class Half(cache.Uploader):
        def copy(self, source: Any, destination: Any) -> None:
            half = len(source) // 2
            super().copy(source[:half], destination[:half])

    patch.setattr(cache, "Uploader", Half)


def _kept_table(patch: pytest.MonkeyPatch) -> Callable[[int], Any]:
    """A recorded step keeps the table that it was recorded with."""
    from localrun.gpu.device import StandIn
    from localrun.gpu.experts.cache import ExpertCache

    made: list[Any] = []
    init = ExpertCache.__init__

    def noted(self: Any, *arguments: Any) -> None:
        init(self, *arguments)
        made.append(self._table)

    class Faulty(StandIn):
        def capture(self, step: Callable[[], None]) -> Callable[[], None]:
            tables = [(table, table.clone()) for table in made]

            def replay() -> None:
                now = [table.clone() for table, _ in tables]
                for table, kept in tables:
                    table.copy_(kept)
                step()
                for (table, _), new in zip(tables, now, strict=True):
                    table.copy_(new)

            return replay

    patch.setattr(ExpertCache, "__init__", noted)
    return Faulty


def _on_both_sides(patch: pytest.MonkeyPatch) -> None:
    """The workers compute what lies in VRAM, too."""
    from localrun.gpu.experts import routed

    patch.setattr(routed._Others, "begin", lambda self, *inputs: self._experts.begin(*inputs))


_NOT_THERE = r": expert \d of layer 1 is not what its slot in VRAM holds"
FAULTS = (
    Fault("a table of experts that is written too late", "expert_cache", rf"6 replays of .*{_NOT_THERE}",
          _cache(_write_table=_late_table)),
    Fault("an expert that is used before it has come", "expert_cache", rf".*{_NOT_THERE}", _too_early),
    Fault("half an expert", "expert_cache", rf"6 replays of .*{_NOT_THERE}", _half_copied),
    Fault("a recorded step with a table of its own", "expert_cache", "6 replays of .*: other bits than launched .*",
          _kept_table),
    Fault("an expert on both sides", "expert_cache", rf"layer 1 .*{OFF}", _on_both_sides),
    Fault("steps that wait for experts to come", "expert_cache",
          "steps while copies of experts are held up: one has waited for them", _cache(settle=_waits)),
    Fault("copies of experts that fail", "expert_cache",
          "no expert has come to VRAM|an expert could not be copied .*illegal memory access.*", _cache(_copy=_fails)),
)  # fmt: skip
