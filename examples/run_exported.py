"""Runs what `python -m jaxft.export --to stablehlo` wrote, without jaxft: run_exported.py MODEL.zip IMAGE ...

It needs pip install jax flatbuffers pillow; info.json in MODEL.zip names the version of JAX. Unlike `predict`, it drops
transparency instead of putting the image on white, and clips 16-bit images instead of scaling them.
"""

import json
import sys
import zipfile

import jax.export
import numpy as np
from PIL import Image, ImageOps

archive = zipfile.ZipFile(sys.argv[1])
class_names = json.loads(archive.read("info.json"))["class_names"]
network = jax.export.deserialize(bytearray(archive.read("model.stablehlo")))
for path in sys.argv[2:]:
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")  # upright, as cameras mean it
    probabilities = np.asarray(network.call(np.asarray(image)[None]))[0]
    print(path, class_names[probabilities.argmax()], f"{probabilities.max():.1%}")
