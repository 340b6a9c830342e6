"""CIFAR-100 by the recipe of cifar10_fast.py, with twice the epochs, mixup and CutMix.

python -m jaxft.train --config configs/cifar100.py

Not measured. Of TFDS's two labels per image, the fine one of 100 classes is used. Published for a fine-tuned ImageNet
ResNet-50: 86.4 % (Chen et al. 2020, SimCLR, table 8).
"""

from ml_collections import ConfigDict

from jaxft.config import load_config


def get_config() -> ConfigDict:
    config = load_config("cifar10_fast", {})
    config.num_epochs = 10
    config.data.name = "cifar100"
    config.augment.mixup = 0.2
    config.augment.cutmix = 1.0
    return config
