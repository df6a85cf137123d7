"""Many tokens through layers whose attention is on a device and whose routed experts are on the CPU.

In two micro-batches, so that each side has work while the other computes for the other batch. And from how many tokens
on it is faster to upload a layer's experts. Nothing here knows CUDA or a clock: layers say how to begin, measurements
how long things take.

Letters: T tokens, D hidden_size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from localrun.limits import cut
from localrun.network.cache import Context


class Layer(Protocol):
    """As localrun.network.model.Layer."""

    def begin(self, x_TD: torch.Tensor, cache: Context, ids_T: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Queue all that needs no waiting: attention, with T rows behind cache.length, router and shared experts.

        ids_T: the tokens.

        Returns: what waits for the routed experts, queues the rest and gives the layer's output (T, D).
        """


def forward(
    layers: Sequence[Layer],
    x_TD: torch.Tensor,
    ids_T: torch.Tensor,
    cache: Context,
    n_batches: int,
    cancel: Callable[[], None],
) -> torch.Tensor:
    """x after all layers, (T, D). cache.length stays; its rows behind that are those of the T tokens.

    While the CPU has a batch's experts of a layer, the device is given the other batch's attention: of the same layer,
    for which the first batch's rows are there, or of the next one.

    Args:
        n_batches: pieces that the tokens are cut into, in their order.
        cancel: drops the experts that were begun and waits for what can't be dropped. Called if anything raises, here
            or in the experts' thread; then what was raised goes on.
    """
    batches = [batch for batch in x_TD.tensor_split(n_batches) if batch.shape[0]]
    tokens = ids_T.tensor_split(n_batches)[: len(batches)]  # the shorter pieces come last
    before = np.cumsum([0] + [batch.shape[0] for batch in batches[:-1]]).tolist()
    finishes: list[Callable[[], torch.Tensor]] = [lambda batch=batch: batch for batch in batches]
    try:
        for layer in layers:
            for index, n_before in enumerate(before):
                batch_TD = finishes[index]()
                with _behind(cache, n_before):
                    finishes[index] = layer.begin(batch_TD, cache, tokens[index])
        return torch.cat([finish() for finish in finishes])
    except BaseException:
        cancel()
        raise


@contextmanager
def _behind(cache: Context, n_tokens: int) -> Iterator[None]:
    """Within, the cache holds n_tokens more: the rows of the batches before."""
    length = cache.length
    cache.advance(n_tokens)
    try:
        yield
    finally:
        cache.length = length


@dataclass(frozen=True)
class Seconds:
    """How long something takes for T tokens: fixed + per_token * T. Reading weights is the fixed part."""

    fixed: float
    per_token: float

    @classmethod
    def measured(cls, few: int, few_s: float, many: int, many_s: float) -> "Seconds":
        """The line through two measurements; a slope or an offset below 0 is noise."""
        per_token = max(0.0, (many_s - few_s) / (many - few))
        return cls(max(0.0, few_s - few * per_token), per_token)

    def __call__(self, n_tokens: np.ndarray) -> np.ndarray:
        """float64, as n_tokens."""
        return self.fixed + self.per_token * n_tokens


@dataclass(frozen=True)
class LayerTimes:
    """What was measured of a layer.

    Attributes:
        attention: all of it that is the device's anyway.
        cpu_experts: the routed experts by the CPU, copies included.
        device_experts: the routed experts by the device, once they are in its memory.
        upload_s: getting them there.
    """

    attention: Seconds
    cpu_experts: Seconds
    device_experts: Seconds
    upload_s: float

    def by_cpu(self, n_tokens: np.ndarray, n_batches: int) -> np.ndarray:
        """A layer in a row of many. Two batches keep the slower side busy; one has each side wait for the other."""
        attention, experts = self.attention(n_tokens / n_batches), self.cpu_experts(n_tokens / n_batches)
        return attention + experts if n_batches == 1 else 2 * np.maximum(attention, experts)

    def streamed(self, n_tokens: np.ndarray) -> np.ndarray:
        """A layer in a row of many, one after the other: there is one work buffer."""
        return self.attention(n_tokens) + self.upload_s + self.device_experts(n_tokens)


def upload_seconds(n_bytes: int, gb_per_s: float) -> float:
    """Of a layer's experts. gb_per_s: measured from the file's map to the device, 1e9 bytes."""
    return n_bytes / (1e9 * gb_per_s)


def best_batches(times: LayerTimes, n_tokens: int) -> int:
    """1 or 2. Two overlap but read the experts' weights twice, which few tokens don't pay for."""
    n = np.array(n_tokens, np.float64)
    return 2 if n_tokens > 1 and times.by_cpu(n, 2) < times.by_cpu(n, 1) else 1


def streaming_threshold(times: LayerTimes, chunk: int, most: int) -> int | None:
    """Tokens at a time from which on, up to `most`, uploading experts is faster; None if `most` is too few.

    chunk: tokens that the CPU takes at a time; more than these are several times as many for it.
    """
    n_tokens = np.arange(1, most + 1)
    slower = np.flatnonzero(times.streamed(n_tokens) >= _by_cpu(times, n_tokens, chunk))
    first = int(n_tokens[slower[-1]]) + 1 if slower.size else 1
    return first if first <= most else None


def _by_cpu(times: LayerTimes, n_tokens: np.ndarray, chunk: int) -> np.ndarray:
    """A layer of so many tokens in as few even chunks as there must be, each in the better number of batches."""
    n_chunks = np.ceil(n_tokens / chunk)
    return n_chunks * np.minimum(*(times.by_cpu(n_tokens / n_chunks, n_batches) for n_batches in (1, 2)))


def best_chunks(times: LayerTimes, n_tokens: int, chunk: int, most: int) -> list[int]:
    """How many tokens of a prompt to take at a time, so that all take least: in all n_tokens, each from 1 to `most`.

    Uploading takes as long for few tokens as for many, so that long chunks pay for it; what they leave over may be the
    CPU's, or they are shorter by as much.

    Args:
        chunk: of the CPU, and of all where nothing is uploaded.
        most: tokens whose layer there is memory for.
    """
    threshold = streaming_threshold(times, chunk, most)
    usual = cut(n_tokens, chunk)
    if threshold is None:
        return usual

    def seconds(sizes: list[int]) -> float:
        n = np.array(sizes)
        return float(np.where(n >= threshold, times.streamed(n), _by_cpu(times, n, chunk)).sum())

    longest = [[most] * n_long + cut(n_tokens - n_long * most, chunk) for n_long in range(1, n_tokens // most + 1)]
    even = [_even(n_tokens, n_chunks) for n_chunks in range(-(-n_tokens // most), len(usual))]
    allowed = (sizes for sizes in longest + even if all(n <= chunk or n >= threshold for n in sizes))
    return min([usual, *allowed], key=seconds)


def _even(n_tokens: int, n_pieces: int) -> list[int]:
    """Pieces of the same size, but for one token."""
    return [(n_tokens + i) // n_pieces for i in reversed(range(n_pieces))]
