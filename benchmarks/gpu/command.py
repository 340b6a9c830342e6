"""Runs jaxft's commands as a user does, and notes when each line of their output and of metrics.jsonl appears."""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.child import Child
from benchmarks.gpu.part import Settings, Skipped

POLL = 0.01  # seconds between two looks at metrics.jsonl
GRACE = 10  # of its seconds, those that a command has after SIGTERM to write its checkpoint; at most a quarter
CACHE = "JAXFT_CACHE"
FAST_COMPILATION = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"  # of toys, on a CPU


class Clock:
    """The time that a part has left."""

    def __init__(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds

    def left(self) -> float:
        return self._until - time.monotonic()

    def need(self, seconds: float, for_what: str) -> None:
        """Raises Skipped if less than `seconds` are left."""
        if self.left() < seconds:
            raise Skipped(f"{max(self.left(), 0):.0f} s are too little time for {for_what}")


@dataclass
class Observed:
    """Observations of a command. Times are seconds since its start."""

    lines: list[tuple[float, str]] = field(default_factory=list)  # of standard output
    rows: list[tuple[float, dict[str, Any]]] = field(default_factory=list)  # of metrics.jsonl
    seconds: float = 0.0  # until its end
    code: int = 0  # exit code; negative after a signal
    stopped: str = ""  # 'condition' or 'limit', if it was asked to stop
    errors: str = ""  # the end of standard error

    def metrics(self, split: str = "") -> list[dict[str, Any]]:
        """Returns the rows of a split, by default of both."""
        return [row for _, row in self.rows if not split or row["split"] == split]

    def evaluated(self) -> list[float]:
        """Returns the time of each evaluation's row."""
        return [seconds for seconds, row in self.rows if row["split"] == "eval"]

    def begun(self) -> float:
        """Returns when training could begin: the start had been printed."""
        return self.first("workdir") or 0.0

    def first(self, start: str) -> float | None:
        """Returns the time of the first line that starts with a text."""
        return next((seconds for seconds, line in self.lines if line.startswith(start)), None)

    def first_step(self) -> float | None:
        """Returns the time of the first row of metrics."""
        return self.rows[0][0] if self.rows else None


class CommandError(RuntimeError):
    """Raised if a command fails by itself, with what was seen of it until then."""

    def __init__(self, text: str, observed: Observed) -> None:
        super().__init__(text)
        self.observed = observed


class _Command(Child):
    """A child whose lines of standard output are kept with their times, whatever they are."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        self.begun = time.monotonic()
        self.observed = Observed()
        super().__init__(command, env)

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.observed.lines.append((time.monotonic() - self.begun, line.rstrip("\n")))

    def join(self) -> None:
        self._reader.join(5)


class _Rows:
    """Reads the rows that a run appends to metrics.jsonl, again from the start if it replaces the file."""

    def __init__(self, path: Path | None, observed: Observed, begun: float) -> None:
        self._path, self._observed, self._begun = path, observed, begun
        self._inode, self._offset = 0, 0

    def read(self) -> None:
        if not self._path:
            return
        try:
            with self._path.open("rb") as file:
                now = os.fstat(file.fileno())
                if now.st_ino != self._inode or now.st_size < self._offset:
                    self._inode, self._offset = now.st_ino, 0
                    self._observed.rows.clear()
                if now.st_size == self._offset:
                    return
                file.seek(self._offset)
                text = file.read()
        except FileNotFoundError:
            return
        complete = text[: text.rfind(b"\n") + 1]
        self._offset += len(complete)
        seconds = time.monotonic() - self._begun
        self._observed.rows += [(seconds, json.loads(line)) for line in complete.splitlines()]


def watch(
    arguments: Sequence[str],
    seconds: float,
    env: Mapping[str, str],
    *,
    metrics: Path | None = None,
    until: Callable[[Observed], bool] = lambda observed: False,
    by: signal.Signals = signal.SIGTERM,
) -> Observed:
    """Runs `python -m *arguments` to its end, until a condition holds (then it gets the signal `by`), or for `seconds`.

    It gets SIGTERM up to GRACE before the `seconds` are over. Its process group is killed GRACE after a signal, and in
    any case at the end. Raises CommandError with the end of its standard error if it fails by itself.
    """
    grace = min(GRACE, seconds / 4)
    limit = seconds - grace
    command = _Command([sys.executable, "-m", *arguments], env)
    observed = command.observed
    rows = _Rows(metrics, observed, command.begun)
    kill_at = None
    try:
        while command.process.poll() is None:
            now = time.monotonic()
            rows.read()
            if kill_at is not None:
                if now > kill_at:
                    break
            elif until(observed) or now - command.begun > limit:
                observed.stopped = "condition" if now - command.begun <= limit else "limit"
                kill_at = now + grace
                command.process.send_signal(by if observed.stopped == "condition" else signal.SIGTERM)
            time.sleep(POLL)
    finally:
        command.kill()
    observed.seconds = time.monotonic() - command.begun
    command.join()
    rows.read()
    observed.code = command.process.returncode
    observed.errors = command.last_errors()
    if observed.code and not observed.stopped:
        text = f"{' '.join(arguments[:2])} ... ended with exit code {observed.code}: {observed.errors}"
        raise CommandError(text, observed)
    return observed


def environment(settings: Settings, flags: str = "") -> dict[str, str]:
    """Returns the environment of commands that share decoded images and compiled programs. flags: more XLA_FLAGS."""
    fast = FAST_COMPILATION if settings.toy and not settings.gpu else ""
    together = " ".join(part for part in (os.environ.get("XLA_FLAGS", ""), fast, flags) if part)
    return {CACHE: str(settings.cache.parent / "jaxft_cache")} | ({"XLA_FLAGS": together} if together else {})


def forget_programs(settings: Settings) -> None:
    """Removes the compiled programs that commands share; decoded images stay."""
    shutil.rmtree(Path(environment(settings)[CACHE], "compiled"), ignore_errors=True)


def overrides(settings: Settings, changes: Mapping[str, Any] = {}) -> list[str]:
    """Returns arguments of `train` for the given data and weights; with --toy for a small network with random weights.

    changes: config keys that replace these.
    """
    values: dict[str, Any] = {
        "data.name": settings.data,
        "model.pretrained": "" if settings.toy else settings.weights,
        "model.dtype": "bfloat16",
        "model.onednn": "never",
    }
    if settings.toy:
        values |= {"model.arch": "resnet18", "model.width": 4, "image_size": 32}
    return [f"--config.{key}={value}" for key, value in (values | dict(changes)).items()]


# Nine parameters: those of `watch`, and the run.
def train(
    settings: Settings,
    workdir: Path,
    seconds: float,
    changes: Mapping[str, Any] = {},
    *,
    config: str = "cifar10",
    module: str = "jaxft.train",
    env: Mapping[str, str] = {},
    until: Callable[[Observed], bool] = lambda observed: False,
    by: signal.Signals = signal.SIGTERM,
) -> Observed:
    """Runs `python -m jaxft.train` with a shipped config in a workdir; see `watch`. env: added to `environment`.

    module: what to run in place of jaxft.train.
    """
    arguments = [module, f"--config=configs/{config}.py", f"--workdir={workdir}", *overrides(settings, changes)]
    together = environment(settings) | dict(env)
    return watch(arguments, seconds, together, metrics=workdir / "metrics.jsonl", until=until, by=by)


def needs_gpu_or_toy(settings: Settings) -> None:
    """Raises Skipped without a GPU, unless --toy has asked for sizes that a CPU can train."""
    if not (settings.gpu or settings.toy):
        raise Skipped("there is no GPU; --toy runs this on a CPU")
