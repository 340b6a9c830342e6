"""MkDocs: what pages take from the code, the table of config keys and whole files."""

import re
from pathlib import Path
from typing import Any

from jaxft.config import CHOICES, RANGES, default_config, explanations, flatten

TABLE = "<!-- the table of config keys -->"
FILE = re.compile(r"<!-- the file (\S+) -->")
ROOT = Path(__file__).parent.parent
TYPES = {int: "whole number", float: "number", bool: "True or False", str: "string"}


def config_table() -> str:
    """| key | type | default | meaning |"""
    defaults, rows = flatten(default_config()), ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, meaning in explanations().items():
        limits = f"; one of {', '.join(CHOICES[key])}" if key in CHOICES and CHOICES[key][0] not in meaning else ""
        if key in RANGES and RANGES[key][1] <= 10_000:
            limits = f"; {RANGES[key][0]} to {RANGES[key][1]}"
        cells = [f"`{key}`", TYPES[type(defaults[key])], f"`{defaults[key]!r}`", meaning + limits]
        rows.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
    return "\n".join(rows)


def on_page_markdown(markdown: str, **_: Any) -> str:
    markdown = FILE.sub(lambda match: f"```python\n{(ROOT / match[1]).read_text()}```", markdown)
    return markdown.replace(TABLE, config_table())
