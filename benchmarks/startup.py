"""Times a run from the start of its process to the first training step, with an empty cache and a second time.

python -m benchmarks.startup [--rounds 3]
python -m benchmarks.startup --config configs/cifar10.py [--rounds 3] [--config.KEY=VALUE ...]

Without --config, each round runs the quickstart twice to its end, the first time with an empty compilation cache. The
first step counts as done when its line is in metrics.jsonl. Prints one JSON line with the median seconds of wall time.

With --config, one start with an empty cache is followed by --rounds further ones, each up to its first step, by
`benchmarks.startup_parts`: seconds of each part, medians for the second start. On a GPU, for example
--config.model.dtype=bfloat16 --config.data.name=folder:cifar10 --config.model.pretrained=resnet50.pth; on a CPU a small
--config.image_size and --config.model.onednn=never keep the compiled programs in the cache and the step short.
`python -m benchmarks.startup_parts` measures a single start with the cache of the environment.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any


def seconds_to_first_step_and_end(cache: Path, workdir: Path) -> tuple[float, float]:
    command = [sys.executable, "-m", "jaxft.train", "--config", "configs/quickstart.py", "--workdir", str(workdir)]
    started = time.monotonic()
    with subprocess.Popen(
        command, env=os.environ | {"JAXFT_CACHE": str(cache)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        metrics = workdir / "metrics.jsonl"
        while not (metrics.exists() and metrics.stat().st_size):
            assert process.poll() is None, f"{command} failed"
            time.sleep(0.01)
        first_step = time.monotonic() - started
        assert process.wait() == 0, f"{command} failed"
    return first_step, time.monotonic() - started


def quickstart(rounds: int) -> dict[str, Any]:
    starts: dict[str, list[tuple[float, float]]] = {"first_start": [], "second_start": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            for name, times in starts.items():
                times.append(seconds_to_first_step_and_end(Path(folder, "cache"), Path(folder, name)))
    return {
        name: dict(
            zip(("first_step", "end"), (round(statistics.median(t), 2) for t in zip(*times, strict=True)), strict=True)
        )
        for name, times in starts.items()
    }


def parts_of(arguments: list[str], cache: Path, workdir: Path) -> dict[str, Any]:
    """Returns the answer of benchmarks.startup_parts to a config and its settings."""
    command = [sys.executable, "-m", "benchmarks.startup_parts", *arguments, "--workdir", str(workdir)]
    env = os.environ | {"JAXFT_CACHE": str(cache)}
    return json.loads(subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])


def medians(starts: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the median of each number in nested dictionaries; what one of them lacks counts as 0."""
    keys = {key: value for start in starts for key, value in start.items()}
    return {
        key: medians([start.get(key, {}) for start in starts])
        if isinstance(value, dict)
        else value
        if isinstance(value, str)
        else round(statistics.median(start.get(key, 0) for start in starts), 2)
        for key, value in keys.items()
    }


def with_parts(arguments: list[str], rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        first, *others = (
            parts_of(arguments, Path(folder, "cache"), Path(folder, f"run{i}")) for i in range(rounds + 1)
        )
    return {"first_start": first, "second_start": medians(others)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--config", help="measure the parts of this config's start; --config.KEY=VALUE sets its keys")
    args, rest = parser.parse_known_args()
    if args.config:
        result = with_parts(["--config", args.config, *rest], args.rounds)
    elif rest:
        parser.error(f"unknown argument {rest[0]}")
    else:
        result = quickstart(args.rounds)
    print(json.dumps({"jax": version("jax"), "cores": os.cpu_count()} | result))


if __name__ == "__main__":
    main()
