"""Part `startup`: seconds from the command to the first training step, with empty caches and again, by what takes them.

The third start is the plain command, without clocks around its functions; it trains on, for the parts that follow.
"""

import shutil
from typing import Any

from benchmarks.gpu import original
from benchmarks.gpu.command import CACHE, Clock, environment, needs_gpu_or_toy, overrides
from benchmarks.gpu.part import Settings, run_child, say

LEAST = 6  # seconds for a start; with less, nothing is measured
SHOWN = 6  # parts of a start


def startup(settings: Settings, seconds: float) -> dict[str, Any]:
    """Measures two starts of the original recipe in parts (benchmarks/startup_parts.py) and a third as a whole."""
    needs_gpu_or_toy(settings)
    clock = Clock(seconds)
    shutil.rmtree(environment(settings)[CACHE], ignore_errors=True)
    for name in ("empty caches", "second start"):
        clock.need(LEAST, name)
        workdir = settings.folder / name.replace(" ", "-")
        command = ["benchmarks.startup_parts", f"--config=configs/{original.CONFIG}.py", f"--workdir={workdir}"]
        found = run_child([*command, *overrides(settings)], clock.left(), environment(settings))
        settings.results[name] = found
        longest = sorted(found["parts"].items(), key=lambda part: -part[1])[:SHOWN]
        shown = ", ".join(f"{part} {seconds:.1f}" for part, seconds in longest)
        say(f"startup, {name}: {found['total']:.1f} s to the first step: {shown}")
    clock.need(LEAST, "the third start")
    observed = original.run(settings, clock.left())
    settings.results["third start"] = {"start_printed": observed.begun(), "first_step_done": observed.first_step()}
    if observed.rows:
        say(f"startup, plain command: {observed.first_step():.1f} s to the first step")
    return {}
