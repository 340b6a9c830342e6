"""A child process that prepares a TFDS set if need be and writes one split of it as arrays, or where its pictures are.

    python -m jaxft.data.tfds_worker NAME SPLIT DATA_DIR SIDE AS_THEY_ARE_DIR SHRUNK_DIR RECORDS ROOM

What the user can mend goes to stdout in one line, with exit code 2; progress goes to stderr.
"""

import contextlib
import hashlib
import importlib.util
import json
import logging
import math
import os
import sys
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tqdm import tqdm

from jaxft.data.array_cache import write_arrays
from jaxft.errors import UserError

CONNECT_SECONDS = 5


EXAMPLES_PER_READ = 1000


def prepared_builder(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    """The builder of a set that is prepared in `data_dir`, by now if it was not before."""
    try:
        builder = tfds.builder(name, data_dir=data_dir)
        if not builder.is_prepared():
            builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except (tfds.core.DatasetNotFoundError, ValueError):
        raise UserError(f"neither TFDS nor {data_dir} has a data set '{name}'; is data.name spelt right?") from None
    if builder.is_prepared():
        return builder
    _check_reachable(builder, data_dir)
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError(
            f"'{name}' is not prepared in {data_dir}, and preparing it needs TensorFlow: pip install 'jaxft[tfds]', or "
            "prepare it elsewhere, copy it and name its folder by --config.data.dir=DIR"
        )
    try:
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    except Exception as error:  # a download that breaks off, a wrong checksum, a full disk
        raise UserError(f"TFDS cannot prepare '{name}' in {data_dir}: {type(error).__name__}: {error}") from error
    return builder


def _check_reachable(builder: tfds.core.DatasetBuilder, data_dir: str) -> None:
    """TFDS alone would try for minutes before it says that there is no network."""
    for url in list(builder.url_infos)[:1]:
        request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "jaxft"})
        try:
            urllib.request.urlopen(request, timeout=CONNECT_SECONDS).close()
        except urllib.error.HTTPError:
            pass  # the host answers; what it thinks of the file is told by TFDS
        except (OSError, ValueError) as error:
            raise UserError(
                f"'{builder.name}' is not prepared in {data_dir} and {url} cannot be reached ({error}): connect to the "
                "network, or prepare it elsewhere, copy it and name its folder by --config.data.dir=DIR"
            ) from None


def _feature_of_type(builder: tfds.core.DatasetBuilder, kind: type) -> str:
    names = [name for name, feature in builder.info.features.items() if isinstance(feature, kind)]
    if len(names) != 1:
        raise UserError(
            f"'{builder.name}' has {len(names)} features of type {kind.__name__}; a classification set has one"
        )
    return names[0]


def _examples(builder: tfds.core.DatasetBuilder, split: str) -> Iterable[Any]:
    """In the order of the files."""
    if builder.info.file_format == tfds.core.FileFormat.ARRAY_RECORD:
        source = builder.as_data_source(split)
        for start in range(0, len(source), EXAMPLES_PER_READ):
            yield from source.__getitems__(range(start, min(start + EXAMPLES_PER_READ, len(source))))
    elif importlib.util.find_spec("tensorflow") is None:
        raise UserError(
            f"'{builder.name}' is prepared as {builder.info.file_format.value}, which only TensorFlow reads: "
            "pip install 'jaxft[tfds]', or prepare it again as array_record"
        )
    else:
        yield from tfds.as_numpy(builder.as_dataset(split=split, shuffle_files=False))


def _labels(builder: tfds.core.DatasetBuilder, split: str, image_name: str, label_name: str) -> list[int]:
    """Without decoding the pictures."""
    source = builder.as_data_source(split, decoders={image_name: tfds.decode.SkipDecoding()})
    starts = range(0, len(source), EXAMPLES_PER_READ)
    parts = (range(start, min(start + EXAMPLES_PER_READ, len(source))) for start in starts)
    progress = tqdm(total=len(source), desc=f"reading {builder.name} {split}", disable=not sys.stderr.isatty())
    labels = []
    for part in parts:
        labels += [int(example[label_name]) for example in source.__getitems__(part)]
        progress.update(len(part))
    return labels


def read_split(
    builder: tfds.core.DatasetBuilder,
    split: str,
    side: int,
    as_they_are: Path,
    shrunk: Path,
    records: Path,
    room: float,
) -> None:
    """Writes the split's arrays: into `as_they_are`, or into `shrunk` where pictures differ in size or are larger.

    Where they would have more than `room` bytes and array_record files hold them: the file `records` instead.
    """
    image_name, label_name = (
        _feature_of_type(builder, kind) for kind in (tfds.features.Image, tfds.features.ClassLabel)
    )
    try:
        size = builder.info.splits[split].num_examples
    except (KeyError, ValueError) as error:
        raise UserError(str(error).split(". See format")[0]) from None
    if not size:
        raise UserError(f"the split '{split}' of '{builder.name}' has no pictures")
    features = builder.info.features
    height, width, _ = features[image_name].shape
    keep = bool(height and width and min(height, width) <= side)
    source = Path(builder.data_path) / "dataset_info.json"
    info = {"source": str(source), "source_sha256": hashlib.sha256(source.read_bytes()).hexdigest()}
    stored_size = (height, width) if keep else (side, side)
    if size * math.prod(stored_size) * 3 > room and builder.info.file_format == tfds.core.FileFormat.ARRAY_RECORD:
        found = {
            "reader": {
                "directory": str(builder.data_path),
                "split": split,
                "feature": image_name,
                "side": None if keep else side,
            },
            "size": stored_size,
            "class_names": features[label_name].names,
            "label": _labels(builder, split, image_name, label_name),
        }
        partial = records.with_name(f"{records.name}.partial-{os.getpid()}")
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(info | found))
        partial.replace(records)
        return
    progress = tqdm(_examples(builder, split), f"reading {builder.name} {split}", size, disable=not sys.stderr.isatty())
    examples = ((example[image_name], int(example[label_name])) for example in progress)
    arrays_dir, side_or_none = (as_they_are, None) if keep else (shrunk, side)
    try:
        write_arrays(arrays_dir, examples, features[label_name].names, side_or_none, info)
    except ValueError as error:
        raise UserError(f"the split '{split}' of '{builder.name}' {error}") from None


def main(
    name: str, split: str, data_dir: str, side: str, as_they_are: str, shrunk: str, records: str, room: str
) -> None:
    builder = prepared_builder(name, data_dir)
    read_split(builder, split, int(side), Path(as_they_are), Path(shrunk), Path(records), float(room))


if __name__ == "__main__":
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # TFDS prints there
            main(*sys.argv[1:])
    except (UserError, OSError) as error:
        print(" ".join(str(error).split()))
        sys.exit(2)
