"""Converts the weights of an ImageNet ResNet to a jaxft file, or back to torchvision's layout, without torch.

    jaxft convert resnet50.pth resnet50.safetensors --verify
    jaxft convert resnet50.safetensors resnet50.pth --to torchvision
    jaxft convert checkpoint.pth --info
    jaxft convert --list

`python weights/convert.py` is the same command. SOURCE: a checkpoint of torchvision, timm, Hugging Face or a training
script, a folder that holds model.safetensors, a jaxft file, or a name; FILE#NAME is one of several networks in a file,
such as dino.pth#teacher. Every key and shape is checked against the model. The metadata of a jaxft file says where the
weights come from.
"""

if __name__ == "__main__":  # a command's process is prepared before JAX is imported
    from jaxft.cli import run

    run("convert")

import argparse
import json
from collections.abc import Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from jaxft.errors import ArgumentParser, UserError
from jaxft.files import output_argument
from jaxft.models.build import ARCHITECTURES
from jaxft.models.network import options_of
from jaxft.pretrained import catalog
from jaxft.pretrained.convert import to_torch
from jaxft.pretrained.describe import describe, lines
from jaxft.pretrained.families import family_of
from jaxft.pretrained.load import load_pretrained, read_network
from jaxft.pretrained.torch_files import write_tensors
from jaxft.pretrained.weights_file import Weights, model_of, write_weights

VERIFIED_IN_FLOAT64 = 1e-9  # relative; a wrong padding, epsilon or order of channels gives far larger differences


def largest_differences(tensors: dict[str, np.ndarray], weights: Weights, dtype: Any) -> dict[str, float]:
    """Returns max |ours - torchvision's| / max |torchvision's| after each stage, on two random images of 224 pixels.

    tensors: the source's own, which torchvision's network loads, so that the comparison does not depend on our
    conversion. The head is compared only if there is one.
    """
    torch, models = _torchvision()
    arch, num_classes = weights.provenance["arch"], weights.provenance["num_classes"]
    family = family_of(arch)
    stages = dict(family.stages(model_of(weights.provenance)))
    if not num_classes:
        del stages[family.head]
    as_dtype = torch.from_numpy(np.ones(1, dtype)).dtype
    reference = getattr(models, arch)(num_classes=num_classes or 1000).to(as_dtype)
    state = {key: torch.from_numpy(array.astype(dtype)) for key, array in tensors.items()}
    missing, extra = reference.load_state_dict(state, strict=False)
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    assert not extra and all(key.startswith(f"{family.head}.") for key in missing)
    outputs: dict[str, Any] = {}
    for module, name in stages.items():
        reference.get_submodule(module).register_forward_hook(
            lambda _module, _inputs, output, name=name: outputs.update({name: output.numpy().copy()})
        )
    image = np.random.default_rng(0).normal(size=(2, 224, 224, 3)).astype(dtype)
    with torch.no_grad():
        reference.eval()(torch.from_numpy(image.transpose(0, 3, 1, 2).copy()))
    differences = {}
    for name, ours in _stages(weights, image, stages.values()).items():
        theirs = outputs[name].transpose(0, 2, 3, 1) if outputs[name].ndim == 4 else outputs[name]
        differences[name] = float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), np.finfo(dtype).tiny))
    return differences


def _stages(weights: Weights, image: np.ndarray, paths: Collection[str]) -> dict[str, np.ndarray]:
    """Returns the outputs of the modules of jaxft's network at these paths, computed in the image's dtype."""
    with jax.enable_x64(True):
        model = model_of(weights.provenance).clone(dtype=image.dtype)
        variables = jax.tree.map(lambda array: array.astype(image.dtype), weights.variables)
        _, captured = jax.jit(
            lambda variables, image: model.apply(
                variables,
                image,
                train=False,
                capture_intermediates=lambda module, _: "/".join(module.path) in paths,
                mutable=["intermediates"],
            )
        )(variables, image)
    outputs = flatten_dict(captured["intermediates"], sep="/")
    return {path: np.asarray(outputs[f"{path}/__call__"][0]) for path in paths}


def _torchvision() -> tuple[Any, Any]:
    """Imports torch and torchvision.models. Raises UserError if they are missing or do not fit each other."""
    try:
        import torch
        import torchvision
    except ImportError:
        raise UserError("--verify compares with PyTorch: pip install torch torchvision") from None
    except RuntimeError as error:  # torchvision's operators need the torch that it was built with
        raise UserError(f"torchvision does not fit this torch ({error}); install both from the same index") from None
    return torch, torchvision.models


def _other_options(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of a network that are not those of torchvision's."""
    model = model_of(provenance)
    return {key: value for key, value in options_of(model).items() if value != model.options[key]}


def verify(source: str, weights: Weights) -> Weights:
    """Returns the weights with the result in their provenance. Raises UserError if the networks differ."""
    provenance = weights.provenance
    for key, value in _other_options(provenance).items():
        raise UserError(f"--verify: torchvision has no {provenance['arch']} of {key} {value} to compare with")
    named = catalog.find(source)
    tensors = read_network(catalog.weights_file(named) if named else source)
    if tensors is None:
        raise UserError(f"{source} is a jaxft file; --verify compares a file of torchvision, timm or Hugging Face")
    single, double = (largest_differences(tensors, weights, dtype) for dtype in (np.float32, np.float64))
    against = f"torchvision {version('torchvision')} with torch {version('torch')}"
    print(f"largest difference from {against}, relative to the largest value\n")
    width = max(8, *(len(name) + 1 for name in single))
    print(f"{'after':{width}}{'float32':>10}{'float64':>10}")
    for name in single:
        print(f"{name:{width}}{single[name]:10.1e}{double[name]:10.1e}")
    print()
    if not max(double.values()) <= VERIFIED_IN_FLOAT64:  # NaN differs too
        raise UserError(f"{source} converted differs from torchvision's network; nothing was written; please report it")
    verified = {"against": against, "float32": single, "float64": double}
    return Weights(weights.variables, provenance | {"verified": verified})


def print_info(source: str, arch: str | None, as_json: bool) -> None:
    """Prints the description of a weights file. Raises UserError if there is no such file."""
    found = describe(source, arch)
    if "format" not in found:
        raise UserError(found["reason"])
    print(json.dumps(found, indent=1) if as_json else "\n".join(lines(found)))


def _check_out(args: argparse.Namespace) -> None:
    """Raises UserError unless OUT has the suffix of its layout and is not SOURCE."""
    suffixes = (".safetensors",) if args.to == "flax" else (".safetensors", ".pth")
    if args.out.suffix not in suffixes:
        raise UserError(f"OUT must end in {' or '.join(suffixes)}, not {args.out}")
    try:
        same = args.out.samefile(args.source)
    except (OSError, ValueError):  # one of them does not exist
        same = False
    if same:
        raise UserError(f"OUT {args.out} is SOURCE; give another name")


def _summary(source: str, out: Path, weights: Weights, layout: str) -> str:
    """Returns a line on what was written, and a line for each note."""
    provenance = weights.provenance
    head = f"{provenance['num_classes']} classes" if provenance["num_classes"] else "without a head"
    origin = source
    if "source_sha256" in provenance:
        origin += f" (SHA-256 {provenance['source_sha256'][:16]}...)"
    notes = list(provenance.get("notes", ()))
    if layout == "torchvision":
        other = [f"{key} {value}" for key, value in _other_options(provenance).items()]
        if other:
            notes.append(
                f"torchvision has no {provenance['arch']} of {' and '.join(other)}: only jaxft reads this file"
            )
        if not provenance["num_classes"]:
            notes.append("load it with strict=False: the head's keys are missing")
    return "\n".join([f"{out}: {provenance['arch']}, {head}, from {origin}", *(f"  {note}" for note in notes)])


def main(argv: list[str]) -> None:
    parser = ArgumentParser("python -m jaxft.convert", __doc__)
    parser.add_argument("source", metavar="SOURCE", nargs="?", help="the weights to convert: a file, or a name")
    parser.add_argument(
        "out", metavar="OUT", nargs="?", type=output_argument, help="a .safetensors file, or .pth for torchvision"
    )
    parser.add_argument("--list", action="store_true", help="list the weights that have a name")
    parser.add_argument("--info", action="store_true", help="describe SOURCE without converting it")
    parser.add_argument("--json", action="store_true", help="with --info: print one JSON object")
    parser.add_argument("--arch", choices=ARCHITECTURES, help="the architecture that SOURCE must have (default: any)")
    parser.add_argument("--to", choices=["flax", "torchvision"], default="flax", help="the layout of OUT")
    parser.add_argument("--verify", action="store_true", help="compare with torchvision's network (needs torch)")
    args = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # CPUs have float64, and an accelerator may be in use by another process
    if args.list:
        print(catalog.table())
        return
    if args.json and not args.info:
        parser.error("--json needs --info")
    if args.info:
        if args.source is None or args.out is not None:
            parser.error("--info takes SOURCE but no OUT")
        print_info(args.source, args.arch, args.json)
        return
    if args.source is None or args.out is None:
        parser.error("SOURCE and OUT are needed")
    _check_out(args)
    weights = load_pretrained(args.source, args.arch)
    if args.verify:
        weights = verify(args.source, weights)
    if args.to == "flax":
        write_weights(args.out, weights)
    else:
        write_tensors(args.out, to_torch(weights))
    print(_summary(args.source, args.out, weights, args.to))
