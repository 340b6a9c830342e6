"""Measures what pretraining gains in the quickstart: its accuracy from pretrained and from random weights.

    python -m benchmarks.quickstart --workdir DIR [--seeds 5]

Prints one JSON object: the accuracy of each seed's run after its last epoch, in percent, with mean and standard
deviation.
"""

import argparse
import contextlib
import json
import platform
import statistics
import sys
from importlib.metadata import version
from pathlib import Path

from jaxft.config import load_config
from jaxft.run.metrics_file import read_lines
from jaxft.train import train_and_evaluate


def accuracy(workdir: Path, seed: int, overrides: dict[str, str]) -> float:
    run = workdir / f"{'scratch' if overrides else 'pretrained'}-{seed}"
    with contextlib.redirect_stdout(sys.stderr):
        train_and_evaluate(load_config("configs/quickstart.py", {"seed": str(seed)} | overrides), run)
    return 100 * [row["accuracy"] for row in read_lines(run / "metrics.jsonl") if row["split"] == "eval"][-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    result: dict[str, object] = {"machine": platform.machine(), "jax": version("jax")}
    for name, overrides in (("pretrained", {}), ("scratch", {"model.pretrained": ""})):
        accuracies = [accuracy(args.workdir, seed, overrides) for seed in range(args.seeds)]
        mean, spread = statistics.mean(accuracies), statistics.stdev(accuracies)
        result[name] = {"accuracies": accuracies, "mean": round(mean, 2), "standard_deviation": round(spread, 2)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
