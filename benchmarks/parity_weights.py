"""Compares networks in jaxft with those of torchvision, timm and transformers.

    python -m benchmarks.parity_weights --weights resnet50.pth [--data_dir DIR]
    python -m benchmarks.parity_weights --families

--weights: a real ImageNet ResNet-50. jaxft reads the file and writes it back; torchvision loads that with strict=True.
The images are the first 1,000 of CIFAR-10's test set at 224 pixels; both networks classify them into ImageNet's
classes. Prints JSON. Takes about five minutes on two CPU cores.

--families: a network of each family and library with random weights, saved by the library, read by jaxft, compared by
`jaxft convert --verify`, and written back by `--to torch`. Prints a table of the largest differences after any stage,
and of whether the file written back has the same bits.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from jaxft.data import datasets
from jaxft.data.dataset import DataOptions
from jaxft.models.resnet import ARCHITECTURES
from jaxft.ops.formulation import default_formulation
from jaxft.pretrained.convert import naming_of, to_torch
from jaxft.pretrained.load import load_pretrained
from jaxft.pretrained.torch_files import read_tensors, write_tensors
from jaxft.pretrained.verify import compare
from jaxft.transforms.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, preprocess
from tests.helpers.reference import torch, torchvision

BATCH = 50


def _vit(transformers: Any) -> torch.nn.Module:
    sizes = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes))


def _convnext(transformers: Any, version: str) -> torch.nn.Module:
    config = getattr(transformers, f"ConvNext{version}Config")(depths=[2, 2, 6, 2], hidden_sizes=[40, 80, 160, 320])
    return getattr(transformers, f"ConvNext{version}ForImageClassification")(config)


def _resnet(transformers: Any) -> torch.nn.Module:
    config = transformers.ResNetConfig(depths=[2, 2, 2, 2], layer_type="basic", hidden_sizes=[64, 128, 256, 512])
    return transformers.ResNetForImageClassification(config)


# Each makes a network with random weights from the modules timm and transformers.
NETWORKS: dict[str, Callable[[Any, Any], torch.nn.Module]] = {
    "ResNet, torchvision, resnet18": lambda *_: torchvision.models.resnet18(),
    "ResNet, timm, resnet26d": lambda timm, _: timm.create_model("resnet26d"),
    "ResNet, timm, seresnet50": lambda timm, _: timm.create_model("seresnet50"),
    "ResNet, transformers, resnet18": lambda _, transformers: _resnet(transformers),
    "VGG, torchvision, vgg11_bn": lambda *_: torchvision.models.vgg11_bn(),
    "ViT, torchvision, vit_b_32": lambda *_: torchvision.models.vit_b_32(),
    "ViT, timm, vit_tiny_patch16_224": lambda timm, _: timm.create_model("vit_tiny_patch16_224"),
    "ViT, timm, test_vit2": lambda timm, _: timm.create_model("test_vit2"),
    "ViT, timm, test_vit3": lambda timm, _: timm.create_model("test_vit3"),
    "ViT, transformers, vit_tiny_patch16_224": lambda _, transformers: _vit(transformers),
    "ConvNeXt, torchvision, convnext_tiny": lambda *_: torchvision.models.convnext_tiny(),
    "ConvNeXt, timm, convnext_atto": lambda timm, _: timm.create_model("convnext_atto"),
    "ConvNeXt, timm, convnextv2_atto": lambda timm, _: timm.create_model("convnextv2_atto"),
    "ConvNeXt, transformers, convnext_atto": lambda _, transformers: _convnext(transformers, ""),
    "ConvNeXt, transformers, convnextv2_atto": lambda _, transformers: _convnext(transformers, "V2"),
}


@torch.no_grad()
def _randomize(network: torch.nn.Module) -> torch.nn.Module:
    """Moves parameters and statistics far from their initial values."""
    for parameter in network.parameters():
        scale = 0.3 if parameter.ndim == 1 else 0.3 * parameter.shape[-1] ** -0.5
        parameter.add_(scale * torch.randn_like(parameter))
    for name, statistics in network.named_buffers():
        if name.endswith("running_var"):
            statistics.uniform_(0.5, 2)
    return network


def compare_families() -> None:
    """Prints the table of --families."""
    import timm
    import transformers

    print("| family, library, network | float32 | float64 | written back |\n|---|--:|--:|---|")
    for name, make in NETWORKS.items():
        torch.manual_seed(0)
        network = _randomize(make(timm, transformers))
        with tempfile.TemporaryDirectory() as folder:
            source, back = Path(folder, "model.safetensors"), Path(folder, "back.safetensors")
            if ", transformers," in name:
                network.save_pretrained(folder)  # type: ignore[operator] # transformers' method
            else:
                write_tensors(source, {key: value.numpy() for key, value in network.state_dict().items()})
            weights = load_pretrained(str(source))
            found = compare(str(source), weights)
            write_tensors(back, to_torch(weights, naming_of(weights)))
            before, after = read_tensors(source), read_tensors(back)
        same = before.keys() == after.keys() and all(before[key].tobytes() == after[key].tobytes() for key in before)
        single, double = (max(differences.values()) for differences in (found.float32, found.float64))
        print(f"| {name} | {single:.1e} | {double:.1e} | {'same bits' if same else 'differs'} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--weights", help="an ImageNet ResNet-50, a file or a name")
    what.add_argument("--families", action="store_true", help="a random network of each family and library")
    parser.add_argument("--data_dir", default="", help="of prepared TFDS sets")
    args = parser.parse_args()
    if args.families:
        compare_families()
        return
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
