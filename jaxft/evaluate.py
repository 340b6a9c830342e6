"""Evaluates a checkpoint on the images that its run was tested on.

python -m jaxft.evaluate --workdir runs/cifar10 [--checkpoint best|latest|STEP] [--json]
"""

if __name__ == "__main__":  # a command's process is prepared before JAX is imported
    from jaxft.cli import run

    run("evaluate")

import json

from jaxft.errors import ArgumentParser
from jaxft.targets.classification import evaluation_summary, score_lines
from jaxft.training.evaluation import evaluate


def main(argv: list[str]) -> None:
    parser = ArgumentParser("python -m jaxft.evaluate", __doc__)
    parser.add_argument("--workdir", required=True, metavar="DIR", help="workdir of the run")
    parser.add_argument("--checkpoint", default="best", help="best (default), latest or the number of a step")
    parser.add_argument("--data_dir", help="folder of the images, or of prepared TFDS datasets, if it has moved")
    parser.add_argument(
        "--flip", action="store_true", help="average over each image and its mirror image, as model.test_flip does"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, with the confusion matrix")
    args = parser.parse_args(argv)
    step, split, class_names, predictions = evaluate(args.workdir, args.checkpoint, args.data_dir, flip=args.flip)
    scores = evaluation_summary(predictions, class_names)
    if args.json:
        print(json.dumps({"checkpoint": step, "split": split} | scores))
        return
    first, *others = score_lines(scores)
    print(f"checkpoint {step}: {first} on {split}")
    for line in others:
        print(f"  {line}")
