"""The order of two micro-batches on machines with a clock of their own, errors on both sides, and thresholds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
import pytest
import tiny_models
import torch

from localrun.cpu.weights import LayerWeights
from localrun.errors import LocalrunError
from localrun.gguf.file import open_gguf
from localrun.gpu.device import StandIn
from localrun.gpu.experts.on_host import PrefillExperts
from localrun.gpu.prefill import (
    LayerTimes,
    Seconds,
    best_batches,
    best_chunks,
    forward,
    streaming_threshold,
    upload_seconds,
)
from localrun.models.reader import read_config
from localrun.network.cache import Context, new_cache
from localrun.network.model import Network
from localrun.network.moe import MoE
from quant.threads.pool import Pool

START = 5  # tokens that the cache holds before


@dataclass
class Machine:
    """A device with a queue and a CPU with one, in a time that passes only as they work. The host itself takes none.

    A batch is its token numbers in a column; each layer adds 1 to a second one.
    """

    n_layers: int
    attention_s: float
    experts_s: float
    fails: dict[tuple[str, int, int], BaseException] = field(default_factory=dict)  # side, layer, first token

    def __post_init__(self) -> None:
        self.host_s = self.device_s = self.cpu_s = 0.0
        self.cache = Context(1000)
        self.cache.length = START
        self.rows: list[set[int]] = [set(range(START)) for _ in range(self.n_layers)]
        self.log: list[tuple[str, int, int]] = []
        self.pending, self.cancelled = 0, 0
        self.layers = [SimulatedLayer(self, index) for index in range(self.n_layers)]

    def cancel(self) -> None:
        self.pending = 0
        self.cancelled += 1

    def run(self, n_tokens: int, n_batches: int) -> torch.Tensor:
        x = torch.stack([torch.arange(START, START + n_tokens), torch.zeros(n_tokens)], 1)
        return forward(self.layers, x, x[:, 0].long(), self.cache, n_batches, self.cancel)


@dataclass
class SimulatedLayer:
    machine: Machine
    index: int

    def _step(self, side: str, first: int) -> None:
        self.machine.log.append((side, self.index, first))
        if (side, self.index, first) in self.machine.fails:
            raise self.machine.fails[side, self.index, first]

    def begin(self, x: torch.Tensor, cache: Context, ids: torch.Tensor) -> Callable[[], torch.Tensor]:
        m, tokens = self.machine, [int(token) for token in x[:, 0]]
        assert ids.tolist() == tokens
        assert x[:, 1].tolist() == [self.index] * len(tokens)  # all layers before have been finished
        assert tokens == list(range(cache.length, cache.length + len(tokens)))
        self._step("attention", tokens[0])
        assert m.rows[self.index] == set(range(tokens[0]))  # what the tokens see, and no more
        m.rows[self.index] |= set(tokens)
        m.device_s = max(m.device_s, m.host_s) + m.attention_s
        m.cpu_s = done_s = max(m.cpu_s, m.device_s) + m.experts_s
        m.pending += 1

        def finish() -> torch.Tensor:
            self._step("experts", tokens[0])
            m.host_s = max(m.host_s, done_s)
            m.pending -= 1
            return x + torch.tensor([0, 1])

        return finish


@pytest.mark.parametrize("n_batches", [1, 2, 3])
@pytest.mark.parametrize("n_tokens", [1, 2, 7, 64])
def test_tokens_come_out_in_their_order_and_the_caches_length_stays(n_tokens: int, n_batches: int) -> None:
    machine = Machine(4, 1.0, 1.0)
    out = machine.run(n_tokens, n_batches)
    assert out.tolist() == [[START + t, 4] for t in range(n_tokens)]
    assert all(rows == set(range(START + n_tokens)) for rows in machine.rows)
    assert machine.cache.length == START
    assert machine.pending == machine.cancelled == 0


def test_the_order_of_two_batches() -> None:
    machine = Machine(2, 1.0, 1.0)
    machine.run(8, 2)
    a, b = START, START + 4
    assert machine.log == [
        ("attention", 0, a), ("attention", 0, b),
        ("experts", 0, a), ("attention", 1, a), ("experts", 0, b), ("attention", 1, b),
        ("experts", 1, a), ("experts", 1, b),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("attention_s", "experts_s"), [(1.0, 1.0), (1.0, 5.0), (5.0, 1.0)], ids=["even", "slow CPU", "slow GPU"]
)
def test_the_slower_side_never_waits(attention_s: float, experts_s: float) -> None:
    """But for the first attention and the last experts. One batch takes the sum instead."""
    n_layers = 20
    machine = Machine(n_layers, attention_s, experts_s)
    machine.run(8, 2)
    slower, faster = max(attention_s, experts_s), min(attention_s, experts_s)
    assert machine.host_s == pytest.approx(2 * n_layers * slower + faster)
    alone = Machine(n_layers, 2 * attention_s, 2 * experts_s)
    alone.run(8, 1)
    assert alone.host_s == pytest.approx(2 * n_layers * (attention_s + experts_s))


@pytest.mark.parametrize("error", [LocalrunError("the GPU failed"), MemoryError(), KeyboardInterrupt()], ids=type)
@pytest.mark.parametrize("first", [START, START + 4], ids=["first batch", "second batch"])
@pytest.mark.parametrize("side", ["attention", "experts"])
@pytest.mark.parametrize("layer", [0, 2])
def test_an_error_on_either_side_comes_out_and_the_rest_is_dropped(
    side: str, layer: int, first: int, error: BaseException
) -> None:
    machine = Machine(3, 1.0, 1.0, {(side, layer, first): error})
    with pytest.raises(type(error)) as raised:
        machine.run(8, 2)
    assert raised.value is error
    assert machine.log[-1] == (side, layer, first)
    assert machine.cancelled == 1 and machine.pending == 0
    assert machine.cache.length == START


# ---- a network -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pools() -> Iterator[tuple[Pool, Pool]]:
    """One for the experts' thread, one for all else, which is on the CPU as well here: a pool's jobs share buffers."""
    with closing(Pool(2)) as experts, closing(Pool(1)) as others:
        yield experts, others


class TinyNetwork:
    """A tiny model whose experts compute in the background."""

    def __init__(self, pools: tuple[Pool, Pool], device: StandIn) -> None:
        self.file = open_gguf(tiny_models.shared("v3"))
        self.config = read_config(self.file)
        self.model = Network(self.config, LayerWeights(self.file, pools[1]))
        self.experts = PrefillExperts(device, pools[0])
        self.ids = torch.arange(1, 60)

    def __enter__(self) -> TinyNetwork:
        for layer in self.model.layers:
            if isinstance(layer.mlp, MoE):
                layer.mlp.experts = self.experts.layer(layer.mlp.experts.experts)
        return self

    def __exit__(self, *error: object) -> None:
        self.experts.close()

    def run(self, n_batches: int) -> tuple[torch.Tensor, Context]:
        cache = new_cache(self.config, 100, exact=True)
        with torch.inference_mode():
            x = self.model.embed_tokens(self.ids)
            return forward(self.model.layers, x, self.ids, cache, n_batches, self.experts.cancel), cache


@pytest.mark.parametrize("n_batches", [1, 2, 3])
def test_hidden_states_are_the_networks(pools: tuple[Pool, Pool], n_batches: int) -> None:
    with TinyNetwork(pools, StandIn()) as network:
        found, cache = network.run(n_batches)
        assert cache.length == 0
        with torch.inference_mode():
            expected = network.model.embed_tokens(network.ids)
            for layer in network.model.layers:
                expected = layer(expected, cache)
    # Other numbers of tokens at a time sum in other orders: float32 rounding, through all layers.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


class Lost(StandIn):
    """A device that fails while something waits for it, a number of waits from now."""

    def __init__(self, good: int) -> None:
        super().__init__()
        self.good = good

    def mark(self) -> Callable[[], None]:
        def wait() -> None:
            self.good -= 1
            if self.good < 0:
                raise LocalrunError("the GPU failed: CUDA error: unspecified launch failure")

        return wait


@pytest.mark.parametrize("good", [0, 1, 3])
def test_a_lost_device_ends_both_sides(pools: tuple[Pool, Pool], good: int) -> None:
    """The thread of the experts ends, too: closing would wait for ever for one that hangs."""
    with TinyNetwork(pools, Lost(good)) as network, pytest.raises(LocalrunError, match="the GPU failed"):
        network.run(2)
    with TinyNetwork(pools, StandIn()) as network:
        network.run(2)  # the workers are free


# ---- what was measured, and what follows from it ---------------------------------------------------------------------


def test_a_line_through_two_measurements() -> None:
    line = Seconds.measured(64, 1.64, 512, 6.12)
    assert line.fixed == pytest.approx(1.0) and line.per_token == pytest.approx(0.01)
    assert Seconds.measured(64, 1.0, 512, 0.9) == Seconds(1.0, 0.0)
    assert Seconds.measured(64, 0.1, 512, 4.0).fixed == 0.0


def times(upload_s: float = 0.3, cpu_per_token: float = 1e-3, device_per_token: float = 1e-5) -> LayerTimes:
    return LayerTimes(Seconds(1e-3, 1e-5), Seconds(0.03, cpu_per_token), Seconds(0.01, device_per_token), upload_s)


def test_upload_seconds() -> None:
    assert upload_seconds(6_500_000_000, 26.0) == pytest.approx(0.25)


def test_the_threshold_is_where_the_times_cross() -> None:
    """CPU in two batches: 2 * (0.03 + 1e-3 T/2) = 0.06 + 1e-3 T, in one 0.031 + 1.01e-3 T: less for T < 2900.

    Streamed: 0.311 + 2e-5 T. So it is faster from T = 0.28 / 0.99e-3 = 282.8 on.
    """
    assert streaming_threshold(times(), 4096, 4096) == 283
    assert streaming_threshold(times(), 512, 283) == 283
    assert streaming_threshold(times(), 512, 282) is None


def test_more_tokens_than_the_cpu_takes_at_a_time_are_several_times_as_many_for_it() -> None:
    """Uploads of 0.8 s: CPU in one batch 0.031 + 1.01e-3 T (two chunks 0.062 + 1.01e-3 T), streamed 0.811 + 2e-5 T."""
    slow = times(upload_s=0.8)
    assert streaming_threshold(slow, 10_000, 10_000) == 788  # 0.780 / 0.99e-3 = 787.9
    assert streaming_threshold(slow, 512, 4096) == 757  # 0.749 / 0.99e-3 = 756.6
    assert streaming_threshold(slow, 512, 512) is None


@pytest.mark.parametrize("upload_s", [0.0, 0.01, 0.1, 1.0])
@pytest.mark.parametrize("cpu_per_token", [1e-5, 1e-4, 1e-3])
def test_from_the_threshold_on_streaming_is_faster(upload_s: float, cpu_per_token: float) -> None:
    measured, n_tokens = times(upload_s, cpu_per_token), np.arange(1, 8193)
    faster = measured.streamed(n_tokens) < np.minimum(measured.by_cpu(n_tokens, 1), measured.by_cpu(n_tokens, 2))
    threshold = streaming_threshold(measured, 8192, 8192)
    if threshold is None:
        assert not faster[-1]
    else:
        assert faster[threshold - 1 :].all() and (threshold == 1 or not faster[threshold - 2])


def test_a_slower_bus_moves_the_threshold_up_and_a_slower_cpu_down() -> None:
    assert streaming_threshold(times(upload_s=0.6), 8192, 8192) > streaming_threshold(times(), 8192, 8192)
    assert streaming_threshold(times(cpu_per_token=2e-3), 8192, 8192) < streaming_threshold(times(), 8192, 8192)
    assert streaming_threshold(times(cpu_per_token=1e-5, device_per_token=1e-4), 512, 8192) is None
    assert streaming_threshold(times(upload_s=0.0, cpu_per_token=2e-3), 512, 8192) == 1


def test_two_batches_where_they_hide_more_than_they_read_twice() -> None:
    even = LayerTimes(Seconds(0.0, 1e-3), Seconds(0.05, 1e-3), Seconds(0, 0), 0.0)
    assert [best_batches(even, n) for n in (1, 10, 40, 200, 4000)] == [1, 1, 1, 2, 2]
    assert best_batches(LayerTimes(Seconds(0, 1e-3), Seconds(0, 1e-3), Seconds(0, 0), 0.0), 1) == 1


def layer_seconds(measured: LayerTimes, sizes: list[int], chunk: int, most: int) -> float:
    """What a layer takes for a prompt cut so: each piece by the faster side, those over a chunk by the device alone."""
    total = 0.0
    for size in sizes:
        n = np.array(float(size))
        ways = [measured.streamed(n)] if size <= most else []
        ways += [measured.by_cpu(n, 1), measured.by_cpu(n, 2)] if size <= chunk else []
        total += min(float(way) for way in ways)
    return total


def every_cut(n_tokens: int, sizes: list[int]) -> Iterator[list[int]]:
    """Every way to cut a prompt into pieces of these sizes, longest first, and one rest of any size."""
    if n_tokens == 0:
        yield []
        return
    for i, size in enumerate(sizes):
        if size <= n_tokens:
            yield from ([size, *rest] for rest in every_cut(n_tokens - size, sizes[i:]))
    if n_tokens <= sizes[0]:
        yield [n_tokens]


@pytest.mark.parametrize("n_tokens", [1, 100, 600, 700, 1000, 1500, 4096, 5000])
@pytest.mark.parametrize("most", [512, 1024, 4096])
@pytest.mark.parametrize("upload_s", [0.01, 0.3, 0.45, 0.8, 3.0])
def test_prompts_are_cut_as_takes_least(n_tokens: int, most: int, upload_s: float) -> None:
    """No cut into multiples of 512 and a rest is faster, and it is one that there is memory for."""
    measured = times(upload_s)
    sizes = best_chunks(measured, n_tokens, 512, most)
    threshold = streaming_threshold(measured, 512, most)
    assert sum(sizes) == n_tokens and all(0 < n <= (most if threshold and n >= threshold else 512) for n in sizes)
    found = layer_seconds(measured, sizes, 512, most)
    others = every_cut(n_tokens, [size for size in (4096, 2048, 1024, 512) if size <= most])
    best = min(layer_seconds(measured, other, 512, most) for other in others)
    # Even pieces may be better than those; a rest that would be streamed alone hardly ever joins the one before it.
    assert found <= 1.02 * best


def test_cuts_of_prompts() -> None:
    """What costs 0.3 s a chunk is done once where there is memory; a short rest is the CPU's; a dear upload is none."""
    assert best_chunks(times(), 600, 512, 512) == [512, 88]  # streamed 0.321 s, and 0.12 s by the CPU
    assert best_chunks(times(), 600, 512, 4096) == [600]
    assert best_chunks(times(), 1000, 512, 4096) == [1000]
    assert best_chunks(times(), 5000, 512, 4096) == [2500, 2500]
    assert best_chunks(times(), 4200, 512, 4096) == [4096, 104]
    assert best_chunks(times(upload_s=3.0), 1200, 512, 4096) == [512, 512, 176]
    assert best_chunks(times(upload_s=float("inf")), 5000, 512, 4096) == [*[512] * 9, 392]
