"""Reads a network's preprocessing and class names from timm's or transformers' files beside its weights.

The files are not trusted: a value of a wrong type or out of range is left out, and a note says so.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxft.pretrained.declared import CONFIG, describes, read_small_json
from jaxft.pretrained.family import Declarations
from jaxft.pretrained.state_dict import excerpt
from jaxft.transforms.pillow_resize import FILTERS

PREPROCESSOR = "preprocessor_config.json"  # of transformers
LARGEST_SIZE, LARGEST_RESIZE = 1024, 4096  # pixels
_PIL_FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by Pillow's number
# Of transformers' ConvNextImageProcessor: smaller images are resized by crop_pct and cropped, larger ones only resized.
_CONVNEXT_CROP_PCT, _CONVNEXT_CROPS_BELOW = 224 / 256, 384


class Facts(NamedTuple):
    """Entries of a provenance: mean, std, image_size, resize, interpolation, class_names. Unknown ones are missing."""

    values: dict[str, Any]
    notes: list[str]  # on values that are left out, and on preparation that differs from jaxft's


class _Reader:
    """Reads values from one JSON object, and notes those that are wrong."""

    def __init__(self, config: Mapping[str, Any], file: str, notes: list[str]) -> None:
        self.config, self._file, self.notes = config, file, notes

    def get(self, key: str, default: Any = None) -> Any:
        value = self.config.get(key)
        return default if value is None else value

    def ignore(self, key: str, remedy: str = "ignored") -> None:
        self.notes.append(f"{self._file}: {key} is {excerpt(self.get(key), 30)}, {remedy}")

    def number(self, key: str, low: float, high: float, default: float | None) -> float | None:
        """Returns a number between `low` and `high`; the default if it is missing or wrong."""
        value = self.get(key)
        if value is None:
            return default
        if not _is_number(value, low, high):
            self.ignore(key)
            return default
        return float(value)

    def channels(self, key: str, low: float) -> tuple[float, float, float] | None:
        """Returns three numbers, one per channel; one number stands for all channels."""
        value = self.get(key)
        if value is None:
            return None
        values = value if isinstance(value, list) else [value]
        if len(values) not in (1, 3) or not all(_is_number(number, low, 1e4) for number in values):
            self.ignore(key)
            return None
        red, green, blue = map(float, values * (3 // len(values)))
        return red, green, blue

    def side(self, key: str) -> int | None:
        """Returns a side in pixels from 224, [224, 224], {"height": 224, "width": 224} or {"shortest_edge": 224}."""
        value = self.get(key)
        if value is None:
            return None
        sides = [value]
        if isinstance(value, list):
            sides = value
        elif isinstance(value, dict):
            named = [value.get(name) for name in ("shortest_edge", "height", "width")]
            sides = [side for side in named if side is not None]
        valid = all(_is_number(side, 1, LARGEST_SIZE) and side == int(side) for side in sides)
        if not valid or not 1 <= len(sides) <= 2 or len({*sides}) != 1:
            self.ignore(key)
            return None
        return int(sides[0])

    def filter(self, key: str) -> str | None:
        """Returns the name of a filter, which may be given by Pillow's number."""
        value = self.get(key)
        if type(value) is int and 0 <= value < len(_PIL_FILTERS):
            value = _PIL_FILTERS[value]
        if value in (None, *FILTERS):
            return value
        if value == "random":  # of timm's training
            self.ignore(key, "taken as bicubic")
            return "bicubic"
        self.ignore(key, "which jaxft does not have")
        return None


def _is_number(value: Any, low: float, high: float) -> bool:
    return type(value) in (int, float) and low <= value <= high  # False for NaN


def read_facts(path: Path, family: Declarations, num_classes: int) -> Facts:
    """Reads the facts about a network from the files beside its weights `path`, if they are of its family."""
    config = read_small_json(path.with_name(CONFIG))
    if not describes(config, family):
        return Facts({}, [])
    notes: list[str] = []
    if "architecture" in config:
        pretrained_cfg = config.get("pretrained_cfg", config)  # older files have its keys on the outside
        pretrained_cfg = pretrained_cfg if isinstance(pretrained_cfg, dict) else {}
        values = _of_timm(_Reader(pretrained_cfg, CONFIG, notes))
        names = _timm_labels({**pretrained_cfg, **config})
    else:
        processor = read_small_json(path.with_name(PREPROCESSOR))
        values = _of_transformers(_Reader(processor, PREPROCESSOR, notes))
        if not processor:
            values["image_size"] = _Reader(config, CONFIG, notes).side("image_size")
        names = _transformers_labels(config)
    if names and num_classes and len(names) != num_classes:
        notes.append(f"{CONFIG} names {len(names):,} classes, not {num_classes:,}: ignored")
    elif names and num_classes:
        values["class_names"] = [excerpt(name, 100) for name in names]
    return Facts({key: value for key, value in values.items() if value is not None}, notes)


def _of_timm(config: _Reader) -> dict[str, Any]:
    """Returns the preprocessing of timm's transforms_imagenet_eval."""
    mode = config.get("crop_mode", "center")
    if mode != "center":
        config.ignore("crop_mode", "but jaxft crops the centre")
    size = config.get("input_size")
    if isinstance(size, list) and len(size) == 3:  # channels, height, width
        side = _Reader({"input_size": size[1:]}, CONFIG, config.notes).side("input_size")
    else:
        side = config.side("input_size")
    crop_pct = config.number("crop_pct", 0.1, 1, None)
    return {
        "mean": config.channels("mean", -1e4),
        "std": config.channels("std", 1e-6),
        "image_size": side,
        "resize": _fitting(math.floor(side / crop_pct)) if side and crop_pct else None,
        "interpolation": config.filter("interpolation"),
    }


def _of_transformers(config: _Reader) -> dict[str, Any]:
    """Returns the preprocessing of an image processor of transformers, which may squash images where jaxft crops."""
    kind = config.get("image_processor_type", config.get("feature_extractor_type"))
    resized = config.side("size") if config.get("do_resize", True) is True else None
    image_size = resized
    if "ConvNext" in str(kind) and resized:
        crop_pct = config.number("crop_pct", 0.1, 1, _CONVNEXT_CROP_PCT) or _CONVNEXT_CROP_PCT
        if resized < _CONVNEXT_CROPS_BELOW:
            resized = int(resized / crop_pct)
    elif config.get("do_center_crop", "crop_size" in config.config) is True:
        image_size = config.side("crop_size") or resized
    values: dict[str, Any] = {
        "image_size": image_size,
        "resize": _fitting(max(resized, image_size)) if resized and image_size else None,
        "interpolation": config.filter("resample"),
    }
    # (image * factor - mean) / std, with the image's values from 0 to 255
    factor = config.number("rescale_factor", 1e-6, 1e3, 1 / 255) if config.get("do_rescale", True) is True else 1.0
    scale = 255 * (factor or 1 / 255)
    mean, std = config.channels("image_mean", -1e4), config.channels("image_std", 1e-6)
    if config.config and config.get("do_normalize", True) is not True:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if mean and std and abs(scale - 1) > 1e-4:
        mean, std = ((red / scale, green / scale, blue / scale) for red, green, blue in (mean, std))
        if min(std) < 1e-6:
            config.ignore("rescale_factor")
            mean = std = None
    return values | {"mean": mean, "std": std}


def _fitting(resize: int) -> int | None:
    return resize if resize <= LARGEST_RESIZE else None


def _timm_labels(config: Mapping[str, Any]) -> list[str]:
    names = config.get("label_names", config.get("labels"))
    if not _are_names(names):
        return []
    descriptions = config.get("label_descriptions")
    described: Any = [descriptions.get(name) for name in names] if isinstance(descriptions, dict) else []
    return described if _are_names(described) else names


def _transformers_labels(config: Mapping[str, Any]) -> list[str]:
    labels = config.get("id2label")
    if not isinstance(labels, dict) or {*labels} != {str(number) for number in range(len(labels))}:
        return []
    names = [labels[str(number)] for number in range(len(labels))]
    is_default = names == [f"LABEL_{number}" for number in range(len(labels))]
    return [] if is_default or not _are_names(names) else names


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(name) is str and name.strip() for name in value)
