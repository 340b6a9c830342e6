"""A trained checkpoint in the form of another library.

python -m jaxft.export --workdir runs/cifar10 --to torchvision --out resnet50-cifar10.pth

torchvision.models.resnet50(num_classes=10).load_state_dict(torch.load("resnet50-cifar10.pth")) takes it.
"""

import sys
from pathlib import Path

import jax

from jaxft.checkpoint import load_checkpoint
from jaxft.errors import ArgumentParser, UserError, run_command
from jaxft.pretrained import Weights, to_torch
from jaxft.torch_files import write_tensors


def export_torchvision(workdir: Path, which: str, out: Path) -> None:
    """Writes a state_dict, .pth or .safetensors, that torchvision's model loads with strict=True."""
    if out.suffix not in (".pth", ".safetensors"):
        raise UserError(f"--out must end in .pth or .safetensors, not {out}")
    checkpoint = load_checkpoint(workdir, which)
    state = jax.device_get(checkpoint.state)
    weights = Weights({"params": state.params, "batch_stats": state.batch_stats}, checkpoint.info["weights"])
    write_tensors(out, to_torch(weights))
    preprocessing = checkpoint.info["preprocessing"]
    print(
        f"{out}: {checkpoint.info['config']['model']['arch']}, {checkpoint.model.num_classes} classes, of checkpoint "
        f"{checkpoint.step}; give it pictures of {preprocessing['image_size']} pixels normalised by mean "
        f"{preprocessing['mean']} and std {preprocessing['std']}"
    )


def main(argv: list[str]) -> None:
    parser = ArgumentParser("python -m jaxft.export", __doc__)
    parser.add_argument("--workdir", required=True, type=Path, help="of the training run")
    parser.add_argument("--checkpoint", default="best", help="best (default), latest or a step's number")
    parser.add_argument("--to", required=True, choices=["torchvision"])
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="a .pth or .safetensors file")
    args = parser.parse_args(argv)
    export_torchvision(args.workdir, args.checkpoint, args.out)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
