"""Deliberate faults of a card, in what stands in for it: what each is, and which part of the proof finds it.

Most are put into the kernels' stand-ins or the device of this process; a few need a process that can end. torch is
imported when a fault is put in.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gpu_proofs

from localrun.gpu.proof import child, prove
from localrun.gpu.proof.parts import PARTS, Part
from localrun.gpu.proof.task import Task
from localrun.gpu.proof.verdict import Verdict

if TYPE_CHECKING:
    import pytest

MIB = 1 << 20
_SILENCE_S = 3.0  # of a child that hangs: it would answer at once

_device: Callable[[int], Any] = gpu_proofs.stand_in


def device(card: int) -> Any:
    """The device that the fault at hand has made."""
    return _device(card)


@dataclass(frozen=True)
class Fault:
    """One of them.

    Attributes:
        part: that finds it.
        line: a regular expression, of the whole fault.
        put_in: puts it in, and gives what makes the device if that is not the stand-in.
        type_: of the model's matrices.
        child: a function of this module that makes the device in a process of its own, "" for one in this process.
        choices: that parts before have made.
        cards: that are proven, by itself or together.
    """

    name: str
    part: str
    line: str
    put_in: Callable[[pytest.MonkeyPatch], Callable[[int], Any] | None] = lambda patch: None
    type_: str = "F32"
    child: str = ""
    choices: dict[str, Any] = field(default_factory=dict)
    cards: tuple[int, ...] = (0,)

    @property
    def name_of_cards(self) -> str:
        """As a verdict has it."""
        return prove.name_of(dict.fromkeys(self.cards, gpu_proofs.CARD))


@contextmanager
def put_in(fault: Fault, patch: pytest.MonkeyPatch) -> Iterator[Task]:
    """Within, it is there: the task that meets it."""
    global _device
    task = gpu_proofs.task(fault.type_, "gpu_faults:device").with_choices(fault.choices)
    task = replace(task, cards=fault.cards)
    if fault.child:
        yield replace(task, make_device=f"gpu_faults:{fault.child}")
        return
    with gpu_proofs.kernels_in_torch(patch):
        _device = fault.put_in(patch) or gpu_proofs.stand_in
        yield task


def runner(fault: Fault) -> prove.Run:
    """What carries parts out."""
    path = os.pathsep.join((child._path(), str(Path(__file__).parent)))

    def in_child(part: Part, task: Task, doing: prove.Say) -> child.Message:
        return child.run(part.name, task, _SILENCE_S, doing, {"PYTHONPATH": path})

    return in_child if fault.child else prove.here


def found(fault: Fault, patch: pytest.MonkeyPatch, alone: bool) -> Verdict:
    """The verdict, of all parts up to the one that fails, or of the expected part alone."""
    with put_in(fault, patch) as task:
        if alone:
            patch.setattr(prove, "PARTS", tuple(part for part in PARTS if part.name == fault.part))
        identity = replace(gpu_proofs.identity_of(fault.type_), card=fault.name_of_cards)
        return prove.prove(identity, task, lambda line: None, to_the_end=False, run=runner(fault))


# ---- kernels ---------------------------------------------------------------------------------------------------------


def _modules(change: Callable[[Any, Any, Any, Any], Any], name: str = "Linear", method: str = "__call__"):
    """A fault of matrices: change(weight, x, y, apply) in place of their result y, where apply multiplies anew."""

    def install(patch: pytest.MonkeyPatch) -> None:
        from localrun.gpu import weights

        base = getattr(weights, name)

        class Faulty(base):
            def __init__(self, weight: Any, device: Any):
                super().__init__(weight, device)
                self._faulty_weight = weight

        def call(self: Any, x: Any, *more: Any) -> Any:
            apply = lambda x: getattr(base, method)(self, x, *more)  # noqa: E731
            return change(self._faulty_weight, x, apply(x), apply)

        setattr(Faulty, method, call)
        patch.setattr(weights, name, Faulty)

    return install


def _wrong_scale(weight: Any, x: Any, y: Any, apply: Any) -> Any:
    return y * 1.01 if weight.format.name == "Q8_0" else y


def _cut_rows(weight: Any, x: Any, y: Any, apply: Any) -> Any:
    x = x.clone()
    x[..., -16:] = 0
    return apply(x)


def _lost_row(weight: Any, x: Any, y: Any, apply: Any) -> Any:
    y = y.clone()
    y[..., -1] = 0
    return y


def _repeated_row(weight: Any, x: Any, y: Any, apply: Any) -> Any:
    y = y.clone()
    y[..., -1] = y[..., -2]
    return y


def _nan_of_many(weight: Any, x: Any, y: Any, apply: Any) -> Any:
    return y * float("nan") if x.shape[0] >= 16 else y


def _nan_between(weight: Any, x: Any, y: Any, apply: Any) -> Any:
    """Outside of the rows that are compared."""
    from localrun.gpu.proof.kernels import sample

    y, rows = y.clone(), sample(y.shape[-1], gpu_proofs.SMALL.rows)
    left = [row for row in range(y.shape[-1]) if row not in rows]
    y[..., left[:1]] = float("nan")
    return y


def _mixed_tokens(weight: Any, x: Any, y: Any, apply: Any) -> Any:
    return apply(x[:1].expand_as(x))


def _half_products(weight: Any, x: Any, y: Any, apply: Any) -> Any:
    return y.half().float()


def _rolled_heads(weight: Any, x: Any, y: Any, apply: Any) -> Any:
    return y.roll(1, 1)


def _coarse(weight: Any, x: Any, y: Any, apply: Any) -> Any:
    import torch

    return y.to(torch.bfloat16).to(y.dtype)


def _next_row(weight: Any, x: Any, y: Any, apply: Any) -> Any:
    return apply((x + 1).clamp_max(weight.n_rows - 1))


def _illegal_access(weight: Any, x: Any, y: Any, apply: Any) -> Any:
    if x.shape[0] >= 16:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be reported")
    return y


def _too_much_shared_memory(weight: Any, x: Any, y: Any, apply: Any) -> Any:
    from triton.runtime.errors import OutOfResources

    raise OutOfResources(131_072, 101_376, "shared memory")


_LOW = {"few": "low", "many": "usual", "attention": "usual"}


def _wrong_tiles(patch: pytest.MonkeyPatch) -> None:
    """Those that were fastest are wrong."""
    from localrun.gpu import tiles
    from localrun.gpu.proof import tiles as part

    patch.setattr(part, "_fastest", lambda subject, findings, kind, prepare: _LOW[kind])
    low = tiles.CANDIDATES["few"]["low"]
    _modules(lambda weight, x, y, apply: y * 1.01 if tiles.of(x.device).few == low else y)(patch)


def _router(change: Callable[[Any], dict[str, Any]], without_bias: bool = False):
    """A fault of the router: a configuration that differs by change(config)."""

    def install(patch: pytest.MonkeyPatch) -> None:
        from localrun.gpu import weights
        from localrun.network.moe import choose_experts

        def choose(logits: Any, bias: Any, config: Any, ids: Any = None) -> Any:
            bias = None if without_bias else bias
            return choose_experts(logits, bias, replace(config, **change(config)), ids)

        patch.setattr(weights.DeviceWeights, "choose_experts", staticmethod(choose))

    return install


def _attention(change: Callable[..., dict[str, Any]]):
    """A fault of attention's kernel: other arguments."""

    def install(patch: pytest.MonkeyPatch) -> None:
        import gpu_torch

        from localrun.gpu.attention import flash_decoding

        names = ("queries", "places", "layer", "config", "scale", "n_pieces", "dtype")

        def attend(*arguments: Any, **more: Any) -> Any:
            given = dict(zip(names, arguments, strict=True)) | more
            return gpu_torch.attend_over(**given | change(**given))

        patch.setattr(flash_decoding, "attend_over", attend)

    return install


def _without_the_newest(places: Any, **_: Any) -> dict[str, Any]:
    """Of tokens that attend: the last one's row is hidden, the first ones' are."""
    return {"places": replace(places, positions=(places.positions - 1).clamp_min(0))}


def _without_the_end(places: Any, **_: Any) -> dict[str, Any]:
    """Of a long context the first 32 rows are seen."""
    return {"places": replace(places, positions=places.positions.clamp_max(31))}


def _experts(change: Callable[[Any, Any, Any], tuple[Any, Any]]):
    """A fault of experts in VRAM: other ids and weights."""

    def install(patch: pytest.MonkeyPatch) -> None:
        import gpu_torch

        from localrun.gpu.experts import in_vram

        class Faulty(gpu_torch.TorchExperts):
            def begin(self, x: Any, ids: Any, weights: Any) -> Any:
                return super().begin(x, *change(self, ids, weights))

        patch.setattr(in_vram, "Experts", Faulty)

    return install


def _swapped(experts: Any, ids: Any, weights: Any) -> tuple[Any, Any]:
    first, *_, last = experts.w
    swapped = ids.clone()
    swapped[ids == first], swapped[ids == last] = last, first
    return swapped, weights


# ---- layers ----------------------------------------------------------------------------------------------------------


def _rows_and_queries(change: Callable[..., Any]):
    """A fault of rotation and the cache's rows: change(original, *arguments)."""

    def install(patch: pytest.MonkeyPatch) -> None:
        import gpu_torch

        from localrun.gpu.attention import latent

        original = gpu_torch.turn_and_append
        patch.setattr(latent, "turn_and_append", lambda *arguments: change(original, *arguments))

    return install


def _unturned_queries(original: Any, q: Any, kv: Any, norm: Any, turns: Any, cache: Any, layer: int, c: Any) -> Any:
    nope, _ = original(q, kv, norm, turns, cache, layer, c)
    rope = q.view(q.shape[0], c.num_attention_heads, -1)[..., c.qk_nope_head_dim :]
    return nope, rope.flip(0) if q.shape[0] > 1 else -rope


def _unnormed(original: Any, q: Any, kv: Any, norm: Any, turns: Any, cache: Any, layer: int, c: Any) -> Any:
    return original(q, kv, norm * 1.5, turns, cache, layer, c)


def _first_layer(original: Any, q: Any, kv: Any, norm: Any, turns: Any, cache: Any, layer: int, c: Any) -> Any:
    if layer:
        import gpu_torch

        for rows in gpu_torch.rows_at(cache.places(q.shape[0]), layer, q.shape[0] - 1, c):
            rows.zero_()
    return original(q, kv, norm, turns, cache, 0, c)


def _no_shared_experts(patch: pytest.MonkeyPatch) -> None:
    from localrun.gpu import weights

    has = weights.DeviceWeights.has
    patch.setattr(weights.DeviceWeights, "has", lambda self, name: "shexp" not in name and has(self, name))


def _twice(patch: pytest.MonkeyPatch) -> None:
    from localrun.gpu.experts import on_host

    join = on_host.StepExperts._join
    patch.setattr(on_host.StepExperts, "_join", lambda self, *arguments: 2 * join(self, *arguments))


# ---- the device ------------------------------------------------------------------------------------------------------


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
    """Nobody waits for the workers: a node is only called when the next one is due."""
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


def _memory(used: int = 0, left: int = 0, each: int = 0, cached: int = 0):
    """A device that says that much is in use while a model is loaded, at last, and after each one more.

    cached: while one is that has a cache of experts.
    """

    def install(patch: pytest.MonkeyPatch) -> Callable[[int], Any]:
        from localrun.gpu import hybrid
        from localrun.gpu.device import StandIn

        class Leaking(StandIn):
            taken = 0

            def free_bytes(self) -> int:
                return (1 << 40) - self.taken

        leaking = Leaking()
        load, close = hybrid.HybridModel._load, hybrid.HybridModel.close

        def loads(self: Any) -> None:
            load(self)
            leaking.taken += cached if self.routed.cache else used

        def closes(self: Any) -> None:
            close(self)
            leaking.taken = max(leaking.taken - (cached if self.routed.cache else used), left) + each

        patch.setattr(hybrid.HybridModel, "_load", loads)
        patch.setattr(hybrid.HybridModel, "close", closes)

        def make(card: int) -> Any:
            leaking.taken = 0  # each part has a process of its own
            return leaking

        return make

    return install


def _no_room(error: Callable[[], BaseException]):
    """Memory is full when the cache that was asked for is made."""

    def install(patch: pytest.MonkeyPatch) -> None:
        from localrun.gpu import hybrid

        new_cache = hybrid.new_cache

        def full(config: Any, capacity: int, *more: Any) -> Any:
            if capacity == 48:
                raise error()
            return new_cache(config, capacity, *more)

        patch.setattr(hybrid, "new_cache", full)

    return install


def _out_of_vram() -> BaseException:
    import torch

    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 6.00 GiB. GPU 0 has 1 GiB")


def _driver(library: Any):
    """The card's own device, over a driver made up."""

    def install(patch: pytest.MonkeyPatch) -> Callable[[int], Any]:
        from localrun.gpu import device as gpu

        def load(name: str) -> Any:
            if isinstance(library, Exception):
                raise library
            return library

        patch.setattr(ctypes, "CDLL", load)
        return gpu.Cuda

    return install


class _NoHostNodes:
    """A driver without the one function that is needed of it."""


# ---- a cache of experts ----------------------------------------------------------------------------------------------


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


# ---- in a process of its own -----------------------------------------------------------------------------------------


def _when_loading(action: Callable[[], None]) -> Any:
    """A stand-in whose memory is asked for: then the action."""
    from localrun.gpu.device import StandIn

    class Ending(StandIn):
        def free_bytes(self) -> int:
            action()
            return super().free_bytes()

    return Ending()


def hangs(card: int) -> Any:
    return _when_loading(lambda: time.sleep(3600))


def crashes(card: int) -> Any:
    return _when_loading(lambda: os.kill(os.getpid(), signal.SIGSEGV))


def is_killed(card: int) -> Any:
    return _when_loading(lambda: os.kill(os.getpid(), signal.SIGKILL))


def gives_up(card: int) -> Any:
    """As a driver's library that calls exit()."""
    return _when_loading(lambda: os._exit(0))


def aborts(card: int) -> Any:
    """As CUDA's own assertions do, with a line on stderr."""

    def abort() -> None:
        os.write(2, b"driver: fatal: Xid 79, GPU has fallen off the bus\n")
        os.abort()

    return _when_loading(abort)


_OFF = r": off by [\d.e+-]+, and rounding explains [\d.e+-]+"
_NOT_THERE = r": expert \d of layer 1 is not what its slot in VRAM holds"
_HEADS = "HeadLinear"
FAULTS = (
    Fault("a wrong scale in one format", "kernels", rf"Q8_0, .* tokens{_OFF}", _modules(_wrong_scale), "Q8_0"),
    Fault("fast tiles that are wrong", "kernels", rf"F32, .* tokens{_OFF}", _wrong_tiles, choices={"tiles": _LOW}),
    Fault("the end of each row left out", "kernels", rf"F32, .*{_OFF}", _modules(_cut_rows)),
    Fault("a last row that is not written", "kernels", rf"F32, .*{_OFF}", _modules(_lost_row)),
    Fault("a tile that repeats a row", "kernels", rf"F32, .*{_OFF}", _modules(_repeated_row)),
    Fault("NaN at large shapes alone", "kernels", r"F32, .*, 16 tokens: \d+ of \d+ results are no numbers",
          _modules(_nan_of_many)),
    Fault("NaN in a row between", "kernels", r"F32, .*: \d+ of \d+ results are no numbers", _modules(_nan_between)),
    Fault("every token gets the first one's result", "kernels", rf"F32, .*, 5 tokens{_OFF}", _modules(_mixed_tokens)),
    Fault("products of float16 for few tokens", "kernels", rf"F32, .*{_OFF}", _modules(_half_products)),
    Fault("heads that are shifted by one", "kernels", rf"F32, blk.0.attn_k_b.*{_OFF}", _modules(_rolled_heads, _HEADS)),
    Fault("a wrong transposed product", "kernels", rf"F32, .*transposed{_OFF}",
          _modules(_half_products, _HEADS, "transposed")),
    Fault("rows expanded to eight bits", "kernels", rf"F32, .*expanded{_OFF}", _modules(_coarse, _HEADS, "dense")),
    Fault("the next token's embedding", "kernels", rf"F32, token_embd.weight, embedding{_OFF}",
          _modules(_next_row, "Embedding")),
    Fault("a router without its bias", "kernels", "router, .*: other experts than the CPU's",
          _router(lambda c: {}, without_bias=True)),
    Fault("a router without groups", "kernels", "router, .*: other experts than the CPU's",
          _router(lambda c: {"n_group": 1})),
    Fault("router weights that are not normalised", "kernels", rf"router, .*{_OFF}",
          _router(lambda c: {"norm_topk_prob": False})),
    Fault("attention that sees no newest token", "kernels", rf"attention, .*{_OFF}", _attention(_without_the_newest)),
    Fault("attention that drops a long context's end", "kernels", rf"attention, 40 tokens .*{_OFF}",
          _attention(_without_the_end)),
    Fault("attention with another scale", "kernels", rf"attention, .*{_OFF}",
          _attention(lambda scale, **_: {"scale": 1.1 * scale})),
    Fault("experts in each other's slots", "kernels", rf"experts of F32, .*{_OFF}", _experts(_swapped)),
    Fault("experts without their weights", "kernels", rf"experts of F32, .*{_OFF}",
          _experts(lambda experts, ids, weights: (ids, weights * 0 + 1))),
    Fault("experts that count what is not theirs", "kernels", rf"experts of F32, .*{_OFF}",
          _experts(lambda experts, ids, weights: (ids.clamp_min(0), weights))),
    Fault("an illegal memory access", "kernels", "RuntimeError: CUDA error: an illegal memory access was encountered",
          _modules(_illegal_access)),
    Fault("a kernel that does not fit", "kernels", "OutOfResources: out of resource: shared memory.*",
          _modules(_too_much_shared_memory)),
    Fault("no driver", "kernels", r"no CUDA driver: libcuda.so.1 can't be loaded \(no such file\)",
          _driver(OSError("no such file"))),
    Fault("a driver without host nodes", "kernels", "the NVIDIA driver lacks cuLaunchHostFunc; install a newer one",
          _driver(_NoHostNodes())),
    Fault("a driver that hangs", "kernels", r"hangs: no answer for 3 s \(loading\)", child="hangs"),
    Fault("a driver that crashes", "kernels", r"crashed with SIGSEGV \(loading\)", child="crashes"),
    Fault("a card that falls off the bus", "kernels",
          r"crashed with SIGABRT \(loading\): driver: fatal: Xid 79, GPU has fallen off the bus", child="aborts"),
    Fault("a process killed for memory", "kernels", r"was killed, as by a system without memory \(loading\)",
          child="is_killed"),
    Fault("a driver that ends the process", "kernels", r"ended with exit code 0 \(loading\)", child="gives_up"),
    Fault("queries that are not turned", "layers", rf"layer 0 .*{_OFF}", _rows_and_queries(_unturned_queries)),
    Fault("latents with another norm", "layers", rf"layer 0 .*{_OFF}", _rows_and_queries(_unnormed)),
    Fault("rows in another layer's cache", "layers", rf"layer 1 .*{_OFF}", _rows_and_queries(_first_layer)),
    Fault("no shared experts", "layers", rf"layer 1 .*{_OFF}", _no_shared_experts),
    Fault("the workers' sum added twice", "layers", rf"layer 1 .*{_OFF}", _twice),
    Fault("a node that nobody waits for", "layers", rf"layer 1 .*{_OFF}", _of(call=_late_node)),
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
    Fault("a table of experts that is written too late", "expert_cache", rf"6 replays of .*{_NOT_THERE}",
          _cache(_write_table=_late_table)),
    Fault("an expert that is used before it has come", "expert_cache", rf".*{_NOT_THERE}", _too_early),
    Fault("half an expert", "expert_cache", rf"6 replays of .*{_NOT_THERE}", _half_copied),
    Fault("a recorded step with a table of its own", "expert_cache", "6 replays of .*: other bits than launched .*",
          _kept_table),
    Fault("an expert on both sides", "expert_cache", rf"layer 1 .*{_OFF}", _on_both_sides),
    Fault("steps that wait for experts to come", "expert_cache",
          "steps while copies of experts are held up: one has waited for them", _cache(settle=_waits)),
    Fault("copies of experts that fail", "expert_cache",
          "no expert has come to VRAM|an expert could not be copied .*illegal memory access.*", _cache(_copy=_fails)),
    Fault("slots that nobody counted", "memory",
          r"1024 MiB of VRAM in use with 2 cached experts a layer, \d+ MiB counted", _memory(cached=1024 * MIB)),
    Fault("more memory than was counted", "memory", r"1024 MiB of VRAM in use, \d+ MiB counted", _memory(1024 * MIB)),
    Fault("memory that close() does not free", "memory", "400 MiB of VRAM are not free after the model was closed",
          _memory(400 * MIB, 400 * MIB)),
    Fault("a leak", "memory", "each load leaves 64 MiB of VRAM behind", _memory(64 * MIB, each=64 * MIB)),
    Fault("no VRAM for the whole context", "memory", "out of memory: CUDA out of memory. Tried to allocate 6.00 GiB.*",
          _no_room(_out_of_vram)),
    Fault("a second card's stale graph", "steps", "6 replays of .*: other bits than launched .*, from replay 2 on",
          _second(capture=_stale), cards=(1,)),
    Fault("a card that waits for none before it", "cards", rf"steps through all cards{_OFF}", _too_soon, cards=(0, 1)),
    Fault("a stale graph of one of two", "cards", "6 replays of .*: other bits than launched .*, from replay 2 on",
          _second(capture=_stale), cards=(0, 1)),
    Fault("no RAM", "memory", "out of memory: no room", _no_room(lambda: MemoryError("no room"))),
)  # fmt: skip
