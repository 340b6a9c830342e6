"""Checks a batch size, or finds the largest that fits into a device's memory by XLA's memory analysis of a step."""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxft.data.batches import Batch, Examples
from jaxft.data.budget import device_memory, is_streamed
from jaxft.data.dataset import Dataset
from jaxft.data.datasets import interpolation_of
from jaxft.data.loader import ResidentLoader
from jaxft.errors import UserError
from jaxft.models.build import make_model
from jaxft.models.partition import make_policy
from jaxft.ops.formulation import on_cpu
from jaxft.targets.joint import Targets, count_outputs
from jaxft.training.loop import pmap_train_steps
from jaxft.training.optimizer import make_optimizer
from jaxft.training.start import Splits, load_teacher
from jaxft.training.state import abstract_train_state
from jaxft.training.steps import make_step_config
from jaxft.training.steps_per_call import StepsPerCall
from jaxft.transforms.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing

PROBES = (8, 32)  # images per device
LEAST_STEPS = 10  # in an epoch

# NOTES: Thresholds without a measurement (docs/notes/memory.md)
MEMORY_SHARE = 0.7  # of a device's memory that training may take; allocations are never packed tightly


def check_batch_size(batch_size: int) -> None:
    """Raises UserError unless the devices can share the batch equally."""
    devices = jax.device_count()
    if batch_size % devices:
        below = batch_size // devices * devices
        hint = f"{below} or {below + devices}" if below else f"{devices}"
        raise UserError(f"batch_size {batch_size} cannot be shared equally by {devices} devices; use {hint}")


def find_batch_size(config: ConfigDict, splits: Splits, targets: Targets) -> int:
    """Finds the batch size for config.batch_size = 0 on the devices of this run."""
    model = make_model(config.model, count_outputs(targets))
    policy = make_policy(config, model, config.num_epochs)
    tx = make_optimizer(config.optimizer, steps_per_epoch=1, num_epochs=1, parts=model.parts)
    state = abstract_train_state(model, tx, policy, ema=config.optimizer.ema_decay > 0)
    teacher = load_teacher(config, targets, "best", model.formulation)
    resize, interpolation = config.data.resize, interpolation_of(config.data)
    preprocessing = Preprocessing(config.image_size, IMAGENET_MEAN, IMAGENET_STD, resize, interpolation)
    steps = pmap_train_steps(make_step_config(config, model, policy, tx, preprocessing, teacher, targets))
    num_steps = StepsPerCall(padded=on_cpu(model.formulation)).scan_length(1)

    def compile_step(examples: Examples, batch: Batch) -> Any:
        return steps.lower(state, examples, batch, teacher and teacher.variables, num_steps).compile()

    stream = config.data.stream
    resident = sum(data.image.nbytes for data in splits if data and not is_streamed(data, stream))
    return largest_batch_size(compile_step, splits.train, device_memory(), resident)


def largest_batch_size(
    compile_step: Callable[[Examples, Batch], Any], data: Dataset, device_memory: int, resident: int
) -> int:
    """Returns the largest batch size over all devices, and prints it.

    It is a power of two on each device and leaves at least LEAST_STEPS in an epoch. compile_step: compiles a train step
    for abstract examples. device_memory, resident: bytes of each device, in total and for resident images. Raises
    UserError if not even one image fits.
    """
    # NOTES: Estimated memory of a step (docs/notes/memory.md)
    devices = jax.device_count()

    @cache
    def bytes_of(share: int) -> int:
        """Returns the bytes of a step on one device that holds only this batch's images."""
        size = share * devices
        image = jax.ShapeDtypeStruct((size, *data.image.shape[1:]), np.uint8)
        label = jax.tree.map(lambda array: jax.ShapeDtypeStruct((size, *array.shape[1:]), array.dtype), data.label)
        examples = jax.eval_shape(Examples.packed, image, label)
        (batch,) = ResidentLoader(examples).batches(np.arange(size), size)
        memory = compile_step(examples, jax.tree.map(lambda array: array[:, None], batch)).memory_analysis()
        arguments_and_results = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        return int(arguments_and_results + memory.temp_size_in_bytes)

    at_most = max(data.num_examples // LEAST_STEPS // devices, 1)
    share = largest_share(bytes_of, MEMORY_SHARE * device_memory - resident, at_most)
    needed, available = bytes_of(share) / 2**30, device_memory / 2**30
    print(
        f"batch    {share * devices} images; a step needs {needed:.1f} GiB of each device's {available:.1f}",
        flush=True,
    )
    return share * devices


def largest_share(bytes_of: Callable[[int], int], memory: float, at_most: int) -> int:
    """Returns the largest power of two, up to `at_most`, for which bytes_of(images per device) <= memory.

    bytes_of compiles a step. It grows about linearly, so two values predict the others, and only the chosen one is
    checked. Raises UserError if not even one image fits.
    """
    low, high = (bytes_of(share) for share in PROBES)
    per_image = max(high - low, 1) / (PROBES[1] - PROBES[0])
    share = 1
    while 2 * share <= at_most and high + per_image * (2 * share - PROBES[1]) <= memory:
        share *= 2
    while share > 1 and bytes_of(share) > memory:
        share //= 2
    if share == 1 and bytes_of(1) > memory:
        raise UserError(
            f"a training step needs {bytes_of(1) / 2**30:.1f} GiB for one image, and "
            f"{memory / 2**30:.1f} GiB are available; use a smaller image_size or model.arch, or model.remat=True"
        )
    return share
