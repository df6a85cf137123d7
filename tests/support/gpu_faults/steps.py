"""Faults of recorded steps: streams that do not wait, stale graphs, other contexts' caches and positions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from gpu_faults.fault import OFF, Fault

if TYPE_CHECKING:
    import pytest


def _of(**methods: Callable[..., Any]):
    """A device with these methods in place of the stand-in's; each is called with it first."""

    def install(patch: pytest.MonkeyPatch) -> Callable[[int], Any]:
        from localrun.gpu.device import StandIn

        return type("Faulty", (StandIn,), methods)

    return install


def _second(**methods: Callable[..., Any]):
    """The same of the second card alone."""

    def install(patch: pytest.MonkeyPatch) -> Callable[[int], Any]:
        from localrun.gpu.device import StandIn

        return lambda card: (type("Faulty", (StandIn,), methods) if card else StandIn)(card)

    return install


def _too_soon(patch: pytest.MonkeyPatch) -> None:
    """A card begins with what the one before has given in the step before."""
    from localrun.gpu.decode import DecodeStep

    given, kept = DecodeStep._from_before, {}

    def stale(self: Any, index: int, n_tokens: int) -> Any:
        now = given(self, index, n_tokens)
        before, kept[n_tokens] = kept.get(n_tokens, now * 0), now
        return before

    patch.setattr(DecodeStep, "_from_before", stale)


def _late_node(self: Any, function: int, argument: int) -> None:
    """Nobody waits for the workers: a node is called when the next one is due. Until then memory may hold anything."""
    from localrun.gpu.device import StandIn

    for before in self.__dict__.setdefault("waiting", []):
        StandIn.call(self, *before)
    self.waiting[:] = [(function, argument)]


def _stale(self: Any, step: Callable[[], None]) -> Callable[[], None]:
    """Replays do nothing: what the recording has left is there."""
    done = []

    def replay() -> None:
        if not done:
            step()
            done.append(True)

    return replay


def _noise(self: Any, step: Callable[[], None]) -> Callable[[], None]:
    """Replays are off by a bit, now and then."""
    from localrun.network import model

    right, turn = model.rms_norm, [0]

    def replay() -> None:
        turn[0] += 1
        model.rms_norm = lambda *sizes, **more: right(*sizes, **more) * (1 + 1e-6 * (turn[0] % 3 == 0))
        try:
            step()
        finally:
            model.rms_norm = right

    return replay


def _swallows(self: Any, step: Callable[[], None]) -> Callable[[], None]:
    """As code does that excepts everything."""

    def run() -> None:
        with suppress(KeyboardInterrupt):
            step()

    return run


def _breaks(self: Any, step: Callable[[], None]) -> Callable[[], None]:
    """An interrupted recording spoils those that come after it."""

    def run() -> None:
        if self.__dict__.get("broken"):
            return
        try:
            step()
        except KeyboardInterrupt:
            self.broken = True
            raise

    return run


def _race(when: str):
    """Whoever is late is not waited for: the workers ("sleep"), copies to them, or the card ("spin")."""

    def install(patch: pytest.MonkeyPatch) -> Callable[[int], Any]:
        from localrun.gpu.device import StandIn
        from localrun.gpu.experts import on_host

        class Racing(StandIn):
            late = branch = False

            def sleep(self, seconds: float) -> None:
                self.late |= when == "workers"

            def spin(self, seconds: float) -> None:
                self.late |= when == ("copies" if self.branch else "card")

            @contextmanager
            def side(self) -> Iterator[None]:
                self.branch = True
                try:
                    yield
                finally:
                    self.branch = False

            def call(self, function: int, argument: int) -> None:
                if not (self.late and when == "workers"):
                    super().call(function, argument)

        fill, join = on_host._Staging.fill, on_host.StepExperts._join

        def late_fill(self: Any, *arguments: Any) -> None:
            if not (racing.late and when == "copies"):
                fill(self, *arguments)

        def late_join(self: Any, *arguments: Any) -> Any:
            out = join(self, *arguments)
            return out * 0 if racing.late and when == "card" else out

        racing = Racing()
        patch.setattr(on_host._Staging, "fill", late_fill)
        patch.setattr(on_host.StepExperts, "_join", late_join)
        return lambda card: racing

    return install


def _places(make: Callable[[], Callable[[Any, list[int]], tuple[Any, list[int]]]]):
    """A fault of where a step's tokens stand: what make() gives has other caches and positions."""

    def install(patch: pytest.MonkeyPatch) -> None:
        from localrun.gpu.decode import DecodeStep

        load, change = DecodeStep.load, make()
        patch.setattr(DecodeStep, "load", lambda self, ids, caches, at: load(self, ids, *change(caches, list(at))))

    return install


def _first_caches() -> Any:
    """A step's graph keeps the caches that it was recorded with."""
    kept: dict[int, Any] = {}
    return lambda caches, positions: (kept.setdefault(len(caches), caches), positions)


def _neighbours_cache() -> Any:
    return lambda caches, positions: ([caches[0]] * len(caches), positions)


def _neighbours_position() -> Any:
    return lambda caches, positions: (
        caches,
        positions if caches[0] is caches[-1] else [min(positions)] * len(positions),
    )


def _remembers() -> Any:
    """A position does not go back, in a context of 32 tokens."""
    last = [0]

    def change(caches: Any, positions: list[int]) -> tuple[Any, list[int]]:
        if caches[0].capacity == 32:
            last[0] = max(last[0], positions[0])
            positions = [min(31, last[0] + i) for i in range(len(positions))]
        return caches, positions

    return change


def _one_cache(patch: pytest.MonkeyPatch) -> None:
    """All contexts have the same rows."""
    from localrun.gpu import hybrid

    new_cache, kept = hybrid.new_cache, {}

    def shared(config: Any, capacity: int, *more: Any) -> Any:
        cache = new_cache(config, capacity, *more)
        first = kept.setdefault((capacity, *more), cache)
        cache.addresses, cache._tables = first.addresses, first._tables
        return cache

    patch.setattr(hybrid, "new_cache", shared)


def _lost(self: Any, *_: Any) -> Callable[[], None]:
    from localrun.errors import LocalrunError

    raise LocalrunError("the GPU failed: CUDA error: unspecified launch failure; --device cpu does without it")


FAULTS = (
    Fault("a node that nobody waits for", "layers", rf"layer 1 .*({OFF}|: the result is not a number)",
          _of(call=_late_node)),
    Fault("a card that is lost", "layers", "the GPU failed: CUDA error: unspecified launch failure; .*",
          _of(mark=_lost, synchronize=_lost)),
    Fault("a stale graph", "steps", "6 replays of .*: other bits than launched one by one, from replay 2 on",
          _of(capture=_stale)),
    Fault("another context's graph", "steps", "two contexts in turn: other bits", _places(_first_caches)),
    Fault("a neighbour's cache", "steps", "steps of 3 contexts: other bits than each alone",
          _places(_neighbours_cache)),
    Fault("a neighbour's position", "steps", "steps of 3 contexts: other bits than each alone",
          _places(_neighbours_position)),
    Fault("replays that differ by a bit", "steps", "6 replays of .*: other bits .*, from replay 3 on",
          _of(capture=_noise)),
    Fault("two contexts in one memory", "steps", "6 replays of .*|two contexts in turn: other bits", _one_cache),
    Fault("a position that does not go back", "steps", "forgetting tokens: other bits", _places(_remembers)),
    Fault("a race with late workers", "steps", "the workers are late: other bits", _race("workers")),
    Fault("a race with late copies", "steps", "copies to them are late: other bits", _race("copies")),
    Fault("a race with a late card", "steps", "the card is late: other bits", _race("card")),
    Fault("Ctrl-C that goes unnoticed", "steps", "Ctrl-C while a step is recorded: went unnoticed",
          _of(capture=_swallows)),
    Fault("a recording that Ctrl-C has spoiled", "steps", "Ctrl-C while a step is recorded: other bits",
          _of(capture=_breaks)),
    Fault("a second card's stale graph", "steps", "6 replays of .*: other bits than launched .*, from replay 2 on",
          _second(capture=_stale), cards=(1,)),
    Fault("a card that waits for none before it", "cards", rf"steps through all cards{OFF}", _too_soon, cards=(0, 1)),
    Fault("a stale graph of one of two", "cards", "6 replays of .*: other bits than launched .*, from replay 2 on",
          _second(capture=_stale), cards=(0, 1)),
)  # fmt: skip
