"""Predictions by command and from Python, compared with the evaluation and the network itself."""

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

import jaxft
from jaxft import predict
from jaxft.classifier import Classifier
from jaxft.data import datasets
from jaxft.data.batches import Examples
from jaxft.data.dataset import DataOptions
from jaxft.data.loader import ResidentLoader
from jaxft.errors import UserError, run_command
from jaxft.export import export_flax
from jaxft.inference import BATCH_SIZE
from jaxft.training.evaluation import evaluate, extract_features
from jaxft.training.restore import load_checkpoint
from jaxft.training.steps import EvalConfig
from jaxft.transforms.preprocessing import preprocess
from tests.helpers.runs import ROOT, Run, environment


@pytest.fixture(scope="module")
def classifier(small_run: Path) -> Classifier:
    return jaxft.load(small_run)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes the sample's test images as CLASS/NUMBER.png."""
    directory = tmp_path_factory.mktemp("pictures")
    sample = datasets.load("sample:cifar10", "test")
    for i, (image, label) in enumerate(zip(sample.image, sample.label, strict=True)):
        path = directory / sample.class_names[label] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path)
    return directory


def test_predictions_of_files_match_the_evaluation(
    run: Run, small_run: Path, small_run_scores: dict[str, Any], folder: Path
) -> None:
    result = run("-m", "jaxft.predict", "--workdir", small_run, "--json", "--top_k=5", folder)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["file"] for line in lines] == [str(path) for path in sorted(folder.rglob("*.png"))]
    truth = [Path(line["file"]).parent.name for line in lines]
    correct = sum(line["label"] == label for line, label in zip(lines, truth, strict=True))
    in_top = sum(label in [top["label"] for top in line["top_k"]] for line, label in zip(lines, truth, strict=True))
    assert (correct, in_top) == (small_run_scores["correct"], small_run_scores["top_k_accuracy"]["5"] * 1000)
    for line in lines:
        assert (line["label"], line["probability"]) == tuple(line["top_k"][0].values())
        assert sorted(line["top_k"], key=lambda top: -top["probability"]) == line["top_k"]


def test_the_classifier_matches_the_network(small_run: Path, classifier: Classifier, folder: Path) -> None:
    """Classifies files, arrays and Pillow images of several shapes, more than one batch, on eight devices."""
    files = sorted(folder.rglob("*.png"))[: BATCH_SIZE + 9]
    squares = np.stack([np.asarray(Image.open(file)) for file in files])
    wide = [np.asarray(Image.fromarray(image).resize((45, 30))) for image in squares[:5]]
    checkpoint = load_checkpoint(small_run, "best")
    variables = {"params": checkpoint.state.params, "batch_stats": checkpoint.state.batch_stats}

    @jax.jit
    def probabilities(image: np.ndarray) -> jax.Array:
        logits: Any = checkpoint.model.apply(variables, preprocess(image, classifier.preprocessing), train=False)
        return jax.nn.softmax(logits)

    expected = np.concatenate([probabilities(squares), probabilities(np.stack(wide))])
    found = classifier.probabilities([*files, *wide[:3], *map(Image.fromarray, wide[3:])])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    predictions = classifier.predict(map(str, files), top_k=2)
    order = np.argsort(-expected[: len(files)], axis=1)
    assert [p.label for p in predictions] == [classifier.class_names[i] for i in order[:, 0]]
    assert [p.top_k[1][0] for p in predictions] == [classifier.class_names[i] for i in order[:, 1]]
    assert [p.probability for p in predictions] == pytest.approx(found[: len(files)].max(1).tolist())


@pytest.mark.parametrize(
    ("stored_size", "resize", "interpolation"), [(48, 0, "bilinear"), (0, 40, "bicubic"), (48, 40, "lanczos")]
)
def test_large_images_are_preprocessed_like_the_runs_data(
    small_run: Path, tmp_path: Path, stored_size: int, resize: int, interpolation: str
) -> None:
    """The data is a folder of images of several sizes, stored as squares for an image_size of 32."""
    rng = np.random.default_rng(0)
    for i, (height, width) in enumerate([(90, 60), (50, 70), (80, 80)] * 2):
        path = tmp_path / "test" / f"class {i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(path)
    side = stored_size or resize
    kept = datasets.load(f"folder:{tmp_path}", "test", DataOptions(side=side, interpolation=interpolation)).image
    assert kept.shape == (6, side, side, 3)
    checkpoint = load_checkpoint(small_run, "best")
    checkpoint.info["config"]["data"] |= {"stored_size": stored_size, "resize": resize}
    checkpoint.info["preprocessing"] |= {"resize": resize, "interpolation": interpolation}
    classifier = Classifier(checkpoint)
    files = sorted(tmp_path.rglob("*.png"))
    np.testing.assert_array_equal(classifier.probabilities(files), classifier.probabilities(kept))
    prepared = np.asarray(preprocess(kept, classifier.preprocessing))  # as the evaluation does on the device
    variables = {"params": checkpoint.state.params, "batch_stats": checkpoint.state.batch_stats}
    logits: Any = jax.jit(partial(checkpoint.model.apply, train=False))(variables, prepared)
    np.testing.assert_allclose(classifier.probabilities(files), jax.nn.softmax(logits), rtol=1e-4, atol=1e-6)


def test_the_classifier_evaluates_like_the_command(classifier: Classifier, small_run_scores: dict[str, Any]) -> None:
    evaluation = classifier.evaluate()
    assert evaluation.checkpoint == small_run_scores["checkpoint"]
    assert int((evaluation.predictions.rank == 0).sum()) == small_run_scores["correct"]


def test_flip_averages_the_predictions_of_mirror_images(classifier: Classifier, small_run: Path) -> None:
    images = datasets.load("sample:cifar10", "test").image
    one, other = (np.log(classifier.probabilities(batch)) for batch in (images, images[:, :, ::-1]))
    flipped = evaluate(small_run, flip=True).predictions
    assert (flipped.predicted == (one + other).argmax(1)).mean() > 0.997  # except for ties by rounding
    assert (flipped.predicted != one.argmax(1)).any()


def test_images_of_any_format_and_mode_are_classified(classifier: Classifier, folder: Path, tmp_path: Path) -> None:
    """Stores the same image in several ways, once rotated."""
    picture = Image.open(next(folder.rglob("*.png")))
    picture.save(tmp_path / "rgb.bmp")
    picture.convert("RGBA").save(tmp_path / "alpha.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 270 degrees to display
    picture.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    rows = classifier.probabilities([tmp_path / "rgb.bmp", tmp_path / "alpha.png", tmp_path / "turned.png", picture])
    np.testing.assert_allclose(rows, rows[[-1] * 4], rtol=1e-5, atol=1e-7)
    picture.convert("P").save(tmp_path / "palette.gif")
    picture.convert("L").save(tmp_path / "grey.webp", lossless=True)
    picture.convert("CMYK").save(tmp_path / "cmyk.tif")
    Image.new("RGB", (1, 300)).save(tmp_path / "line.png")
    assert np.isfinite(classifier.probabilities(sorted(tmp_path.glob("*.*")))).all()


def test_files_that_are_not_images_are_named_and_the_rest_predicted(
    run: Run, small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "Rot äöü.png")
    (tmp_path / "broken.jpg").write_text("no picture")
    (tmp_path / "notes.txt").write_text("not looked at")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    result = run("-m", "jaxft.predict", "--workdir", small_run, tmp_path, tmp_path / "absent.png", "--json")
    lines = {Path(line["file"]).name: line for line in map(json.loads, result.stdout.splitlines())}
    assert set(lines) == {"Rot äöü.png", "broken.jpg", "dangling.png", "absent.png"}
    assert result.returncode == 2
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert "3 of 4 files" in error
    for name in ("broken.jpg", "dangling.png", "absent.png"):
        assert name in error
        assert name in lines[name]["error"]
    assert lines["Rot äöü.png"]["probability"] > 0.1

    assert run_command(predict.main, ["--workdir", str(small_run), str(tmp_path)]) == 2
    red, broken, dangling = capsys.readouterr().out.splitlines()
    assert red.count("%") == 3
    assert broken.endswith("cannot be read")
    assert dangling.endswith("cannot be read")


@pytest.mark.parametrize("no_color", [True, False])
def test_a_terminal_gets_colours_unless_no_color_is_set(small_run: Path, folder: Path, no_color: bool) -> None:
    files = [*sorted(folder.rglob("*.png"))[::200], Path("absent.png")]
    command = [sys.executable, "-m", "jaxft.predict", "--workdir", str(small_run), *map(str, files)]
    leader, terminal = pty.openpty()
    settings = {"COLUMNS": "80", "TERM": "xterm"} | ({"NO_COLOR": "1"} if no_color else {})
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(1) | settings, stdin=terminal, stdout=terminal, stderr=subprocess.DEVNULL
    ):
        os.close(terminal)
        output = b""
        try:
            while part := os.read(leader, 4096):
                output += part
        except OSError:  # on Linux: the other side is closed
            pass
    os.close(leader)
    lines = output.decode().splitlines()
    assert len(lines) == len(files)
    assert ("\x1b[31m" in output.decode()) == (not no_color)  # red
    plain = [re.sub("\x1b\\[[0-9;]*m", "", line) for line in lines]
    assert all(len(line) <= 80 and file.name in line for line, file in zip(plain, files, strict=True))


def test_errors_are_reported_in_one_line(fails: Callable[..., str], small_run: Path, tmp_path: Path) -> None:
    assert "there is no checkpoint" in fails("-m", "jaxft.predict", "--workdir", tmp_path, "picture.png")
    assert "no images in" in fails("-m", "jaxft.predict", "--workdir", small_run, tmp_path)
    assert "at least 1" in fails("-m", "jaxft.predict", "--workdir", small_run, "--top_k=0", "picture.png")
    assert "no checkpoint '7'" in fails("-m", "jaxft.predict", "--workdir", small_run, "--checkpoint=7", "a.png")


def test_features_of_no_readable_image_are_not_written(
    fails: Callable[..., str], small_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.npz"
    assert "1 of 1 file could not be read: there is no image" in fails(
        "-m", "jaxft.predict", "--workdir", small_run, "--features", out, tmp_path / "absent.png"
    )
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("a.png", "one of the arguments --workdir --weights is required"),
        ("--workdir=runs/a --weights=resnet50 a.png", "not allowed with argument"),
        ("--weights=WORKDIR a.png", "is a run's workdir, not a weights file; use --workdir"),
        ("--weights=resnet50 a.png", "similar names: resnet50.tv_in1k_v1"),
        ("--weights=resnet50 --checkpoint=7 a.png", "--checkpoint 7 is for --workdir"),
        ("--weights=resnet50 --features=a.txt a.png", "--features must end in .npz, not a.txt"),
        ("--weights=resnet50 --features=no/a.npz a.png", "there is no folder no; create it, or name another file"),
        ("--weights=resnet50 --features=a.npz --json a.png", "--features writes a file; leave out --json"),
        ("--weights=resnet50 --features=a.npz --serve", "--features writes a file; leave out --serve"),
        ("--weights=resnet50 --layer=pooled a.png", "--layer pooled needs --features OUT.npz"),
        ("--weights=resnet50 --layer=stage4 --features=a.npz a.png", "invalid choice: 'stage4'"),
    ],
)
def test_arguments_that_do_not_fit(fails: Callable[..., str], small_run: Path, arguments: str, message: str) -> None:
    line = fails("-m", "jaxft.predict", *arguments.replace("WORKDIR", str(small_run)).split())
    assert message in line


def test_a_single_image_is_a_list_of_one(classifier: Classifier, folder: Path) -> None:
    file = next(folder.rglob("*.png"))
    image = Image.open(file)
    (expected,) = classifier.predict([file])
    for single in (file, str(file), image, np.asarray(image)):
        assert classifier.predict(single) == [expected]
    assert classifier.predict(np.asarray(image)[None]) == [expected]
    assert classifier.predict([]) == []


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        (None, "expected an image or a list of images, .*, not None"),
        ({"a.png": 1}, "not a value of type dict"),
        (b"\x89PNG", "not a value of type bytes"),
        (7, "not a value of type int"),
        ([[np.zeros((8, 8, 3), np.uint8)]], "an image must be .*, not a value of type list"),
        ([None], "an image must be .*, not None"),
        (np.zeros((8, 8, 3), np.float32), r"must be uint8 \(H, W, 3\), not float32 \(8, 8, 3\)"),
        ([np.zeros((8, 8), np.uint8)], r"must be uint8 \(H, W, 3\), not uint8 \(8, 8\)"),
        (np.zeros((2, 3, 8, 8), np.uint8), r"not uint8 \(3, 8, 8\)"),
        (np.zeros((0, 8, 3), np.uint8), r"not uint8 \(0, 8, 3\)"),
        ("nowhere.png", "there is no image nowhere.png"),
        (Path("/"), "/ cannot be read as an image"),
        ("a\0.png", "cannot be read as an image"),
    ],
    ids=str,
)
def test_anything_else_is_refused_by_name(classifier: Classifier, pictures: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        classifier.predict(pictures)


@pytest.mark.parametrize("top_k", [0, -1, 2.0, "3", None, True])
def test_top_k_is_a_positive_whole_number(classifier: Classifier, top_k: Any) -> None:
    with pytest.raises(UserError, match="top_k must be a whole number of at least 1"):
        classifier.predict([], top_k)


def test_a_workdir_must_be_a_path() -> None:
    for workdir in (None, "", 3):
        with pytest.raises(UserError, match="workdir must be a run's folder or the name or file of pretrained weights"):
            jaxft.load(workdir)  # type: ignore[arg-type]


def test_the_python_api_is_silent(run: Run, small_run: Path, tmp_path: Path) -> None:
    """Orbax warns that the folder is read-only, which is what jaxft asked for."""
    Image.new("RGB", (40, 30), "green").save(tmp_path / "a.png")
    code = f"import jaxft; print(len(jaxft.load({str(small_run)!r}).predict([{str(tmp_path / 'a.png')!r}])))"
    result = run("-c", code)
    assert (result.returncode, result.stdout, result.stderr) == (0, "1\n", "")


@pytest.mark.usefixtures("compile_quickly")
def test_features_are_those_that_training_caches(small_run: Path, classifier: Classifier) -> None:
    """Compares them with test_flip, which averages the features of an image and its mirror image."""
    checkpoint = load_checkpoint(small_run, "best")
    policy = checkpoint.policy._replace(test_flip=True)
    images = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), np.uint8)
    config = EvalConfig(checkpoint.model, classifier.preprocessing, policy)
    loader = ResidentLoader(Examples(images, np.zeros(20, np.int32)))
    cached = np.asarray(extract_features(config, checkpoint.state, loader, 32).image)
    found = Classifier(checkpoint._replace(policy=policy)).features(images)
    assert (found.dtype, found.shape) == (np.float32, (20, 64))
    np.testing.assert_allclose(found, cached, rtol=1e-5, atol=1e-5 * np.abs(cached).max())


@pytest.mark.usefixtures("compile_quickly")
def test_an_exported_run_predicts_what_the_run_predicts(
    small_run: Path, classifier: Classifier, tmp_path: Path
) -> None:
    """Images are shrunk twice, as the run's are: to data.stored_size and to data.resize."""
    checkpoint = load_checkpoint(small_run, "best")
    checkpoint.info["config"]["data"] |= {"stored_size": 48, "resize": 40}
    checkpoint.info["preprocessing"]["resize"] = 40
    path = tmp_path / "run.safetensors"
    export_flax(small_run, checkpoint, path, "float32")
    run, exported = Classifier(checkpoint), jaxft.load(path)
    assert (exported.class_names, exported.preprocessing.resize) == (run.class_names, 40)
    images = np.random.default_rng(0).integers(0, 256, (20, 70, 60, 3), np.uint8)
    found = jax.nn.softmax(exported.features(images, "logits"))
    np.testing.assert_allclose(found, run.probabilities(images), rtol=1e-4, atol=1e-6)
    with pytest.raises(UserError, match="pretrained weights, which have no test images; evaluate a run"):
        exported.evaluate()
