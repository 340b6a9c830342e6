"""The original recipe to the letter: all of an ImageNet ResNet-50 on CIFAR-10 at 224 pixels, SGD, 10 epochs.

python -m jaxft.train --config configs/cifar10.py

Parity with PyTorch on 1,000 pictures: benchmarks/parity_cifar10.py.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.num_epochs = 10
    config.batch_size = 64  # over all devices
    config.image_size = 224

    config.model = ConfigDict()
    config.model.arch = "resnet50"
    config.model.pretrained = "resnet50.tv_in1k_v1"  # torchvision's; a file of your own serves as well
    config.model.batch_norm = "sync"  # one device or eight: the same statistics, of all 64 pictures

    config.data = ConfigDict()
    config.data.name = "cifar10"
    config.data.train_split = "train"
    config.data.eval_split = "test"

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 0.001
    config.optimizer.momentum = 0.9
    return config
