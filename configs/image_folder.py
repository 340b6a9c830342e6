"""Your own pictures, a few hundred or thousands, in a folder for each class.

python -m jaxft.train --config configs/image_folder.py --config.data.name=folder:PATH

PATH holds train/CLASS/* and val/CLASS/*, or CLASS/* alone: then a fifth of each class is held out to test with. The
head learns alone for three epochs, then everything at a hundredth of its rate, so that few pictures do not spoil
what the backbone knows. Where a file is no picture: --config.data.unreadable=skip.

On two cores, with 500 pictures of CIFAR-10 at 96 pixels and ImageNet weights of 72.2 % top-1: 69.4 % on 1,000 others in
559 s, 69.2 % of it after the head's three epochs (python -m benchmarks.recipes).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.num_epochs = 15
    config.batch_size = 32  # over all devices
    config.image_size = 224
    config.label_smoothing = 0.1
    config.class_weights = "balanced"

    config.model = ConfigDict()
    config.model.arch = "resnet50"
    config.model.pretrained = "resnet50.tv_in1k_v2"
    config.model.batch_norm = "frozen"  # batches of few pictures would blur the statistics

    config.data = ConfigDict()
    config.data.name = "folder:pictures"
    config.data.train_split = "train"
    config.data.eval_split = "val"
    config.data.stored_size = 256  # of which random parts are shown at 224

    config.augment = ConfigDict()
    config.augment.flip = True
    config.augment.crop_area = 0.4
    config.augment.crop_ratio = 4 / 3

    config.optimizer = ConfigDict()
    config.optimizer.freeze = "backbone"
    config.optimizer.unfreeze = "4: backbone"
    config.optimizer.learning_rate = 0.002
    config.optimizer.head_factor = 10.0
    config.optimizer.weight_decay = 1e-4
    config.optimizer.schedule = "cosine"
    return config
