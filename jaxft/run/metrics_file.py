"""Reads and writes metrics.jsonl, one JSON object per training step and per evaluation, and accuracy.json.

The evaluations' accuracies decide which checkpoint is the best, so accuracy.json repeats them with a checksum. It is
written before the row of an evaluation. It may lack the latest evaluations if it could not be written, as on a full
disk. Runs of version 0.1 do not have it; their rows are used as they are.
"""

import json
import os
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxft.errors import UserError, write_message
from jaxft.files import atomic_write, read_json, read_regular, reason
from jaxft.main_process import is_main_process
from jaxft.run.workdir import ACCURACY, LAST_STEP

REQUIRED = ("step", "split", "accuracy")
ALL_KEYS = (*REQUIRED, "epoch", "loss", "images_per_second", "seconds")


class MetricsFile:
    """DIR/metrics.jsonl, which holds each step and each evaluation once and in order, even after interruptions.

    accuracy: {step: accuracy} of the evaluations in the file. Raises UserError if the file is damaged; a last line
    that a killed run left half-written is dropped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._recorded = _read_accuracy_file(path)
        self.rows = _read_rows(path, REQUIRED, self._recorded)
        self.accuracy = {row["step"]: row["accuracy"] for row in self.rows if row["split"] == "eval"}
        self._file: int | None = None
        self._pending = b""
        self._failed = False

    def open(self, last_step: int) -> list[dict[str, Any]]:
        """Opens the file for appending after `last_step`, the step of the checkpoint that the run resumes from.

        Lines beyond that step, from an interrupted run, are dropped; returns those that are kept. Raises UserError if
        a step is missing or the file cannot be written.
        """
        kept = [row for row in self.rows if row["step"] <= last_step]
        steps = sum(row["split"] == "train" for row in kept)  # their numbers are 1, 2, 3 ...
        if steps < last_step:
            raise UserError(
                f"{self.path} lacks step {steps + 1}, and the checkpoint is of step {last_step}; "
                "put the file back, or name another --workdir"
            )
        lost = sorted(step for step in self._recorded or {} if step not in self.accuracy and step < last_step)
        if lost:
            raise UserError(
                f"{self.path} lacks the evaluation after step {lost[0]}; put the file back, or name another --workdir"
            )
        for step in [step for step in self.accuracy if step > last_step]:
            del self.accuracy[step]
        if not is_main_process():
            return kept
        try:
            if self._recorded and max(self._recorded) > last_step:
                self._write_accuracy()
            with atomic_write(self.path, "w", fsync=True) as file:
                file.write("".join(json.dumps(row) + "\n" for row in kept))
            self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {reason(error)}; name another --workdir") from None
        return kept

    def write(self, row: dict[str, Any]) -> None:
        """Appends a row. If it cannot be written, as on a full disk, it is kept in memory and written with the next."""
        if row["split"] == "eval":
            self.accuracy[row["step"]] = row["accuracy"]
        if not is_main_process():
            return
        self._pending += (json.dumps(row) + "\n").encode()
        try:
            if row["split"] == "eval":
                self._write_accuracy()
            self.flush()
        except OSError as error:
            if not self._failed:
                write_message(
                    f"{self.path} cannot be written ({reason(error)}); its lines are kept in memory and written later"
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

    def _write_accuracy(self) -> None:
        """Writes DIR/accuracy.json. Raises OSError."""
        with atomic_write(self.path.with_name(ACCURACY), "w") as file:
            file.write(json.dumps(_accuracy_content({str(step): value for step, value in self.accuracy.items()})))


def read_accuracy(path: Path) -> dict[int, float] | None:
    """Returns {step: accuracy} of a run's evaluations; None if there is neither accuracy.json nor metrics.jsonl.

    path: metrics.jsonl, whose rows count if they are not in accuracy.json. Raises UserError if neither can be used.
    """
    recorded = _read_accuracy_file(path)
    try:
        rows = {row["step"]: row["accuracy"] for row in _read_rows(path, REQUIRED, recorded) if row["split"] == "eval"}
    except UserError as error:
        if recorded is None:
            raise
        write_message(f"{error}; until then, {ACCURACY} decides which checkpoint is the best")
        return recorded
    if recorded is None and not rows and not path.exists():
        return None
    return rows | (recorded or {})


def read_lines(path: Path, required: tuple[str, ...] = REQUIRED) -> list[dict[str, Any]]:
    """Returns the complete lines; an incomplete last line is dropped.

    Raises UserError if another line is damaged: it is not a row with the required keys, a value has a wrong type or
    range, a step is out of order, or an accuracy differs from accuracy.json.
    """
    return _read_rows(path, required, _read_accuracy_file(path))


def _read_rows(path: Path, required: tuple[str, ...], recorded: Mapping[int, float] | None) -> list[dict[str, Any]]:
    try:
        texts = read_regular(path).split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}; put it back, or name another --workdir") from None
    rows: list[dict[str, Any]] = []
    for number, text in enumerate(texts, 1):
        if not text.strip():  # from an editor
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError):
            row = None
        problem = _problem(row, rows[-1] if rows else {}, required) or _difference(row, recorded or {})
        if problem:
            raise UserError(
                f"{path} is damaged in line {number} ({problem}); put it back, or name another --workdir"
            ) from None
        rows.append(row)
    return rows


def _problem(row: Any, before: Mapping[str, Any], required: tuple[str, ...]) -> str | None:
    """Returns what is wrong with a row that follows the row `before`, or None."""
    if not isinstance(row, dict):
        return "it is not a JSON object"
    if missing := [key for key in required if key not in row]:
        return f"it lacks {missing[0]}"
    for key in ("step", "epoch"):
        if type(row.get(key, 1)) is not int or not 1 <= row.get(key, 1) <= LAST_STEP:
            return f"{key} is not a positive whole number"
    if row["split"] not in ("train", "eval"):
        return "split is neither train nor eval"
    for key in ("accuracy", "loss", "images_per_second", "seconds"):
        if type(row.get(key, 0)) not in (int, float) or not abs(row.get(key, 0)) <= sys.float_info.max:
            return f"{key} is not a number"
    if not 0 <= row["accuracy"] <= 1:
        return "accuracy is not between 0 and 1"
    evaluation = row["split"] == "eval"
    last_step = before.get("step", 0)
    if not evaluation and row["step"] != last_step + 1:
        return f"step {row['step']} follows step {last_step}"
    if evaluation and before.get("split") == "eval" and row["step"] <= last_step:
        return f"the evaluation of step {row['step']} follows that of step {last_step}"
    if evaluation and before.get("split") == "train" and row["step"] != last_step:
        return f"the evaluation of step {row['step']} follows step {last_step}"
    return None


def _difference(row: dict[str, Any], recorded: Mapping[int, float]) -> str | None:
    """Returns how an evaluation's accuracy differs from accuracy.json, or None. Later evaluations may not be in it."""
    step = row["step"]
    if row["split"] != "eval" or step > max(recorded, default=0) or recorded.get(step) == row["accuracy"]:
        return None
    expected = recorded.get(step, "no such step")
    return f"accuracy {row['accuracy']} of step {step}, but {ACCURACY} has {expected}"


def _read_accuracy_file(path: Path) -> dict[int, float] | None:
    """Returns {step: accuracy} of accuracy.json beside metrics.jsonl; None if it is missing or damaged.

    Damage is reported on stderr.
    """
    file = path.with_name(ACCURACY)
    try:
        content = read_json(file)
        if content != _accuracy_content(content.get("accuracy")):
            raise ValueError("it does not match its checksum")
        return {int(step): accuracy for step, accuracy in content["accuracy"].items()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        write_message(f"{file} is damaged ({reason(error)}), so {path.name} decides which checkpoint is the best")
        return None


def _accuracy_content(accuracy: Any) -> dict[str, Any]:
    """Returns the content of accuracy.json: {step: accuracy} with its CRC-32."""
    return {"accuracy": accuracy, "crc32": zlib.crc32(json.dumps(accuracy, sort_keys=True).encode())}
