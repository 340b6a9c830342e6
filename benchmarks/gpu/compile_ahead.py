"""Part `compile_ahead`: a run whose images grow, with the second size compiled in the background or when it is needed.

As a command of its own, `python -m benchmarks.gpu.compile_ahead ARGUMENTS` is `jaxft train ARGUMENTS` with compilation
in the background, also on a CPU, or without it if JAXFT_COMPILE_AHEAD is no.
"""

import os
import sys
from typing import Any

from benchmarks.gpu import timeline
from benchmarks.gpu.command import Clock, Observed, forget_programs, needs_gpu_or_toy, train
from benchmarks.gpu.part import Settings, Skipped, say

LEAST = 10  # seconds for a run
FOR_RESNET50 = 200  # seconds for both runs with a ResNet-50, each of whose sizes takes 35 s to compile on an H100
SMALL = 112  # pixels, growing to 224
AHEAD = "JAXFT_COMPILE_AHEAD"
RUNS = {"in the background": "yes", "when needed": "no"}


def compile_ahead(settings: Settings, seconds: float) -> dict[str, Any]:
    """Measures wall time, waiting and speed of both runs, each with no compiled programs to begin with."""
    needs_gpu_or_toy(settings)
    clock = Clock(seconds)
    epochs = 2 if settings.toy else 4 if settings.data != "sample:cifar10" else 16  # of a fraction of a second each
    changes: dict[str, Any] = {
        "model.arch": "resnet50" if seconds >= FOR_RESNET50 and not settings.toy else "resnet18",
        "model.pretrained": "",
        "num_epochs": epochs,
        "batch_size": 64 if settings.toy else 256,
        "augment.first_image_size": 16 if settings.toy else SMALL,
        "augment.num_image_sizes": 2,
    }
    settings.results["network"] = changes["model.arch"]
    for position, (name, ahead) in enumerate(RUNS.items()):
        share = clock.left() / (len(RUNS) - position)
        if share < LEAST:
            raise Skipped(f"{max(share, 0):.0f} s are too little time for the run that compiles {name}")
        forget_programs(settings)
        workdir = settings.folder / f"run{position}"
        observed = train(settings, workdir, share, changes, module="benchmarks.gpu.compile_ahead", env={AHEAD: ahead})
        settings.results[name] = figures(observed, epochs)
        say(f"compiled {name}: {described(observed, epochs)}")
    stopped = [name for name in RUNS if settings.results[name]["stopped_at_its_limit"]]
    return {"reason": f"stopped at its limit: compiled {' and '.join(stopped)}"} if stopped else {}


def figures(observed: Observed, num_epochs: int) -> dict[str, Any]:
    """Returns the seconds of waiting and the images/s of both sizes. Each size trains in half of the epochs."""
    found = timeline.epochs(observed.rows, observed.begun())
    sizes = [[epoch for epoch in found if (2 * epoch["epoch"] > num_epochs) == second] for second in (False, True)]
    return {
        "seconds": observed.seconds,
        "stopped_at_its_limit": bool(observed.stopped),
        "waited_seconds": [size[0].get("waited_seconds") if size else None for size in sizes],  # in its first epoch
        "images_per_second": [[epoch["images_per_second"] for epoch in size] for size in sizes],
    }


def described(observed: Observed, num_epochs: int) -> str:
    found = figures(observed, num_epochs)
    sizes = [
        f"{name} size: waited {waited:.1f} s, {speeds[-1] or 0:,.0f} images/s"
        for name, waited, speeds in zip(
            ("first", "second"), found["waited_seconds"], found["images_per_second"], strict=True
        )
        if waited is not None
    ]
    end = "stopped at its limit after" if observed.stopped else "done in"
    return f"{'; '.join(sizes) or 'no step'}; {end} {observed.seconds:.0f} s"


def main() -> None:
    """Trains with or without compilation in the background."""
    from jaxft import cli
    from jaxft.training import compilation

    ahead = os.environ[AHEAD] == "yes"
    compilation.compiles_ahead = lambda formulation: ahead
    cli.run("train", sys.argv[1:])


if __name__ == "__main__":
    main()
