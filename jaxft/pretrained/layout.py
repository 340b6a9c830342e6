"""Names and axis orders of the tensors in torch's layers and in Flax's."""

# Flax's collection, last name and number of axes -> torch's last name, and Flax's axes in torch's order.
# The names before the last are the same: joined by '.' in torch, nested dicts in Flax.
# Sources: torch.nn.Conv2d, Linear and BatchNorm2d; flax.linen.Conv and Dense.
_LAYERS = {
    ("params", "kernel", 4): ("weight", (3, 2, 0, 1)),  # convolution: HWIO -> OIHW
    ("params", "kernel", 2): ("weight", (1, 0)),  # dense: IO -> OI
    ("params", "scale", 1): ("weight", (0,)),
    ("params", "bias", 1): ("bias", (0,)),
    ("batch_stats", "mean", 1): ("running_mean", (0,)),
    ("batch_stats", "var", 1): ("running_var", (0,)),
}
NUM_BATCHES_TRACKED = ".num_batches_tracked"  # torch's count of batches behind running statistics; Flax has none


def torch_layers(path: tuple[str, ...], ndim: int) -> tuple[str, tuple[int, ...]]:
    """Returns the key of a variable in torch, and its axes in torch's order.

    path: from the collection on, such as ("params", "layer1", "0", "conv1", "kernel"). A parameter that is not in
    _LAYERS, such as `cls_token`, has the same name and axes in both.
    """
    collection, *parents, leaf = path
    name, axes = _LAYERS.get((collection, leaf, ndim), (leaf, tuple(range(ndim))))
    return ".".join([*parents, name]), axes
