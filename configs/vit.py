"""Fine-tunes a Vision Transformer on your own images, in one folder per class.

python -m jaxft.train --config configs/vit.py --config.data.name=folder:PATH [--config.model.pretrained=FILE]

PATH holds train/CLASS/* and val/CLASS/*, or only CLASS/*: then a fifth of each class is held out for testing. The
architecture, image size, mean and interpolation are those of the weights, which are a repository on the Hugging Face
Hub, downloaded once, or a file. Values are derived for the zeros and -1 below when the run begins, and stored; any of
them can be set instead.

AdamW with layer-wise decay, warm-up, a cosine, stochastic depth and smoothed labels is the fine-tuning of BEiT (Bao et
al. 2022, appendix) and MAE (He et al. 2022, table 9): weight decay 0.05 but not of biases, norms and embeddings, layer
decay 0.75, drop path 0.1, label smoothing 0.1. Their rate of 5e-4 per 256 images would be 1.25e-4 for batches of 64. It
is 5e-5 here, because the head begins as a linear probe rather than at random, so that the backbone has little to
relearn, and because supervised weights suffer from large rates. The gradient's norm is bounded by 1, as in AugReg's
fine-tuning (Steiner et al. 2022). Mixup begins at 20,000 images (BiT; Kolesnikov et al. 2020). docs/recipes.md has
measurements.
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
    config.model.pretrained = "hf:timm/vit_small_patch16_224.augreg_in21k_ft_in1k"
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
    config.optimizer.layer_decay = 0.75  # of each block
    config.optimizer.weight_decay = 0.05
    config.optimizer.decay_all = False
    config.optimizer.clip_norm = 1.0
    config.optimizer.warmup_epochs = -1  # a tenth of the epochs
    config.optimizer.schedule = "cosine"
    return config
