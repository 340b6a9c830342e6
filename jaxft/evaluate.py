"""Accuracy of a trained checkpoint, from its workdir and the data alone.

python -m jaxft.evaluate --workdir runs/cifar10 [--checkpoint best|latest|STEP] [--json]
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxft import datasets
from jaxft.checkpoint import load_checkpoint
from jaxft.errors import ArgumentParser, UserError, run_command
from jaxft.preprocessing import Preprocessing
from jaxft.progress import Progress
from jaxft.resnet import ResNet
from jaxft.steps import Batch, Counts, Pictures, TrainState, eval_step, replicate

STEPS_AHEAD = 2  # that the host runs before the devices


def evaluate_pictures(
    p_eval_step: Callable[[TrainState, Pictures, Batch], Counts],
    state: TrainState,
    pictures: Pictures,
    batch_size: int,
) -> Counts:
    """Sums over all pictures, each counted once, on any number of devices."""
    size, devices = len(pictures.label), jax.local_device_count()
    batch_size = -(-batch_size // devices) * devices
    counts: list[Counts] = []
    with Progress("evaluating", size) as progress:
        for batch in datasets.batches(np.arange(size), batch_size, devices):
            counts.append(p_eval_step(state, pictures, batch))
            if len(counts) > STEPS_AHEAD:
                jax.block_until_ready(counts[-1 - STEPS_AHEAD])
                progress.update(min(batch_size, size))
    return jax.tree.map(lambda *batches: np.sum(jax.device_get(batches), dtype=np.float64), *counts)


def pmap_eval_step(model: ResNet, preprocessing: Preprocessing) -> Callable[[TrainState, Pictures, Batch], Counts]:
    step = partial(eval_step, model=model, preprocessing=preprocessing)
    return jax.pmap(step, axis_name=model.axis_name, in_axes=(None, None, 0), out_axes=None)


def evaluate(workdir: Path, which: str = "best", data_dir: str | None = None) -> tuple[int, str, Counts]:
    """Step, split and counts of a checkpoint: 'best', 'latest' or a step's number."""
    step, info, model, state = load_checkpoint(workdir, which)
    config = ConfigDict(info["config"])
    data = config.data
    dataset = datasets.load(data.name, data.eval_split, data.dir if data_dir is None else data_dir)
    if list(dataset.class_names) != info["class_names"]:
        raise UserError(f"{data.name} has other classes than the checkpoint: {', '.join(info['class_names'])}")
    p_eval_step = pmap_eval_step(model, Preprocessing(**info["preprocessing"]))
    pictures = replicate(Pictures(dataset.image, dataset.label))
    return step, data.eval_split, evaluate_pictures(p_eval_step, state, pictures, config.batch_size)


def main(argv: list[str]) -> None:
    parser = ArgumentParser("python -m jaxft.evaluate", __doc__)
    parser.add_argument("--workdir", required=True, type=Path, help="of the training run")
    parser.add_argument("--checkpoint", default="best", help="best (default), latest or a step's number")
    parser.add_argument("--data_dir", help="of prepared TFDS sets, if it is no longer the one trained with")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    step, split, counts = evaluate(args.workdir, args.checkpoint, args.data_dir)
    pictures, correct = int(counts.pictures), int(counts.correct)
    accuracy, loss = correct / pictures, float(counts.loss) / pictures
    if args.json:
        line = {"checkpoint": step, "split": split, "pictures": pictures, "correct": correct}
        print(json.dumps(line | {"accuracy": accuracy, "loss": loss}))
    else:
        print(f"checkpoint {step}: accuracy {accuracy:.2%} ({correct} of {pictures}), loss {loss:.4f} on {split}")


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
