"""Kills runs with SIGKILL at random moments and compares each, bit for bit, with an uninterrupted run.

    python -m benchmarks.kills --workdir DIR [--kills 100] [--seed 0]

Trains a tiny ResNet-18 on the sample with flips, shifts and random crops, and a checkpoint every 4 steps. A run is
killed while it starts, after some steps, while it writes a checkpoint, when it commits one and deletes older ones, or
when an evaluation's line appears, and then resumes. When a run completes, the next one begins, until --kills is
reached. Prints JSON.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxft.training.restore import load_checkpoint

COMMAND = (
    *(sys.executable, "-m", "jaxft.train", "--config=configs/quickstart.py", "--config.data.train_split=test"),
    *("--config.image_size=16", "--config.model.width=4", "--config.batch_size=72", "--config.num_epochs=15"),
    *("--config.augment.flip=True", "--config.augment.shift=0.1", "--config.augment.crop_area=0.5"),
    *("--config.model.pretrained=", "--config.checkpoint.every_steps=4"),
)
MOMENTS = ("starting", "step", "saving", "committing", "evaluated")


def start(workdir: Path, compiled: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(compiled),  # shared: otherwise most of the time is compilation
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
        "JAX_PLATFORMS": "cpu",
    }
    with workdir.with_suffix(".log").open("ab") as log:
        return subprocess.Popen([*COMMAND, f"--workdir={workdir}"], env=environment, stdout=log, stderr=log)


def lines(workdir: Path, split: str) -> int:
    path = workdir / "metrics.jsonl"
    return path.read_text().count(f'"{split}"') if path.exists() else 0


def newest(workdir: Path) -> int:
    return max((int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdecimal()), default=-1)


def kill(process: subprocess.Popen[bytes], workdir: Path, moment: str, rng: random.Random) -> bool:
    """Kills the process at the given moment; returns False if it ended before that."""
    train, evaluated = lines(workdir, "train"), lines(workdir, "eval")
    steps, checkpoint = rng.randint(1, 20), newest(workdir)
    begun = time.monotonic()
    reached: dict[str, Callable[[], bool]] = {
        "starting": lambda: time.monotonic() - begun > delay,
        # Resuming first truncates metrics.jsonl to the checkpoint, so this can take more than `steps` steps.
        "step": lambda: lines(workdir, "train") >= train + steps,
        "saving": lambda: any((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*")),
        "committing": lambda: newest(workdir) > checkpoint,
        "evaluated": lambda: lines(workdir, "eval") > evaluated,
    }
    delay = rng.uniform(0, 4)
    while not reached[moment]():
        if process.poll() is not None:
            return False
        time.sleep(0.001)
    if moment != "starting":
        time.sleep(rng.choice([0, rng.uniform(0, 0.005), rng.uniform(0, 0.05)]))
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def compare(workdir: Path, reference: Path) -> dict[str, bool]:
    def rows(path: Path) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows]

    def bits(which: str) -> bool:
        mine, theirs = (load_checkpoint(path, which) for path in (workdir, reference))
        pairs = zip(jax.tree.leaves(mine.state), jax.tree.leaves(theirs.state), strict=True)
        return mine.step == theirs.step and all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)

    return {"metrics": rows(workdir) == rows(reference), "latest": bits("latest"), "best": bits("best")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.workdir.mkdir(parents=True)
    reference, compiled = args.workdir / "undisturbed", args.workdir / "compiled"
    if start(reference, compiled).wait():
        sys.exit(f"the uninterrupted run failed; see {reference}.log")

    rng = random.Random(args.seed)
    kills: Counter[str] = Counter()
    at_step: list[int] = []
    runs: list[dict[str, Any]] = []
    while not runs or kills.total() < args.kills:
        workdir = args.workdir / f"run_{len(runs)}"
        before = kills.total()
        while True:
            process = start(workdir, compiled)
            moment = rng.choice(MOMENTS)
            if kills.total() < args.kills and kill(process, workdir, moment, rng):
                kills[moment] += 1
                at_step.append(lines(workdir, "train"))
                print(f"kill {kills.total()}: {moment}, step {at_step[-1]} of run {len(runs)}", file=sys.stderr)
            elif code := process.wait():
                sys.exit(f"a run failed with exit code {code} when it resumed after a kill; see {workdir}.log")
            else:
                break
        runs.append({"kills": kills.total() - before, "same_bits": compare(workdir, reference)})
    result = {
        "kills": kills.total(),
        "by_moment": dict(kills),
        "at_step": at_step,
        "runs": runs,
        "all_the_same": all(all(run["same_bits"].values()) for run in runs),
        "versions": {name: version(name) for name in ("jax", "flax", "orbax-checkpoint")},
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
