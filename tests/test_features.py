"""Features and predictions from pretrained weights, compared with torchvision, and features of a run."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

import jaxft
from jaxft import inference, predict
from jaxft.errors import UserError, run_command
from jaxft.inference import preprocessing_of
from jaxft.models.build import ARCHITECTURES
from jaxft.pretrained import catalog
from jaxft.targets.class_names import imagenet_names, names_for
from jaxft.training.steps import predict_step
from jaxft.transforms.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from tests.helpers.reference import torch, torchvision
from tests.helpers.torch_models import NarrowResNet, randomize_norms

import timm  # isort: skip, after torchvision

NAMED = {weights.name: weights._asdict() for weights in catalog.WEIGHTS}
TINY = "resnet18_tiny_in200"  # ships with jaxft

pytestmark = pytest.mark.usefixtures("compile_quickly")


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    """A narrow network of torchvision's with ImageNet's 1,000 classes."""
    torch.manual_seed(0)
    model = NarrowResNet(torchvision.models.resnet.BasicBlock, (2, 2, 2, 2), 8)
    randomize_norms(model)
    model.fc = torch.nn.Linear(64, 1000)
    return model.eval()


@pytest.fixture(scope="module")
def weights(network: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "network.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """JPEGs of several sizes, larger and smaller than 224 pixels."""
    folder, rng, paths = tmp_path_factory.mktemp("photos"), np.random.default_rng(0), []
    for i, (height, width) in enumerate([(400, 300), (231, 500), (90, 120)]):
        small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
        paths.append(folder / f"{i}.jpg")
        small.resize((width, height), Image.Resampling.BICUBIC).save(paths[-1], quality=95)
    return paths


@torch.no_grad()
def pooled_and_logits(network: torch.nn.Module, inputs: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    pooled: list[torch.Tensor] = []
    hook = network.get_submodule("avgpool").register_forward_hook(lambda module, x, y: pooled.append(y.flatten(1)))
    logits = network(inputs)
    hook.remove()
    return pooled[0].numpy(), logits.numpy()


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert (found.dtype, found.shape) == (np.float32, expected.shape)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_features_and_logits_are_torchvisions(network: torch.nn.Module, weights: Path, photos: list[Path]) -> None:
    """Compares the whole path from a photo, with the transforms that torchvision publishes with its weights."""
    published = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    inputs = torch.stack([published.transforms()(Image.open(path)) for path in photos])
    pooled, logits = pooled_and_logits(network, inputs)
    model = jaxft.load(weights)
    arrays = [np.asarray(Image.open(path)) for path in photos]
    assert_close(model.features([str(photos[0]), Image.open(photos[1]), arrays[2]]), pooled)
    assert_close(model.features(photos, "logits"), logits)
    own_size = np.stack([array[:90, :120].repeat(3, 0).repeat(2, 1)[:224, :224] for array in arrays])
    normalised = torchvision.transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)(
        torch.from_numpy(own_size.transpose(0, 3, 1, 2)) / 255
    )
    assert_close(model.features(own_size), pooled_and_logits(network, normalised)[0])


@pytest.mark.parametrize("arch", ["test_vit", pytest.param("test_convnext", marks=pytest.mark.slow)])
def test_logits_are_timms(arch: str, photos: list[Path], tmp_path: Path) -> None:
    """Compares the path from a photo, with bicubic resizing, for a folder as timm publishes it on the Hub."""
    torch.manual_seed(0)
    network: Any = timm.create_model(arch, num_classes=1000).eval()
    config = {key: value for key, value in network.pretrained_cfg.items() if not isinstance(value, Path)}
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": arch, "pretrained_cfg": config}))
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=network))
    with torch.no_grad():
        logits = network(torch.stack([transform(Image.open(path)) for path in photos])).numpy()
    assert_close(jaxft.features(tmp_path, photos, "logits"), logits)


def test_imagenets_names_are_torchvisions(weights: Path) -> None:
    assert jaxft.load(weights).class_names == imagenet_names()
    assert list(imagenet_names()) == torchvision.models.ResNet18_Weights.IMAGENET1K_V1.meta["categories"]
    assert names_for({"num_classes": 2, "class_names": ["cat", "dog"]}) == ("cat", "dog")
    assert names_for({"num_classes": 21841})[-1] == "class 21840"
    assert names_for({"num_classes": 0}) == ()


@pytest.mark.parametrize(
    ("arch", "provenance", "image_size", "resize"),
    [
        ("resnet18", {}, 224, 256),
        ("resnet50", NAMED["resnet50.tv_in1k_v2"], 224, 232),
        ("resnet50", NAMED["resnet50.a1_in1k"], 288, 288),
        ("resnet18", {"image_size": 160, "resize": 176}, 160, 176),
        ("resnet18", {"image_size": 160}, 160, 0),
        ("vit_small_patch14_dinov2", {}, 518, 592),
        ("vit_small_patch14_dinov2", {"resize": 518}, 518, 518),
    ],
)
def test_images_are_prepared_as_the_weights_were_evaluated(
    arch: str, provenance: dict[str, Any], image_size: int, resize: int
) -> None:
    own: dict[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    model = ARCHITECTURES[arch](num_classes=10)
    interpolation = provenance.get("interpolation", "bilinear")
    expected = Preprocessing(image_size, **own, resize=resize, interpolation=interpolation)
    assert preprocessing_of(provenance | own, model) == expected
    assert preprocessing_of(provenance, model) == expected._replace(mean=IMAGENET_MEAN, std=IMAGENET_STD)


def test_a_second_call_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = []

    def counted_step(*arguments: Any, **options: Any) -> Any:
        traced.append(1)
        return predict_step(*arguments, **options)

    monkeypatch.setattr(inference, "predict_step", counted_step)
    model = jaxft.load(TINY)
    images = np.zeros((9, 64, 64, 3), np.uint8)
    first = model.features(images)
    assert first.shape == (9, 128)
    np.testing.assert_array_equal(model.features(iter(images)), first)
    assert len(traced) == 1


def test_the_command_predicts_and_writes_features(
    photos: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The shipped weights name their classes by ImageNet's numbers."""
    model, argv = jaxft.load(TINY), ["--weights", TINY, *map(str, photos)]
    assert run_command(predict.main, [*argv, "--json", "--top_k=2"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["file"] for line in lines] == list(map(str, photos))
    assert [line["label"] for line in lines] == [found.label for found in model.predict(photos)]
    assert all(re.fullmatch(r"n\d{8}", top["label"]) for line in lines for top in line["top_k"])

    (tmp_path / "broken.jpg").write_text("no picture")
    out = tmp_path / "features.npz"
    assert run_command(predict.main, [*argv, str(tmp_path), "--features", str(out), "--layer=logits"]) == 2
    output = capsys.readouterr()
    assert output.out == f"{out}: 3 images, 200 logits each\n"
    assert "error: 1 of 4 files could not be read: " in output.err and "broken.jpg" in output.err
    with np.load(out) as archive:
        assert set(archive) == {"features", "files"}
        assert archive["files"].tolist() == list(map(str, photos))
        assert archive["features"].dtype == np.float32
        np.testing.assert_array_equal(archive["features"], model.features(photos, "logits"))
    assert {path.name for path in tmp_path.iterdir()} == {"broken.jpg", "features.npz"}


def test_a_network_without_a_head_has_features_only(
    network: torch.nn.Module, tmp_path: Path, fails: Callable[..., str]
) -> None:
    path = tmp_path / "backbone.pth"
    torch.save({key: value for key, value in network.state_dict().items() if not key.startswith("fc.")}, path)
    image = np.zeros((224, 224, 3), np.uint8)
    model = jaxft.load(path)
    assert model.features(image).shape == (1, 64)
    for call in (model.predict, model.probabilities, model.stream, lambda image: model.features(image, "logits")):
        with pytest.raises(UserError, match=r"backbone.pth has no head.*take its pooled features"):
            call(image)
    Image.fromarray(image).save(tmp_path / "a.png")
    assert "has no head" in fails("-m", "jaxft.predict", "--weights", path, tmp_path / "a.png")
    assert "has no head" in fails("-m", "jaxft.predict", "--weights", path, "--serve", "--port=0")


@pytest.mark.parametrize(
    ("source", "images", "layer", "message"),
    [
        (TINY, [], "penultimate", "layer must be 'pooled' or 'logits', not 'penultimate'"),
        (TINY, [], "probabilities", "layer must be 'pooled' or 'logits'"),
        (TINY, ["nowhere.png"], "pooled", "there is no image nowhere.png"),
        (TINY, 7, "pooled", "expected an image or a list of images, .*, not a value of type int"),
        ("resnet50.tv_in1k_v9", [], "pooled", "no such name; similar names: resnet50.tv_in1k_v2"),
        ("runs/nowhere", [], "pooled", "there is no run and no weights file runs/nowhere"),
        ("https://example.org/resnet.pth", [], "pooled", "is a URL"),
        ("a\0b", [], "pooled", "there is no run and no weights file"),
        (None, [], "pooled", "not None"),
    ],
    ids=str,
)
def test_errors_say_what_is_wrong(source: Any, images: Any, layer: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        jaxft.features(source, images, layer)


def test_no_images_have_no_rows() -> None:
    assert jaxft.features(TINY, []).shape == (0, 128)
    assert jaxft.features(TINY, [], "logits").shape == (0, 200)
