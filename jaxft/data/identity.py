"""Compares the images of a run with those that it began with, wherever their folder is now."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxft.data.dataset import Dataset
from jaxft.errors import UserError, counted, shortened

_IMAGES = {"train": "training", "eval": "test", "val": "validation"}


def data_info(train: Dataset, test: Dataset, val: Dataset | None = None) -> dict[str, Any]:
    """Returns what a checkpoint stores about the images: the folder's absolute path and layout, and all splits."""
    origin, validation = train.origin, {} if val is None else {"val": val.identity()}
    splits = {"train": train.identity(), "eval": test.identity()} | validation
    return {"folder": origin.folder, "layout": origin.layout} | splits


def differences(stored: dict[str, Any], data: Dataset) -> str:
    """Returns how a split differs from the one whose `identity` was stored, by class; '' if it does not."""
    now = data.identity()
    if "num_images" in stored or "num_images" in now:
        return _differences_in_fields(stored, now)
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
    elif not texts:  # of a table
        texts = _differences_in_files(stored, now)
    if not texts and stored["label_crc32"] != now["label_crc32"]:
        texts = ["the labels are in another order"]
    return shortened(texts)


def _differences_in_fields(stored: dict[str, Any], now: dict[str, Any]) -> str:
    """Returns how a split of a table differs from the one whose identity was stored; '' if it does not."""
    before, labels = stored.get("labels_crc32", {}), now.get("labels_crc32", {})
    if before.keys() != labels.keys():
        return f"the targets are {shortened(list(labels))} instead of {shortened(list(before))}"
    if stored["num_images"] != now["num_images"]:
        return f"{counted(now['num_images'], 'image')} instead of {stored['num_images']:,}"
    texts = [f"{name} has other labels" for name, crc32 in labels.items() if crc32 != before[name]]
    return shortened([*texts, *_differences_in_files(stored, now)])


def _differences_in_files(stored: dict[str, Any], now: dict[str, Any]) -> list[str]:
    texts = []
    if len(stored["files_crc32"]) == len(now["files_crc32"]) and stored["files_crc32"] != now["files_crc32"]:
        texts.append("the files of the images have other content or another order")
    if stored.get("group_crc32") != now.get("group_crc32"):
        texts.append("the images have other groups")
    return texts


def check_data(name: str, info: dict[str, Any], splits: Sequence[Dataset | None], workdir: Path) -> None:
    """Raises UserError if the images differ from those that the run began with, wherever their folder is now.

    splits: for training, for testing, and for validation if there is such a split. Checkpoints of version 0.1 have only
    the number of training images and the classes.
    """
    train_data = splits[0]
    assert train_data is not None
    before, now = info["class_names"], list(train_data.class_names)
    stored, stored_name = info.get("data"), info["config"]["data"]["name"]
    remedy = "put them back, or name another --workdir"
    if before != now:
        gone, new = ([n for n in names if n not in others] for names, others in ((before, now), (now, before)))
        texts = [f"{text} {shortened(names)}" for text, names in (("without", new), ("with", gone)) if names]
        raise UserError(
            f"{workdir} began with other training data ({info['train_size']:,} images of {len(before)} classes"
            f"{', ' if texts else ''}{' and '.join(texts)}); {remedy}"
        )
    if stored is None:
        if info["train_size"] != train_data.num_examples:
            raise UserError(
                f"{workdir} began with other training data ({info['train_size']:,} images instead of "
                f"{train_data.num_examples:,}); {remedy}"
            )
        if stored_name != name:
            raise UserError(
                f"{workdir} began with data.name={stored_name}, and its checkpoints, of version 0.1, have no checksums "
                "of the images; name the same folder, or another --workdir"
            )
        return
    for (kind, images), data in zip(_IMAGES.items(), splits, strict=False):
        if data is not None and kind in stored and (text := differences(stored[kind], data)):
            raise UserError(f"{workdir} began with other {images} images: now {text}; {remedy}")
