"""Part `variants`: changes to jaxft's train step, in turns with the unchanged step.

Variants compile a few at a time, so that their choice of kernels, which XLA times, may disturb each other; the variant
`baseline_recompiled` shows by how much. The combination of those that helped compiles undisturbed.
"""

import itertools
import os
import time
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.gpu.contenders import Contender, Contenders, cache_environment
from benchmarks.gpu.part import Settings, Skipped, say
from benchmarks.gpu.steps import make_task
from benchmarks.gpu.variant_table import VARIANTS, Variant

BASELINE = "baseline"
MORE = {  # besides those whose memory traffic can be predicted
    "baseline_recompiled": Variant(),
    "steps_per_call_4": Variant(overrides={"steps_per_call": 4}),
    "formulation_plain": Variant(formulation="plain"),
    "batch_512": Variant(overrides={"batch_size": 512}),
    "steps_per_call_10": Variant(overrides={"steps_per_call": 10}),
}
TOY = ("conv_fusion", "unknown", "resize_by_taps", "steps_per_call_4")
UNKNOWN = Variant("--xla_gpu_unknown_to_all=true")  # what a flag of another jaxlib leads to
PLATFORMS = ("plain", "gpu", "tpu", "cpu")  # of jaxft/ops/formulation.py
AT_ONCE = 4  # variants that compile beside each other
ROUNDS = 3
FINAL = 0.35  # share of the time for combinations
MEASURE = 4.0  # seconds per contender that are reserved for measuring
COMPILE_LIMIT = 50.0  # seconds; the unchanged step takes 16
TOY_COMPILE_LIMIT = 100.0

# A variant computes the same if its loss before the first update, and that after 20 updates, are within these
# fractions of the baseline's first loss. bfloat16 keeps 8 bits, and updates amplify its rounding.
FIRST_TOLERANCE = 0.01
CHECKED_TOLERANCE = 0.05
LEAST_GAIN = 0.005  # below this, a variant has not helped; more if recompiling the baseline changes more


def chosen(toy: bool) -> dict[str, Variant]:
    """Returns the variants to measure, the most promising first."""
    first, *others = MORE.items()
    table = {name: variant for name, variant in VARIANTS.items() if variant != Variant()}
    everything = dict([first]) | table | dict(others)
    if toy:
        everything["unknown"] = UNKNOWN
        return {name: everything[name] for name in TOY if name in everything}
    return everything


def is_exact(variant: Variant) -> bool:
    """Returns whether the variant has to compute the same as the baseline, so that gains can be combined."""
    return not any(key.startswith("model.") or key == "batch_size" for key in variant.overrides)


def make_contender(settings: Settings, name: str, variant: Variant, batch: int) -> Contender:
    """Makes a variant's contender with a compilation cache of its own; the baseline shares that of other parts."""
    overrides = dict(variant.overrides)
    batch = overrides.pop("batch_size", batch)
    if settings.toy:
        batch = min(batch, 8)
    dtype = str(overrides.pop("model.dtype", "bfloat16"))
    task = make_task(settings, "train", batch, dtype)._replace(overrides=overrides, formulation=variant.formulation)
    if settings.toy:
        task = task._replace(width=8)
    own_cache = settings.folder / f"{zlib.crc32(f'{name} {batch}'.encode()):08x}"  # names of combinations are long
    env = cache_environment(settings.cache if name == BASELINE else own_cache)
    env |= {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {variant.flags}".strip()}
    return Contender(name, f"jaxft-{dtype}-xla", task, env)


def is_same(figures: Mapping[str, Any], baseline: Mapping[str, Any]) -> bool:
    """Returns whether two contenders have the same losses, within the tolerances."""
    first = abs(baseline["first_loss"])
    return bool(
        abs(figures["first_loss"] - baseline["first_loss"]) <= FIRST_TOLERANCE * first
        and abs(figures["checked_loss"] - baseline["checked_loss"]) <= CHECKED_TOLERANCE * first
    )


def judged(contender: Contender, variant: Variant, figures: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Returns a variant's fields, with its ratio to the baseline of the same turns."""
    fields: dict[str, Any] = {"flags": variant.flags} if variant.flags else {}
    own, baseline = figures.get(contender.name), figures.get(BASELINE)
    if own is None:
        status = "failed" if contender.gone.startswith("failed") else "skipped"
        return fields | {"status": status, "reason": contender.gone}
    fields |= {"status": "ok"} | own
    if baseline:
        fields["ratio"] = own["images_per_second"] / baseline["images_per_second"]
        fields["baseline"] = baseline["images_per_second"]
        if is_exact(variant):
            fields["same_loss"] = is_same(own, baseline)
    return fields


def line(name: str, fields: Mapping[str, Any]) -> str:
    if fields["status"] != "ok":
        return f"variants: {name}: {fields['status']}: {fields['reason'][:160]}"
    ratio = f"{fields['ratio']:.3f} times the baseline, " if "ratio" in fields else ""
    different = "" if fields.get("same_loss", True) else "; ITS LOSS DIFFERS"
    return (
        f"variants: {name}: {ratio}{fields['images_per_second']:.0f} images/s, "
        f"{fields['peak_memory_mib'] / 1024:.1f} GiB, compiled in {fields['first_step_seconds']:.0f} s, loss "
        f"{fields['first_loss']:.4f}, then {fields['checked_loss']:.4f}{different}"
    )


def helpful(results: Mapping[str, Any], variants: Mapping[str, Variant]) -> list[str]:
    """Returns the names of variants that helped and computed the same, best first."""
    measured = {name: results[name] for name in variants if results.get(name, {}).get("status") == "ok"}
    noise = abs(measured.get("baseline_recompiled", {}).get("ratio", 1) - 1)
    gains = {
        name: fields["ratio"] - 1
        for name, fields in measured.items()
        if name != "baseline_recompiled" and fields.get("same_loss") and "ratio" in fields
    }
    good = [name for name, gain in gains.items() if gain > max(LEAST_GAIN, noise)]
    return sorted(good, key=lambda name: -gains[name])


def compatible(names: Sequence[str], variants: Mapping[str, Variant]) -> list[str]:
    """Returns the names without those that change the same key, flag or part of the network as an earlier one."""
    taken: set[str] = set()
    kept: list[str] = []
    for name in names:
        variant = variants[name]
        changed = {*variant.overrides, *(flag.partition("=")[0] for flag in variant.flags.split())}
        if variant.formulation:  # stem_blocks_16 changes the stem; a platform's formulation changes everything
            is_platform = variant.formulation in PLATFORMS
            changed |= {"platform"} if is_platform else {variant.formulation.partition("_")[0], "formulation"}
            if (is_platform and "formulation" in taken) or (not is_platform and "platform" in taken):
                continue
        if not changed & (taken - {"formulation"}):
            kept.append(name)
            taken |= changed
    return kept


def combined(variants: Sequence[Variant]) -> Variant:
    """Returns all the changes in one variant."""
    overrides: dict[str, Any] = {}
    for variant in variants:
        overrides |= variant.overrides
    formulations = [variant.formulation for variant in variants if variant.formulation]
    return Variant(" ".join(variant.flags for variant in variants if variant.flags), overrides, "+".join(formulations))


def variants(settings: Settings, seconds: float) -> dict[str, Any]:
    """Measures variants in batches, then the combination of those that helped, then the best at batch 64."""
    if not settings.gpu and not settings.toy:
        raise Skipped("there is no GPU; --toy tries variants of a small step on a CPU")
    until = time.monotonic() + seconds
    batch = 8 if settings.toy else 256
    table = chosen(settings.toy)
    settings.results["tolerances"] = {"first_loss": FIRST_TOLERANCE, "checked_loss": CHECKED_TOLERANCE}
    baseline = make_contender(settings, BASELINE, Variant(), batch)
    members = {name: make_contender(settings, name, variant, batch) for name, variant in table.items()}
    at_once = 2 if settings.toy else AT_ONCE
    limit = TOY_COMPILE_LIMIT if settings.toy else COMPILE_LIMIT
    # The processes of later variants start while earlier ones compile.
    pool = Contenders(settings, [baseline, *members.values()], 2 * at_once, limit, at_once)
    pool.wait([baseline], until)
    if not baseline.report:
        if baseline.gone.startswith("failed"):
            raise RuntimeError(f"the baseline: {baseline.gone}")
        raise Skipped(f"the baseline: {baseline.gone or 'not compiled in time'}")
    screening_ends = until - FINAL * seconds
    names = list(table)
    while names and time.monotonic() < screening_ends - 2 * MEASURE:
        fitting = fit(members, names, pool.memory - baseline.memory)[:at_once]
        names = names[len(fitting) :]
        _measure(settings, pool, baseline, {members[name]: table[name] for name in fitting}, screening_ends)
    for name in names:
        members[name].drop("no time left")
        settings.results[name] = {"status": "skipped", "reason": "no time left"}
    if names:
        say(f"variants: no time left for {', '.join(names)}")
    _combine(settings, baseline, table, batch, until)
    measured = any(settings.results[name]["status"] == "ok" for name in table)
    return {} if measured else {"reason": "no variant was measured"}


def fit(members: Mapping[str, Contender], names: Sequence[str], memory: float) -> list[str]:
    """Returns the first of these names, as many as fit into a GPU's memory at a time; at least one."""
    needed = list(itertools.accumulate(members[name].memory for name in names))
    return [*names[: max(sum(each <= memory for each in needed), 1)]]


def _measure(
    settings: Settings, pool: Contenders, baseline: Contender, members: Mapping[Contender, Variant], until: float
) -> None:
    """Compiles variants beside each other, measures them in turns with the baseline, and stores and prints them."""
    pool.wait([*members], until - MEASURE * (1 + len(members)))
    for member in members:
        if not member.is_settled:
            member.drop("not compiled in time")
    figures: dict[str, dict[str, Any]] = {}
    if any(member.report for member in members):
        figures = pool.measure([baseline, *members], 2 if settings.toy else ROUNDS, until + MEASURE)
    for member, variant in members.items():
        fields = judged(member, variant, figures)
        settings.results[member.name] = fields
        say(line(member.name, fields))
        member.close()


def _combine(settings: Settings, baseline: Contender, table: Mapping[str, Variant], batch: int, until: float) -> None:
    """Measures the combination of variants that helped, compiled by itself, here and at a quarter of the batch."""
    good = helpful(settings.results, table)
    settings.results["helped"] = list(good)
    if settings.toy and len(good) < 2:  # nothing helps on a CPU: try the code
        exact = [name for name in table if settings.results.get(name, {}).get("same_loss")]
        good = exact[-2:]
    if not good:
        if any(settings.results[name]["status"] == "ok" for name in table):
            say("variants: none helped")
        return
    good = compatible(good, table)
    name, change = "+".join(good), combined([table[each] for each in good])
    small = batch // 4
    usual = make_contender(settings, BASELINE, Variant(), small)
    other = make_contender(settings, f"{name} at {small}", change, small)
    member = make_contender(settings, f"{name}, compiled undisturbed", change, batch)
    limit = TOY_COMPILE_LIMIT if settings.toy else COMPILE_LIMIT
    pool = Contenders(settings, [baseline, member, usual, other], 3, limit)
    _measure(settings, pool, baseline, {member: change}, until - MEASURE)
    baseline.close()
    pool.wait([usual], until - 2 * MEASURE)
    _measure(settings, pool, usual, {other: change}, until)
    usual.close()
