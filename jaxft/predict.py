"""What pictures show, by a trained checkpoint: its workdir is all that is needed.

python -m jaxft.predict --workdir runs/cifar10 picture.jpg folder/ [--top_k 3] [--json]

A line for each picture, with the likeliest classes first. Folders are searched with all that is in them.
--json prints one object a line: {"file", "label", "probability", "top_k": [{"label", "probability"}, ...]}, or
{"file", "error"} for a file that is no picture; the exit code is then 2, after all others are done.

python -m jaxft.predict --workdir runs/cifar10 --serve

A web page on this machine, for pictures that a person drops there.
"""

import dataclasses
import json
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from PIL import Image
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from jaxft import folders, pictures
from jaxft.backend import set_up_backend
from jaxft.checkpoint import LoadedCheckpoint, load_checkpoint
from jaxft.config import resolve
from jaxft.errors import ArgumentParser, UserError, run_command
from jaxft.evaluate import Evaluation, evaluate_checkpoint
from jaxft.folding import fold_norms
from jaxft.preprocessing import Preprocessing
from jaxft.progress import Progress
from jaxft.steps import predict_step

BATCH_SIZE = 64  # at most

Picture = str | Path | Image.Image | np.ndarray  # a file, or uint8 (H, W, 3)


class Prediction(NamedTuple):
    label: str
    probability: float
    top_k: tuple[tuple[str, float], ...]  # labels and probabilities, the likeliest first


class Classifier:
    """A trained checkpoint that tells what pictures show, and how often it is right."""

    def __init__(self, checkpoint: LoadedCheckpoint) -> None:
        self._checkpoint = checkpoint._replace(state=dataclasses.replace(checkpoint.state, opt_state=()))
        self.class_names: tuple[str, ...] = tuple(checkpoint.info["class_names"])
        self.preprocessing = Preprocessing(**checkpoint.info["preprocessing"])
        self._stored_size: int = resolve(checkpoint.info["config"]).data.stored_size
        model, self._variables = fold_norms(checkpoint.model, checkpoint.state.variables())
        step = partial(predict_step, model=model, preprocessing=self.preprocessing)
        self._p_predict_step = jax.pmap(step, axis_name=model.axis_name, in_axes=(None, 0))

    def predict(self, pictures: Iterable[Picture], top_k: int = 3) -> list[Prediction]:
        """Of files, Pillow images or uint8 arrays (H, W, 3), of any size, in their order.

        Raises UserError for a file that cannot be read.
        """
        return [rank(row, self.class_names, top_k) for row in self.probabilities(pictures)]

    def probabilities(self, pictures: Iterable[Picture]) -> np.ndarray:
        """float32 (N, num_classes), in the order of class_names."""
        rows = []
        for row in self.stream(pictures):
            if isinstance(row, UserError):
                raise row
            rows.append(row)
        return np.stack(rows) if rows else np.zeros((0, len(self.class_names)), np.float32)

    def stream(self, pictures: Iterable[Picture]) -> Iterator[np.ndarray | UserError]:
        """The probabilities (num_classes,) of each picture in turn, or why it cannot be read.

        Pictures are read in batches, the next one while the devices work.
        """
        waiting: deque[Iterator[np.ndarray | UserError]] = deque()
        source, rows = iter(pictures), 1
        with ThreadPoolExecutor() as pool:
            while some := list(islice(source, BATCH_SIZE)):
                rows = max(rows, 1 << (len(some) - 1).bit_length())  # few shapes, for each has to be compiled
                waiting.append(self._predict_batch(list(pool.map(self._read, some)), rows))
                if len(waiting) > 1:
                    yield from waiting.popleft()
            for batch in waiting:
                yield from batch

    def evaluate(self, data_dir: str | None = None) -> Evaluation:
        """On the pictures that the run was tested on; data_dir: where they are by now, if they moved."""
        return evaluate_checkpoint(self._checkpoint, data_dir)

    def _read(self, picture: Picture) -> np.ndarray | UserError:
        """uint8 (image_size, image_size, 3)"""
        try:
            if isinstance(picture, np.ndarray):
                if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
                    raise UserError(f"a picture must be uint8 (H, W, 3), not {picture.dtype} {picture.shape}")
                array = picture
            elif isinstance(picture, Image.Image):
                array = pictures.to_rgb(picture)
            else:
                array = pictures.decode(Path(picture))
            if self._stored_size and min(array.shape[:2]) > self._stored_size:  # as the run's own pictures were kept
                array = pictures.shrink(array, self._stored_size)
            return pictures.shrink(array, self.preprocessing.image_size)
        except UserError as error:
            return error

    def _predict_batch(self, read: list[np.ndarray | UserError], rows: int) -> Iterator[np.ndarray | UserError]:
        """Sets the devices to work at once, on `rows` pictures or a few more, and waits for them when iterated."""
        images = [image for image in read if not isinstance(image, UserError)]
        devices, side = jax.local_device_count(), self.preprocessing.image_size
        batch = np.zeros((devices, -(-rows // devices), side, side, 3), np.uint8)
        batch.reshape(-1, side, side, 3)[: len(images)] = np.reshape(images, (-1, side, side, 3))
        probabilities = self._p_predict_step(self._variables, batch)

        def rows_and_errors() -> Iterator[np.ndarray | UserError]:
            found = iter(np.asarray(probabilities).reshape(-1, len(self.class_names)))
            for image in read:
                yield image if isinstance(image, UserError) else next(found)

        return rows_and_errors()


def load(workdir: str | Path, checkpoint: str = "best") -> Classifier:
    """A run's checkpoint, 'best', 'latest' or a step's number, ready to predict. Raises UserError without one."""
    return Classifier(load_checkpoint(workdir, checkpoint))


def rank(probabilities: np.ndarray, class_names: Sequence[str], top_k: int) -> Prediction:
    order = np.argsort(-probabilities, kind="stable")[:top_k]
    top = tuple((class_names[i], float(probabilities[i])) for i in order)
    return Prediction(*top[0], top)


def find_files(paths: Iterable[Path]) -> list[Path]:
    """The files named, and all pictures in the folders named, at any depth, in the order of their names."""
    files = []
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        inside = folders.pictures_below(path)
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
        from jaxft.serve import serve
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
        told = _printable("; ".join(map(str, unreadable[:5]))) + more
        raise UserError(f"{len(unreadable)} of {len(files)} files are not predicted: {told}")


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
