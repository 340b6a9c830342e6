"""Keeps a frozen backbone's features on disk for the next run on the same weights and images.

A file is named by a hash of everything that the features depend on, images and weights included. An .npz file has a
CRC-32 of its content, which is checked when it is read.
"""

import dataclasses
import hashlib
import io
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from jaxft.data.lazy_images import is_lazy
from jaxft.data.loader import Loader, ResidentLoader
from jaxft.errors import one_line, write_message
from jaxft.files import atomic_write, cache_dir, open_regular, reason
from jaxft.models.heads import HEAD_NORM
from jaxft.models.partition import stage_of
from jaxft.training.state import TrainState
from jaxft.training.steps import EvalConfig

CHUNK = 256  # images that are hashed at once
# Fields of a network that its features do not depend on.
NO_SETTINGS = ("num_classes", "head_norm", "dropout", "drop_path", "parent", "name")


def load_or_compute(path: Path, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """Returns the features in a file. If it is missing or damaged, they are computed and written."""
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            return np.load(io.BytesIO(archive.read("features.npy")))  # whole, because its end has the CRC-32
    except FileNotFoundError:
        pass
    except Exception as error:  # zipfile and NumPy raise exceptions of any type for damaged files
        write_message(f"{path} is damaged ({one_line(error, 60)}) and is written again")
    features = compute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            np.savez(file, features=features)
    except OSError as error:  # a full disk costs the next run some time, and this one nothing
        write_message(f"the backbone's features cannot be kept in {path.parent}: {reason(error)}; make room there")
    return features


def features_path(config: EvalConfig, state: TrainState, loader: Loader, batch_size: int) -> Path | None:
    """Returns the path of a split's features; None if they are not kept.

    They are kept only in runs of one process and if the images are in arrays, since hashing image files would take long
    too. The hash includes settings that only affect rounding, so that a run has the same bits with and without the
    file.
    """
    images = _images(loader)
    if jax.process_count() > 1 or images is None:
        return None
    digest = hashlib.blake2b(digest_size=16)
    model: Any = config.model
    names = [field.name for field in dataclasses.fields(model) if field.name not in NO_SETTINGS]
    settings = {name: repr(getattr(model, name)) for name in names} | {"dtype": np.dtype(model.dtype).name}
    rounding = (batch_size, jax.device_count(), jax.local_devices()[0].device_kind, os.uname().machine, jax.__version__)
    digest.update(repr((settings, tuple(config.preprocessing), config.policy.test_flip, rounding)).encode())
    variables = state.variables()
    params = flatten_dict(variables["params"], sep="/")
    backbone = {path: array for path, array in params.items() if stage_of(path, model.parts) != "head"}
    statistics = {name: part for name, part in variables["batch_stats"].items() if name != HEAD_NORM}
    for path, array in jax.tree_util.tree_leaves_with_path((backbone, statistics)):
        _update(digest, np.asarray(array.addressable_shards[0].data), jax.tree_util.keystr(path))
    for chunk in images:
        _update(digest, chunk)
    return cache_dir() / "features" / f"{digest.hexdigest()}.npz"


def _update(digest: Any, array: np.ndarray, name: str = "") -> None:
    digest.update(f"{name}{array.dtype}{array.shape}".encode())
    digest.update(np.ascontiguousarray(array).data.cast("B"))


def _images(loader: Loader) -> Iterator[np.ndarray] | None:
    """Yields a split's images in chunks; None if they are not in an array."""
    if isinstance(loader, ResidentLoader):
        array = loader.examples.image
        array = np.asarray(array.addressable_shards[0].data if isinstance(array, jax.Array) else array)
        return (array[i : i + CHUNK] for i in range(0, len(array), CHUNK))
    image = loader.data.image
    if is_lazy(image):
        return None
    number = np.arange(loader.num_examples)
    return (image[number[i : i + CHUNK]] for i in range(0, len(number), CHUNK))
