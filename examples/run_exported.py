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


def describe(field: dict, output: np.ndarray) -> str:
    """Returns the prediction of one image as text. output: probabilities of classes or tags, or a number."""
    if field["kind"] == "number":
        return f"{field['name']} {output:.4g}"
    names, order = field["names"], np.argsort(-output, kind="stable")
    if field["kind"] == "class":
        return f"{field['name']} {names[order[0]]} {output[order[0]]:.1%}"
    thresholds = info.get("calibration", {}).get(field["name"], {}).get("thresholds") or [0.5] * len(names)
    tags = [f"{names[i]} {output[i]:.1%}" for i in order if output[i] >= thresholds[i]]
    return f"{field['name']} {', '.join(tags) or 'no tag'}"


archive = zipfile.ZipFile(sys.argv[1])
info = json.loads(archive.read("info.json"))
network = jax.export.deserialize(bytearray(archive.read("model.stablehlo")))
for path in sys.argv[2:]:
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")  # upright, as cameras mean it
    outputs = jax.tree.map(lambda array: np.asarray(array)[0], network.call(np.asarray(image)[None]))
    if "targets" in info:
        print(path, "; ".join(describe(field, outputs[field["name"]]) for field in info["targets"]))
    else:  # a single class
        print(path, info["class_names"][outputs.argmax()], f"{outputs.max():.1%}")
