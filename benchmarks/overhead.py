"""Measures the time that checkpoints and calls cost a run: a ResNet-50 with momentum, 430 arrays, 188 MB.

    python -m benchmarks.overhead --workdir DIR [--repeats 5] [--devices 1]

Measures how long a save blocks the loop, how much of this are checksums and the search for NaN, the time until it is on
disk, and a verified restore; then an empty step (every array has one number, which is multiplied by one) in calls of 1
and of 10 steps. Prints medians as JSON.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np


def median(repeats: int, function: Callable[[], object]) -> float:
    times = []
    for _ in range(repeats):
        started = time.monotonic()
        function()
        times.append(time.monotonic() - started)
    return round(float(np.median(times)), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--devices", type=int, default=1, help="forced CPU devices")
    args = parser.parse_args()
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={args.devices}"
    os.environ["NPROC"] = "16"

    import jax  # after the number of devices is set

    from jaxft.config import default_config
    from jaxft.data.batches import Batch, replicate
    from jaxft.models.build import make_model
    from jaxft.run.checkpoint_reader import checksums
    from jaxft.run.checkpoints import Checkpoints, not_finite, to_host
    from jaxft.run.metrics_file import MetricsFile
    from jaxft.run.workdir import Workdir
    from jaxft.targets.classification import Counts
    from jaxft.training.optimizer import make_optimizer
    from jaxft.training.state import TrainState, abstract_train_state, create_train_state
    from jaxft.training.steps import train_steps

    config = default_config()
    model = make_model(config.model, num_classes=10)
    tx = make_optimizer(config.optimizer, steps_per_epoch=1, num_epochs=1, parts=model.parts)
    abstract = abstract_train_state(model, tx)
    state = replicate(jax.jit(partial(create_train_state, model, tx))(jax.random.key(0)))
    host = to_host(state)
    checkpoints = Checkpoints(Workdir(args.workdir), MetricsFile(Workdir(args.workdir).metrics))
    blocked, whole = [], []
    for step in range(1, args.repeats + 1):
        newest = state.replace(step=replicate(np.int32(step)))
        started = time.monotonic()
        checkpoints.save(newest, {})
        blocked.append(time.monotonic() - started)
        checkpoints.wait()
        whole.append(time.monotonic() - started)
    latest = checkpoints.steps()[-1]
    result: dict[str, Any] = {
        "arrays": len(jax.tree.leaves(host)),
        "megabytes": round(sum(leaf.nbytes for leaf in jax.tree.leaves(host)) / 1e6, 1),
        "devices": args.devices,
        "seconds": {
            "checksums": median(args.repeats, lambda: checksums(host)),
            "search_for_nan": median(args.repeats, lambda: not_finite(host)),
            "save_keeps_the_loop_waiting": round(float(np.median(blocked)), 4),
            "save_until_on_disk": round(float(np.median(whole)), 4),
            "restore_and_verify": median(args.repeats, lambda: checkpoints.restore(latest, abstract)),
        },
    }
    checkpoints.close()

    def nothing(state: TrainState, _: Any, batch: Batch, __: Any) -> tuple[TrainState, Counts]:
        sums = jax.lax.psum(batch.mask.sum(), "batch")
        return jax.tree.map(lambda a: a * sums.astype(a.dtype), state), Counts(sums, sums, sums)

    for steps in (1, 10):
        p_step = jax.pmap(
            partial(train_steps, step=nothing),
            axis_name="batch",
            in_axes=(None, None, 0),
            out_axes=None,
            donate_argnums=0,
        )
        index = np.zeros((args.devices, steps, 1), np.int32)
        batch = Batch(index, index, (index == 0).astype(np.float32) / args.devices)
        small = jax.tree.map(lambda a: replicate(np.ones(1, a.dtype)), state)  # as many arrays, but nothing to compute
        small, _ = p_step(small, None, batch)

        def call(p_step: Any = p_step, batch: Batch = batch) -> None:
            nonlocal small
            small, counts = p_step(small, None, batch)
            jax.block_until_ready(counts)

        seconds = median(20 * args.repeats, call)
        result["seconds"][f"step_in_a_call_of_{steps}"] = round(seconds / steps, 6)
    print(json.dumps(result | {"versions": {name: version(name) for name in ("jax", "orbax-checkpoint")}}, indent=1))


if __name__ == "__main__":
    main()
