"""Fine-tunes a ConvNeXt on your own images, in one folder per class.

python -m jaxft.train --config configs/convnext.py --config.data.name=folder:PATH [--config.model.pretrained=FILE]

PATH holds train/CLASS/* and val/CLASS/*, or only CLASS/*: then a fifth of each class is held out for testing. The
architecture, image size, mean and interpolation are those of the weights, which are a repository on the Hugging Face
Hub, downloaded once, or a file. Values are derived for the zeros and -1 below when the run begins, and stored; any of
them can be set instead.

AdamW with a rate of 5e-5, layer-wise decay, a cosine, label smoothing 0.1 and weight decay 1e-8 is ConvNeXt's own
fine-tuning (Liu et al. 2022, table 6). Its layer decay of 0.8 for each of twelve groups of blocks gives the stem 0.06
of the head's rate, as 0.57 per stage does; 0.6 is used here. As in vit.py, the head begins as a linear probe, the rate
is warmed up, and the gradient's norm is bounded. docs/recipes.md has measurements.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.num_epochs = 0  # 8 to 30, by the number of images
    config.batch_size = 64  # over all devices
    config.image_size = 0  # that of the weights, else by the size of the images
    config.label_smoothing = 0.1

    config.model = ConfigDict()
    config.model.arch = "auto"  # that of the weights
    config.model.pretrained = "hf:timm/convnext_tiny.fb_in22k_ft_in1k"
    config.model.drop_path = 0.1

    config.data = ConfigDict()
    config.data.name = "folder:pictures"
    config.data.train_split = "train"
    config.data.eval_split = "val"
    config.data.resize = -1  # evaluation crops as the weights' authors do

    config.augment = ConfigDict()
    config.augment.flip = True
    config.augment.crop_area = 0.4
    config.augment.crop_ratio = 4 / 3
    config.augment.mixup = -1  # from 20,000 images on

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"
    config.optimizer.fit_head = "first"
    config.optimizer.learning_rate = 5e-5
    config.optimizer.layer_decay = 0.6  # of each stage
    config.optimizer.weight_decay = 1e-8
    config.optimizer.decay_all = False
    config.optimizer.clip_norm = 1.0
    config.optimizer.warmup_epochs = -1  # a tenth of the epochs
    config.optimizer.schedule = "cosine"
    return config
