"""TFDS datasets, from the array cache or directly from their array_record files."""

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

from jaxft.data.array_cache import as_stored, cached_arrays_dir, open_arrays
from jaxft.data.budget import room_for_pictures
from jaxft.data.dataset import Dataset
from jaxft.data.lazy_images import LazyImages
from jaxft.errors import UserError


@dataclasses.dataclass(frozen=True)
class TfdsRecords:
    """Reads the pictures of a TFDS set that is prepared as array_record; which needs no TensorFlow."""

    directory: str
    split: str
    feature: str
    side: int | None  # of the squares that pictures are shrunk to

    def __call__(self, number: int) -> np.ndarray:
        """Raises UserError where a record cannot be read or is no picture that jaxft takes."""
        try:
            return as_stored(_source(self.directory, self.split, os.getpid())[number][self.feature], self.side)
        except Exception as error:  # TFDS's readers and decoders raise whatever they like
            raise UserError(f"{self.where(number)} cannot be read: {' '.join(str(error).split())[:200]}") from error

    def where(self, number: int) -> str:
        return f"picture {number} of {self.directory}"


@cache
def _source(directory: str, split: str, process: int) -> Any:
    """Of this process: open files do not survive a fork."""
    import tensorflow_datasets as tfds  # takes two seconds, which are for those who need it

    return tfds.builder_from_directory(directory).as_data_source(split)


def load_tfds(name: str, split: str, data_dir: str, side: int, cache: str) -> Dataset:
    """From the cache of arrays; filled by a child process, so that TensorFlow is never imported here."""
    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    if "://" not in data_dir:  # gs://... stays as it is
        data_dir = str(Path(data_dir).expanduser().absolute())
    as_they_are, shrunk = cached_arrays_dir(name, split, data_dir), cached_arrays_dir(name, split, data_dir, str(side))
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
            _run_tfds_worker(name, split, data_dir, side, as_they_are, shrunk, records, room)
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
    image = LazyImages(TfdsRecords(**found["reader"]), len(label), *found["size"])
    return Dataset(image, label, tuple(found["class_names"]))


def _is_fresh(info: dict[str, Any]) -> bool:
    source = Path(info["source"])
    return not source.exists() or hashlib.sha256(source.read_bytes()).hexdigest() == info["source_sha256"]


def _run_tfds_worker(name: str, split: str, data_dir: str, *more: int | Path | float) -> None:
    arguments = [name, split, data_dir, *map(str, more)]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "-1"}  # TensorFlow would take the accelerator's memory
    command = [sys.executable, "-m", "jaxft.data.tfds_worker", *arguments]
    child = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
    if child.returncode == 2:
        raise UserError(child.stdout)
    if child.returncode:
        raise UserError(f"reading {name} from {data_dir} failed with exit code {child.returncode}; see above")
