"""Labelled pictures by name and split, as arrays that are read once, cached and memory-mapped."""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from jaxft.errors import UserError
from jaxft.steps import Batch

SAMPLES_DIR = Path(__file__).parent / "samples"


class Dataset(NamedTuple):
    image: np.ndarray  # uint8 (N, H, W, 3)
    label: np.ndarray  # int32 (N,)
    class_names: tuple[str, ...]


def cache_dir() -> Path:
    """Where jaxft keeps what it can make again; the environment variable JAXFT_CACHE moves it."""
    return Path(os.environ.get("JAXFT_CACHE") or Path.home() / ".cache" / "jaxft")


def load(name: str, split: str, data_dir: str = "") -> Dataset:
    """`name` is `sample:cifar10` or a TFDS name, `split` in TFDS's syntax (`train[:2%]`) for the latter."""
    if name.startswith("sample:"):
        return _load_sample(name.removeprefix("sample:"), split)
    return _load_tfds(name, split, data_dir)


def _sample_names() -> list[str]:
    return sorted(f"sample:{path.name.removesuffix('.tar.xz')}" for path in SAMPLES_DIR.glob("*.tar.xz"))


def _load_sample(name: str, split: str) -> Dataset:
    """A sample that ships with jaxft: a .tar.xz of `SPLIT/CLASS/*.jpg`."""
    path = SAMPLES_DIR / f"{name}.tar.xz"
    if not path.is_file():
        raise UserError(f"there is no sample '{name}'; jaxft ships {', '.join(_sample_names())}")
    with tarfile.open(path, "r:xz") as tar:
        files = {member.name: file.read() for member in tar if (file := tar.extractfile(member))}
    splits = sorted({name.split("/")[0] for name in files})
    if split not in splits:
        raise UserError(f"the sample '{name}' has no split '{split}'; it has {' and '.join(splits)}")
    class_names = tuple(sorted({name.split("/")[1] for name in files}))
    names = sorted(name for name in files if name.startswith(f"{split}/"))
    images = [np.asarray(Image.open(io.BytesIO(files[name]))) for name in names]
    labels = [class_names.index(name.split("/")[1]) for name in names]
    return Dataset(np.stack(images), np.array(labels, np.int32), class_names)


def _load_tfds(name: str, split: str, data_dir: str) -> Dataset:
    """From the cache of arrays; filled by a child process, so that TensorFlow is never imported here."""
    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    if "://" not in data_dir:  # gs://... stays as it is
        data_dir = str(Path(data_dir).expanduser().absolute())
    key = hashlib.sha256(json.dumps([name, split, data_dir]).encode()).hexdigest()[:16]
    arrays_dir = cache_dir() / "datasets" / f"{name.replace('/', '_')}-{key}"
    if dataset := _open_arrays(arrays_dir):
        return dataset
    command = [sys.executable, "-m", "jaxft.tfds_reader", name, split, data_dir, str(arrays_dir)]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "-1"}  # TensorFlow would take the accelerator's memory
    child = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
    if child.returncode == 2:
        raise UserError(child.stdout)
    if child.returncode:
        raise UserError(f"reading {name} from {data_dir} failed with exit code {child.returncode}; see above")
    if dataset := _open_arrays(arrays_dir):
        return dataset
    raise UserError(f"{data_dir} changed while {name} was read from it; run the command again")


def _open_arrays(arrays_dir: Path) -> Dataset | None:
    """None where the arrays are missing or incomplete, or the prepared set that they came from is another by now."""
    try:
        info = json.loads((arrays_dir / "info.json").read_text())
        image = np.load(arrays_dir / "image.npy", mmap_mode="r")
        label = np.load(arrays_dir / "label.npy")
    except (OSError, ValueError):
        return None
    source = Path(info["source"])
    if source.exists() and hashlib.sha256(source.read_bytes()).hexdigest() != info["source_sha256"]:
        return None
    return Dataset(image, label, tuple(info["class_names"]))


def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of an epoch's pictures, int64 (size,): a fresh permutation, a pure function of its arguments."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(size)


def batches(order: np.ndarray, batch_size: int, num_devices: int) -> Iterator[Batch]:
    """Batches of shape (num_devices, batch_size // num_devices) in the given order, the last padded and masked."""
    shape = (num_devices, batch_size // num_devices)
    for start in range(0, len(order), batch_size):
        index = order[start : start + batch_size]
        padding = batch_size - len(index)
        mask = np.ones(len(index), np.float32)
        yield Batch(
            np.pad(index, (0, padding)).astype(np.int32).reshape(shape), np.pad(mask, (0, padding)).reshape(shape)
        )
