"""Anybody's labelled images, without a search: one rule sets length, image size and rates by the data.

python -m jaxft.train --config configs/auto.py --config.data.name=folder:PATH

PATH holds train/CLASS/* and val/CLASS/*, or only CLASS/*. The zeros and the -1 below are derived from the training
images after BiT's hyper-rule (Kolesnikov et al. 2020; jaxft/training/auto.py), printed and stored; any of them can be
set instead. The head's input is standardised, the head begins as a linear probe, and each update is bounded relative to
the weights, so that one learning rate suits backbones of any scale.

With ImageNet weights of 72.2 % top-1, 500 images of CIFAR-10 at 64 pixels give 66.0 % on 1,000 test images and 5,000
give 75.1 % (python -m benchmarks.recipes --auto; linear_probe.py: 63.0 and 71.4 %). Neither more images nor the image
sizes that the rule itself chooses were measured, nor a GPU.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.num_epochs = 0  # 8 to 30, by the number of images
    config.batch_size = 64  # over all devices
    config.image_size = 0  # 128 or 224, by the size of the images
    config.label_smoothing = 0.1

    config.model = ConfigDict()
    config.model.arch = "resnet50"
    config.model.pretrained = "resnet50.tv_in1k_v1"
    config.model.head_norm = True
    config.model.batch_norm = "frozen"  # small batches have noisy statistics

    config.data = ConfigDict()
    config.data.name = "folder:pictures"
    config.data.train_split = "train"
    config.data.eval_split = "val"
    config.data.stored_size = 256  # random crops of it are resized

    config.augment = ConfigDict()
    config.augment.flip = True
    config.augment.crop_area = 0.5
    config.augment.crop_ratio = 4 / 3
    config.augment.mixup = -1  # from 20,000 images on

    config.optimizer = ConfigDict()
    config.optimizer.fit_head = "first"
    config.optimizer.adaptive_clip = 0.1
    config.optimizer.learning_rate = -1  # in proportion to the batch size
    config.optimizer.warmup_epochs = -1  # a tenth of the epochs
    config.optimizer.schedule = "cosine"
    return config
