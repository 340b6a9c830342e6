"""The config key `targets`."""

import re

import numpy as np
import pytest

from jaxft.data.fields import Field, describe_field, parse_targets
from jaxft.errors import UserError


def test_targets_name_columns_with_their_kinds_and_weights() -> None:
    assert parse_targets(" class:species ,tags:wet | dark, age = number:age_years*0.1") == (
        Field("class", "species", "species"),
        Field("tags", "wet|dark", "wet|dark"),
        Field("number", "age_years", "age", 0.1),
    )


def test_the_default_is_a_class_in_the_column_label() -> None:
    assert parse_targets("") == parse_targets(" ") == (Field("class", "label", "label"),)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("clas:x", "there is no kind 'clas', did you mean 'class'?"),
        ("colour:x", "there is no kind 'colour', it is class, tags or number"),
        ("species", "'species' is not KIND:COLUMN"),
        ("class:", "'class:' has an empty column"),
        ("tags:a|", "'tags:a|' has an empty column"),
        ("tags:a|b|a", "'tags:a|b|a' names a column twice"),
        ("a=class:x, a=tags:y", "2 targets have the name 'a'"),
        ("=class:x", "'=class:x' has an empty name"),
        ("class:a.b", "the name 'a.b' has a dot, so give it another: NAME=class:a.b"),
        ("number:x*-1", "the weight '-1' of 'number:x*-1' is not a positive number"),
        ("number:x*inf", "the weight 'inf'"),
        ("number:x*1e7", "the weight '1e7' of 'number:x*1e7' is not between 1e-6 and 1e6"),
        ("number:x*1e-300", "the weight '1e-300'"),
        ("number:x*heavy", "the weight 'heavy'"),
        ("class:a,,class:b", "an entry is empty"),
    ],
)
def test_wrong_targets_are_reported(text: str, expected: str) -> None:
    with pytest.raises(UserError, match=re.escape(expected)) as error:
        parse_targets(text)
    assert len(f"error: {error.value}") <= 240


def test_all_that_is_wrong_is_reported_at_once() -> None:
    with pytest.raises(
        UserError, match=r"no kind 'tag', did you mean 'tags'\?; the weight '0' of 'number:x\*0' is not"
    ):
        parse_targets("tag:a, number:x*0")


def test_fields_are_described_by_their_range_and_their_missing_labels() -> None:
    tags = Field("tags", "t", "t", names=("a", "b"))
    assert describe_field(tags, np.array([[0, 1], [-1, -1]], np.int8)) == "t: 2 tags (50 % missing)"
    number = Field("number", "n", "age", mean=10.0, std=2.0)
    assert describe_field(number, np.array([-1, np.nan, 1, 3], np.float32)) == "age: 8 to 16 (25 % missing)"
    assert describe_field(number, np.zeros(2, np.float32)) == "age: always 10, from which nothing can be learned"
    assert (tags.num_outputs, number.num_outputs) == (2, 1)
