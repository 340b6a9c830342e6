"""Names and layouts of ResNet weights in files of torchvision, timm, Hugging Face and others: tables only."""

from jaxft.pretrained.state_dict import Family, Naming

# (torch's last name, number of axes) -> Flax's collection and last name, and torch's axes in Flax's order.
# The names before the last are the same: joined by '.' in torch, nested dicts in Flax.
# Sources: torch.nn.Conv2d, Linear and BatchNorm2d; flax.linen.Conv and Dense.
LAYOUT = {
    ("weight", 4): ("params", "kernel", (2, 3, 1, 0)),  # convolution: OIHW -> HWIO
    ("weight", 2): ("params", "kernel", (1, 0)),  # dense: OI -> IO
    ("weight", 1): ("params", "scale", (0,)),
    ("bias", 1): ("params", "bias", (0,)),
    ("running_mean", 1): ("batch_stats", "mean", (0,)),
    ("running_var", 1): ("batch_stats", "var", (0,)),
}

# The inverse: (Flax's collection, last name, number of axes) -> torch's last name.
TORCH_NAMES = {(collection, leaf, len(axes)): name for (name, _), (collection, leaf, axes) in LAYOUT.items()}
NUM_BATCHES_TRACKED = ".num_batches_tracked"  # torch's count of batches behind running statistics; Flax has none

# Hugging Face's keys (transformers' modeling_resnet.py) -> torchvision's; numbers in <> are incremented.
_HUGGING_FACE = {
    r"embedder\.embedder\.convolution": "conv1",
    r"embedder\.embedder\.normalization": "bn1",
    r"encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d+)\.convolution": r"layer<\1>.\2.conv<\3>",
    r"encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d+)\.normalization": r"layer<\1>.\2.bn<\3>",
    r"encoder\.stages\.(\d+)\.layers\.(\d+)\.shortcut\.convolution": r"layer<\1>.\2.downsample.0",
    r"encoder\.stages\.(\d+)\.layers\.(\d+)\.shortcut\.normalization": r"layer<\1>.\2.downsample.1",
}
_HUGGING_FACE_ANCHOR = "encoder.stages.{}.layers.0.layer.0.convolution.weight"

# The shortcut's name in github.com/kuangliu/pytorch-cifar and SupContrast, whose ResNets have `stem=small`.
_SHORTCUT = {r"(layer\d\.\d+)\.shortcut\.([01])": r"\1.downsample.\2"}


def _sequential(before: int) -> dict[str, str]:
    """Returns the names of torch.nn.Sequential(*resnet.children()), as lightly, fastai and many loops save a backbone.

    before: modules before the first stage, less one. With a small stem (SimCLR on CIFAR) there is no max-pool.
    """
    return {"0": "conv1", "1": "bn1"} | {rf"{before + stage}\.(.+)": rf"layer{stage}.\1" for stage in range(1, 5)}


_STAGES = range(1, 5)
RESNET = Family(
    name="ResNet",
    namings=(
        Naming("torchvision", tuple(f"layer{stage}.0.conv1.weight" for stage in _STAGES), _SHORTCUT),
        Naming(
            "Hugging Face's ResNetForImageClassification",
            tuple(f"resnet.{_HUGGING_FACE_ANCHOR.format(stage - 1)}" for stage in _STAGES),
            {rf"resnet\.{pattern}": name for pattern, name in _HUGGING_FACE.items()} | {r"classifier\.1": "fc"},
        ),
        Naming(
            "Hugging Face's ResNetModel",
            tuple(_HUGGING_FACE_ANCHOR.format(stage - 1) for stage in _STAGES),
            _HUGGING_FACE,
        ),
        Naming("torch.nn.Sequential", tuple(f"{3 + stage}.0.conv1.weight" for stage in _STAGES), _sequential(3)),
        Naming(  # module 3 has no weights in the one before
            "torch.nn.Sequential without max-pool",
            ("3.0.conv1.weight", "3.0.bn1.weight", "3.0.conv2.weight", "3.0.bn2.weight"),
            _sequential(2),
        ),
    ),
    # Layers between these change what the network computes: they are not left out as a projection head is.
    body=r"((conv|bn|norm|layer|stage|stem|root|downsample|se|sa|ca|cbam|attn|attnpool)[\d_]*|fc|encoder|embedder|[0-7])\.",
    head="fc",
    others={  # jaxft's ResNet cannot represent a network that has such a key
        r"^conv1\.0\.": "its stem is three 3x3 convolutions (timm's ResNet-C, -D and -S), not one 7x7",
        r"^attnpool\.": "it is CLIP's: three convolutions at the start, attention at the end",
        r"(^|\.)(se|se_module|attn|cbam|sa|ca)\d*\.": "its blocks hold attention (SE-, ECA- or CBAM-ResNet)",
        r"(^|\.)stem\.conv\.|\.norm1\.|(^|\.)root\.conv": (
            "it is a ResNet v2 (BiT): GroupNorm or BatchNorm before each convolution"
        ),
        r"branch2[abc]|moving_(mean|variance)": "it is a Caffe or Keras ResNet v1: the stride in the first 1x1",
        r"(^|\.)(backbone\.bottom_up\.)?res[2-5]\.0\.conv1\.": (
            "it has detectron2's names, whose ResNets are Caffe's v1: the stride in the first 1x1"
        ),
    },
)

# Patterns of the names that a checkpoint's `arch` or a config.json's `architecture` may have for networks whose keys
# and shapes are those of a plain ResNet -> what they compute otherwise (timm/models/resnet.py).
LOOK_ALIKES = {
    r"blur": "it blurs before each stride (BlurPool, which has no weights)",
    r"resne(t|xt)aa": "it averages before each stride (anti-aliasing, which has no weights)",
    r"caffe|msra|v1a$|resnet\d+_v1$": "the stride is in the first 1x1 convolution of a block (v1)",
}
# Names of networks whose backbone is a plain ResNet at another output stride; the weights are of use all the same.
DILATED = r"deeplab|fcn|pspnet|dilated|_os(8|16)"

# Hugging Face's config.json: key -> the value of a plain ResNet, and what another one means.
HUGGING_FACE_CONFIG = {
    "hidden_act": ("relu", "its activation is another than ReLU"),
    "downsample_in_first_stage": (False, "its first stage has a stride"),
    "downsample_in_bottleneck": (False, "the stride is in the first 1x1 convolution of a block (v1)"),
}
# Arguments of timm's models that change what a network computes, but not its keys: as above.
TIMM_ARGUMENTS = {
    "act_layer": ("relu", "its activation is another than ReLU"),
    "aa_layer": (None, "it has anti-aliasing before each stride"),
    "output_stride": (32, "its last stages are dilated"),
    "avg_down": (False, "its shortcuts average"),
    "replace_stem_pool": (False, "its stem has a convolution instead of the max-pool"),
}
