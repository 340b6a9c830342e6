"""A network that predicts the targets of images: a run's checkpoint, or pretrained weights with their head."""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

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
from jaxft.targets.joint import Calibrations, Targets, count_outputs, each, is_one_class, targets_of
from jaxft.targets.number import Number
from jaxft.targets.tags import Tags
from jaxft.training.evaluation import Evaluation, evaluate_checkpoint
from jaxft.training.restore import LoadedCheckpoint, is_workdir, load_checkpoint
from jaxft.training.steps import Layer

FeatureLayer = Literal["pooled", "logits"]
LAYERS: tuple[FeatureLayer, ...] = get_args(FeatureLayer)

JointPrediction = dict[str, Prediction | Tags | Number]  # of one image, by target


class Classifier:
    """A network that predicts the targets of images and computes their features; a run's can also be evaluated.

    targets: those of the run, or a single class for pretrained weights. class_names: () unless there is a single class.
    calibrations: {target: {"temperature", "thresholds"}} of a run with a validation split, otherwise {}.
    """

    def __init__(self, source: LoadedCheckpoint | Weights) -> None:
        self._checkpoint: LoadedCheckpoint | None = None
        if isinstance(source, Weights):
            self._name = source.provenance.get("name") or source.provenance["source"]
            self.targets = _targets_of_weights(source.provenance)
            self.calibrations: Calibrations = source.provenance.get("calibration", {})
            self._inference = Inference(inference.from_weights(source))
        else:
            self._checkpoint = source._replace(state=dataclasses.replace(source.state, opt_state=()))
            self._name = f"checkpoint {source.step}"
            self.targets = targets_of(source.info)
            self.calibrations = source.info.get("calibration", {})
            self._inference = Inference(inference.from_checkpoint(source))
        self.class_names: tuple[str, ...] = self.targets[0].field.names if is_one_class(self.targets) else ()
        self.preprocessing = self._inference.preprocessing

    @property
    def decoded_size(self) -> int:
        """The side of the square to which larger images may be shrunk while they are decoded; predictions are equal."""
        return self._inference.decoded_size

    # The result depends on the run. Any keeps `model.predict(images)[0].label` valid for a type checker.
    def predict(self, pictures: ImageLike | Iterable[ImageLike], top_k: int = 3) -> list[Any]:
        """Predicts the targets of files, Pillow images or uint8 arrays (H, W, 3), of any size, in their order.

        A single image is a list of one. Returns a Prediction for each if the only target is a class, else a dict
        {target: Prediction, Tags or Number}. top_k: the number of classes in a Prediction. Raises UserError for
        anything else, for a file that cannot be read, and if the network has no head.
        """
        if not isinstance(top_k, int | np.integer) or isinstance(top_k, bool) or top_k < 1:
            raise UserError(f"top_k must be a whole number of at least 1, not {top_k!r}")
        return list(_readable(self.stream_predictions(pictures, top_k)))

    def probabilities(self, pictures: ImageLike | Iterable[ImageLike]) -> np.ndarray:
        """Returns the probabilities, float32 (N, num_classes), in the order of class_names.

        They are calibrated by the temperature of a run with a validation split. Raises UserError as `predict` does, and
        if the only target is not a class; `outputs` has the probabilities of all targets.
        """
        self._check_one_class()
        self.check_layer("probabilities")
        if not self.calibrations:
            return self._inference.rows(pictures, "probabilities")
        return self.outputs(pictures)[self.targets[0].field.name]

    def outputs(self, images: ImageLike | Iterable[ImageLike]) -> dict[str, np.ndarray]:
        """Returns the outputs of each target, float32, in the order of the images.

        They are probabilities (N, C) in the order of the classes or tags, or values (N,) in the number's unit. Raises
        UserError as `predict` does.
        """
        if is_one_class(self.targets) and not self.calibrations:
            return {self.targets[0].field.name: self.probabilities(images)}
        self.check_layer("logits")
        outputs = self._outputs(self._inference.rows(images, "logits"))
        return {name: array.astype(np.float32) for name, array in outputs.items()}

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
        or "logits". Raises UserError for probabilities unless the only target is a class.
        """
        self.check_layer(layer)
        if layer != "probabilities":
            return self._inference.stream(pictures, layer)
        self._check_one_class()
        if not self.calibrations:
            return self._inference.stream(pictures, layer)
        (name,) = (target.field.name for target in self.targets)
        return (
            found if isinstance(found, UserError) else found[name][0].astype(np.float32)
            for found in self._stream_outputs(pictures)
        )

    def stream_predictions(
        self, images: ImageLike | Iterable[ImageLike], top_k: int
    ) -> Iterator[Prediction | JointPrediction | UserError]:
        """Yields the prediction of each image in turn, as `predict` returns it, or the error if it cannot be read."""
        if is_one_class(self.targets):
            rows = self.stream(images)
            return (row if isinstance(row, UserError) else rank(row, self.class_names, top_k) for row in rows)
        self.check_layer("logits")
        return (
            found if isinstance(found, UserError) else self._joint_prediction(found, top_k)
            for found in self._stream_outputs(images)
        )

    def _stream_outputs(
        self, images: ImageLike | Iterable[ImageLike]
    ) -> Iterator[Mapping[str, np.ndarray] | UserError]:
        """Yields the outputs of each image, float64 (1, C) or (1,), or the error if it cannot be read."""
        rows = self._inference.stream(images, "logits")
        return (row if isinstance(row, UserError) else self._outputs(row[None]) for row in rows)

    def _outputs(self, logits: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the outputs of each target, float64, as the evaluation computes them. logits: (N, num_classes)."""
        return {
            target.field.name: target.outputs(own, self.calibrations.get(target.field.name, {}))
            for target, own, _ in each(self.targets, logits)
        }

    def _joint_prediction(self, outputs: Mapping[str, np.ndarray], top_k: int) -> JointPrediction:
        return {
            name: target.prediction(outputs[name][0], self.calibrations.get(name, {}), top_k)
            for name, target in ((target.field.name, target) for target in self.targets)
        }

    def evaluate(self, data_dir: str | None = None) -> Evaluation:
        """Evaluates on the images that the run was tested on. data_dir: their folder, if it has moved.

        Raises UserError for pretrained weights.
        """
        if self._checkpoint is None:
            raise UserError(f"{self._name} holds pretrained weights, which have no test images; evaluate a run")
        return evaluate_checkpoint(self._checkpoint, data_dir)

    def check_layer(self, layer: Layer) -> None:
        """Raises UserError if the network has no head, which every layer but "pooled" needs."""
        if layer != "pooled" and not count_outputs(self.targets):
            raise UserError(
                f"{self._name} has no head, so it predicts no classes; take its pooled features (predict --features "
                "OUT.npz, jaxft.features), or train a head"
            )

    def _check_one_class(self) -> None:
        if not is_one_class(self.targets):
            names = ", ".join(f"{target.field.name} ({target.field.kind})" for target in self.targets)
            raise UserError(
                f"{self._name} does not predict a single class but {names}; use outputs(images), which returns the "
                "probabilities or values of each target by name"
            )


def _targets_of_weights(provenance: Mapping[str, Any]) -> Targets:
    """Returns the targets of the run that weights were exported from, else a single class."""
    if "targets" in provenance:
        return targets_of({"targets": provenance["targets"], "class_names": ()})
    config = {"targets": provenance.get("config", {}).get("targets", "")}  # which names the class
    return targets_of({"class_names": names_for(provenance), "config": config})


def _readable(predictions: Iterable[Any]) -> Iterator[Any]:
    """Yields predictions; raises the first error among them."""
    for found in predictions:
        if isinstance(found, UserError):
            raise found
        yield found


def load(workdir: str | Path, checkpoint: str | int = "best") -> Classifier:
    """Loads a run's checkpoint ('best', 'latest' or the number of a step), or pretrained weights with their head.

    `predict`, `outputs`, `probabilities` and `features` of the result take images, `evaluate` the run's test images.
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
