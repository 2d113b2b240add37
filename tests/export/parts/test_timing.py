"""Interleaved medians: all calls take turns, equally often, slow ones less."""

from clipquant.export.parts import timing
from clipquant.export.parts.timing import interleaved_medians


def test_every_call_is_timed_as_often_and_in_turn():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    medians = interleaved_medians(calls, repeats=7)
    assert order == list("abc") * (len(order) // 3)
    assert len(order) >= 3 * 7
    assert medians.keys() == calls.keys()


def test_a_median_is_in_milliseconds_and_slow_calls_are_repeated_less(monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    counts = []
    assert interleaved_medians({"a": lambda: counts.append(1)}) == {"a": 1000.0}
    assert len(counts) < timing.REPEATS
