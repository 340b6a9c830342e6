"""Compiles jaxft's steps for a TPU or a GPU that this machine does not have, and inspects the programs.

    pip install libtpu, or 'jax[cuda13]'
    python -m benchmarks.accelerators --target v5e:2x4|v6e:2x2|v5p:2x2x1|h100|h200 [--config configs/cifar10.py] \
        [--devices 1] [--batch 64] [--steps train,evaluation] [--hlo DIR] [--config.KEY=VALUE ...] \
        [--formulation NAME | --variants [NAME,...]]

Compiler and program are the accelerator's own. For a TPU the benchmark sums the cycles that the compiler expects of
each part; it gives none for a max-pool's gradient. For a GPU, whose kernels cannot be tuned without one, it sums the
bytes that kernels read and write, since memory bounds them. Both are predictions. --batch: images per device.
--devices: the number of the target's devices to use. --formulation: one of benchmarks/kernels/formulations.py.
--config.model.arch=vit_small_patch16_224 compiles a ViT, for example.

--variants compiles each variant of benchmarks/gpu/variant_table.py, or those named, in a process of its own, because an
unknown XLA flag aborts the process. It prints a line for each, and one JSON object at the end.
"""

import json
import math
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

# libtpu would ask the cloud which machine this is, and JAX would search for the accelerator.
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu"}

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from benchmarks.gpu.variant_table import VARIANTS, Variant
from benchmarks.kernels import formulations
from jaxft.config import load_config, parse_overrides
from jaxft.data.batches import Batch, Examples
from jaxft.errors import ArgumentParser, UserError, run_command
from jaxft.models.build import make_model
from jaxft.models.partition import make_policy
from jaxft.training.loop import pmap_train_steps
from jaxft.training.optimizer import make_optimizer
from jaxft.training.state import abstract_train_state
from jaxft.training.steps import EvalConfig, eval_step, make_step_config, map_batches
from jaxft.transforms.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing

CIFAR10 = (50_000, 32, 32, 3)
CHILD_SECONDS = 300  # one variant compiles in 10 to 30 s on two cores
HERTZ = {  # from the makers' figures of bfloat16 products per second, and units of 128x128 (v6e: 256x256)
    "TPU v4": 1.05e9,  # 275e12 of 8, four in each core, which is a device here
    "TPU v5 lite": 1.5e9,  # 197e12 of 4 units
    "TPU v5": 1.75e9,  # 459e12 of 8
    "TPU v6 lite": 1.75e9,  # 918e12 of 4
}
GPUS = {  # name, bytes per second by the maker's figures, bytes of memory
    "h100": ("NVIDIA H100 80GB HBM3", 3.35e12, 85e9),
    "h200": ("NVIDIA H200", 4.8e12, 151e9),
}
# NOTES: Predictions compared with the measurement (docs/notes/gpu.md). The H100's is that of its norms, 2.9 to 3.1 TB/s
# in a profile; the H200's is a measured copy.
BYTES_PER_SECOND = {"NVIDIA H100 80GB HBM3": 3.0e12, "NVIDIA H200": 4.3e12}
LAYERS = "attn|mlp|norm|patch_embed|conv|bn|downsample|fc|reduce_window"  # kinds of layers: the first one in a path
BYTES = {"pred": 1, "u8": 1, "s8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}


def devices_of(target: str) -> list[Any]:
    """Returns the devices of a topology that need not exist here: v5e:2x4 has eight TPU chips."""
    if target not in GPUS:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=target).devices)
    name, bytes_per_second, memory = GPUS[target]
    description = f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bytes_per_second:.0f} l2_cache_size: 52428800 device_memory_size: {memory:.0f}
  cuda_compute_capability {{ major: 9 }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  device_vendor: "NVIDIA Corporation" name: "{name}"
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{name}"
"""
    return list(topologies.get_topology_desc("", "cuda", target_config=description, topology="1x1x8").devices)


def compile_step(config: Any, which: str, devices: list[Any], share: int) -> Any:
    """Compiles one step with `share` images per device, and with all of CIFAR-10's training images on the devices."""
    model = make_model(config.model, num_classes=10, formulation=devices[0].platform)
    policy = make_policy(config, model, config.num_epochs)
    tx = make_optimizer(config.optimizer, steps_per_epoch=1, num_epochs=1, parts=model.parts)
    state = abstract_train_state(model, tx, policy, ema=config.optimizer.ema_decay > 0)
    preprocessing = Preprocessing(config.image_size, IMAGENET_MEAN, IMAGENET_STD)
    shapes = jax.ShapeDtypeStruct
    examples = jax.eval_shape(Examples.packed, shapes(CIFAR10, jnp.uint8), shapes(CIFAR10[:1], jnp.int32))
    index = shapes((len(devices), 1, share), jnp.int32)
    batch = jax.eval_shape(Batch, index, index, shapes(index.shape, jnp.float32))
    if which == "train":
        steps = pmap_train_steps(make_step_config(config, model, policy, tx, preprocessing), devices)
        lowered = steps.lower(state, examples, batch, None, None)
    else:
        step = partial(map_batches, step=eval_step, config=EvalConfig(model, preprocessing, policy))
        in_axes = (None, None, 0)
        p_step = jax.pmap(step, axis_name=policy.axis_name, in_axes=in_axes, out_axes=None, devices=devices)
        lowered = p_step.lower(state, examples, batch)
    # Autotuning needs a GPU.
    return lowered.compile({"xla_gpu_autotune_level": 0} if devices[0].platform == "gpu" else None)


def bytes_of(shape: str) -> int:
    """Returns the bytes of a shape in HLO's notation, also of tuples: f32[2,3]{1,0} has 24."""
    return sum(
        BYTES[dtype] * math.prod(int(side) for side in sides.split(",") if side)
        for dtype, sides in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shape)
        if dtype in BYTES
    )


def kernels(hlo: str) -> Iterator[tuple[str, int]]:
    """Yields the kernels of a GPU's program: the name without its number, and the bytes that it reads and writes.

    A kernel that gathers images from the dataset reads as much as it writes.
    """
    sizes: dict[str, int] = {}
    for line in hlo[hlo.index("\nENTRY") :].splitlines():
        found = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)", line)
        if not found:
            continue
        name, shape, operation, rest = found.groups()
        sizes[name] = bytes_of(shape)
        if operation in ("parameter", "constant", "get-tuple-element", "bitcast", "tuple"):
            continue
        operands = [sizes.get(operand, 0) for operand in re.findall(r"%([\w.\-]+)", rest.split("), ")[0])]
        is_gather = max(operands, default=0) == math.prod(CIFAR10)
        read = sizes[name] if is_gather else sum(operands)
        target = re.search(r'custom_call_target="([^"]*)"', rest)
        yield target[1] if target else re.sub(r"[._\d]+$", "", name), read + sizes[name]


def cycles(hlo: str) -> Iterator[tuple[str, int]]:
    """Yields the parts of a TPU's program: the layer they belong to, and the cycles that the compiler expects."""
    for line in hlo.splitlines():
        expected = re.search(r'"estimated_cycles":"(\d+)"', line)
        if not expected:
            continue
        path = re.search(r'op_name="([^"]*)"', line)
        of = path[1] if path else ""
        layer = re.search(LAYERS, of.rpartition("_features")[2])
        kind = layer[0] if layer else "copy" if re.match(r"\s*(ROOT )?%?copy", line) else "other"
        yield f"{'backward' if 'transpose(' in of else 'forward'} {kind}", int(expected[1])


def inspect(compiled: Any, device: Any, images: int) -> dict[str, Any]:
    """Returns a program's predicted speed, its memory and its most expensive parts. images: per device."""
    hlo = compiled.as_text()
    total: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for name, cost in (kernels if device.platform == "gpu" else cycles)(hlo):
        total[name] += cost
        count[name] += 1
    memory = compiled.memory_analysis()
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    cost = sum(total.values())
    if device.platform == "gpu":
        rate = BYTES_PER_SECOND[device.device_kind]
        figures = {"kernels": sum(count.values()), "megabytes_per_picture": round(cost / images / 1e6, 1)}
        each = {name: round(part / images / 1e6, 1) for name, part in total.most_common(12)}
    else:
        rate = HERTZ.get(device.device_kind, 0)
        figures = {"megacycles": round(cost / 1e6, 2)}
        each = {name: round(part / 1e6, 2) for name, part in total.most_common(12)}
    return {
        **figures,
        "pictures_per_second": round(images * rate / cost),
        "memory_gib": round(needed / 2**30, 2),
        "most": each,
    }


def predict_variant(variant: Variant, arguments: list[str]) -> dict[str, Any]:
    """Returns the child's results, or {"failed": the end of its standard error}. arguments: of this command."""
    keys = [f"--config.{key}={value}" for key, value in variant.overrides.items()]
    formulation = ["--formulation", variant.formulation] if variant.formulation else []
    command = [sys.executable, "-m", "benchmarks.accelerators", *arguments, *keys, *formulation]
    environment = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {variant.flags}".strip()}
    try:
        child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=CHILD_SECONDS)
    except subprocess.TimeoutExpired:
        return {"failed": f"not compiled within {CHILD_SECONDS} s"}
    if child.returncode:
        lines = [line for line in child.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if re.search(r"Unknown flag|[Ee]rror|Check failed|^F\d", line)]
        return {"failed": (errors or lines or [f"exit code {child.returncode}"])[-1][:200]}
    result: dict[str, Any] = json.loads(child.stdout)
    return result


def predict_variants(names: list[str], arguments: list[str]) -> None:
    """Prints a line for each variant and step, and one JSON object at the end."""
    results: dict[str, Any] = {}
    for name in names:
        results[name] = predicted = predict_variant(VARIANTS[name], arguments)
        if "failed" in predicted:
            print(f"{name:26} failed: {predicted['failed']}", flush=True)
        for step in ("train", "evaluation"):
            if step in predicted:
                print(f"{name:26} {step:10} {predicted_row(predicted[step])}", flush=True)
    print(json.dumps(results))


def predicted_row(step: dict[str, Any]) -> str:
    traffic = step.get("megabytes_per_picture", step.get("megacycles"))
    return (
        f"{traffic:7} {step.get('kernels', ''):5} {step['memory_gib']:6} GiB {step['pictures_per_second']:7} images/s"
    )


def main(argv: list[str]) -> None:
    parser = ArgumentParser("python -m benchmarks.accelerators", __doc__)
    parser.add_argument("--target", default="v5e:2x4")
    parser.add_argument("--config", default="configs/cifar10.py")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", default="train,evaluation")
    parser.add_argument("--hlo", type=Path, help="a folder for the compiled programs")
    parser.add_argument("--formulation", choices=formulations.FORMULATIONS)
    parser.add_argument("--variants", nargs="?", const=",".join(VARIANTS), help="names; without one: all")
    args, rest = parser.parse_known_args(argv)
    if args.variants is not None:
        names = args.variants.split(",")
        unknown = sorted(set(names) - set(VARIANTS))
        if unknown:
            raise UserError(f"there is no variant {unknown[0]!r}; there are {', '.join(VARIANTS)}")
        options = [f"--{key}={vars(args)[key]}" for key in ("target", "config", "devices", "batch", "steps")]
        return predict_variants(names, [*options, *rest])
    formulations.apply(args.formulation or "")
    config = load_config(args.config, parse_overrides(rest))
    try:
        devices = devices_of(args.target)[: args.devices]
    except Exception as error:  # JAX raises several kinds
        what = f"there is no compiler for {args.target} ({error}): pip install libtpu, or 'jax[cuda13]'"
        raise UserError(what) from error
    results: dict[str, Any] = {"device": devices[0].device_kind, "devices": len(devices), "batch": args.batch}
    for which in args.steps.split(","):
        started = time.perf_counter()
        compiled = compile_step(config, which, devices, args.batch)
        seconds = time.perf_counter() - started
        if args.hlo:
            args.hlo.mkdir(parents=True, exist_ok=True)
            (args.hlo / f"{args.target.replace(':', '-')}-{which}-{args.batch}.txt").write_text(compiled.as_text())
        results[which] = inspect(compiled, devices[0], args.batch) | {"seconds_to_compile": round(seconds)}
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
