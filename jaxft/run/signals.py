"""SIGTERM and Ctrl-C, acted upon between two steps, by all processes after the same step."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

import jax
from jax.experimental import multihost_utils

from jaxft.errors import Interrupted


class StopSignals:
    """Within `deferred()` a signal is noted, for `reached` to tell; elsewhere, or a second time, it raises Interrupted.

    With several processes JAX's coordinator takes SIGTERM and finds a step that all of them have yet to begin; Ctrl-C
    is passed on as SIGTERM.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._deferring = False
        self._several = jax.process_count() > 1

    def __enter__(self) -> "StopSignals":
        signals = [signal.SIGINT] if self._several else [signal.SIGINT, signal.SIGTERM]
        self._previous = {number: signal.signal(number, self._handle) for number in signals}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)
            return
        again, self.received = self.received, signal.Signals(number)
        if again or not self._deferring:
            raise Interrupted(self.received)
        print(f"\n{self.received.name}: stopping after the steps under way", file=sys.stderr, flush=True)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def reached(self, step: int) -> bool:
        """Whether to stop before `step`; every process asks for every step, in order."""
        if self._several and multihost_utils.reached_preemption_sync_point(step):
            self.received = signal.SIGTERM
        return self.received is not None
