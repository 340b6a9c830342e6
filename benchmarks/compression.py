"""How large and how fast an exported ResNet-50 is with weights of each type, on this machine's CPU.

python -m benchmarks.compression [--rounds 5] [--image_size 224] [--batch_size 8]

The files that `python -m jaxft.export --to stablehlo --dtype ...` writes, run by jax.export as examples/run_exported.py
does, taking turns; medians of wall time. int8 and float16 weights become float32 inside, so that files shrink and not
the arithmetic. One JSON line. Accuracies before and after are what the command itself tells.
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
from jaxft.models.resnet import make_model
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
    checkpoint = LoadedCheckpoint(0, info, model, state)
    pictures = np.random.default_rng(0).integers(0, 256, (args.batch_size, 256, 256, 3), np.uint8)
    networks, megabytes = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for dtype in DTYPES["stablehlo"]:
            path = Path(folder) / f"{dtype}.zip"
            export_stablehlo(checkpoint, path, dtype)
            megabytes[dtype] = round(path.stat().st_size / 1e6, 1)
            with zipfile.ZipFile(path) as archive:
                networks[dtype] = jax.jit(jax.export.deserialize(bytearray(archive.read("model.stablehlo"))).call)
    seconds: dict[str, list[float]] = {dtype: [] for dtype in networks}
    for turn in range(args.rounds + 1):
        for dtype, network in networks.items():
            started = time.monotonic()
            jax.block_until_ready(network(pictures))
            if turn:
                seconds[dtype].append(time.monotonic() - started)
    rates = {dtype: round(args.batch_size / statistics.median(times), 2) for dtype, times in seconds.items()}
    print(json.dumps({"megabytes": megabytes, "images_per_second": rates}))


if __name__ == "__main__":
    main()
