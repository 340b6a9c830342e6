"""VGGs in files: recognised, converted both ways, told from other networks, trained and exported."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxft import convert
from jaxft.errors import UserError
from jaxft.models import vgg
from jaxft.pretrained.convert import to_torch, torch_shapes
from jaxft.pretrained.describe import describe
from jaxft.pretrained.load import read_weights
from jaxft.pretrained.torch_files import read_tensors
from jaxft.pretrained.weights_file import Weights, write_weights
from jaxft.targets.classification import replace_head
from tests.helpers.reference import torch, torchvision

State = dict[str, Any]


@pytest.fixture(scope="module", params=["vgg11", "vgg13_bn"])
def state(request: pytest.FixtureRequest) -> State:
    """Returns the state_dict of a VGG of width 2 for 7 classes, with random numbers."""
    rng = np.random.default_rng(0)
    state: State = {}
    for key, shape in torch_shapes(vgg.ARCHITECTURES[request.param](num_classes=7, width=2)).items():
        state[key] = torch.from_numpy(rng.uniform(0.5, 2, shape).astype(np.float32))
        if key.endswith("running_var"):
            state[key.replace("running_var", "num_batches_tracked")] = torch.tensor(3)
    return state


def arch_of(state: State) -> str:
    return "vgg13_bn" if "features.1.running_mean" in state else "vgg11"


def test_a_round_trip_is_bit_identical(save: Any, state: State, tmp_path: Path) -> None:
    paths = [str(save({"state_dict": {f"module.{key}": value for key, value in state.items()}}))]
    paths += [str(tmp_path / name) for name in ("a.safetensors", "b.pth")]
    convert.main([*paths[:2], "--arch", arch_of(state)])
    convert.main([*paths[1:], "--to", "torchvision"])
    after = read_tensors(Path(paths[2]))
    assert after.keys() == state.keys()
    for key, tensor in state.items():
        assert after[key].tobytes() == tensor.numpy().tobytes(), key
    provenance = read_weights(paths[1]).provenance
    assert (provenance["arch"], provenance["width"], provenance["num_classes"]) == (arch_of(state), 2, 7)
    assert "stem" not in provenance
    assert read_weights(paths[1]).variables.keys() == {"params", "batch_stats"}


def test_features_in_data_parallel_are_found(save: Any, state: State) -> None:
    """Reads a VGG with the names that PyTorch's examples/imagenet gives it."""
    renamed = {re.sub(r"^features", "features.module", key): value for key, value in state.items()}
    expected, found = (read_weights(save(tensors, f"{i}.pth")) for i, tensors in enumerate((state, renamed)))
    jax.tree.map(np.testing.assert_array_equal, found.variables, expected.variables)


def test_it_is_described(save: Any, state: State, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = save(state)
    write_weights(tmp_path / "own.safetensors", read_weights(path))
    for source in (path, tmp_path / "own.safetensors"):
        found = describe(str(source))
        assert (found["family"], found["arch"], found["width"]) == ("VGG", arch_of(state), 2)
        assert (found["usable"], found["head"], found["num_classes"]) == (True, "classifier.6", 7)
        convert.main([str(source), "--info"])
        lines = capsys.readouterr().out.splitlines()
        assert f"arch      {arch_of(state)} (VGG), width 2" in lines
        assert "head      classifier.6, 7 classes" in lines
    json.dumps(found)


def test_a_missing_or_other_head_is_replaced(save: Any, state: State) -> None:
    body = {key: value for key, value in state.items() if not key.startswith("classifier.6.")}
    for head in ({}, {"classifier.6.0.weight": torch.ones(3, 128), "classifier.6.0.bias": torch.ones(3)}):
        variables, provenance = read_weights(save(body | head))
        assert provenance["num_classes"] == 0
        assert "head" in provenance["notes"][0]
        replaced = replace_head(variables, 5, jax.random.key(0), vgg.VGG.head)["params"]["classifier"]
        assert replaced["6"]["kernel"].shape == (128, 5)
        np.testing.assert_array_equal(replaced["3"]["bias"], state["classifier.3.bias"])
        assert to_torch(Weights(variables, provenance)).keys() == body.keys()


def test_other_architectures_and_incomplete_files_are_refused(save: Any, state: State) -> None:
    arch = arch_of(state)
    for other in ("vgg19", "resnet50"):
        with pytest.raises(UserError, match=rf"holds a (VGG|{arch}), not a {other}"):
            read_weights(save(state), other)
    del (broken := dict(state))["classifier.0.bias"]
    with pytest.raises(UserError, match=rf"does not hold a {arch}: 1 missing: classifier\.0\.bias$"):
        read_weights(save(broken))
    pruned = broken | {"features.0.weight_orig": torch.ones(1)}
    with pytest.raises(UserError, match=r"weight in parts \(features\.0\.weight_orig\)"):
        read_weights(save(pruned))


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("alexnet", "its first convolution is 11x11, as in AlexNet, not 3x3"),
        ("densenet121", "it is a DenseNet"),
        ("mobilenet_v3_small", "it is an EfficientNet or MobileNet"),
        ("efficientnet_b0", "it is an EfficientNet or MobileNet"),
        ("squeezenet1_1", "its features are blocks of layers"),
    ],
)
def test_other_families_are_told_from_it(save: Any, name: str, part: str) -> None:
    with torch.device("meta"):
        other = getattr(torchvision.models, name)().state_dict()
    with pytest.raises(UserError, match=part):
        read_weights(save({key: torch.zeros(()).expand(value.shape) for key, value in other.items()}))


def test_timms_vgg_is_refused_with_the_reason(save: Any, state: State) -> None:
    renamed = {"pre_logits.fc1.weight": torch.ones(128, 16, 7, 7), "pre_logits.fc1.bias": torch.ones(128)}
    with pytest.raises(UserError, match="it has timm's names"):
        read_weights(save({key: value for key, value in state.items() if key.startswith("features")} | renamed))
