"""Trains only a new head on a frozen ImageNet ResNet-50: the quickest test of its features on your images.

python -m jaxft.train --config configs/linear_probe.py

Without augmentation the backbone runs once per image, so thirty epochs cost little more than one. On two CPU cores,
2,000 images of CIFAR-10 at 96 pixels, ImageNet weights of 72.2 % top-1 and a learning rate of 0.05 give 73.5 % in 84 s
(python -m benchmarks.recipes). Not measured on all of CIFAR-10 at 224 pixels. Published for a linear probe of a
supervised ResNet-50: 93.6 % (Chen et al. 2020, SimCLR, table 8).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.num_epochs = 30
    config.batch_size = 256  # over all devices
    config.image_size = 224

    config.model = ConfigDict()
    config.model.arch = "resnet50"
    config.model.pretrained = "resnet50.tv_in1k_v1"

    config.data = ConfigDict()
    config.data.name = "cifar10"

    config.optimizer = ConfigDict()
    config.optimizer.freeze = "backbone"
    config.optimizer.learning_rate = 0.1
    config.optimizer.nesterov = True
    config.optimizer.schedule = "cosine"
    return config
