"""CIFAR-10 to a high accuracy in little time on one GPU: bfloat16, large batches, small pictures early.

python -m jaxft.train --config configs/cifar10_fast.py

Not measured on all of CIFAR-10: no GPU was at hand. On two cores, with 2,000 pictures of it in batches of 50, growing
from 48 to 96 pixels, and ImageNet weights of 72.2 % top-1: 65.4 % on 1,000 others in 510 s (python -m
benchmarks.recipes).
Published for a fine-tuned ImageNet ResNet-50: 97.5 % (Chen et al. 2020, SimCLR, table 8).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.num_epochs = 5
    config.batch_size = 256  # over all devices
    config.image_size = 224
    config.label_smoothing = 0.1

    config.model = ConfigDict()
    config.model.arch = "resnet50"
    config.model.pretrained = "resnet50.tv_in1k_v1"
    config.model.dtype = "bfloat16"

    config.data = ConfigDict()
    config.data.name = "cifar10"

    config.augment = ConfigDict()
    config.augment.first_image_size = 112
    config.augment.flip = True
    config.augment.shift = 0.1

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 0.02
    config.optimizer.nesterov = True
    config.optimizer.weight_decay = 1e-4
    config.optimizer.decay_all = False
    config.optimizer.schedule = "linear"
    config.optimizer.warmup_epochs = 0.5
    config.optimizer.head_factor = 5.0
    config.optimizer.ema_decay = 0.99
    return config
