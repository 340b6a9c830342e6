"""The lines that a terminal shows, and those left after Ctrl-C."""

import os
import pty
import re
import signal
import subprocess
import sys
import termios
from pathlib import Path
from types import SimpleNamespace

import pytest

from jaxft.progress import Progress
from tests.helpers.runs import ROOT, SMALL_RUN, Run, environment


@pytest.mark.slow
def test_ctrl_c_leaves_no_half_drawn_line(tmp_path: Path) -> None:
    # the signal arrives in the middle of an epoch's progress bar
    code, output = on_a_terminal(*SMALL_RUN, "--workdir", tmp_path / "run", interrupt_after=b"loss")
    assert code == 130
    *_, last = [line for line in shown(output) if line]
    assert last.startswith("stopped by SIGINT")
    assert not any("images/s" in line for line in shown(output))


def on_a_terminal(*arguments: object, interrupt_after: bytes | None = None) -> tuple[int, str]:
    """Runs Python on a terminal until nobody has it open; returns the exit code and what the terminal received."""
    leader, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    command = [sys.executable, *map(str, arguments)]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(1), stdin=terminal, stdout=terminal, stderr=terminal
    ) as process:
        os.close(terminal)
        output, interrupted = b"", False
        try:
            while part := os.read(leader, 4096):
                output += part
                if interrupt_after and interrupt_after in output and not interrupted:
                    process.send_signal(signal.SIGINT)
                    interrupted = True
        except OSError:  # on Linux: the other side is closed
            pass
    os.close(leader)
    return process.returncode, output.decode()


def shown(output: str) -> list[str]:
    """Returns the lines that a terminal finally shows: "\\r" moves to the start of the line, "\\x1b[K" clears it."""
    lines = []
    for line in re.sub("\x1b\\[A", "", output).replace("\r\n", "\n").split("\n"):
        screen = ""
        for part in line.split("\r"):
            screen = part.removeprefix("\x1b[K") if part.startswith("\x1b[K") else part + screen[len(part) :]
        lines.append(screen.rstrip())
    return lines


def test_a_log_gets_a_line_now_and_then(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a terminal: the share that is done, the latest loss, the rate and the time left."""
    times = iter([0.0, 10.0, 40.0])
    monkeypatch.setattr("jaxft.progress.time", SimpleNamespace(monotonic=lambda: next(times)))
    with Progress("epoch 1/2", 1000) as progress:
        progress.update(100, 2.5)
        progress.update(100, 0.25)
    assert capsys.readouterr() == ("", "epoch 1/2: 200/1000 images, loss 0.2500, 5.0 images/s, 160 s left\n")


def test_the_rate_and_the_time_left_exclude_compilation(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([0.0, 100.0, 120.0, 140.0])
    monkeypatch.setattr("jaxft.progress.time", SimpleNamespace(monotonic=lambda: next(times)))
    with Progress("evaluating", 1000, log_after=130) as progress:
        progress.restart_clock()
        progress.update(100)
        progress.update(100)
    assert capsys.readouterr() == ("", "evaluating: 200/1000 images, 5.0 images/s, 160 s left\n")


# Native code writes to file descriptor 2 during a progress bar, and the process aborts.
NATIVE = """
import os, sys, time
from jaxft import process

process.is_command = lambda: True
process.divert_native_messages()
from jaxft.errors import write_message
from jaxft.progress import Progress

with Progress("epoch 1/2", 1000) as progress:
    time.sleep(1)
    progress.restart_clock()
    started = time.monotonic()
    for i in range(10):
        time.sleep(0.1)
        progress.update(10, 1.0)
        if i == 3:
            os.write(2, b"E0000 cuda_timer.cc:86] Delay kernel timed out: measured time has sub-optimal accuracy.\\n")
        if i == 5:
            os.write(2, b"W0000 a warning\\n")
        if i == 7:
            write_message("compiled a step")
    rate = 100 / (time.monotonic() - started)
    time.sleep(0.2)
print("rate", rate)
assert sys.stderr.isatty() and not os.isatty(2)
os.write(2, b"last words")
os.abort()
"""


def test_native_messages_do_not_break_the_progress_bar() -> None:
    code, output = on_a_terminal("-c", NATIVE)  # also waits for the end of the process that relays them
    assert code == -signal.SIGABRT
    lines = [line for line in shown(output) if line and not line.startswith("rate")]
    assert lines == ["W0000 a warning", "compiled a step", "last words"]
    *_, shown_rate = re.findall(r"([0-9.]+) images/s", output)
    *_, rate = re.findall(r"rate ([0-9.]+)", output)
    assert float(shown_rate) > 0.8 * float(rate)  # with the second before them it would be half of it


@pytest.mark.parametrize("option", ["", "--debug"])
def test_a_log_and_debugging_get_native_messages_as_they_are(run: Run, option: str) -> None:
    script = f"""
import os, sys
from jaxft import cli, process

process.is_command = lambda: True
process.reexec_with_huge_pages = lambda: None
process.import_jax = lambda _: os.write(2, b"Delay kernel timed out") and os._exit(3)
cli.run("train", {[option] if option else []})
"""
    if option:
        code, output = on_a_terminal("-c", script)
    else:
        result = run("-c", script)
        code, output = result.returncode, result.stderr
    assert (code, output) == (3, "Delay kernel timed out")
