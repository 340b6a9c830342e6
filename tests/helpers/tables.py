"""A small table of images with a class, tags and a number, some of them missing, and the settings of runs on it."""

import csv
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from jaxft.config import load_config

SIDE = 16  # pixels
BRIGHT = {"green": (False, True, False), "red": (True, False, False), "yellow": (True, True, False)}  # channels
CLASSES = tuple(BRIGHT)
TARGETS = "class:colour, tags:tags, number:brightness*0.5"
SPLITS = {"train": 40, "val": 24, "test": 24}  # images

# Changes of the config "quickstart": only the head trains, on cached features of random weights, which takes seconds.
TINY_TABLE_RUN = {
    "note": "",
    "num_epochs": "2",
    "image_size": str(SIDE),
    "batch_size": "16",
    "model.pretrained": "",
    "model.width": "4",
    "data.cache": "never",
    "data.val_split": "val",
    "optimizer.freeze": "backbone",
    "optimizer.fit_head": "no",
    "augment.flip": "False",
    "augment.shift": "0",
}


def write_table(folder: Path, splits: dict[str, int] = SPLITS) -> Path:
    """Writes images and folder/labels.csv with the columns path, split, colour, tags and brightness; returns its path.

    The tags are 'dark' and 'vivid'. Of the rows of each split, every 5th has no colour, every 4th no tags and every 6th
    no brightness.
    """
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = []
    for split, count in splits.items():
        for i in range(count):
            name, brightness, contrast = CLASSES[i % len(CLASSES)], rng.uniform(40, 200), rng.uniform(0.1, 0.9)
            colour = np.where(BRIGHT[name], 1, 1 - contrast)
            noise = rng.normal(0, 20, (SIDE, SIDE, 3))
            path = folder / "images" / f"{split}{i}.png"
            Image.fromarray(np.clip(brightness * colour + noise, 0, 255).astype(np.uint8)).save(path)
            tags = "|".join(tag for tag, on in (("dark", brightness < 120), ("vivid", contrast > 0.5)) if on) or "|"
            labels = (name, i % 5), (tags, i % 4), (f"{brightness:.2f}", i % 6)
            rows.append([path.relative_to(folder), split, *(text if rest else "" for text, rest in labels)])
    table = folder / "labels.csv"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([["path", "split", "colour", "tags", "brightness"], *rows])
    return table


def table_changes(table: Path, targets: str = TARGETS, **changes: str) -> dict[str, str]:
    """Returns the changes of "quickstart" for a run on the table. A key of `changes` has __ in place of a dot."""
    own = {key.replace("__", "."): value for key, value in changes.items()}
    return TINY_TABLE_RUN | {"data.name": f"table:{table}", "targets": targets} | own


def table_config(table: Path, targets: str = TARGETS, **changes: str) -> ConfigDict:
    """Returns the config of a run on the table; see `table_changes`."""
    return load_config("quickstart", table_changes(table, targets, **changes))
