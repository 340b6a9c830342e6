"""Converts the weights of an ImageNet network to a jaxft file, or back to the names of its source, without torch.

    jaxft convert resnet50.pth resnet50.safetensors --verify
    jaxft convert resnet50.safetensors resnet50.pth --to torch
    jaxft convert checkpoint.pth --info
    jaxft convert --list vit

--list: names of weights; with a family (resnet, vgg, vit, convnext) its architectures. --to torch writes the names that
the source had, --to torchvision those of torchvision.

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
from pathlib import Path

import jax

from jaxft.errors import ArgumentParser, UserError
from jaxft.files import output_argument
from jaxft.models.architectures import NAMES, canonical
from jaxft.pretrained import catalog
from jaxft.pretrained.convert import loading_notes, naming_of, own_sizes, to_torch
from jaxft.pretrained.describe import describe, lines
from jaxft.pretrained.family import Naming
from jaxft.pretrained.listing import FAMILY_NAMES, families, family_table
from jaxft.pretrained.load import load_pretrained
from jaxft.pretrained.torch_files import write_tensors
from jaxft.pretrained.verify import compare
from jaxft.pretrained.weights_file import Weights, model_of, write_weights

VERIFIED_IN_FLOAT64 = 1e-9  # relative; a wrong padding, epsilon or order of channels gives far larger differences


def verify(source: str, weights: Weights) -> Weights:
    """Returns the weights with the result in their provenance. Raises UserError if the networks differ."""
    against, single, double = compare(source, weights)
    print(f"largest difference from {against}, relative to the largest value\n")
    width = max(8, *(len(name) + 1 for name in single))
    print(f"{'after':{width}}{'float32':>10}{'float64':>10}")
    for name in single:
        print(f"{name:{width}}{single[name]:10.1e}{double[name]:10.1e}")
    print()
    if not max(double.values()) <= VERIFIED_IN_FLOAT64:  # NaN differs too
        library = against.split()[0]
        raise UserError(f"{source} converted differs from {library}'s network; nothing was written; please report it")
    verified = {"against": against, "float32": single, "float64": double}
    return Weights(weights.variables, weights.provenance | {"verified": verified})


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


def _summary(source: str, out: Path, weights: Weights, naming: Naming | None) -> str:
    """Returns a line on what was written, and a line for each note. naming: None for a jaxft file."""
    provenance = weights.provenance
    head = f"{provenance['num_classes']} classes" if provenance["num_classes"] else "without a head"
    origin = source
    if "source_sha256" in provenance:
        origin += f" (SHA-256 {provenance['source_sha256'][:16]}...)"
    notes = list(provenance.get("notes", ()))
    if naming:
        head += f", with the names of {naming.library}"
        other = [f"{key} {value}" for key, value in own_sizes(model_of(provenance)).items()]
        if other:
            text = f"{naming.library} has no {provenance['arch']} of {' and '.join(other)}"
            notes.append(f"{text}: only jaxft reads this file")
        notes += loading_notes(weights, naming)
    return "\n".join([f"{out}: {provenance['arch']}, {head}, from {origin}", *(f"  {note}" for note in notes)])


def main(argv: list[str]) -> None:
    parser = ArgumentParser("python -m jaxft.convert", __doc__)
    parser.add_argument("source", metavar="SOURCE", nargs="?", help="the weights to convert: a file, or a name")
    parser.add_argument(
        "out",
        metavar="OUT",
        nargs="?",
        type=output_argument,
        help="a .safetensors file; with --to torch or torchvision also a .pth file",
    )
    parser.add_argument(
        "--list",
        nargs="?",
        const="names",
        choices=("names", *FAMILY_NAMES),
        metavar="FAMILY",
        help="list the weights that have a name, or the architectures of a family",
    )
    parser.add_argument("--info", action="store_true", help="describe SOURCE without converting it")
    parser.add_argument("--json", action="store_true", help="with --info: print one JSON object")
    parser.add_argument(
        "--arch",
        type=canonical,
        choices=NAMES,
        metavar="ARCH",
        help="the architecture that SOURCE must have (default: any); --list FAMILY names them",
    )
    parser.add_argument("--to", choices=["flax", "torch", "torchvision"], default="flax", help="the layout of OUT")
    parser.add_argument("--verify", action="store_true", help="compare with the network of SOURCE's library in torch")
    args = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # CPUs have float64, and an accelerator may be in use by another process
    if args.list is not None:
        print(f"{catalog.table()}\n\n{families()}" if args.list == "names" else family_table(args.list))
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
    naming = None if args.to == "flax" else naming_of(weights, "" if args.to == "torch" else args.to)
    if args.verify:
        weights = verify(args.source, weights)
    if naming is None:
        write_weights(args.out, weights)
    else:
        write_tensors(args.out, to_torch(weights, naming))
    print(_summary(args.source, args.out, weights, naming))
