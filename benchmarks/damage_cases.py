"""The cases of benchmarks/damage.py: runs to damage, commands to try on them, and the judgement of what they do."""

import contextlib
import hashlib
import io
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import traceback
import zipfile
import zlib
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import jaxft
from benchmarks import damage_kinds
from benchmarks.damage_kinds import ARRAYS, BYTES, FOLDERS, JSON, KINDS, NAMES, ROWS
from jaxft import convert, evaluate, export, predict, process, report, sheet, train
from jaxft.errors import Interrupted, run_command
from jaxft.files import SAMPLES_DIR
from jaxft.training.restore import load_checkpoint

ROOT = Path(__file__).parent.parent
STATES = ("stopped", "finished")
TIMES = ("seconds", "images_per_second")
CLASSES = {"cat": (20, 8), "frog": (20, 8), "ship": (20, 8)}  # images to train and to test on
PROCESS_SECONDS = 60  # in which a process evaluates
HANGS = -1  # instead of an exit code
CLEAR_AFTER = 20  # runs
MEMORY_BYTES = 12 << 30  # a run that needs more counts as a traceback

TRAIN, READ = (
    ("train", "train_good"),
    ("evaluate", "latest", "older", "predict", "flax", "torchvision", "stablehlo", "load"),
)
REPORTS, WEIGHTS = ("report", "compare", "compared"), ("convert", "weights")
RUN = (*TRAIN, *READ, *REPORTS, "pretrained")
COMMANDS = (*RUN, *WEIGHTS, "sheet", "process")


class Case(NamedTuple):
    """A damage of a target in a run's state, and the command that then runs. str() names it for `--case`."""

    state: str  # of STATES
    command: str  # of COMMANDS
    target: str  # of TARGETS
    damage: str
    seed: int

    def __str__(self) -> str:
        return "/".join([self.state, self.command, self.target.replace("/", "|"), self.damage, str(self.seed)])

    @classmethod
    def parse(cls, text: str) -> "Case":
        state, command, target, damage, seed = text.split("/")
        return cls(state, command, target.replace("|", "/"), damage, int(seed))


class Target(NamedTuple):
    damages: tuple[str, ...]
    commands: tuple[str, ...]  # that read it


EXCHANGES = ("of another run", "of another checkpoint", "exchanged with another file")
STEP_EXCHANGES = (
    "of another run",
    "exchanged with another checkpoint",
    "under another number",
    "under a higher number",
)
DAMAGES = BYTES | KINDS | FOLDERS | JSON | ROWS | ARRAYS | NAMES

_FILE = (*BYTES, *KINDS, *EXCHANGES)
_CHECKPOINTED = (*TRAIN, *READ, "pretrained")

# STEP: the latest checkpoint, the best or another; *: any other file in that folder or below it
TARGETS = {
    "run": Target(tuple(FOLDERS), RUN),
    "run/config.json": Target((*_FILE, *JSON), (*TRAIN, "report", "evaluate")),
    "run/metrics.jsonl": Target((*BYTES, *KINDS, "of another run", *ROWS, *ROWS), (*TRAIN, *READ, *REPORTS)),
    "run/accuracy.json": Target((*BYTES, *KINDS, "of another run", *JSON), (*TRAIN, *READ, "report")),
    "run/evaluation.npz": Target((*BYTES, *KINDS, "of another run", *ARRAYS), (*REPORTS, *REPORTS, *TRAIN)),
    "run/sheet.jpg": Target((*[name for name in BYTES if name != "remove"], *KINDS), ("report", "train")),  # optional
    "run/report.html": Target((*BYTES, *KINDS), ("report", "train")),
    "run/compare.html": Target(tuple(KINDS), ("compare",)),
    "run/.lock": Target(("empty", "append", *KINDS), TRAIN),
    "run/tensorboard": Target(tuple(FOLDERS), TRAIN),
    "run/tensorboard/*": Target((*BYTES, *KINDS), TRAIN),
    "run/checkpoints": Target((*FOLDERS, *NAMES, *NAMES), _CHECKPOINTED),
    "run/checkpoints/STEP": Target((*FOLDERS, *STEP_EXCHANGES, *STEP_EXCHANGES), _CHECKPOINTED),
    "run/checkpoints/STEP/info": Target((*FOLDERS, "of another run", "of another checkpoint"), _CHECKPOINTED),
    "run/checkpoints/STEP/state": Target((*FOLDERS, "of another run", "of another checkpoint"), _CHECKPOINTED),
    "run/checkpoints/STEP/_CHECKPOINT_METADATA": Target((*_FILE, *JSON), _CHECKPOINTED),
    "run/checkpoints/STEP/info/metadata": Target((*_FILE, *JSON), _CHECKPOINTED),
    "run/checkpoints/STEP/state/_METADATA": Target((*_FILE, *JSON), _CHECKPOINTED),
    "run/checkpoints/STEP/*": Target(_FILE, _CHECKPOINTED),
    "run/damaged_checkpoints": Target(tuple(KINDS), ("train_good",)),
    "cache": Target(tuple(FOLDERS), ("train", "evaluate", "sheet")),
    "cache/datasets": Target(tuple(FOLDERS), ("train", "evaluate", "sheet")),
    "cache/datasets/ARRAYS": Target((*FOLDERS, "of another split"), ("train", "evaluate", "sheet")),
    "cache/datasets/ARRAYS/info.json": Target((*BYTES, *KINDS, *JSON), ("train", "evaluate", "sheet")),
    "cache/datasets/ARRAYS/image.bin": Target((*BYTES, *KINDS), ("train", "evaluate", "sheet")),
    "cache/datasets/ARRAYS/label.npy": Target((*BYTES, *KINDS), ("train", "evaluate", "sheet")),
    "cache/compiled/*": Target(("flip a bit", "truncate", "empty", "a folder", "a FIFO", "remove"), ("process",)),
    "weights.safetensors": Target((*BYTES, *KINDS), WEIGHTS),
    "data/train/cat/*": Target((*BYTES, *KINDS, "of another class"), ("train", "evaluate", "sheet")),
    "data/test/cat/*": Target((*BYTES, *KINDS), ("train", "evaluate")),
    "data/train/cat": Target(tuple(FOLDERS), ("train", "evaluate", "sheet")),
}


def draw_cases(runs: int, seed: int, only: str = "") -> list[Case]:
    """Returns random cases: all pairs of a target and a damage in turn, each with a random command and state.

    only: a part of the cases' names.
    """
    rng = random.Random(seed)
    pairs = [(target, damage) for target, (damages, _) in TARGETS.items() for damage in damages]
    cases: list[Case] = []
    tries = 0
    while len(cases) < runs and tries < 1000 * (runs + 1):
        rng.shuffle(pairs)
        for target, damage in pairs:
            tries += 1
            others = RUN if target.startswith("run") else TARGETS[target].commands
            command = rng.choice(others if rng.random() < 0.1 else TARGETS[target].commands)
            case = Case(rng.choice(STATES), command, target, damage, rng.randrange(10**6))
            if only in str(case):
                cases.append(case)
    return cases[:runs]


class Outcome(NamedTuple):
    kind: str  # noticed, reported or harmless; a fault: traceback, hang, accepted, unclear or changed
    text: str  # what was printed or what is wrong


class Result(NamedTuple):
    """The effect of a command."""

    code: int  # exit code; 1 for an exception
    value: Any  # what it computed, without times
    stdout: str
    stderr: str
    before: dict[str, Any]  # entries of the workdir
    after: dict[str, Any]


class World:
    """A folder with a run that is stopped after three of four epochs, the same run finished, and one of another seed.

    pristine/ holds what was made so far, and case/ a fresh copy for each case: run (in its state), data, cache and, for
    commands that read it, weights.safetensors.
    """

    def __init__(self, root: Path) -> None:
        self.case, self.run = root / "case", root / "case" / "run"
        self._pristine = root / "pristine"
        self.state, self.best, self.older = "stopped", 0, 0  # the latter two are checkpoints of case/run
        self.references: dict[tuple[str, str], Result] = {}

    @property
    def images(self) -> Path:
        """Images to predict."""
        return self.pristine("data") / "test" / "ship"

    @property
    def other(self) -> Path:
        """The run of another seed, in the state of the case."""
        return self.pristine(f"other-{self.state}")

    def config(self, **changes: object) -> list[str]:
        keys = {
            "model.pretrained": "",
            "model.width": 8,
            "image_size": 32,
            "batch_size": 20,
            "num_epochs": 4,
            "optimizer.learning_rate": 0.01,
            "data.name": f"folder:{self.case / 'data'}",
            "log.tensorboard": True,
            "checkpoint.every_steps": 2,
            "checkpoint.keep_best": 2,
        } | changes
        return ["--config=quickstart", *(f"--config.{key}={value}" for key, value in keys.items())]

    def pristine(self, name: str) -> Path:
        """Returns an undamaged file or folder, made once.

        name: data, cache, compiled, run-STATE, other-STATE, run.safetensors or other.safetensors.
        """
        path = self._pristine / name
        if path.exists():
            return path
        for needed in self._needs(name):
            self.pristine(needed)
        spare = self.case.with_name("case-of-a-run")
        shutil.rmtree(spare, ignore_errors=True)
        if self.case.exists():
            self.case.rename(spare)
        self._copy(*(needed for needed in self._needs(name) if needed in ("data", "cache")))
        made = self._make(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        made.rename(path)
        shutil.rmtree(self.case, ignore_errors=True)
        if spare.exists():
            spare.rename(self.case)
        return path

    def _needs(self, name: str) -> tuple[str, ...]:
        kind, _, what = name.replace(".", "-").partition("-")
        of_runs = {"stopped": ("data",), "finished": ("data", f"{kind}-stopped"), "safetensors": (f"{kind}-finished",)}
        return {"data": (), "cache": ("data", "run-stopped"), "compiled": ("data", "cache", "run-stopped")}.get(
            name, of_runs.get(what, ())
        )

    def _make(self, name: str) -> Path:
        """Makes something for `pristine` in a new case/ and returns its path there."""
        kind, _, what = name.replace(".", "-").partition("-")
        out = self.case / name
        if name == "data":
            _write_images(out)
        elif name == "cache":
            _must(0, sheet.main, [*self.config(), f"--out={self.case / 'out.png'}"])
            _must(0, evaluate.main, [f"--workdir={self.pristine('run-stopped')}"])
        elif name == "compiled":
            shutil.copytree(self.pristine("run-stopped"), self.run)
            if capture(lambda: _process(self))[0]:
                raise RuntimeError("evaluate fails in a process")
            return self.case / "cache" / name
        elif what == "safetensors":
            _must(0, export.main, [f"--workdir={self.pristine(f'{kind}-finished')}", "--to=flax", f"--out={out}"])
        else:
            workdir = self.case / kind
            argv = [*self.config(seed=int(kind == "other")), f"--workdir={workdir}"]
            if what == "finished":
                shutil.copytree(self.pristine(f"{kind}-stopped"), workdir)
                _must(0, train.main, argv)
            else:
                _must(143, train.main, argv, _StopsAfterEpoch(3))
            return workdir
        return out

    def _copy(self, *names: str) -> None:
        """Makes case/ a copy of pristine files and folders; "A:B" copies A as B."""
        sources = [(self.pristine(name.split(":")[0]), name.split(":")[-1]) for name in names]
        shutil.rmtree(self.case, ignore_errors=True)
        self.case.mkdir(parents=True)
        os.environ["JAXFT_CACHE"] = str(self.case / "cache")
        for source, name in sources:
            (shutil.copytree if source.is_dir() else shutil.copy2)(source, self.case / name)

    def reset(self, state: str, command: str) -> None:
        """Makes case/ an undamaged copy for a command."""
        more = dict.fromkeys(WEIGHTS, ("run.safetensors:weights.safetensors",))
        more["process"] = ("compiled:cache/compiled",)
        self._copy("data", "cache", f"run-{state}:run", *more.get(command, ()))
        self.state, steps = state, _steps(self.run)
        rows = [row for row in map(json.loads, _lines(self.run)) if row["split"] == "eval" and row["step"] in steps]
        self.best = max(rows, key=lambda row: (row["accuracy"], row["step"]))["step"]
        self.older = steps[len(steps) // 2 - 1]

    def reference(self, state: str, command: str) -> Result:
        """Returns the effect of a command on the undamaged run."""
        if (state, command) not in self.references:
            self.reset(state, command)
            self.references[state, command] = self.execute(command)
        return self.references[state, command]

    def execute(self, command: str) -> Result:
        """Runs a command on case/ and measures its effect."""
        before, rows = _entries(self.run), len(_lines(self.run))
        code, stdout, stderr = capture(lambda: EXECUTE[command](self))
        value = None
        if code == 0:
            try:
                value = measure(self, command, rows)
            except Exception as error:  # its output is missing or cannot be read
                value = f"{type(error).__name__}: {error}"
        return Result(code, value, stdout, stderr, before, _entries(self.run))


def _must(code: int, main: Callable[[list[str]], None], argv: list[str], stdout: io.StringIO | None = None) -> None:
    """Runs a command and raises RuntimeError unless it has this exit code."""
    found, _, stderr = capture(lambda: run_command(main, argv), stdout)
    if found != code:
        raise RuntimeError(f"exit code {found} of {shlex.join(argv)}: {stderr}")


def _write_images(folder: Path) -> None:
    counts: dict[tuple[str, str], int] = {}
    with tarfile.open(SAMPLES_DIR / "cifar10.tar.xz") as tar:
        for member in tar:
            if not member.isfile():
                continue
            split, name, _ = parts = member.name.split("/")
            number = counts[split, name] = counts.get((split, name), 0) + 1
            if name in CLASSES and number <= CLASSES[name][split == "test"]:
                file = tar.extractfile(member)
                assert file
                folder.joinpath(*parts).parent.mkdir(parents=True, exist_ok=True)
                folder.joinpath(*parts).write_bytes(file.read())


class _StopsAfterEpoch(io.StringIO):
    """A stdout that stops training, as SIGTERM does, when it reports the end of an epoch."""

    def __init__(self, epoch: int) -> None:
        super().__init__()
        self._last = f"Epoch [{epoch}/"

    def write(self, text: str) -> int:
        if text.startswith(self._last):
            raise Interrupted(signal.SIGTERM)
        return super().write(text)


def capture(function: Callable[[], int], stdout: io.StringIO | None = None) -> tuple[int, str, str]:
    """Returns (exit code, stdout, stderr). An exception gives exit code 1 and its traceback in stderr."""
    stdout, stderr = stdout or io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            code = function()
        except subprocess.TimeoutExpired:
            code = HANGS
        except BaseException:
            code = 1
            traceback.print_exc()
    return code, stdout.getvalue(), stderr.getvalue()


# Commands: each runs one and returns its exit code. What it computed is measured afterwards.


def _train(world: World, workdir: Path, *more: str) -> int:
    return run_command(train.main, [*world.config(), *more, f"--workdir={workdir}"])


def _train_from(world: World, source: Path) -> int:
    settings = {"model.pretrained": source, "num_epochs": 1, "log.tensorboard": False}
    return run_command(train.main, [*world.config(**settings), f"--workdir={world.case / 'new'}"])


def _evaluate(world: World, which: str) -> int:
    return run_command(evaluate.main, [f"--workdir={world.run}", "--json", f"--checkpoint={which}"])


def _export(world: World, to: str, suffix: str) -> int:
    return run_command(export.main, [f"--workdir={world.run}", f"--to={to}", f"--out={world.case / 'out'}{suffix}"])


def _report(workdir: Path, *others: Path) -> int:
    return run_command(report.main, [f"--workdir={workdir}", *(["--compare", *map(str, others)] if others else [])])


def _load(world: World) -> int:
    def main(argv: list[str]) -> None:
        classifier = jaxft.load(world.run)
        print(classifier.class_names, _crc(classifier.probabilities(sorted(world.images.iterdir()))))

    return run_command(main, [])


def _process(world: World) -> int:
    """Evaluates twice, each in a process of its own with the cache of compiled programs."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("JAX_COMPILATION_CACHE")}
    command = [sys.executable, "-m", "jaxft.evaluate", f"--workdir={world.run}", "--json"]
    for _ in range(2):
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PROCESS_SECONDS
        )
        print(done.stdout)
        print(done.stderr, end="", file=sys.stderr)
        if done.returncode:
            break
    print(done.stderr)  # empty, because the first process repairs what it reports
    return done.returncode


EXECUTE: dict[str, Callable[[World], int]] = {
    "train": lambda world: _train(world, world.run),
    "train_good": lambda world: _train(world, world.run, "--config.checkpoint.on_damage=newest_good"),
    "evaluate": lambda world: _evaluate(world, "best"),
    "latest": lambda world: _evaluate(world, "latest"),
    "older": lambda world: _evaluate(world, str(world.older)),
    "predict": lambda world: run_command(predict.main, [f"--workdir={world.run}", "--json", str(world.images)]),
    "flax": lambda world: _export(world, "flax", ".safetensors"),
    "torchvision": lambda world: _export(world, "torchvision", ".pth"),
    "stablehlo": lambda world: _export(world, "stablehlo", ".zip"),
    "load": _load,
    "report": lambda world: _report(world.run),
    "compare": lambda world: _report(world.run, world.other),
    "compared": lambda world: _report(world.other, world.run),
    "pretrained": lambda world: _train_from(world, world.run),
    "weights": lambda world: _train_from(world, world.case / "weights.safetensors"),
    "convert": lambda world: run_command(
        convert.main, [str(world.case / "weights.safetensors"), str(world.case / "out.safetensors")]
    ),
    "sheet": lambda world: run_command(sheet.main, [*world.config(), f"--out={world.case / 'out.png'}"]),
    "process": _process,
}
assert EXECUTE.keys() == {*COMMANDS}


def measure(world: World, command: str, first: int) -> Any:
    """Returns what a command computed, without times. first: the rows of metrics.jsonl before it ran."""
    if command in TRAIN:
        return _trained(world.run, first)
    if command in ("pretrained", "weights"):
        return _trained(world.case / "new", 0)
    if command in REPORTS:
        workdir = world.other if command == "compared" else world.run
        html = (workdir / ("report.html" if command == "report" else "compare.html")).read_text()
        return re.sub('data:image/jpeg;base64,[^"]*', "SHEET", html)  # nothing verifies its pixels
    return {path.name: _content(path) for path in world.case.glob("out.*")}


def _trained(workdir: Path, first: int) -> dict[str, Any]:
    rows = [json.loads(line) for line in _lines(workdir)]
    new = [{key: value for key, value in row.items() if key not in TIMES} for row in rows[first:]]
    steps = [path.name for path in (workdir / "checkpoints").iterdir() if re.fullmatch(r"\d{1,8}", path.name)]
    return {
        "rows": new,
        "all rows": [(row["step"], row["split"]) for row in rows],
        "checkpoints": {int(step): _state(workdir, step) for step in steps},
        "evaluation": new and _evaluation(workdir),
        "report": not new or (workdir / "report.html").stat().st_size > 10_000,
    }


def _lines(workdir: Path) -> list[str]:
    path = workdir / "metrics.jsonl"
    return path.read_text(errors="replace").splitlines() if path.is_file() else []


def _state(workdir: Path, step: str) -> Any:
    try:
        checkpoint = load_checkpoint(workdir, step)
    except Exception:  # commands that read it show how it is reported
        return "damaged"
    return checkpoint.step, [_crc(leaf) for leaf in jax.tree.leaves(checkpoint.state)], checkpoint.info["class_names"]


def _evaluation(workdir: Path) -> dict[str, int]:
    with np.load(workdir / "evaluation.npz") as file:
        return {name: _crc(file[name]) for name in file.files if name != "info"}


def _crc(array: Any) -> int:
    return zlib.crc32(np.ascontiguousarray(array).tobytes())


def _content(path: Path) -> Any:
    """Returns hashes of a file's content, without an archive's times and the random order of safetensors' metadata."""
    if path.suffix == ".safetensors":
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        return json.loads(content[8:start]), zlib.crc32(content[start:])
    if not zipfile.is_zipfile(path):
        return hashlib.sha256(path.read_bytes()).hexdigest()
    with zipfile.ZipFile(path) as archive:
        return {name: zlib.crc32(archive.read(name)) for name in archive.namelist()}


# Damages.


def apply(world: World, case: Case) -> tuple[list[Path], bool] | None:
    """Damages case/; returns the damaged paths and whether the result is a valid file with other plausible content.

    Returns None if the damage has no meaning for this target, or changed nothing.
    """
    if case.target == "run" and case.command in TRAIN and case.damage in ("remove", "a folder", "a full folder"):
        return None  # a new run begins there
    rng = random.Random(case.seed)
    path = _resolve(world, case.target, case.command, rng)
    if case.command == "train_good" and case.target == "run/damaged_checkpoints":
        latest = world.run / "checkpoints" / str(_steps(world.run)[-1])
        damage_kinds.remove(latest / "state", rng)
        DAMAGES[case.damage](path, rng)
        return [path, latest], False
    if case.damage in (*EXCHANGES, *STEP_EXCHANGES, "of another class", "of another split"):
        return _exchange(world, path, case.damage, rng)
    if not path.exists() and case.damage not in KINDS:
        return None
    before = _fingerprint(path)
    try:
        DAMAGES[case.damage](path, rng)
    except OSError as error:  # a name that the file system does not take
        return None if case.damage in NAMES else _raise(error)
    if _fingerprint(path) == before:
        return None
    return [path], path.name == "metrics.jsonl" and plausible(path)


def _raise(error: Exception) -> Any:
    raise error


def _resolve(world: World, target: str, command: str, rng: random.Random) -> Path:
    """Returns the path of a target in case/, with a random choice of its file and, mostly, the command's checkpoint."""
    path = world.case
    steps = _steps(world.run)
    read = {"older": world.older} | dict.fromkeys((*TRAIN, "latest"), steps[-1])
    for part in target.split("/"):
        if part == "STEP":
            path /= str(read.get(command, world.best) if rng.random() < 0.7 else rng.choice(steps))
        elif part == "ARRAYS":
            path = rng.choice(sorted(entry for entry in path.iterdir() if entry.is_dir()))
        elif part == "*":
            named = {"metadata", "_METADATA", "_CHECKPOINT_METADATA"}
            path = rng.choice(sorted(file for file in path.rglob("*") if file.is_file() and file.name not in named))
        else:
            path /= part
    return path


def _steps(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def _exchange(world: World, path: Path, damage: str, rng: random.Random) -> tuple[list[Path], bool] | None:
    """Puts another run's, another checkpoint's or another file in the place of `path`, or swaps them."""
    relative = path.relative_to(world.case)
    others: list[Path]
    if damage == "of another run":
        parts = relative.parts[1:]
        if "checkpoints" in parts:
            steps = _steps(world.other)
            step = int(parts[1]) if int(parts[1]) in steps else steps[-1]
            parts = (parts[0], str(step), *parts[2:])
        others = _like(world.other.joinpath(*parts))
    elif damage in ("of another checkpoint", "exchanged with another checkpoint"):
        if relative.parts[1] != "checkpoints":
            return None
        names = [str(step) for step in _steps(world.run) if str(step) != relative.parts[2]]
        folders = [world.run.joinpath("checkpoints", name, *relative.parts[3:]) for name in names]
        others = [found for folder in folders for found in _like(folder)]
    elif damage == "exchanged with another file":
        others = sorted(file for file in world.run.rglob("*") if file.is_file() and file != path)
    elif damage in ("under another number", "under a higher number"):
        number = int(path.name) - 1
        while damage == "under another number" and path.with_name(str(number)).exists():
            number -= 1
        if damage == "under a higher number":
            number = _steps(world.run)[-1] + 1
        shutil.copytree(path, path.with_name(str(number)))
        if damage == "under another number":
            shutil.rmtree(path)
        return [path, path.with_name(str(number))], False
    else:
        others = sorted(other for other in path.parent.parent.glob("*/*") if other.parent != path.parent)
        if damage == "of another split":
            others = sorted(other for other in path.parent.iterdir() if other != path)
    if not others:
        return None
    other = rng.choice(others)
    swap = damage.startswith("exchanged")
    spare = world.case / "spare"
    (shutil.copytree if path.is_dir() else shutil.copy2)(path, spare)
    damage_kinds.remove(path, rng)
    if swap:
        other.rename(path)
        spare.rename(other)
    else:
        (shutil.copytree if other.is_dir() else shutil.copy2)(other, path)
        if _fingerprint(spare) == _fingerprint(path):
            return None
        damage_kinds.remove(spare, rng)
    return [path, other] if swap else [path], False


def _like(path: Path) -> list[Path]:
    """Returns the path, or the files beside it if it does not exist, because Orbax gives files random names."""
    if path.exists():
        return [path]
    return sorted(file for file in path.parent.glob("*") if file.is_file()) if path.parent.is_dir() else []


def _fingerprint(path: Path) -> Any:
    if path.is_symlink() or not path.exists():
        return path.is_symlink()
    if path.is_dir():
        return {str(file.relative_to(path)): _fingerprint(file) for file in path.rglob("*") if not file.is_dir()} | {
            "": len(list(path.iterdir()))
        }
    return path.stat().st_mode, path.is_file() and path.read_bytes()


def plausible(path: Path) -> bool:
    """Returns whether metrics.jsonl holds only valid rows in order, so that a report of it cannot notice a change."""
    if not path.is_file():  # a FIFO would be waited for
        return False
    try:
        rows = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
        steps = [row["step"] for row in rows if row["split"] == "train"]
        return steps == [*range(1, len(steps) + 1)] and all(_valid(row) for row in rows)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _valid(row: Any) -> bool:
    numbers = [row[key] for key in ("loss", "accuracy", "seconds", "images_per_second")]
    return (
        row["split"] in ("train", "eval")
        and all(type(row[key]) is int and 0 < row[key] < 10**9 for key in ("step", "epoch"))
        and all(type(number) in (int, float) and math.isfinite(number) and number >= 0 for number in numbers)
        and row["accuracy"] <= 1
    )


# Judgement.


def _entries(workdir: Path) -> dict[str, Any]:
    """Returns {name: mode and checksum} of everything in the workdir, without the lock."""
    entries = {}
    for parent, folders, files in os.walk(workdir):
        for name in [*folders, *files]:
            path = Path(parent, name)
            mode = path.lstat().st_mode
            content = zlib.crc32(path.read_bytes()) if stat.S_ISREG(mode) else 0
            entries[str(path.relative_to(workdir))] = (mode, content)
    entries.pop(".lock", None)
    return entries


def judge(world: World, case: Case, damaged: list[Path], is_plausible: bool, got: Result) -> Outcome:
    """Compares the effect of a command with that on the undamaged run."""
    wanted = world.references[case.state, case.command]
    text = got.stderr.strip()
    if got.code == HANGS:
        return Outcome("hang", f"more than {PROCESS_SECONDS} s")
    if got.code not in (0, 2) or "Traceback (most recent call last)" in text or "Exception ignored" in text:
        return Outcome("traceback", text[-2000:] or f"exit code {got.code}")
    names = _names(world, damaged)
    lines = text.splitlines()
    if wrong := _wrong_change(world, case, damaged, got):
        return Outcome("changed", wrong)
    if got.code == 2:
        errors = [line for line in lines if line.startswith("error: ")]
        if len(errors) != 1 or lines[-1] != errors[0]:
            return Outcome("unclear", f"not one line: {text[-1000:]}")
        if len(errors[0]) > 240:
            return Outcome("unclear", f"{len(errors[0])} characters: {errors[0]}")
        if not any(name in errors[0] for name in names):
            return Outcome("unclear", f"names none of {names}: {errors[0]}")
        return Outcome("noticed", errors[0])
    differs = _difference(case, damaged, wanted, got)
    if not differs:
        return Outcome("harmless", text[-500:])
    if case.target.startswith("data/") and not (case.command in TRAIN and "train" in case.target):
        return Outcome("harmless", "other images")  # which a user may have
    if said := [line for line in lines if any(name in line for name in names)]:
        return Outcome("reported", f"{differs}: {said[0]}")
    if (
        is_plausible
        and case.command in (*REPORTS, "train", "train_good")
        and differs in ("value", "rows", "evaluation")
    ):
        return Outcome("harmless", "a report of other plausible rows")
    return Outcome("accepted", f"{differs}; {text[-500:]}")


def _names(world: World, damaged: list[Path]) -> list[str]:
    """Returns names of the file, its folder or its checkpoint. A message must contain one of them."""
    of_run = (world.run, world.run / "config.json", world.run / "checkpoints")
    is_of_run = damaged[0] in of_run or damaged[0].parent == world.run / "checkpoints"
    names = {str(world.run)} if is_of_run else set()
    for path in damaged:
        inside = path.relative_to(world.case).parts
        names |= {path.name, str(path)}
        if inside[:2] == ("run", "checkpoints"):
            names |= {str(world.run / "checkpoints"), *(f"checkpoint {part}" for part in inside[2:3])}
        if inside[0] in ("data", "cache"):
            names |= {str(parent) for parent in path.parents if parent not in (world.case, *world.case.parents)}
            names |= {f"{word} {path.parent.name} " for word in ("now", "class")}
        if not path.exists():
            names.add(str(path.parent))
    return sorted(names)


def _wrong_change(world: World, case: Case, damaged: list[Path], got: Result) -> str:
    """Returns what a command changed in the workdir although it must not."""
    touched = {path.relative_to(world.run).parts[1] for path in damaged if world.run / "checkpoints" in path.parents}
    moved = {name.split("/")[1] for name in got.after if re.fullmatch(r"damaged_checkpoints/\d+", name)}
    if moved - touched and damaged != [world.run / "checkpoints"]:
        return f"moved the sound checkpoint {', '.join(sorted(moved - touched))} away: {got.stderr.strip()}"
    if case.command in TRAIN and (got.code == 0 or got.stdout or moved):
        return ""
    written = {"report": {"report.html"}, "compare": {"compare.html"}}.get(case.command, set())
    written |= {"damaged_checkpoints"} if case.command == "train_good" else set()
    names = (got.before.keys() | got.after.keys()) - written
    changed = sorted(name for name in names if got.before.get(name) != got.after.get(name))
    return f"changed in the workdir: {', '.join(changed)[:300]}" if changed else ""


def _difference(case: Case, damaged: list[Path], wanted: Result, got: Result) -> str:
    """Returns the name of a result that differs from that of the undamaged run, or ''."""
    if case.command not in (*TRAIN, "weights", "pretrained"):
        return "value" if (got.value, got.stdout) != (wanted.value, wanted.stdout) else ""
    touched = {int(part) for path in damaged for part in path.parts if part.isdecimal() and len(part) < 9}
    if not isinstance(got.value, dict):
        return str(got.value)
    for name, value in wanted.value.items():
        found = got.value[name]
        if name == "checkpoints":
            for step in sorted(value.keys() - touched):
                if found.get(step) != value[step]:
                    return f"checkpoint {step}"
            for step in sorted(touched & found.keys() & value.keys()):
                if found[step] not in (value[step], "damaged"):
                    return f"checkpoint {step}"
        elif name == "rows" and case.command == "train_good":
            if found[-len(value) or len(found) :] != value:
                return name
        elif found != value:
            return name
    if case.damage == "remove":  # without a checkpoint, the run resumes as if it had been killed before it, and says so
        return ""
    before, after = (re.search(r"resuming after step (\d+)", result.stdout) for result in (wanted, got))
    if case.command == "train" and (before and before[1]) != (after and after[1]):
        return f"resumed from {after and after[1]}"
    return ""


# Workers.


def work(root: Path, connection: Connection) -> None:
    """Receives cases and sends, for each, "started" and then an Outcome, or None if the damage has no meaning.

    The first answer is "ready".
    """
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, resource.RLIM_INFINITY))
    set_up()
    world = World(root)
    connection.send("ready")
    done = 0
    while (case := connection.recv()) is not None:
        if done % CLEAR_AFTER == CLEAR_AFTER - 1:
            jax.clear_caches()  # each command leaves its compiled programs there
        done += 1
        try:
            outcome = try_case(world, case, lambda: connection.send("started"))
        except Exception:
            outcome = Outcome("traceback", f"in the benchmark itself: {traceback.format_exc()}")
        connection.send(outcome)


def set_up() -> None:
    """Prepares a process for cases, so that equal runs give equal bytes."""
    import matplotlib

    process.set_up()
    os.environ["SOURCE_DATE_EPOCH"] = "0"  # the date in matplotlib's figures
    matplotlib.rcParams["svg.hashsalt"] = "0"
    jax.config.update("jax_traceback_in_locations_limit", 1)  # exports then do not hold our lines


def try_case(world: World, case: Case, started: Callable[[], None]) -> Outcome | None:
    """Returns the outcome, or None if the damage has no meaning. started: called before the damaged run."""
    if world.reference(case.state, case.command).code:
        return None  # there is no such command
    world.reset(case.state, case.command)
    applied = apply(world, case)
    if applied is None:
        return None
    started()
    damaged, is_plausible = applied
    return judge(world, case, damaged, is_plausible, world.execute(case.command))


def show(world: World, case: Case) -> Iterator[str]:
    """Yields what a case damages, the command's output and the judgement."""
    wanted = world.reference(case.state, case.command)
    world.reset(case.state, case.command)
    applied = apply(world, case)
    if applied is None:
        yield "this damage has no meaning for this target"
        return
    yield f"damaged: {shlex.join(map(str, applied[0]))}"
    got = world.execute(case.command)
    yield f"exit code {got.code}\nstdout:\n{got.stdout}\nstderr:\n{got.stderr}"
    yield f"wanted:\n{wanted.stdout}\n{str(wanted.value)[:1000]}\ngot:\n{str(got.value)[:1000]}"
    yield str(judge(world, case, *applied, got))
