"""Child processes of benchmarks: each leads a process group, reports JSON lines, and never outlives its parent."""

import fcntl
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

_PR_SET_PDEATHSIG = 1
# A program that lets Linux kill it when its parent ends, and then becomes the command. A preexec_fn would do the same,
# but needs a fork of this process, which may have threads.
_DIE_WITH_PARENT = (
    sys.executable,
    "-c",
    f"import ctypes, os, sys; ctypes.CDLL(None).prctl({_PR_SET_PDEATHSIG}, {int(signal.SIGKILL)}); "
    "os.execvp(sys.argv[1], sys.argv[1:])",
)
_running: set["Child"] = set()


class Child:
    """A process whose standard output is read as JSON objects and lists, one a line, with time limits.

    Other lines are ignored. Start it from the main thread: Linux kills it when the thread that started it ends.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115, closed by `kill`; a pipe could fill up and block
        flags = fcntl.fcntl(self._errors, fcntl.F_GETFL)
        fcntl.fcntl(self._errors, fcntl.F_SETFL, flags | os.O_APPEND)  # the child shares the file's position
        self._all_errors = ""  # once it is closed
        self.process = subprocess.Popen(
            [*(_DIE_WITH_PARENT if sys.platform == "linux" else ()), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=os.environ | (env or {}),
            text=True,
            errors="replace",
            start_new_session=True,
        )
        _running.add(self)
        self._answers: queue.Queue[Any] = queue.Queue()  # JSON values; None at the end
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            with suppress(ValueError):
                value = json.loads(line)
                if isinstance(value, dict | list):
                    self._answers.put(value)
        self._answers.put(None)

    def send(self, line: str = "") -> None:
        """Writes a line to the child's standard input. A child that has ended is noticed by the next `read`."""
        assert self.process.stdin
        with suppress(OSError):
            print(line, file=self.process.stdin, flush=True)

    def read(self, seconds: float) -> Any:
        """Returns the next JSON object or list.

        Raises TimeoutError, or RuntimeError with the end of standard error if the child has ended without one.
        """
        try:
            answer = self._answers.get(timeout=max(seconds, 0))
        except queue.Empty:
            raise TimeoutError(f"no answer within {seconds:.0f} s") from None
        if answer is None:
            self._answers.put(None)
            code = self.process.wait()
            raise RuntimeError(f"exit code {code}: {self.last_errors()}")
        return answer

    def has_answer(self) -> bool:
        """Returns whether `read` would return, or raise, at once."""
        return not self._answers.empty()

    def last_errors(self, characters: int = 600) -> str:
        """Returns the end of the child's standard error."""
        return self.all_errors().strip()[-characters:] or "nothing on standard error"

    def all_errors(self) -> str:
        """Returns the child's standard error, also after its end; of a very long one, the last million bytes."""
        if not self._errors.closed:
            self._errors.seek(max(self._errors.seek(0, os.SEEK_END) - 10**6, 0))
            self._all_errors = self._errors.read().decode(errors="replace")
        return self._all_errors

    def close(self, seconds: float = 0) -> None:
        """Closes the child's standard input, waits up to `seconds` for its end, then kills its process group."""
        assert self.process.stdin
        with suppress(OSError):
            self.process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        self.kill()

    def pause(self) -> None:
        """Stops the process group until `resume`, so that it does not disturb a measurement."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """Kills the child and its process group."""
        self._signal(signal.SIGKILL)
        self.process.wait()
        _running.discard(self)
        self._reader.join(1)  # ends when the group's last process does
        self.all_errors()
        self._errors.close()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe and not (pipe is self.process.stdout and self._reader.is_alive()):
                with suppress(OSError):
                    pipe.close()


def kill_children() -> None:
    """Kills every child that is still running, with its process group."""
    for child in [*_running]:
        child.kill()
