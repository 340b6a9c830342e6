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


# Parameters of each architecture with 1,000 classes. Sources: the weights enums of torchvision 0.28, timm 1.0.31.
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
    "resnet10t": 5_435_488,
    "resnet14t": 10_081_632,
    "resnet18d": 11_708_744,
    "resnet26": 15_995_176,
    "resnet26d": 16_014_408,
    "resnet26t": 16_011_872,
    "resnet34d": 21_816_904,
    "resnet50c": 25_576_264,
    "resnet50d": 25_576_264,
    "resnet50s": 25_680_808,
    "resnet50t": 25_573_728,
    "resnet101c": 44_568_392,
    "resnet101d": 44_568_392,
    "resnet101s": 44_672_936,
    "resnet152c": 60_212_040,
    "resnet152d": 60_212_040,
    "resnet152s": 60_316_584,
    "resnet200": 64_673_832,
    "resnet200d": 64_693_064,
    "resnext50d_32x4d": 25_048_136,
    "resnext101_32x4d": 44_177_704,
    "resnext101_32x16d": 194_026_792,
    "resnext101_32x32d": 468_530_472,
    "seresnet18": 11_779_624,
    "seresnet34": 21_960_416,
    "seresnet50": 28_088_024,
    "seresnet50t": 28_104_720,
    "seresnet101": 49_326_872,
    "seresnet152": 66_821_848,
    "seresnet152d": 66_841_080,
    "seresnet200d": 71_855_096,
    "seresnet269d": 113_672_760,
    "seresnext26d_32x4d": 16_809_512,
    "seresnext26t_32x4d": 16_806_976,
    "seresnext50_32x4d": 27_559_896,
    "seresnext101_32x4d": 48_955_416,
    "seresnext101_32x8d": 93_569_048,
    "seresnext101d_32x8d": 93_588_280,
    "seresnext101_64x4d": 88_232_984,
    "vit_b_16": 86_567_656,
    "vit_b_32": 88_224_232,
    "vit_l_16": 304_326_632,
    "vit_l_32": 306_535_400,
    "vit_h_14": 632_045_800,
    "vit_tiny_patch16_224": 5_717_416,
    "vit_small_patch8_224": 22_055_272,
    "vit_small_patch16_224": 22_050_664,
    "vit_small_patch32_224": 22_878_952,
    "vit_base_patch8_224": 86_576_872,
    "vit_large_patch14_224": 304_203_752,
    "vit_tiny_patch16_384": 5_790_376,
    "vit_small_patch16_384": 22_196_584,
    "vit_small_patch32_384": 22_915_432,
    "vit_base_patch16_384": 86_859_496,
    "vit_base_patch32_384": 88_297_192,
    "vit_large_patch16_384": 304_715_752,
    "vit_large_patch32_384": 306_632_680,
    "deit_tiny_distilled_patch16_224": 5_717_800,
    "deit_small_distilled_patch16_224": 22_051_432,
    "deit_base_distilled_patch16_224": 86_569_192,
    "deit_base_distilled_patch16_384": 86_861_032,
    "deit3_small_patch16_224": 22_059_496,
    "deit3_small_patch16_384": 22_205_416,
    "deit3_base_patch16_224": 86_585_320,
    "deit3_base_patch16_384": 86_877_160,
    "deit3_large_patch16_224": 304_374_760,
    "deit3_large_patch16_384": 304_763_880,
    "deit3_medium_patch16_224": 38_849_512,
    "deit3_huge_patch14_224": 632_126_440,
    "vit_small_patch14_dinov2": 22_441_192,
    "vit_small_patch14_reg4_dinov2": 22_442_344,
    "dinov2_vits14_reg": 22_442_728,
    "vit_base_patch14_dinov2": 87_348_712,
    "vit_base_patch14_reg4_dinov2": 87_351_016,
    "dinov2_vitb14_reg": 87_351_784,
    "vit_large_patch14_dinov2": 305_392_616,
    "vit_large_patch14_reg4_dinov2": 305_395_688,
    "dinov2_vitl14_reg": 305_396_712,
    "test_vit": 371_240,
    "test_vit2": 455_720,
    "test_vit3": 930_280,
    "convnext_tiny": 28_589_128,
    "convnext_small": 50_223_688,
    "convnext_base": 88_591_464,
    "convnext_large": 197_767_336,
    "convnext_atto": 3_695_520,
    "convnext_femto": 5_217_784,
    "convnext_pico": 9_045_672,
    "convnext_nano": 15_593_560,
    "convnext_xlarge": 350_196_968,
    "convnext_xxlarge": 846_471_016,
    "convnextv2_tiny": 28_635_496,
    "convnextv2_small": 50_318_440,
    "convnextv2_base": 88_717_800,
    "convnextv2_large": 197_956_840,
    "convnextv2_atto": 3_708_400,
    "convnextv2_femto": 5_233_240,
    "convnextv2_pico": 9_066_280,
    "convnextv2_nano": 15_623_800,
    "convnextv2_huge": 660_289_640,
    "test_convnext": 272_128,
    "test_convnext2": 477_800,
}

# name, file, resize_size, crop_size, top1; all bilinear.
# Source: the weights enums of torchvision 0.28 (torchvision/models/resnet.py, vgg.py, vision_transformer.py,
# convnext.py); V1 and V2 are its IMAGENET1K_V1 and _V2.
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
    ("vit_b_16.tv_in1k_v1", "vit_b_16-c867db91.pth", 256, 224, 81.072),
    ("vit_b_32.tv_in1k_v1", "vit_b_32-d86f8d99.pth", 256, 224, 75.912),
    ("vit_l_16.tv_in1k_v1", "vit_l_16-852ce7e3.pth", 242, 224, 79.662),
    ("vit_l_32.tv_in1k_v1", "vit_l_32-c7638314.pth", 256, 224, 76.972),
    ("convnext_tiny.tv_in1k_v1", "convnext_tiny-983f1562.pth", 236, 224, 82.520),
    ("convnext_small.tv_in1k_v1", "convnext_small-0c510722.pth", 230, 224, 83.616),
    ("convnext_base.tv_in1k_v1", "convnext_base-6075fbad.pth", 232, 224, 84.062),
    ("convnext_large.tv_in1k_v1", "convnext_large-ea097f82.pth", 232, 224, 84.414),
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
