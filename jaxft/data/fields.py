"""The labelled columns of a table that the config's `targets` names: classes, tags and numbers."""

import difflib
import math
from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from jaxft.errors import UserError

KINDS = ("class", "tags", "number")
DEFAULT_TARGETS = "class:label"
_HEAVIEST = 1e6  # weight; its inverse is the lightest, so that products with losses stay in float32


class Field(NamedTuple):
    """A labelled column. Names, mean and deviation are those of the training split."""

    kind: str  # "class", "tags" or "number"
    column: str  # of the table; tags in several 0/1 columns: the columns joined by |
    name: str  # of the target
    weight: float = 1.0  # in the loss
    names: tuple[str, ...] = ()  # classes or tags, sorted; () for a number
    mean: float = 0.0  # of a number's labels in the training split
    std: float = 1.0  # their population standard deviation, or 1 if it is 0

    @property
    def num_outputs(self) -> int:
        """The number of logits."""
        return 1 if self.kind == "number" else len(self.names)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the table: one, or several of tags."""
        return tuple(self.column.split("|")) if self.kind == "tags" else (self.column,)


def parse_targets(text: str) -> tuple[Field, ...]:
    """Parses the config key `targets`: comma-separated [NAME=]KIND:COLUMN[*WEIGHT]; '' stands for class:label.

    The fields have no names, mean or deviation yet. Raises UserError, which names everything that is wrong.
    """
    problems: list[str] = []
    fields = [_parse_target(part.strip(), problems) for part in (text.strip() or DEFAULT_TARGETS).split(",")]
    counts = Counter(field.name for field in fields if field.name)
    problems += [f"{n} targets have the name '{name}', so set NAME=KIND:COLUMN" for name, n in counts.items() if n > 1]
    if problems:
        raise UserError(f"targets='{text}': {'; '.join(problems)}; it is a list such as {_EXAMPLE}")
    return tuple(fields)


_EXAMPLE = "'class:species, tags:tags, age=number:age_years*0.1'"


def _parse_target(part: str, problems: list[str]) -> Field:
    """Parses one entry of `targets` and adds what is wrong with it to `problems`."""
    head, colon, column = part.partition(":")
    name, equals, kind = (piece.strip() for piece in head.rpartition("="))
    if not colon:
        problems.append(f"'{part}' is not KIND:COLUMN" if part else "an entry is empty")
        return Field("class", "", "")
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, 1)
        hint = f"did you mean '{near[0]}'?" if near else f"it is {', '.join(KINDS[:-1])} or {KINDS[-1]}"
        problems.append(f"there is no kind '{kind}', {hint}")
    column, star, weight_text = (piece.strip() for piece in column.partition("*"))
    columns = [piece.strip() for piece in column.split("|")] if kind == "tags" else [column]
    weight = 1.0
    if star:
        try:
            weight = float(weight_text)
        except ValueError:
            weight = math.nan
        if not 1 / _HEAVIEST <= weight <= _HEAVIEST:
            what = "between 1e-6 and 1e6" if 0 < weight < math.inf else "a positive number"
            problems.append(f"the weight '{weight_text}' of '{part}' is not {what}")
    if not all(columns):
        problems.append(f"'{part}' has an empty column")
    if len(set(columns)) < len(columns):
        problems.append(f"'{part}' names a column twice")
    if equals and not name:
        problems.append(f"'{part}' has an empty name")
    column = "|".join(columns)
    name = name or column
    if "." in name:
        problems.append(f"the name '{name}' has a dot, so give it another: NAME={kind}:{column}")
    return Field(kind, column, name, weight)


def parse_fields(values: Any) -> tuple[Field, ...]:
    """Parses the fields of a file's JSON, as `Field._asdict` wrote them. Raises ValueError if they are not fields."""
    if not isinstance(values, list) or not values or not all(map(_is_field, values)):
        raise ValueError("targets are not a list of fields")
    fields = tuple(Field(**value)._replace(names=tuple(value["names"])) for value in values)
    if len({field.name for field in fields}) < len(fields):
        raise ValueError("two targets have the same name")
    return fields


def _is_field(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {*Field._fields}
        and value["kind"] in KINDS
        and all(isinstance(text, str) for text in (value["column"], value["name"]))
        and isinstance(value["names"], list | tuple)  # a tuple before it is written
        and all(isinstance(name, str) for name in value["names"])
        and (bool(value["names"]) or value["kind"] == "number")
        and all(type(value[key]) in (int, float) and math.isfinite(value[key]) for key in ("weight", "mean", "std"))
        and value["std"] > 0
    )


def describe_field(field: Field, label: np.ndarray) -> str:
    """Returns a target's number of classes or tags, or the range of its numbers, and the share of missing labels.

    label: as `Dataset.label` has it.
    """
    if field.kind == "number":
        low, high = (float(extreme(label)) for extreme in (np.nanmin, np.nanmax))
        values = (field.mean + field.std * bound for bound in (low, high))
        texts = [f"{0 if abs(value) < 1e-6 * field.std else value:.4g}" for value in values]  # 0 rounded to float32
        text = " to ".join(texts) if low < high else f"always {texts[0]}, from which nothing can be learned"
        missing = np.isnan(label)
    else:
        nouns = ("class", "classes") if field.kind == "class" else ("tag", "tags")
        text = f"{len(field.names):,} {nouns[len(field.names) != 1]}"
        missing = label < 0
    share = f" ({100 * float(missing.mean()):.2g} % missing)" if missing.any() else ""
    return f"{field.name}: {text}{share}"
