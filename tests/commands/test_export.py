"""The exported file, run without jaxft and compared with its checkpoint."""

import dataclasses
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import jaxft
from jaxft import export
from jaxft.classifier import Classifier
from jaxft.data import datasets
from jaxft.data.batches import replicate
from jaxft.data.image_file import shrink
from jaxft.errors import UserError
from jaxft.export import compress, decompress, export_stablehlo, main
from jaxft.models.fold import fold_norms
from jaxft.training.restore import load_checkpoint
from jaxft.transforms.pillow_resize import TALL_BY_HEIGHT, central_square
from jaxft.transforms.preprocessing import resize_and_crop_any
from tests.helpers.runs import ROOT, Run

SHAPES = [(32, 32), (45, 30), (30, 45), (300, 200), (1, 7), (17, 19), (201, 100), (160, 10)]


@pytest.mark.parametrize(
    ("resize", "stored_size", "interpolation"),
    [(0, 0, "bilinear"), (36, 40, "bicubic"), (37, 0, "lanczos")],
)
def test_resizing_any_shape_equals_pillow(resize: int, stored_size: int, interpolation: str) -> None:
    """Compares with the steps on the host, in which a run stores its images and predicts."""
    for height, width in SHAPES:
        images = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), np.uint8)
        expected = []
        for image in images:
            if stored_size and min(height, width) > stored_size:
                image = shrink(image, stored_size, interpolation)
            expected.append(central_square(shrink(image, resize or 32, interpolation), 32))
        found = jax.jit(partial(resize_and_crop_any, tall_by_height=TALL_BY_HEIGHT), static_argnums=(1, 2, 3, 4))(
            images, 32, resize, stored_size, interpolation
        )
        np.testing.assert_array_equal(found, expected, f"{height} x {width}")


@pytest.fixture(scope="module")
def exported(run: Run, small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "model.zip"
    result = run("-m", "jaxft.export", "--workdir", small_run, "--to=stablehlo", "--out", out)
    assert result.returncode == 0, result.stderr
    assert "for cpu, cuda, tpu" in result.stdout
    assert list(out.parent.iterdir()) == [out]
    return out


def read(path: Path) -> jax.export.Exported:
    with zipfile.ZipFile(path) as archive:
        exported = jax.export.deserialize(bytearray(archive.read("model.stablehlo")))
        assert tuple(json.loads(archive.read("info.json"))["platforms"]) == exported.platforms
    return exported


def call(path: Path) -> Callable[[np.ndarray], jax.Array]:
    exported = read(path)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    return jax.jit(exported.call)


def test_the_export_takes_any_number_of_images_of_any_size(small_run: Path, exported: Path) -> None:
    classifier = jaxft.load(small_run)
    images = datasets.load("sample:cifar10", "test").image[:7]
    wide = np.stack([np.asarray(Image.fromarray(image).resize((61, 43))) for image in images[:2]])
    for batch in (images, images[:1], wide):
        np.testing.assert_allclose(call(exported)(batch), classifier.probabilities(batch), rtol=1e-4, atol=1e-6)


def photo(height: int, width: int) -> np.ndarray:
    """Returns noise with large and small structure, uint8 (height, width, 3)."""
    rng = np.random.default_rng(height)
    coarse = Image.fromarray(rng.integers(30, 226, (5, 7, 3), np.uint8)).resize((width, height))
    return np.asarray(coarse) + rng.integers(0, 30, (height, width, 3), np.uint8)


@pytest.mark.parametrize(("resize", "stored_size", "interpolation"), [(0, 48, "bilinear"), (36, 0, "bicubic")])
def test_the_export_returns_what_predict_returns(
    small_run: Path, tmp_path: Path, resize: int, stored_size: int, interpolation: str
) -> None:
    """Compares photos that are larger than stored_size, smaller, wide, thin and more than twice as tall as wide."""
    checkpoint = load_checkpoint(small_run, "best")
    checkpoint.info["config"]["data"] |= {"stored_size": stored_size, "resize": resize}
    checkpoint.info["preprocessing"] |= {"resize": resize, "interpolation": interpolation}
    export_stablehlo(checkpoint, tmp_path / "model.zip", "float32")
    classifier, network = Classifier(checkpoint), read(tmp_path / "model.zip")
    for shape in [(600, 450), (40, 47), (90, 300), (301, 150), (9, 500)]:
        image = photo(*shape)
        (expected,) = classifier.probabilities([image])
        np.testing.assert_allclose(network.call(image[None])[0], expected, rtol=1e-4, atol=1e-6, err_msg=str(shape))


def operations(exported: jax.export.Exported) -> tuple[int, set[str], bool]:
    """Counts a program's convolutions, and returns its custom calls and whether it keeps calls from being inlined."""
    program = exported.mlir_module()
    convolutions = len(re.findall(r"stablehlo\.convolution\b", program))  # JAX writes each once per platform
    calls = set(re.findall(r"stablehlo\.custom_call @(\w+)", program))
    return convolutions // len(exported.platforms), calls, "inlineable" in program


def num_convolutions(workdir: Path) -> int:
    return sum(leaf.ndim == 4 for leaf in jax.tree.leaves(load_checkpoint(workdir, "best").state.params))


def test_a_portable_export_is_in_the_plain_formulation(small_run: Path, exported: Path) -> None:
    assert operations(read(exported)) == (num_convolutions(small_run), {"shape_assertion"}, False)
    assert "reduce_window" in read(exported).mlir_module()


def test_an_export_for_one_platform_is_in_its_formulation(
    small_run: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only the CPU's has products instead of 1x1 convolutions. Its probabilities are those of the portable file."""
    for platform, max_pool in (("cpu", False), ("cuda", False), ("tpu", True)):
        path = tmp_path / f"{platform}.zip"
        main(["--workdir", str(small_run), "--to=stablehlo", f"--platform={platform}", "--out", str(path)])
        assert f" MB, for {platform}; needs jax {version('jax')} or newer and flatbuffers" in capsys.readouterr().out
        assert read(path).platforms == (platform,)
        assert ("reduce_window" in read(path).mlir_module()) == max_pool
        convolutions, calls, marked = operations(read(path))
        assert calls == {"shape_assertion"} and marked == (platform == "cpu")
        assert (convolutions < num_convolutions(small_run)) == (platform == "cpu")
    images = datasets.load("sample:cifar10", "test").image[:9]
    expected = jaxft.load(small_run).probabilities(images)
    for path in (exported, tmp_path / "cpu.zip"):
        np.testing.assert_allclose(jax.jit(read(path).call)(images), expected, rtol=1e-4, atol=1e-6)


def test_an_export_averages_mirror_images_with_test_flip(small_run: Path, exported: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(small_run, "best")
    flipped = checkpoint._replace(policy=checkpoint.policy._replace(test_flip=True))
    export_stablehlo(flipped, tmp_path / "flipped.zip", "float32")
    images = datasets.load("sample:cifar10", "test").image[:9]
    found = np.asarray(call(tmp_path / "flipped.zip")(images))
    one, other = (np.log(np.asarray(call(exported)(batch))) for batch in (images, images[:, :, ::-1]))
    expected = np.exp((one + other) / 2)
    np.testing.assert_allclose(found, expected / expected.sum(1, keepdims=True), rtol=1e-3, atol=1e-6)


def test_ten_lines_without_jaxft_run_the_export(small_run: Path, exported: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a camera
    image = Image.fromarray(datasets.load("sample:cifar10", "test").image[3]).resize((70, 50))
    image.save(tmp_path / "a.png", exif=exif)
    without_jaxft = "import runpy, sys; sys.modules['jaxft'] = None; runpy.run_path(sys.argv.pop(1))"
    arguments = [ROOT / "examples" / "run_exported.py", exported, tmp_path / "a.png"]
    command = [sys.executable, "-c", without_jaxft, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (prediction,) = jaxft.load(small_run).predict([tmp_path / "a.png"])
    assert result.stdout == f"{tmp_path / 'a.png'} {prediction.label} {prediction.probability:.1%}\n"


@pytest.mark.parametrize(("kind", "factor", "error"), [("float16", 2, 2**-11), ("int8", 4, None)])
def test_compressed_weights_are_small_and_close_to_the_originals(
    small_run: Path, exported: Path, tmp_path: Path, kind: str, factor: int, error: float
) -> None:
    """Compares the kernels, the size of the file and the probabilities that the file computes."""
    checkpoint = load_checkpoint(small_run, "best")
    model, variables = fold_norms(checkpoint.model, checkpoint.state.variables())
    kernel = np.asarray(variables["params"]["layer4"]["1"]["conv2"]["kernel"])
    params = decompress(compress(variables, kind))["params"]
    found = np.asarray(params["layer4"]["1"]["conv2"]["kernel"])
    bound = np.abs(kernel).max((0, 1, 2)) / 127 * 0.501 if error is None else np.abs(kernel) * error + 2**-24
    assert (np.abs(found - kernel) <= bound).all()
    assert len(np.unique(found[..., 0])) <= 255 or kind != "int8"
    np.testing.assert_array_equal(params["conv1"]["bias"], variables["params"]["conv1"]["bias"])

    export_stablehlo(checkpoint, tmp_path / "small.zip", kind)
    kernels = sum(leaf.size for leaf in jax.tree.leaves(checkpoint.state.params) if leaf.ndim > 1)
    saved = exported.stat().st_size - (tmp_path / "small.zip").stat().st_size
    assert saved == pytest.approx(kernels * 4 * (1 - 1 / factor), rel=0.05)
    images = datasets.load("sample:cifar10", "test").image[:50]
    state = replicate(dataclasses.replace(checkpoint.state, params=params, batch_stats={}, ema={}))
    smaller = Classifier(checkpoint._replace(model=model, state=state))
    found = np.asarray(call(tmp_path / "small.zip")(images))
    np.testing.assert_allclose(found, smaller.probabilities(images), rtol=1e-3, atol=1e-5)


def test_the_accuracy_of_compressed_weights_is_printed(
    small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--workdir", str(small_run), "--to=stablehlo", "--dtype=int8", "--out", str(tmp_path / "model.zip")])
    predictions = jaxft.load(small_run).evaluate().predictions
    before, after = re.findall(r"(\d+\.\d+)%", capsys.readouterr().out)
    assert before == f"{np.mean(predictions.rank == 0):.2%}"[:-1]
    assert abs(float(before) - float(after)) < 3


def test_missing_test_images_are_reported_before_anything_is_written(
    small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str]
) -> None:
    checkpoint = load_checkpoint(small_run, "best")
    checkpoint.info["config"]["data"]["name"] = f"folder:{tmp_path / 'photos'}"
    monkeypatch.setattr(export, "load_checkpoint", lambda workdir, which: checkpoint)
    command = ["-m", "jaxft.export", "--workdir", small_run, "--to=stablehlo", "--dtype=int8"]
    line = fails(*command, "--out", tmp_path / "model.zip")
    assert str(tmp_path / "photos") in line and "--data_dir" in line and "--dtype float32" in line
    assert list(tmp_path.iterdir()) == []


def test_an_export_says_what_it_needs(small_run: Path, exported: Path) -> None:
    with zipfile.ZipFile(exported) as archive:
        info = json.loads(archive.read("info.json"))
    assert info["needs"]["jax"] == f">={version('jax')}"
    assert "six months" in info["needs"]["until"]
    assert info["preprocessing"]["resize"] == 0


def test_weights_that_torchvision_cannot_load_are_reported(
    small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--workdir", str(small_run), "--to=torchvision", "--out", str(tmp_path / "model.pth")])
    output = capsys.readouterr()
    assert output.err.startswith("warning: torchvision's resnet18 cannot load ")
    assert "width 64" in output.err and "this run 8 and imagenet" in output.err
    assert "Resize(32), CenterCrop(32), ToTensor()" in output.out


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ("--to=stablehlo --out=model.bin", "must end in .zip"),
        ("--to=torchvision --out=model.zip", "must end in .pth"),
        ("--to=stablehlo --out=nowhere/model.zip", "there is no folder nowhere"),
        ("--to=torchvision --dtype=int8 --out=model.pth", "takes --dtype float32, not int8"),
        ("--to=onnx --out=model.onnx", "invalid choice"),
        ("--to=flax --platform=cpu --out=model.safetensors", "--platform is for --to stablehlo"),
        ("--to=stablehlo --platform=gpu --out=model.zip", "invalid choice"),
    ],
)
def test_errors_are_reported_and_nothing_is_written(
    small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, part: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=part):
        main(["--workdir", str(small_run), *arguments.split()])
    assert list(tmp_path.iterdir()) == []
