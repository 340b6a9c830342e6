"""Measures the accuracy and duration of each way to fine-tune an ImageNet ResNet-50, on the sample of CIFAR-10.

    python -m benchmarks.recipes --weights resnet50.pth --workdir DIR [--image_size 96]

There are 2,000 images to train and 1,000 to test. Prints one JSON object per recipe: the accuracy after each epoch in
percent, and the run's seconds, which include compilation unless the compilation cache holds the programs. The last two
recipes are configs/cifar10_fast.py and configs/image_folder.py with other data and another image size. cifar10_fast
also has a smaller batch, because 256 is large for 2,000 images; image_folder trains on 500 images in folders.
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
FEW = 50  # images per class
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
    """Writes the first FEW training images of each class, and all test images, as folder/{train,val}/CLASS/*.png."""
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
            "model.onednn": "never",  # numbers must be comparable between machines
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
