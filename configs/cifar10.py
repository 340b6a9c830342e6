"""The original recipe to the letter: all of an ImageNet ResNet-50 on CIFAR-10 at 224 pixels, SGD, 10 epochs.

python -m jaxft.train --config configs/cifar10.py

With 1,000 pictures for 2 epochs, and ImageNet weights of 72.2 % top-1, it reaches 23.1 % on 1,000 others, as the same
in PyTorch does (python -m benchmarks.parity_cifar10). All of CIFAR-10 is not measured: no GPU was at hand. Published
for a fine-tuned ImageNet ResNet-50: 97.5 % (Chen et al. 2020, SimCLR, table 8).
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
