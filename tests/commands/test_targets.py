"""Predictions and exports of runs with a class, tags and a number, and of a class with a calibrated temperature."""

import dataclasses
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from PIL import Image

import jaxft
from jaxft import export, predict
from jaxft.classifier import Classifier
from jaxft.data.batches import replicate
from jaxft.errors import UserError
from jaxft.models.heads import get_head, set_head
from jaxft.pretrained.load import load_pretrained
from jaxft.pretrained.weights_file import Weights, write_weights
from jaxft.targets import joint
from jaxft.targets.classification import Prediction
from jaxft.targets.number import Number
from jaxft.targets.tags import Tags
from jaxft.training.restore import load_checkpoint
from jaxft.training.start import initial_state
from tests.helpers.runs import ROOT
from tests.helpers.tables import table_config

pytestmark = pytest.mark.usefixtures("compile_quickly")


@pytest.fixture(scope="module")
def folder(targets_run: Path) -> Path:
    """The folder of the run and its table, DIR/run and DIR/table/labels.csv."""
    return targets_run.parent


@pytest.fixture(scope="module")
def classifier(folder: Path) -> Classifier:
    return jaxft.load(folder / "run")


@pytest.fixture(scope="module")
def files(folder: Path) -> list[Path]:
    """The test images in the order of the table."""
    return sorted((folder / "table" / "images").glob("test*"), key=lambda path: int(path.stem.removeprefix("test")))


def test_outputs_are_those_of_the_evaluation(classifier: Classifier, files: list[Path]) -> None:
    evaluation = classifier.evaluate()
    logits = np.asarray(evaluation.predictions.logits)
    found, calibrations = classifier.outputs(files), classifier.calibrations
    assert calibrations == evaluation.calibrations and set(calibrations) == {"colour", "tags"}
    assert {name: array.shape for name, array in found.items()} == {
        "colour": (24, 3),
        "tags": (24, 2),
        "brightness": (24,),
    }
    columns = {"colour": slice(0, 3), "tags": slice(3, 5), "brightness": slice(5, 6)}
    for target in classifier.targets:
        name = target.field.name
        expected = target.outputs(logits[:, columns[name]], calibrations.get(name, {}))
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-6)
        assert found[name].dtype == np.float32
    np.testing.assert_allclose(classifier.features(files, "logits"), logits, rtol=1e-5, atol=1e-5)


def test_predictions_have_all_targets(classifier: Classifier, files: list[Path]) -> None:
    outputs, thresholds = classifier.outputs(files), classifier.calibrations["tags"]["thresholds"]
    predictions = classifier.predict(files, top_k=2)
    for i, found in enumerate(predictions):
        assert [type(own) for own in found.values()] == [Prediction, Tags, Number]
        assert len(found["colour"].top_k) == 2
        assert found["colour"].probability == pytest.approx(outputs["colour"][i].max())
        reached = {tag for tag, p, t in zip(("dark", "vivid"), outputs["tags"][i], thresholds, strict=True) if p >= t}
        assert set(found["tags"].tags) == reached
        assert found["brightness"].value == pytest.approx(outputs["brightness"][i], rel=1e-5)
    assert len({found["tags"].tags for found in predictions}) > 1
    assert classifier.class_names == ()


def test_probabilities_are_refused_with_their_replacement(classifier: Classifier, files: list[Path]) -> None:
    with pytest.raises(UserError, match=r"colour \(class\), tags \(tags\), brightness \(number\); use outputs\(images"):
        classifier.probabilities(files)
    with pytest.raises(UserError, match=r"use outputs\(images"):
        classifier.stream(files)


def test_the_command_prints_all_targets(
    folder: Path, classifier: Classifier, files: list[Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = ["--workdir", str(folder / "run"), "--top_k=2", *map(str, files[:2])]
    predict.main(command)
    lines = capsys.readouterr().out.splitlines()
    predictions = classifier.predict(files[:2], top_k=2)
    for line, file, found in zip(lines, files, predictions, strict=False):
        classes = ", ".join(f"{name} {probability:.1%}" for name, probability in found["colour"].top_k)
        expected = f"{file}  colour {classes}; tags {found['tags']}; brightness {found['brightness']}"
        assert line == expected
    (tmp_path / "broken.png").write_text("no image")
    with pytest.raises(UserError, match="1 of 3 files could not be classified"):
        predict.main([*command, str(tmp_path / "broken.png"), "--json"])
    *found, broken = map(json.loads, capsys.readouterr().out.splitlines())
    assert list(broken) == ["file", "error"]
    for line, file, prediction in zip(found, files, predictions, strict=False):
        assert (list(line), line["file"]) == (["file", "targets"], str(file))
        assert {name: list(own) for name, own in line["targets"].items()} == {
            "colour": ["label", "probability", "top_k"],
            "tags": ["tags", "probabilities"],
            "brightness": ["value"],
        }
        assert line["targets"]["brightness"]["value"] == pytest.approx(prediction["brightness"].value, rel=1e-5)


def call(path: Path, images: np.ndarray) -> Any:
    with zipfile.ZipFile(path) as archive:
        exported = jax.export.deserialize(bytearray(archive.read("model.stablehlo")))
    return jax.jit(exported.call)(images)


def test_the_exported_program_returns_all_targets(
    folder: Path, classifier: Classifier, files: list[Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Compares it with predict, also as the script without jaxft prints it."""
    out = tmp_path / "model.zip"
    export.main(["--workdir", str(folder / "run"), "--to=stablehlo", "--out", str(out)])
    assert "6 outputs for colour, tags, brightness" in capsys.readouterr().out
    expected = classifier.outputs(files)
    found = call(out, np.stack([np.asarray(Image.open(file)) for file in files]))
    assert set(found) == set(expected)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-5)
    with zipfile.ZipFile(out) as archive:
        info = json.loads(archive.read("info.json"))
    assert [field["name"] for field in info["targets"]] == ["colour", "tags", "brightness"]
    assert info["calibration"] == classifier.calibrations
    script = "import runpy, sys; sys.modules['jaxft'] = None; runpy.run_path(sys.argv.pop(1))"
    command = [sys.executable, "-c", script, ROOT / "examples" / "run_exported.py", out, *files[:3]]
    result = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for line, file, prediction in zip(result.stdout.splitlines(), files, classifier.predict(files[:3]), strict=False):
        assert line == f"{file} {'; '.join(f'{name} {own}' for name, own in prediction.items())}"


def test_the_best_metric_of_compressed_weights_is_printed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    checkpoint = load_checkpoint(folder / "run", "best")
    checkpoint.info["config"]["best_metric"] = "tags.mAP"
    monkeypatch.setattr(export, "load_checkpoint", lambda workdir, which: checkpoint)
    monkeypatch.setattr(export, "export_stablehlo", lambda *arguments: None)
    out = tmp_path / "model.zip"
    export.main(["--workdir", str(folder / "run"), "--to=stablehlo", "--dtype=float16", "--out", str(out)])
    evaluation = jaxft.load(folder / "run").evaluate()
    scores = joint.scores(evaluation.targets, evaluation.predictions, evaluation.calibrations)
    line = capsys.readouterr().out
    assert line.startswith(f"tags.mAP {scores['tags']['mAP']:.1%} with the weights of the checkpoint, ")
    assert line.endswith("% with float16\n")


def test_exported_weights_predict_what_the_run_predicts(
    folder: Path, classifier: Classifier, files: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "run.safetensors"
    export.main(["--workdir", str(folder / "run"), "--to=flax", "--out", str(out)])
    exported = jaxft.load(out)
    assert exported.targets == classifier.targets and exported.calibrations == classifier.calibrations
    for name, array in classifier.outputs(files).items():
        np.testing.assert_allclose(exported.outputs(files)[name], array, rtol=1e-5, atol=1e-6)
    config = table_config(folder / "table" / "labels.csv", model__pretrained=str(out))
    _, _, model, policy, _ = load_checkpoint(folder / "run", "best")
    state, provenance = initial_state(config, model, policy, optax.sgd(0.1), exported.targets)
    assert [field["name"] for field in provenance["targets"]] == ["colour", "tags", "brightness"]
    assert get_head(state.params, model.head)["kernel"].shape[1] == 6


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda p: p["targets"].pop(), "the targets have 5 outputs, the head 6"),
        (lambda p: p["targets"][0].update(kind="mask"), "targets are not a list of fields"),
        (lambda p: p["targets"][0].update(names="cat"), "targets are not a list of fields"),
        (lambda p: p["targets"][0].update(mean=float("nan")), "targets are not a list of fields"),
        (lambda p: p["targets"][0].update(name="tags"), "two targets have the same name"),
        (lambda p: p["calibration"]["tags"]["thresholds"].pop(), "the thresholds do not fit the tags"),
        (lambda p: p["calibration"]["tags"].update(temperature=0), "a temperature is not a positive number"),
        (lambda p: p["config"].update(targets=3), "config is "),
    ],
)
def test_targets_that_do_not_fit_are_refused(
    folder: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], part: str
) -> None:
    path = tmp_path / "run.safetensors"
    export.export_flax(folder / "run", load_checkpoint(folder / "run", "best"), path, "float32")
    variables, provenance = load_pretrained(str(path))
    change(provenance)
    write_weights(path, Weights(variables, provenance))
    with pytest.raises(UserError, match=r"its metadata is wrong: .*" + part):
        load_pretrained(str(path))


def test_a_torch_file_comes_with_the_meaning_of_its_columns(
    folder: Path, classifier: Classifier, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    export.main(["--workdir", str(folder / "run"), "--to=torchvision", "--out", str(tmp_path / "model.pth")])
    first, note, colour, tags, number = capsys.readouterr().out.splitlines()
    assert "6 outputs for colour, tags, brightness" in first and "not in it" in note
    temperatures = [classifier.calibrations[name]["temperature"] for name in ("colour", "tags")]
    assert colour.startswith(f"  colour: columns 0 to 2, softmax(logits / {temperatures[0]:.6g}), classes green")
    assert tags.startswith(f"  tags: columns 3 to 4, sigmoid(logits / {temperatures[1]:.6g}), thresholds dark ")
    field = classifier.targets[2].field
    assert number == f"  brightness: column 5, logits * {field.std:.9g} + {field.mean:.9g}"


def test_the_probabilities_of_a_class_are_calibrated(
    folder: Path, files: list[Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Compares a run of only the class, its exported program and its exported weights with the formula.

    Its checkpoint is that of the run with the columns of the other targets cut off, which saves its training.
    """
    checkpoint = load_checkpoint(folder / "run", "best")
    info, model = checkpoint.info, checkpoint.model.clone(num_classes=3)
    info["config"]["targets"] = "class:colour"
    info["class_names"] = info.pop("targets")[0]["names"]
    del info["calibration"]["tags"]
    head = jax.tree.map(lambda array: np.asarray(array)[..., :3], get_head(checkpoint.state.params, model.head))
    params = replicate(set_head(checkpoint.state.params, model.head, head))
    checkpoint = checkpoint._replace(model=model, state=dataclasses.replace(checkpoint.state, params=params))
    run = Classifier(checkpoint)
    assert run.class_names == ("green", "red", "yellow") and list(run.calibrations) == ["colour"]
    temperature = run.calibrations["colour"]["temperature"]
    assert temperature != 1
    logits = run.features(files, "logits").astype(np.float64)
    expected = np.exp(logits / temperature) / np.exp(logits / temperature).sum(1, keepdims=True)
    found = run.probabilities(files)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_array_equal(run.outputs(files)["colour"], found)
    np.testing.assert_array_equal(list(run.stream(files)), found)
    assert [p.probability for p in run.predict(files)] == pytest.approx(found.max(1).tolist())
    program, weights = tmp_path / "model.zip", tmp_path / "run.safetensors"
    export.export_stablehlo(checkpoint, program, "float32")
    export.export_flax(folder / "run", checkpoint, weights, "float32")
    export.export_torchvision(checkpoint, tmp_path / "model.pth")
    assert f"colour: columns 0 to 2, softmax(logits / {temperature:.6g})" in capsys.readouterr().out
    images = np.stack([np.asarray(Image.open(file)) for file in files])
    np.testing.assert_allclose(call(program, images), found, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jaxft.load(weights).probabilities(files), found, rtol=1e-5, atol=1e-6)
