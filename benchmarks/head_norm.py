"""Measures how far training depends on the scale of a network's features, with and without model.head_norm.

    python -m benchmarks.head_norm --weights resnet50.pth --workdir DIR [--image_size 64] [--epochs 2]

Trains configs/cifar10.py on the sample of CIFAR-10 (2,000 images, 1,000 to test on) from three variants of the weights,
in which the residual stream of the last stage is multiplied by 0.1, 1 and 10: they predict the same, and their features
differ by that factor. Trains first only the head, for ten epochs, then the whole network. Prints one JSON object per
run: the test accuracy in percent and the mean training loss of each epoch, and the features' deviation.
"""

import argparse
import contextlib
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from benchmarks.recipes import scale_last_stage
from jaxft.config import load_config
from jaxft.models.heads import HEAD_NORM
from jaxft.pretrained.load import load_pretrained
from jaxft.pretrained.weights_file import Weights, write_weights
from jaxft.run.metrics_file import read_lines
from jaxft.train import train_and_evaluate

FACTORS = (1.0, 0.1, 10.0)
HEAD_EPOCHS = 10
HEAD_ONLY = {"optimizer.freeze": "backbone", "num_epochs": str(HEAD_EPOCHS)}


def train(overrides: dict[str, str], workdir: Path) -> dict[str, Any]:
    """Trains configs/cifar10.py in a new workdir; returns accuracies and losses of its epochs, and its duration."""
    started = time.monotonic()
    with contextlib.redirect_stdout(sys.stderr):
        state = train_and_evaluate(load_config("configs/cifar10.py", overrides), workdir)
    rows = read_lines(workdir / "metrics.jsonl")
    losses: dict[int, list[float]] = {}
    for row in rows:
        if row["split"] == "train":
            losses.setdefault(row["epoch"], []).append(row["loss"])
    found = {
        "accuracies": [round(100 * row["accuracy"], 1) for row in rows if row["split"] == "eval"],
        "losses": [round(float(np.mean(losses[epoch])), 4) for epoch in sorted(losses)],
        "seconds": round(time.monotonic() - started),
    }
    if HEAD_NORM in state.batch_stats:
        found["deviation"] = round(float(state.batch_stats[HEAD_NORM]["deviation"]), 4)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", required=True, help="an ImageNet ResNet")
    parser.add_argument("--workdir", type=Path, required=True, help="a new folder")
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=2, help="of the whole network; 0: train only the head")
    args = parser.parse_args()
    weights = load_pretrained(args.weights)
    variables = flatten_dict(weights.variables, sep="/")
    args.workdir.mkdir(parents=True)
    for factor in FACTORS:
        changed = unflatten_dict(scale_last_stage(variables, factor), sep="/")
        write_weights(args.workdir / f"{factor:g}.safetensors", Weights(changed, weights.provenance))
    parts = {"head": HEAD_ONLY} | ({"whole network": {"num_epochs": str(args.epochs)}} if args.epochs else {})
    for part, settings in parts.items():
        for factor in FACTORS:
            for head_norm in (False, True):
                overrides = {
                    "data.name": "sample:cifar10",
                    "image_size": str(args.image_size),
                    "model.arch": weights.provenance["arch"],
                    "model.width": str(weights.provenance["width"]),
                    "model.pretrained": str(args.workdir / f"{factor:g}.safetensors"),
                    "model.head_norm": str(head_norm),
                    "model.onednn": "never",  # numbers must be comparable between machines
                }
                workdir = args.workdir / f"{part}-{factor:g}-{head_norm}".replace(" ", "-")
                result = {"trained": part, "last stage x": factor, "head_norm": head_norm}
                result |= train(overrides | settings, workdir)
                print(json.dumps(result | {"image_size": args.image_size, "jax": version("jax")}), flush=True)


if __name__ == "__main__":
    main()
