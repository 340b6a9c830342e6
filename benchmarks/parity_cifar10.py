"""Trains the original recipe in jaxft and in PyTorch, and compares the loss of every step and the accuracies.

    python -m benchmarks.parity_cifar10 --weights resnet50.pth --workdir DIR [--data_dir DIR]

1,000 training and 1,000 test images of CIFAR-10 at 224 pixels, 2 epochs of configs/cifar10.py. Both have the same
weights, the same new head and the same order of images; PyTorch has its own model, resize, loss and optimizer. Takes
about half an hour on two CPU cores. Prints JSON.
"""

import argparse
import contextlib
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from jaxft.config import load_config
from jaxft.data import datasets
from jaxft.data.batches import epoch_order
from jaxft.data.dataset import DataOptions
from jaxft.models.build import make_model
from jaxft.models.policy import Policy
from jaxft.pretrained.torch_files import read_tensors
from jaxft.train import train_and_evaluate
from jaxft.training.optimizer import make_optimizer
from jaxft.training.start import initial_state
from tests.helpers.reference import torch, torchvision


def torch_model(weights: str, head: dict[str, np.ndarray]) -> torch.nn.Module:
    """Returns torchvision's ResNet-50 with the file's weights and the given head."""
    state = {key: torch.from_numpy(array.copy()) for key, array in read_tensors(weights).items()}
    state["fc.weight"], state["fc.bias"] = torch.from_numpy(head["kernel"].T.copy()), torch.from_numpy(head["bias"])
    model = torchvision.models.resnet50(num_classes=len(head["bias"]))
    missing, extra = model.load_state_dict(state, strict=False)
    assert not extra and all(key.endswith("num_batches_tracked") for key in missing)
    return model.to(memory_format=torch.channels_last)


def torch_batch(data: datasets.Dataset, index: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    transform = torchvision.transforms.Compose(
        [
            torchvision.transforms.Resize(224),
            torchvision.transforms.ToTensor(),
            torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    images = torch.stack([transform(Image.fromarray(data.image[i])) for i in index])
    return images.contiguous(memory_format=torch.channels_last), torch.from_numpy(data.label[index]).long()


def train_torch(
    model: torch.nn.Module, train: datasets.Dataset, test: datasets.Dataset, config: ConfigDict
) -> list[dict]:
    """Trains in PyTorch; returns the rows that jaxft writes to metrics.jsonl."""
    rows, step, size = [], 0, len(train.label)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    for epoch in range(1, config.num_epochs + 1):
        model.train()
        order = epoch_order(config.seed, epoch, size)
        for start in range(0, size, 64):
            started = time.monotonic()
            image, label = torch_batch(train, order[start : start + 64])
            optimizer.zero_grad()
            logits = model(image)
            loss = torch.nn.functional.cross_entropy(logits, label)
            loss.backward()
            optimizer.step()
            step += 1
            rows.append(
                {
                    "step": step,
                    "split": "train",
                    "loss": loss.item(),
                    "accuracy": (logits.argmax(1) == label).float().mean().item(),
                    "seconds": time.monotonic() - started,
                }
            )
        model.eval()
        with torch.no_grad():
            correct, loss_sum = 0, 0.0
            for start in range(0, len(test.label), 64):
                image, label = torch_batch(test, np.arange(start, min(start + 64, len(test.label))))
                logits = model(image)
                correct += (logits.argmax(1) == label).sum().item()
                loss_sum += torch.nn.functional.cross_entropy(logits, label, reduction="sum").item()
        n = len(test.label)
        rows.append({"step": step, "split": "eval", "loss": loss_sum / n, "accuracy": correct / n})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="an ImageNet ResNet-50, torchvision's layout")
    parser.add_argument("--workdir", required=True, type=Path, help="for jaxft's run")
    parser.add_argument("--data_dir", default="", help="of prepared TFDS sets")
    args = parser.parse_args()
    overrides = {
        "model.pretrained": args.weights,
        "data.dir": args.data_dir,
        "data.train_split": "train[:2%]",
        "data.eval_split": "test[:10%]",
        "num_epochs": "2",
    }
    config = load_config("configs/cifar10.py", overrides)
    with contextlib.redirect_stdout(sys.stderr):
        train_and_evaluate(config, args.workdir)
    jaxft_rows = [json.loads(line) for line in (args.workdir / "metrics.jsonl").read_text().splitlines()]

    model = make_model(config.model, 10)
    state, _ = initial_state(config, model, Policy(), make_optimizer(config.optimizer, 1, 1, model.parts))
    head = {name: np.array(value) for name, value in state.params["fc"].items()}
    train, test = (
        datasets.load("cifar10", split, DataOptions(dir=args.data_dir))
        for split in (config.data.train_split, config.data.eval_split)
    )
    torch_rows = train_torch(torch_model(args.weights, head), train, test, config)

    rows = [
        {"step": ours["step"], "split": ours["split"]}
        | {
            f"{name}_{key}": row[key]
            for key in ("loss", "accuracy")
            for name, row in (("jaxft", ours), ("torch", theirs))
        }
        for ours, theirs in zip(jaxft_rows, torch_rows, strict=True)
    ]
    relative = [
        abs(row["jaxft_loss"] - row["torch_loss"]) / row["torch_loss"] for row in rows if row["split"] == "train"
    ]
    print(
        json.dumps(
            {
                "rows": rows,
                "largest_relative_difference_of_train_loss": max(relative),
                "median_seconds_a_step": {
                    name: float(np.median([row["seconds"] for row in of if row["split"] == "train"]))
                    for name, of in (("jaxft", jaxft_rows), ("torch", torch_rows))
                },
                "versions": {name: version(name) for name in ("jax", "flax", "torch", "torchvision")},
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
