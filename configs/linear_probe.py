"""Only a new head on a frozen ImageNet ResNet-50: the quickest look at what its features tell about your pictures.

python -m jaxft.train --config configs/linear_probe.py

Without augmentation the backbone sees each picture once, so thirty epochs cost about one forward pass. On two cores,
with 2,000 pictures of CIFAR-10 at 96 pixels and ImageNet weights of 72.2 % top-1, such a probe reaches 73.5 % (python
-m benchmarks.recipes). All of CIFAR-10 at 224 pixels is not measured yet; published: 93.6 % by a linear probe of a
supervised ResNet-50 (Chen et al. 2020, SimCLR, table 8).
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
