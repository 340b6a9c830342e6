"""The lines that a terminal shows, and those left after Ctrl-C."""

import os
import pty
import re
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from jaxft.progress import Progress
from tests.helpers.runs import ROOT, SMALL_RUN, environment


@pytest.mark.slow
def test_ctrl_c_leaves_no_half_drawn_line(tmp_path: Path) -> None:
    leader, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    command = [sys.executable, *SMALL_RUN, "--workdir", str(tmp_path / "run")]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(1), stdin=terminal, stdout=terminal, stderr=terminal
    ) as process:
        os.close(terminal)
        output, interrupted = b"", False
        try:
            while part := os.read(leader, 4096):
                output += part
                if b"loss" in output and not interrupted:  # in the middle of an epoch's progress bar
                    process.send_signal(signal.SIGINT)
                    interrupted = True
        except OSError:  # on Linux: the other side is closed
            pass
    os.close(leader)
    assert process.returncode == 130
    *_, last = [line for line in shown(output.decode()) if line]
    assert last.startswith("stopped by SIGINT")
    assert not any("images/s" in line for line in shown(output.decode()))


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
    monkeypatch.setattr("jaxft.progress.time.monotonic", lambda: next(times))
    with Progress("epoch 1/2", 1000) as progress:
        progress.update(100, 2.5)
        progress.update(100, 0.25)
    assert capsys.readouterr() == ("", "epoch 1/2: 200/1000 images, loss 0.2500, 5.0 images/s, 160 s left\n")
