"""ConvNeXts in files: recognised by the names of four libraries, converted both ways, told from other networks."""

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from jaxft import convert
from jaxft.errors import UserError
from jaxft.models.architectures import CONVNEXTS
from jaxft.pretrained.convert import naming_of, to_torch
from jaxft.pretrained.convnext import FAMILY
from jaxft.pretrained.load import read_weights
from jaxft.pretrained.torch_files import read_tensors
from jaxft.pretrained.weights_file import Weights
from tests.helpers.reference import torch, torchvision

timm = import_module("timm")
State = dict[str, Any]

FIRST, SECOND = "test_convnext", "convnextv2_atto"  # the smallest network of each version


def state_of(library: str, arch: str) -> State:
    """Returns the state_dict of a library's network for 7 classes, with random numbers."""
    architecture = CONVNEXTS[arch]
    shape = {"depths": list(architecture.depths), "hidden_sizes": list(architecture.widths)}
    with torch.device("meta"):  # keys and shapes only
        if library == "timm":
            model: Any = timm.create_model(arch, num_classes=7)
        elif library == "torchvision":
            widths = architecture.widths
            blocks = zip(widths, (*widths[1:], None), architecture.depths, strict=True)
            config = torchvision.models.convnext.CNBlockConfig
            model = torchvision.models.ConvNeXt([config(*block) for block in blocks], num_classes=7)
        else:
            transformers = import_module("transformers")
            version = "ConvNextV2" if architecture.response_norm else "ConvNext"
            config = getattr(transformers, f"{version}Config")(**shape, num_labels=7)
            model = getattr(transformers, f"{version}{library}")(config)
    rng = np.random.default_rng(0)
    return {
        key: torch.from_numpy(rng.normal(size=tuple(value.shape)).astype(np.float32))
        for key, value in model.state_dict().items()
    }


def meta_state(arch: str) -> State:
    """Returns timm's network by the names of Meta's repositories."""
    naming = next(naming for naming in FAMILY.namings if naming.library == "Meta")
    state = {}
    for name, tensor in state_of("timm", arch).items():
        (key,) = naming.keys(name)
        shape = tuple(tensor.shape[:2]) if ".mlp.fc" in name else tuple(tensor.shape)
        state[key] = tensor.reshape(naming.source_shape(name, shape))
    return state


SOURCES = [
    ("timm", FIRST, 0),
    ("timm", SECOND, 0),  # whose dense layers are 1x1 convolutions
    ("torchvision", FIRST, 0),
    ("ForImageClassification", FIRST, 1e-12),
    ("ForImageClassification", SECOND, 1e-12),
    ("Model", SECOND, 1e-12),
    ("Meta", FIRST, 0),
    ("Meta", SECOND, 0),
]


@pytest.mark.parametrize(("library", "arch", "norm_eps"), SOURCES)
def test_a_round_trip_is_bit_identical(save: Any, tmp_path: Path, library: str, arch: str, norm_eps: float) -> None:
    state = meta_state(arch) if library == "Meta" else state_of(library, arch)
    source = str(save({"state_dict": {f"module.{key}": value for key, value in state.items()}}))
    converted, back = (str(tmp_path / name) for name in ("a.safetensors", "b.pth"))
    convert.main([source, converted, "--arch", arch])
    convert.main([converted, back, "--to", "torch"])
    after = read_tensors(Path(back))
    assert after.keys() == state.keys()
    for key, tensor in state.items():
        assert after[key].shape == tensor.shape, key
        assert after[key].tobytes() == tensor.numpy().tobytes(), key
    provenance = read_weights(converted).provenance
    classes = 0 if library == "Model" else 7
    assert (provenance["arch"], provenance["norm_eps"], provenance["num_classes"]) == (arch, norm_eps, classes)


@pytest.mark.parametrize("arch", [FIRST, SECOND])
def test_metas_names_are_those_that_timm_reads(arch: str) -> None:
    model = timm.create_model(arch, num_classes=7)
    read = timm.models.convnext.checkpoint_filter_fn(meta_state(arch), model)
    model.load_state_dict(read, strict=True)
    for key, tensor in state_of("timm", arch).items():
        assert torch.equal(read[key], tensor), key


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("convnext_atto_ols", "its stem is two overlapping convolutions"),
        ("convnext_tiny_hnf", "it normalises before it pools"),
        ("convnext_large_mlp", "its head has a hidden layer"),
        ("convnext_atto_rms", "its norms have no bias: RMSNorm, not LayerNorm"),
        ("test_convnext3", "it has depthwise kernels of 3x3, not 7x7"),
        ("edgenext_xx_small", "its blocks hold other layers, as in EdgeNeXt"),
        ("inception_next_atto", "its blocks mix pixels without"),
    ],
)
def test_relatives_are_told_from_it(save: Any, name: str, part: str) -> None:
    with torch.device("meta"):
        other = timm.create_model(name, depths=(1, 1, 1, 1)).state_dict()
    with pytest.raises(UserError, match=part):
        read_weights(save({key: torch.zeros(()).expand(value.shape) for key, value in other.items()}))


def test_incomplete_and_other_files_are_refused(save: Any) -> None:
    state = state_of("timm", FIRST)
    with pytest.raises(UserError, match=rf"holds a (ConvNeXt|{FIRST}), not a convnext_tiny"):
        read_weights(save(state), "convnext_tiny")
    del state["stages.1.blocks.0.norm.bias"]
    with pytest.raises(UserError, match=rf"does not hold a {FIRST}: 1 missing: stages\.1\.blocks\.0\.norm\.bias$"):
        read_weights(save(state))


def test_networks_without_a_source_get_timms_names_and_shapes() -> None:
    """Dense layers are 1x1 convolutions in the smallest networks only."""
    for arch, shape in ((FIRST, (96, 24)), (SECOND, (160, 40, 1, 1))):
        path = ("params", "stages", "0", "blocks", "0", "mlp", "fc1", "kernel")
        weights = Weights(unflatten_dict({path: np.ones(shape[1::-1])}), {"arch": arch})
        (tensor,) = to_torch(weights, naming_of(weights)).values()
        assert tensor.shape == shape
