"""Reads and writes metrics.jsonl, one JSON object per training step and per evaluation, and accuracy.json.

The scores of the evaluations decide which checkpoint is the best, so accuracy.json repeats them with a checksum, and
keeps the calibration of each checkpoint. A score is the accuracy, or the `score` of a row that has one: the value of
best_metric, negated if lower is better. The file is written before the row of an evaluation. It may lack the latest
evaluations if it could not be written, as on a full disk. Runs of version 0.1 do not have it; their rows are used as
they are.
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

REQUIRED = ("step", "split")
ALL_KEYS = (*REQUIRED, "epoch", "loss", "images_per_second", "seconds")


class MetricsFile:
    """DIR/metrics.jsonl, which holds each step and each evaluation once and in order, even after interruptions.

    scores: {step: score} of the evaluations in the file. calibrations: {step: {target: calibration}}. Raises UserError
    if the file is damaged; a last line that a killed run left half-written is dropped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._recorded, self.calibrations = _read_accuracy_file(path)
        self.rows = _read_rows(path, REQUIRED, self._recorded)
        self.scores = {row["step"]: row_score(row) for row in self.rows if row["split"] == "eval"}
        self._file: int | None = None
        self._pending = b""
        self._failed = False

    def open(self, last_step: int) -> list[dict[str, Any]]:
        """Opens the file for appending after `last_step`, the step of the checkpoint that the run resumes from.

        Lines beyond that step, from an interrupted run, are dropped; returns those that are kept. Raises UserError if
        a step is missing or the file cannot be written.
        """
        # An evaluation on the validation split is repeated if the run ended before that on the test split.
        whole = [row for row in self.rows if row["split"] != "val" or row["step"] in self.scores]
        kept = [row for row in whole if row["step"] <= last_step]
        steps = sum(row["split"] == "train" for row in kept)  # their numbers are 1, 2, 3 ...
        if steps < last_step:
            raise UserError(
                f"{self.path} lacks step {steps + 1}, and the checkpoint is of step {last_step}; "
                "put the file back, or name another --workdir"
            )
        lost = sorted(step for step in self._recorded or {} if step not in self.scores and step < last_step)
        if lost:
            raise UserError(
                f"{self.path} lacks the evaluation after step {lost[0]}; put the file back, or name another --workdir"
            )
        for found in (self.scores, self.calibrations):
            for step in [step for step in found if step > last_step]:
                del found[step]
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
            self.scores[row["step"]] = row_score(row)
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
            content = _accuracy_content(*({str(k): v for k, v in d.items()} for d in (self.scores, self.calibrations)))
            file.write(json.dumps(content))


def row_score(row: Mapping[str, Any]) -> float:
    """Returns the value of an evaluation that selects the best checkpoint; the highest is the best."""
    return row["score"] if "score" in row else row["accuracy"]


def read_calibration(path: Path, step: int) -> dict[str, Any]:
    """Returns {target: calibration} of a checkpoint; {} if it has none. path: metrics.jsonl, beside accuracy.json."""
    return _read_accuracy_file(path)[1].get(step, {})


def read_scores(path: Path) -> dict[int, float] | None:
    """Returns {step: score} of a run's evaluations; None if there is neither accuracy.json nor metrics.jsonl.

    path: metrics.jsonl, whose rows count if they are not in accuracy.json. Raises UserError if neither can be used.
    """
    recorded, _ = _read_accuracy_file(path)
    try:
        rows = {row["step"]: row_score(row) for row in _read_rows(path, REQUIRED, recorded) if row["split"] == "eval"}
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
    range, a step is out of order, or a score differs from accuracy.json.
    """
    return _read_rows(path, required, _read_accuracy_file(path)[0])


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
    if row["split"] not in ("train", "val", "eval"):
        return "split is not train, val or eval"
    for key in ("accuracy", "score", "loss", "images_per_second", "seconds"):
        if type(row.get(key, 0)) not in (int, float) or not abs(row.get(key, 0)) <= sys.float_info.max:
            return f"{key} is not a number"
    if not 0 <= row.get("accuracy", 0) <= 1:
        return "accuracy is not between 0 and 1"
    evaluation = row["split"] != "train"
    if row["split"] == "eval" and not {"accuracy", "score"} & row.keys():
        return "it lacks accuracy"
    last_step = before.get("step", 0)
    if not evaluation and row["step"] != last_step + 1:
        return f"step {row['step']} follows step {last_step}"
    if evaluation and before.get("split") == "eval" and row["step"] <= last_step:
        return f"the evaluation of step {row['step']} follows that of step {last_step}"
    if evaluation and before.get("split") in ("train", "val") and row["step"] != last_step:
        return f"the evaluation of step {row['step']} follows step {last_step}"
    return None


def _difference(row: dict[str, Any], recorded: Mapping[int, float]) -> str | None:
    """Returns how an evaluation's score differs from accuracy.json, or None. Later evaluations may not be in it."""
    step = row["step"]
    if row["split"] != "eval" or step > max(recorded, default=0) or recorded.get(step) == row_score(row):
        return None
    expected = recorded.get(step, "no such step")
    return f"{'score' if 'score' in row else 'accuracy'} {row_score(row)} of step {step}, but {ACCURACY} has {expected}"


def _read_accuracy_file(path: Path) -> tuple[dict[int, float] | None, dict[int, Any]]:
    """Returns {step: score} and {step: calibrations} of accuracy.json beside metrics.jsonl.

    None and {} if it is missing or damaged. Damage is reported on stderr.
    """
    file = path.with_name(ACCURACY)
    try:
        content = read_json(file)
        if content != _accuracy_content(content.get("accuracy"), content.get("calibration", {})):
            raise ValueError("it does not match its checksum")
        scores, calibrations = content["accuracy"], content.get("calibration", {})
        by_step = [{int(step): value for step, value in found.items()} for found in (scores, calibrations)]
        return by_step[0], by_step[1]
    except FileNotFoundError:
        return None, {}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        write_message(f"{file} is damaged ({reason(error)}), so {path.name} decides which checkpoint is the best")
        return None, {}


def _accuracy_content(scores: Any, calibrations: Any) -> dict[str, Any]:
    """Returns the content of accuracy.json: {step: score}, {step: calibrations} if there are any, and a CRC-32."""
    checked = (scores, calibrations) if calibrations else scores
    content = {"accuracy": scores, "crc32": zlib.crc32(json.dumps(checked, sort_keys=True).encode())}
    return content | ({"calibration": calibrations} if calibrations else {})
