"""Compares the train step and evaluation of a ViT-S/16, a ConvNeXt-T and a VGG-16 with PyTorch's: a table as Markdown.

    python -m benchmarks.families [--networks vit,convnext,vgg] [--dtypes float32,bfloat16] [--batch 8] [--pixels 224]
        [--rounds 3] [--steps_per_turn 2] [--cores 0-1] [--no_compile]

PyTorch has scaled_dot_product_attention, eager and by torch.compile; ViT-S/16 is timm's, the others are torchvision's.
The six contenders of a network and dtype (jaxft, eager and compiled, each for training and evaluation) start at once
and then take turns as benchmarks/train_step.py says: medians of --rounds turns. PyTorch keeps its compiled kernels in a
cache of its own, so that a second run takes less time. On a busy machine, only --cores 0 and the images per second of
CPU time are comparable. The last line is JSON.
"""

import argparse
import json
import sys
from typing import Any

from benchmarks.child import Child
from benchmarks.train_step import Task, machine, start, summary, take_turns

NETWORKS = {"vit": "vit_small_patch16_224", "convnext": "convnext_tiny", "vgg": "vgg16"}
KINDS = {"jaxft": "jaxft-{}", "eager": "torch-{}", "compile": "torch-{}-compile"}
SECONDS = 900  # for a contender's first step, and for the turns of a table's row


def measure(arch: str, dtype: str, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Returns {"train": {"jaxft": summary, "eager": ..., "compile": ...}, "forward": ...} of those that worked."""
    kinds = {name: kind.format(dtype) for name, kind in KINDS.items() if name != "compile" or not args.no_compile}
    children: dict[tuple[str, str], Child] = {}
    for which in ("train", "forward"):
        for name, kind in kinds.items():
            task = Task(arch, args.pixels, args.batch, which, number=args.steps_per_turn)
            children[which, name] = start(kind, task, cores=args.cores)
    for key, child in [*children.items()]:
        try:
            child.read(SECONDS)
        except (RuntimeError, TimeoutError):
            print(child.all_errors()[-2000:], file=sys.stderr)
            children.pop(key).kill()
    result: dict[str, dict[str, Any]] = {}
    for which in ("train", "forward"):
        taking_part = {name: child for (own, name), child in children.items() if own == which}
        turns = take_turns(taking_part, args.rounds, SECONDS)
        result[which] = {name: summary(own, args.batch) for name, own in turns.items() if len(own) > 1}
        for child in taking_part.values():
            child.close(10)
    return result


def row(arch: str, dtype: str, which: str, figures: dict[str, Any], key: str) -> str:
    """Returns a table's row: images/s of each contender, and jaxft's ratio to the better one of PyTorch's."""
    rates = {name: figures[name][key] if name in figures else None for name in KINDS}
    others = [rate for name, rate in rates.items() if name != "jaxft" and rate]
    ratio = f"{rates['jaxft'] / max(others):.2f}" if rates["jaxft"] and others else ""
    cells = ("" if rate is None else f"{rate:.1f}" for rate in rates.values())
    return f"| {arch}, {'train step' if which == 'train' else 'evaluation'}, {dtype} | {' | '.join(cells)} | {ratio} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps_per_turn", type=int, default=2)
    parser.add_argument("--cores", default="", help="cores to use, such as 0 or 0-3; one core on a busy machine")
    parser.add_argument("--no_compile", action="store_true", help="without torch.compile")
    args = parser.parse_args()
    key = "images_per_cpu_second" if args.cores.isdecimal() else "images_per_second"
    results: dict[str, Any] = {"machine": machine(), "batch": args.batch, "pixels": args.pixels, "key": key}
    print(
        "| network | jaxft | PyTorch eager | torch.compile | jaxft's ratio to the better |\n|---|---:|---:|---:|---:|"
    )
    for name in args.networks.split(","):
        for dtype in args.dtypes.split(","):
            for which, figures in measure(NETWORKS[name], dtype, args).items():
                results[f"{NETWORKS[name]} {which} {dtype}"] = figures
                print(row(NETWORKS[name], dtype, which, figures, key), flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
