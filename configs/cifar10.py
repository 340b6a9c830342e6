"""The recipe of torchvision's tutorials: all weights of an ImageNet ResNet-50 on CIFAR-10 at 224 pixels, 10 epochs.

python -m jaxft.train --config configs/cifar10.py

With model.dtype=bfloat16 on one H100: 185 s, 84.8 % on the test set, from ImageNet weights of 72.2 % top-1
(docs/benchmarks.md). Not measured with torchvision's own weights. Published for a fine-tuned ImageNet ResNet-50:
97.5 % (Chen et al. 2020, SimCLR, table 8).
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
    config.model.pretrained = "resnet50.tv_in1k_v1"  # torchvision's; or a weights file
    config.model.batch_norm = "sync"  # so that one device and eight use the same statistics, of all 64 images

    config.data = ConfigDict()
    config.data.name = "cifar10"
    config.data.train_split = "train"
    config.data.eval_split = "test"

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 0.001
    config.optimizer.momentum = 0.9
    return config
