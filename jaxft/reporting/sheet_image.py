"""TODO."""

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxft.data import datasets
from jaxft.data.batches import Examples, epoch_order, make_batches
from jaxft.training.steps import StepConfig, training_inputs
from jaxft.transforms.augment import make_augmentation
from jaxft.transforms.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, preprocess

ROWS, COLUMNS = 8, 9


GAP = 4  # pixels between pictures


def draw_sheet(config: ConfigDict, rows: int = ROWS, columns: int = COLUMNS) -> np.ndarray:
    """uint8 (height, width, 3): pictures from all over the training set, by the config's seed."""
    data = datasets.load_config_data(config.data, config.data.train_split, config.image_size)
    index = epoch_order(config.seed, 1, len(data.label))[:rows]
    preprocessing = Preprocessing(config.image_size, IMAGENET_MEAN, IMAGENET_STD)
    step_config = StepConfig(config.seed, make_augmentation(config.augment))
    examples = Examples(data.image[index], data.label[index])
    (batch,) = make_batches(np.arange(len(index)), len(index), 1)
    batch = jax.tree.map(lambda a: a[0], batch)
    seen = [preprocess(examples.image, preprocessing)]
    inputs = jax.jit(lambda step: training_inputs(examples, batch, step, preprocessing, step_config)[0])
    seen += [inputs(jnp.int32(step)) for step in range(columns - 1)]
    pixels = np.stack(seen, 1) * np.array(IMAGENET_STD) + np.array(IMAGENET_MEAN)
    pixels = np.clip(np.round(pixels * 255), 0, 255).astype(np.uint8)
    pixels = np.pad(pixels, ((0, 0), (0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=255)
    rows, columns, height, width, _ = pixels.shape
    return pixels.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, 3)
