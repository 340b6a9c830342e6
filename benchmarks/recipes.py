"""What each way of fine-tuning an ImageNet ResNet-50 reaches on the sample of CIFAR-10, and how long it takes.

    python -m benchmarks.recipes --weights resnet50.pth --workdir DIR [--image_size 96]

2,000 pictures to train, 1,000 to test. Prints one JSON object a recipe: the accuracies after each epoch in percent,
and the seconds from the first step to the last evaluation, without compilation where the machine has compiled before.
The last two are configs/ of their names as they are, but for their data, their size and, of the first, its batch: these
are few pictures for a batch of 256. image_folder has 500 pictures to train, in folders.
"""

import argparse
import contextlib
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image

from jaxft.config import load_config
from jaxft.data import datasets
from jaxft.run.metrics_file import read_lines
from jaxft.train import train_and_evaluate

ORIGINAL = {"batch_size": "50", "optimizer.schedule": "cosine"}
FEW = 50  # pictures a class
RECIPES: dict[str, dict[str, str]] = {
    "linear probe": ORIGINAL
    | {
        "num_epochs": "30",
        "optimizer.freeze": "backbone",
        "optimizer.learning_rate": "0.05",
    },
    "last stage": ORIGINAL
    | {
        "num_epochs": "4",
        "optimizer.freeze": "stem,stage1,stage2,stage3",
        "optimizer.learning_rate": "0.01",
    },
    "everything": ORIGINAL
    | {
        "num_epochs": "4",
        "optimizer.learning_rate": "0.01",
    },
    "from random weights": ORIGINAL
    | {
        "num_epochs": "4",
        "model.pretrained": "",
        "optimizer.learning_rate": "0.01",
    },
    "cifar10_fast": {"batch_size": "50"},
    "image_folder": {"data.stored_size": "0"},
}


def write_few(folder: Path) -> None:
    """The first FEW training pictures of each class, and all test pictures, as a person has them."""
    for split, name in (("train", "train"), ("test", "val")):
        data = datasets.load("sample:cifar10", split)
        for label, class_name in enumerate(data.class_names):
            (folder / name / class_name).mkdir(parents=True, exist_ok=True)
            for i in np.flatnonzero(data.label == label)[: FEW if split == "train" else None]:
                Image.fromarray(data.image[i]).save(folder / name / class_name / f"{i}.png")


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
            "model.pretrained": args.weights,
            "model.onednn": "never",  # to be compared with figures of all machines
        }
        if name == "cifar10_fast":
            overrides["augment.first_image_size"] = str(args.image_size // 2)
        if name == "image_folder":
            write_few(args.workdir / "few")
            overrides["data.name"] = f"folder:{args.workdir / 'few'}"
        file = Path("configs", f"{name}.py")
        config = load_config(str(file) if file.exists() else "configs/cifar10.py", overrides | RECIPES[name])
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
