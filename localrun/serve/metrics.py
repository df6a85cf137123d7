"""What /metrics says, in Prometheus' form."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from localrun.serve.scheduler import Scheduler

_COUNTERS = {
    "replies": "Replies that have ended, in whatever way.",
    "cancelled": "Replies whose client went, or was too slow.",
    "failed": "Replies that ended in an error.",
    "refused": "Replies that found the queue full.",
    "prompt_tokens": "Tokens of prompts.",
    "cached_tokens": "Tokens of prompts that were not read again.",
    "prompt_s": "Seconds of reading prompts.",
    "generated_tokens": "Tokens of replies.",
    "decode_s": "Seconds of generating.",
}
_GAUGES = {
    "running": "Replies at work.",
    "waiting": "Replies that have not begun.",
    "cached_bytes": "Keys and values of finished conversations.",
}


class _Figures(Collector):
    """A scheduler's."""

    def __init__(self, scheduler: Scheduler):
        self._scheduler = scheduler

    def collect(self) -> Iterator[Metric]:
        for name, help in _COUNTERS.items():
            yield CounterMetricFamily(_name(name), help, getattr(self._scheduler.totals, name))
        for name, help in _GAUGES.items():
            yield GaugeMetricFamily(_name(name), help, getattr(self._scheduler, name))


def metrics_text(scheduler: Scheduler) -> bytes:
    """All figures by now."""
    registry = CollectorRegistry()
    registry.register(_Figures(scheduler))
    return generate_latest(registry)


def _name(name: str) -> str:
    """Prometheus spells units out."""
    return "localrun_" + (f"{name[:-2]}_seconds" if name.endswith("_s") else name)
