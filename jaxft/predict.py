"""Classifies images with a trained checkpoint.

python -m jaxft.predict --workdir runs/cifar10 image.jpg folder/ [--top_k 3] [--json]

Prints a line for each image, with the most probable classes first. Folders are searched recursively.
--json prints one object per line: {"file", "label", "probability", "top_k": [{"label", "probability"}, ...]}, or
{"file", "error"} for a file that cannot be read as an image; the exit code is then 2, after all others are done.

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

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from jaxft import interrupts
from jaxft.classifier import load
from jaxft.data import labelled_files
from jaxft.errors import ArgumentParser, UserError, counted, printable, shortened
from jaxft.files import is_folder
from jaxft.progress import Progress
from jaxft.targets.classification import Prediction, rank


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
    """Prints a line for each image; on a terminal in colour (unless NO_COLOR is set) and cut to its width."""

    def __init__(self, files: Sequence[Path], class_names: Sequence[str], top_k: int) -> None:
        self._console = Console(highlight=False)
        self._label_width = max(cell_len(_printable(name)) for name in class_names)
        self._file_width = max(cell_len(_printable(file)) for file in files)
        if self.on_terminal:
            self._label_width = min(self._label_width, 24)
            left = self._console.width - min(top_k, len(class_names)) * (self._label_width + len("  100.0% "))
            self._file_width = min(self._file_width, max(left, 16))

    @property
    def on_terminal(self) -> bool:
        return self._console.is_terminal

    def print(self, file: Path, found: Prediction | UserError) -> None:
        line = Text(_fit(_printable(file), self._file_width))
        if isinstance(found, UserError):
            line.append("  cannot be read", "red")
        else:
            for i, (label, probability) in enumerate(found.top_k):
                line.append(f"  {_fit(_printable(label), self._label_width)} {probability:6.1%}", "" if i else "bold")
        if self.on_terminal:
            self._console.print(line, no_wrap=True, overflow="ellipsis")
        else:
            print(line.plain, flush=True)


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


def json_line(file: Path, found: Prediction | UserError) -> str:
    if isinstance(found, UserError):
        return json.dumps({"file": str(file), "error": str(found)})
    return json.dumps({"file": str(file)} | found.to_json())


def show_page(args: Namespace) -> None:
    try:
        from jaxft.reporting.serve import allowed_names, listen, serve
    except ImportError:
        raise UserError("--serve needs a web server: pip install 'jaxft[serve]'") from None
    allowed_names(args.host, args.allow_host)  # raises UserError for a malformed name, before the network is loaded
    with listen(args.host, args.port) as listener:
        serve(load(args.workdir, args.checkpoint), listener, args.host, args.top_k, args.allow_host)


def main(argv: list[str]) -> None:
    parser = ArgumentParser("python -m jaxft.predict", __doc__)
    parser.add_argument("--workdir", required=True, metavar="DIR", help="workdir of the run")
    parser.add_argument("--checkpoint", default="best", help="best (default), latest or the number of a step")
    parser.add_argument("--top_k", type=int, default=3, metavar="K", help="classes shown for each image (default: 3)")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
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
    if args.top_k < 1:
        raise UserError(f"--top_k must be at least 1, not {args.top_k}")
    if args.serve == bool(args.images):
        raise UserError("name either images and folders, or --serve")
    if args.serve:
        show_page(args)
        return
    files = find_files(args.images)
    classifier = load(args.workdir, args.checkpoint)
    table = Table(files, classifier.class_names, args.top_k)
    unreadable = []
    with Progress("predicting", len(files), bar=not table.on_terminal) as progress:
        for file, row in zip(files, classifier.stream(files), strict=True):
            interrupts.check()
            if isinstance(row, UserError):
                found: Prediction | UserError = row
                unreadable.append((file, row))
            else:
                found = rank(row, classifier.class_names, args.top_k)
            if args.json:
                print(json_line(file, found), flush=True)
            else:
                table.print(file, found)
            progress.update(1)
    if unreadable:
        (_, error), *others = unreadable
        also = f"; also {shortened([file.name for file, _ in others], 5)}" if others else ""
        count = f"{len(unreadable):,} of {counted(len(files), 'file')}"
        raise UserError(_printable(f"{count} could not be classified: {error}{also}"))
