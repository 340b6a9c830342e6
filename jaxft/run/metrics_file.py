"""Reads and writes metrics.jsonl, one JSON object per training step and per evaluation."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from jaxft.errors import UserError
from jaxft.files import atomic_write
from jaxft.main_process import is_main_process


class MetricsFile:
    """DIR/metrics.jsonl, which holds each step and each evaluation once and in order, even after interruptions.

    accuracy: {step: accuracy} of the evaluations in the file. Raises UserError if the file is damaged; a last line
    that a killed run left half-written is dropped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines = read_lines(path)
        self.accuracy = {line["step"]: line["accuracy"] for line in self._lines if line["split"] == "eval"}
        self._file: int | None = None
        self._pending = b""
        self._failed = False

    def open(self, last_step: int) -> list[dict[str, Any]]:
        """Opens the file for appending after `last_step`, the step of the checkpoint that the run resumes from.

        Lines beyond that step, from an interrupted run, are dropped; returns those that are kept. Raises UserError if
        a step is missing or the file cannot be written.
        """
        kept = [line for line in self._lines if line["step"] <= last_step]
        steps = [line["step"] for line in kept if line["split"] == "train"]
        if steps != list(range(1, last_step + 1)):
            wrong = min({*range(1, last_step + 1)} - {*steps}, default=last_step)
            raise UserError(
                f"{self.path} lacks step {wrong}, or has it twice, and the checkpoint is of step {last_step}; "
                "put the file back, or name another --workdir"
            )
        for step in [step for step in self.accuracy if step > last_step]:
            del self.accuracy[step]
        if not is_main_process():
            return kept
        try:
            with atomic_write(self.path, "w", fsync=True) as file:
                file.write("".join(json.dumps(line) + "\n" for line in kept))
            self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error}") from None
        return kept

    def write(self, row: dict[str, Any]) -> None:
        """Appends a row. If it cannot be written, as on a full disk, it is kept in memory and written with the next."""
        if row["split"] == "eval":
            self.accuracy[row["step"]] = row["accuracy"]
        if not is_main_process():
            return
        self._pending += (json.dumps(row) + "\n").encode()
        try:
            self.flush()
        except OSError as error:
            if not self._failed:
                print(
                    f"{self.path} cannot be written ({error}); its lines are kept in memory and written later",
                    file=sys.stderr,
                )
            self._failed = True

    def flush(self) -> None:
        """Writes the pending lines. Raises OSError."""
        while self._pending and self._file is not None:
            self._pending = self._pending[os.write(self._file, self._pending) :]
        self._failed = False

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the complete lines; an incomplete last line is dropped. Raises UserError if another one is damaged."""
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
