"""Your own images, a few hundred or thousand, in one folder per class.

python -m jaxft.train --config configs/image_folder.py --config.data.name=folder:PATH

PATH holds train/CLASS/* and val/CLASS/*, or only CLASS/*: then a fifth of each class is held out for testing. Only the
head trains for the first three epochs; then the backbone joins in at a tenth of the head's learning rate, so that a few
images do not spoil its features. If the loss becomes NaN then, set --config.optimizer.clip_norm=1. Files that are not
images are refused; --config.data.unreadable=skip skips them.

On two CPU cores, 500 images of CIFAR-10 at 96 pixels and ImageNet weights of 72.2 % top-1 give 69.4 % on 1,000 test
images in 559 s; 69.2 % is reached after the head's three epochs (python -m benchmarks.recipes). Not measured on a GPU.
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
    config.model.batch_norm = "frozen"  # small batches have noisy statistics

    config.data = ConfigDict()
    config.data.name = "folder:pictures"
    config.data.train_split = "train"
    config.data.eval_split = "val"
    config.data.stored_size = 256  # random crops of it are resized to 224

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
