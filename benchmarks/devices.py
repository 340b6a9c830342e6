"""Compares one CPU device with eight forced ones: the loss curves, and one checkpoint's evaluation counts.

    python -m benchmarks.devices --weights resnet50.pth --workdir DIR [--data_dir DIR]

Trains configs/cifar10.py (synchronised BatchNorm statistics) for one epoch at 64 pixels, on 1,000 images to train and
1,000 to test. Prints JSON.
"""

import argparse
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path


def run(devices: int, *arguments: str) -> str:
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "NPROC": "16", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, env=os.environ | flags, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="an ImageNet ResNet-50 in torchvision's layout")
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--data_dir", default="", help="folder of prepared TFDS data sets")
    args = parser.parse_args()
    losses = {}
    for devices in (1, 8):
        workdir = args.workdir / f"{devices}_devices"
        run(
            devices,
            "jaxft.train",
            "--config=configs/cifar10.py",
            f"--workdir={workdir}",
            f"--config.model.pretrained={args.weights}",
            f"--config.data.dir={args.data_dir}",
            "--config.data.train_split=train[:2%]",
            "--config.data.eval_split=test[:10%]",
            "--config.image_size=64",
            "--config.num_epochs=1",
        )
        rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        losses[devices] = [row["loss"] for row in rows if row["split"] == "train"]
    counts = {
        devices: json.loads(run(devices, "jaxft.evaluate", f"--workdir={workdir}", "--json")) for devices in (1, 8)
    }
    relative = [abs(one - eight) / one for one, eight in zip(losses[1], losses[8], strict=True)]
    result = {
        "losses": losses,
        "largest_relative_difference_of_loss": max(relative),
        "evaluation_of_one_checkpoint": counts,
        "versions": {name: version(name) for name in ("jax", "flax")},
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
