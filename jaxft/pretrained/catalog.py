"""The catalogue of ImageNet weights: each file's address, checksum and published preprocessing and accuracy."""

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from jaxft.files import SAMPLES_DIR, cache_dir
from jaxft.pretrained.download import fetch
from jaxft.transforms.preprocessing import IMAGENET_MEAN, IMAGENET_STD


class NamedWeights(NamedTuple):
    name: str  # ARCH.RECIPE
    arch: str
    url: str
    sha256_prefix: str  # 8 hexadecimal digits
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str  # "bilinear" or "bicubic"
    resize_size: int  # pixels of the shorter side, before the central crop
    crop_size: int  # pixels
    top1: float  # accuracy on ImageNet's validation set in percent, as published for this preprocessing
    source: str
    license: str

    @property
    def max_bytes(self) -> int:
        """An upper bound of the file's size: its float32 parameters and a tenth more."""
        return int(4.4 * PARAMETERS[self.arch])


# Parameters of each architecture with 1,000 classes. Source: the weights enums of torchvision 0.28.
PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "wide_resnet50_2": 68_883_240,
    "wide_resnet101_2": 126_886_696,
    "resnext50_32x4d": 25_028_904,
    "resnext101_32x8d": 88_791_336,
    "resnext101_64x4d": 83_455_272,
    "vgg11": 132_863_336,
    "vgg11_bn": 132_868_840,
    "vgg13": 133_047_848,
    "vgg13_bn": 133_053_736,
    "vgg16": 138_357_544,
    "vgg16_bn": 138_365_992,
    "vgg19": 143_667_240,
    "vgg19_bn": 143_678_248,
}

# name, file, resize_size, crop_size, top1; all bilinear.
# Source: the weights enums of torchvision 0.28 (torchvision/models/resnet.py, vgg.py); V1 and V2 are its IMAGENET1K_V1
# and _V2.
_TORCHVISION = (
    ("resnet18.tv_in1k_v1", "resnet18-f37072fd.pth", 256, 224, 69.758),
    ("resnet34.tv_in1k_v1", "resnet34-b627a593.pth", 256, 224, 73.314),
    ("resnet50.tv_in1k_v1", "resnet50-0676ba61.pth", 256, 224, 76.130),
    ("resnet50.tv_in1k_v2", "resnet50-11ad3fa6.pth", 232, 224, 80.858),
    ("resnet101.tv_in1k_v1", "resnet101-63fe2227.pth", 256, 224, 77.374),
    ("resnet101.tv_in1k_v2", "resnet101-cd907fc2.pth", 232, 224, 81.886),
    ("resnet152.tv_in1k_v1", "resnet152-394f9c45.pth", 256, 224, 78.312),
    ("resnet152.tv_in1k_v2", "resnet152-f82ba261.pth", 232, 224, 82.284),
    ("wide_resnet50_2.tv_in1k_v1", "wide_resnet50_2-95faca4d.pth", 256, 224, 78.468),
    ("wide_resnet50_2.tv_in1k_v2", "wide_resnet50_2-9ba9bcbe.pth", 232, 224, 81.602),
    ("wide_resnet101_2.tv_in1k_v1", "wide_resnet101_2-32ee1156.pth", 256, 224, 78.848),
    ("wide_resnet101_2.tv_in1k_v2", "wide_resnet101_2-d733dc28.pth", 232, 224, 82.510),
    ("resnext50_32x4d.tv_in1k_v1", "resnext50_32x4d-7cdf4587.pth", 256, 224, 77.618),
    ("resnext50_32x4d.tv_in1k_v2", "resnext50_32x4d-1a0047aa.pth", 232, 224, 81.198),
    ("resnext101_32x8d.tv_in1k_v1", "resnext101_32x8d-8ba56ff5.pth", 256, 224, 79.312),
    ("resnext101_32x8d.tv_in1k_v2", "resnext101_32x8d-110c445d.pth", 232, 224, 82.834),
    ("resnext101_64x4d.tv_in1k_v1", "resnext101_64x4d-173b62eb.pth", 232, 224, 83.246),
    ("vgg11.tv_in1k_v1", "vgg11-8a719046.pth", 256, 224, 69.020),
    ("vgg11_bn.tv_in1k_v1", "vgg11_bn-6002323d.pth", 256, 224, 70.370),
    ("vgg13.tv_in1k_v1", "vgg13-19584684.pth", 256, 224, 69.928),
    ("vgg13_bn.tv_in1k_v1", "vgg13_bn-abd245e5.pth", 256, 224, 71.586),
    ("vgg16.tv_in1k_v1", "vgg16-397923af.pth", 256, 224, 71.592),
    ("vgg16_bn.tv_in1k_v1", "vgg16_bn-6c64b313.pth", 256, 224, 73.360),
    ("vgg19.tv_in1k_v1", "vgg19-dcbb9e9d.pth", 256, 224, 72.376),
    ("vgg19_bn.tv_in1k_v1", "vgg19_bn-c79401a0.pth", 256, 224, 74.218),
)

# The same columns; all bicubic. resize_size is floor(test_input_size / test_crop_pct) of timm's configs.
# Sources: default_cfgs in timm 1.0.31 (timm/models/resnet.py); top-1 from its results/results-imagenet.csv.
_TIMM = (
    ("resnet50.a1_in1k", "v0.1-rsb-weights/resnet50_a1_0-14fe96d1.pth", 288, 288, 81.214),
    ("resnet50.a1h_in1k", "v0.1-rsb-weights/resnet50_a1h2_176-001a1197.pth", 224, 224, 80.676),
    ("resnet50.a2_in1k", "v0.1-rsb-weights/resnet50_a2_0-a2746f79.pth", 288, 288, 80.772),
    ("resnet50.a3_in1k", "v0.1-rsb-weights/resnet50_a3_0-59cae1ef.pth", 235, 224, 78.048),
    ("resnet50.b1k_in1k", "v0.1-rsb-weights/resnet50_b1k-532a802a.pth", 288, 288, 80.706),
    ("resnet50.b2k_in1k", "v0.1-rsb-weights/resnet50_b2k-1ba180c1.pth", 288, 288, 80.454),
    ("resnet50.c1_in1k", "v0.1-rsb-weights/resnet50_c1-5ba5e060.pth", 288, 288, 80.912),
    ("resnet50.c2_in1k", "v0.1-rsb-weights/resnet50_c2-d01e05b2.pth", 288, 288, 80.870),
    ("resnet50.d_in1k", "v0.1-rsb-weights/resnet50_d-f39db8af.pth", 288, 288, 80.972),
    ("resnet50.ram_in1k", "v0.1-weights/resnet50_ram-a26f946b.pth", 303, 288, 79.976),
    ("resnet50.am_in1k", "v0.1-weights/resnet50_am-6c502b37.pth", 256, 224, 78.998),
    ("resnet50.ra_in1k", "v0.1-weights/resnet50_ra-85ebb6e5.pth", 303, 288, 79.836),
    ("resnet50.bt_in1k", "v0.1-weights/rw_resnet50-86acaeed.pth", 303, 288, 79.640),
)


def _named(
    rows: tuple[tuple[str, str, int, int, float], ...], folder: str, interpolation: str, source: str, license: str
) -> Iterator[NamedWeights]:
    """Yields a row for each file. As in torch.hub, a file's name ends with the first digits of its SHA-256."""
    for name, file, resize_size, crop_size, top1 in rows:
        yield NamedWeights(
            name=name,
            arch=name.split(".")[0],
            url=folder + file,
            sha256_prefix=file.removesuffix(".pth").split("-")[-1],
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            interpolation=interpolation,
            resize_size=resize_size,
            crop_size=crop_size,
            top1=top1,
            source=source,
            license=license,
        )


_TIMM_RELEASES = "https://github.com/huggingface/pytorch-image-models/releases/download/"

WEIGHTS = (
    *_named(_TORCHVISION, "https://download.pytorch.org/models/", "bilinear", "torchvision", "BSD-3-Clause"),
    *_named(_TIMM, _TIMM_RELEASES, "bicubic", "timm", "Apache-2.0"),
)


def shipped(name: str) -> Path | None:
    """Returns the file of weights that are packaged with jaxft, or None."""
    return next((path for path in SAMPLES_DIR.glob("*.safetensors") if path.stem == name), None)


def find(name: str) -> NamedWeights | None:
    return next((weights for weights in WEIGHTS if weights.name == name), None)


def similar_names(name: str) -> list[str]:
    """Returns up to three names that are similar, or that start with it if it is an architecture's name."""
    names = [weights.name for weights in WEIGHTS]
    of_arch = [other for other in names if other.startswith(f"{name.lower()}.")]
    return of_arch[:3] or difflib.get_close_matches(name.lower(), names, 3, 0.5)


def table() -> str:
    """Returns the catalogue as plain text, one line per row, with the config keys of the published preprocessing."""
    columns = "{:27}  {:>7}  {:>11}  {:>10}  {:8}  {:12}  {}"
    lines = [columns.format("name", "top-1 %", "data.resize", "image_size", "filter", "licence", "source")]
    for w in WEIGHTS:
        top1 = f"{w.top1:.3f}"
        lines.append(columns.format(w.name, top1, w.resize_size, w.crop_size, w.interpolation, w.license, w.source))
    return "\n".join(lines)


def weights_dir() -> Path:
    """Returns the cache folder of named weights."""
    return cache_dir() / "weights"


def weights_file(weights: NamedWeights) -> Path:
    """Returns the file in the cache, downloading it first if necessary. Raises UserError."""
    return fetch(weights.url, weights.sha256_prefix, weights_dir(), weights.max_bytes)
