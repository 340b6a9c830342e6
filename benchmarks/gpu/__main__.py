"""Measures everything we want to know about a GPU within the given minutes, the most important questions first.

    python -m benchmarks.gpu [--minutes 8] [--toy] [--data folder:PATH] [--weights FILE] [--out FILE] [--parts a,b]

By default it uses the packaged sample of CIFAR-10 and random weights, and needs no network. PyTorch is compared with if
it is installed. Each part prints its lines as soon as they are known. The last line is one JSON object,
{part: {"status": "ok" | "skipped" | "failed", "seconds": ..., "reason": ..., ...}}, which --out also writes to a file
after each part. A part without what it needs (a GPU, torch, a flag, time) is skipped, and says why; a part that is
stopped by its time limit keeps what it has found. The exit code is 1 if a part failed, 130 after Ctrl-C.

--toy runs the same parts at sizes that two CPU cores finish in four minutes (docs/benchmarks.md).
"""

import argparse
import dataclasses
import importlib
import json
import math
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from benchmarks.child import kill_children
from benchmarks.gpu.part import Part, Settings, Skipped, rounded, say, write_json

GRACE = 3  # seconds between the time that a part is given and its end by force
RESERVE = 5  # seconds of the whole time that no part gets


class Entry(NamedTuple):
    """A part: its function, as 'module:function', and its share of the time that is left when it starts."""

    where: str
    weight: float


PARTS = {  # in order of importance
    name: Entry(f"benchmarks.gpu.{name}:{name}", weight)
    for name, weight in {
        "machine": 1,
        "steps": 13,
        "variants": 11,
        "families": 7,
        "kernels": 3,
        "startup": 7,
        "epochs": 3,
        "recipes": 6,
        "compile_ahead": 3,
        "resume": 3,
        "predict": 2,
        "export": 2,
    }.items()
}


class OutOfTime(BaseException):
    """Raised in a part when its time is over; not an Exception, so that a part's own handlers let it through."""


class Stopped(BaseException):
    """Raised by SIGINT or SIGTERM."""


def run_part(name: str, entry: Entry, settings: Settings, seconds: float) -> dict[str, Any]:
    """Runs a part in a folder of its own, at most `seconds` + GRACE, and returns its fields with status and seconds."""
    started = time.monotonic()

    def end(status: str, reason: str = "") -> dict[str, Any]:
        fields: dict[str, Any] = {"status": status, "seconds": time.monotonic() - started}
        return fields | ({"reason": reason} if reason else {}) | settings.results

    def out_of_time(signum: int, frame: FrameType | None) -> None:
        raise OutOfTime

    try:
        try:
            signal.signal(signal.SIGALRM, out_of_time)
            signal.setitimer(signal.ITIMER_REAL, max(seconds, 0) + GRACE)
            module, _, function = entry.where.partition(":")
            part: Part = getattr(importlib.import_module(module), function)
            settings.results.update(part(settings, seconds))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except Skipped as error:
        return end("skipped", str(error))
    except OutOfTime:
        reason = f"stopped after {seconds:.0f} s"
        return end("ok", f"{reason}; incomplete") if settings.results else end("skipped", reason)
    except Stopped:
        settings.results.setdefault("stopped", True)
        raise
    except Exception as error:  # no part may take the others down
        traceback.print_exc()
        return end("failed", " ".join(f"{type(error).__name__}: {error}".split())[-500:])
    finally:
        kill_children()
    return end("ok", settings.results.pop("reason", ""))


def run(parts: Mapping[str, Entry], settings: Settings, seconds: float, out: Path | None) -> int:
    """Runs the parts one after another and prints their JSON; returns the exit code.

    Time that a part does not use goes to later ones.
    """
    until = time.monotonic() + seconds - RESERVE
    results: dict[str, dict[str, Any]] = {name: {"status": "skipped", "reason": "stopped before it"} for name in parts}
    code = 0

    def stop(signum: int, frame: FrameType | None) -> None:
        signal.signal(signum, signal.SIG_IGN)
        raise Stopped

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    own = settings
    begun = time.monotonic()
    name = ""
    try:
        weights = [entry.weight for entry in parts.values()]
        for position, (name, entry) in enumerate(parts.items()):
            begun = time.monotonic()
            share = (until - begun) * entry.weight / sum(weights[position:])
            folder = settings.folder / name
            folder.mkdir(parents=True)
            own = dataclasses.replace(settings, folder=folder, results={})
            if share <= 0:
                results[name] = {"status": "skipped", "seconds": 0.0, "reason": "the time is over"}
            else:
                results[name] = run_part(name, entry, own, share)
            _report(name, results, out)
            shutil.rmtree(folder, ignore_errors=True)
    except Stopped:
        kill_children()
        code = 130
        seconds_taken = time.monotonic() - begun
        if results[name].get("reason") == "stopped before it":
            status = "ok" if len(own.results) > 1 else "skipped"
            results[name] = {"status": status, "seconds": seconds_taken, "reason": "stopped by a signal", **own.results}
        _report(name, results, out)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if not code and any(result["status"] == "failed" for result in results.values()):
        code = 1
    say(json.dumps(rounded(results)))
    return code


def _report(name: str, results: Mapping[str, dict[str, Any]], out: Path | None) -> None:
    result = results[name]
    reason = f": {result['reason']}" if result.get("reason") else ""
    say(f"{name}: {result['status']} in {result.get('seconds', 0):.0f} s{reason}")
    if out:
        try:
            write_json(out, rounded(results))
        except OSError as error:
            say(f"{out} cannot be written: {error}")


def has_gpu() -> bool:
    """Returns whether nvidia-smi lists a GPU or, if it does not answer, whether there is a device file of one."""
    try:
        found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return Path("/dev/nvidia0").exists()
    return b"GPU 0" in found.stdout


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--toy", action="store_true", help="sizes for two CPU cores")
    parser.add_argument("--data", default="sample:cifar10", help="'sample:cifar10' or 'folder:PATH'")
    parser.add_argument("--weights", default="", help="a weights file; default: random weights")
    parser.add_argument("--out", type=Path, help="a file for the JSON, written after each part")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated")
    args = parser.parse_args(argv)
    if not 0 < args.minutes < math.inf:
        parser.error("--minutes must be a positive number")
    if unknown := [name for name in args.parts.split(",") if name not in PARTS]:
        parser.error(f"there is no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    kind, _, folder = args.data.partition("folder:")
    if args.data != "sample:cifar10" and (kind or not Path(folder).is_dir()):
        parser.error(f"--data {args.data} is neither sample:cifar10 nor folder:PATH of an existing folder")
    if args.weights and not Path(args.weights).is_file():
        parser.error(f"there is no weights file {args.weights}")
    if args.out and not args.out.absolute().parent.is_dir():
        parser.error(f"there is no folder {args.out.absolute().parent}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    with tempfile.TemporaryDirectory(prefix="jaxft-gpu-", ignore_cleanup_errors=True) as scratch:
        folder = Path(scratch)
        (folder / "compiled").mkdir()
        settings = Settings(args.toy, args.data, args.weights and str(Path(args.weights).absolute()), folder, has_gpu())
        settings = dataclasses.replace(settings, cache=folder / "compiled")
        chosen = {name: entry for name, entry in PARTS.items() if name in args.parts.split(",")}
        return run(chosen, settings, 60 * args.minutes, args.out)


if __name__ == "__main__":
    sys.exit(main())
