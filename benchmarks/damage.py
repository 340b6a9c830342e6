"""Damages runs at random, and verifies that every command notices each damage in one line or is not affected by it.

    python -m benchmarks.damage [--runs 1500] [--seed 0] [--jobs 2] [--limit 30] [--only TEXT]
    python -m benchmarks.damage --case CASE
    python -m benchmarks.damage --restore [--runs 1000]

Trains a ResNet-18 of width 8 on a folder of 84 images. Each run of a command gets a fresh copy in which one thing is
damaged: a file or folder of the workdir, the cached images, the cache of compiled programs, a weights file or an image
(TARGETS in benchmarks/damage_cases.py). Bytes are changed, JSON gets wrong values, a FIFO or a folder takes the place
of a file, checkpoints are exchanged, and so on (benchmarks/damage_kinds.py). The command then trains, evaluates,
predicts, exports, reports or loads the run, in one of --jobs worker processes. Its outcome:

noticed     exit code 2 and one line of at most 240 characters that names the file or its folder
reported    exit code 0 and another result, but a line on stderr names the damaged file
harmless    exit code 0 and the same result as without the damage
traceback   any exception but a UserError, or the end of the process
hang        more than --limit seconds
accepted    another result, which is not reported
unclear     exit code 2 with several lines, a long one, or one that does not name the file
changed     a sound checkpoint is moved away, or a command that only reads or refuses changes the workdir

The last five are faults. Prints each fault with its name for --case, then a table of commands and outcomes, and as the
last line one JSON object. The exit code is 1 if there are faults.

--restore: damages a checkpoint and restores it, which must raise DamagedCheckpointError or return the same bits.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from functools import partial
from importlib.metadata import version
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

GOOD, FAULTS = ("noticed", "reported", "harmless"), ("traceback", "hang", "accepted", "unclear", "changed")
BUILD_SECONDS = 600  # in which a worker trains its runs, and runs a command on an undamaged one
STEP = 100  # of the checkpoint that --restore damages


class Tried(NamedTuple):
    case: Any  # damage_cases.Case
    outcome: Any  # damage_cases.Outcome


class Worker:
    """A process that tries cases, one at a time; it is killed and started again if it hangs or ends."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.case: Any = None
        self._start()

    def _start(self) -> None:
        from benchmarks.damage_cases import work

        self.connection: Connection
        self.connection, other = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("spawn").Process(target=work, args=(self.root, other), daemon=True)
        self._process.start()
        other.close()
        self.deadline = time.monotonic() + BUILD_SECONDS

    def restart(self) -> None:
        self._process.kill()
        self._process.join()
        self.connection.close()
        self._start()

    def give(self, case: Any) -> None:
        """Sends a case to try, or None to end the process."""
        self.case, self.deadline = case, time.monotonic() + BUILD_SECONDS
        self.connection.send(case)


def try_cases(cases: Iterable[Any], root: Path, jobs: int, limit: float) -> list[Tried]:
    """Tries cases in worker processes and prints the faults. Cases whose damage has no meaning are left out."""
    from benchmarks.damage_cases import Outcome

    waiting = list(cases)[::-1]
    tried: list[Tried] = []
    workers = [Worker(root / str(number)) for number in range(min(jobs, len(waiting)))]
    busy = {*workers}

    def note(worker: Worker, outcome: Any) -> None:
        if worker.case is None or outcome is None:
            return
        tried.append(Tried(worker.case, outcome))
        if outcome.kind in FAULTS:
            print(f"{outcome.kind}: --case '{worker.case}'\n    {_shown(outcome.text)}", flush=True)
        if len(tried) % 100 == 0:
            print(f"{len(tried)} runs, {len(waiting)} to go", file=sys.stderr, flush=True)

    while busy:
        ready = wait([worker.connection for worker in busy], timeout=1)
        for worker in [*busy]:
            if worker.connection in ready:
                try:
                    answer = worker.connection.recv()
                except EOFError:
                    if worker.case is None:
                        sys.exit("a worker could not start; see above")
                    note(worker, Outcome("traceback", "the process ended"))
                    worker.restart()
                    worker.case = None
                    continue
                if answer == "started":
                    worker.deadline = time.monotonic() + (limit if worker.case.command != "process" else BUILD_SECONDS)
                    continue
                if answer != "ready":
                    note(worker, answer)
            elif time.monotonic() > worker.deadline:
                note(worker, Outcome("hang", f"more than {limit:.0f} s"))
                worker.restart()
                worker.case = None
                continue
            else:
                continue
            if waiting:
                worker.give(waiting.pop())
            else:
                worker.give(None)
                busy.remove(worker)
    return tried


def _shown(text: str) -> str:
    """Returns the end of a text: of a traceback its last frame and the exception."""
    return "\n    ".join(text.splitlines()[-4:])[-700:]


def table(tried: Iterable[Tried]) -> str:
    """Returns a table of the commands' outcomes."""
    counts: dict[str, Counter[str]] = {}
    for case, outcome in tried:
        for name in (case.command, "all"):
            counts.setdefault(name, Counter())[outcome.kind] += 1
    rows: list[tuple[str, ...]] = [("command", *GOOD, *FAULTS)]
    for name in sorted(counts, key=lambda name: (name == "all", name)):
        rows.append((name, *(str(counts[name][kind]) for kind in (*GOOD, *FAULTS))))
    return "\n".join(
        "".join(cell.ljust(13) if i == 0 else cell.rjust(10) for i, cell in enumerate(row)) for row in rows
    )


def damage_runs(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Tries random cases and prints their table."""
    from benchmarks.damage_cases import draw_cases

    started = time.monotonic()
    cases = draw_cases(args.runs, args.seed, args.only)
    tried = try_cases(cases, folder, args.jobs, args.limit)
    print(table(tried))
    kinds = Counter(outcome.kind for _, outcome in tried)
    return {
        "runs": len(tried),
        "left_out": len(cases) - len(tried),  # damages without a meaning for their target
        **{kind: kinds[kind] for kind in (*GOOD, *FAULTS)},
        "seconds": round(time.monotonic() - started, 1),
        "seed": args.seed,
        "versions": {name: version(name) for name in ("jaxft", "jax", "orbax-checkpoint", "numpy")},
        "faults": [
            {"case": str(case), "kind": outcome.kind, "text": outcome.text[-300:]}
            for case, outcome in tried
            if outcome.kind in FAULTS
        ],
    }


def show_case(name: str, folder: Path) -> None:
    """Trains the runs and prints everything about one case."""
    from benchmarks.damage_cases import Case, World, set_up, show

    set_up()
    world = World(folder)
    for text in show(world, Case.parse(name)):
        print(text)


def damage_checkpoints(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Damages the checkpoint of a ResNet-18 of width 8 with momentum, and restores it each time."""
    import jax
    import numpy as np

    from benchmarks.damage_kinds import damage_checkpoint
    from jaxft.config import default_config
    from jaxft.data.batches import replicate
    from jaxft.models.build import make_model
    from jaxft.run.checkpoint_reader import CheckpointReader, DamagedCheckpointError
    from jaxft.run.checkpoints import Checkpoints
    from jaxft.run.metrics_file import MetricsFile
    from jaxft.run.workdir import Workdir
    from jaxft.training.optimizer import make_optimizer
    from jaxft.training.state import TrainState, abstract_train_state, create_train_state

    def bits(state: TrainState) -> list[bytes]:
        return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]

    config = default_config()
    config.model.arch, config.model.width = "resnet18", 8
    model = make_model(config.model, num_classes=10)
    tx = make_optimizer(config.optimizer, steps_per_epoch=1, num_epochs=1, parts=model.parts)
    state = jax.jit(partial(create_train_state, model, tx))(jax.random.key(0)).replace(step=np.int32(STEP))
    saved = bits(state)
    pristine = folder / "pristine"
    checkpoints = Checkpoints(Workdir(pristine), MetricsFile(Workdir(pristine).metrics))
    checkpoints.save(replicate(state), {"config": config.to_dict()})
    checkpoints.close()

    rng = random.Random(args.seed)
    noticed: Counter[str] = Counter()
    harmless: Counter[str] = Counter()
    silent, escaped = [], []
    workdir, seconds = folder / "damaged", []
    for number in range(args.runs):
        shutil.rmtree(workdir, ignore_errors=True)
        shutil.copytree(pristine, workdir)
        what = damage_checkpoint(workdir / "checkpoints" / str(STEP), rng)
        kind = what.split(":")[0]
        started = time.monotonic()
        try:
            reader = CheckpointReader(Workdir(workdir))
            restored = reader.restore(reader.resolve("latest"), abstract_train_state(model, tx))
            (harmless.update([kind]) if bits(restored) == saved else silent.append(what))
        except DamagedCheckpointError:
            noticed[kind] += 1
        except Exception as error:  # a traceback instead of a line
            escaped.append(f"{what}: {type(error).__name__}: {error}"[:300])
        seconds.append(time.monotonic() - started)
        if number % 100 == 99:
            print(f"{number + 1} damages, {noticed.total()} noticed, {len(silent)} silent", file=sys.stderr)
    return {
        "runs": args.runs,
        "noticed": noticed.total(),
        "harmless": harmless.total(),
        "noticed_by_kind": dict(noticed),
        "harmless_by_kind": dict(harmless),
        "median_seconds_to_restore": round(float(np.median(seconds)), 4),
        "versions": {name: version(name) for name in ("jax", "orbax-checkpoint")},
        "faults": [*(f"silent: {what}" for what in silent), *(f"traceback: {what}" for what in escaped)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, help="number of damages (default: 1500; with --restore 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the random choice of damages (default: 0)")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="worker processes")
    parser.add_argument("--limit", type=float, default=30, metavar="SECONDS", help="when a run hangs (default: 30)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases whose name contains this")
    parser.add_argument("--case", help="try one case, as faults name it, and print all about it")
    parser.add_argument("--restore", action="store_true", help="only restore damaged checkpoints, and compare bits")
    parser.add_argument("--workdir", type=Path, help="a new folder to work in, which stays (default: a temporary one)")
    args = parser.parse_args()
    args.runs = args.runs or (1000 if args.restore else 1500)
    folder = (args.workdir or Path(tempfile.mkdtemp(prefix="damage-"))).resolve()
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05",
    }
    try:
        if args.case:
            show_case(args.case, folder / "0")
            return
        result = damage_checkpoints(args, folder) if args.restore else damage_runs(args, folder)
    finally:
        if args.workdir is None:
            shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(result))
    sys.exit(bool(result["faults"]))


if __name__ == "__main__":
    main()
