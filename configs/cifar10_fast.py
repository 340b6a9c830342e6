"""High accuracy on CIFAR-10 in little time on one GPU: bfloat16, large batches, images that grow.

python -m jaxft.train --config configs/cifar10_fast.py

Two image sizes, 112 pixels for three epochs and 224 for two, need two compilations of the train step; not measured on a
GPU. With one size per epoch, and five compilations of 34 s, the first two epochs on an H100 reach 58.3 and 72.4 %
(docs/recipes.md). On two CPU cores, 2,000 images in batches of 50, at 48 pixels and then 96, give 66.1 % on 1,000 test
images in 224 s (python -m benchmarks.recipes). Both start from ImageNet weights of 72.2 % top-1. Published
for a fine-tuned ImageNet ResNet-50: 97.5 % (Chen et al. 2020, SimCLR, table 8).
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
    config.augment.num_image_sizes = 2  # each size is compiled
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
