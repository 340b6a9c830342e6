"""Compares a real ImageNet ResNet-50 in jaxft and, exported, in torchvision: predictions on 1,000 images.

    python -m benchmarks.parity_weights --weights resnet50.pth [--data_dir DIR]

jaxft reads the file and writes it back; torchvision loads that with strict=True. The images are the first 1,000 of
CIFAR-10's test set at 224 pixels; both networks classify them into ImageNet's classes. Prints JSON. Takes about five
minutes on two CPU cores.
"""

import argparse
import json
import tempfile
from functools import partial
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from jaxft.data import datasets
from jaxft.data.dataset import DataOptions
from jaxft.models.resnet import ARCHITECTURES
from jaxft.ops.formulation import default_formulation
from jaxft.pretrained.convert import to_torch
from jaxft.pretrained.load import load_pretrained
from jaxft.pretrained.torch_files import write_tensors
from jaxft.transforms.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, preprocess
from tests.helpers.reference import torch, torchvision

BATCH = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="an ImageNet ResNet-50, a file or a name")
    parser.add_argument("--data_dir", default="", help="of prepared TFDS sets")
    args = parser.parse_args()
    images = datasets.load("cifar10", "test[:10%]", DataOptions(dir=args.data_dir)).image

    weights = load_pretrained(args.weights, "resnet50")
    model = ARCHITECTURES["resnet50"](num_classes=weights.provenance["num_classes"], formulation=default_formulation())
    preprocessing = Preprocessing(224, IMAGENET_MEAN, IMAGENET_STD)
    forward = jax.jit(partial(model.apply, train=False))
    with tempfile.TemporaryDirectory() as folder:
        write_tensors(Path(folder, "exported.pth"), to_torch(weights))
        reference = torchvision.models.resnet50(num_classes=weights.provenance["num_classes"])
        reference.load_state_dict(torch.load(Path(folder, "exported.pth")), strict=True)
    reference.eval()
    transforms = torchvision.transforms
    transform = transforms.Compose(
        [transforms.Resize(224), transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    )

    ours, theirs = [], []
    for start in range(0, len(images), BATCH):
        batch = np.asarray(images[start : start + BATCH])
        ours.append(np.asarray(forward(weights.variables, preprocess(batch, preprocessing))))
        with torch.no_grad():
            theirs.append(reference(torch.stack([transform(Image.fromarray(image)) for image in batch])).numpy())
    a, b = np.concatenate(ours), np.concatenate(theirs)
    result = {
        "pictures": len(a),
        "equal_top1": int((a.argmax(1) == b.argmax(1)).sum()),
        "largest_difference_of_logits": float(np.abs(a - b).max()),
        "largest_logit": float(np.abs(b).max()),
        "versions": {name: version(name) for name in ("jax", "flax", "torch", "torchvision")},
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
