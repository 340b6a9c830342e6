"""Measures how fast a folder of JPEGs streams, compared with a bare JPEG decoder and PyTorch's DataLoader.

python -m benchmarks.streaming [--pictures 1500] [--rounds 5] [--workers 2]

Needs simplejpeg. Writes synthetic JPEGs to a temporary folder, 500 x 375 pixels and about 110 kB each, ImageNet's
averages. In every round each contender reads all of them once:

decoder_alone: libjpeg-turbo through simplejpeg, without resizing, in one thread per core;
jaxft_first_reading: checks all files and writes images of 224 x 224 pixels to the cache on disk;
jaxft_threads, jaxft_N_processes: batches of 64 from that cache;
jaxft_threads_from_files: batches of 64 decoded from the files (data.cache=never);
torch_N_processes: torch.utils.data.DataLoader with torchvision's Resize and CenterCrop.

N is --workers. Prints one JSON line with quartiles of images per second.
"""

import argparse
import io
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import simplejpeg
import torch
from ml_collections import ConfigDict
from PIL import Image

from jaxft.data import datasets
from jaxft.data.dataset import DataOptions
from jaxft.data.loader import make_loader
from tests.helpers.reference import torchvision

BATCH_SIZE = 64
SIDE = 224


def write_pictures(folder: Path, count: int) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = []
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (47, 63, 3), np.uint8))
        fine = rng.normal(0, 9, (375, 500, 1))
        picture = np.clip(np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC)) + fine, 0, 255)
        file = io.BytesIO()
        Image.fromarray(picture.astype(np.uint8)).save(file, "JPEG", quality=92)
        path = folder / "train" / f"class{i % 2}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.getvalue())
        paths.append(path)
    return paths


def decode_alone(paths: list[Path]) -> None:
    def decode(path: Path) -> tuple[int, ...]:
        return simplejpeg.decode_jpeg(path.read_bytes()).shape

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        assert all(shape == (375, 500, 3) for shape in pool.map(decode, paths))


def stream(data: datasets.Dataset, workers: int) -> None:
    seen = 0
    loader = make_loader(data, ConfigDict({"stream": "always", "workers": workers}))
    for batch in loader.batches(np.arange(len(data.label)), BATCH_SIZE):
        seen += int(batch.mask.sum())
    assert seen == len(data.label)


def load_with_torch(folder: Path, workers: int) -> None:
    transforms = torchvision.transforms
    transform = transforms.Compose([transforms.Resize(SIDE), transforms.CenterCrop(SIDE), transforms.PILToTensor()])
    pictures = torchvision.datasets.ImageFolder(str(folder / "train"), transform)
    loader: Any = torch.utils.data.DataLoader(pictures, BATCH_SIZE, num_workers=workers)
    assert sum(len(label) for _, label in loader) == len(pictures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    assert jax.device_count() == 1
    with tempfile.TemporaryDirectory() as folder:
        paths = write_pictures(Path(folder), args.pictures)
        os.environ["JAXFT_CACHE"] = f"{folder}/cache"
        load = partial(datasets.load, f"folder:{folder}", "train")
        always, never = (DataOptions(side=SIDE, cache=cache) for cache in ("always", "never"))
        kept, in_files = load(always), load(never)

        def first_reading() -> None:
            nonlocal kept
            shutil.rmtree(f"{folder}/cache")
            kept = load(always)

        contenders: dict[str, Callable[[], None]] = {
            "decoder_alone": lambda: decode_alone(paths),
            "jaxft_first_reading": first_reading,
            "jaxft_threads": lambda: stream(kept, 0),
            f"jaxft_{args.workers}_processes": lambda: stream(kept, args.workers),
            "jaxft_threads_from_files": lambda: stream(in_files, 0),
            f"torch_{args.workers}_processes": lambda: load_with_torch(Path(folder), args.workers),
        }
        rates: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(args.rounds):
            for name, read in contenders.items():
                start = time.monotonic()
                read()
                rates[name].append(args.pictures / (time.monotonic() - start))
        size = sum(path.stat().st_size for path in paths) / len(paths)
    quartiles = {name: [round(q, 1) for q in statistics.quantiles(values, n=4)] for name, values in rates.items()}
    print(json.dumps({"bytes": round(size), "cores": os.cpu_count(), "images_per_second": quartiles}))


if __name__ == "__main__":
    main()
