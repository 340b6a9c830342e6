"""Part `recipes`: accuracy after each epoch and seconds of the whole command, with no compiled programs to begin with.

With the packaged sample or random weights the accuracies mean little. The first recipe begins with empty caches, the
later ones find the decoded images.
"""

import shutil
from collections.abc import Mapping
from typing import Any, NamedTuple

from benchmarks.gpu import timeline
from benchmarks.gpu.command import (
    CACHE,
    Clock,
    CommandError,
    Observed,
    environment,
    forget_programs,
    needs_gpu_or_toy,
    train,
)
from benchmarks.gpu.part import Settings, say

GOALS = (96.0, 97.5)  # percent
LEAST = 8  # seconds for a recipe


class Recipe(NamedTuple):
    config: str
    weight: float  # share of the time that is left, relative to the later ones
    changes: Mapping[str, Any] = {}
    toy: Mapping[str, Any] = {}  # further changes with --toy


SHORT = {"num_epochs": 1, "data.train_split": "test"}  # half as many images
RECIPES = {  # the most important first
    "cifar10_fast": Recipe("cifar10_fast", 6, toy=SHORT | {"augment.first_image_size": 16, "batch_size": 64}),
    "cifar10 with head_norm": Recipe("cifar10", 3, {"model.head_norm": True}, SHORT),
    "auto": Recipe("auto", 2, {"data.eval_split": "test", "data.stored_size": 0}, SHORT),
    "linear_probe": Recipe("linear_probe", 1, toy=SHORT | {"batch_size": 64}),
}


def recipes(settings: Settings, seconds: float) -> dict[str, Any]:
    """Runs each recipe until its share of the time is over; raises RuntimeError at the end if one of them failed."""
    needs_gpu_or_toy(settings)
    clock = Clock(seconds)
    random, sample = settings.toy or not settings.weights, settings.data == "sample:cifar10"
    causes = [cause for cause, given in (("random weights", random), ("the packaged sample", sample)) if given]
    if causes:
        settings.results["accuracies_mean_little"] = " and ".join(causes)
    failures = []
    weights = [recipe.weight for recipe in RECIPES.values()]
    for position, (name, recipe) in enumerate(RECIPES.items()):
        share = clock.left() * recipe.weight / sum(weights[position:])
        if share < LEAST:
            settings.results[name] = {"skipped": f"{max(share, 0):.0f} s are too little time"}
            continue
        if not position:
            shutil.rmtree(environment(settings)[CACHE], ignore_errors=True)
        elif not settings.toy:
            forget_programs(settings)
        workdir = settings.folder / recipe.config
        changes = {**recipe.changes, **(recipe.toy if settings.toy else {})}
        try:
            observed = train(settings, workdir, share, changes, config=recipe.config)
        except CommandError as error:
            failures.append(f"{name}: {error}")
            settings.results[name] = {"failed": str(error)[-300:]} | figures(error.observed)
            say(f"recipe {name}: failed: {str(error)[-200:]}")
            continue
        settings.results[name] = figures(observed)
        say(f"recipe {name}: {described(observed)}")
        shutil.rmtree(workdir, ignore_errors=True)
    if failures:
        raise RuntimeError("; ".join(failures))
    stopped = [name for name in RECIPES if settings.results[name].get("stopped_at_its_limit")]
    return {"reason": f"stopped at its limit: {', '.join(stopped)}"} if stopped else {}


def figures(observed: Observed) -> dict[str, Any]:
    """Returns the accuracies with the seconds after the command at which they were known, and what took the time."""
    evaluated, accuracies = observed.evaluated(), timeline.accuracies(observed.metrics())
    epochs = timeline.epochs(observed.rows, observed.begun())
    return {
        "accuracies": accuracies,
        "known_after_seconds": evaluated,
        "seconds": observed.seconds,
        "stopped_at_its_limit": bool(observed.stopped),
        "first_step_done": observed.first_step(),
        "waited_seconds": [epoch.get("waited_seconds") for epoch in epochs],
        "images_per_second": [epoch["images_per_second"] for epoch in epochs],
        "seconds_to_goal": {f"{goal:g} %": timeline.reached(accuracies, evaluated, goal) for goal in GOALS},
    }


def described(observed: Observed) -> str:
    accuracies = ", ".join(f"{accuracy:.1f}" for accuracy in timeline.accuracies(observed.metrics()))
    end = "stopped at its limit after" if observed.stopped else "done in"
    return f"{f'{accuracies} %' if accuracies else 'no epoch'}, {end} {observed.seconds:.0f} s"
