"""Measures the accuracy and duration of each way to fine-tune an ImageNet ResNet-50, on the sample of CIFAR-10.

    python -m benchmarks.recipes --weights resnet50.pth --workdir DIR [--image_size 96]

There are 2,000 images to train and 1,000 to test. Prints one JSON object per recipe: the accuracy after each epoch in
percent, and the run's seconds, which include compilation unless the compilation cache holds the programs. The last two
recipes are configs/cifar10_fast.py and configs/image_folder.py with other data and another image size. cifar10_fast
also has a smaller batch, because 256 is large for 2,000 images; image_folder trains on 500 images in folders.

    python -m benchmarks.recipes --safety --workdir DIR [--weights resnet50.pth] [--image_size 64]

Trains configs/image_folder.py on 250 images, as it is and as in version 0.1, from backbones that it was not tuned for:
variants of the shipped ResNet-18 (or of other weights) with the residual stream or all kernels scaled, which compute
the same function, with the scales of all norms multiplied, which do not, and random weights. Prints the test accuracy
on 1,000 images in percent, of a linear probe, of the last epoch and of the best one, or the error.

    python -m benchmarks.recipes --auto --workdir DIR [--weights resnet50.pth] [--images 500 2000] [--image_size 64]
        [--data cifar10] [--backbone "as it is"] [--only auto image_folder linear_probe cifar10]

Compares configs/auto.py with other recipes on subsets of the sample, or of a folder with train/CLASS and test/CLASS, at
the same image size; everything else is as the recipes have it. --backbone scales the weights as --safety does. Prints a
JSON object per run: the test accuracy on 1,000 images in percent after each epoch, and the seconds.
"""

import argparse
import contextlib
import itertools
import json
import re
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from PIL import Image

from jaxft.config import load_config
from jaxft.data import datasets
from jaxft.errors import UserError
from jaxft.pretrained.load import load_pretrained
from jaxft.pretrained.weights_file import Weights, write_weights
from jaxft.run.metrics_file import read_lines
from jaxft.train import train_and_evaluate

ORIGINAL = {"batch_size": "50", "optimizer.schedule": "cosine"}
FEW = 50  # images per class
SHIPPED = "resnet18_tiny_in200"
COMPARED = ("auto", "image_folder", "linear_probe", "cifar10")
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


def write_few(folder: Path, count: int) -> None:
    """Writes `count` training images of each class, and all test images, as folder/{train,val}/CLASS/*.png."""
    for split, name in (("train", "train"), ("test", "val")):
        data = datasets.load("sample:cifar10", split)
        for label, class_name in enumerate(data.class_names):
            (folder / name / class_name).mkdir(parents=True, exist_ok=True)
            for i in np.flatnonzero(data.label == label)[: count if split == "train" else None]:
                Image.fromarray(data.image[i]).save(folder / name / class_name / f"{i}.png")


Flat = dict[str, np.ndarray]  # variables by path: params/layer1/0/conv1/kernel


def scale_stream(variables: Flat, factor: float) -> Flat:
    """Multiplies the residual stream, and so the features; the norms inside the blocks undo it."""
    inside = r"batch_stats/layer\d/\d+/(bn1|downsample/1)/"
    last = "bn3" if any("/bn3/" in path for path in variables) else "bn2"
    scaled = rf"params/(bn1|layer\d/\d+/({last}|downsample/1))/(scale|bias)"
    powers = {inside + "mean": 1, inside + "var": 2, scaled: 1}
    return scale_by_pattern(variables, factor, powers)


def scale_last_stage(variables: Flat, factor: float) -> Flat:
    """Multiplies the residual stream of the last stage, and so the features; the rest of the network is unchanged."""
    last = "bn3" if any("/bn3/" in path for path in variables) else "bn2"
    inside = r"batch_stats/layer4/[1-9]\d*/bn1/"
    powers = {inside + "mean": 1, inside + "var": 2, rf"params/layer4/\d+/({last}|downsample/1)/(scale|bias)": 1}
    return scale_by_pattern(variables, factor, powers)


def scale_kernels(variables: Flat, factor: float) -> Flat:
    """Multiplies the kernels of all convolutions; the norms behind them undo it."""
    return scale_by_pattern(variables, factor, {"params/(?!fc).*kernel": 1, ".*/mean": 1, ".*/var": 2})


def scale_norms(variables: Flat, factor: float) -> Flat:
    """Multiplies the scale of every norm, which nothing undoes."""
    return scale_by_pattern(variables, factor, {".*/scale": 1})


def scale_by_pattern(variables: Flat, factor: float, powers: dict[str, int]) -> Flat:
    def power(path: str) -> int:
        return sum(power for pattern, power in powers.items() if re.fullmatch(pattern, path))

    return {path: np.asarray(array * factor ** power(path), np.float32) for path, array in variables.items()}


BACKBONES: dict[str, Callable[[Flat], Flat] | None] = {
    "as it is": lambda variables: variables,
    "residual stream x 0.1": partial(scale_stream, factor=0.1),
    "residual stream x 10": partial(scale_stream, factor=10),
    "kernels x 0.1": partial(scale_kernels, factor=0.1),
    "kernels x 10": partial(scale_kernels, factor=10),
    "norms x 0.5": partial(scale_norms, factor=0.5),
    "norms x 2": partial(scale_norms, factor=2),
    "norms x 3": partial(scale_norms, factor=3),
    "random weights": None,
}
VERSION_0_1 = {"optimizer.fit_head": "no", "optimizer.adaptive_clip": "0", "optimizer.unfreeze_warmup": "0"}
PROBE = {
    "optimizer.fit_head": "only",
    "optimizer.unfreeze": "",
    "augment.flip": "False",
    "augment.crop_area": "1",
    "augment.crop_ratio": "1",
}


def measure_safety(source: str, workdir: Path, image_size: int, backbones: list[str]) -> None:
    """Trains from each of BACKBONES and prints a JSON object per backbone."""
    weights = load_pretrained(source)
    variables = flatten_dict(weights.variables, sep="/")
    write_few(workdir / "few", FEW // 2)
    for name in backbones:
        change, file, result = BACKBONES[name], workdir / "backbone.safetensors", {"backbone": name}
        if change:
            write_weights(file, Weights(unflatten_dict(change(variables), sep="/"), weights.provenance))
        overrides = {
            "data.name": f"folder:{workdir / 'few'}",
            "data.stored_size": "0",
            "image_size": str(image_size),
            "model.arch": weights.provenance["arch"],
            "model.width": str(weights.provenance["width"]),
            "model.pretrained": str(file) if change else "",
            "model.onednn": "never",
        }
        runs: dict[str, dict[str, str]] = {"probe": PROBE, "image_folder": {}, "version 0.1": VERSION_0_1}
        for run, settings in runs.items():
            folder = workdir / f"{name}-{run}".replace(" ", "-")
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    train_and_evaluate(load_config("configs/image_folder.py", overrides | settings), folder)
            except UserError as error:
                result |= {run: str(error)}
                continue
            rows = read_lines(folder / "metrics.jsonl")
            accuracies = [round(100 * row["accuracy"], 1) for row in rows if row["split"] == "eval"]
            result |= {run: accuracies[-1]} | ({f"{run}, best": max(accuracies)} if run != "probe" else {})
        print(json.dumps(result | {"image_size": image_size, "jax": version("jax")}), flush=True)


def write_subset(source: Path, folder: Path, train: int) -> None:
    """Copies the first `train` training images and 1,000 test images, as many of each class, to folder/{train,val}."""
    for split, name, count in (("train", "train", train), ("test", "val", 1000)):
        classes = sorted(path for path in (source / split).iterdir() if path.is_dir())
        for path in classes:
            (folder / name / path.name).mkdir(parents=True, exist_ok=True)
            for file in sorted(path.iterdir())[: count // len(classes)]:
                shutil.copy(file, folder / name / path.name)


def compare_auto(args: argparse.Namespace) -> None:
    """Trains each of COMPARED on each number of images, and prints a JSON object per run."""
    weights, change = load_pretrained(args.weights), BACKBONES[args.backbone]
    assert change, "random weights are not compared"
    variables = unflatten_dict(change(flatten_dict(weights.variables, sep="/")), sep="/")
    file = args.workdir / "backbone.safetensors"
    args.workdir.mkdir(parents=True, exist_ok=True)
    write_weights(file, Weights(variables, weights.provenance))
    for count, name in itertools.product(args.images, args.only):
        folder = args.workdir / f"images{count}"
        if args.data:
            write_subset(args.data, folder, count)
        else:
            write_few(folder, count // 10)
        overrides = {
            "data.name": f"folder:{folder}",
            "data.train_split": "train",
            "data.eval_split": "val",
            "data.stored_size": "0",
            "image_size": str(args.image_size),
            "model.arch": weights.provenance["arch"],
            "model.width": str(weights.provenance["width"]),
            "model.pretrained": str(file),
            "model.onednn": "never",
        }
        workdir = args.workdir / f"{name}-{count}-{args.backbone}".replace(" ", "-")
        started = time.monotonic()
        with contextlib.redirect_stdout(sys.stderr):
            train_and_evaluate(load_config(f"configs/{name}.py", overrides), workdir)
        seconds = round(time.monotonic() - started)
        rows = read_lines(workdir / "metrics.jsonl")
        accuracies = [round(100 * row["accuracy"], 1) for row in rows if row["split"] == "eval"]
        result = {"recipe": name, "images": count, "backbone": args.backbone, "image_size": args.image_size}
        result |= {"accuracies": accuracies, "seconds": seconds, "jax": version("jax")}
        print(json.dumps(result), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", default=SHIPPED, help="an ImageNet ResNet-50; with --safety or --auto any ResNet")
    parser.add_argument("--safety", action="store_true", help="train image_folder.py from backbones of any scale")
    parser.add_argument("--auto", action="store_true", help="compare configs/auto.py with other recipes")
    parser.add_argument("--images", type=int, nargs="*", default=[500, 2000], help="with --auto: to train on")
    parser.add_argument("--data", type=Path, help="with --auto: a folder with train/CLASS and test/CLASS")
    parser.add_argument("--backbone", default="as it is", choices=BACKBONES, help="with --auto: scaled weights")
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--image_size", type=int, help="96 by default; 64 with --safety or --auto")
    parser.add_argument("--only", nargs="*", choices=[*RECIPES, *BACKBONES, *COMPARED], help="some of them")
    args = parser.parse_args()
    args.only = args.only or list(BACKBONES if args.safety else COMPARED if args.auto else RECIPES)
    args.image_size = args.image_size or (64 if args.safety or args.auto else 96)
    if args.safety:
        measure_safety(args.weights, args.workdir, args.image_size, args.only)
        return
    if args.auto:
        compare_auto(args)
        return
    if args.weights == SHIPPED:
        parser.error("name an ImageNet ResNet-50 with --weights")
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
            write_few(args.workdir / "few", FEW)
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
