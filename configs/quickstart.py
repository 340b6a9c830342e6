"""Fine-tunes a small pretrained ResNet-18 on the sample of CIFAR-10 in this package; offline, in half a minute.

python -m jaxft.train --config configs/quickstart.py

Reaches 64.4 % on the sample's 1,000 test images; random weights reach 42.7 % (means of 5 seeds on two CPU cores,
python -m benchmarks.quickstart).
"""

from ml_collections import ConfigDict

NOTE = """
This was a sample: 2,000 images of CIFAR-10's 50,000. What to try next:
  look        runs/quickstart/report.html
  evaluate    jaxft evaluate --workdir runs/quickstart
  predict     jaxft predict --workdir runs/quickstart IMAGE_OR_FOLDER
  your own    jaxft train --config image_folder --config.data.name=folder:PATH
  full size   jaxft train --config cifar10"""


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.note = NOTE
    config.num_epochs = 5
    config.batch_size = 50  # over all devices
    config.image_size = 64

    config.model = ConfigDict()
    config.model.arch = "resnet18"
    config.model.width = 16
    config.model.pretrained = "resnet18_tiny_in200"  # ships with jaxft, trained by pretrain_tiny.py

    config.data = ConfigDict()
    config.data.name = "sample:cifar10"  # 2,000 images to train on, 1,000 to test on
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
