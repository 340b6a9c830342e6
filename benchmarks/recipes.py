"""What each way of fine-tuning an ImageNet ResNet-50 reaches on the sample of CIFAR-10, and how long it takes.

    python -m benchmarks.recipes --weights resnet50.pth --workdir DIR [--image_size 96]

2,000 pictures to train, 1,000 to test. Prints one JSON object a recipe: the accuracies after each epoch in percent,
and the seconds from the first step to the last evaluation, without compilation where the machine has compiled before.
"""

import argparse
import contextlib
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

from jaxft.config import load_config
from jaxft.metrics import read_lines
from jaxft.train import train_and_evaluate

RECIPES = {
    "linear probe": {
        "num_epochs": "30",
        "optimizer.freeze": "backbone",
        "optimizer.learning_rate": "0.05",
    },
    "last stage": {
        "num_epochs": "4",
        "optimizer.freeze": "stem,stage1,stage2,stage3",
        "optimizer.learning_rate": "0.01",
    },
    "everything": {
        "num_epochs": "4",
        "optimizer.learning_rate": "0.01",
    },
    "from random weights": {
        "num_epochs": "4",
        "model.pretrained": "",
        "optimizer.learning_rate": "0.01",
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", required=True, help="an ImageNet ResNet-50")
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--image_size", type=int, default=96)
    parser.add_argument("--only", nargs="*", choices=RECIPES, default=list(RECIPES))
    args = parser.parse_args()
    for name in args.only:
        overrides = {
            "data.name": "sample:cifar10",
            "image_size": str(args.image_size),
            "batch_size": "50",
            "model.pretrained": args.weights,
            "optimizer.schedule": "cosine",
        }
        config = load_config("configs/cifar10.py", overrides | RECIPES[name])
        workdir = args.workdir / name.replace(" ", "-")
        started = time.monotonic()
        with contextlib.redirect_stdout(sys.stderr):
            train_and_evaluate(config, workdir)
        rows = read_lines(workdir / "metrics.jsonl")
        accuracies = [round(100 * row["accuracy"], 1) for row in rows if row["split"] == "eval"]
        result = {"recipe": name, "accuracies": accuracies, "seconds": round(time.monotonic() - started)}
        print(json.dumps(result | {"image_size": args.image_size, "jax": version("jax")}), flush=True)


if __name__ == "__main__":
    main()
