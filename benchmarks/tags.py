"""Compares tags with PyTorch on mosaics of four images, and several targets at once with a run for each of them.

    python -m benchmarks.tags --workdir DIR [--data folder:cifar10] [--seeds 3] [--only mosaics tasks]

Mosaics: 2 x 2 images of CIFAR-10, tagged by the classes that they contain: 2,000 to train on, 500 to choose one of ten
epochs by mAP, 1,000 to test on. The three splits have no image in common. jaxft and PyTorch fine-tune the packaged
ResNet-18 in turns, with the same settings except for the order of the images and the random numbers. scikit-learn
computes the metrics of both. PyTorch uses channels_last and has all images in memory.

Tasks: the class, two tags and the brightness of the sample's images, by one network for each and by one network with
three targets, with equal weights and with others; tested after the last of five epochs.

Prints one JSON object per run, then the mean, lowest and highest value of each metric for each kind of run.
"""

import argparse
import contextlib
import csv
import json
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image
from sklearn.metrics import average_precision_score, f1_score, log_loss

from jaxft.config import load_config
from jaxft.data import datasets
from jaxft.pretrained.convert import to_torch
from jaxft.pretrained.load import load_pretrained
from jaxft.run.metrics_file import read_lines
from jaxft.targets import joint
from jaxft.targets.calibration import sigmoid
from jaxft.train import train_and_evaluate
from jaxft.training.evaluation import Evaluation, evaluate
from jaxft.training.optimizer import learning_rate_schedule
from jaxft.transforms.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from tests.helpers.reference import torch, torchvision
from tests.helpers.torch_models import NarrowResNet

COUNTS = {"train": 2000, "val": 500, "test": 1000}
EPOCHS = {"mosaics": 10, "tasks": 5}
VAL_SHARE = 0.2  # of the training images, for the validation mosaics only
ANIMALS = ("bird", "cat", "deer", "dog", "frog", "horse")
DARK = 45.0  # percent of white; 44 % of the images are darker
TASKS = {
    "species": "class:species",
    "tags": "tags:tags",
    "brightness": "number:brightness",
    "all": "class:species, tags:tags, number:brightness",
    "all, weighted": "class:species, tags:tags*0.3, number:brightness*0.3",
}
SHOWN = ("accuracy", "mAP", "log_loss", "mae", "r2")

Scores = dict[str, Any]
Mosaics = tuple[np.ndarray, np.ndarray]  # images, uint8 (N, H, W, 3), and tags, bool (N, T)


# ---- tables ----


def make_mosaics(source: str) -> tuple[dict[str, Mosaics], tuple[str, ...]]:
    """Returns the mosaics of each split, and the tags in their order."""
    rng, splits = np.random.default_rng(0), {}
    train, test = (datasets.load(source, split) for split in ("train", "test"))
    shuffled = rng.permutation(train.num_examples)
    num_val = int(VAL_SHARE * train.num_examples)
    pools = {"train": shuffled[num_val:], "val": shuffled[:num_val], "test": np.arange(test.num_examples)}
    for split, pool in pools.items():
        data = test if split == "test" else train
        four = np.stack([rng.choice(pool, 4, replace=False) for _ in range(COUNTS[split])])
        images = np.stack([data.image[i] for i in four])
        top, bottom = (np.concatenate([images[:, i], images[:, i + 1]], axis=2) for i in (0, 2))
        tags = (data.label[four][..., None] == np.arange(len(train.class_names))).any(1)
        splits[split] = np.concatenate([top, bottom], axis=1), tags
    return splits, train.class_names


def label_tasks() -> Iterator[tuple[str, np.ndarray, dict[str, str]]]:
    """Yields the split, the image and the cells of each row of a table with a class, tags and a number."""
    for split in ("train", "test"):
        data = datasets.load("sample:cifar10", split)
        for image, label in zip(data.image, data.label, strict=True):
            species, brightness = data.class_names[label], 100 * float(image.mean()) / 255
            tags = [tag for tag, present in (("animal", species in ANIMALS), ("dark", brightness < DARK)) if present]
            cells = {"species": species, "tags": "|".join(tags) or "|", "brightness": f"{brightness:.2f}"}
            yield split, image, cells


def write_table(file: Path, rows: Iterable[tuple[str, np.ndarray, dict[str, str]]]) -> None:
    """Writes the images as PNG files beside the table. rows: split, image and the other cells of each."""
    file.with_suffix("").mkdir(parents=True, exist_ok=True)
    cells = []
    for i, (split, image, own) in enumerate(rows):
        cells.append({"path": f"{file.stem}/{i}.png", "split": split} | own)
        Image.fromarray(image).save(file.parent / cells[-1]["path"])
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(cells[0]))
        writer.writeheader()
        writer.writerows(cells)


# ---- training ----


def make_config(file: Path, targets: str, seed: int, epochs: int, val_split: str = "") -> ConfigDict:
    """Returns the config of the quickstart with other data: SGD, one epoch of warm-up, then a cosine."""
    overrides = {
        "note": "",
        "seed": str(seed),
        "num_epochs": str(epochs),
        "data.name": f"table:{file.absolute()}",
        "data.val_split": val_split,
        "targets": targets,
        "model.onednn": "never",  # numbers must be comparable between machines
    }
    return load_config("configs/quickstart.py", overrides)


def train_jaxft(config: ConfigDict, workdir: Path, which: str) -> tuple[Evaluation, float]:
    """Returns the evaluation of a checkpoint, "best" or "latest", and the images per second of training."""
    with contextlib.redirect_stdout(sys.stderr):
        train_and_evaluate(config, workdir)
    speeds = [row["images_per_second"] for row in read_lines(workdir / "metrics.jsonl") if row["split"] == "train"]
    return evaluate(workdir, which), statistics.median(speeds)


def torch_images(images: np.ndarray) -> torch.Tensor:
    mean, std = (np.array(values, np.float32) for values in (IMAGENET_MEAN, IMAGENET_STD))
    normalised = (images.astype(np.float32) / 255 - mean) / std
    return torch.from_numpy(normalised.transpose(0, 3, 1, 2)).contiguous(memory_format=torch.channels_last)


def train_torch(splits: dict[str, Mosaics], config: ConfigDict) -> tuple[np.ndarray, float]:
    """Returns the test logits after the epoch of the highest validation mAP, and the images per second of training."""
    torch.manual_seed(config.seed)
    model = NarrowResNet(torchvision.models.resnet.BasicBlock, (2, 2, 2, 2), config.model.width)
    backbone = to_torch(load_pretrained(config.model.pretrained))
    state = {key: torch.from_numpy(array) for key, array in backbone.items() if not key.startswith("fc.")}
    missing, extra = model.load_state_dict(state, strict=False)
    assert not extra and missing == ["fc.weight", "fc.bias"]
    model = model.to(memory_format=torch.channels_last)
    images = {split: torch_images(image) for split, (image, _) in splits.items()}
    label = torch.from_numpy(splits["train"][1].astype(np.float32))
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=config.optimizer.learning_rate,
        momentum=config.optimizer.momentum,
        weight_decay=config.optimizer.weight_decay,
    )
    steps_per_epoch = -(-len(label) // config.batch_size)
    learning_rate = learning_rate_schedule(config.optimizer, steps_per_epoch, config.num_epochs)
    step, highest, speeds, logits = 0, -1.0, [], np.zeros(0)
    for _ in range(config.num_epochs):
        model.train()
        for index in torch.randperm(len(label)).split(config.batch_size):
            started = time.monotonic()
            flip = torch.rand(len(index), 1, 1, 1) < 0.5
            image = torch.where(flip, images["train"][index].flip(3), images["train"][index])
            optimizer.param_groups[0]["lr"] = float(learning_rate(step))
            optimizer.zero_grad()
            torch.nn.functional.binary_cross_entropy_with_logits(model(image), label[index]).backward()
            optimizer.step()
            speeds.append(len(index) / (time.monotonic() - started))
            step += 1
        model.eval()
        with torch.no_grad():
            val, test = (torch.cat([model(part) for part in images[s].split(100)]).numpy() for s in ("val", "test"))
        if (own := average_precision_score(splits["val"][1], val)) > highest:
            highest, logits = own, test
    return logits, statistics.median(speeds)


# ---- comparisons ----


def tag_scores(logits: np.ndarray, label: np.ndarray) -> Scores:
    """Returns scikit-learn's metrics of tags that are predicted at a probability of 1/2."""
    probability = sigmoid(np.asarray(logits, np.float64))
    losses = [log_loss(label[:, i], probability[:, i], labels=[0, 1]) for i in range(label.shape[1])]
    return {
        "mAP": average_precision_score(label, probability),
        "f1_macro": f1_score(label, probability >= 0.5, average="macro"),
        "log_loss": statistics.mean(losses),
    }


def compare_mosaics(args: argparse.Namespace) -> None:
    file, (splits, names) = args.workdir / "mosaics.csv", make_mosaics(args.data)
    write_table(
        file,
        (
            (split, image, {"tags": "|".join(np.array(names)[own])})
            for split, mosaics in splits.items()
            for image, own in zip(*mosaics, strict=True)
        ),
    )
    runs: dict[str, list[Scores]] = {"jaxft": [], "torch": []}
    for seed in range(args.seeds):
        config = make_config(file, "tags:tags", seed, EPOCHS["mosaics"], "val")
        evaluation, speed = train_jaxft(config, args.workdir / f"mosaics-{seed}", "best")
        scores = tag_scores(evaluation.predictions.logits, evaluation.predictions.label["tags"])
        before: Scores = joint.scores(evaluation.targets, evaluation.predictions, {})["tags"]
        after: Scores = joint.scores(evaluation.targets, evaluation.predictions, evaluation.calibrations)["tags"]
        assert all(np.isclose(scores[key], before[key], rtol=1e-9) for key in scores), "not as in scikit-learn"
        scores |= {"f1_macro_fitted": after["f1_macro"], "ece": before["ece"], "ece_fitted": after["ece"]}
        report(runs, "jaxft", seed, scores | {"images_per_second": speed})
        logits, speed = train_torch(splits, config)
        report(runs, "torch", seed, tag_scores(logits, splits["test"][1]) | {"images_per_second": speed})
    report_spread(runs)


def compare_tasks(args: argparse.Namespace) -> None:
    file = args.workdir / "tasks.csv"
    write_table(file, label_tasks())
    runs: dict[str, list[Scores]] = {name: [] for name in TASKS}
    for seed in range(args.seeds):
        for name, targets in TASKS.items():
            config = make_config(file, targets, seed, EPOCHS["tasks"])
            evaluation, speed = train_jaxft(config, args.workdir / f"{name}-{seed}".replace(", ", "-"), "latest")
            found = joint.scores(evaluation.targets, evaluation.predictions, {})
            scores = {f"{target}.{key}": own[key] for target, own in found.items() for key in SHOWN if key in own}
            report(runs, name, seed, scores | {"images_per_second": speed})
    report_spread(runs)


def report(runs: dict[str, list[Scores]], name: str, seed: int, scores: Scores) -> None:
    """Prints the scores of a run and adds them to `runs`."""
    runs[name].append(scores)
    print(json.dumps({"run": name, "seed": seed} | {key: rounded(value) for key, value in scores.items()}), flush=True)


def report_spread(runs: dict[str, list[Scores]]) -> None:
    """Prints the mean, the lowest and the highest value of each metric."""
    versions = {package: version(package) for package in ("jax", "torch")}
    for name, found in runs.items():
        columns = {key: [scores[key] for scores in found] for key in found[0]}
        spread = {
            key: [rounded(value) for value in (statistics.mean(own), min(own), max(own))]
            for key, own in columns.items()
        }
        print(json.dumps({"runs": name, "mean, lowest, highest": spread} | versions), flush=True)


def rounded(value: float) -> float:
    return float(f"{value:.4g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--data", default="sample:cifar10", help="images of the mosaics, as in data.name")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=("mosaics", "tasks"), default=("mosaics", "tasks"))
    args = parser.parse_args()
    if "mosaics" in args.only:
        compare_mosaics(args)
    if "tasks" in args.only:
        compare_tasks(args)


if __name__ == "__main__":
    main()
