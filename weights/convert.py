"""Converts a torchvision ResNet (.pth, .safetensors) to a jaxft weights file, without torch.

    python weights/convert.py resnet50.pth resnet50.safetensors

Every key and shape is checked against the model; the file's metadata tells where the weights come from.
"""

import argparse
import sys

from jaxft.errors import UserError, run_command
from jaxft.pretrained import read_weights, write_weights
from jaxft.resnet import ARCHITECTURES


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "weights/convert.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("source", metavar="SOURCE", help="a torchvision state_dict: .pth or .safetensors")
    parser.add_argument("out", metavar="OUT.safetensors", help="the jaxft file to write")
    parser.add_argument("--arch", choices=ARCHITECTURES, help="what SOURCE must hold (default: what it does hold)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    if not args.out.endswith(".safetensors"):
        raise UserError(f"OUT must end in .safetensors, not {args.out}")
    weights = read_weights(args.source, args.arch)
    write_weights(args.out, weights)
    print(
        f"{args.out}: {weights.provenance['arch']}, {weights.provenance['num_classes']} classes, "
        f"from {args.source} (SHA-256 {weights.provenance['source_sha256'][:16]}...)"
    )


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
