"""Ctrl-C and SIGTERM during a run: all processes stop after the same step."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils

from jaxft import interrupts
from jaxft.errors import Interrupted


class StopSignals:
    """Installs a run's signal handlers; none outside the main thread, where Python does not allow them.

    The first signal only sets a flag, which `reached()` returns and for which `interrupts.check()` raises. With several
    processes, JAX's coordinator receives SIGTERM and finds a step that none of them has begun; Ctrl-C is forwarded as
    SIGTERM.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.saved_step = 0  # of the newest checkpoint, for the message
        self._several = jax.process_count() > 1
        self._forwarded = False

    def __enter__(self) -> "StopSignals":
        interrupts.check()
        handlers: dict[signal.Signals, Any] = dict.fromkeys(interrupts.SIGNALS, interrupts.on_signal)
        if self._several:
            handlers = {signal.SIGINT: self._forward}
        if threading.current_thread() is not threading.main_thread():
            handlers = {}
        self._previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: a handler that is not Python's
        if isinstance(error, Interrupted):
            error.remedy = "resume with the same command"
            if self.saved_step:
                error.remedy += f" (after step {self.saved_step})"
        if self._previous and not interrupts.is_watching():  # a run in another thread leaves the flag to the main one
            interrupts.forget()

    def _forward(self, number: int, frame: FrameType | None) -> None:
        if self._forwarded:
            interrupts.end(number)
        self._forwarded = True
        os.kill(os.getpid(), signal.SIGTERM)

    def protect_results(self) -> None:
        """Lets a stop wait for a checkpoint from now on, since it would lose steps that have been trained."""
        interrupts.protect_results()

    def reached(self, step: int) -> bool:
        """Returns whether to stop before `step`. Every process must call this for every step, in order."""
        if self._several:
            if multihost_utils.reached_preemption_sync_point(step):
                self.received = signal.SIGTERM
        else:
            self.received = interrupts.received
        return self.received is not None
