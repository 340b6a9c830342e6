"""Labelled pictures as arrays in a folder: written once, checked by whoever opens them, memory-mapped."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from jaxft.data.dataset import Dataset
from jaxft.data.image_file import shrink
from jaxft.files import cache_dir


def open_arrays(arrays_dir: Path) -> tuple[Dataset, dict[str, Any]] | None:
    """The arrays and what write_arrays was told of their source; None where they are missing or incomplete."""
    try:
        info = json.loads((arrays_dir / "info.json").read_text())
        label = np.load(arrays_dir / "label.npy")
        image = np.memmap(arrays_dir / "image.bin", np.uint8, "r", shape=(len(label), *info["picture_shape"]))
    except (OSError, ValueError, KeyError):
        return None
    return Dataset(image, label, tuple(info["class_names"])), info


def as_stored(picture: np.ndarray, side: int | None) -> np.ndarray:
    """uint8 (H, W, 3) of a picture (H, W, 1 or 3), shrunk to a square of `side` pixels unless None; or ValueError."""
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] not in (1, 3):
        kind = f"{picture.dtype} of shape {picture.shape}"
        raise ValueError(f"has a picture that is {kind}; jaxft reads uint8 with 1 or 3 channels")
    picture = np.broadcast_to(picture, (*picture.shape[:2], 3))
    return picture if side is None else shrink(np.ascontiguousarray(picture), side)


def write_arrays(
    arrays_dir: Path,
    examples: Iterable[tuple[np.ndarray, int]],
    class_names: Iterable[str],
    side: int | None,
    source: dict[str, Any],
) -> None:
    """Of (picture, label), pictures uint8 (H, W, 1 or 3), in a folder that appears all at once.

    side: pictures are shrunk to a square of so many pixels; None takes them as they are, all of one size.
    Raises ValueError where there is no picture, or one of another size or kind.
    """
    partial_dir = arrays_dir.with_name(f"{arrays_dir.name}.partial-{os.getpid()}")
    partial_dir.mkdir(parents=True)
    labels = []
    shape: tuple[int, ...] | None = None
    try:
        with (partial_dir / "image.bin").open("wb") as file:
            for picture, label in examples:
                picture = as_stored(picture, side)
                shape = shape or picture.shape
                if picture.shape != shape:
                    raise ValueError(f"has pictures of {shape} and of {picture.shape}, and says they are of one size")
                file.write(np.ascontiguousarray(picture).data)
                labels.append(label)
        if not labels:
            raise ValueError("has no pictures")
        np.save(partial_dir / "label.npy", np.array(labels, np.int32))
        info = {"class_names": list(class_names), "picture_shape": shape} | source
        (partial_dir / "info.json").write_text(json.dumps(info))
        shutil.rmtree(arrays_dir, ignore_errors=True)
        try:
            partial_dir.rename(arrays_dir)
        except OSError:
            if not arrays_dir.exists():  # else a process that started beside this one was faster
                raise
    finally:
        shutil.rmtree(partial_dir, ignore_errors=True)


def cached_arrays_dir(name: str, split: str, *more: str) -> Path:
    key = hashlib.sha256(json.dumps([name, split, *more]).encode()).hexdigest()[:16]
    return cache_dir() / "datasets" / f"{re.sub(r'[^a-z0-9_.]+', '_', name[-50:].lower())}-{key}"
