"""Names and layouts of ResNet weights in files of torchvision, timm and Hugging Face."""

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
HUGGING_FACE = {
    r"resnet\.embedder\.embedder\.convolution": "conv1",
    r"resnet\.embedder\.embedder\.normalization": "bn1",
    r"resnet\.encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d+)\.convolution": r"layer<\1>.\2.conv<\3>",
    r"resnet\.encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d+)\.normalization": r"layer<\1>.\2.bn<\3>",
    r"resnet\.encoder\.stages\.(\d+)\.layers\.(\d+)\.shortcut\.convolution": r"layer<\1>.\2.downsample.0",
    r"resnet\.encoder\.stages\.(\d+)\.layers\.(\d+)\.shortcut\.normalization": r"layer<\1>.\2.downsample.1",
    r"classifier\.1": "fc",
}

# Pattern of a key -> the reason why jaxft's ResNet cannot represent a network that has such a key.
OTHER_FAMILIES = {
    r"^conv1\.0\.": "its stem is three 3x3 convolutions (timm's ResNet-C, -D and -S), not one 7x7",
    r"\.(se|se_module|attn)\.": "its blocks hold attention (SE-, ECA- or CBAM-ResNet)",
    r"^stem\.conv\.|\.norm1\.|^root\.conv": "it is a ResNet v2 (BiT): GroupNorm or BatchNorm before each convolution",
    r"branch2[abc]|moving_(mean|variance)": "it is a Caffe or Keras ResNet v1: the stride in the first 1x1",
}
