"""Parses, fits and encodes the labels of a table: classes, tags and numbers."""

import math
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jaxft.data.fields import Field
from jaxft.data.table_file import Table, as_text, parse_cells
from jaxft.errors import shortened

_NAMES_SHOWN = 5
_TRUTHS = {"": -1, "0": 0, "1": 1, "false": 0, "true": 1, "no": 0, "yes": 1}
_DIGITS = set("0123456789+-.eE")
_LARGEST = 1e30  # mean or deviation, so that predictions in float32 stay finite
_FARTHEST = 1e12  # standard deviations from the mean, so that sums of squares stay finite in float32


def parse_labels(field: Field, table: Table, rows: Sequence[int], problems: list[str]) -> np.ndarray:
    """Parses a field's cells of some rows; what is wrong with them is added to `problems`.

    Returns, by the field's kind: class, text (N,), '' if it is missing; tags of one column, tuples of names (N,), None
    if they are missing; tags of 0/1 columns, int8 (N, columns), -1 if missing; number, float64 (N,), NaN if missing.
    """
    if field.kind == "class":
        return _objects(name or "" for name in parse_cells(table, field.column, rows, _parse_class, problems))
    if field.kind == "number":
        values = parse_cells(table, field.column, rows, _parse_number, problems)
        return np.array([math.nan if value is None else value for value in values], np.float64)
    (first, *others) = field.columns
    if not others and not _is_truth_column(field, (table.columns[first][row] for row in rows)):
        return _objects(parse_cells(table, first, rows, _parse_tags, problems))
    columns = [parse_cells(table, column, rows, _parse_truth, problems) for column in field.columns]
    return np.array([[-1 if value is None else value for value in column] for column in columns], np.int8).T


def _objects(values: Iterable[Any]) -> np.ndarray:
    values = list(values)
    array = np.empty(len(values), object)
    array[:] = values
    return array


def _is_truth_column(field: Field, cells: Iterable[Any]) -> bool:
    """Returns whether a single column of tags holds 0 or 1 for one tag, which is then named like the column."""
    if field.names:  # as in the training split
        return field.names == field.columns
    try:
        texts = {"" if isinstance(cell, list) else as_text(cell).lower() for cell in cells}
    except ValueError:  # which parsing the cells reports with its row
        return False
    return bool(texts - {""}) and texts <= _TRUTHS.keys()


def _parse_class(cell: Any) -> str:
    return unicodedata.normalize("NFC", as_text(cell))


def _parse_number(cell: Any) -> float:
    text = as_text(cell)
    try:
        value = float(text) if text else math.nan
    except ValueError:
        value = math.inf
    if math.isinf(value) or not (math.isnan(value) or set(text) <= _DIGITS):  # float() accepts 1_000 and other digits
        raise ValueError(f"holds '{text}', which is not a number such as 1234.5")
    return value


def _parse_truth(cell: Any) -> int:
    text = as_text(cell).lower()
    if text not in _TRUTHS:
        raise ValueError(f"holds '{text}', which is not 0, 1, true, false, yes, no or empty")
    return _TRUTHS[text]


def _parse_tags(cell: Any) -> tuple[str, ...] | None:
    """Returns the tags of a cell: of a list, or of a text in which | separates them. A | alone means no tags."""
    if isinstance(cell, list):
        names = [_parse_class(name) for name in cell]
    else:
        text = _parse_class(cell)
        if not text:
            return None
        names = [name.strip() for name in text.split("|")]
    return tuple(sorted(set(names) - {""}))


def has_label(field: Field, labels: np.ndarray) -> np.ndarray:
    """Returns which parsed labels are not missing, bool (N,)."""
    if field.kind == "number":
        return ~np.isnan(labels)
    if field.kind == "class":
        return np.array([name != "" for name in labels], bool)
    if labels.dtype == object:
        return np.array([names is not None for names in labels], bool)
    return np.any(labels >= 0, axis=1)


def fit_field(field: Field, labels: np.ndarray, problems: list[str]) -> Field:
    """Returns the field with the names, or the mean and deviation, of the training split's parsed labels."""
    where = f"column '{field.column}'"
    if not has_label(field, labels).any():
        problems.append(f"{where}: no row of the training split has a label")
        return field
    if field.kind == "number":
        values = labels[~np.isnan(labels)]
        mean, std = _mean_and_deviation(values)
        if not (abs(mean) <= _LARGEST and std <= _LARGEST):
            problems.append(f"{where}: its numbers are too large; divide them by a constant")
        elif values.min() < values.max() and std < 1 / _LARGEST:
            problems.append(f"{where}: its numbers differ too little; multiply them by a constant")
        return field._replace(mean=mean, std=std or 1.0)
    if field.kind == "class":
        names = tuple(sorted(set(labels) - {""}))
        if len(names) < 2:
            problems.append(f"{where}: the training split has only one class, '{names[0]}'; two or more are needed")
        return field._replace(names=names)
    if labels.dtype == object:
        names = tuple(sorted({name for tags in labels if tags for name in tags}))
        if not names:
            problems.append(f"{where}: no row of the training split has a tag")
        return field._replace(names=names)
    if empty := [name for name, column in zip(field.columns, labels.T, strict=True) if not (column >= 0).any()]:
        problems.append(f"no row of the training split has a value of {shortened(empty)}")
    return field._replace(names=tuple(sorted(field.columns)))


def _mean_and_deviation(values: np.ndarray) -> tuple[float, float]:
    """Returns the mean and the population standard deviation, with the same bits on every platform."""
    try:
        mean = math.fsum(values) / len(values)
        deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values.tolist()) / len(values))
    except OverflowError:
        return math.inf, math.inf
    return (mean, deviation) if values.min() < values.max() else (float(values[0]), 0.0)


def encode_labels(field: Field, labels: np.ndarray, problems: list[str]) -> np.ndarray:
    """Encodes parsed labels by the training split's names, or mean and deviation; see `Dataset.label`.

    Returns, by kind: class int32 (N,), -1 if it is missing; tags int8 (N, T) of 0, 1 and -1; number float32 (N,),
    standardised, NaN if it is missing. Classes and tags that the training split lacks are added to `problems`.
    """
    if field.kind == "number":
        standardised = (labels - field.mean) / field.std
        if far := np.flatnonzero(np.abs(standardised) > _FARTHEST).tolist():
            texts = [f"{labels[i]:g}" for i in far]
            problems.append(
                f"column '{field.column}' has numbers that are {_FARTHEST:.0e} or more standard deviations from the "
                f"mean of the training split, {field.mean:g}: {shortened(texts)}"
            )
            standardised[far] = math.nan
        return standardised.astype(np.float32)
    if labels.dtype != object:
        return labels[:, [field.columns.index(name) for name in field.names]]
    index = {unicodedata.normalize("NFC", name): i for i, name in enumerate(field.names)}
    unknown: dict[str, None] = {}
    if field.kind == "class":
        found = [index.get(name, -1) for name in labels]
        unknown = dict.fromkeys(sorted(set(labels) - {""} - index.keys()))
        encoded = np.array(found, np.int32)
    else:
        encoded = np.zeros((len(labels), len(index)), np.int8)
        for row, tags in zip(encoded, labels, strict=True):
            if tags is None:
                row[:] = -1
                continue
            unknown.update(dict.fromkeys(name for name in tags if name not in index))
            row[[index[name] for name in tags if name in index]] = 1
    if unknown:
        similar = {name.casefold(): name for name in index}
        texts = [
            f"'{name}' (training has '{similar[name.casefold()]}')" if name.casefold() in similar else f"'{name}'"
            for name in sorted(unknown)
        ]
        kind = "classes" if field.kind == "class" else "tags"
        problems.append(
            f"column '{field.column}' has {kind} that the training split lacks: {shortened(texts, _NAMES_SHOWN)}"
        )
    return encoded
