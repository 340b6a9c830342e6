"""CIFAR-100 by the recipe of cifar10_fast.py, with more epochs and mixed pictures.

python -m jaxft.train --config configs/cifar100.py

Not measured: neither CIFAR-100 nor a GPU was at hand. Published for a fine-tuned ImageNet ResNet-50: 86.4 % (Chen et
al. 2020, SimCLR, table 8).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.num_epochs = 10
    config.batch_size = 256  # over all devices
    config.image_size = 224
    config.label_smoothing = 0.1

    config.model = ConfigDict()
    config.model.arch = "resnet50"
    config.model.pretrained = "resnet50.tv_in1k_v1"
    config.model.dtype = "bfloat16"

    config.data = ConfigDict()
    config.data.name = "cifar100"

    config.augment = ConfigDict()
    config.augment.first_image_size = 112
    config.augment.flip = True
    config.augment.shift = 0.1
    config.augment.mixup = 0.2
    config.augment.cutmix = 1.0

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
