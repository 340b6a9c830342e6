"""A trained checkpoint in the form of another library, or as a weights file for another run.

python -m jaxft.export --workdir runs/cifar10 --to torchvision --out resnet50-cifar10.pth

torchvision.models.resnet50(num_classes=10).load_state_dict(torch.load("resnet50-cifar10.pth")) takes it.

python -m jaxft.export --workdir runs/pets --to flax --out pets.safetensors

Another run starts from it by --config.model.pretrained=pets.safetensors.
"""

import json
import sys
from pathlib import Path

import jax

from jaxft.checkpoint import load_checkpoint
from jaxft.errors import ArgumentParser, UserError, run_command
from jaxft.pretrained import Weights, to_torch, write_weights
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


def export_flax(workdir: Path, which: str, out: Path, dtype: str) -> None:
    """Writes a jaxft weights file, to be another run's model.pretrained, that tells how it was made."""
    if out.suffix != ".safetensors":
        raise UserError(f"--out must end in .safetensors, not {out}")
    step, info, model, state = load_checkpoint(workdir, which)
    state = jax.device_get(state)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    accuracy = {row["step"]: row["accuracy"] for row in rows if row["split"] == "eval"}
    config = info["config"]
    provenance = {
        "arch": config["model"]["arch"],
        "width": model.width,
        "stem": model.stem,
        "num_classes": model.num_classes,
        "source": f"step {step} of a jaxft run on {config['data']['name'].split('/')[-1]}",
        "mean": info["preprocessing"]["mean"],
        "std": info["preprocessing"]["std"],
        "eval_accuracy": accuracy.get(step),
        **{key: info[key] for key in ("config", "class_names", "preprocessing", "train_size", "weights", "versions")},
    }
    write_weights(out, Weights(jax.tree.map(lambda a: a.astype(dtype), variables), provenance))
    print(f"{out}: {provenance['arch']}, {model.num_classes} classes, {dtype}, of checkpoint {step}")


def main(argv: list[str]) -> None:
    parser = ArgumentParser("python -m jaxft.export", __doc__)
    parser.add_argument("--workdir", required=True, type=Path, help="of the training run")
    parser.add_argument("--checkpoint", default="best", help="best (default), latest or a step's number")
    parser.add_argument("--to", required=True, choices=["torchvision", "flax"])
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="a .pth or .safetensors file")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16"], help="of the weights, for flax")
    args = parser.parse_args(argv)
    if args.to == "flax":
        export_flax(args.workdir, args.checkpoint, args.out, args.dtype)
    else:
        export_torchvision(args.workdir, args.checkpoint, args.out)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
