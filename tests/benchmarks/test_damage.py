"""Tests benchmarks/damage.py: what it damages, how it judges a command, and a few of its runs."""

import json
import os
import random
import shutil
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.damage import FAULTS, GOOD, Tried, table
from benchmarks.damage_cases import TARGETS, Case, Outcome, Result, World, draw_cases, judge, plausible, try_case
from benchmarks.damage_kinds import ARRAYS, BYTES, FOLDERS, JSON, KINDS, NAMES, ROWS
from tests.helpers.runs import Run

ROWS_OF_A_RUN = [
    {
        "step": step,
        "epoch": epoch,
        "split": split,
        "loss": 1.25,
        "accuracy": 0.5 + step / 10,
        "images_per_second": 100.0,
        "seconds": 0.5,
    }
    for epoch in (1, 2)
    for split, steps in (("train", (2 * epoch - 1, 2 * epoch)), ("eval", (2 * epoch,)))
    for step in steps
]

PLAUSIBLE = {  # only a checksum could notice them
    *("higher accuracy", "lower accuracy", "accuracies exchanged", "evaluation missing", "evaluation twice"),
    *("without a checkpoint", "half of the last", "last without newline", "all missing"),
}


def write_metrics(path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS_OF_A_RUN))


def write_arrays(path: Path) -> None:
    arrays: dict[str, Any] = {
        "label": np.arange(4),
        "confidence": np.ones(4),
        "info": np.array(json.dumps({"a": [1, {"b": 2}]})),
    }
    np.savez_compressed(path, **arrays)


@pytest.mark.parametrize("name", [*BYTES, *KINDS, *JSON])
def test_damages_of_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / "info.json"
    path.write_text(json.dumps({"a": [1, {"b": 2.5}], "c": "text"}))
    before = path.read_bytes()
    (BYTES | KINDS | JSON)[name](path, random.Random(1))
    mode = path.lstat().st_mode if os.path.lexists(path) else 0
    assert not stat.S_ISREG(mode) or path.read_bytes() != before


@pytest.mark.parametrize("name", ROWS)
def test_damages_of_metrics(tmp_path: Path, name: str) -> None:
    path = tmp_path / "metrics.jsonl"
    write_metrics(path)
    assert plausible(path)
    before = path.read_bytes()
    ROWS[name](path, random.Random(1))
    assert path.read_bytes() != before
    assert plausible(path) == (name.removeprefix("row: ") in PLAUSIBLE)


@pytest.mark.parametrize("name", ARRAYS)
def test_damages_of_arrays(tmp_path: Path, name: str) -> None:
    path = tmp_path / "evaluation.npz"
    write_arrays(path)
    before = path.read_bytes()
    ARRAYS[name](path, random.Random(1))
    assert path.read_bytes() != before


@pytest.mark.parametrize("name", [*FOLDERS, *NAMES])
def test_damages_of_folders(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "checkpoints"
    (folder / "3").mkdir(parents=True)
    (folder / "3" / "file").write_text("text")
    (FOLDERS | NAMES)[name](folder, random.Random(1))
    assert not folder.is_dir() or {*folder.iterdir()} != {folder / "3"}


def test_cases_are_drawn_from_all_damages() -> None:
    pairs = {(target, damage) for target, (damages, _) in TARGETS.items() for damage in damages}
    cases = draw_cases(2000, seed=0)
    assert cases == draw_cases(2000, seed=0) != draw_cases(2000, seed=1)
    assert {(case.target, case.damage) for case in cases} == pairs
    assert all(Case.parse(str(case)) == case for case in cases)
    assert {case.target for case in draw_cases(5, seed=0, only="sheet.jpg")} == {"run/sheet.jpg"}


CHECKPOINT = Path("run/checkpoints/3")


@pytest.mark.parametrize(
    ("kind", "code", "stdout", "stderr"),
    [
        ("harmless", 0, "right", ""),
        ("harmless", 0, "right", "compiling the first step, which takes a while"),
        ("accepted", 0, "wrong", "compiling the first step, which takes a while"),
        ("reported", 0, "wrong", "checkpoint 3 is damaged; using 6"),
        ("noticed", 2, "", "error: checkpoint 3 is damaged"),
        ("unclear", 2, "", "error: something is damaged"),
        ("unclear", 2, "", f"error: checkpoint 3 is damaged {'x' * 240}"),
        ("unclear", 2, "", "error: checkpoint 3 is damaged\nerror: checkpoint 3 is damaged"),
        ("unclear", 2, "", ""),
        ("traceback", 1, "", "Traceback (most recent call last):\nKeyError"),
        ("traceback", 0, "right", "Exception ignored in: <function>"),
    ],
)
def test_judgement(tmp_path: Path, kind: str, code: int, stdout: str, stderr: str) -> None:
    world = World(tmp_path)
    world.references["stopped", "evaluate"] = Result(0, {}, "right", "", {}, {})
    case = Case("stopped", "evaluate", "run/checkpoints/STEP", "remove", 0)
    got = Result(code, {}, stdout, stderr, {}, {})
    assert judge(world, case, [world.case / CHECKPOINT], False, got).kind == kind


@pytest.mark.parametrize(
    ("command", "changed", "kind"),
    [
        ("evaluate", "metrics.jsonl", "changed"),
        ("report", "report.html", "harmless"),
        ("report", "evaluation.npz", "changed"),
        ("train", "damaged_checkpoints/6", "changed"),
        ("train", "metrics.jsonl", "harmless"),
    ],
)
def test_commands_that_change_too_much(tmp_path: Path, command: str, changed: str, kind: str) -> None:
    world = World(tmp_path)
    world.references["stopped", command] = Result(0, {}, "", "", {}, {})
    case = Case("stopped", command, "run/checkpoints/STEP", "remove", 0)
    got = Result(0, {}, "", "", {}, {changed: 1})
    assert judge(world, case, [world.case / CHECKPOINT], False, got).kind == kind


def test_table_counts_outcomes() -> None:
    kinds = ("noticed", "harmless", "noticed", "hang")
    tried = [Tried(Case("stopped", "train", "run", "remove", i), Outcome(kind, "")) for i, kind in enumerate(kinds)]
    header, train, everything = table(tried).splitlines()
    assert header.split() == ["command", *GOOD, *FAULTS]
    assert train.split() == ["train", "2", "0", "1", "0", "1", "0", "0", "0"]
    assert everything.split()[1:] == train.split()[1:]


@pytest.mark.parametrize(
    ("kind", "command", "target", "damage"),
    [
        ("noticed", "report", "run/evaluation.npz", "empty"),
        ("noticed", "torchvision", "run/checkpoints/STEP/info/metadata", "JSON []"),
        ("harmless", "torchvision", "run/tensorboard", "a link in a loop"),
    ],
)
def test_runs(
    small_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    command: str,
    target: str,
    damage: str,
) -> None:
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path))
    shutil.copytree(small_run, tmp_path / "pristine" / "run-finished")
    for name in ("data", "cache"):
        (tmp_path / "pristine" / name).mkdir()
    outcome = try_case(World(tmp_path), Case("finished", command, target, damage, 0), lambda: None)
    assert outcome and outcome.kind == kind, outcome


@pytest.mark.slow
def test_command(run: Run, tmp_path: Path) -> None:
    arguments = ("--runs", 3, "--jobs", 1, "--only", "stopped/evaluate/run|config.json", "--workdir", tmp_path)
    done = run("-m", "benchmarks.damage", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    *_, counts, last = done.stdout.splitlines()
    result = json.loads(last)
    assert (result["runs"], result["harmless"], result["faults"]) == (3, 3, [])  # evaluate does not read it
    assert counts.split() == ["all", "0", "0", "3", "0", "0", "0", "0", "0"]


def test_wrong_arguments(run: Run) -> None:
    assert run("-m", "benchmarks.damage", "--damages", 3).returncode == 2
