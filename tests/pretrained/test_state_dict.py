"""Networks in checkpoints of training scripts: found under any prefix, distinguished from others, described."""

import argparse
import json
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict

from jaxft import convert
from jaxft.errors import UserError
from jaxft.pretrained.convert import to_torch
from jaxft.pretrained.describe import describe
from jaxft.pretrained.load import load_pretrained, read_weights
from jaxft.pretrained.weights_file import Weights, write_weights
from tests.helpers.reference import torch
from tests.helpers.runs import ROOT

WIDTH_4 = ROOT / "tests" / "fixtures" / "weights" / "width4.safetensors"  # a ResNet-18 for 10 classes
State = dict[str, Any]


@pytest.fixture(scope="module")
def state() -> State:
    return {key: torch.from_numpy(array) for key, array in to_torch(read_weights(WIDTH_4)).items()}


def prefixed(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def doubled(state: State) -> State:
    return {key: value * 2 for key, value in state.items()}


def headless(state: State) -> State:
    return {key: value for key, value in state.items() if not key.startswith("fc.")}


def first(weights: Weights) -> float:
    return float(weights.variables["params"]["conv1"]["kernel"][0, 0, 0, 0])


PREFIXES = ("module.", "_orig_mod.module.", "model.", "backbone.", "resnet.", "student.backbone.", "a.b.c.d.e.")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_any_prefix_is_removed(save: Any, state: State, prefix: str) -> None:
    others = {"criterion.weight": torch.ones(3), "queue": torch.ones(2, 2), "n_averaged": torch.tensor(3), "step": 3}
    weights = read_weights(save({"state_dict": prefixed(prefix, state) | others, "epoch": 3}))
    for key, array in flatten_dict(read_weights(WIDTH_4).variables).items():
        np.testing.assert_array_equal(flatten_dict(weights.variables)[key], array)
    assert weights.provenance["network"] == f"state_dict.{prefix.replace('_orig_mod.', '').rstrip('.')}"
    assert weights.provenance["notes"] == ["left out: criterion.*, queue, n_averaged and 1 more"]


def test_what_is_beside_the_weights_does_not_matter(save: Any, state: State) -> None:
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.Adam([parameter])
    parameter.sum().backward()
    optimizer.step()
    beside = {
        "args": argparse.Namespace(lr=0.1, path=Path("runs")),
        "optimizer": optimizer.state_dict(),
        "metric": np.float64(0.5),
        "classes": {"cat", "dog"},
    }
    assert first(read_weights(save({"model": state} | beside))) == state["conv1.weight"][0, 0, 0, 0]


def test_plain_weights_are_taken_and_averages_on_request(save: Any, state: State) -> None:
    path = save({"state_dict_ema": doubled(state), "state_dict": state})
    weights, average = read_weights(path), read_weights(f"{path}#state_dict_ema")
    assert first(average) == 2 * first(weights) == 2 * state["conv1.weight"][0, 0, 0, 0]
    assert "took state_dict, not state_dict_ema" in weights.provenance["notes"][0]


@pytest.mark.parametrize(
    ("wrap", "names"),
    [
        (lambda a, b: {"student": prefixed("module.backbone.", a), "teacher": b}, ("student", "teacher")),
        (
            lambda a, b: {"state_dict": prefixed("module.encoder_q.", a) | prefixed("module.encoder_k.", b)},
            ("encoder_q", "encoder_k"),
        ),
        (lambda a, b: a | prefixed("teacher.", b), (".", "teacher")),
        (lambda a, b: [a, b], ("0", "1")),
    ],
)
def test_one_of_several_networks_must_be_named(save: Any, state: State, wrap: Any, names: tuple[str, str]) -> None:
    path = save(wrap(state, doubled(state)), "a#b.pth")  # a '#' in the file's own name is no separator
    with pytest.raises(UserError, match=f"2 networks: '{names[0]}', '{names[1]}'; choose one"):
        load_pretrained(str(path))
    assert first(load_pretrained(f"{path}#{names[1]}")) == 2 * first(load_pretrained(f"{path}#{names[0]}"))
    with pytest.raises(UserError, match="has no network 'nobody'"):
        load_pretrained(f"{path}#nobody")


def test_one_network_under_two_names_is_no_choice_and_has_both(save: Any, state: State) -> None:
    path = save({"model": state, "best": dict(state)})
    for source in (str(path), f"{path}#model", f"{path}#best"):
        assert first(load_pretrained(source)) == state["conv1.weight"][0, 0, 0, 0]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("layer1.", "layer1._orig_mod."),
        ("layer1.0.", "module.layer1._fsdp_wrapped_module.0._checkpoint_wrapped_module."),
        ("downsample", "shortcut"),  # as kuangliu's pytorch-cifar calls it
    ],
)
def test_other_names_of_inner_modules_are_read(save: Any, state: State, old: str, new: str) -> None:
    prefix, _, inner = new.partition("layer1.") if new.startswith("module.") else ("", "", "")
    new = f"layer1.{inner}" if prefix else new
    weights = read_weights(save({prefix + key.replace(old, new): value for key, value in state.items()}))
    for key, array in flatten_dict(read_weights(WIDTH_4).variables).items():
        np.testing.assert_array_equal(flatten_dict(weights.variables)[key], array)


def test_a_very_long_key_is_not_searched(save: Any, state: State) -> None:
    weights = read_weights(save(state | {"a." * 1_000_000: torch.ones(1)}))
    assert weights.provenance["notes"] == ["left out: an object of str longer than 1,000 ch..."]


def test_text_of_python_2_is_read(save: Any, state: State) -> None:
    path = save({b"state_dict": {key.encode(): value for key, value in state.items()}})
    assert first(read_weights(path)) == state["conv1.weight"][0, 0, 0, 0]


@pytest.mark.parametrize(
    ("beside", "part"),
    [
        ({"conv1.weight": None, "conv1.weight_orig": torch.ones(1), "conv1.weight_mask": torch.ones(1)}, "prune"),
        ({"layer1.0.conv1.parametrizations.weight.original0": torch.ones(1)}, "remove_parametrizations"),
        ({"layer1.0.conv1.lora_A.default.weight": torch.ones(1)}, "merge_and_unload"),
        ({"conv1.weight": torch.ones(4, 3, 7, 7).to_sparse()}, "is a sparse tensor, not a plain tensor"),
    ],
)
def test_weights_in_parts_are_refused_with_the_remedy(save: Any, state: State, beside: State, part: str) -> None:
    with pytest.raises(UserError, match=part):
        read_weights(save(state | beside))


def test_a_tensor_that_occurs_twice_is_refused(save: Any, state: State) -> None:
    with pytest.raises(UserError, match=r"conv1\.weight twice, as conv1\.weight and module\.conv1\.weight"):
        read_weights(save(state | {"module.conv1.weight": state["conv1.weight"] * 2}))
    with pytest.raises(UserError, match="each tensor twice, with no prefix and the prefix module"):
        read_weights(save(state | prefixed("module.", doubled(state))))


@pytest.mark.parametrize(
    ("head", "note"),
    [
        ({}, "it has no head"),
        ({"fc.1.weight": torch.ones(10, 32), "fc.1.bias": torch.ones(10)}, "its head (fc.* (2)) is not a dense layer"),
        ({"fc.weight": torch.ones(10, 32)}, "its head (fc.*) is not a dense layer on the features"),
        ({"fc.weight": torch.ones(10, 7), "fc.bias": torch.ones(10)}, "is not a dense layer on the features"),
        ({"fc.weight": torch.ones(10, 32, 1, 1), "fc.bias": torch.ones(10)}, "is not a dense layer on the features"),
        ({"fc.scale": torch.ones(1), "fc._packed_params.dtype": torch.qint8}, "is not a dense layer on the features"),
        ({"projection_head.0.weight": torch.ones(3)}, "it has no head"),
    ],
)
def test_a_network_without_a_usable_head_is_accepted(
    save: Any, state: State, tmp_path: Path, head: State, note: str
) -> None:
    path = save(headless(state) | head)
    weights = load_pretrained(str(path))
    assert weights.variables["params"]["fc"]["kernel"].shape == (32, 0)
    assert (weights.provenance["arch"], weights.provenance["num_classes"]) == ("resnet18", 0)
    assert note in weights.provenance["notes"][0]
    write_weights(tmp_path / "out.safetensors", weights)
    again = load_pretrained(str(tmp_path / "out.safetensors"))
    assert first(again) == first(weights)
    assert to_torch(again).keys() == headless(state).keys()


@pytest.mark.parametrize("before", [3, 2])  # modules before layer1, less one: with and without max-pool
def test_a_backbone_in_a_sequential_is_read(save: Any, state: State, before: int) -> None:
    """torch.nn.Sequential(*resnet.children()) has numbers in place of names."""
    numbers = {"conv1": "0", "bn1": "1", **{f"layer{stage}": str(before + stage) for stage in range(1, 5)}}
    numbered = {
        ".".join([numbers[key.split(".")[0]], *key.split(".")[1:]]): value for key, value in headless(state).items()
    }
    weights = read_weights(save({"model": prefixed("0.", numbered) | {"1.8.weight": torch.ones(2, 2)}}))
    np.testing.assert_array_equal(
        weights.variables["params"]["layer4"]["1"]["conv2"]["kernel"],
        read_weights(WIDTH_4).variables["params"]["layer4"]["1"]["conv2"]["kernel"],
    )


def test_layers_that_change_the_network_are_not_left_out(save: Any, state: State) -> None:
    for extra in ("conv2.weight", "layer1.0.se.fc1.weight", "attnpool.q_proj.weight", "layer5.0.conv1.weight"):
        with pytest.raises(UserError):
            read_weights(save(state | {extra: torch.ones(1)}))


def test_differences_are_shown_in_threes(save: Any, state: State) -> None:
    with pytest.raises(UserError, match=r"25 missing: layer4\.0\.bn1\.bias, \S+, \S+ and 22 more$"):
        read_weights(save({key: value for key, value in state.items() if not key.startswith("layer4")}))
    with pytest.raises(
        UserError,
        match=r"its 3 tensors are not named as those of jaxft's networks \(ResNet, VGG, ViT, ConvNeXt\): "
        r"model\.0, model\.1, model\.2$",
    ):
        read_weights(save({f"model.{i}": torch.ones(1) for i in range(3)}))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda tensor: tensor * float("nan"), "not finite in float32"),
        (lambda tensor: tensor / 0, "not finite in float32"),
        (lambda tensor: tensor.double() * 1e200, "not finite in float32"),
        (lambda tensor: tensor.int(), "int32, not floating point"),
        (lambda tensor: tensor > 0, "bool, not floating point"),
        (lambda tensor: -tensor, "negative variances"),
    ],
)
def test_numbers_that_no_network_has_are_refused(
    save: Any, state: State, tmp_path: Path, change: Any, part: str
) -> None:
    key = "layer1.0.bn1.running_var"
    with pytest.raises(UserError, match=f"{part}.* in {key}"):
        read_weights(save(state | {key: change(state[key])}))
    tensors = safetensors.numpy.load_file(WIDTH_4)
    tensors["batch_stats/layer1/0/bn1/var"] = change(state[key]).numpy()
    with safetensors.safe_open(WIDTH_4, "np") as file:
        safetensors.numpy.save_file(tensors, tmp_path / "jaxft.safetensors", file.metadata())
    with pytest.raises(UserError, match=f"{part}.* in batch_stats/layer1/0/bn1/var"):
        read_weights(tmp_path / "jaxft.safetensors")


def test_escape_sequences_do_not_reach_the_terminal(
    save: Any, state: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for content in (
        {"\x1b[31m": 1},
        {"\x1b[31m": state, "\x1b[32m": doubled(state)},
        state | {"\x1b]0;title\x07.weight": torch.ones(1), "\ud800": 1},
        state | {"layer1.0.\x1b[2J": torch.ones(1)},
        {"arch": "\x1b[31m", "state_dict": prefixed("\x1b[31m.", state)},
    ):
        path = save(content)
        convert.main([str(path), "--info"])
        try:
            convert.main([str(path), str(tmp_path / "out.safetensors")])
        except UserError as error:
            print(error)
        printed = capsys.readouterr().out
        assert printed.replace("\n", "").isprintable()


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"model_type": "resnet", "hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"model_type": "resnet", "downsample_in_first_stage": True}, "downsample_in_first_stage=True"),
        ({"architecture": "resnetblur18"}, "config.json calls it resnetblur18: it blurs"),
        ({"architecture": "resnetaa18.x_in1k"}, "it averages before each stride"),
        ({"architecture": "resnet18", "model_args": {"act_layer": "silu"}}, "act_layer=silu"),
        ({"model_type": "resnet", "downsample_in_bottleneck": True}, ""),  # a ResNet-18 has no bottleneck
        ({"architecture": "resnet18.a1_in1k", "num_classes": 10}, ""),
        ([1], ""),
    ],
)
def test_config_json_shows_look_alikes(tmp_path: Path, state: State, config: Any, part: str) -> None:
    tensors = {key: value.numpy() for key, value in state.items()}
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    if not part:
        assert "notes" not in read_weights(tmp_path).provenance
        return
    with pytest.raises(UserError) as error:
        read_weights(tmp_path)
    assert part in str(error.value)


@pytest.mark.parametrize(
    ("beside", "part"),
    [
        ({"arch": "resnetblur18"}, "refused"),
        ({"args": argparse.Namespace(model="resnetaa18d")}, "refused"),
        ({"hyper_parameters": {"backbone": "resnet50"}}, "hyper_parameters.backbone calls it resnet50, but"),
        ({"args": argparse.Namespace(model="deeplabv3_resnet18")}, "whose last stages are dilated"),
        ({"arch": "resnet18"}, ""),
        ({"arch": "tv_resnet18"}, ""),
        ({"arch": "my network"}, ""),
    ],
)
def test_the_name_in_a_checkpoint_is_compared(save: Any, state: State, beside: State, part: str) -> None:
    path = save({"state_dict": state} | beside)
    if part == "refused":
        with pytest.raises(UserError, match="has the keys and shapes of a resnet18, but"):
            read_weights(path)
    else:
        notes = read_weights(path).provenance.get("notes", [])
        assert [part in note for note in notes] == [True] * bool(part)


def test_info_describes_a_checkpoint(save: Any, state: State, capsys: pytest.CaptureFixture[str]) -> None:
    content = {
        "state_dict": prefixed("module.", headless(state)) | {"module.queue": torch.ones(2)},
        "model_ema": state,
        "epoch": 3,
        "arch": "resnet18",
    }
    path = save(content)
    convert.main([str(path), "--info", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["format"] == "PyTorch"
    assert (found["wrapper"], found["prefix"], found["names"]) == ("state_dict", "module.", "torchvision")
    assert (found["family"], found["arch"], found["width"]) == ("ResNet", "resnet18", 4)
    assert (found["head"], found["num_classes"], found["dtypes"]) == (None, 0, ["float32"])
    assert (found["parameters"], found["statistics"]) == (45_102 - 330, 600)
    assert found["entries"] == {
        "state_dict": "121 tensors",
        "model_ema": "122 tensors",
        "epoch": "an int",
        "arch": "a str",
    }
    assert (found["networks"], found["left_out"]) == (["state_dict", "model_ema"], ["module.queue"])
    assert (found["declared"], found["usable"], found["reason"]) == ({"arch": "resnet18"}, True, None)
    convert.main([str(path), "--info"])
    lines = capsys.readouterr().out.splitlines()
    assert "head      none" in lines
    assert "left out  module.queue" in lines
    assert lines[-1] == "usable    yes"


def test_info_says_why_a_file_is_refused(
    save: Any, state: State, tmp_path: Path, capsys: pytest.CaptureFixture[str], fails: Any
) -> None:
    path = save({"student": state, "teacher": doubled(state)})
    convert.main([str(path), "--info"])
    assert "usable    no: holds 2 networks" in capsys.readouterr().out
    (tmp_path / "page.pth").write_text("<html>")
    found = describe(str(tmp_path / "page.pth"))
    assert (found["format"], found["usable"]) == ("HTML", False)
    assert "it is HTML" in found["reason"]
    convert.main([str(tmp_path / "page.pth"), "--info"])
    assert "usable    no: it is HTML" in capsys.readouterr().out
    assert describe(str(WIDTH_4))["usable"]
    assert "no weights file" in fails("-m", "jaxft.convert", tmp_path / "none.pth", "--info")
    assert "--json needs --info" in fails("-m", "jaxft.convert", path, "--json")
    assert "no OUT" in fails("-m", "jaxft.convert", path, tmp_path / "out.safetensors", "--info")


def test_jaxfts_own_files_convert_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The shipped backbone has no source_sha256, and a width that torchvision has not."""
    paths = [str(tmp_path / name) for name in ("a.pth", "b.safetensors", "c.pth")]
    convert.main(["resnet18_tiny_in200", paths[0], "--to", "torchvision"])
    assert "torchvision has no resnet18 of width 16" in capsys.readouterr().out
    convert.main([paths[0], paths[1]])
    convert.main([paths[1], paths[2], "--to", "torchvision"])
    assert Path(paths[0]).read_bytes() == Path(paths[2]).read_bytes()
    before, after = load_pretrained("resnet18_tiny_in200").variables, load_pretrained(paths[1]).variables
    for key, array in flatten_dict(before).items():
        np.testing.assert_array_equal(flatten_dict(after)[key], array)
    (tmp_path / "plain").touch()
    assert {stat.S_IMODE(Path(path).stat().st_mode) for path in paths} == {
        stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    }


@pytest.mark.parametrize(
    "wrong",
    [
        *({"width": value} for value in (0, -16, 4.0, True, "4", 2**70, 8)),
        *({"num_classes": value} for value in ([10], -1, None, True)),
        {"stem": "junk"},
        {"arch": ["resnet18"]},
        {"mean": [0.5]},
        {"std": [0, 0, 0]},
        {"source": 3},
        {"num_batches_tracked": {"bn1.num_batches_tracked": 2**70}},
        {"notes": 5},
    ],
    ids=str,
)
def test_wrong_metadata_is_reported(tmp_path: Path, wrong: dict[str, Any]) -> None:
    variables, provenance = read_weights(WIDTH_4)
    write_weights(tmp_path / "wrong.safetensors", Weights(variables, provenance | wrong))
    with pytest.raises(UserError, match="is damaged"):
        read_weights(tmp_path / "wrong.safetensors")


def test_changed_numbers_and_metadata_do_not_have_the_checksum(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    write_weights(path, read_weights(WIDTH_4))
    whole = path.read_bytes()
    for at in (len(whole) - 100, whole.index(b'\\"train_size')):
        damaged = bytearray(whole)
        damaged[at + 5] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="do not match its checksum"):
            read_weights(path)
