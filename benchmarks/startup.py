"""Times the quickstart from the start of its process to the first training step and to the end.

python -m benchmarks.startup [--rounds 3]

Each round runs it twice, the first time with an empty compilation cache. The first step counts as done when its line is
in metrics.jsonl. Prints one JSON line with the median seconds of wall time.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    starts: dict[str, list[tuple[float, float]]] = {"first_start": [], "second_start": []}
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            for name, times in starts.items():
                times.append(seconds_to_first_step_and_end(Path(folder, "cache"), Path(folder, name)))
    result = {
        name: dict(
            zip(("first_step", "end"), (round(statistics.median(t), 2) for t in zip(*times, strict=True)), strict=True)
        )
        for name, times in starts.items()
    }
    print(json.dumps({"jax": version("jax"), "cores": os.cpu_count()} | result))


if __name__ == "__main__":
    main()
