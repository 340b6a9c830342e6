"""The preparation of images in config.json and preprocessor_config.json, beside timm's and transformers' own."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from jaxft.pretrained import weights_file
from jaxft.pretrained.family import Declarations
from jaxft.pretrained.processor import Facts, read_facts
from tests.helpers.reference import torch, torchvision  # noqa: F401, before timm and transformers

FAMILY = Declarations(own_names=r"^vit", model_type="vit|dinov2")
TIMM = {"input_size": [3, 32, 32], "interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "center"}
TIMM |= {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.25, 0.125]}


def facts(folder: Path, config: Any, processor: Any = None, num_classes: int = 3) -> Facts:
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").unlink(missing_ok=True)
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return read_facts(folder / "model.safetensors", FAMILY, num_classes)


def timm_facts(folder: Path, **changes: Any) -> Facts:
    return facts(folder, {"architecture": "vit_x", "pretrained_cfg": TIMM | changes})


def inputs(found: Facts, image: np.ndarray) -> np.ndarray:
    """Returns what a run's evaluation makes of an image, by Pillow: (H, W, 3)."""
    values = found.values
    size, resize, shorter = values["image_size"], values["resize"], min(image.shape[:2])
    height, width = (int(resize * side / shorter) for side in image.shape[:2])
    resized = Image.fromarray(image).resize((width, height), Image.Resampling[values["interpolation"].upper()])
    top, left = ((side - size) // 2 for side in (height, width))
    pixels = np.asarray(resized)[top : top + size, left : left + size] / 255
    return (pixels - np.array(values["mean"])) / np.array(values["std"])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"crop_pct": 0.95},
        {"crop_pct": 1.0, "interpolation": "bilinear"},
        {"input_size": [3, 36, 36], "crop_pct": 0.875},
        {"crop_pct": 0.965, "interpolation": "lanczos"},
    ],
)
def test_timm_prepares_images_alike(tmp_path: Path, changes: dict[str, Any]) -> None:
    from timm.data import create_transform, resolve_data_config

    found = timm_facts(tmp_path, **changes)
    assert not found.notes
    transform = create_transform(**resolve_data_config(pretrained_cfg=TIMM | changes))
    image = np.random.default_rng(0).integers(0, 256, (60, 48, 3), np.uint8)
    expected = transform(Image.fromarray(image)).numpy().transpose(1, 2, 0)
    ours = inputs(found, image)
    # torchvision rounds the crop's corner to even, so an odd margin may shift it by one pixel
    resize, size = found.values["resize"], found.values["image_size"]
    assert ours.shape == expected.shape
    if (resize - size) % 2 == 0:
        np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-6)


def test_timm_config_of_an_older_form(tmp_path: Path) -> None:
    """Older files have the keys of pretrained_cfg at the top level."""
    old = facts(tmp_path, TIMM | {"architecture": "vit_x", "labels": ["a", "b", "c"]})
    assert old.values == timm_facts(tmp_path).values | {"class_names": ["a", "b", "c"]}


PROCESSORS = [
    ("vit", "ViTImageProcessorPil", {"size": {"height": 32, "width": 32}}, (32, 32)),
    (
        "vit",
        "ViTImageProcessorPil",
        {"size": {"height": 30, "width": 30}, "resample": 3, "do_normalize": False},
        (30, 30),
    ),
    ("vit", "ViTImageProcessorPil", {"size": 24, "rescale_factor": 1 / 127.5, "image_mean": [1, 1.5, 2]}, (24, 24)),
    (
        "bit",
        "BitImageProcessorPil",
        {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}},
        (32, 40),
    ),
    ("bit", "BitImageProcessorPil", {"size": {"shortest_edge": 40}, "do_center_crop": False}, (40, 40)),
    ("deit", "DeiTImageProcessorPil", {"size": {"height": 36, "width": 36}, "crop_size": 32, "resample": 1}, (32, 36)),
    ("convnext", "ConvNextImageProcessorPil", {"size": {"shortest_edge": 56}, "crop_pct": 0.875}, (56, 64)),
    ("convnext", "ConvNextImageProcessorPil", {"size": {"shortest_edge": 32}, "crop_pct": 0.88}, (32, 36)),
    ("convnext", "ConvNextImageProcessorPil", {"size": {"shortest_edge": 384}}, (384, 384)),
]


@pytest.mark.parametrize(("folder", "name", "settings", "sizes"), PROCESSORS)
def test_transformers_prepares_square_images_alike(
    tmp_path: Path, folder: str, name: str, settings: dict[str, Any], sizes: tuple[int, int]
) -> None:
    import importlib

    module = importlib.import_module(f"transformers.models.{folder}.image_processing_pil_{folder}")
    processor = getattr(module, name)(**settings)
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    found = facts(tmp_path, {"model_type": "vit"}, saved)
    assert not found.notes
    assert (found.values["image_size"], found.values["resize"]) == sizes
    image = np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8)
    expected = processor(Image.fromarray(image))["pixel_values"][0].transpose(1, 2, 0)
    np.testing.assert_allclose(inputs(found, image), expected, rtol=0, atol=2e-5)


def test_old_names_and_missing_files(tmp_path: Path) -> None:
    old = {"feature_extractor_type": "ConvNextFeatureExtractor", "size": 224, "crop_pct": None, "resample": 3}
    assert facts(tmp_path, {"model_type": "vit"}, old).values == {
        "image_size": 224,
        "resize": 256,
        "interpolation": "bicubic",
    }
    assert facts(tmp_path, {"model_type": "dinov2", "image_size": 518}).values == {"image_size": 518}
    assert facts(tmp_path, {"model_type": "bert", "image_size": 518}).values == {}
    assert facts(tmp_path, {"architecture": "resnet18", "image_size": 518}).values == {}


def test_class_names_belong_to_the_head(tmp_path: Path) -> None:
    def names(labels: Any, num_classes: int = 2) -> tuple[Any, list[str]]:
        found = facts(tmp_path, {"model_type": "vit", "id2label": labels}, num_classes=num_classes)
        return found.values.get("class_names"), found.notes

    assert names({"1": "dog", "0": "cat"}) == (["cat", "dog"], [])
    assert names({"0": "LABEL_0", "1": "LABEL_1"}) == (None, [])
    assert names({"0": "cat", "2": "dog"}) == (None, [])
    assert names({"0": "cat", "1": 7}) == (None, [])
    assert names({"0": "cat", "1": "dog"}, 3) == (None, ["config.json names 2 classes, not 3: ignored"])
    assert names({"0": "cat", "1": "dog"}, 0) == (None, [])
    assert names({"0": "c\x1bat", "1": "d" * 500})[0] == ["c?at", "d" * 97 + "..."]
    config = {"architecture": "vit_x", "pretrained_cfg": TIMM, "label_names": ["n1", "n2"], "num_classes": 2}
    assert facts(tmp_path, config, num_classes=2).values["class_names"] == ["n1", "n2"]
    config["label_descriptions"] = {"n1": "cat", "n2": "dog"}
    assert facts(tmp_path, config, num_classes=2).values["class_names"] == ["cat", "dog"]


@pytest.mark.parametrize(
    ("changes", "missing", "note"),
    [
        ({"crop_mode": "squash"}, None, "crop_mode is squash, but jaxft crops the centre"),
        ({"interpolation": "random"}, None, "interpolation is random, taken as bicubic"),
        ({"interpolation": "hamming"}, "interpolation", "interpolation is hamming, which jaxft does not have"),
        ({"interpolation": 3.5}, "interpolation", "interpolation is 3.5"),
        ({"mean": "x"}, "mean", "mean is x, ignored"),
        ({"mean": [0.5, float("nan"), 0.5]}, "mean", "mean is [0.5, nan, 0.5], ignored"),
        ({"mean": [0.5, 0.5]}, "mean", "mean is [0.5, 0.5], ignored"),
        ({"std": [0, 1, 1]}, "std", "std is [0, 1, 1], ignored"),
        ({"std": [True, 1, 1]}, "std", "std is [True, 1, 1], ignored"),
        ({"input_size": [3, 10**9, 10**9]}, "image_size", "input_size is"),
        ({"input_size": [3, 32, 48]}, "image_size", "input_size is [32, 48], ignored"),
        ({"input_size": [3, 32.5, 32.5]}, "image_size", "input_size is"),
        ({"crop_pct": 0}, "resize", "crop_pct is 0, ignored"),
        ({"crop_pct": "0.9"}, "resize", "crop_pct is 0.9, ignored"),
        ({"crop_pct": 1e400}, "resize", "crop_pct is inf, ignored"),
    ],
)
def test_a_wrong_value_is_left_out_with_a_note(
    tmp_path: Path, changes: dict[str, Any], missing: str | None, note: str
) -> None:
    found = timm_facts(tmp_path, **changes)
    expected = {*timm_facts(tmp_path).values} - {missing, *(["resize"] if missing == "image_size" else [])}
    assert {*found.values} == expected
    (text,) = found.notes
    assert text.startswith(f"config.json: {note}")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "x", "bicubic", "center", "random"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["height", "shortest_edge"]), inner),
    max_leaves=6,
)
_KEYS = ["input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std", "label_names", "label_descriptions"]
_KEYS += ["size", "crop_size", "resample", "do_center_crop", "do_resize", "do_rescale", "rescale_factor"]
_KEYS += ["image_mean", "image_std", "do_normalize", "image_processor_type", "id2label", "image_size", "crop_pct"]


@given(st.dictionaries(st.sampled_from(_KEYS), JSON), st.booleans())
def test_any_values_give_a_valid_provenance(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any], is_timm: bool
) -> None:
    folder = tmp_path_factory.getbasetemp()
    if is_timm:
        found = facts(folder, {"architecture": "vit_x", "pretrained_cfg": values})
    else:
        found = facts(folder, {"model_type": "vit"} | values, values)
    for key, value in json.loads(json.dumps(found.values)).items():
        assert weights_file._VALID[key](value), (key, value)
    assert all(note.isprintable() and len(note) < 120 for note in found.notes)
    assert found.values.get("resize", 4096) >= found.values.get("image_size", 0)
