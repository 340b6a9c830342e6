"""Trains the quickstart's small backbone from random weights: 100,000 ImageNet images of 32 pixels, 200 classes.

python -m jaxft.train --config configs/pretrain_tiny.py --config.data.name=folder:PATH

PATH holds the images as train/CLASS/** and val_by_class/CLASS/**. Reaches 29.4 % on 10,000 test images after an hour on
two CPU cores.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.num_epochs = 20
    config.batch_size = 128  # over all devices
    config.image_size = 64

    config.model = ConfigDict()
    config.model.arch = "resnet18"
    config.model.width = 16

    config.data = ConfigDict()
    config.data.name = "folder:tiny_imagenet32"
    config.data.train_split = "train"
    config.data.eval_split = "val_by_class"

    config.augment = ConfigDict()
    config.augment.first_image_size = 48
    config.augment.flip = True
    config.augment.crop_area = 0.5
    config.augment.crop_ratio = 4 / 3

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 0.1
    config.optimizer.momentum = 0.9
    config.optimizer.nesterov = True
    config.optimizer.weight_decay = 1e-4
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_epochs = 0.5
    return config
