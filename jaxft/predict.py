"""What pictures show, by a trained checkpoint: its workdir is all that is needed.

python -m jaxft.predict --workdir runs/cifar10 picture.jpg folder/ [--top_k 3] [--json]

A line for each picture, with the likeliest classes first. Folders are searched with all that is in them.
--json prints one object a line: {"file", "label", "probability", "top_k": [{"label", "probability"}, ...]}, or
{"file", "error"} for a file that is no picture; the exit code is then 2, after all others are done.

python -m jaxft.predict --workdir runs/cifar10 --serve

A web page on this machine, for pictures that a person drops there.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from jaxft.classifier import Classifier, Prediction, load, rank
from jaxft.data import image_folder
from jaxft.errors import ArgumentParser, UserError, run_command
from jaxft.process import set_up_backend
from jaxft.progress import Progress


def find_files(paths: Iterable[Path]) -> list[Path]:
    """The files named, and all pictures in the folders named, at any depth, in the order of their names."""
    files = []
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        inside = image_folder.pictures_below(path)
        if not inside:
            raise UserError(f"there are no pictures in {path}")
        files.extend(inside)
    return files


class Table:
    """A line for each picture; on a terminal with colours (unless NO_COLOR is set) and within its width."""

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
    """Without what would move a terminal's cursor or cannot be encoded."""
    return "".join(c if c.isprintable() else "\ufffd" for c in str(text))


def _fit(text: str, width: int) -> str:
    """Padded to a width in terminal cells, or cut at its beginning, for files differ at their ends."""
    if cell_len(text) <= width:
        return set_cell_size(text, width)
    while cell_len(text) > width - 1:
        text = text[1:]
    return set_cell_size(f"\u2026{text}", width)


def json_line(file: Path, found: Prediction | UserError) -> str:
    if isinstance(found, UserError):
        return json.dumps({"file": str(file), "error": str(found)})
    top = [{"label": label, "probability": probability} for label, probability in found.top_k]
    return json.dumps({"file": str(file), "label": found.label, "probability": found.probability, "top_k": top})


def show_page(classifier: Classifier, host: str, port: int, top_k: int) -> None:
    try:
        from jaxft.reporting.serve import serve
    except ImportError:
        raise UserError("--serve needs a web server: pip install 'jaxft[serve]'") from None
    serve(classifier, host, port, top_k)


def main(argv: list[str]) -> None:
    parser = ArgumentParser("python -m jaxft.predict", __doc__)
    parser.add_argument("--workdir", required=True, metavar="DIR", help="of the training run")
    parser.add_argument("--checkpoint", default="best", help="best (default), latest or a step's number")
    parser.add_argument("--top_k", type=int, default=3, metavar="K", help="classes shown of each picture (default: 3)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    parser.add_argument("--serve", action="store_true", help="show a web page instead (pip install 'jaxft[serve]')")
    parser.add_argument("--host", default="127.0.0.1", help="of --serve (default: 127.0.0.1, this machine alone)")
    parser.add_argument("--port", type=int, default=8765, help="of --serve (default: 8765; 0: any that is free)")
    parser.add_argument("pictures", nargs="*", type=Path, metavar="PICTURE_OR_FOLDER")
    args = parser.parse_args(argv)
    set_up_backend()
    if args.top_k < 1:
        raise UserError(f"--top_k must be at least 1, not {args.top_k}")
    if args.serve == bool(args.pictures):
        raise UserError("name pictures or folders, or else --serve")
    if args.serve:
        show_page(load(args.workdir, args.checkpoint), args.host, args.port, args.top_k)
        return
    files = find_files(args.pictures)
    classifier = load(args.workdir, args.checkpoint)
    table = Table(files, classifier.class_names, args.top_k)
    unreadable = []
    with Progress("predicting", len(files), bar=not table.on_terminal) as progress:
        for file, row in zip(files, classifier.stream(files), strict=True):
            if isinstance(row, UserError):
                found: Prediction | UserError = row
                unreadable.append(row)
            else:
                found = rank(row, classifier.class_names, args.top_k)
            if args.json:
                print(json_line(file, found), flush=True)
            else:
                table.print(file, found)
            progress.update(1)
    if unreadable:
        more = f"; and {len(unreadable) - 5} more" if len(unreadable) > 5 else ""
        text = _printable("; ".join(map(str, unreadable[:5]))) + more
        raise UserError(f"{len(unreadable)} of {len(files)} files are not predicted: {text}")


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
