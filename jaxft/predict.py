"""Predicts the targets of images, or computes their features, with a trained checkpoint or with pretrained weights.

python -m jaxft.predict --workdir runs/cifar10 image.jpg folder/ [--top_k 3] [--json]
python -m jaxft.predict --weights resnet50.tv_in1k_v2 image.jpg folder/

Prints a line for each image, with the most probable classes first. Folders are searched recursively.
--json prints one object per line: {"file", "label", "probability", "top_k": [{"label", "probability"}, ...]}, or
{"file", "error"} for a file that cannot be read as an image; the exit code is then 2, after all others are done.
A run with tags, a number or several targets has {"file", "targets": {NAME: ...}}: a class as above, tags as {"tags",
"probabilities"}, a number as {"value"}.

python -m jaxft.predict --weights resnet50.tv_in1k_v2 --features features.npz folder/ [--layer logits]

Writes `features`, float32 (N, D), and `files` (N,), the paths of the images that could be read, instead of predictions.
pooled features are the head's input, logits its output.

python -m jaxft.predict --workdir runs/cifar10 --serve

Serves a web page on this machine that classifies the images dropped there. Programs send files to the same address:
curl --data-binary @image.jpg http://127.0.0.1:8765/predict
"""

if __name__ == "__main__":  # a command's process is prepared before JAX is imported
    from jaxft.cli import run

    run("predict")

import json
import sys
from argparse import Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from jaxft import interrupts
from jaxft.classifier import LAYERS, Classifier, JointPrediction
from jaxft.data import labelled_files
from jaxft.errors import ArgumentParser, UserError, counted, printable, shortened, write_message
from jaxft.files import atomic_write, is_folder, output_argument, reason
from jaxft.pretrained.load import load_pretrained
from jaxft.progress import Progress
from jaxft.targets.classification import Prediction
from jaxft.targets.number import Number
from jaxft.targets.tags import Tags
from jaxft.training.restore import is_workdir, load_checkpoint
from jaxft.training.steps import Layer

NAMES = {"pooled": "pooled features", "logits": "logits"}


def find_files(paths: Iterable[Path]) -> list[Path]:
    """Returns the named files and all images below the named folders, sorted by name.

    Raises UserError if a folder has no images.
    """
    files = []
    for path in paths:
        if not is_folder(path):
            files.append(path)
            continue
        inside = labelled_files.image_paths(path)
        if not inside:
            raise UserError(f"there are no images in {path}")
        files.extend(inside)
    return files


class Table:
    """Prints a line for each image; on a terminal in colour (unless NO_COLOR is set) and cut to its width.

    class_names: of the only target; () if there are tags, numbers or several targets, whose lines are not cut.
    """

    def __init__(self, files: Sequence[Path], class_names: Sequence[str], top_k: int) -> None:
        self._console = Console(highlight=False)
        self._label_width = max((cell_len(_printable(name)) for name in class_names), default=0)
        self._file_width = max(cell_len(_printable(file)) for file in files)
        if self.on_terminal:
            self._label_width = min(self._label_width, 24)
            left = self._console.width - min(top_k, len(class_names)) * (self._label_width + len("  100.0% "))
            self._file_width = min(self._file_width, max(left if class_names else self._console.width // 3, 16))

    @property
    def on_terminal(self) -> bool:
        return self._console.is_terminal

    def print(self, file: Path, found: Prediction | JointPrediction | UserError) -> None:
        line = Text(_fit(_printable(file), self._file_width))
        if isinstance(found, UserError):
            line.append("  cannot be read", "red")
        elif isinstance(found, dict):
            for i, (name, own) in enumerate(found.items()):
                line.append(f"{'; ' if i else '  '}{_printable(name)} ")
                line.append(_printable(_described(own)), "bold")
        else:
            for i, (label, probability) in enumerate(found.top_k):
                line.append(f"  {_fit(_printable(label), self._label_width)} {probability:6.1%}", "" if i else "bold")
        if self.on_terminal and isinstance(found, dict):
            self._console.print(line, soft_wrap=True)
        elif self.on_terminal:
            self._console.print(line, no_wrap=True, overflow="ellipsis")
        else:
            print(line.plain, flush=True)


def _described(found: Prediction | Tags | Number) -> str:
    """Returns the prediction of a target as text; of a class all of top_k."""
    if isinstance(found, Prediction):
        return ", ".join(f"{label} {probability:.1%}" for label, probability in found.top_k)
    return str(found)


def _printable(text: object) -> str:
    """Replaces characters that would move a terminal's cursor or that stdout cannot encode."""
    encoding = sys.stdout.encoding or "utf-8"
    return printable(str(text)).encode(encoding, "replace").decode(encoding)


def _fit(text: str, width: int) -> str:
    """Pads a text to a width in terminal cells, or cuts off its beginning, because file names differ at the end."""
    if cell_len(text) <= width:
        return set_cell_size(text, width)
    while cell_len(text) > width - 1:
        text = text[1:]
    return set_cell_size(f"\u2026{text}", width)


def json_line(file: Path, found: Prediction | JointPrediction | UserError) -> str:
    if isinstance(found, UserError):
        return json.dumps({"file": str(file), "error": str(found)})
    if isinstance(found, dict):
        return json.dumps({"file": str(file), "targets": {name: own.to_json() for name, own in found.items()}})
    return json.dumps({"file": str(file)} | found.to_json())


def load_network(args: Namespace, layer: Layer) -> Classifier:
    """Loads the checkpoint of --workdir or the pretrained weights of --weights.

    Raises UserError if they cannot be used, or have no head although `layer` needs one.
    """
    if args.workdir:
        return Classifier(load_checkpoint(args.workdir, args.checkpoint))
    if is_workdir(args.weights):
        raise UserError(f"{args.weights} is a run's workdir, not a weights file; use --workdir {args.weights}")
    weights = load_pretrained(args.weights)
    classifier = Classifier(weights)
    classifier.check_layer(layer)
    for note in weights.provenance.get("notes", ()):
        write_message(f"note: {note}")
    return classifier


def show_page(args: Namespace) -> None:
    try:
        from jaxft.reporting.serve import allowed_names, listen, serve
    except ImportError:
        raise UserError("--serve needs a web server: pip install 'jaxft[serve]'") from None
    allowed_names(args.host, args.allow_host)  # raises UserError for a malformed name, before the network is loaded
    with listen(args.host, args.port) as listener:
        serve(load_network(args, "probabilities"), listener, args.host, args.top_k, args.allow_host)


Unreadable = list[tuple[Path, UserError]]


def print_predictions(classifier: Classifier, files: Sequence[Path], top_k: int, *, as_json: bool) -> Unreadable:
    """Prints a line for each file and returns the files that cannot be read.

    Raises UserError if the network has no head.
    """
    predictions = classifier.stream_predictions(files, top_k)
    table = Table(files, classifier.class_names, top_k)
    unreadable = []
    with Progress("predicting", len(files), bar=not table.on_terminal) as progress:
        for file, found in zip(files, predictions, strict=True):
            interrupts.check()
            if isinstance(found, UserError):
                unreadable.append((file, found))
            if as_json:
                print(json_line(file, found), flush=True)
            else:
                table.print(file, found)
            progress.update(1)
    return unreadable


def write_features(classifier: Classifier, files: Sequence[Path], layer: Layer, out: Path) -> Unreadable:
    """Writes the features of the files that can be read, and returns the others; if none can, nothing is written.

    Raises UserError if `out` cannot be written.
    """
    readable, features, unreadable = [], [], []
    with Progress("computing features", len(files)) as progress:
        for file, row in zip(files, classifier.stream(files, layer), strict=True):
            interrupts.check()
            if isinstance(row, UserError):
                unreadable.append((file, row))
            else:
                readable.append(str(file))
                features.append(row)
            progress.update(1)
    if features:
        try:
            with atomic_write(out) as archive:
                np.savez(archive, features=np.stack(features), files=np.array(readable))
        except OSError as error:
            raise UserError(f"--features {out} cannot be written: {reason(error)}; name another file") from None
        print(f"{out}: {counted(len(features), 'image')}, {features[0].size:,} {NAMES[layer]} each", flush=True)
    return unreadable


def check_arguments(args: Namespace) -> None:
    """Raises UserError for arguments that do not belong together."""
    if args.top_k < 1:
        raise UserError(f"--top_k must be at least 1, not {args.top_k}")
    if args.serve == bool(args.images):
        raise UserError("name either images and folders, or --serve")
    if args.weights and args.checkpoint != "best":
        raise UserError(f"--checkpoint {args.checkpoint} is for --workdir; a weights file holds one network")
    if args.features and (args.serve or args.json):
        raise UserError(f"--features writes a file; leave out {'--serve' if args.serve else '--json'}")
    if args.features and args.features.suffix != ".npz":
        raise UserError(f"--features must end in .npz, not {args.features}")
    if args.layer and not args.features:
        raise UserError(f"--layer {args.layer} needs --features OUT.npz")


def main(argv: list[str]) -> None:
    parser = ArgumentParser("python -m jaxft.predict", __doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--workdir", metavar="DIR", help="workdir of the run")
    source.add_argument("--weights", metavar="SOURCE", help="pretrained weights: a name, hf:OWNER/NAME or a file")
    parser.add_argument("--checkpoint", default="best", help="best (default), latest or the number of a step")
    parser.add_argument("--top_k", type=int, default=3, metavar="K", help="classes shown for each image (default: 3)")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    parser.add_argument(
        "--features", type=output_argument, metavar="OUT.npz", help="write features instead of predictions"
    )
    parser.add_argument("--layer", choices=LAYERS, help="layer of --features (default: pooled)")
    parser.add_argument("--serve", action="store_true", help="serve a web page instead (pip install 'jaxft[serve]')")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address of --serve (default: 127.0.0.1, only this machine)"
    )
    parser.add_argument("--port", type=int, default=8765, help="port of --serve (default: 8765; 0: any free one)")
    parser.add_argument(
        "--allow_host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name by which clients reach --serve, such as a reverse proxy's; can be repeated",
    )
    parser.add_argument("images", nargs="*", type=Path, metavar="IMAGE_OR_FOLDER")
    args = parser.parse_args(argv)
    check_arguments(args)
    if args.serve:
        show_page(args)
        return
    files = find_files(args.images)
    layer: Layer = args.layer or ("pooled" if args.features else "probabilities")
    classifier = load_network(args, layer)
    if args.features:
        unreadable = write_features(classifier, files, layer, args.features)
    else:
        unreadable = print_predictions(classifier, files, args.top_k, as_json=args.json)
    if unreadable:
        (_, error), *others = unreadable
        also = f"; also {shortened([file.name for file, _ in others], 5)}" if others else ""
        count = f"{len(unreadable):,} of {counted(len(files), 'file')}"
        what = "read" if args.features else "classified"
        raise UserError(_printable(f"{count} could not be {what}: {error}{also}"))
