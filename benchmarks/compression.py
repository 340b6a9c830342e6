"""Measures an exported ResNet-50 with weights of each dtype, and exported for every platform or only for CPUs.

python -m benchmarks.compression [--rounds 5] [--image_size 224] [--batch_size 8]

The files are those that `python -m jaxft.export --to stablehlo [--dtype D] [--platform cpu]` writes. They are run by
jax.export as in examples/run_exported.py and take turns on this machine's CPU. int8 and float16 weights become float32
inside, so the files shrink and the arithmetic stays. Prints one JSON line with medians of wall time; the command itself
prints accuracies.
"""

import argparse
import json
import statistics
import tempfile
import time
import zipfile
from functools import partial
from pathlib import Path

import jax
import jax.export
import numpy as np
import optax

from jaxft.config import load_config
from jaxft.export import DTYPES, export_stablehlo
from jaxft.models.build import make_model
from jaxft.models.policy import Policy
from jaxft.training.restore import LoadedCheckpoint
from jaxft.training.state import create_train_state
from jaxft.transforms.preprocessing import IMAGENET_MEAN, IMAGENET_STD


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=8)
    args = parser.parse_args()
    config = load_config("configs/cifar10.py", {})
    model = make_model(config.model, 1000)
    state = jax.jit(partial(create_train_state, model, optax.sgd(0.1)))(jax.random.key(0))
    preprocessing = {"image_size": args.image_size, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    info = {"config": config.to_dict(), "class_names": [], "preprocessing": preprocessing}
    checkpoint = LoadedCheckpoint(0, info, model, Policy(), state)
    image = np.random.default_rng(0).integers(0, 256, (args.batch_size, 256, 256, 3), np.uint8)
    networks, megabytes = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        exports: list[tuple[str, str | None]] = [*((dtype, None) for dtype in DTYPES["stablehlo"]), ("float32", "cpu")]
        for dtype, platform in exports:
            name = f"{dtype}, {platform} only" if platform else dtype
            path = Path(folder) / f"{name}.zip"
            export_stablehlo(checkpoint, path, dtype, platform)
            megabytes[name] = round(path.stat().st_size / 1e6, 1)
            with zipfile.ZipFile(path) as archive:
                networks[name] = jax.jit(jax.export.deserialize(bytearray(archive.read("model.stablehlo"))).call)
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    for turn in range(args.rounds + 1):
        for name, network in networks.items():
            started = time.monotonic()
            jax.block_until_ready(network(image))
            if turn:
                seconds[name].append(time.monotonic() - started)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    result = {
        "megabytes": megabytes,
        "images_per_second": {name: round(args.batch_size / median, 2) for name, median in medians.items()},
        "cpu_only_speed_up": round(medians["float32"] / medians["float32, cpu only"], 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
