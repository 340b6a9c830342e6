"""Reads the images and labels of a table that has one row per image."""

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxft.data.dataset import DataOptions, Dataset
from jaxft.data.fields import Field
from jaxft.data.folder_scan import exists
from jaxft.data.image_folder import load_files
from jaxft.data.labelled_files import LabelledFiles
from jaxft.data.split_off import choose_held_out
from jaxft.data.table_file import Table, as_text, parse_cells, read_table
from jaxft.data.table_labels import encode_labels, fit_field, has_label, parse_labels
from jaxft.errors import UserError, counted, raise_problems, shortened

SPLIT = "split"  # the column that names each row's split
NO_LABEL = "no_label"  # a remark: rows that are left out
ROWS_OF = "rows_of:"  # begins remarks with the number of rows of each split in the table
_SHOWN = 3  # rows or files in a message


class _Rows(NamedTuple):
    """Rows of a table: of one split, or all of them."""

    names: np.ndarray  # str objects (N,), paths of the images as in the table, normalised
    labels: dict[str, np.ndarray]  # parsed cells (N, ...) of each field
    group: np.ndarray | None  # int32 (N,)

    def take(self, index: np.ndarray) -> "_Rows":
        labels = {name: array[index] for name, array in self.labels.items()}
        return _Rows(self.names[index], labels, None if self.group is None else self.group[index])


def load_table(
    path: Path,
    split: str,
    options: DataOptions,
    fields: Sequence[Field],
    train_fields: Sequence[Field] | None = None,
) -> Dataset:
    """Returns a split of the images that a .csv, .tsv, .jsonl or .parquet file lists with their labels.

    Paths are relative to the table's folder. The column `split` names the splits; without it, the training split and
    the test split are parts of all rows, divided by options.holdout. train_fields: those of the training split, if
    this is another. If the only field is one of classes, the dataset is like a folder's: rows without a label are left
    out, and it has no fields. Raises UserError, which names everything that is wrong.
    """
    table = _read(path, options, fields)
    problems = _missing_columns(table, options, fields)
    raise_problems(problems, f"the table {path}")
    is_folder_like = [field.kind for field in fields] == ["class"]
    rows, num_unlabelled, fitted = _check_split(path, table, split, options, fields, train_fields, problems)
    raise_problems(problems, f"the table {path}")

    root = path.parent
    paths = [Path(os.path.normpath(root / name)) for name in rows.names]
    files = LabelledFiles(paths, [0] * len(paths), ("",), "table", {})
    data, unusable = load_files(files, root, f"table:{path}", split, options)
    if unusable:
        rows = rows.take(np.setdiff1d(np.arange(len(paths)), unusable))
        fitted = train_fields or _fit_again(path, fitted, rows)
    label = {field.name: encode_labels(field, rows.labels[field.name], problems) for field in fitted}
    remarks = {**data.origin.remarks, **({NO_LABEL: num_unlabelled} if num_unlabelled else {})}
    if SPLIT in table.names:
        remarks |= {f"{ROWS_OF}{name}": count for name, count in Counter(map(as_text, table.columns[SPLIT])).items()}
    data = data._replace(origin=replace(data.origin, remarks=remarks), group=rows.group)
    if is_folder_like:
        return data._replace(label=label[fitted[0].name], class_names=fitted[0].names)
    return data._replace(label=label, class_names=(), fields=tuple(fitted))


def table_problems(path: Path, splits: Sequence[str], options: DataOptions, fields: Sequence[Field]) -> list[str]:
    """Returns everything that is wrong with some splits of a table, the training split first, without its images.

    Raises UserError if the file cannot be read as a table.
    """
    table = _read(path, options, fields)
    problems = _missing_columns(table, options, fields)
    if options.path_column not in table.names:
        return problems
    if options.group not in table.names:
        options = options._replace(group="")
    fields = [field for field in fields if all(column in table.names for column in field.columns)]
    train_fields: Sequence[Field] | None = None
    for split in splits:
        found: list[str] = []
        _, _, fitted = _check_split(path, table, split, options, fields, train_fields, found)
        train_fields = train_fields or (None if found else fitted)
        problems += found
    return list(dict.fromkeys(problems))


def _read(path: Path, options: DataOptions, fields: Sequence[Field]) -> Table:
    """Reads the needed columns of a table."""
    columns = [column for field in fields for column in field.columns]
    return read_table(path, dict.fromkeys([options.path_column, SPLIT, options.group, *columns]))


# More than six parameters: those of load_table, and the list of problems.
def _check_split(
    path: Path,
    table: Table,
    split: str,
    options: DataOptions,
    fields: Sequence[Field],
    train_fields: Sequence[Field] | None,
    problems: list[str],
) -> tuple[_Rows, int, Sequence[Field]]:
    """Returns the rows of a split, the number of rows without a label that it leaves out, and the split's fields.

    What is wrong is added to `problems`: it is found before any image is read.
    """
    fitted, is_folder_like = train_fields or fields, [field.kind for field in fields] == ["class"]
    rows, num_unlabelled = _rows_of_split(path, table, split, options, fitted, is_folder_like, problems)
    if len(rows.names):
        fitted = train_fields or [fit_field(field, rows.labels[field.name], problems) for field in fields]
    if train_fields:
        for field in fitted:
            encode_labels(field, rows.labels[field.name], problems)
    return rows, num_unlabelled, fitted


def _missing_columns(table: Table, options: DataOptions, fields: Sequence[Field]) -> list[str]:
    settings = {options.path_column: "data.path_column"}
    for field in fields:
        settings |= dict.fromkeys(field.columns, "targets")
    if options.group:
        settings[options.group] = "data.group"
    return [text for name, setting in settings.items() if (text := table.missing(name, f"--config.{setting}"))]


# More than six parameters: a row is chosen by everything that describes it.
def _rows_of_split(
    path: Path,
    table: Table,
    split: str,
    options: DataOptions,
    fields: Sequence[Field],
    is_folder_like: bool,
    problems: list[str],
) -> tuple[_Rows, int]:
    """Returns the rows of a split, and the number of rows that were left out because they have no label.

    What is wrong with them is added to `problems`; then the rows may be those of all splits.
    """
    numbers, is_divided = _row_numbers(table, split, options, problems)
    every = list(range(len(table.numbers)))
    texts = parse_cells(table, options.path_column, every, _parse_path, problems)
    names = np.array([text or "" for text in texts], object)
    labels = {field.name: parse_labels(field, table, numbers, problems) for field in fields}
    group = _number_groups(table, every, names, options.group, problems)
    rows = _Rows(names[numbers], labels, None if group is None else group[numbers])
    num_unlabelled = 0
    if is_folder_like:
        labelled = has_label(fields[0], labels[fields[0].name])
        num_unlabelled = int((~labelled).sum()) if is_divided or split == options.train_split else 0
        rows = rows.take(np.flatnonzero(labelled))
        if not len(rows.names) and len(numbers):
            problems.append(f"column '{fields[0].column}': no row of the split '{split}' has a label")
    if options.unreadable == "refuse":
        problems += _missing_files(path.parent, rows.names)
    if not is_divided and not problems:
        try:
            rows = rows.take(_part(rows, fields, split, options))
        except UserError as error:
            problems.append(str(error))
    return rows, num_unlabelled


def _row_numbers(table: Table, split: str, options: DataOptions, problems: list[str]) -> tuple[list[int], bool]:
    """Returns the indices of a split's rows, or of all rows if the table has no column of splits, and whether it has.

    What is wrong is added to `problems`.
    """
    every = list(range(len(table.numbers)))
    if SPLIT not in table.names:
        known = (options.train_split, options.eval_split)
        if split not in known:
            problems.append(
                f"there is no column '{SPLIT}' to name the split '{split}'; add it, or set --config.data.val_split=0.1"
            )
        return every, False
    splits = parse_cells(table, SPLIT, every, as_text, problems)
    rows = [row for row, name in enumerate(splits) if name == split]
    if not rows:
        existing = sorted({name for name in splits if name})
        there_are = f"there are {shortened(existing, 10)}" if existing else "its cells are empty"
        problems.append(f"no row has the split '{split}' in the column '{SPLIT}', {there_are}")
    return rows, True


def _parse_path(cell: Any) -> str:
    name = cell if isinstance(cell, str) else as_text(cell)  # spaces may belong to a file's name
    if not name.strip():
        raise ValueError("has no path of an image")
    try:
        os.fsencode(name)
    except ValueError:
        raise ValueError("has a path that no file can have") from None
    if "\0" in name:
        raise ValueError("has a path with a NUL")
    return os.path.normpath(name)


def _missing_files(root: Path, names: np.ndarray) -> list[str]:
    missing = [name for name in dict.fromkeys(names) if name and not exists(root / name)]
    if not missing:
        return []
    return [f"{counted(len(missing), 'file')} not found in {root}: {shortened(missing, _SHOWN)}"]


def _number_groups(
    table: Table, every: Sequence[int], names: np.ndarray, column: str, problems: list[str]
) -> np.ndarray | None:
    """Returns the number of each row's group, int32 (N,); None without a column of groups if all files differ.

    Rows of one group have the same value in the column, the same file, or are connected by other rows that do. A row
    without a value is a group of its own. The numbers are the same for all splits.
    """
    if not column and len(set(names)) == len(names):
        return None
    values = parse_cells(table, column, every, as_text, problems) if column else [""] * len(names)
    parents: dict[tuple[str, str], tuple[str, str]] = {}

    def find(key: tuple[str, str]) -> tuple[str, str]:
        while (parent := parents.setdefault(key, key)) != key:
            parents[key] = parents[parent]
            key = parents[key]
        return key

    for name, value in zip(names, values, strict=True):
        if value:
            parents[find(("path", name))] = find(("value", value))
    numbers: dict[tuple[str, str], int] = {}
    return np.array([numbers.setdefault(find(("path", name)), len(numbers)) for name in names], np.int32)


def _part(rows: _Rows, fields: Sequence[Field], split: str, options: DataOptions) -> np.ndarray:
    """Returns the indices of the training or the test part of a table without a column of splits.

    As in a folder, it is chosen by hashes of the paths, so that most images stay in their part when others are added or
    removed. Raises UserError if a part would be empty or a class has only one image.
    """
    classes = next((rows.labels[field.name] for field in fields if field.kind == "class"), None)
    names: list[str] = []
    strata = np.zeros(len(rows.names), np.int64)
    if classes is not None:
        names = sorted(set(classes) - {""})
        index = {name: i for i, name in enumerate(names)}
        strata = np.array([index.get(name, -1) for name in classes])
    hashes = [hashlib.sha256(os.fsencode(name)).digest() for name in rows.names]
    order = np.array(sorted(range(len(hashes)), key=hashes.__getitem__), np.int64)
    held_out = choose_held_out(strata, names, order, options.holdout, rows.group, "data.holdout")
    return np.flatnonzero(held_out != (split == options.train_split))


def _fit_again(path: Path, fields: Sequence[Field], rows: _Rows) -> Sequence[Field]:
    """Returns the fields of the training rows whose files are images. Raises UserError if a class or tag is lost."""
    problems: list[str] = []
    fitted = [fit_field(field._replace(names=()), rows.labels[field.name], problems) for field in fields]
    for before, field in zip(fields, fitted, strict=True):
        if lost := sorted(set(before.names) - set(field.names)):
            problems.append(f"no file of {shortened(lost)} in column '{field.column}' can be read as an image")
    raise_problems(problems, f"the table {path}")
    return fitted
