"""Measures the kernels of pointwise.py on a GPU against XLA's passes and products, on a ResNet-50's layers at 224 px.

    python -m benchmarks.kernels [--json] [--batches 256,64] [--seconds 90] [--toy] | --bytes | --compile h100

For each shape, those with the most bytes to save first, until the time is up: milliseconds of each kernel with its best
tile and of XLA's formulation, their ratio, and how far apart the results are. "layer" sums up: XLA computes the norm's
gradient once for both products. The last line is one JSON object; --json prints nothing else. --toy: small shapes in
Pallas' interpret mode, whose times mean nothing. --bytes: the predicted traffic, by arithmetic. --compile: compiles all
kernels for a GPU that this machine does not have, which needs jax[cuda13] 0.12.
"""

import json
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.kernels import plain, pointwise
from benchmarks.kernels.layers import SHAPES, Layer, Shape, random_layer, saved, traffic
from jaxft.errors import ArgumentParser, run_command

TILES = (pointwise.Tile(), pointwise.Tile(outputs=64, warps=4))
TOY_TILE = pointwise.Tile(32, 16, 16)
TOY_SHAPES = (Shape("layer1.conv3", 3, 16, 32, 1), Shape("layer1.conv1", 3, 32, 16, 1))
TURN = 0.03  # seconds of repeated calls; the best of three turns counts
STEP = 0.0404, 256  # NOTES: Where a train step of 256 images spends its time (docs/notes/gpu.md): seconds, images
# NOTES: Variants of the step on an H100 (docs/notes/accelerators.md)
PROGRAM = 355.4e6, 3.0e12  # bytes per image and bytes per second
TOLERANCE = 2**-7  # two roundings to bfloat16, of the largest value
# Of the values beyond the tolerance: a ReLU's mask flips where float32's rounding decides about zero.
FEW = 1e-5

Calls = dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]


def calls(module: Any, shape: Shape, layer: Layer) -> Calls:
    """Returns the three computations of a layer, of `pointwise` or of `plain`, with their arguments."""
    before = None if shape.starts_block else layer.before
    # Any arrays of the right size do as the shortcut's gradient and the block's end.
    block_end = (layer.x, layer.x) if shape.starts_block else None
    relu = shape.starts_block  # the norm after conv1 has a ReLU; that after conv3 is followed by the shortcut
    return {
        "forward": (module.forward, (layer.x, layer.kernel, before, layer.after[0].mean)),
        "input_gradient": (
            partial(module.input_gradient, relu=relu),
            (layer.g, layer.y, layer.kernel, layer.x, layer.after, layer.before, block_end),
        ),
        "kernel_gradient": (
            partial(module.kernel_gradient, relu=relu),
            (layer.x, layer.g, layer.y, before, layer.after),
        ),
    }


def milliseconds(function: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
    """Returns the time of one call among many, on the device."""

    def turn(number: int) -> float:
        started = time.perf_counter()
        results = [function(*arguments) for _ in range(number)]
        jax.block_until_ready(results)
        return time.perf_counter() - started

    number = min(max(int(TURN / turn(1)), 1), 20)  # each call's results are in memory until the end
    return 1e3 * min(turn(number) for _ in range(3)) / number


def difference(result: Any, expected: Any) -> dict[str, float]:
    """Returns the largest difference relative to the largest value, and the share of values beyond the tolerance."""
    worst, share = 0.0, 0.0
    for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        apart = jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32)) / jnp.abs(b).max().astype(jnp.float32)
        worst = max(worst, float(apart.max()))
        share = max(share, float((apart > TOLERANCE).mean()))
    return {"largest_difference": worst, "share_beyond_tolerance": share}


def measure_shape(shape: Shape, batch: int, dtype: np.dtype, tiles: tuple[pointwise.Tile, ...], interpret: bool) -> Any:
    layer = random_layer(batch * shape.side**2, shape.inputs, shape.outputs, dtype)
    ours, xlas = calls(pointwise, shape, layer), calls(plain, shape, layer)
    result: dict[str, Any] = {"correct": True}
    for name, (function, arguments) in xlas.items():
        compiled = jax.jit(function)
        expected = compiled(*arguments)
        part: dict[str, Any] = {"xla_ms": milliseconds(compiled, arguments)}
        for tile in tiles:
            try:
                kernel = jax.jit(partial(ours[name][0], tile=tile, interpret=interpret))
                found = difference(kernel(*ours[name][1]), expected)
                spent = milliseconds(kernel, ours[name][1])
            except Exception as error:  # a tile that needs too much shared memory, or a backend that is gone
                part.setdefault("failed", {})[str(list(tile))] = str(error).splitlines()[0][:150]
                continue
            if spent < part.get("ms", np.inf):
                part |= {"ms": spent, "tile": list(tile), **found}
        if "ms" not in part:
            result["correct"] = False
        else:
            part["ratio"] = part["xla_ms"] / part["ms"]
            result["correct"] &= part["share_beyond_tolerance"] <= FEW
        result[name] = part
    # By itself, the kernel gradient repeats the passes that XLA's step has done for forward and the input gradient.
    products = jax.jit(lambda x, g: plain._dot(x.T, g))
    product = milliseconds(products, (layer.x, layer.g))
    xla = result["forward"]["xla_ms"] + result["input_gradient"]["xla_ms"] + product
    kernels = sum(result[name].get("ms", np.inf) for name in ours)
    result["layer"] = {"xla_ms": xla, "ms": kernels, "ratio": xla / kernels, "saved_ms_per_step": xla - kernels}
    result["layer"]["saved_ms_per_step"] *= shape.number
    return result


def measure(batches: list[int], seconds: float, toy: bool, quiet: bool) -> dict[str, Any]:
    device = jax.devices()[0]
    if not toy and device.platform != "gpu":
        return {"skipped": "JAX finds no GPU; --toy runs the kernels in interpret mode"}
    if not quiet:
        print(device.device_kind, jax.__version__, flush=True)
    until = time.monotonic() + seconds
    results: dict[str, Any] = {"device": device.device_kind, "jax": jax.__version__, "correct": True, "left_out": []}
    for batch in batches:
        for shape in TOY_SHAPES if toy else sorted(SHAPES, key=saved, reverse=True):
            key = f"{shape.name} {batch}"
            if time.monotonic() > until:
                results["left_out"].append(key)
                continue
            tiles = (TOY_TILE,) if toy else TILES
            results[key] = found = measure_shape(shape, batch, jnp.dtype("bfloat16"), tiles, interpret=toy)
            results["correct"] &= found["correct"]
            if not quiet:
                ratios = "  ".join(f"{name} {found[name].get('ratio', 0):.2f}" for name in (*traffic(shape), "layer"))
                print(f"{key:20} {ratios}  {'' if found['correct'] else 'WRONG'}", flush=True)
    return rounded(results)


def rounded(value: Any) -> Any:
    """Rounds all floats of a JSON value to four digits; infinity becomes None."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, float):
        return float(f"{value:.4g}") if np.isfinite(value) else None
    return value


def predict() -> dict[str, Any]:
    """Returns the predicted traffic in MB per image, by shape, and what the step would save."""
    result: dict[str, Any] = {}
    for shape in SHAPES:
        moved = {name: [round(each / 1e6, 2) for each in pair] for name, pair in traffic(shape).items()}
        result[shape.name] = {"number": shape.number, **moved, "saved": saved(shape) / 1e6}
    (seconds, images), (program, rate) = STEP, PROGRAM
    for name, with_backward in (("all", True), ("forward and recomputation", False)):
        less = sum(saved(shape, with_backward) for shape in SHAPES)
        result[name] = {
            "saved": less / 1e6,
            "images_per_second_by_bytes": rate / (program - less),
            "images_per_second_from_the_measured_step": images / (seconds - images * less / rate),
        }
    return rounded(result)


def compile_for(target: str, batches: list[int]) -> dict[str, str]:
    """Compiles every kernel, shape and tile for a GPU; "ok" or the first line of the error."""
    from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec, use_abstract_mesh

    from benchmarks.accelerators import devices_of

    jax.config.update("jax_platforms", "cpu")  # else JAX would search for the GPU
    device = devices_of(target)[0]
    sharding = NamedSharding(jax.sharding.Mesh(np.array([device]), ("data",)), PartitionSpec())
    # Pallas asks the mesh what it compiles for; Auto, since explicit axes do not go with arrays inside a kernel.
    abstract = AbstractDevice(device.device_kind, 132, "gpu")  # type: ignore[call-arg, unused-ignore]  # jax 0.12's
    mesh = AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=abstract)
    result: dict[str, str] = {}
    for batch in batches:
        for shape in SHAPES:
            sides = batch * shape.side**2, shape.inputs, shape.outputs
            layer = jax.eval_shape(partial(random_layer, *sides, jnp.dtype("bfloat16")))
            layer = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), layer)
            for name, (function, arguments) in calls(pointwise, shape, layer).items():
                for tile in TILES:
                    key = f"{shape.name} {batch} {name} {list(tile)}"
                    try:
                        with use_abstract_mesh(mesh):
                            traced = jax.jit(partial(function, tile=tile)).trace(*arguments)
                            lowered = traced.lower(lowering_platforms=("cuda",))
                        lowered.compile({"xla_gpu_autotune_level": 0})
                        result[key] = "ok"
                    except Exception as error:  # JAX and XLA raise several kinds
                        result[key] = str(error).splitlines()[0][:200]
                    print(key, result[key], flush=True)
    return result


def main(argv: list[str]) -> None:
    parser = ArgumentParser("python -m benchmarks.kernels", __doc__)
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    parser.add_argument("--batches", default="256,64")
    parser.add_argument("--seconds", type=float, default=90, help="starts no further shape after this time")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--bytes", action="store_true")
    parser.add_argument("--compile", metavar="TARGET", help="h100 or h200")
    args = parser.parse_args(argv)
    batches = [2] if args.toy else [int(batch) for batch in args.batches.split(",")]
    warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated")
    result: dict[str, Any]
    if args.bytes:
        result = predict()
    elif args.compile:
        compiled = compile_for(args.compile, batches)
        failed = {key: text for key, text in compiled.items() if text != "ok"}
        result = {"compiled": len(compiled) - len(failed), "failed": failed}
    else:
        result = measure(batches, args.seconds, args.toy, args.json)
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
