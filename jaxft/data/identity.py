"""Compares the images of a run with those that it began with, wherever their folder is now."""

from pathlib import Path
from typing import Any

from jaxft.data.dataset import Dataset
from jaxft.errors import UserError, counted, shortened


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


def check_data(name: str, info: dict[str, Any], splits: tuple[Dataset, Dataset], workdir: Path) -> None:
    """Raises UserError if the images differ from those that the run began with, wherever their folder is now.

    Checkpoints of version 0.1 have only the number of training images and the classes.
    """
    train_data, eval_data = splits
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
        if info["train_size"] != len(train_data.label):
            raise UserError(
                f"{workdir} began with other training data ({info['train_size']:,} images instead of "
                f"{len(train_data.label):,}); {remedy}"
            )
        if stored_name != name:
            raise UserError(
                f"{workdir} began with data.name={stored_name}, and its checkpoints, of version 0.1, have no checksums "
                "of the images; name the same folder, or another --workdir"
            )
        return
    for kind, data in (("train", train_data), ("eval", eval_data)):
        if text := differences(stored[kind], data):
            images = {"train": "training", "eval": "test"}[kind]
            raise UserError(f"{workdir} began with other {images} images: now {text}; {remedy}")
