"""A network that classifies images: a run's checkpoint, or pretrained weights with their head."""

import dataclasses
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from jaxft import inference
from jaxft.errors import UserError
from jaxft.files import expand_user, is_folder
from jaxft.inference import ImageLike, Inference
from jaxft.pretrained import catalog
from jaxft.pretrained.load import load_pretrained
from jaxft.pretrained.weights_file import Weights
from jaxft.targets.class_names import names_for
from jaxft.targets.classification import Prediction, rank
from jaxft.training.evaluation import Evaluation, evaluate_checkpoint
from jaxft.training.restore import LoadedCheckpoint, is_workdir, load_checkpoint
from jaxft.training.steps import Layer

FeatureLayer = Literal["pooled", "logits"]
LAYERS: tuple[FeatureLayer, ...] = get_args(FeatureLayer)


class Classifier:
    """A network that classifies images and computes their features; a run's network can also be evaluated."""

    def __init__(self, source: LoadedCheckpoint | Weights) -> None:
        self._checkpoint: LoadedCheckpoint | None = None
        if isinstance(source, Weights):
            self._name = source.provenance.get("name") or source.provenance["source"]
            self.class_names = names_for(source.provenance)
            self._inference = Inference(inference.from_weights(source))
        else:
            self._checkpoint = source._replace(state=dataclasses.replace(source.state, opt_state=()))
            self._name = f"checkpoint {source.step}"
            self.class_names = tuple(source.info["class_names"])
            self._inference = Inference(inference.from_checkpoint(source))
        self.preprocessing = self._inference.preprocessing

    @property
    def decoded_size(self) -> int:
        """The side of the square to which larger images may be shrunk while they are decoded; predictions are equal."""
        return self._inference.decoded_size

    def predict(self, pictures: ImageLike | Iterable[ImageLike], top_k: int = 3) -> list[Prediction]:
        """Classifies files, Pillow images or uint8 arrays (H, W, 3), of any size, in their order.

        A single one is a list of one. Raises UserError for anything else, for a file that cannot be read, and if the
        network has no head.
        """
        if not isinstance(top_k, int | np.integer) or isinstance(top_k, bool) or top_k < 1:
            raise UserError(f"top_k must be a whole number of at least 1, not {top_k!r}")
        return [rank(row, self.class_names, top_k) for row in self.probabilities(pictures)]

    def probabilities(self, pictures: ImageLike | Iterable[ImageLike]) -> np.ndarray:
        """Returns the probabilities, float32 (N, num_classes), in the order of class_names."""
        self.check_layer("probabilities")
        return self._inference.rows(pictures, "probabilities")

    def features(self, images: ImageLike | Iterable[ImageLike], layer: FeatureLayer = "pooled") -> np.ndarray:
        """Returns the features of images, float32 (N, D), in their order.

        layer: "pooled", the head's input, or "logits", its output (N, num_classes). Raises UserError as `predict` does.
        """
        if layer not in LAYERS:
            raise UserError(f"layer must be {' or '.join(map(repr, LAYERS))}, not {layer!r}")
        self.check_layer(layer)
        return self._inference.rows(images, layer)

    def stream(
        self, pictures: ImageLike | Iterable[ImageLike], layer: Layer = "probabilities"
    ) -> Iterator[np.ndarray | UserError]:
        """Yields the probabilities (num_classes,) of each image in turn, or the error if it cannot be read.

        Images are read in batches, the next batch while the devices compute. layer: yields features instead: "pooled"
        or "logits".
        """
        self.check_layer(layer)
        return self._inference.stream(pictures, layer)

    def evaluate(self, data_dir: str | None = None) -> Evaluation:
        """Evaluates on the images that the run was tested on. data_dir: their folder, if it has moved.

        Raises UserError for pretrained weights.
        """
        if self._checkpoint is None:
            raise UserError(f"{self._name} holds pretrained weights, which have no test images; evaluate a run")
        return evaluate_checkpoint(self._checkpoint, data_dir)

    def check_layer(self, layer: Layer) -> None:
        """Raises UserError if the network has no head, which every layer but "pooled" needs."""
        if layer != "pooled" and not self.class_names:
            raise UserError(
                f"{self._name} has no head, so it predicts no classes; take its pooled features (predict --features "
                "OUT.npz, jaxft.features), or train a head"
            )


def load(workdir: str | Path, checkpoint: str | int = "best") -> Classifier:
    """Loads a run's checkpoint ('best', 'latest' or the number of a step), or pretrained weights with their head.

    workdir: a run's folder, or a name or file that `load_pretrained` takes. Raises UserError if there is none.
    """
    if not isinstance(workdir, str | os.PathLike) or not str(workdir):
        raise UserError(f"workdir must be a run's folder or the name or file of pretrained weights, not {workdir!r}")
    if not _is_weights(str(workdir)):
        return Classifier(load_checkpoint(workdir, str(checkpoint)))
    if checkpoint != "best":
        raise UserError(f"{workdir} holds pretrained weights, so there is no checkpoint {checkpoint!r}; leave it out")
    return Classifier(load_pretrained(str(workdir)))


def features(source: str | Path, images: ImageLike | Iterable[ImageLike], layer: FeatureLayer = "pooled") -> np.ndarray:
    """Returns features of images, float32 (N, D): the input of a network's head ("pooled") or its output ("logits").

    source: a run's workdir, a weights file, or the name of pretrained weights. images: paths, Pillow images, or uint8
    arrays (N, H, W, 3) or (H, W, 3), of any size. They are resized, cropped and normalised as in the run's evaluation,
    or as the weights' config.json says (by default as torchvision does: 256 and 224 pixels, ImageNet's mean and
    deviation). With weights, images of the network's own size are only normalised. Images are read in batches, so only
    the features must fit into memory.

    Each call loads and compiles the network. To call it repeatedly, load it once: `model = jaxft.load(source)`, then
    `model.features(images)`. Raises UserError for an image that cannot be read, and for the logits of a network without
    a head.
    """
    if layer not in LAYERS:  # before the weights are loaded
        raise UserError(f"layer must be {' or '.join(map(repr, LAYERS))}, not {layer!r}")
    return load(source).features(images, layer)


def _is_weights(source: str) -> bool:
    """Returns whether a source names pretrained weights (a file, a folder that holds one, or a name), not a run.

    Raises UserError if it names neither.
    """
    if is_workdir(source):
        return False
    try:
        path = expand_user(Path(source))
        if is_folder(path):
            return any(path.glob("*.safetensors*")) or any(path.glob("*.bin*"))
        exists = os.path.lexists(path)
    except (OSError, ValueError):  # not a path
        exists = False
    if exists or catalog.shipped(source) or ":" in source or "#" in source or catalog.similar_names(Path(source).name):
        return True  # load_pretrained says what is wrong, if anything is
    raise UserError(
        f"there is no run and no weights file {source}; jaxft convert --list shows the names of weights, and "
        "hf:OWNER/NAME is a repository on the Hub"
    )
