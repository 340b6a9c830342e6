"""Measures what a frozen prefix saves of a ResNet-50's train step: time, and memory by XLA's figures.

GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m benchmarks.freezing [--image_size 64] [--batch_size 32] [--rounds 5]

Nothing is propagated back through a frozen prefix, so it costs only its forward pass; `remat` recomputes the blocks'
activations instead of keeping them. The contenders take turns; prints medians of wall time as one JSON line.
kept_megabytes: what the forward pass keeps for the backward pass, by the shapes of the traced functions, on any device;
temporary_megabytes: of this machine's compiled program.
"""

import argparse
import json
import math
import statistics
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxft.config import default_config
from jaxft.data.batches import Batch, Examples
from jaxft.models.build import make_model
from jaxft.models.network import Network
from jaxft.models.partition import make_policy, merge, split_frozen
from jaxft.models.policy import Policy
from jaxft.training.state import create_train_state
from jaxft.training.steps import StepConfig, train_step
from jaxft.transforms.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing

FROZEN = {
    "nothing": "",
    "stem": "stem",
    "to stage 2": "stem,stage1,stage2",
    "to stage 3": "stem,stage1,stage2,stage3",
    "backbone": "backbone",
}


def kept_megabytes(model: Network, policy: Policy, image: Any) -> float:
    """Returns the megabytes of activations that the forward pass keeps, without the parameters."""
    variables = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), image)

    def residuals(variables: Any, image: jax.Array) -> Any:
        trainable, kept = split_frozen(variables["params"], policy.frozen)

        def loss(trainable: Any) -> jax.Array:
            params = {"params": merge(trainable, kept), "batch_stats": variables["batch_stats"]}
            logits: Any = model.apply(params, image, train=True, policy=policy, mutable=["batch_stats"])[0]
            return logits.sum()

        return jax.vjp(loss, trainable)[1]

    leaves = jax.tree.leaves(jax.eval_shape(residuals, variables, image))
    activations = [leaf for leaf in leaves if leaf.shape[:1] == image.shape[:1]]
    return round(4 * sum(math.prod(leaf.shape) for leaf in activations) / 1e6, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    examples = Examples(rng.integers(0, 256, (args.batch_size, 32, 32, 3), np.uint8), np.zeros(args.batch_size, int))
    index = np.arange(args.batch_size, dtype=np.int32)[None]
    batch = Batch(index, index, np.ones(index.shape, np.float32))
    image = jax.ShapeDtypeStruct((args.batch_size, args.image_size, args.image_size, 3), jnp.float32)
    steps: dict[str, Any] = {}
    found: dict[str, dict[str, float]] = {}
    for name, parts in [*FROZEN.items(), ("statistics", ""), ("nothing, remat", "")]:
        config = default_config()
        config.optimizer.freeze = parts
        if name == "statistics":
            config.model.batch_norm = "frozen"
        config.model.remat = name.endswith("remat")
        model = make_model(config.model, 10)
        policy = make_policy(config, model, 1)
        tx = optax.sgd(0.001, momentum=0.9)
        state = jax.jit(partial(create_train_state, model, tx, policy=policy))(jax.random.key(0))
        preprocessing = Preprocessing(args.image_size, IMAGENET_MEAN, IMAGENET_STD)
        step = partial(train_step, config=StepConfig(model, tx, preprocessing, policy))
        p_step = jax.pmap(step, axis_name=policy.axis_name, in_axes=(None, None, 0), out_axes=None)
        compiled = p_step.lower(state, examples, batch).compile()
        memory = compiled.memory_analysis()
        found[name] = {
            "kept_megabytes": kept_megabytes(model, policy, image),
            "temporary_megabytes": round(memory.temp_size_in_bytes / 1e6, 1),
        }
        steps[name] = partial(p_step, state, examples, batch)
        jax.block_until_ready(steps[name]())
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.rounds):
        for name, run in steps.items():
            started = time.monotonic()
            jax.block_until_ready(run())
            seconds[name].append(time.monotonic() - started)
    for name, times in seconds.items():
        found[name]["milliseconds"] = round(1e3 * statistics.median(times), 1)
    print(json.dumps({"image_size": args.image_size, "batch_size": args.batch_size, "frozen": found}))


if __name__ == "__main__":
    main()
