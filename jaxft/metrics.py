"""The lines of metrics.jsonl: one JSON object each, appended as they come."""

import json
from pathlib import Path
from typing import Any


class MetricsFile:
    """DIR/metrics.jsonl, cut back to `last_step` first: what an interrupted run wrote beyond its checkpoint goes."""

    def __init__(self, path: Path, last_step: int) -> None:
        kept = [line for line in _read_lines(path) if line["step"] <= last_step]
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        partial.replace(path)
        self._file = path.open("a", buffering=1)

    def write(self, **line: Any) -> None:
        self._file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        self._file.close()


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Without a last line that a killed run left half-written."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines
