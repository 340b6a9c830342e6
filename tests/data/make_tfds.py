"""Makes the small prepared TFDS sets beside this file, from the sample of CIFAR-10 (needs jaxft[tfds])."""

from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from jaxft import datasets

HERE = Path(__file__).parent


class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """30 training and 10 test pictures of 3 classes."""

    name = "tiny_pictures"
    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "id": tfds.features.Text(),
            "picture": tfds.features.Image(shape=(32, 32, 3), encoding_format="png"),
            "animal": tfds.features.ClassLabel(names=["bird", "cat", "deer"]),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: Any) -> Any:
        return {"train": self._generate_examples("train", 30), "test": self._generate_examples("test", 10)}

    def _generate_examples(self, split: str, count: int) -> Any:
        sample = datasets.load("sample:cifar10", split)
        animals = np.flatnonzero(np.isin(sample.label, (2, 3, 4)))
        for i in animals[:: len(animals) // count]:
            label = sample.class_names[sample.label[i]]
            yield int(i), {"id": str(i), "picture": sample.image[i], "animal": label}


for file_format in ("array_record", "tfrecord"):
    Builder(data_dir=HERE / file_format, file_format=file_format).download_and_prepare()
