"""Timings from the rows of metrics.jsonl: speed without compilation, waiting, and where two runs differ."""

import re
import statistics
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
TimedRow = tuple[float, Row]  # with the seconds from the command until it appeared

TIMES = ("seconds", "images_per_second")  # keys of a row that differ between equal runs
WAITING = 5  # a step that takes this many times the median has waited for something, such as compilation
AT_LEAST = 0.2  # seconds over the median, so that a short step is not taken for a wait


def waits(rows: Sequence[Row]) -> list[float]:
    """Returns how many seconds each row waited beyond the median step of the same rows; 0 for an ordinary step."""
    if not rows:
        return []
    median = statistics.median(row["seconds"] for row in rows)
    longest = max(WAITING * median, median + AT_LEAST)
    return [row["seconds"] - median if row["seconds"] > longest else 0.0 for row in rows]


def speed(rows: Sequence[Row]) -> float | None:
    """Returns images per second of the steps that did not wait, None if there are none."""
    steady = [row for row, wait in zip(rows, waits(rows), strict=True) if not wait]
    seconds = sum(row["seconds"] for row in steady)
    return sum(row["images_per_second"] * row["seconds"] for row in steady) / seconds if seconds else None


def epochs(timed: Sequence[TimedRow], begun: float) -> list[dict[str, Any]]:
    """Returns the figures of each epoch that has begun, from its steps and, once it is complete, its evaluation.

    begun: when the first epoch could begin. waited_seconds: before and between the training steps, for compilation
    and, after the first epoch, for the report. images_per_second: without that. evaluation_waited_seconds: before the
    evaluation, for its compilation and for starting a checkpoint.
    """
    found = []
    for epoch in sorted({row["epoch"] for _, row in timed}):
        steps = [(at, row) for at, row in timed if row["epoch"] == epoch and row["split"] == "train"]
        evaluations = [(at, row) for at, row in timed if row["epoch"] == epoch and row["split"] == "eval"]
        rows = [row for _, row in steps]
        figures: dict[str, Any] = {"epoch": epoch, "steps": len(rows), "images_per_second": speed(rows)}
        if steps:
            training = sum(row["seconds"] for row in rows)
            # Several steps of one call appear at once, so only the last row has a time of its own.
            waited = max(steps[-1][0] - begun - training, 0) + sum(waits(rows))
            figures |= {"training_seconds": training - sum(waits(rows)), "waited_seconds": waited}
            begun = steps[-1][0]
        if evaluations:
            at, row = evaluations[-1]
            figures |= {"accuracy": row["accuracy"], "evaluation_seconds": row["seconds"]}
            figures["evaluation_waited_seconds"] = max(at - begun - row["seconds"], 0)
            begun = at
        found.append(figures)
    return found


def accuracies(rows: Sequence[Row]) -> list[float]:
    """Returns the accuracy after each epoch in percent."""
    return [round(100 * row["accuracy"], 2) for row in rows if row["split"] == "eval"]


def first_difference(rows: Sequence[Row], others: Sequence[Row]) -> int | None:
    """Returns the step of the first row in which two runs differ in anything but time, None if there is none.

    A row of only one of the runs counts as a difference.
    """

    def key(row: Row) -> tuple[int, str]:
        return row["step"], row["split"]

    def content(row: Row) -> Row:
        return {name: value for name, value in row.items() if name not in TIMES}

    mine, theirs = ({key(row): content(row) for row in some} for some in (rows, others))
    different = [place for place in mine.keys() | theirs.keys() if mine.get(place) != theirs.get(place)]
    return min(different)[0] if different else None


def largest_loss_difference(rows: Sequence[Row], others: Sequence[Row]) -> float:
    """Returns the largest difference of the losses of steps that both runs have."""
    losses = {(row["step"], row["split"]): row["loss"] for row in others}
    pairs = [(row["loss"], losses.get((row["step"], row["split"]))) for row in rows]
    return max((abs(loss - other) for loss, other in pairs if other is not None), default=0.0)


def reached(accuracies: Sequence[float], seconds: Sequence[float], goal: float) -> float | None:
    """Returns the time of the first accuracy that is at least the goal."""
    return next((time for accuracy, time in zip(accuracies, seconds, strict=False) if accuracy >= goal), None)


def same_algorithms(text: str, other: str) -> dict[str, int]:
    """Compares two files of XLA's autotuning results, in text format: kernels of both, and those that differ."""
    mine, theirs = _algorithms(text), _algorithms(other)
    common = mine.keys() & theirs.keys()
    return {
        "kernels": len(common),
        "different": sum(mine[kernel] != theirs[kernel] for kernel in common),
        "only_in_one": len(mine.keys() ^ theirs.keys()),
    }


def _algorithms(text: str) -> dict[str, str]:
    """Returns {device and HLO: result without its measured time} of autotuning results in protobuf's text format."""
    found = {}
    for entry in re.split(r"^results \{$", text, flags=re.MULTILINE)[1:]:
        kernel = "\n".join(re.findall(r"^  (?:device|hlo): .*$", entry, flags=re.MULTILINE))
        result = re.sub(r"run_time \{[^}]*\}", "", entry)
        found[kernel] = " ".join(line for line in result.split("\n") if line.strip() and line.strip() not in kernel)
    return found
