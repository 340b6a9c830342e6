"""Conversion of PyTorch's state_dicts to Flax and jaxft's files: the same numbers, or an error message."""

import hashlib
import http.server
import threading
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.torch
from flax.traverse_util import flatten_dict

from jaxft import convert
from jaxft.errors import UserError
from jaxft.models.architectures import TORCHVISION
from jaxft.models.build import ARCHITECTURES
from jaxft.pretrained import catalog
from jaxft.pretrained.convert import to_torch
from jaxft.pretrained.families import FAMILIES, family_of
from jaxft.pretrained.load import load_pretrained, read_weights
from jaxft.pretrained.recognise import infer_arch
from jaxft.pretrained.state_dict import find_networks
from jaxft.pretrained.torch_files import read_tensors, write_tensors
from jaxft.pretrained.unpickle import Tensor
from jaxft.pretrained.weights_file import Weights, write_weights
from jaxft.targets.classification import replace_head
from tests.helpers.reference import torch, torchvision
from tests.helpers.runs import ROOT, Run

TINY_WEIGHTS = ROOT / "jaxft" / "samples" / "resnet18_tiny_in200.safetensors"


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """Returns the state_dict of a ResNet-18 with 7 classes and running statistics other than 0 and 1."""
    torch.manual_seed(0)
    state = torchvision.models.resnet18(num_classes=7).state_dict()
    for key, value in state.items():
        if "running_mean" in key:
            value.normal_(0, 0.1)
        if "running_var" in key:
            value.uniform_(0.5, 2)
    return state


@pytest.fixture
def source(tmp_path: Path, state: dict[str, torch.Tensor]) -> Path:
    torch.save(state, tmp_path / "source.pth")
    return tmp_path / "source.pth"


def same(a: Any, b: Any) -> bool:
    """Returns whether two trees have the same keys and bytes."""
    a, b = flatten_dict(a), flatten_dict(b)
    return a.keys() == b.keys() and all(np.asarray(a[k]).tobytes() == np.asarray(b[k]).tobytes() for k in a)


def test_every_tensor_keeps_its_values_in_the_new_layout(source: Path, state: dict[str, torch.Tensor]) -> None:
    variables, provenance = read_weights(source)
    block = variables["params"]["layer2"]["0"]
    np.testing.assert_array_equal(
        block["downsample"]["0"]["kernel"][0, 0], state["layer2.0.downsample.0.weight"][:, :, 0, 0].T
    )
    np.testing.assert_array_equal(
        block["conv1"]["kernel"][1, 2, 3, 4], state["layer2.0.conv1.weight"][4, 3, 1, 2].numpy()
    )
    np.testing.assert_array_equal(variables["params"]["fc"]["kernel"], state["fc.weight"].T)
    np.testing.assert_array_equal(variables["batch_stats"]["bn1"]["var"], state["bn1.running_var"])
    total = sum(value.double().sum().item() for key, value in state.items() if not key.endswith("tracked"))
    assert sum(leaf.astype(np.float64).sum() for leaf in jax.tree.leaves(variables)) == pytest.approx(total)
    assert (provenance["arch"], provenance["num_classes"], provenance["width"]) == ("resnet18", 7, 64)


def test_the_command_writes_the_weights_of_the_source(run: Run, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    result = run("weights/convert.py", source, out)
    assert result.returncode == 0, result.stderr
    assert "resnet18, 7 classes" in result.stdout
    converted, direct = read_weights(out), read_weights(source)
    assert same(converted.variables, direct.variables)
    assert converted.provenance == {**direct.provenance, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.safetensors", "source.pth"]


def test_noncontiguous_arrays_survive_a_round_trip(tmp_path: Path, source: Path) -> None:
    weights = read_weights(source)
    transposed = jax.tree.map(lambda a: np.ascontiguousarray(a.T).T, weights.variables)
    assert not transposed["params"]["conv1"]["kernel"].flags.c_contiguous
    write_weights(tmp_path / "t.safetensors", Weights(transposed, weights.provenance))
    assert same(read_weights(tmp_path / "t.safetensors").variables, weights.variables)


def test_replace_head_changes_only_the_head(source: Path) -> None:
    variables = read_weights(source).variables
    before = jax.tree.map(np.array, variables)
    replaced = replace_head(variables, 10, jax.random.key(0), ("fc",))
    assert same(variables, before)
    head = replaced["params"].pop("fc")
    before["params"].pop("fc")
    assert same(replaced, before)
    assert head["kernel"].shape == (512, 10)
    assert head["bias"].shape == (10,)


def test_the_new_head_is_initialised_like_torchs_linear() -> None:
    variables = {"params": {"fc": {"kernel": np.zeros((512, 7))}}, "batch_stats": {}}
    head = replace_head(variables, 1000, jax.random.key(3), ("fc",))["params"]["fc"]
    reference = torch.nn.Linear(512, 1000)
    for ours, theirs in ((head["kernel"], reference.weight), (head["bias"], reference.bias)):
        assert float(abs(ours).max()) == pytest.approx(theirs.abs().max().item(), rel=0.02)
        assert float(ours.std()) == pytest.approx(theirs.std().item(), rel=0.1)


def test_one_message_lists_all_wrong_keys(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    broken = dict(state)
    del broken["layer1.0.conv1.weight"], broken["layer4.1.bn2.running_var"]
    broken["layer9.weight"] = torch.ones(1)
    broken["layer2.0.conv2.weight"] = torch.ones(128, 128, 1, 1)
    torch.save(broken, tmp_path / "broken.pth")
    with pytest.raises(UserError) as error:
        read_weights(tmp_path / "broken.pth", "resnet18")
    assert "2 missing: layer1.0.conv1.weight, layer4.1.bn2.running_var" in str(error.value)
    assert "1 extra: layer9.weight" in str(error.value)
    assert "layer2.0.conv2.weight (128, 128, 1, 1) instead of (128, 128, 3, 3)" in str(error.value)


def test_a_wrong_architecture_is_named(source: Path, tmp_path: Path) -> None:
    write_weights(tmp_path / "converted.safetensors", read_weights(source))
    for path in (source, tmp_path / "converted.safetensors"):
        with pytest.raises(UserError, match="holds a resnet18, not a resnet50"):
            read_weights(path, "resnet50")


def test_the_command_reports_errors_in_one_line(fails: Any, tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out.safetensors"
    assert "no weights file" in fails("-m", "jaxft.convert", tmp_path / "none.pth", out)
    assert "not a resnet50" in fails("-m", "jaxft.convert", source, out, "--arch", "resnet50")
    assert "must end in .safetensors" in fails("-m", "jaxft.convert", source, tmp_path / "out.npz")
    assert "there is no folder" in fails("-m", "jaxft.convert", source, tmp_path / "none" / "out.safetensors")
    assert "it is a text file" in fails("-m", "jaxft.convert", ROOT / "README.md", out)
    assert "is SOURCE" in fails("-m", "jaxft.convert", TINY_WEIGHTS, TINY_WEIGHTS)
    source.write_bytes(source.read_bytes()[:-1000])
    assert "is it complete?" in fails("-m", "jaxft.convert", source, out)
    assert [path.name for path in tmp_path.iterdir()] == ["source.pth"]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_round_trip_is_bit_identical(
    tmp_path: Path, state: dict[str, torch.Tensor], suffix: str, dtype: torch.dtype
) -> None:
    """Compares dtypes, shapes, values and num_batches_tracked; torchvision loads the result with strict=True."""
    converted = {key: value.to(dtype) if value.is_floating_point() else value + 5 for key, value in state.items()}
    torch.save(converted, tmp_path / "source.pth")
    write_weights(tmp_path / "jaxft.safetensors", read_weights(tmp_path / "source.pth"))
    write_tensors(tmp_path / f"out{suffix}", to_torch(read_weights(tmp_path / "jaxft.safetensors")))
    before, after = read_tensors(tmp_path / "source.pth"), read_tensors(tmp_path / f"out{suffix}")
    assert before.keys() == after.keys()
    for key, array in before.items():
        assert (after[key].dtype, after[key].shape) == (array.dtype, array.shape), key
        assert after[key].tobytes() == array.tobytes(), key
    if suffix == ".pth":
        torchvision.models.resnet18(num_classes=7).load_state_dict(torch.load(tmp_path / "out.pth"), strict=True)


@pytest.mark.parametrize("arch", sorted(TORCHVISION))
def test_every_architecture_is_recognised(arch: str) -> None:
    with torch.device("meta"):  # only shapes
        state = getattr(torchvision.models, arch)(num_classes=3).state_dict()
    content = {key: Tensor(np.dtype(np.float32), tuple(value.shape), key) for key, value in state.items()}
    (network,) = find_networks(content, FAMILIES)
    assert network.family == family_of(arch)
    assert network.naming.library == "torchvision"
    assert infer_arch(network.tensors, network.family) == arch


@pytest.mark.parametrize("depths", [[2, 2, 2, 2], [3, 4, 6, 3]])
def test_hugging_face_files_give_the_logits_of_transformers(tmp_path: Path, depths: list[int]) -> None:
    """Compares the converted network with transformers' own, with random running statistics."""
    import transformers

    bottleneck = depths[1] == 4
    config = transformers.ResNetConfig(
        depths=depths,
        layer_type="bottleneck" if bottleneck else "basic",
        hidden_sizes=[256, 512, 1024, 2048] if bottleneck else [64, 128, 256, 512],
    )
    config.num_labels = 7
    torch.manual_seed(0)
    reference = transformers.ResNetForImageClassification(config).eval()
    for key, value in reference.state_dict().items():
        if "running" in key:
            value.uniform_(0.5, 2)
    reference.save_pretrained(tmp_path)
    weights = read_weights(tmp_path / "model.safetensors")
    assert weights.provenance["arch"] == ("resnet50" if bottleneck else "resnet18")
    image = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
    model = ARCHITECTURES[weights.provenance["arch"]](num_classes=7)
    logits: Any = jax.jit(partial(model.apply, train=False))(weights.variables, image)
    with torch.no_grad():
        expected = reference(torch.from_numpy(image.transpose(0, 3, 1, 2).copy())).logits.numpy()
    assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "wide_resnet50_2", "resnext50_32x4d"])
def test_timms_plain_resnets_are_recognised(tmp_path: Path, name: str) -> None:
    import timm

    reference = timm.create_model(name, num_classes=4)
    safetensors.torch.save_file(reference.state_dict(), tmp_path / "timm.safetensors")
    assert read_weights(tmp_path / "timm.safetensors").provenance["arch"] == name


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("resnetrs50", "its stem ends with a convolution instead of the max-pool"),
        ("ecaresnet50d", "its blocks hold attention other than timm's squeeze and excitation"),
        ("legacy_seresnet18", "its blocks hold attention other than"),
        ("resnetv2_50", "it is a ResNet v2"),
        ("resnet50_gn", "GroupNorm, not BatchNorm"),
    ],
)
def test_other_families_are_refused_with_the_reason(tmp_path: Path, name: str, part: str) -> None:
    import timm

    safetensors.torch.save_file(timm.create_model(name).state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(UserError) as error:
        read_weights(tmp_path / "other.safetensors")
    assert part in str(error.value)
    assert "missing" not in str(error.value)


def test_verify_compares_with_torchvision_and_stores_the_result(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs in this process, in which tests.helpers.reference has made torchvision importable."""
    convert.main([str(source), str(tmp_path / "out.safetensors"), "--verify"])
    assert "layer4" in capsys.readouterr().out
    verified = read_weights(tmp_path / "out.safetensors").provenance["verified"]
    assert max(verified["float32"].values()) < 1e-5
    assert max(verified["float64"].values()) < 1e-12
    assert "torchvision" in verified["against"]


def test_verify_detects_a_wrong_conversion(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flips one kernel left to right, as a wrong order of axes would."""
    weights = read_weights(source)
    kernel = weights.variables["params"]["layer3"]["0"]["conv2"]["kernel"]
    weights.variables["params"]["layer3"]["0"]["conv2"]["kernel"] = np.array(kernel[:, ::-1])
    with pytest.raises(UserError, match="differs from torchvision's network"):
        convert.verify(str(source), weights)


def test_the_command_converts_back_to_torchvision(run: Run, source: Path, tmp_path: Path) -> None:
    assert run("weights/convert.py", source, tmp_path / "jaxft.safetensors").returncode == 0
    result = run("weights/convert.py", tmp_path / "jaxft.safetensors", tmp_path / "back.pth", "--to", "torchvision")
    assert result.returncode == 0, result.stderr
    before, after = torch.load(source), torch.load(tmp_path / "back.pth")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_named_weights_are_fetched_and_converted_once(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uses a local server that is shut down before the second load."""
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(source.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        row = catalog.WEIGHTS[0]._replace(
            name="resnet18.test",
            arch="resnet18",
            url=f"http://127.0.0.1:{server.server_port}/{source.name}",
            sha256_prefix=hashlib.sha256(source.read_bytes()).hexdigest()[:8],
            mean=(0.1, 0.2, 0.3),
        )
        monkeypatch.setattr(catalog, "WEIGHTS", (*catalog.WEIGHTS, row))
        monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "cache"))
        first = load_pretrained("resnet18.test", "resnet18")
        server.shutdown()
    converted = tmp_path / "cache" / "weights" / "resnet18.test.safetensors"
    converted.write_bytes(converted.read_bytes()[:-8] + b"damaged.")
    assert same(load_pretrained("resnet18.test").variables, first.variables)  # from the downloaded file
    (tmp_path / "cache" / "weights" / source.name).unlink()
    again = load_pretrained("resnet18.test")
    assert same(first.variables, read_weights(source).variables)
    assert same(again.variables, first.variables)
    assert (again.provenance["mean"], again.provenance["num_classes"]) == ([0.1, 0.2, 0.3], 7)
    with pytest.raises(UserError, match="holds a resnet18, not a resnet50"):
        load_pretrained("resnet18.test", "resnet50")


def test_an_unknown_name_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(UserError, match=r"similar names: resnet50\.tv_in1k_v2, resnet50\.tv_in1k_v1"):
        load_pretrained("resnet50.tv_in1k_v9")


@pytest.mark.parametrize("key", ["fc.bias", "bn1.weight", "bn1.num_batches_tracked"])
@pytest.mark.parametrize("shape", [(), (0,), (3, 3)])
def test_any_wrong_shape_is_a_user_error(
    tmp_path: Path, state: dict[str, torch.Tensor], key: str, shape: tuple[int, ...]
) -> None:
    torch.save(state | {key: torch.ones(shape)}, tmp_path / "wrong.pth")
    if key.endswith("tracked"):
        read_weights(tmp_path / "wrong.pth", "resnet18")
    else:
        with pytest.raises(UserError, match=key):
            read_weights(tmp_path / "wrong.pth", "resnet18")


def test_wrong_metadata_is_a_user_error(tmp_path: Path, source: Path) -> None:
    variables, provenance = read_weights(source)
    for wrong in ({**provenance, "arch": "resnet19"}, {"arch": "resnet18"}):
        write_weights(tmp_path / "wrong.safetensors", Weights(variables, wrong))
        with pytest.raises(UserError, match="its metadata is wrong"):
            read_weights(tmp_path / "wrong.safetensors")
