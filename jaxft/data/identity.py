"""Compares the images of a run with those that it began with, wherever their folder is now."""

from typing import Any

from jaxft.data.dataset import Dataset
from jaxft.errors import counted, shortened


def data_info(train: Dataset, test: Dataset) -> dict[str, Any]:
    """Returns what a checkpoint stores about the images: the folder's absolute path and layout, and both splits."""
    origin = train.origin
    return {"folder": origin.folder, "layout": origin.layout, "train": train.identity(), "eval": test.identity()}


def differences(stored: dict[str, Any], data: Dataset) -> str:
    """Returns how a split differs from the one whose `identity` was stored, by class; '' if it does not."""
    now = data.identity()
    if len(stored["counts"]) != len(now["counts"]):
        return f"{len(now['counts'])} classes instead of {len(stored['counts'])}"
    rows = list(zip(data.class_names, stored["counts"], now["counts"], strict=True))
    texts = [
        f"{name} has {counted(count, 'image')} instead of {before:,}" for name, before, count in rows if count != before
    ]
    if len(stored["files_crc32"]) == len(now["files_crc32"]) == len(rows):  # of a folder
        pairs = zip(rows, stored["files_crc32"], now["files_crc32"], strict=True)
        texts += [
            f"{name} has other images" for (name, before, count), old, new in pairs if old != new and count == before
        ]
    if not texts and stored["label_crc32"] != now["label_crc32"]:
        texts = ["the labels are in another order"]
    return shortened(texts)
