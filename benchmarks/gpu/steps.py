"""Part `steps`: the train step and evaluation beside PyTorch's, most important sizes first.

Contenders compile while others do, and take turns when all of their case are ready. One that compiles for too long is
dropped with a remark.
"""

import os
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks.gpu.contenders import Contender, Contenders, cache_environment
from benchmarks.gpu.part import Settings, Skipped, say
from benchmarks.train_step import Task

GOALS = {"train 256 bfloat16": "7300 images/s", "train 64 bfloat16": "1.15 times compile-graphs"}
ROUNDS = 5
TURN = 0.6  # seconds of a turn, about
COMPILE_LIMIT = 110.0  # seconds
MEASURE = 4.0  # seconds per contender that are reserved for measuring
RELATIVE_RATES = {"vit_b_16": 0.25}  # images per second relative to a ResNet-50's, roughly


class Case(NamedTuple):
    """Contenders that take turns at one task."""

    which: str
    batch: int
    dtype: str
    torch: tuple[str, ...]  # modes of PyTorch, the most important first
    with_jaxft: bool = True  # False: jaxft has been measured in an earlier case of this label
    arch: str = ""  # default: a ResNet

    @property
    def label(self) -> str:
        which = "train" if self.which == "train" else "evaluation"
        return " ".join(filter(None, (self.arch, which, str(self.batch), self.dtype)))


# Each process of PyTorch takes up to 14 s to choose its kernels, one at a time. Eager mode is never its best, so it
# comes late.
CASES = (
    Case("train", 256, "bfloat16", ("compile", "compile-graphs")),
    Case("train", 64, "bfloat16", ("compile-graphs", "compile")),
    Case("forward", 256, "bfloat16", ("compile-graphs",)),
    Case("train", 64, "float32", ("compile", "eager")),
    Case("train", 256, "float32", ("compile",)),
    Case("train", 256, "bfloat16", ("eager",), with_jaxft=False),
    Case("train", 1024, "bfloat16", ("compile",)),
    Case("forward", 256, "bfloat16", ("compile", "eager"), with_jaxft=False),
    Case("train", 64, "bfloat16", ("eager",), with_jaxft=False),
    Case("forward", 64, "bfloat16", ("compile-graphs",)),
    Case("forward", 256, "float32", ("compile",)),
    Case("forward", 1024, "bfloat16", ("compile",)),
)
TOY_CASES = (
    Case("train", 8, "bfloat16", ("eager", "compile", "compile-graphs")),
    Case("forward", 8, "bfloat16", ("eager",)),
    Case("train", 4, "float32", ("eager",)),
)


def make_task(settings: Settings, which: str, batch: int, dtype: str, arch: str = "") -> Task:
    """Returns the task of a contender with turns of about TURN seconds on an H100. arch: default: a ResNet."""
    if settings.toy:
        return Task(arch or "resnet18", 32, batch, which, 64, 2)
    rate = (5000 if which == "train" else 25_000) / (2 if dtype == "float32" else 1) * RELATIVE_RATES.get(arch, 1.0)
    return Task(arch or "resnet50", 224, batch, which, 64, max(int(TURN * rate / batch), 4))


def contenders_of(settings: Settings, case: Case) -> list[Contender]:
    """Makes a case's contenders, jaxft first."""
    task = make_task(settings, case.which, case.batch, case.dtype, case.arch)
    env = cache_environment(settings.cache)
    if settings.toy:
        env |= {"OMP_NUM_THREADS": "1"}  # PyTorch's threads spin, and two cores have other work
    suffix = "-xla" if settings.toy else ""  # without oneDNN's self-test on a CPU
    small = task._replace(width=8) if settings.toy and not case.arch else task
    found = [Contender("jaxft", f"jaxft-{case.dtype}{suffix}", small, env)] if case.with_jaxft else []
    for mode in case.torch:
        kind = f"torch-{case.dtype}" + ("" if mode == "eager" else f"-{mode}")
        found.append(Contender(f"torch {mode}", kind, task, env))
    return found


def compared(figures: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Returns jaxft's ratio to the best PyTorch, and to each."""
    own = figures.get("jaxft", {}).get("images_per_second")
    others = {name: each["images_per_second"] for name, each in figures.items() if name.startswith("torch")}
    if not own or not others:
        return {}
    best = max(others, key=lambda name: others[name])
    return {"best_torch": best, "ratio": own / others[best], "ratios": {name: own / x for name, x in others.items()}}


def line(part: str, label: str, figures: dict[str, dict[str, Any]], result: dict[str, Any], toy: bool) -> str:
    """Returns a case's line: images/s with quartiles, peak memory beside the prediction, seconds to the first step."""
    parts = []
    for name, each in figures.items():
        low, high = each["quartiles"]
        memory = f"{each['peak_memory_mib'] / 1024:.1f}"
        if "predicted_memory_mib" in each:
            memory += f" (predicted {each['predicted_memory_mib'] / 1024:.1f})"
        parts.append(
            f"{name} {each['images_per_second']:.0f} images/s ({low:.0f} to {high:.0f}), {memory} GiB, first step "
            f"{each['first_step_seconds']:.0f} s"
        )
    text = f"{part}: {label}: " + "; ".join(parts or ["nothing measured"])
    if "ratio" in result:
        text += f"; jaxft is {result['ratio']:.2f} times {result['best_torch']}"
    if label in GOALS and not toy:
        text += f" (goal: {GOALS[label]})"
    for name, reason in result.get("not_measured", {}).items():
        text += f"; {name}: {reason[:120]}"
    return text


def steps(settings: Settings, seconds: float) -> dict[str, Any]:
    """Measures the cases in order of importance, as far as time allows."""
    return measure_cases("steps", TOY_CASES if settings.toy else CASES, settings, seconds) | {"goals": GOALS}


def measure_cases(part: str, cases: Sequence[Case], settings: Settings, seconds: float) -> dict[str, Any]:
    """Measures the cases in their order, as far as time allows, and prints lines that begin with the part's name."""
    if not settings.gpu and not settings.toy:
        raise Skipped("there is no GPU; --toy measures small steps on a CPU")
    until = time.monotonic() + seconds
    members = {case: contenders_of(settings, case) for case in cases}
    cores = len(os.sched_getaffinity(0))
    limit = min(COMPILE_LIMIT, 0.85 * seconds)
    pool = Contenders(settings, [each for case in cases for each in members[case]], max(cores // 2, 2), limit)
    waiting = list(cases)
    while waiting and time.monotonic() < until:
        pool.poll()
        case = next((case for case in waiting if all(each.is_settled for each in members[case])), None)
        fits = sum(each.memory for each in members[waiting[0]] if not each.gone) <= pool.memory
        reserved = MEASURE * sum(bool(each.report) for other in waiting for each in members[other])
        if case is None and not fits:  # one contender after the other
            case = waiting[0]
            ready = [each for each in members[case] if each.report and each.child]
            if not ready:
                pool.wait([next(each for each in members[case] if not each.is_settled)], until - reserved - MEASURE)
                ready = [each for each in members[case] if each.report and each.child]
            if ready:
                _measure(part, settings, pool, case, ready, until)
            elif until - time.monotonic() < reserved + MEASURE:
                for each in members[case]:
                    if not each.is_settled:
                        each.drop("no time left")
            for each in ready:
                each.close()
            if all(each.is_settled for each in members[case]):
                waiting.remove(case)
            continue
        if case is None and until - time.monotonic() < reserved + MEASURE:
            case = waiting[0]
            for each in members[case]:
                if not each.is_settled:
                    each.drop("not compiled in time" if each.child else "no time left")
        if case is None:
            pool.pause()
            continue
        waiting.remove(case)
        _measure(part, settings, pool, case, members[case], until)
        for each in members[case]:
            each.close()
    if left := [f"{case.label}, torch {' and '.join(case.torch)}" for case in waiting]:
        settings.results["not_reached"] = left
        say(f"{part}: no time left for {'; '.join(left)}")
    if not any(isinstance(each, dict) and each.get("jaxft") for each in settings.results.values()):
        reasons = {each.gone for each in pool.everyone if each.kind.startswith("jaxft") and each.gone}
        if any(reason.startswith("failed") for reason in reasons):
            raise RuntimeError(sorted(reasons)[0])
        raise Skipped(min(reasons, default="too little time to compile a step"))
    return {}


# Six parameters: the case's and those of the whole part.
def _measure(
    part: str, settings: Settings, pool: Contenders, case: Case, members: list[Contender], until: float
) -> None:
    """Measures contenders of a case, and prints and stores their figures beside those that it already has."""
    figures = pool.measure(members, 2 if settings.toy else ROUNDS, until)
    stored = settings.results.setdefault(case.label, {})
    stored |= figures
    measured = {name: each for name, each in stored.items() if name == "jaxft" or name.startswith("torch")}
    stored |= compared(measured)
    if missing := {each.name: each.gone for each in members if each.gone}:
        stored["not_measured"] = stored.get("not_measured", {}) | missing
    say(line(part, case.label, measured, stored, settings.toy))
