"""What a terminal shows, and what is left on it."""

import os
import pty
import re
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from tests.conftest import ROOT, environment

QUICK = (
    "--config=configs/quickstart.py",
    "--config.image_size=32",
    "--config.model.width=8",
    "--config.model.pretrained=",
)


@pytest.mark.slow
def test_ctrl_c_leaves_no_half_drawn_line(tmp_path: Path) -> None:
    leader, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    command = [sys.executable, "-m", "jaxft.train", *QUICK, "--workdir", str(tmp_path / "run")]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(1), stdin=terminal, stdout=terminal, stderr=terminal
    ) as process:
        os.close(terminal)
        output, interrupted = b"", False
        try:
            while part := os.read(leader, 4096):
                output += part
                if b"loss" in output and not interrupted:  # in the midst of an epoch's bar
                    process.send_signal(signal.SIGINT)
                    interrupted = True
        except OSError:  # Linux's way to say that the other side is closed
            pass
    os.close(leader)
    assert process.returncode == 130
    *_, last = [line for line in shown(output.decode()) if line]
    assert last.startswith("stopped by SIGINT")
    assert not any("images/s" in line for line in shown(output.decode()))


def shown(output: str) -> list[str]:
    """The lines as a terminal shows them in the end: a carriage return goes back to the line's beginning."""
    lines = []
    for line in re.sub("\x1b\\[A", "", output).replace("\r\n", "\n").split("\n"):
        screen = ""
        for part in line.split("\r"):
            screen = part + screen[len(part) :]
        lines.append(screen.rstrip())
    return lines
