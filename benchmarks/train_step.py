"""Compares jaxft's train and evaluation steps with PyTorch's on the same work, taking turns: images/s as JSON.

    python -m benchmarks.train_step [--arch resnet50] [--work 64x32,224x16] [--steps train,forward] \
        [--contenders jaxft-float32,torch-float32,...] [--rounds 9] [--steps_per_turn 6]

Each contender is a process of its own that keeps its compiled step. They run one after the other, round by round, so
that other load on the machine affects all of them alike. In its turn each makes one step to warm up, which does not
count, and then --steps_per_turn steps, and waits only for the last. All have their memory in huge pages, as
jaxft's commands do. PyTorch's threads wait for each other by spinning, so on a busy machine only images per second of
CPU time on one core are comparable: --cores 0. Work is pixels x batch size. A train step is forward, backward and SGD
with momentum (jaxft's from uint8 images, PyTorch's from normalised ones, channels_last); a forward step is evaluation
without gradients. On a CPU, jaxft's convolutions are oneDNN's except for jaxft-float32-xla; torch-float32-compile takes
minutes to compile. With -frozen (jaxft-bfloat16-frozen) norms keep their statistics.

Runs on whatever device JAX and PyTorch find; on a GPU, where PyTorch's optimizer is fused, for instance:

    python -m benchmarks.train_step --work 224x64,224x256 --steps_per_turn 20 \
        --contenders jaxft-bfloat16,torch-bfloat16,torch-bfloat16-compile,torch-bfloat16-compile-graphs

(graphs: CUDA graphs, by torch.compile's mode "reduce-overhead".) Contenders share its memory. There, PyTorch has
cudnn.benchmark and, for float32, TF32.
"""

import argparse
import importlib.util
import json
import os
import platform
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.child import Child
from jaxft import process

CONTENDERS = ("jaxft-float32", "jaxft-bfloat16", "jaxft-float32-xla", "torch-float32", "torch-bfloat16")
LIBRARIES = ("jax", "jaxlib", "flax", "torch", "torchvision", "timm")
NUM_CLASSES = 10
NUM_CHECKED = 20  # steps after which a contender reports its loss


class Task(NamedTuple):
    """Work of a contender, handed to its process as JSON."""

    arch: str = "resnet50"
    size: int = 224
    batch: int = 256
    which: str = "train"  # or "forward"
    width: int = 64  # other than 64: for jaxft only
    number: int = 6  # steps per turn
    overrides: Mapping[str, Any] = {}  # jaxft's config keys
    formulation: str = ""  # jaxft's, or prototypes in benchmarks/kernels/formulations.py, joined by +
    is_gated: bool = False  # wait for a line on stdin before the kernels are chosen, by timing them on the GPU
    needs_gpu: bool = False  # fail, rather than compute on the CPU


class Steps(NamedTuple):
    """A contender's compiled step."""

    run: Callable[[int], Any]  # makes this many steps and returns the mean losses of its last call of several
    at_once: int = 1  # steps in a call
    warm_up: Callable[[], Any] = lambda: None  # chooses the GPU's kernels before the step is compiled
    compiled: Callable[[], Any] = lambda: None  # the program of a train step, if JAX's; to be called after a step


# Long, because it sets up a run as `jaxft.train` does, step by step.
def jaxft_steps(task: Task, options: list[str]) -> Steps:
    """Makes steps as `python -m jaxft.train` does: on a CPU several per call."""
    import jax
    import numpy as np
    import optax

    from jaxft.config import default_config
    from jaxft.data.batches import Batch, Examples, replicate
    from jaxft.models.build import make_model
    from jaxft.models.partition import make_policy
    from jaxft.ops import onednn
    from jaxft.process import disable_compilation_cache, set_up
    from jaxft.training.evaluation import pmap_eval_steps
    from jaxft.training.loop import pmap_train_steps
    from jaxft.training.state import create_train_state
    from jaxft.training.steps import EvalConfig, make_step_config
    from jaxft.training.steps_per_call import choose_steps_per_call, stack_batches
    from jaxft.transforms.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing

    set_up()
    if task.needs_gpu and jax.default_backend() != "gpu":
        sys.exit("JAX finds no GPU")
    size, batch = task.size, task.batch
    config = default_config()
    config.update(image_size=size, batch_size=batch)
    config.model.update(arch=task.arch, width=task.width, dtype=options[0])
    if "frozen" in options:
        config.model.batch_norm = "frozen"
    config.update_from_flattened_dict(task.overrides)
    model = make_model(config.model, NUM_CLASSES)
    if task.formulation in ("plain", "gpu", "tpu", "cpu"):
        model = model.clone(formulation=task.formulation)
    elif task.formulation:
        from benchmarks.kernels.formulations import apply

        for name in task.formulation.split("+"):
            apply(name)
    if model.formulation == "cpu" and onednn.is_worthwhile("never" if "xla" in options else "always", 0):
        disable_compilation_cache()
        model = model.clone(formulation="cpu-onednn")
    policy = make_policy(config, model, 1)
    tx = optax.sgd(0.01, momentum=0.9)
    preprocessing = Preprocessing(size, IMAGENET_MEAN, IMAGENET_STD)
    random = np.random.default_rng(0)
    examples = replicate(
        Examples.packed(
            random.integers(0, 256, (batch, size, size, 3), np.uint8),
            random.integers(0, NUM_CLASSES, batch, np.int32),
        )
    )
    index = np.arange(batch, dtype=np.int32).reshape(jax.local_device_count(), -1)
    batches = repeat(Batch(index, index, np.ones(index.shape, np.float32)))
    state = replicate(jax.jit(partial(create_train_state, model, tx, policy=policy))(jax.random.key(0)))
    train = task.which == "train"
    per_call = choose_steps_per_call(config, model, train=train)
    p_train_steps = pmap_train_steps(make_step_config(config, model, policy, tx, preprocessing))
    p_eval_steps = pmap_eval_steps(EvalConfig(model, preprocessing, policy))

    def run(number: int) -> Any:
        nonlocal state
        loss: Any = None
        count = 0
        for call, count in stack_batches(batches, number, per_call):
            if train:
                state, counts = p_train_steps(state, examples, call, None, per_call.scan_length(count))
                loss = counts.loss
            else:
                loss = p_eval_steps(state, examples, call, per_call.scan_length(count)).loss
        loss = np.asarray(loss)
        return (loss[:count] if train else loss.sum(keepdims=True).ravel() / count) / batch

    def compiled() -> Any:
        call, count = next(stack_batches(batches, per_call.steps, per_call))
        return p_train_steps.lower(state, examples, call, None, per_call.scan_length(count)).compile()

    return Steps(run, 1 if per_call.padded else per_call.steps, compiled=compiled if train else lambda: None)


def is_timms(arch: str) -> bool:
    """Returns whether timm has the network and torchvision has not."""
    timms = r"(test|deit|vit_(tiny|small|base|large)|convnextv2|convnext_(atto|femto|pico|nano)|seres|resnet\d+[cdst])"
    return bool(re.match(timms, arch))


def torch_model(task: Task) -> Any:
    """Makes the network with random weights: torchvision's, if it has it, else timm's."""
    from tests.helpers.reference import torchvision

    if not is_timms(task.arch):
        options: dict[str, Any] = {"image_size": task.size} if task.arch.startswith("vit") else {}
        options |= {} if task.width == 64 else {"width_per_group": task.width}
        return getattr(torchvision.models, task.arch)(num_classes=NUM_CLASSES, **options)
    import timm

    options = {"img_size": task.size} if re.search("vit|deit", task.arch) else {}
    return timm.create_model(task.arch, num_classes=NUM_CLASSES, **options)


def torch_steps(task: Task, options: list[str]) -> Steps:
    """Makes the same steps in PyTorch, channels_last, autocast for bfloat16."""
    from tests.helpers.reference import torch

    size, batch = task.size, task.batch
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if task.needs_gpu and device == "cpu":
        sys.exit("PyTorch finds no GPU")
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    if device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as cuDNN's convolutions have by default
    model = torch_model(task)
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=device == "cuda")
    image = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    label = torch.randint(NUM_CLASSES, (batch,), device=device)
    autocast = torch.autocast(device, torch.bfloat16, enabled="bfloat16" in options)
    graphs = "graphs" in options
    compiled = torch.compile(model, mode="reduce-overhead" if graphs else None) if "compile" in options else model

    def train(run: Any) -> Any:
        if graphs:
            torch.compiler.cudagraph_mark_step_begin()
        optimizer.zero_grad()
        with autocast:
            loss = torch.nn.functional.cross_entropy(run(image), label)
        loss.backward()
        optimizer.step()
        return loss.detach()

    def forward(run: Any) -> Any:
        if graphs:
            torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad(), autocast:
            return torch.nn.functional.cross_entropy(run(image).float(), label)

    model.train(task.which == "train")
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d) and "frozen" in options:
            module.eval()
    step = train if task.which == "train" else forward

    def run(number: int) -> list[float]:
        for _ in range(number - 1):
            step(compiled)
        return [float(step(compiled))]

    def warm_up() -> None:
        if compiled is not model and device == "cuda":  # cuDNN's choices then stay for the compiled network
            float(step(model))
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    return Steps(run, warm_up=warm_up)


def predicted_memory(compiled: Any) -> int | None:
    """Returns the bytes that a program needs by XLA's analysis, as training/batch_size.py adds them up, if any."""
    memory = compiled and compiled.memory_analysis()
    if not memory:
        return None
    arguments_and_results = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return int(arguments_and_results + memory.temp_size_in_bytes)


def peak_memory(library: str) -> float:
    """Returns the peak memory in bytes: of the GPU, if there is one, else of the process."""
    if library == "jaxft":
        import jax

        of_device = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    else:
        import torch

        of_device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return of_device or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10


def work(name: str, task: Task) -> None:
    """Runs a contender. Prints JSON lines: one when its step is compiled, then one for each line on stdin.

    The first: seconds to build and to make the first step. The others: seconds and seconds of CPU time per step, and
    peak memory in bytes. With is_gated it begins with {"phase": "built"} and waits for a line. It prints {"phase":
    "chosen"} if it has chosen its kernels before it compiles, and it also reports the first mean loss, that of step
    NUM_CHECKED, and the predicted memory in bytes or None.
    """
    library, *options = name.split("-")
    started = time.perf_counter()
    steps = {"jaxft": jaxft_steps, "torch": torch_steps}[library](task, options)
    built = began = time.perf_counter()
    at_once = steps.at_once
    if task.is_gated:
        print(json.dumps({"phase": "built"}), flush=True)
        sys.stdin.readline()
        steps.warm_up()
        began = time.perf_counter()
        if "compile" in options:  # on the CPU, which must not keep others from the GPU
            print(json.dumps({"phase": "chosen"}), flush=True)
    first_loss = steps.run(at_once)[0]
    done = time.perf_counter()
    report: dict[str, Any] = {"build_seconds": built - started, "first_step_seconds": done - began}
    if task.is_gated:
        last = NUM_CHECKED if library == "jaxft" else 4  # the least for CUDA graphs
        more = -(-(last - at_once) // at_once) * at_once
        checked_loss = steps.run(more)[last - at_once - more - 1] if more > 0 else first_loss
        report |= {"first_loss": float(first_loss), "checked_loss": float(checked_loss)}
        report["predicted_memory"] = predicted_memory(steps.compiled())
    print(json.dumps(report), flush=True)
    number = -(-task.number // at_once) * at_once
    for _ in sys.stdin:
        steps.run(at_once)
        started, cpu = time.perf_counter(), time.process_time()
        steps.run(number)
        wall, cpu = time.perf_counter() - started, time.process_time() - cpu
        turn = {"seconds": wall / number, "cpu_seconds": cpu / number, "peak_memory": peak_memory(library)}
        print(json.dumps(turn), flush=True)


def start(name: str, task: Task, env: Mapping[str, str] | None = None, cores: str = "") -> Child:
    """Starts a contender's process. cores: those that it may use, such as 0 or 0-3."""
    command = [sys.executable, "-m", "benchmarks.train_step", "--contender", name, json.dumps(task._asdict())]
    shared = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # a GPU's memory is shared
    return Child(
        ["taskset", "--cpu-list", cores, *command] if cores else command,
        process.environment() | shared | dict(env or {}),
    )


def take_turns(children: Mapping[str, Child], rounds: int, seconds: float) -> dict[str, list[dict[str, float]]]:
    """Lets contenders take turns; returns each one's turns without the first, which warms up, or fewer by time limit.

    A contender that fails keeps the turns that it has had.
    """
    until = time.monotonic() + seconds
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in children}
    failed: set[str] = set()
    for _ in range(rounds + 1):
        for name, child in children.items():
            if name in failed or time.monotonic() > until:
                continue
            child.send()
            try:
                turns[name].append(child.read(max(until - time.monotonic(), 5)))
            except (RuntimeError, TimeoutError):
                failed.add(name)
    return {name: each[1:] for name, each in turns.items()}


def summary(turns: list[dict[str, float]], batch: int) -> dict[str, Any]:
    """Returns images/s (median, quartiles and best) and peak memory of a contender's turns; needs two of them."""
    wall = [turn["seconds"] for turn in turns]
    fast, median, slow = statistics.quantiles(wall, n=4, method="inclusive")
    return {
        "images_per_second": round(batch / median, 2),
        "quartiles": [round(batch / slow, 2), round(batch / fast, 2)],
        "best": round(batch / min(wall), 2),
        "images_per_cpu_second": round(batch / statistics.median(turn["cpu_seconds"] for turn in turns), 2),
        "peak_memory_mib": round(max(turn["peak_memory"] for turn in turns) / 2**20),
    }


def compare(task: Task, args: argparse.Namespace) -> dict[str, Any]:
    """Returns each contender's images/s (median and quartiles), seconds to start and memory."""
    children: dict[str, Child] = {}
    result: dict[str, Any] = {}
    for name in args.contenders:
        child = start(name, task, cores=args.cores)
        try:
            report = child.read(3600)
        except RuntimeError:
            result[name] = {"failed": child.process.wait()}
            print(child.all_errors(), file=sys.stderr)
            continue
        children[name] = child
        result[name] = {key: round(report[key], 2) for key in ("build_seconds", "first_step_seconds")}
    for name, turns in take_turns(children, args.rounds, 3600).items():
        result[name] |= summary(turns, task.batch)
        children[name].close(10)
        if args.verbose:
            print(children[name].all_errors(), file=sys.stderr)
    return result


def machine() -> dict[str, Any]:
    try:
        processor = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[0]
    except (OSError, IndexError):
        processor = platform.processor()
    return {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "versions": {name: version(name) for name in LIBRARIES if importlib.util.find_spec(name)},
        "python": platform.python_version(),
    }


def main() -> None:
    if sys.argv[1:2] == ["--contender"]:
        name, task = sys.argv[2:]
        return work(name, Task(**json.loads(task)))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--width", type=int, default=64, help="other than 64: for jaxft only")
    parser.add_argument("--work", default="64x32,224x16", help="pixels x batch size")
    parser.add_argument("--steps", default="train,forward")
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps_per_turn", type=int, default=6)
    parser.add_argument("--cores", default="", help="cores to use, such as 0 or 0-3; one core on a busy machine")
    parser.add_argument("--verbose", action="store_true", help="show what the contenders write to stderr")
    args = parser.parse_args()
    args.contenders = args.contenders.split(",")
    results: dict[str, Any] = {"arch": args.arch, "machine": machine()}
    for task in args.work.split(","):
        pixels, images = map(int, task.split("x"))
        for which in args.steps.split(","):
            one = Task(args.arch, pixels, images, which, args.width, args.steps_per_turn)
            results[f"{which} {task}"] = compare(one, args)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
