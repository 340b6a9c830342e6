"""Fits only a new head to the features of an ImageNet ResNet-50: the quickest test of them on your images.

python -m jaxft.train --config configs/linear_probe.py

The backbone runs once per image. The head is then fitted by L-BFGS, and a penalty is chosen on held-out training
images, so there is neither a learning rate nor a number of epochs to set. On two CPU cores, 2,000 images of CIFAR-10 at
64 pixels and ImageNet weights of 72.2 % top-1 give 68.4 % on 1,000 test images (docs/recipes.md). Not measured on all
of CIFAR-10 at 224 pixels. Published for a linear probe of a supervised ResNet-50: 93.6 % (Chen et al. 2020, SimCLR,
table 8).
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
    config.optimizer.fit_head = "only"
    # Version 0.1's steps, which --config.optimizer.fit_head=no brings back:
    config.optimizer.learning_rate = 0.1
    config.optimizer.nesterov = True
    config.optimizer.schedule = "cosine"
    return config
