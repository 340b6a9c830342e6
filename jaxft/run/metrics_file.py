"""What is counted: the lines of metrics.jsonl, and what predictions say of a network."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import jax

from jaxft.errors import UserError


class MetricsFile:
    """DIR/metrics.jsonl: each training step and each evaluation once, in order, whatever came between.

    accuracy: of the evaluations in it, by step. Raises UserError where it is damaged, but for a last line that a
    killed run left half-written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines = read_lines(path)
        self.accuracy = {line["step"]: line["accuracy"] for line in self._lines if line["split"] == "eval"}
        self._file: int | None = None
        self._pending = b""
        self._failed = False

    def open(self, last_step: int) -> list[dict[str, Any]]:
        """To append to, after what an interrupted run wrote beyond its checkpoint at `last_step` is cut off.

        Returns the lines that are kept.
        """
        kept = [line for line in self._lines if line["step"] <= last_step]
        steps = [line["step"] for line in kept if line["split"] == "train"]
        if steps != list(range(1, last_step + 1)):
            lost = min({*range(1, last_step + 1)} - {*steps}, default=last_step)
            raise UserError(
                f"{self.path} lacks step {lost}, or has it twice, and the checkpoint is of step {last_step}; "
                "put the file back, or name another --workdir"
            )
        for step in [step for step in self.accuracy if step > last_step]:
            del self.accuracy[step]
        if jax.process_index():
            return kept
        partial = self.path.with_name(f"{self.path.name}.partial")
        try:
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
            partial.replace(self.path)
            self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error}") from None
        return kept

    def write(self, **line: Any) -> None:
        """A line that cannot be written now, as on a full disk, is kept for the next time."""
        if line["split"] == "eval":
            self.accuracy[line["step"]] = line["accuracy"]
        if jax.process_index():
            return
        self._pending += (json.dumps(line) + "\n").encode()
        try:
            self.flush()
        except OSError as error:
            if not self._failed:
                print(f"{self.path} cannot be written ({error}); its lines are kept for later", file=sys.stderr)
            self._failed = True

    def flush(self) -> None:
        """Raises OSError."""
        while self._pending and self._file is not None:
            self._pending = self._pending[os.write(self._file, self._pending) :]
        self._failed = False

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Without a last line that is half-written; raises UserError for another that is damaged."""
    texts = path.read_bytes().split(b"\n") if path.exists() else []
    lines = []
    for number, text in enumerate(texts[:-1], 1):
        try:
            line = json.loads(text)
            assert {"step", "split", "accuracy"} <= line.keys()
        except (ValueError, AssertionError, AttributeError):
            raise UserError(f"{path} is damaged in line {number}; put it back, or name another --workdir") from None
        lines.append(line)
    return lines
