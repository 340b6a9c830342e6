"""Ctrl-C and SIGTERM: in imports, in code that checks the flag, in code that does not, and in other programs."""

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxft import interrupts
from jaxft.errors import Interrupted
from jaxft.run.signals import StopSignals
from tests.helpers.runs import Run

BOTH = pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])

# The import swallows every exception, as some do to find out whether a package is installed.
INTERRUPTED_IMPORT = """
import os, sys

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "jax":
            try:
                os.kill(os.getpid(), {number})
                for _ in range(1000):
                    pass
            except BaseException:
                pass
            sys.exit("swallowed")

sys.meta_path.insert(0, Interrupting())
from jaxft.cli import run
run("train", ["--help"])
"""
HELD = """
import os, sys
from jaxft import interrupts

interrupts.hold_signals()
os.kill(os.getpid(), {number})
os.execv(sys.executable, [sys.executable, "-c", '''
print("started", flush=True)
from jaxft import interrupts
interrupts.end_at_once_on_signals()
print("not ended")
'''])
"""
# Waits in C while it writes a file. arguments: the file, whether there are results, and the signals.
BUSY = """
import os, sys, threading, time
from pathlib import Path
from jaxft import interrupts
from jaxft.errors import run_command
from jaxft.files import atomic_write

def send(numbers):
    for number in numbers:
        time.sleep(0.2)
        os.kill(os.getpid(), int(number))

def main(argv):
    path, has_results, *numbers = argv
    interrupts.set_flag_on_signals()
    if has_results == "True":
        interrupts.protect_results()
    with atomic_write(Path(path)) as file:
        threading.Thread(target=send, args=(numbers,)).start()
        time.sleep(2)
        interrupts.check()

sys.exit(run_command(main, sys.argv[1:]))
"""


@pytest.fixture
def flag() -> Iterator[None]:
    yield
    interrupts.forget()


@BOTH
def test_a_signal_ends_a_command_that_is_being_imported(run: Run, number: signal.Signals, code: int) -> None:
    result = run("-c", INTERRUPTED_IMPORT.format(number=int(number)))
    assert (result.returncode, result.stdout, result.stderr) == (code, "", f"stopped by {number.name}\n")


@BOTH
def test_a_signal_waits_while_python_starts_again(run: Run, number: signal.Signals, code: int) -> None:
    result = run("-c", HELD.format(number=int(number)))
    assert (result.returncode, result.stdout) == (code, "started\n")


@pytest.mark.parametrize(
    ("has_results", "signals", "lines", "waits"),
    [
        (False, [signal.SIGTERM], ["stopped by SIGTERM"], False),
        (True, [signal.SIGTERM], ["SIGTERM: stopping after the current steps", "stopped by SIGTERM"], True),
        (
            True,
            [signal.SIGTERM] * 2,
            [
                "SIGTERM: stopping after the current steps",
                "stopped by SIGTERM; the same command resumes from the last checkpoint",
            ],
            False,
        ),
    ],
    ids=["nothing to save", "results", "twice"],
)
def test_code_that_does_not_check_the_flag_is_ended(
    run: Run, tmp_path: Path, has_results: bool, signals: list[signal.Signals], lines: list[str], waits: bool
) -> None:
    started = time.monotonic()
    result = run("-c", BUSY, tmp_path / "out", has_results, *map(int, signals))
    assert (result.returncode, result.stderr.splitlines()) == (143, lines)
    assert waits == (time.monotonic() - started > 2)
    assert list(tmp_path.iterdir()) == []


def test_a_run_restores_the_handlers_of_its_program(flag: None) -> None:
    before = [signal.getsignal(number) for number in interrupts.SIGNALS]
    with pytest.raises(Interrupted, match="stopped by SIGTERM; resume with the same command"), StopSignals() as stop:
        assert not stop.reached(1)
        signal.raise_signal(signal.SIGTERM)
        assert stop.reached(2)
        interrupts.check()
    assert [signal.getsignal(number) for number in interrupts.SIGNALS] == before
    interrupts.check()  # the next run begins without the flag


def test_a_second_signal_interrupts_a_run_in_another_program(flag: None) -> None:
    with pytest.raises(Interrupted), StopSignals():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def test_a_run_in_another_thread_leaves_signals_alone() -> None:
    seen: list[object] = []

    def train() -> None:
        with StopSignals() as stop:
            seen.extend([signal.getsignal(signal.SIGTERM), stop.reached(1)])

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM), False]


def test_a_run_in_another_thread_leaves_the_flag_to_the_main_one(flag: None) -> None:
    def train() -> None:
        with StopSignals():
            started.set()
            stopped.wait()

    started, stopped = threading.Event(), threading.Event()
    thread = threading.Thread(target=train)
    with StopSignals() as stop:
        thread.start()
        started.wait()
        signal.raise_signal(signal.SIGTERM)
        stopped.set()
        thread.join()
        assert stop.reached(1)
