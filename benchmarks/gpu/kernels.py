"""Part `kernels`: a trace of a few train steps, its time by class of kernel and its most expensive kernels.

    python -m benchmarks.gpu.kernels TASK DTYPE

traces one task of benchmarks/train_step.py, given as JSON, and prints the figures as JSON.
"""

import heapq
import json
import re
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu.contenders import cache_environment
from benchmarks.gpu.part import Settings, Skipped, run_child, say
from benchmarks.gpu.steps import make_task
from benchmarks.train_step import Task, jaxft_steps

STEPS = 5  # traced
MOST = 20  # kernels that are listed


class Kernel(NamedTuple):
    """A launch of a kernel, or a copy. Times are nanoseconds."""

    name: str
    start: float
    end: float
    hlo: str = ""  # the name of the operation in XLA's program


# The first pattern that is found in a name decides. XLA's names come first: its `convert` fusions contain "conv".
CLASSES = (
    ("product", r"gemm_fusion|^dot\b|\$matmul"),
    (
        "max-pool",
        r"select_and_scatter|select-and-scatter|reduce_window|reduce-window|max_pool|^input_concatenate_fusion",
    ),
    ("copy or transpose", r"^[Mm]emcpy|^[Mm]emset|^copy|wrapped_copy|copy_fusion|transpose_fusion|wrapped_transpose"),
    ("norm or sum", r"reduce[\w.]*fusion|wrapped_reduce|^reduce[._\d]*$|RowReduce|ColumnReduce"),
    ("elementwise", r"fusion|^wrapped_|^(loop|input)_"),
    ("cuDNN padding or layout", r"Padding|nchwToNhwc|nhwcToNchw|NchwToNhwc|NhwcToNchw|transpose"),
    ("convolution", r"xmma_(fprop|dgrad|wgrad)|fprop|dgrad|wgrad|cutlass__5x_cudnn|[Cc]onvol|winograd|conv2d|\bconv"),
    ("product", r"nvjet|gemm|gemv|cublas|splitK|matmul|^dot"),
)


def kind(name: str) -> str:
    """Returns the class of a kernel by its name."""
    return next((label for label, pattern in CLASSES if re.search(pattern, name)), "other")


def device_kernels(profile: Any) -> Iterator[Kernel]:
    """Yields what ran on the first GPU of a profile or, if there is none, XLA's operations on the CPU."""
    planes = list(profile.planes)
    gpus = sorted((plane for plane in planes if plane.name.startswith("/device:GPU")), key=lambda plane: plane.name)
    for plane in gpus[:1] or planes:
        lines = list(plane.lines)
        # A processed profile also has lines of modules, steps and operations, which repeat the streams' time.
        streams = [line for line in lines if line.name.startswith("Stream")]
        for line in streams or lines:
            for event in line.events:
                stats = dict(stat for stat in event.stats if len(stat) == 2)
                if gpus or "hlo_op" in stats:
                    yield Kernel(event.name, event.start_ns, event.end_ns, str(stats.get("hlo_op", "")))


def busy_time(kernels: Iterable[Kernel]) -> float:
    """Returns the nanoseconds in which at least one kernel ran."""
    busy = end = 0.0
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        busy += max(kernel.end - max(kernel.start, end), 0)
        end = max(end, kernel.end)
    return busy


def sources(hlo: str) -> dict[str, str]:
    """Returns where each operation of XLA's program comes from, as in 'layer1/0/bn1/sub'."""
    found = re.findall(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*?op_name="([^"]*)"', hlo, re.MULTILINE)
    return {
        name: ("backward " if "transpose(" in path else "") + path.rpartition("_features/")[2][-60:]
        for name, path in found
    }


def figures(kernels: Sequence[Kernel], steps: int, source: dict[str, str]) -> dict[str, Any]:
    """Returns milliseconds per step by class and by kernel, kernels per step, and the share of time without any."""
    classes: defaultdict[str, float] = defaultdict(float)
    time: defaultdict[str, float] = defaultdict(float)
    launches: Counter[str] = Counter()
    places: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for kernel in kernels:
        milliseconds = (kernel.end - kernel.start) / 1e6 / steps
        classes[kind(kernel.name)] += milliseconds
        time[kernel.name] += milliseconds
        launches[kernel.name] += 1
        if kernel.hlo in source:
            places[kernel.name][source[kernel.hlo]] += 1
    span = max(kernel.end for kernel in kernels) - min(kernel.start for kernel in kernels)
    return {
        "span_ms": span / 1e6 / steps,
        "busy_ms": busy_time(kernels) / 1e6 / steps,
        "idle_share": 1 - busy_time(kernels) / span,
        "kernels": len(kernels) / steps,
        "ms_by_class": dict(sorted(classes.items(), key=itemgetter(1), reverse=True)),
        "most": [
            {
                "kernel": name[:120],
                "class": kind(name),
                "launches": launches[name] / steps,
                "ms": milliseconds,
                **({"from": places[name].most_common(1)[0][0]} if places[name] else {}),
            }
            for name, milliseconds in heapq.nlargest(MOST, time.items(), key=itemgetter(1))
        ],
    }


def trace(task: Task, dtype: str) -> dict[str, Any]:
    """Traces STEPS train steps and returns their figures."""
    import jax
    from jax.profiler import ProfileData

    steps = jaxft_steps(task, [dtype, "xla"])
    steps.run(3)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            steps.run(STEPS)
        (path,) = Path(folder).rglob("*.xplane.pb")
        kernels = list(device_kernels(ProfileData.from_file(str(path))))
    if not kernels:
        return {"skipped": "the trace has no kernels"}
    return figures(kernels, STEPS, sources(steps.compiled().as_text()))


def kernels(settings: Settings, seconds: float) -> dict[str, Any]:
    """Traces the step at batch 256 and at 64, in a process each."""
    if not settings.gpu and not settings.toy:
        raise Skipped("there is no GPU; --toy traces a small step on a CPU")
    batches = (8,) if settings.toy else (256, 64)
    skipped = ""
    for position, batch in enumerate(batches):
        task = make_task(settings, "train", batch, "bfloat16")._replace(needs_gpu=settings.gpu)
        if settings.toy:
            task = task._replace(width=8)
        env = cache_environment(settings.cache)
        command = ["benchmarks.gpu.kernels", json.dumps(task._asdict()), "bfloat16"]
        try:
            found = run_child(command, seconds / (len(batches) - position), env)
        except Skipped as error:
            skipped = str(error)
            continue
        settings.results[f"train {batch} bfloat16"] = found
        by_class = ", ".join(f"{name} {ms:.2f}" for name, ms in found["ms_by_class"].items())
        say(
            f"kernels: train {batch} bfloat16: {found['busy_ms']:.2f} ms busy of {found['span_ms']:.2f} traced per "
            f"step, {found['kernels']:.0f} kernels; ms by class: {by_class}"
        )
        for each in found["most"]:
            origin = f", from {each['from']}" if "from" in each else ""
            name = each["kernel"][:70]
            say(f"  {each['ms']:.3f} ms x {each['launches']:g}  {name} ({each['class']}{origin})")
    if skipped and not settings.results:
        raise Skipped(skipped)
    return {"reason": skipped} if skipped else {}


def main(argv: Sequence[str]) -> None:
    try:
        result = trace(Task(**json.loads(argv[0])), argv[1])
    except SystemExit as error:  # JAX finds no GPU
        result = {"skipped": str(error)}
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
