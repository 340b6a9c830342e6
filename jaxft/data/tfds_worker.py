"""Prepares a TFDS dataset if necessary and caches one split: its images as arrays, or their location.

    python -m jaxft.data.tfds_worker JSON       the fields of a TfdsSplit

It runs as a child process, because preparing needs TensorFlow. A problem that the user can fix is printed to stdout in
one line, with exit code 2; progress goes to stderr.
"""

import contextlib
import hashlib
import importlib.util
import json
import logging
import math
import sys
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tqdm import tqdm

from jaxft.data.array_cache import write_arrays
from jaxft.data.image_file import is_thin
from jaxft.data.tfds_split import TfdsSplit
from jaxft.errors import UserError, on_terminal
from jaxft.files import atomic_write, with_checksum
from jaxft.process import allow_large_images, end_with_parent

CONNECT_SECONDS = 5
EXAMPLES_PER_READ = 1000


def prepared_builder(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    """Returns the builder of a dataset in `data_dir`, which is prepared first if necessary. Raises UserError."""
    try:
        builder = tfds.builder(name, data_dir=data_dir)
        if not builder.is_prepared():
            builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except (tfds.core.DatasetNotFoundError, ValueError):
        raise UserError(f"neither TFDS nor {data_dir} has a dataset '{name}'; is data.name spelt right?") from None
    if builder.is_prepared():
        return builder
    _check_reachable(builder, data_dir)
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError(
            f"'{name}' is not prepared in {data_dir}, and preparing it needs TensorFlow: pip install 'jaxft[tfds]', or "
            "prepare it elsewhere, copy it and name its folder with --config.data.dir=DIR"
        )
    try:
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    except Exception as error:  # a broken download, a wrong checksum, a full disk
        raise UserError(f"TFDS cannot prepare '{name}' in {data_dir}: {type(error).__name__}: {error}") from error
    return builder


def _check_reachable(builder: tfds.core.DatasetBuilder, data_dir: str) -> None:
    """Raises UserError if there is no network, which TFDS would report only after minutes."""
    for url in list(builder.url_infos)[:1]:
        request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "jaxft"})
        try:
            urllib.request.urlopen(request, timeout=CONNECT_SECONDS).close()
        except urllib.error.HTTPError:
            pass  # the host answers; TFDS reports a problem with the file itself
        except (OSError, ValueError) as error:
            raise UserError(
                f"'{builder.name}' is not prepared in {data_dir} and {url} cannot be reached ({error}): connect to the "
                "network, or prepare it elsewhere, copy it and name its folder with --config.data.dir=DIR"
            ) from None


def _feature_of_type(builder: tfds.core.DatasetBuilder, kind: type) -> str:
    """Returns the name of the only feature of this type, or "label" if several have it (CIFAR-100 has coarse labels).

    Raises UserError if there are none, or several with other names.
    """
    names = [name for name, feature in builder.info.features.items() if isinstance(feature, kind)]
    if len(names) != 1 and "label" not in names:
        raise UserError(
            f"'{builder.name}' has {len(names)} features of type {kind.__name__}; "
            "a dataset for classification has exactly one, or one that is named label"
        )
    return "label" if "label" in names else names[0]


def _examples(builder: tfds.core.DatasetBuilder, split: str) -> Iterable[Any]:
    """Yields the examples in the order of the files. Raises UserError if only TensorFlow can read them."""
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
    """Returns all labels, without decoding the images."""
    source = builder.as_data_source(split, decoders={image_name: tfds.decode.SkipDecoding()})
    progress = tqdm(total=len(source), desc=f"reading {builder.name} {split}", disable=not on_terminal())
    labels = []
    for start in range(0, len(source), EXAMPLES_PER_READ):
        examples = source.__getitems__(range(start, min(start + EXAMPLES_PER_READ, len(source))))
        labels += [int(example[label_name]) for example in examples]
        progress.update(len(examples))
    return labels


def read_split(builder: tfds.core.DatasetBuilder, wanted: TfdsSplit) -> None:
    """Caches a split as arrays, or as the location of its images if the arrays would be too large for the disk.

    Images keep their size if all have the same and its shorter side is at most `wanted.side`; otherwise they are
    shrunk. Raises UserError.
    """
    image_name = _feature_of_type(builder, tfds.features.Image)
    size = _num_examples(builder, wanted.split)
    height, width, _ = builder.info.features[image_name].shape
    unchanged = bool(height and width and min(height, width) <= wanted.side and not is_thin(width, height))
    stored_size = (height, width) if unchanged else (wanted.side, wanted.side)
    too_large = size * math.prod(stored_size) * 3 > wanted.room
    if too_large and builder.info.file_format == tfds.core.FileFormat.ARRAY_RECORD:
        _write_records(builder, wanted, image_name, stored_size, None if unchanged else wanted.side)
    elif unchanged:
        _write_arrays(builder, wanted, image_name, wanted.unchanged_dir, None)
    else:
        _write_arrays(builder, wanted, image_name, wanted.shrunk_dir, wanted.side)


def _num_examples(builder: tfds.core.DatasetBuilder, split: str) -> int:
    try:
        size = builder.info.splits[split].num_examples
    except (KeyError, ValueError) as error:
        raise UserError(str(error).split(". See format")[0]) from None
    if not size:
        raise UserError(f"the split '{split}' of '{builder.name}' has no images")
    return size


def _write_records(
    builder: tfds.core.DatasetBuilder,
    wanted: TfdsSplit,
    image_name: str,
    stored_size: tuple[int, int],
    side: int | None,
) -> None:
    """Writes the labels and the arguments of jaxft.data.tfds.TfdsRecords, which reads the images."""
    label_name = _feature_of_type(builder, tfds.features.ClassLabel)
    found = {
        "reader": {
            "directory": str(builder.data_path),
            "split": wanted.split,
            "feature": image_name,
            "side": side,
            "interpolation": wanted.interpolation,
        },
        "size": stored_size,
        "class_names": builder.info.features[label_name].names,
        "label": _labels(builder, wanted.split, image_name, label_name),
    }
    wanted.records_file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(wanted.records_file, "w") as file:
        json.dump(with_checksum(_fingerprint(builder) | found), file)


def _write_arrays(
    builder: tfds.core.DatasetBuilder, wanted: TfdsSplit, image_name: str, arrays_dir: Path, side: int | None
) -> None:
    """Writes the decoded images, shrunk to squares of `side` pixels unless that is None, and the labels."""
    label_name = _feature_of_type(builder, tfds.features.ClassLabel)
    progress = tqdm(
        _examples(builder, wanted.split),
        desc=f"reading {builder.name} {wanted.split}",
        total=builder.info.splits[wanted.split].num_examples,
        disable=not on_terminal(),
    )
    examples = ((example[image_name], int(example[label_name])) for example in progress)
    try:
        names = builder.info.features[label_name].names
        write_arrays(arrays_dir, examples, names, side, _fingerprint(builder), wanted.interpolation)
    except ValueError as error:
        raise UserError(f"the split '{wanted.split}' of '{builder.name}' {error}") from None


def _fingerprint(builder: tfds.core.DatasetBuilder) -> dict[str, str]:
    """Returns the path and the SHA-256 of a file that changes with the prepared dataset."""
    source = Path(builder.data_path) / "dataset_info.json"
    return {"source": str(source), "source_sha256": hashlib.sha256(source.read_bytes()).hexdigest()}


def main(argument: str) -> None:
    wanted = TfdsSplit(*json.loads(argument))
    read_split(prepared_builder(wanted.name, wanted.data_dir), wanted)


if __name__ == "__main__":
    end_with_parent()
    logging.getLogger("absl").setLevel(logging.ERROR)
    allow_large_images()
    try:
        with contextlib.redirect_stdout(sys.stderr):  # TFDS prints to stdout
            main(sys.argv[1])
    except (UserError, OSError) as error:
        print(" ".join(str(error).split()))
        sys.exit(2)
