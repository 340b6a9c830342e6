"""Ctrl-C and SIGTERM: the first signal sets a flag that loops check, a second one ends the process at once.

A handler that raises could interrupt any code, and imports and callbacks from C++ swallow exceptions. Commands install
these handlers before they import anything else, so this module imports little.
"""

import atexit
import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE_SECONDS = 0.7  # for code that checks the flag; then a command that has nothing to save ends anyway

received: signal.Signals | None = None  # the flag
partials: set[str] = set()  # files and folders being written; removed if the process ends at once
_watching = False  # whether this process is a command, which a thread may end
_has_results = False  # whether results would be lost if the process ended at once


def check() -> None:
    """Raises Interrupted if a signal has arrived. Loops over batches and files call it."""
    if received:
        from jaxft.errors import Interrupted

        raise Interrupted(received)


def protect_results() -> None:
    """Keeps the first signal from ending the process at once, from now on: a checkpoint has to be written first."""
    global _has_results
    _has_results = True


def forget() -> None:
    """Clears the flag, for a program that continues after its run was stopped."""
    global received, _has_results
    received, _has_results = None, False


def end_at_once_on_signals() -> None:
    """Lets a signal end the process at once, with exit code 128 plus its number, while a command is being imported."""
    with suppress(ValueError):  # not in the main thread
        for number in SIGNALS:
            signal.signal(number, lambda number, _: end(number))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # blocked by `hold_signals` before a re-exec


def hold_signals() -> None:
    """Blocks the signals until `end_at_once_on_signals`, also across an exec, while nothing could handle them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def set_flag_on_signals() -> None:
    """Lets the first signal set the flag while a command runs.

    If nothing checks the flag within GRACE_SECONDS, as during a compilation, the process is ended, unless
    `protect_results` has been called.
    """
    import threading

    global _watching
    if _watching or threading.current_thread() is not threading.main_thread():
        return
    _watching = True
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)  # works even while the main thread is in C++
    for number in SIGNALS:
        signal.signal(number, on_signal)
    threading.Thread(target=_watch, args=(reading,), name="signals", daemon=True).start()


def is_watching() -> bool:
    """Returns whether this process is a command, whose handlers stay until it ends."""
    return _watching


def on_signal(number: int, frame: FrameType | None) -> None:
    """Sets the flag. In a program that is not a command, a second signal raises Interrupted."""
    global received
    if received:
        if not _watching:
            check()
        return
    received = signal.Signals(number)
    if _has_results:
        _write(f"{received.name}: stopping after the current steps")


def end(number: int) -> NoReturn:
    """Ends the process without unwinding the stack, but with a message, an exit code and no partial files."""
    resumes = "; the same command resumes from the last checkpoint" if _has_results else ""
    _write(f"stopped by {signal.Signals(number).name}{resumes}")
    for path in [*partials]:
        _remove(path)
    os._exit(128 + number)


def exit_now(code: int) -> NoReturn:
    """Ends the process after its command without freeing its memory, which would take half a second.

    Python would have restored the signals' default handlers by then. After a signal, functions registered with atexit
    are not called, since they may wait for threads that are still at work.
    """
    if not received:
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _watch(signals: int) -> None:
    """Ends the process at a second signal, or after a first one that the main thread does not notice."""
    import select

    first: int | None = None
    while True:
        waiting = GRACE_SECONDS if first and not _has_results else None
        if not select.select([signals], [], [], waiting)[0]:
            if first and not _has_results:
                end(first)
            continue
        (number,) = os.read(signals, 1)
        if signal.getsignal(number) is not on_signal:  # a web server handles it
            continue
        if first:
            end(number)
        first = number


def _remove(path: str) -> None:
    try:
        os.unlink(path)  # noqa: PTH108, pathlib takes a while to import
    except OSError:
        import shutil

        shutil.rmtree(path, ignore_errors=True)


def _write(text: str) -> None:
    """Writes a line to stderr without Python's buffers, which may be locked by the code that was interrupted."""
    try:
        stderr = sys.stderr.fileno()  # not always 2: see process.divert_native_messages
    except (AttributeError, ValueError, OSError):
        stderr = 2
    clear = "\r\x1b[K" if os.isatty(stderr) else ""  # a terminal's progress bar, and its ^C
    with suppress(OSError):
        os.write(stderr, f"{clear}{text}\n".encode())
