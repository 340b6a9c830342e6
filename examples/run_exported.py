"""Runs what `python -m jaxft.export --to stablehlo` wrote, without jaxft: run_exported.py MODEL.zip PICTURE ..."""

import json
import sys
import zipfile

import jax.export
import numpy as np
from PIL import Image

archive = zipfile.ZipFile(sys.argv[1])
class_names = json.loads(archive.read("info.json"))["class_names"]
network = jax.export.deserialize(bytearray(archive.read("model.stablehlo")))
for path in sys.argv[2:]:
    picture = np.asarray(Image.open(path).convert("RGB"))
    probabilities = np.asarray(network.call(picture[None]))[0]
    print(path, class_names[probabilities.argmax()], f"{probabilities.max():.1%}")
