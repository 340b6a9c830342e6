"""Templates of keys, by which names are translated in both directions.

In a template `{i}` (any letter) stands for a number and `{*}` for the rest of the key, one or more components.
`{i+1}` stands for a number that is larger by one than `{i}` on the other side:
"encoder.stages.{i}.layers.{j}" -> "layer{i+1}.{j}".
"""

import re
from collections.abc import Iterable
from functools import cache

_PLACEHOLDER = re.compile(r"\{([a-z*])(?:\+(\d))?\}")
_NUMBER = r"0|[1-9][0-9]{0,4}"  # without leading zeros, so that a number has one spelling


@cache
def _compiled(template: str) -> tuple[re.Pattern[str], dict[str, int]]:
    """Returns the pattern with a group for each placeholder, and what is added to each number."""
    pattern, end, added = "", 0, {}
    for place in _PLACEHOLDER.finditer(template):
        name = "rest" if place[1] == "*" else place[1]
        assert name not in added, f"{{{place[1]}}} occurs twice in {template}"
        pattern += re.escape(template[end : place.start()]) + f"(?P<{name}>{'.+' if name == 'rest' else _NUMBER})"
        added[name] = int(place[2] or 0)
        end = place.end()
    return re.compile(pattern + re.escape(template[end:])), added


def match(template: str, key: str) -> dict[str, str] | None:
    """Returns the values of the placeholders; None if the key does not fit."""
    pattern, added = _compiled(template)
    found = pattern.fullmatch(key)
    if found is None:
        return None
    values = {}
    for name, number in added.items():
        if number and int(found[name]) < number:
            return None
        values[name] = str(int(found[name]) - number) if number else found[name]
    return values


def fill(template: str, values: dict[str, str]) -> str:
    """Returns the template with values in place of its placeholders; the inverse of `match`."""

    def value(place: re.Match[str]) -> str:
        text = values["rest" if place[1] == "*" else place[1]]
        return str(int(text) + int(place[2])) if place[2] else text

    return _PLACEHOLDER.sub(value, template)


def translate(key: str, templates: Iterable[tuple[str, str]]) -> str | None:
    """Translates a key by the first pair of templates whose first one fits; None if there is none.

    A template stands for a whole key, or for a layer, that is a key without its last component, which is kept. A whole
    key is looked up first.
    """
    pairs = [*templates]
    for template, other in pairs:
        if (values := match(template, key)) is not None:
            return fill(other, values)
    layer, _, leaf = key.rpartition(".")
    if layer and re.fullmatch(r"\w+", leaf):
        for template, other in pairs:
            if (values := match(template, layer)) is not None:
                return f"{fill(other, values)}.{leaf}"
    return None
