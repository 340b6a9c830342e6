"""Labelled pictures by name and split, as arrays that are read once, cached and memory-mapped."""

import hashlib
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from jaxft import folders
from jaxft.arrays import Dataset, open_arrays, write_arrays
from jaxft.errors import UserError
from jaxft.steps import Batch
from jaxft.stored import StoredPictures, TfdsRecords

COMPARED_BYTES = 1 << 30
MEMORY_SHARE = 0.3  # of a device's memory that the pictures of one split may take
SAMPLES_DIR = Path(__file__).parent / "samples"


def cache_dir() -> Path:
    """Where jaxft keeps what it can make again; the environment variable JAXFT_CACHE moves it."""
    return Path(os.environ.get("JAXFT_CACHE") or Path.home() / ".cache" / "jaxft")


def load(
    name: str,
    split: str,
    data_dir: str = "",
    *,
    side: int = 224,
    holdout: float = 0.2,
    unreadable: str = "refuse",
    class_names: tuple[str, ...] | None = None,
    cache: str = "auto",
) -> Dataset:
    """`name` is `sample:cifar10`, `folder:PATH` or a TFDS name, `split` in TFDS's syntax (`train[:2%]`) for the last.

    side: pictures that differ in size, or are larger, become squares of so many pixels, as preprocessing to that size
    would make them. holdout, unreadable, class_names: of a folder's pictures, see folders.find_files. cache: config
    key data.cache; pictures that are not kept stay in their files, as they can unless TFDS prepared them as tfrecord.
    """
    if name.startswith("sample:"):
        return _load_sample(name.removeprefix("sample:"), split)
    if name.startswith("folder:"):
        files = folders.find_files(Path(name.removeprefix("folder:")).expanduser(), split, holdout, class_names)
        return _load_folder(files, name, split, side, unreadable, cache)
    return _load_tfds(name, split, data_dir, side, cache)


def load_config_data(
    data: ConfigDict, split: str, image_size: int, class_names: tuple[str, ...] | None = None
) -> Dataset:
    """A split of what the config's `data` section names; class_names: of the training pictures, if known."""
    return load(
        data.name,
        split,
        data.dir,
        side=data.stored_size or image_size,
        holdout=data.holdout,
        unreadable=data.unreadable,
        class_names=class_names,
        cache=data.cache,
    )


def room_for_pictures(cache: str) -> float:
    """Bytes of the disk that the decoded pictures of a split may take: config key data.cache."""
    if cache != "auto":
        return {"always": math.inf, "never": -1}[cache]
    existing = next(path for path in (cache_dir().absolute(), *cache_dir().absolute().parents) if path.is_dir())
    return shutil.disk_usage(existing).free / 2


def memory_for_pictures(stream: str) -> float:
    """Bytes beyond which the pictures of a split are streamed: config key data.stream."""
    if stream != "auto":
        return {"always": -1, "never": math.inf}[stream]
    return MEMORY_SHARE * device_memory()


def device_memory() -> int:
    """Bytes of one device; an equal share of the machine's where devices have none of their own."""
    of_device = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return of_device or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()


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


def _load_folder(
    files: folders.LabelledFiles, name: str, split: str, side: int, unreadable: str, cache: str
) -> Dataset:
    source = {"fingerprint": files.fingerprint(), "unreadable": unreadable, "side": side}
    arrays_dir = _arrays_dir(name, split)
    opened = open_arrays(arrays_dir)
    if opened and cache != "never" and all(opened[1].get(key) == value for key, value in source.items()):
        return opened[0]
    if len(files.paths) * side**2 * 3 > room_for_pictures(cache):
        data = _leave_in_files(files, side, unreadable, source, arrays_dir.with_name(f"{arrays_dir.name}.json"))
        if not len(data.label):
            raise UserError(f"{name} has no pictures")
        return data
    _, side_or_none = folders.stored_size(files, side)
    pictures = folders.read_pictures(files, side_or_none, unreadable)
    examples = ((picture, files.label[number]) for picture, number in pictures)
    try:
        write_arrays(arrays_dir, examples, files.class_names, None, source)
    except ValueError as error:
        raise UserError(f"{name} {error}") from None
    except OSError as error:
        raise _not_kept(error) from error
    opened = open_arrays(arrays_dir)
    assert opened, f"{arrays_dir} was just written"
    return opened[0]


def _leave_in_files(
    files: folders.LabelledFiles, side: int, unreadable: str, source: dict[str, Any], checked: Path
) -> Dataset:
    """checked: a file that remembers which of these files are pictures, for which all have to be read once."""
    try:
        found = json.loads(checked.read_text())
    except (OSError, ValueError):
        found = {}
    if any(found.get(key) != value for key, value in source.items()):
        size, side_or_none = folders.stored_size(files, side)
        numbers = [number for _, number in folders.read_pictures(files, side_or_none, unreadable)]
        found = source | {"numbers": numbers, "size": size, "shrunk_to": side_or_none}
        partial = checked.with_suffix(f".partial-{os.getpid()}")
        try:
            checked.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(found))
            partial.replace(checked)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise _not_kept(error) from error
    numbers = found["numbers"]
    height, width = found["size"]
    reader = folders.PictureFiles([files.paths[i] for i in numbers], found["shrunk_to"])
    image = StoredPictures(reader, len(numbers), height, width)
    return Dataset(image, np.array([files.label[i] for i in numbers], np.int32), files.class_names)


def _not_kept(error: OSError) -> UserError:
    return UserError(
        f"what was read of the pictures cannot be kept in {cache_dir()} ({error.strerror or error}): make room there, "
        "or name another folder by the environment variable JAXFT_CACHE; --config.data.cache=never needs next to none"
    )


def _arrays_dir(name: str, split: str, *more: str) -> Path:
    key = hashlib.sha256(json.dumps([name, split, *more]).encode()).hexdigest()[:16]
    return cache_dir() / "datasets" / f"{re.sub(r'[^a-z0-9_.]+', '_', name[-50:].lower())}-{key}"


def _load_tfds(name: str, split: str, data_dir: str, side: int, cache: str) -> Dataset:
    """From the cache of arrays; filled by a child process, so that TensorFlow is never imported here."""
    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    if "://" not in data_dir:  # gs://... stays as it is
        data_dir = str(Path(data_dir).expanduser().absolute())
    as_they_are, shrunk = _arrays_dir(name, split, data_dir), _arrays_dir(name, split, data_dir, str(side))
    records = shrunk.with_name(f"{shrunk.name}.json")
    room = room_for_pictures(cache)
    for attempt in range(2):
        stored = _open_records(records)
        if stored and cache == "never":
            return stored
        for arrays_dir in (as_they_are, shrunk):
            opened = open_arrays(arrays_dir)
            if opened and _is_fresh(opened[1]) and min(opened[0].image.shape[1:3]) <= side:
                return opened[0]
        if stored and stored.image.nbytes > room:
            return stored
        if not attempt:
            _run_tfds_reader(name, split, data_dir, side, as_they_are, shrunk, records, room)
    raise UserError(f"{data_dir} changed while {name} was read from it; run the command again")


def _open_records(path: Path) -> Dataset | None:
    """What tfds_reader has found, while it is so."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    directory = found["reader"]["directory"]
    if not _is_fresh(found) or not ("://" in directory or Path(directory).exists()):
        return None
    label = np.array(found["label"], np.int32)
    image = StoredPictures(TfdsRecords(**found["reader"]), len(label), *found["size"])
    return Dataset(image, label, tuple(found["class_names"]))


def _is_fresh(info: dict[str, Any]) -> bool:
    source = Path(info["source"])
    return not source.exists() or hashlib.sha256(source.read_bytes()).hexdigest() == info["source_sha256"]


def _run_tfds_reader(name: str, split: str, data_dir: str, *more: int | Path | float) -> None:
    arguments = [name, split, data_dir, *map(str, more)]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "-1"}  # TensorFlow would take the accelerator's memory
    command = [sys.executable, "-m", "jaxft.tfds_reader", *arguments]
    child = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
    if child.returncode == 2:
        raise UserError(child.stdout)
    if child.returncode:
        raise UserError(f"reading {name} from {data_dir} failed with exit code {child.returncode}; see above")


def is_streamed(data: Dataset, stream: str) -> bool:
    """Whether each batch brings its pictures; stream: config key data.stream."""
    return data.image.nbytes > memory_for_pictures(stream)


def describe(train: Dataset, test: Dataset, stream: str = "auto") -> str:
    """Pictures per class, and what of the test set is trained on too, where looking for it takes seconds at most."""
    counts = np.bincount(train.label, minlength=len(train.class_names))
    fewest, most = int(counts.min()), int(counts.max())
    text = (
        f"{len(counts):,} classes of {fewest:,} pictures each"
        if fewest == most
        else (
            f"{len(counts):,} classes, from {fewest:,} pictures ({train.class_names[int(counts.argmin())]}) "
            f"to {most:,} ({train.class_names[int(counts.argmax())]})"
        )
    )
    if absent := len(counts) - len(np.unique(test.label)):
        text += f"; {absent} of them not in the test set"
    if is_streamed(train, stream):
        text += f"; streamed from {_place(train.image)}"
    in_files = any(isinstance(data.image, StoredPictures) for data in (train, test))
    if not in_files and train.image.nbytes + test.image.nbytes <= COMPARED_BYTES:
        trained_on = {hash(image.tobytes()) for image in train.image}
        if both := sum(hash(image.tobytes()) in trained_on for image in test.image):
            text += f"; {both:,} test pictures are trained on too, which flatters the accuracy"
    return text


def _place(image: Any) -> str:
    if isinstance(image, np.memmap):
        return str(Path(str(image.filename)).parent)
    return "their files" if isinstance(image, StoredPictures) else "memory"


def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of an epoch's pictures, int64 (size,): a fresh permutation, a pure function of its arguments."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(size)


def batches(order: np.ndarray, batch_size: int, num_devices: int) -> Iterator[Batch]:
    """Batches of shape (num_devices, batch_size // num_devices) in the given order, the last padded and masked."""
    shape = (num_devices, batch_size // num_devices)
    for start in range(0, len(order), batch_size):
        index = order[start : start + batch_size]
        padding = (0, batch_size - len(index))
        mask = np.ones(len(index), np.float32)
        yield Batch(
            np.pad(index, padding).astype(np.int32).reshape(shape),
            np.pad(np.roll(index, -1), padding).astype(np.int32).reshape(shape),
            np.pad(mask, padding).reshape(shape),
        )
