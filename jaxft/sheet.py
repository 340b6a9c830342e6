"""A sheet of pictures as training shows them, to look at before hours are spent on it.

python -m jaxft.sheet --config configs/cifar10_fast.py --out sheet.png [--config.augment.KEY=VALUE ...]

Each row is a picture: first as it is tested, then as it is seen in one training step after the other.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from jaxft import datasets
from jaxft.augment import make_augmentation
from jaxft.config import load_config, parse_overrides
from jaxft.errors import ArgumentParser, UserError, run_command
from jaxft.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, preprocess
from jaxft.steps import Objective, Pictures, training_inputs

ROWS, COLUMNS = 8, 9
GAP = 4  # pixels between pictures


def draw_sheet(config: ConfigDict, rows: int = ROWS, columns: int = COLUMNS) -> np.ndarray:
    """uint8 (height, width, 3): pictures from all over the training set, by the config's seed."""
    data = datasets.load_config_data(config.data, config.data.train_split, config.image_size)
    index = datasets.epoch_order(config.seed, 1, len(data.label))[:rows]
    preprocessing = Preprocessing(config.image_size, IMAGENET_MEAN, IMAGENET_STD)
    objective = Objective(config.seed, make_augmentation(config.augment))
    pictures = Pictures(data.image[index], data.label[index])
    (batch,) = datasets.batches(np.arange(len(index)), len(index), 1)
    batch = jax.tree.map(lambda a: a[0], batch)
    seen = [preprocess(pictures.image, preprocessing)]
    inputs = jax.jit(lambda step: training_inputs(pictures, batch, step, preprocessing, objective)[0])
    seen += [inputs(jnp.int32(step)) for step in range(columns - 1)]
    pixels = np.stack(seen, 1) * np.array(IMAGENET_STD) + np.array(IMAGENET_MEAN)
    pixels = np.clip(np.round(pixels * 255), 0, 255).astype(np.uint8)
    pixels = np.pad(pixels, ((0, 0), (0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=255)
    rows, columns, height, width, _ = pixels.shape
    return pixels.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, 3)


def main(argv: list[str]) -> None:
    parser = ArgumentParser("python -m jaxft.sheet", __doc__)
    parser.add_argument("--config", required=True, metavar="FILE", help="a file with get_config(), as in configs/")
    parser.add_argument("--out", type=Path, default=Path("sheet.png"), metavar="FILE", help="default: sheet.png")
    args, rest = parser.parse_known_args(argv)
    sheet = Image.fromarray(draw_sheet(load_config(args.config, parse_overrides(rest))))
    try:
        sheet.save(args.out)
    except (OSError, ValueError) as error:
        raise UserError(f"--out {args.out} cannot be written: {error}") from None
    print(f"{args.out}: each row is a picture as it is tested, then as training sees it")


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
