"""Part `epochs`: whole epochs of the original recipe with evaluation, with batches of 64 and 256."""

from itertools import pairwise
from typing import Any

from benchmarks.gpu import original, timeline
from benchmarks.gpu.command import Clock, Observed, needs_gpu_or_toy, train
from benchmarks.gpu.part import Settings, Skipped, say

LARGE_BATCH = 256
LEAST = 8  # seconds for a run of its own


def epochs(settings: Settings, seconds: float) -> dict[str, Any]:
    """Measures the wall time of epochs, images per second without compilation, and evaluation."""
    needs_gpu_or_toy(settings)
    clock = Clock(seconds)
    known = original.ensure(settings, clock)
    report(settings, 64, known)
    try:
        clock.need(LEAST, f"batches of {LARGE_BATCH}")
    except Skipped as error:
        return {"reason": str(error)}
    changes = {"batch_size": LARGE_BATCH, "num_epochs": original.epochs_to_train(settings)}
    observed = train(settings, settings.folder / "large", clock.left(), changes, config=original.CONFIG)
    report(settings, LARGE_BATCH, observed)
    return {"reason": f"batches of {LARGE_BATCH} were stopped at the time limit"} if observed.stopped else {}


def report(settings: Settings, batch: int, observed: Observed) -> None:
    """Prints and stores the figures of a run."""
    figures = timeline.epochs(observed.rows, observed.begun())
    walls = [end - begin for begin, end in pairwise(observed.evaluated())]
    settings.results[f"batch {batch}"] = {"seconds_of_later_epochs": walls, "epochs": figures}
    if not figures:
        say(f"epochs, batch {batch}: no epoch within the time")
        return
    speeds = [epoch["images_per_second"] for epoch in figures if epoch["images_per_second"]]
    shown = ", ".join(f"{wall:.1f}" for wall in walls)
    say(
        f"epochs, batch {batch}: {f'{shown} s' if shown else 'no time'} per later epoch with evaluation; "
        f"{speeds[-1] if speeds else 0:,.0f} images/s in training; the first epoch waited "
        f"{figures[0].get('waited_seconds', 0):.1f} s"
    )
