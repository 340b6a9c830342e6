"""Config files and overrides: the values accepted, and one-line errors for all others."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxft.config import (
    CHOICES,
    default_config,
    explanations,
    flatten,
    load_config,
    parse_overrides,
    shipped_configs,
)
from jaxft.errors import UserError
from jaxft.models.build import ARCHITECTURES
from tests.helpers.runs import ROOT

CIFAR10 = str(ROOT / "configs" / "cifar10.py")


def message(path: str | Path, overrides: dict[str, str]) -> str:
    with pytest.raises(UserError) as error:
        load_config(str(path), overrides)
    return str(error.value)


def test_cifar10_is_exactly_the_original_recipe() -> None:
    config = flatten(load_config(CIFAR10, {}))
    assert config["data.name"] == "cifar10"
    assert (config["image_size"], config["batch_size"], config["num_epochs"]) == (224, 64, 10)
    assert (config["optimizer.learning_rate"], config["optimizer.momentum"]) == (0.001, 0.9)
    assert (config["optimizer.schedule"], config["optimizer.weight_decay"]) == ("constant", 0)
    assert (config["optimizer.nesterov"], config["optimizer.warmup_epochs"]) == (False, 0)
    assert (config["model.arch"], config["model.dtype"]) == ("resnet50", "float32")
    assert (config["data.train_split"], config["data.eval_split"]) == ("train", "test")


def test_vit_and_convnext_take_what_they_can_from_the_weights() -> None:
    """They differ in the weights and in two published values."""
    vit, convnext = (flatten(load_config(name, {})) for name in ("vit", "convnext"))
    for config in (vit, convnext):
        assert (config["model.arch"], config["image_size"], config["data.resize"]) == ("auto", 0, -1)
        assert config["model.pretrained"].startswith("hf:timm/")
        assert (config["optimizer.name"], config["optimizer.decay_all"]) == ("adamw", False)
        assert config["model.dtype"] == "float32"
    different = {key for key, value in vit.items() if value != convnext[key]}
    assert different == {"model.pretrained", "optimizer.layer_decay", "optimizer.weight_decay"}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.name)
def test_every_config_that_ships_is_valid(path: Path) -> None:
    assert flatten(load_config(str(path), {})).keys() == flatten(default_config()).keys()


def test_overrides_take_the_type_of_the_key() -> None:
    overrides = {"optimizer.learning_rate": "1", "optimizer.nesterov": "true", "data.name": "7", "seed": "3"}
    config = load_config(CIFAR10, overrides)
    assert (config.optimizer.learning_rate, type(config.optimizer.learning_rate)) == (1.0, float)
    assert (config.optimizer.nesterov, config.data.name, config.seed) == (True, "7", 3)


@given(st.floats(min_value=0, allow_infinity=False), st.integers(1, 2**31 - 1))
def test_any_number_survives_an_override(rate: float, batch_size: int) -> None:
    config = load_config(CIFAR10, {"optimizer.learning_rate": repr(rate), "batch_size": str(batch_size)})
    assert (config.optimizer.learning_rate, config.batch_size) == (rate, batch_size)


@given(st.text(), st.sampled_from(sorted(flatten(default_config()))))
def test_any_text_gives_a_config_or_a_user_error(text: str, key: str) -> None:
    try:
        config = load_config(CIFAR10, {key: text})
    except UserError as error:
        assert key in str(error)
    else:
        assert type(flatten(config)[key]) is type(flatten(default_config())[key])


def test_unknown_keys_are_refused_with_the_nearest_key() -> None:
    assert "did you mean 'optimizer.learning_rate'?" in message(CIFAR10, {"optimizer.learning_rat": "1"})
    assert "no config key 'colour'" in message(CIFAR10, {"colour": "red"})
    assert "'model' is a group of config keys; set one of them, such as 'model.arch'" in message(
        CIFAR10, {"model": "1"}
    )


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("num_epochs", "ten", "takes a whole number, not 'ten'"),
        ("num_epochs", "1.5", "takes a whole number, not 1.5"),
        ("optimizer.learning_rate", "", "takes a number, not ''"),
        ("optimizer.nesterov", "1", "takes True or False, not 1"),
        ("batch_size", "-1", "must be at least 0"),
        ("optimizer.learning_rate", "-2", "must be at least 0, or -1 to derive it from the data, not -2"),
        ("num_epochs", "-1", "must be at least 1, or 0 to derive it from the data, not -1"),
        ("optimizer.learning_rate", "1e999", "must be at most"),
        ("seed", str(2**64), "must be at most 2147483647"),
        ("optimizer.momentum", "1.5", "must be at most 1, not 1.5"),
        ("model.arch", "resnet55", "did you mean 'resnet50'?"),
        ("model.batch_norm", "x", "one of update, frozen, sync"),
    ],
)
def test_wrong_values_are_refused_with_their_key(key: str, value: str, part: str) -> None:
    text = message(CIFAR10, {key: value})
    assert part in text
    assert key in text


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("def get_config():\n    return {'optimizer': {'learning_rat': 1.0}}", "'optimizer.learning_rate'?"),
        ("def get_config():\n    return {'seed': 'x'}", "takes a whole number, not 'x'"),
        ("def get_config():\n    return undefined_name", "undefined_name"),
        ("def get_config(:", "line 1"),
        ("x = 1", "get_config"),
        ("import no_such_module", "no_such_module"),
        ("def get_config():\n    return 3", "gives no config"),
        ("raise SystemExit(3)", "gives no config: SystemExit: 3"),
    ],
)
def test_broken_config_files_are_explained(tmp_path: Path, content: str, part: str) -> None:
    (tmp_path / "broken.py").write_text(content)
    text = message(tmp_path / "broken.py", {})
    assert part in text
    assert "broken.py" in text


def test_a_missing_file_is_refused_with_the_nearest_file() -> None:
    assert "did you mean" in message(ROOT / "configs" / "cifar.py", {})
    assert "no config file" in message("nowhere/at_all.py", {})


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_a_shipped_config_is_found_by_its_name(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a folder has the same name, as runs/NAME may."""
    (tmp_path / path.stem).mkdir()
    monkeypatch.chdir(tmp_path)
    assert shipped_configs()[path.stem] == path
    assert load_config(path.stem, {}) == load_config(str(path), {})


def test_an_unknown_name_is_refused_with_the_nearest_and_all_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = "auto, cifar10, cifar100, cifar10_fast, convnext, image_folder"
    names = f"{first}, linear_probe, pretrain_tiny, quickstart, vit"
    assert ", ".join(shipped_configs()) == names
    text = message("quikstart", {})
    assert text == f"there is no config named quikstart; did you mean quickstart? jaxft ships {names}"
    assert message("zzz", {}) == f"there is no config named zzz; jaxft ships {names}"
    monkeypatch.chdir(tmp_path)
    assert message("configs/quickstart.py", {}).endswith("did you mean quickstart?")
    (tmp_path / "my_photos.py").touch()
    assert "did you mean my_photos.py?" in message("my_photos", {})


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.py")
    assert message(tmp_path / "config.py", {}).endswith("config.py cannot be read: it is a FIFO, not a file")
    assert message(tmp_path, {}) == f"--config {tmp_path} cannot be read: it is a folder, not a file"


def test_the_architectures_are_those_that_can_be_built() -> None:
    assert {*CHOICES["model.arch"]} == {"auto", *ARCHITECTURES}


def test_overrides_are_parsed_and_other_arguments_refused() -> None:
    assert parse_overrides(["--config.seed=1", "--config.data.name", "a=b"]) == {"seed": "1", "data.name": "a=b"}
    for stray in (["configs/cifar10.py"], ["--confg.seed=1"], ["--seed", "1"]):
        with pytest.raises(UserError, match="unknown argument"):
            parse_overrides(stray)


def test_every_config_key_has_an_explanation() -> None:
    found = explanations()
    assert found.keys() == flatten(default_config()).keys()
    assert found["image_size"].startswith("pixels of the crop's side")
    assert found["data.dir"].startswith("folder of prepared TFDS datasets")
    assert [key for key, meaning in found.items() if not meaning] == []


def test_a_workdirs_config_json_can_be_given(tmp_path: Path) -> None:
    config = load_config(CIFAR10, {"seed": "7"})
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert load_config(str(tmp_path / "config.json"), {}) == config
    (tmp_path / "broken.json").write_text("{")
    assert "gives no config" in message(tmp_path / "broken.json", {})
