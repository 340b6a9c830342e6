"""Accuracy of a trained checkpoint, from its workdir and the data alone.

python -m jaxft.evaluate --workdir runs/cifar10 [--checkpoint best|latest|STEP] [--json]
"""

import json
import sys

from jaxft.errors import ArgumentParser
from jaxft.process import set_up_backend
from jaxft.run.processes import run_together
from jaxft.targets.classification import evaluation_summary
from jaxft.training.evaluation import evaluate


def main(argv: list[str]) -> None:
    parser = ArgumentParser("python -m jaxft.evaluate", __doc__)
    parser.add_argument("--workdir", required=True, help="of the training run")
    parser.add_argument("--checkpoint", default="best", help="best (default), latest or a step's number")
    parser.add_argument("--data_dir", help="of prepared TFDS sets, if it is no longer the one trained with")
    parser.add_argument("--flip", action="store_true", help="test with mirror images too, as model.test_flip")
    parser.add_argument("--json", action="store_true", help="print one JSON object, with the confusion matrix")
    args = parser.parse_args(argv)
    set_up_backend()
    step, split, class_names, predictions = evaluate(args.workdir, args.checkpoint, args.data_dir, flip=args.flip)
    scores = evaluation_summary(predictions, class_names)
    if args.json:
        print(json.dumps({"checkpoint": step, "split": split} | scores))
        return
    low, high = scores["accuracy_interval"]
    print(
        f"checkpoint {step}: accuracy {scores['accuracy']:.2%} ({scores['correct']} of {scores['pictures']}), "
        f"loss {scores['loss']:.4f} on {split}"
    )
    print(f"  95 % interval {low:.2%} to {high:.2%}")
    for k, accuracy in scores["top_k_accuracy"].items():
        print(f"  top-{k} accuracy {accuracy:.2%}")
    print(f"  mean per-class accuracy {scores['mean_per_class_accuracy']:.2%}")
    print(f"  expected calibration error {scores['expected_calibration_error']:.2%}")


if __name__ == "__main__":
    sys.exit(run_together(main, sys.argv[1:]))
