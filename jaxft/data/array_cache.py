"""A cache of labelled images: uint8 arrays in a folder, written once, checked when opened and memory-mapped."""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from jaxft.data.dataset import Dataset
from jaxft.data.image_file import shrink
from jaxft.files import atomic_directory, cache_dir


def cached_arrays_dir(name: str, split: str, *more: str) -> Path:
    """Returns the cache folder of a split. more: everything else that its content depends on."""
    key = hashlib.sha256(json.dumps([name, split, *more]).encode()).hexdigest()[:16]
    return cache_dir() / "datasets" / f"{re.sub(r'[^a-z0-9_.]+', '_', name[-50:].lower())}-{key}"


def open_arrays(arrays_dir: Path) -> tuple[Dataset, dict[str, Any]] | None:
    """Returns the memory-mapped dataset and its info.json, which includes the `source` given; None if incomplete."""
    try:
        info = json.loads((arrays_dir / "info.json").read_text())
        label = np.load(arrays_dir / "label.npy")
        image = np.memmap(arrays_dir / "image.bin", np.uint8, "r", shape=(len(label), *info["picture_shape"]))
    except (OSError, ValueError, KeyError):
        return None
    return Dataset(image, label, tuple(info["class_names"])), info


def write_arrays(
    arrays_dir: Path,
    examples: Iterable[tuple[np.ndarray, int]],
    class_names: Iterable[str],
    side: int | None,
    source: dict[str, Any],
) -> None:
    """Writes (image, label) pairs into a folder, atomically.

    Images are uint8 (H, W, 1 or 3). They are shrunk to squares of `side` pixels, or must all have one size if it is
    None. source: describes where they come from, for open_arrays. Raises ValueError if there are no images, or if one
    has another size or dtype.
    """
    labels = []
    shape: tuple[int, ...] | None = None
    with atomic_directory(arrays_dir) as partial_dir:
        with (partial_dir / "image.bin").open("wb") as file:
            for image, label in examples:
                image = as_stored(image, side)
                shape = shape or image.shape
                if image.shape != shape:
                    raise ValueError(f"has images of {shape} and of {image.shape}, although it declares one size")
                file.write(np.ascontiguousarray(image).data)
                labels.append(label)
        if not labels:
            raise ValueError("has no images")
        np.save(partial_dir / "label.npy", np.array(labels, np.int32))
        info = {"class_names": list(class_names), "picture_shape": shape} | source
        (partial_dir / "info.json").write_text(json.dumps(info))


def as_stored(image: np.ndarray, side: int | None) -> np.ndarray:
    """Converts an image (H, W, 1 or 3) to uint8 (H, W, 3), shrunk to a square of `side` pixels unless that is None.

    Raises ValueError for another dtype or shape.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3):
        raise ValueError(f"has an image that is {image.dtype} of shape {image.shape}; expected uint8, 1 or 3 channels")
    image = np.broadcast_to(image, (*image.shape[:2], 3))
    return image if side is None else shrink(np.ascontiguousarray(image), side)
