"""Converts the weights of an ImageNet ResNet to a jaxft file, or back to torchvision's layout, without torch.

    jaxft convert resnet50.pth resnet50.safetensors --verify
    jaxft convert resnet50.safetensors resnet50.pth --to torchvision
    jaxft convert --list

`python weights/convert.py` is the same command. SOURCE: a .pth or .safetensors file of torchvision, timm or Hugging
Face, a jaxft file, or a name. Every key and shape is checked against the model. The metadata of a jaxft file says where
the weights come from.
"""

if __name__ == "__main__":  # a command's process is prepared before JAX is imported
    from jaxft.cli import run

    run("convert")

from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxft.errors import ArgumentParser, UserError
from jaxft.models.resnet import ARCHITECTURES
from jaxft.pretrained import catalog
from jaxft.pretrained.convert import to_torch, torchvision_keys
from jaxft.pretrained.load import load_pretrained
from jaxft.pretrained.torch_files import read_tensors, write_tensors
from jaxft.pretrained.weights_file import Weights, write_weights

# torchvision's module -> jaxft's, whose conv1 includes the norm and the ReLU
STAGES = {"relu": "conv1"} | {name: name for name in ("layer1", "layer2", "layer3", "layer4", "fc")}
VERIFIED_IN_FLOAT64 = 1e-9  # relative; a wrong padding, epsilon or order of channels gives far larger differences


def largest_differences(source: str, weights: Weights, dtype: Any) -> dict[str, float]:
    """Returns max |ours - torchvision's| / max |torchvision's| after each stage, on two random images of 224 pixels.

    torchvision's network loads the source's own tensors, so the comparison does not depend on our reading of them.
    """
    try:
        import torch
        import torchvision
    except ImportError:
        raise UserError("--verify compares with PyTorch: pip install torch torchvision") from None

    tensors = {key: torch.from_numpy(array.astype(dtype)) for key, array in _source_tensors(source).items()}
    arch, num_classes = weights.provenance["arch"], weights.provenance["num_classes"]
    reference = getattr(torchvision.models, arch)(num_classes=num_classes).to(torch.from_numpy(np.ones(1, dtype)).dtype)
    if weights.provenance["width"] != 64:
        raise UserError(f"torchvision has no {arch} of width {weights.provenance['width']} to compare with")
    missing, extra = reference.load_state_dict(tensors, strict=False)
    assert not extra and all(key.endswith("num_batches_tracked") for key in missing)
    outputs: dict[str, Any] = {}
    for module, name in STAGES.items():
        getattr(reference, module).register_forward_hook(
            lambda _module, _inputs, output, name=name: outputs.update({name: output.numpy().copy()})
        )
    image = np.random.default_rng(0).normal(size=(2, 224, 224, 3)).astype(dtype)
    with torch.no_grad():
        reference.eval()(torch.from_numpy(image.transpose(0, 3, 1, 2).copy()))

    with jax.enable_x64(True):
        model = ARCHITECTURES[arch](num_classes=num_classes, dtype=dtype)
        variables = jax.tree.map(lambda array: array.astype(dtype), weights.variables)
        _, captured = jax.jit(
            lambda variables, image: model.apply(
                variables,
                image,
                train=False,
                capture_intermediates=lambda module, _: module.name in STAGES.values(),
                mutable=["intermediates"],
            )
        )(variables, image)
    differences = {}
    for name in STAGES.values():
        ours = np.asarray(captured["intermediates"][name]["__call__"][0])
        theirs = outputs[name].transpose(0, 2, 3, 1) if outputs[name].ndim == 4 else outputs[name]
        differences[name] = float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), np.finfo(dtype).tiny))
    return differences


def _source_tensors(source: str) -> dict[str, np.ndarray]:
    named = catalog.find(source)
    return torchvision_keys(read_tensors(catalog.weights_file(named) if named else source))


def verify(source: str, weights: Weights) -> Weights:
    """Returns the weights with the result in their provenance. Raises UserError if the networks differ."""
    if "params/fc/bias" in _source_tensors(source):
        raise UserError(f"{source} is a jaxft file; --verify compares a file of torchvision, timm or Hugging Face")
    single, double = (largest_differences(source, weights, dtype) for dtype in (np.float32, np.float64))
    against = f"torchvision {version('torchvision')} with torch {version('torch')}"
    print(f"largest difference from {against}, relative to the largest value\n")
    print(f"{'after':8}{'float32':>10}{'float64':>10}")
    for name in STAGES.values():
        print(f"{name:8}{single[name]:10.1e}{double[name]:10.1e}")
    print()
    if max(double.values()) > VERIFIED_IN_FLOAT64:
        raise UserError(f"{source} converted differs from torchvision's network; nothing was written; please report it")
    verified = {"against": against, "float32": single, "float64": double}
    return Weights(weights.variables, weights.provenance | {"verified": verified})


def main(argv: list[str]) -> None:
    parser = ArgumentParser("python -m jaxft.convert", __doc__)
    parser.add_argument("source", metavar="SOURCE", nargs="?", help="the weights to convert: a file, or a name")
    parser.add_argument("out", metavar="OUT", nargs="?", type=Path, help="a .safetensors file, or .pth for torchvision")
    parser.add_argument("--list", action="store_true", help="list the weights that have a name")
    parser.add_argument("--arch", choices=ARCHITECTURES, help="the architecture that SOURCE must have (default: any)")
    parser.add_argument("--to", choices=["flax", "torchvision"], default="flax", help="the layout of OUT")
    parser.add_argument("--verify", action="store_true", help="compare with torchvision's network (needs torch)")
    args = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # CPUs have float64, and an accelerator may be in use by another process
    if args.list:
        print(catalog.table())
        return
    if args.source is None or args.out is None:
        parser.error("SOURCE and OUT are needed")
    suffixes = (".safetensors",) if args.to == "flax" else (".safetensors", ".pth")
    if args.out.suffix not in suffixes:
        raise UserError(f"OUT must end in {' or '.join(suffixes)}, not {args.out}")
    weights = load_pretrained(args.source, args.arch)
    if args.verify:
        weights = verify(args.source, weights)
    if args.to == "flax":
        write_weights(args.out, weights)
    else:
        write_tensors(args.out, to_torch(weights))
    print(
        f"{args.out}: {weights.provenance['arch']}, {weights.provenance['num_classes']} classes, "
        f"from {args.source} (SHA-256 {weights.provenance['source_sha256'][:16]}...)"
    )
