"""Interface of the parts of `python -m benchmarks.gpu`.

A part is a function of the settings and of the seconds that it may take. It prints its own lines as soon as they are
known, puts its JSON fields into `settings.results` on the way if they should survive running out of time, and returns
the rest of them. It raises Skipped if it cannot run here. It never initialises JAX itself: a GPU's memory is
preallocated by the process that does, so all measuring happens in child processes.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.child import Child
from jaxft import process


class Skipped(Exception):  # noqa: N818, not an error
    """Raised by a part that cannot run: a GPU, torch or a flag is missing, or time is too short. Its text is why."""


@dataclass(frozen=True)
class Settings:
    """The arguments of a part."""

    toy: bool  # sizes for two CPU cores
    data: str  # 'sample:cifar10' or 'folder:PATH'
    weights: str  # a file, or '' for random weights
    folder: Path  # an empty folder for the part's own files
    gpu: bool = False  # whether nvidia-smi finds one
    cache: Path = Path()  # compiled programs, which all parts share unless they measure compilation
    results: dict[str, Any] = field(default_factory=dict)  # fields known so far, kept if the part is stopped


Part = Callable[[Settings, float], dict[str, Any]]


def say(text: str) -> None:
    """Prints a line at once."""
    print(text, flush=True)


def run_child(command: list[str], seconds: float, env: Mapping[str, str] = {}) -> dict[str, Any]:
    """Runs `python -m *command` and returns the JSON object on its last line of standard output.

    The child may print {"skipped": reason}. Raises Skipped for that, and if it takes longer than `seconds`: then its
    whole process group is killed. Raises RuntimeError with the end of its standard error if it fails.
    """
    if seconds <= 0:
        raise Skipped("too little time")
    until = time.monotonic() + seconds
    child = Child([sys.executable, "-m", *command], process.environment() | dict(env))
    result: Any = None
    try:
        assert child.process.stdin
        child.process.stdin.close()
        while True:
            try:
                result = child.read(until - time.monotonic())
            except RuntimeError:
                if child.process.wait() or not isinstance(result, dict):
                    raise
                break
    except TimeoutError:
        raise Skipped(f"not done within {seconds:.0f} s") from None
    finally:
        child.kill()
    if "skipped" in result:
        raise Skipped(str(result["skipped"]))
    return result


def rounded(value: Any, digits: int = 5) -> Any:
    """Rounds all floats of a JSON value to significant digits. JSON has no NaN: it becomes null, as do infinities."""
    if isinstance(value, Mapping):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item, digits) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return value


def write_json(path: Path, value: Any) -> None:
    """Replaces the file atomically."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)
