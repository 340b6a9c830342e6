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

(graphs: CUDA graphs, by torch.compile's mode "reduce-overhead".) Contenders share its memory.
"""

import argparse
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from itertools import repeat
from pathlib import Path
from typing import Any

from jaxft import process

CONTENDERS = ("jaxft-float32", "jaxft-bfloat16", "jaxft-float32-xla", "torch-float32", "torch-bfloat16")
NUM_CLASSES = 10
Steps = Callable[[int], float]  # makes this many steps and returns a value of the last one


def jaxft_steps(arch: str, size: int, batch: int, which: str, width: int, options: list[str]) -> Steps:
    """Makes steps as `python -m jaxft.train` does: on a CPU several per call."""
    import jax
    import numpy as np
    import optax

    from jaxft.config import default_config
    from jaxft.data.batches import Batch, Examples, replicate
    from jaxft.models.partition import make_policy
    from jaxft.models.resnet import make_model
    from jaxft.ops import onednn
    from jaxft.process import disable_compilation_cache, set_up
    from jaxft.training.evaluation import pmap_eval_steps
    from jaxft.training.loop import pmap_train_steps
    from jaxft.training.state import create_train_state
    from jaxft.training.steps import EvalConfig, make_step_config
    from jaxft.training.steps_per_call import choose_steps_per_call, stack_batches
    from jaxft.transforms.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing

    set_up()
    config = default_config()
    config.update(image_size=size, batch_size=batch)
    config.model.update(arch=arch, width=width, dtype=options[0])
    if "frozen" in options:
        config.model.batch_norm = "frozen"
    model = make_model(config.model, NUM_CLASSES)
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
    train = which == "train"
    per_call = choose_steps_per_call(config, model, train=train)
    p_train_steps = pmap_train_steps(make_step_config(config, model, policy, tx, preprocessing))
    p_eval_steps = pmap_eval_steps(EvalConfig(model, preprocessing, policy))

    def steps(number: int) -> float:
        nonlocal state
        loss: Any = None
        for call, count in stack_batches(batches, number, per_call):
            if train:
                state, counts = p_train_steps(state, examples, call, None, per_call.scan_length(count))
                loss = counts.loss
            else:
                loss = p_eval_steps(state, examples, call, per_call.scan_length(count)).loss
        return float(np.sum(loss))

    return steps


def torch_steps(arch: str, size: int, batch: int, which: str, width: int, options: list[str]) -> Steps:
    """The same in PyTorch, channels_last, autocast for bfloat16."""
    from tests.helpers.reference import torch, torchvision

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = getattr(torchvision.models, arch)(num_classes=NUM_CLASSES, width_per_group=width)
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=device == "cuda")
    image = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    label = torch.randint(NUM_CLASSES, (batch,), device=device)
    autocast = torch.autocast(device, torch.bfloat16, enabled="bfloat16" in options)
    graphs = "graphs" in options
    run = torch.compile(model, mode="reduce-overhead" if graphs else None) if "compile" in options else model

    def train() -> Any:
        if graphs:
            torch.compiler.cudagraph_mark_step_begin()
        optimizer.zero_grad()
        with autocast:
            loss = torch.nn.functional.cross_entropy(run(image), label)
        loss.backward()
        optimizer.step()
        return loss.detach()

    def forward() -> Any:
        with torch.no_grad(), autocast:
            return run(image).float().sum()

    model.train(which == "train")
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d) and "frozen" in options:
            module.eval()
    step = train if which == "train" else forward

    def steps(number: int) -> float:
        for _ in range(number - 1):
            step()
        return float(step())

    return steps


def peak_memory(library: str) -> float:
    """Returns the peak memory in bytes: of the GPU, if there is one, else of the process."""
    if library == "jaxft":
        import jax

        of_device = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    else:
        import torch

        of_device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return of_device or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10


def work(name: str, arch: str, size: int, batch: int, which: str, width: int, number: int) -> None:
    """Runs a contender: a first step, then `number` steps per line on stdin; prints seconds per step as JSON."""
    library, *options = name.split("-")
    started = time.perf_counter()
    steps = {"jaxft": jaxft_steps, "torch": torch_steps}[library](arch, size, batch, which, width, options)
    built = time.perf_counter()
    steps(1)
    print(json.dumps({"build_seconds": built - started, "first_step_seconds": time.perf_counter() - built}), flush=True)
    for _ in sys.stdin:
        steps(1)
        started, cpu = time.perf_counter(), time.process_time()
        steps(number)
        print(json.dumps([(time.perf_counter() - started) / number, (time.process_time() - cpu) / number]), flush=True)
    print(json.dumps(peak_memory(library) / 2**20))


def compare(arch: str, size: int, batch: int, which: str, width: int, args: argparse.Namespace) -> dict[str, Any]:
    """Returns each contender's images/s (median and quartiles), seconds to start and memory."""
    task = [arch, str(size), str(batch), which, str(width), str(args.steps_per_turn)]
    children: dict[str, subprocess.Popen[str]] = {}
    result: dict[str, Any] = {}
    for name in args.contenders:
        command = [sys.executable, "-m", "benchmarks.train_step", "--contender", name, *task]
        log = None if args.verbose else subprocess.DEVNULL
        child = subprocess.Popen(
            ["taskset", "--cpu-list", args.cores, *command] if args.cores else command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=process.environment() | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},  # a GPU's memory is shared
            text=True,
        )
        assert child.stdout
        line = child.stdout.readline()
        if line:
            children[name], result[name] = child, json.loads(line)
        else:
            result[name] = {"failed": child.wait()}
    seconds: dict[str, list[list[float]]] = {name: [] for name in children}
    for _ in range(args.rounds + 1):
        for name, child in children.items():
            assert child.stdin and child.stdout
            print(file=child.stdin, flush=True)
            seconds[name].append(json.loads(child.stdout.readline()))
    for name, child in children.items():
        assert child.stdin and child.stdout
        child.stdin.close()
        wall, cpu = zip(*seconds[name][1:], strict=True)  # the first turn warms up
        fast, median, slow = statistics.quantiles(wall, n=4, method="inclusive")
        result[name] |= {
            "images_per_second": round(batch / median, 2),
            "quartiles": [round(batch / slow, 2), round(batch / fast, 2)],
            "best": round(batch / min(wall), 2),
            "images_per_cpu_second": round(batch / statistics.median(cpu), 2),
            "peak_memory_mib": round(json.loads(child.stdout.readline())),
        }
        child.wait()
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
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "torch", "torchvision")},
        "python": platform.python_version(),
    }


def main() -> None:
    if sys.argv[1:2] == ["--contender"]:
        name, arch, size, batch, which, width, steps = sys.argv[2:]
        return work(name, arch, int(size), int(batch), which, int(width), int(steps))
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
            results[f"{which} {task}"] = compare(args.arch, pixels, images, which, args.width, args)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
