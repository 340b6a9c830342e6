"""The clock that divides a start into parts."""

import time

import pytest

from benchmarks import startup, startup_parts
from benchmarks.startup_parts import Clock


def test_parts_add_up_and_exclude_nested_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 10.0
    monkeypatch.setattr(time, "clock_gettime", lambda _: now)

    def advance(seconds: float) -> None:
        nonlocal now
        now += seconds

    clock = Clock(10.0)

    def inner() -> None:
        advance(3)
        clock.listen("/jax/core/compile/jaxpr_trace_duration", 1)  # traced within the next one
        advance(1)
        clock.listen("/jax/core/compile/jaxpr_trace_duration", 3)

    def outer() -> None:
        advance(2)
        clock.timed("inner", inner)()
        advance(4)

    clock.timed("outer", outer)()
    advance(5)
    clock.switch()
    assert dict(clock.seconds) == {"other": 5, "outer": 6, "inner": 1, "trace": 3}


def test_all_parts_exist() -> None:
    for names in startup_parts.PARTS.values():
        for name in names:
            owner, attribute = startup_parts.find(name)
            assert callable(getattr(owner, attribute))


def test_medians_of_nested_numbers() -> None:
    starts = [{"device": "x", "parts": {"a": 1.0}}, {"device": "x", "parts": {"a": 3.0, "b": 6.0}}]
    assert startup.medians(starts) == {"device": "x", "parts": {"a": 2.0, "b": 3.0}}
