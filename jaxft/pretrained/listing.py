"""Tables of the architectures of a family, for `jaxft convert --list FAMILY`."""

from collections.abc import Collection

from jaxft.models.architectures import CONVNEXTS, RESNETS, TORCHVISION, VGGS, VITS, canonical
from jaxft.pretrained.catalog import PARAMETERS, WEIGHTS

_FAMILIES: dict[str, Collection[str]] = {"resnet": RESNETS, "vgg": VGGS, "vit": VITS, "convnext": CONVNEXTS}
FAMILY_NAMES = tuple(_FAMILIES)

# One of timm's weights for each architecture that it has weights of: repositories `timm/NAME` on Hugging Face's Hub.
# Source: the pretrained configs of timm 1.0.31; those with 1,000 classes are preferred.
EXAMPLES = (
    "resnet18.a1_in1k",
    "resnet34.a1_in1k",
    "resnet50.a1_in1k",
    "resnet101.a1_in1k",
    "resnet152.a1_in1k",
    "wide_resnet50_2.racm_in1k",
    "wide_resnet101_2.tv2_in1k",
    "resnext50_32x4d.a1_in1k",
    "resnext101_32x8d.fb_ssl_yfcc100m_ft_in1k",
    "resnext101_64x4d.c1_in1k",
    "resnet10t.c3_in1k",
    "resnet14t.c3_in1k",
    "resnet18d.ra2_in1k",
    "resnet26.bt_in1k",
    "resnet26d.bt_in1k",
    "resnet26t.ra2_in1k",
    "resnet34d.ra2_in1k",
    "resnet50c.gluon_in1k",
    "resnet50d.a1_in1k",
    "resnet50s.gluon_in1k",
    "resnet101c.gluon_in1k",
    "resnet101d.gluon_in1k",
    "resnet101s.gluon_in1k",
    "resnet152c.gluon_in1k",
    "resnet152d.gluon_in1k",
    "resnet152s.gluon_in1k",
    "resnet200d.ra2_in1k",
    "resnext50d_32x4d.bt_in1k",
    "resnext101_32x4d.fb_ssl_yfcc100m_ft_in1k",
    "resnext101_32x16d.fb_ssl_yfcc100m_ft_in1k",
    "resnext101_32x32d.fb_wsl_ig1b_ft_in1k",
    "seresnet50.a1_in1k",
    "seresnet152d.ra2_in1k",
    "seresnext26d_32x4d.bt_in1k",
    "seresnext26t_32x4d.bt_in1k",
    "seresnext50_32x4d.gluon_in1k",
    "seresnext101_32x4d.gluon_in1k",
    "seresnext101_32x8d.ah_in1k",
    "seresnext101d_32x8d.ah_in1k",
    "seresnext101_64x4d.gluon_in1k",
    "vgg11.tv_in1k",
    "vgg13.tv_in1k",
    "vgg16.tv_in1k",
    "vgg19.tv_in1k",
    "vgg11_bn.tv_in1k",
    "vgg13_bn.tv_in1k",
    "vgg16_bn.tv_in1k",
    "vgg19_bn.tv_in1k",
    "vit_base_patch16_224.augreg2_in21k_ft_in1k",
    "vit_base_patch32_224.augreg_in21k_ft_in1k",
    "vit_large_patch16_224.augreg_in21k_ft_in1k",
    "vit_large_patch32_224.orig_in21k",
    "vit_huge_patch14_224.mae",
    "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
    "vit_small_patch8_224.dino",
    "vit_small_patch16_224.augreg_in21k_ft_in1k",
    "vit_small_patch32_224.augreg_in21k_ft_in1k",
    "vit_base_patch8_224.augreg2_in21k_ft_in1k",
    "vit_tiny_patch16_384.augreg_in21k_ft_in1k",
    "vit_small_patch16_384.augreg_in21k_ft_in1k",
    "vit_small_patch32_384.augreg_in21k_ft_in1k",
    "vit_base_patch16_384.augreg_in21k_ft_in1k",
    "vit_base_patch32_384.augreg_in21k_ft_in1k",
    "vit_large_patch16_384.augreg_in21k_ft_in1k",
    "vit_large_patch32_384.orig_in21k_ft_in1k",
    "deit_tiny_distilled_patch16_224.fb_in1k",
    "deit_small_distilled_patch16_224.fb_in1k",
    "deit_base_distilled_patch16_224.fb_in1k",
    "deit_base_distilled_patch16_384.fb_in1k",
    "deit3_small_patch16_224.fb_in22k_ft_in1k",
    "deit3_small_patch16_384.fb_in22k_ft_in1k",
    "deit3_base_patch16_224.fb_in22k_ft_in1k",
    "deit3_base_patch16_384.fb_in22k_ft_in1k",
    "deit3_large_patch16_224.fb_in22k_ft_in1k",
    "deit3_large_patch16_384.fb_in22k_ft_in1k",
    "deit3_medium_patch16_224.fb_in22k_ft_in1k",
    "deit3_huge_patch14_224.fb_in22k_ft_in1k",
    "vit_small_patch14_dinov2.lvd142m",
    "vit_small_patch14_reg4_dinov2.lvd142m",
    "vit_base_patch14_dinov2.lvd142m",
    "vit_base_patch14_reg4_dinov2.lvd142m",
    "vit_large_patch14_dinov2.lvd142m",
    "vit_large_patch14_reg4_dinov2.lvd142m",
    "test_vit.r160_in1k",
    "test_vit2.r160_in1k",
    "test_vit3.r160_in1k",
    "convnext_tiny.fb_in22k_ft_in1k",
    "convnext_small.fb_in22k_ft_in1k",
    "convnext_base.fb_in22k_ft_in1k",
    "convnext_large.fb_in22k_ft_in1k",
    "convnext_atto.d2_in1k",
    "convnext_femto.d1_in1k",
    "convnext_pico.d1_in1k",
    "convnext_nano.d1h_in1k",
    "convnext_xlarge.fb_in22k_ft_in1k",
    "convnext_xxlarge.clip_laion2b_soup_ft_in1k",
    "convnextv2_tiny.fcmae_ft_in22k_in1k",
    "convnextv2_base.fcmae_ft_in22k_in1k",
    "convnextv2_large.fcmae_ft_in22k_in1k",
    "convnextv2_atto.fcmae_ft_in1k",
    "convnextv2_femto.fcmae_ft_in1k",
    "convnextv2_pico.fcmae_ft_in1k",
    "convnextv2_nano.fcmae_ft_in22k_in1k",
    "convnextv2_huge.fcmae_ft_in1k",
    "test_convnext.r160_in1k",
    "test_convnext2.r160_in1k",
)


def families() -> str:
    """Returns a line about the families and the weights without a name."""
    counts = ", ".join(f"{name} ({len(architectures)})" for name, architectures in _FAMILIES.items())
    return (
        f"Architectures by family: {counts}; list them by --list FAMILY. Weights on Hugging Face's Hub: hf:OWNER/NAME"
    )


def family_table(name: str) -> str:
    """Returns a family's architectures as plain text: parameters, image size, and the name of some of their weights.

    image_size: pixels, of the position embeddings of a ViT; others take any size from their smallest one on.
    """
    columns = "{:32}  {:>11}  {:>10}  {}"
    lines = [columns.format("model.arch", "parameters", "image_size", "weights")]
    examples = {canonical(example.split(".")[0]): f"hf:timm/{example}" for example in EXAMPLES}
    for arch in _FAMILIES[name]:
        side = VITS[arch].grid * VITS[arch].patch if arch in VITS else 224
        named = [weights.name for weights in WEIGHTS if weights.arch == arch and weights.source == "torchvision"]
        weights = ", ".join([*named[-1:], *([examples[arch]] if arch in examples else [])])
        lines.append(columns.format(arch, f"{PARAMETERS[arch]:,}", side, weights or _files(arch)).rstrip())
    return "\n".join(lines)


def _files(arch: str) -> str:
    library = "torchvision" if arch in TORCHVISION else "Meta" if arch.endswith("_reg") else "timm"
    return f"files of {library}"
