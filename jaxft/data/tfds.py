"""Loads TFDS datasets, from the array cache or directly from their array_record files."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from jaxft.data.array_cache import as_stored, open_arrays
from jaxft.data.budget import room_for_images
from jaxft.data.dataset import DataOptions, Dataset
from jaxft.data.lazy_images import LazyImages
from jaxft.data.tfds_split import TfdsSplit
from jaxft.errors import UserError
from jaxft.files import matches_checksum, read_json, read_regular


def load_tfds(name: str, split: str, options: DataOptions) -> Dataset:
    """Returns a split as memory-mapped arrays, or as LazyImages if the cache has no room for them.

    A child process fills the cache, so that TensorFlow is never imported here. Raises UserError if it fails.
    """
    data_dir = options.dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    if "://" not in data_dir:  # not gs://...
        data_dir = str(Path(data_dir).expanduser().absolute())
    room = room_for_images(options.cache)
    wanted = TfdsSplit(name, split, data_dir, options.side, room, options.interpolation)
    data = _open_cached(wanted, options.cache)
    if data is None:
        _run_worker(wanted)
        data = _open_cached(wanted, options.cache)
    if data is None:
        raise UserError(f"{data_dir} changed while {name} was read from it; run the command again")
    return data


def _open_cached(wanted: TfdsSplit, cache: str) -> Dataset | None:
    """Returns the cached split; None if it is missing, outdated or excluded by `cache`, the config key data.cache."""
    records = _open_records(wanted.records_file)
    if records and cache == "never":
        return records
    for arrays_dir in (wanted.unchanged_dir, wanted.shrunk_dir):
        opened = open_arrays(arrays_dir)
        if opened and _is_fresh(opened[1]) and min(opened[0].image.shape[1:3]) <= wanted.side:
            return opened[0]
    return records if records and records.image.nbytes > wanted.room else None


def _open_records(path: Path) -> Dataset | None:
    """Returns the images in array_record files that `path` describes; None if it is missing or out of date."""
    try:
        found = read_json(path)
    except (OSError, ValueError):
        return None
    if not matches_checksum(found):
        return None
    directory = found["reader"]["directory"]
    if not _is_fresh(found) or not ("://" in directory or Path(directory).exists()):
        return None
    label = np.array(found["label"], np.int32)
    image = LazyImages(TfdsRecords(**found["reader"]), len(label), *found["size"])
    return Dataset(image, label, tuple(found["class_names"]))


def _is_fresh(info: dict[str, Any]) -> bool:
    """Returns whether the prepared dataset is unchanged since it was cached; a deleted one counts as unchanged."""
    try:
        return hashlib.sha256(read_regular(Path(info["source"]))).hexdigest() == info["source_sha256"]
    except FileNotFoundError:
        return True
    except OSError:
        return False


def _run_worker(wanted: TfdsSplit) -> None:
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "-1"}  # TensorFlow would reserve the accelerator's memory
    command = [sys.executable, "-m", "jaxft.data.tfds_worker", json.dumps(wanted)]
    child = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
    if child.returncode == 2:
        raise UserError(child.stdout)
    if child.returncode:
        raise UserError(
            f"reading {wanted.name} from {wanted.data_dir} failed with exit code {child.returncode}; see above"
        )


@dataclasses.dataclass(frozen=True)
class TfdsRecords:
    """Reads images of a TFDS dataset that is prepared as array_record, by index and without TensorFlow."""

    directory: str
    split: str
    feature: str
    side: int | None  # pixels of the square that images are shrunk to
    interpolation: str = "bilinear"

    def __call__(self, number: int) -> np.ndarray:
        """Returns uint8 (H, W, 3). Raises UserError if the record cannot be read or holds another kind of image."""
        try:
            image = _source(self.directory, self.split, os.getpid())[number][self.feature]
            return as_stored(image, self.side, self.interpolation)
        except Exception as error:  # TFDS's readers and decoders raise exceptions of any type
            raise UserError(f"{self.where(number)} cannot be read: {' '.join(str(error).split())[:120]}") from error

    def where(self, number: int) -> str:
        return f"image {number} of {self.directory}"


@cache
def _source(directory: str, split: str, process: int) -> Any:
    """Returns the data source of this process; `process` is its id, because open files do not survive a fork."""
    import tensorflow_datasets as tfds  # takes two seconds

    return tfds.builder_from_directory(directory).as_data_source(split)
