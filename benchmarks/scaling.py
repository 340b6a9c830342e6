"""Measures the cost of more devices on forced CPU devices, and computes it for GPUs and TPUs.

python -m benchmarks.scaling [--rounds 3]

A ResNet-18 of width 8 at 32 pixels, 64 images per step over all devices, with synchronised statistics. The same cores
do the same work however many devices they pretend to be, so the time beyond one device's is the cost of the devices.
Then, by arithmetic only, for a ResNet-50: the bytes that each device sends in a step, and their time compared with the
step's. Prints one JSON line.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys

DEVICES = (1, 2, 4, 8)
STEPS = 12
# Bytes per second that a device can send to a neighbour while it receives as many, by the makers' figures.
LINKS = {"8 x H100, NVLink 4": (8, 450e9), "TPU v4-32, 3D torus": (16, 100e9), "8 GPUs over 100 Gb/s": (8, 12.5e9)}
PARAMETERS = 25_557_032  # of a ResNet-50
STATISTICS = 2 * 26_560  # means and variances of its BatchNorms
PICTURES, RATE = 256, 2500.0  # images per device and images per second of each: assumed, for a GPU in bfloat16


def measure(devices: int) -> None:
    """Prints the median seconds of a step on this many devices."""
    import time
    from functools import partial

    import jax
    import numpy as np
    import optax

    from jaxft.data.batches import Examples, make_batches, replicate
    from jaxft.models.policy import Policy
    from jaxft.models.resnet import BasicBlock, ResNet
    from jaxft.ops.formulation import default_formulation
    from jaxft.training.state import create_train_state
    from jaxft.training.steps import StepConfig, train_step
    from jaxft.transforms.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing

    rng = np.random.default_rng(0)
    examples = Examples(rng.integers(0, 256, (1024, 32, 32, 3), np.uint8), rng.integers(0, 10, 1024).astype(np.int32))
    formulation = default_formulation()
    model = ResNet(BasicBlock, (2, 2, 2, 2), num_classes=10, width=8, stem="small", formulation=formulation)
    policy = Policy(batch_norm="sync")
    tx = optax.sgd(0.1, momentum=0.9)
    config = StepConfig(model, tx, Preprocessing(32, IMAGENET_MEAN, IMAGENET_STD), policy)
    step = partial(train_step, config=config)
    p_step = jax.pmap(step, axis_name=policy.axis_name, in_axes=(None, None, 0), out_axes=None, donate_argnums=0)
    state = replicate(jax.jit(partial(create_train_state, model, tx))(jax.random.key(0)))
    examples = replicate(examples)
    times = []
    for batch in list(make_batches(np.arange(1024).repeat(2), 64, devices))[:STEPS]:
        started = time.monotonic()
        state, counts = p_step(state, examples, batch)
        jax.block_until_ready(counts)
        times.append(time.monotonic() - started)
    print(statistics.median(times[2:]))


def reckon() -> dict[str, dict[str, float]]:
    """Computes the traffic of a ring, 2 (n - 1) / n of the float32 gradients and statistics, without overlap."""
    found = {}
    for name, (devices, bandwidth) in LINKS.items():
        sent = 2 * (devices - 1) / devices * 4 * (PARAMETERS + STATISTICS)
        seconds, step = sent / bandwidth, PICTURES / RATE
        found[name] = {
            "megabytes_sent": round(sent / 1e6, 1),
            "milliseconds": round(1e3 * seconds, 2),
            "of_the_step_at_most": round(seconds / (step + seconds), 4),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--devices", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.devices:
        measure(args.devices)
        return
    seconds: dict[int, list[float]] = {devices: [] for devices in DEVICES}
    for _ in range(args.rounds):
        for devices in DEVICES:
            flags = f"--xla_force_host_platform_device_count={devices}"
            env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "NPROC": "16"}
            command = [sys.executable, "-m", "benchmarks.scaling", f"--devices={devices}"]
            output = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout
            seconds[devices].append(float(output))
    steps = {devices: round(1 / statistics.median(values), 2) for devices, values in seconds.items()}
    print(json.dumps({"steps_per_second": steps, "reckoned": reckon()}))


if __name__ == "__main__":
    main()
