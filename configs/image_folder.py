"""Your own images, a few hundred or thousand, in one folder per class.

python -m jaxft.train --config configs/image_folder.py --config.data.name=folder:PATH

PATH holds train/CLASS/* and val/CLASS/*, or only CLASS/*: then a fifth of each class is held out for testing. The head
is fitted to the backbone's features, which needs no learning rate; then it trains for three epochs on augmented images.
From epoch 4 on, the backbone joins in at a tenth of the head's rate, which it reaches within an epoch. Each update is
bounded relative to the weights that it changes, so that backbones of any scale stay finite. Files that are not images
are refused; --config.data.unreadable=skip skips them.

On two CPU cores, 250 images of CIFAR-10 at 64 pixels and the small ResNet-18 that ships with jaxft give 54 % on 1,000
test images, as much as a linear probe. It is the same if the backbone's features are scaled by 0.1 or 10, or its
kernels by 0.1 (python -m benchmarks.recipes --safety). With a ResNet-50 and ImageNet weights of 72.2 % top-1, 500
images at 96 pixels give 69.9 % in 286 s (python -m benchmarks.recipes --only image_folder, two idle Intel cores,
2026-11-26, jax 0.10.2), and 250 at 64 pixels 59.2 %, or 58.5 % with a linear probe. Not measured on a GPU.
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
    config.optimizer.fit_head = "first"
    config.optimizer.freeze = "backbone"
    config.optimizer.unfreeze = "4: backbone"
    config.optimizer.unfreeze_warmup = 1.0
    config.optimizer.adaptive_clip = 0.1
    config.optimizer.learning_rate = 0.002
    config.optimizer.head_factor = 10.0
    config.optimizer.weight_decay = 1e-4
    config.optimizer.schedule = "cosine"
    return config
