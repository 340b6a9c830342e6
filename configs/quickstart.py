"""Offline, within minutes on two CPU cores: a small pretrained ResNet-18 on the sample of CIFAR-10 in this package.

python -m jaxft.train --config configs/quickstart.py

Reaches 64.4 % on the sample's 1,000 test pictures (mean of 5 seeds, python -m benchmarks.quickstart).
"""

from ml_collections import ConfigDict

NOTE = """
From random weights the same network reaches 42.7 % on these pictures in the same time (pretrained 64.4 %; means of 5
seeds, benchmarks/quickstart.py). 2,000 pictures are not CIFAR-10. What to try next:
  look        runs/quickstart/report.html
  evaluate    python -m jaxft.evaluate --workdir runs/quickstart
  predict     python -m jaxft.predict --workdir runs/quickstart PICTURE_OR_FOLDER
  your own    python -m jaxft.train --config configs/image_folder.py --config.data.name=folder:PATH
  full size   python -m jaxft.train --config configs/cifar10.py"""


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.note = NOTE
    config.num_epochs = 5
    config.batch_size = 50  # over all devices
    config.image_size = 64

    config.model = ConfigDict()
    config.model.arch = "resnet18"
    config.model.width = 16
    config.model.pretrained = "resnet18_tiny_in200"  # ships with jaxft; made by configs/pretrain_tiny.py

    config.data = ConfigDict()
    config.data.name = "sample:cifar10"  # 2,000 pictures to train, 1,000 to test
    config.data.train_split = "train"
    config.data.eval_split = "test"

    config.augment = ConfigDict()
    config.augment.flip = True

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 0.05
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 5e-4
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_epochs = 1
    return config
