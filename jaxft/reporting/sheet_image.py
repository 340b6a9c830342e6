"""Draws training images beside their augmented versions."""

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxft.data.batches import Examples, epoch_order, make_batches
from jaxft.data.dataset import Dataset
from jaxft.data.datasets import interpolation_of
from jaxft.training.steps import training_inputs
from jaxft.transforms.augment import make_augmentation
from jaxft.transforms.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, preprocess

ROWS, COLUMNS = 8, 9
GAP = 4  # pixels between images


def draw_sheet(config: ConfigDict, train_data: Dataset, rows: int = ROWS, columns: int = COLUMNS) -> np.ndarray:
    """Returns uint8 (height, width, 3): a row per image, first unaugmented and then as in successive training steps.

    The images are drawn at random from the training set, by the config's seed.
    """
    index = epoch_order(config.seed, 1, train_data.num_examples)[:rows]
    resize, interpolation = config.data.resize, interpolation_of(config.data)
    preprocessing = Preprocessing(config.image_size, IMAGENET_MEAN, IMAGENET_STD, resize, interpolation)
    augmentation = make_augmentation(config.augment)
    examples = Examples(train_data.image[index], jax.tree.map(lambda label: label[index], train_data.label))
    (batch,) = make_batches(np.arange(len(index)), len(index), 1)
    batch = jax.tree.map(lambda a: a[0], batch)
    shown = [preprocess(examples.image, preprocessing)]
    inputs = jax.jit(lambda step: training_inputs(examples, batch, step, preprocessing, config.seed, augmentation)[0])
    shown += [inputs(jnp.int32(step)) for step in range(columns - 1)]
    pixels = np.stack(shown, 1) * np.array(IMAGENET_STD) + np.array(IMAGENET_MEAN)
    pixels = np.clip(np.round(pixels * 255), 0, 255).astype(np.uint8)
    pixels = np.pad(pixels, ((0, 0), (0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=255)
    rows, columns, height, width, _ = pixels.shape
    return pixels.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, 3)
