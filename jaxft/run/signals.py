"""Handles SIGTERM and Ctrl-C between two steps: all processes stop after the same step."""

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
    """Signal handlers: inside `deferred()` the first signal only sets a flag that `reached()` reports.

    A second signal, or one outside `deferred()`, raises Interrupted. With several processes, JAX's coordinator receives
    SIGTERM and finds a step that none of them has begun; Ctrl-C is forwarded as SIGTERM.
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
        previous, self.received = self.received, signal.Signals(number)
        if previous or not self._deferring:
            raise Interrupted(self.received)
        clear = "\r\x1b[K" if sys.stderr.isatty() else "\n"  # a terminal's progress bar is drawn again below
        print(f"{clear}{self.received.name}: stopping after the current steps", file=sys.stderr, flush=True)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def reached(self, step: int) -> bool:
        """Returns whether to stop before `step`. Every process must call this for every step, in order."""
        if self._several and multihost_utils.reached_preemption_sync_point(step):
            self.received = signal.SIGTERM
        return self.received is not None
