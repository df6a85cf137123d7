"""Whether hosts that read prompts pay: counted by hand on a machine of round numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from toy_machine import toy

from localrun.plan.link import Link
from localrun.plan.memory import plan_memory
from localrun.plan.readers import ONE, READING, SHARED, make_readers_report, on_top_s, ways
from localrun.plan.shapes import load_model
from localrun.plan.speed import decode_speed, prefill_speed

LINK = Link("toy", "toy", round_trip_s=1e-3, message_s=1e-4, bytes_per_s=1e9)
V3 = load_model("deepseek-v3")
ROW = 61 * 2 * 576  # bytes a token


def test_what_is_on_top() -> None:
    """Two chunks: a pause, two round trips and logits each; the whole wire's time once computing is shorter."""
    once = 2 * (1e-3 + 2e-3 + 4 * 129280 / 1e9)
    assert on_top_s(V3, LINK, 1024, 1.0) == pytest.approx(once)
    assert on_top_s(V3, LINK, 1024, 0.01) == pytest.approx(once + 1024 * ROW / 1e9 - 0.01)


def test_requests_by_hand() -> None:
    """In turn on one host; beside each other with a reader; with many readers replies are what takes the time."""
    machine = toy()
    placement = plan_memory(V3, machine, 2048).placement
    reading, step = (
        speed.seconds
        for speed in (prefill_speed(V3, machine, placement, 1024), decode_speed(V3, machine, placement, 64))
    )
    found = {way.name: way for way in ways(V3, machine, LINK, 2048, 1, 1024, 100)}
    assert list(found) == [ONE, SHARED, READING]
    assert found[ONE].requests_per_hour == pytest.approx(3600 / (reading + 100 * step))
    assert found[ONE].meanwhile_per_s == pytest.approx(1 / (1.0 + step))
    elsewhere = reading + on_top_s(V3, LINK, 1024, reading)
    assert found[READING].first_token_s == pytest.approx(elsewhere)
    assert found[READING].requests_per_hour == pytest.approx(3600 / max(elsewhere, 100 * step))
    assert found[READING].meanwhile_per_s == found[READING].tokens_per_s == pytest.approx(1 / step)
    many = ways(V3, machine, LINK, 2048, 63, 1024, 100)[-1]
    assert many.requests_per_hour == pytest.approx(3600 / (100 * step))


def test_a_reader_needs_room_for_the_whole_model() -> None:
    """Where shares alone fit, they are what pays; a model without experts has none."""
    small = replace(toy(), ram_bytes=3e11)
    report = make_readers_report(V3, small, LINK, 2048, 1, 512, 100)
    assert [row["fits"] for row in report["rows"]] == [False, True, False]
    assert (report["pays"], report["refusal"]) == (SHARED, None)
    assert [way.name for way in ways(load_model("llama-3.1-405b"), toy(), LINK, 2048, 1, 512, 100)] == [ONE, READING]
