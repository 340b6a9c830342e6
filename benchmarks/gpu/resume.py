"""Part `resume`: does a run that is killed and resumed end with the same bits as an undisturbed one?

Its processes may choose other algorithms when they compile: so it is tried with programs from the cache, with programs
compiled again, with deterministic operations, and without autotuning. Two processes that compile the same step also
show what autotuning chooses and what that costs.

As a command of its own, `python -m benchmarks.gpu.resume FOLDER:FOLDER ...` compares pairs of runs bit for bit.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu import timeline
from benchmarks.gpu.command import Clock, Observed, environment, needs_gpu_or_toy, train
from benchmarks.gpu.part import Settings, Skipped, run_child, say

FOR_RESNET50 = 150  # seconds for the eight processes with a ResNet-50; with less they train a ResNet-18
CHANGES = {  # 64 steps of 64 of the packaged sample, with random flips
    "data.name": "sample:cifar10",
    "model.pretrained": "",
    "num_epochs": 2,
    "augment.flip": True,
    "checkpoint.every_steps": 16,
    "checkpoint.keep_latest": 3,
}
TOY = {"data.train_split": "test", "checkpoint.every_steps": 4}  # half as many images
LEAST = 8  # seconds for a process
RESERVE = 12  # seconds for the comparison of all parameters at the end
COMPILE_AGAIN = {"JAX_ENABLE_COMPILATION_CACHE": "false"}
FLAGS = {
    "deterministic operations": "--xla_gpu_deterministic_ops=true",
    "no autotuning": "--xla_gpu_autotune_level=0",
}
DUMP = "--xla_gpu_dump_autotune_results_to={}"


class Pair(NamedTuple):
    """Two runs that should end alike."""

    reference: Path
    other: Path


class Runs:
    """The runs of this part and what is known of them."""

    def __init__(self, settings: Settings, clock: Clock) -> None:
        self.settings, self.clock = settings, clock
        large = not settings.toy and clock.left() >= FOR_RESNET50
        self.changes = CHANGES | {"model.arch": "resnet50" if large else "resnet18"} | (TOY if settings.toy else {})
        self.pairs: dict[str, Pair] = {}
        self.observed: dict[Path, Observed] = {}

    def folder(self, name: str) -> Path:
        return self.settings.folder / name.replace(" ", "-")

    def train(self, name: str, env: Mapping[str, str], *, kill: bool = False, begin_with: Path | None = None) -> Path:
        """Trains a run to its end, or until its first checkpoint; begin_with: a killed run, whose copy it resumes.

        Raises Skipped if the time is over.
        """
        self.clock.need(LEAST, name)
        workdir = self.folder(name)
        if begin_with:
            shutil.copytree(begin_with, workdir)

        def has_checkpoint(observed: Observed) -> bool:
            return bool(observed.rows) and any(workdir.glob("checkpoints/*/_CHECKPOINT_METADATA"))

        until = has_checkpoint if kill else (lambda observed: False)
        observed = train(
            self.settings, workdir, self.clock.left(), self.changes, env=env, until=until, by=signal.SIGKILL
        )
        if observed.stopped == "limit":
            raise Skipped(f"the time was over during {name}")
        if kill and observed.code != -signal.SIGKILL:
            raise RuntimeError(f"{name}: the run ended before it could be killed")
        self.observed[workdir] = observed
        return workdir

    def compare(self, name: str, reference: Path, other: Path) -> None:
        """Prints and stores what the metrics say; parameters are compared at the end, in one process for all pairs."""
        self.pairs[name] = Pair(reference, other)
        mine, theirs = (self.observed[path].metrics() for path in (reference, other))
        difference = timeline.first_difference(mine, theirs)
        speeds = [timeline.speed(trained(rows)) for rows in (mine, theirs)]
        self.settings.results[name] = {
            "same_metrics": difference is None,
            "first_different_step": difference,
            "largest_loss_difference": timeline.largest_loss_difference(mine, theirs),
            "images_per_second": speeds,
        }
        same = "the same metrics" if difference is None else f"other metrics from step {difference}"
        say(f"resume, {name}: {same}; {speeds[1] or 0:,.0f} images/s")


def trained(rows: Sequence[timeline.Row]) -> list[timeline.Row]:
    return [row for row in rows if row["split"] == "train"]


def resume(settings: Settings, seconds: float) -> dict[str, Any]:
    """Kills, resumes and compares runs, and compares what two compilations of the same step chose."""
    needs_gpu_or_toy(settings)
    clock = Clock(seconds)
    runs = Runs(settings, Clock(seconds - min(RESERVE, seconds / 6)))
    reasons = []
    try:
        measure(runs)
    except Skipped as error:
        if not runs.pairs:
            raise
        reasons.append(str(error))
    arguments = [f"{pair.reference}:{pair.other}" for pair in runs.pairs.values()]
    command = ["benchmarks.gpu.resume", *arguments]
    # On the CPU, which starts faster and does not compute anything here.
    try:
        bits = run_child(command, clock.left(), {"JAX_PLATFORMS": "cpu"})
    except Skipped as error:
        reasons.append(f"parameters were not compared: {error}")
        return {"reason": "; ".join(reasons)}
    for name, found in zip(runs.pairs, bits["pairs"], strict=True):
        settings.results[name]["same_bits"] = found
    same = [name for name in runs.pairs if all(settings.results[name]["same_bits"].values())]
    say(f"resume: the same bits in parameters, optimiser and metrics: {', '.join(same) or 'never'}")
    return {"reason": "; ".join(reasons)} if reasons else {}


def measure(runs: Runs) -> None:
    """Makes the runs, the most important first. Raises Skipped when the time is over."""
    settings = runs.settings
    settings.results["network"] = runs.changes["model.arch"]
    results = [settings.folder / f"autotuning{i}.txt" for i in (0, 1)]
    # The same flags for the first three, since they belong to the key of a compiled program.
    first, second = (environment(settings, DUMP.format(path)) for path in results)
    if not is_accepted(first):
        first = second = environment(settings)
    undisturbed = runs.train("undisturbed", first)
    killed = runs.train("killed", first, kill=True)
    runs.compare("programs from the cache", undisturbed, runs.train("resumed", first, begin_with=killed))
    again = runs.train("resumed, compiled again", second | COMPILE_AGAIN, begin_with=killed)
    runs.compare("programs compiled again", undisturbed, again)
    compare_autotuning(runs, results, undisturbed, again)
    for name, flag in FLAGS.items():
        if settings.toy and not settings.gpu:
            settings.results[name] = {"skipped": f"{flag} changes nothing without a GPU"}
            continue
        env = environment(settings, flag) | COMPILE_AGAIN
        if not is_accepted(env):
            settings.results[name] = {"skipped": f"this XLA does not know {flag}"}
            continue
        runs.compare(name, *(runs.train(f"{name} {i}", env, begin_with=killed) for i in (1, 2)))


def compare_autotuning(runs: Runs, results: Sequence[Path], undisturbed: Path, again: Path) -> None:
    """Prints and stores whether two processes that compiled the same step chose the same algorithms."""
    if not all(path.exists() for path in results):
        runs.settings.results["autotuning"] = {"skipped": "XLA wrote no autotuning results, as on a CPU"}
        return
    found = timeline.same_algorithms(*(path.read_text() for path in results))
    speeds = [timeline.speed(trained(runs.observed[path].metrics())) for path in (undisturbed, again)]
    runs.settings.results["autotuning"] = found | {"images_per_second": speeds}
    shown = " and ".join(f"{speed or 0:,.0f}" for speed in speeds)
    say(f"autotuning, two processes: {found['different']} of {found['kernels']} kernels differ; {shown} images/s")


def is_accepted(env: Mapping[str, str]) -> bool:
    """Returns whether XLA knows all flags of an environment; it aborts a process with an unknown one."""
    code = "from jaxlib import xla_client; xla_client.CompileOptions()"
    child = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | dict(env),
        capture_output=True,
        timeout=60,
        check=False,
    )
    return child.returncode == 0


def main() -> None:
    """Prints a JSON object: for each pair of runs, which of their metrics and checkpoints have the same bits."""
    from benchmarks.kills import compare

    pairs = [argument.split(":") for argument in sys.argv[1:]]
    print(json.dumps({"pairs": [compare(Path(other), Path(reference)) for reference, other in pairs]}))


if __name__ == "__main__":
    main()
