"""Version 0.1.0's workdirs, weights and configs (tests/fixtures/README.md) still work and give the same numbers."""

import json
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from PIL import Image

import jaxft
from jaxft import evaluate, export, predict, report, train
from jaxft.errors import run_command
from tests.helpers.runs import ROOT

FIXTURES = ROOT / "tests" / "fixtures"
WEIGHTS = FIXTURES / "weights" / "width4.safetensors"
EXPECTED = json.loads((FIXTURES / "expected.json").read_text())
TOLERANCE = 1e-4  # other CPUs and JAX versions round differently: by less than 1e-6 between SSE4.2 and AVX-512
TIMES = ("seconds", "images_per_second")
SMALL = {
    "model.pretrained": "",
    "image_size": "16",
    "data.train_split": "test",
    "checkpoint.keep_latest": "1",
    "batch_size": "144",
}
INTERRUPTED = SMALL | {
    "model.width": "2",
    "num_epochs": "3",
    "checkpoint.every_steps": "3",
    "checkpoint.keep_best": "0",
}

Workdir = Callable[[str], Path]


pytestmark = pytest.mark.usefixtures("compile_quickly")


@pytest.fixture
def workdir(tmp_path: Path) -> Workdir:
    """Copies a fixture, so that the commands may write into it."""
    return lambda name: shutil.copytree(FIXTURES / "workdirs" / name, tmp_path / name)


def quickstart() -> str:
    return str(ROOT / "configs" / "quickstart.py")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def flatten(tree: Mapping[str, Any], separator: str, prefix: str = "") -> dict[str, Any]:
    """{'optimizer.learning_rate': 0.001, ...}, or {'params/conv1/kernel': array, ...}"""

    def leaves() -> Iterator[tuple[str, Any]]:
        for key, value in tree.items():
            if isinstance(value, Mapping):
                yield from flatten(value, separator, f"{prefix}{key}{separator}").items()
            else:
                yield f"{prefix}{key}", value

    return dict(leaves())


def assert_close(found: Any, expected: Any, where: str = "") -> None:
    """Asserts the same keys, texts and counts, and floats within TOLERANCE, at any depth."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_close(found[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for index, pair in enumerate(zip(found, expected, strict=True)):
            assert_close(*pair, f"{where}/{index}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=TOLERANCE, rel=0), where
    else:
        assert (type(found), found) == (type(expected), expected), where


def assert_same_rows(workdir: Path, name: str) -> None:
    """Asserts that metrics.jsonl holds the rows of the undisturbed run, whose times may differ."""
    found, expected = lines(workdir / "metrics.jsonl"), lines(FIXTURES / "undisturbed" / f"{name}.jsonl")
    assert [row.keys() for row in found] == [row.keys() for row in expected]
    rows, expected_rows = ([{k: v for k, v in row.items() if k not in TIMES} for row in r] for r in (found, expected))
    assert_close(rows, expected_rows)


@pytest.mark.parametrize("name", EXPECTED)
def test_evaluate_and_predict(workdir: Workdir, capsys: pytest.CaptureFixture[str], name: str) -> None:
    run, checkpoint = name.split("/")
    options = ["--workdir", str(workdir(run)), "--checkpoint", checkpoint, "--json"]
    assert run_command(evaluate.main, options) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.pop("targets")["label"]["accuracy"] == found["accuracy"]  # a newer key
    assert_close(found, EXPECTED[name]["evaluate"])

    assert run_command(predict.main, [*options, "--top_k=10", str(FIXTURES / "images")]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for row in rows:
        row["file"] = Path(row["file"]).relative_to(ROOT).as_posix()
    assert_close(rows, EXPECTED[name]["predict"])


def test_a_finished_run_stays_as_it_is(workdir: Workdir) -> None:
    copy = workdir("finished")

    def contents() -> dict[str, bytes]:
        paths = [copy / "metrics.jsonl", copy / "config.json", *(copy / "checkpoints").rglob("*")]
        return {str(path): path.read_bytes() for path in paths if path.is_file()}

    before = contents()
    config = str(copy / "config.json")
    assert run_command(train.main, ["--config", config, "--workdir", str(copy)]) == 0
    assert contents() == before
    with pytest.raises(jaxft.UserError, match=r"optimizer\.learning_rate"):
        jaxft.train_and_evaluate(jaxft.load_config(config, {"optimizer.learning_rate": "0.3"}), copy)


def test_an_interrupted_run_resumes(workdir: Workdir) -> None:
    """Runs the same command again, with the config file that ships today."""
    copy = workdir("interrupted")
    before = (copy / "metrics.jsonl").read_text()
    overrides = [f"--config.{key}={value}" for key, value in INTERRUPTED.items()]
    assert run_command(train.main, ["--config", quickstart(), "--workdir", str(copy), *overrides]) == 0
    assert (copy / "metrics.jsonl").read_text().startswith(before)
    assert_same_rows(copy, "interrupted")
    assert (copy / "report.html").exists()
    config = FIXTURES / "workdirs" / "interrupted" / "config.json"
    assert (copy / "config.json").read_bytes() == config.read_bytes()


def test_an_interrupted_run_with_averages_and_frozen_parts_resumes(workdir: Workdir) -> None:
    copy = workdir("ema_frozen")
    before = (copy / "metrics.jsonl").read_text()
    state = jaxft.train_and_evaluate(jaxft.load_config(str(copy / "config.json"), {}), copy)
    assert int(state.step) == 14
    assert (copy / "metrics.jsonl").read_text().startswith(before)
    assert_same_rows(copy, "ema_frozen")


def test_a_run_starts_from_a_weights_file(tmp_path: Path) -> None:
    probe = {"num_epochs": "1", "augment.flip": "False", "optimizer.freeze": "backbone"}
    overrides = SMALL | {"model.width": "4", "model.pretrained": str(WEIGHTS)} | probe
    jaxft.train_and_evaluate(jaxft.load_config(quickstart(), overrides), tmp_path / "run")
    assert_same_rows(tmp_path / "run", "from_weights")


def test_a_weights_file_loads() -> None:
    weights = jaxft.load_pretrained(str(WEIGHTS))
    found, expected = flatten(weights.variables, "/"), safetensors.numpy.load_file(WEIGHTS)
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        np.testing.assert_array_equal(found[key], array, key)
    assert (weights.provenance["arch"], weights.provenance["width"]) == ("resnet18", 4)


def metadata_of(path: Path) -> dict[str, Any]:
    with safetensors.safe_open(path, "numpy") as file:
        return json.loads(file.metadata()["jaxft"])


def test_export_to_flax(workdir: Workdir, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    assert run_command(export.main, ["--workdir", str(workdir("finished")), "--to=flax", "--out", str(out)]) == 0
    found, expected = (safetensors.numpy.load_file(path) for path in (out, WEIGHTS))
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        np.testing.assert_array_equal(found[key], array, key)
    metadata, expected_metadata = (metadata_of(path) for path in (out, WEIGHTS))
    assert metadata.pop("source") and expected_metadata.pop("source")  # a sentence
    assert_close(metadata, expected_metadata)


def test_export_to_torchvision(workdir: Workdir, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    assert run_command(export.main, ["--workdir", str(workdir("finished")), "--to=torchvision", "--out", str(out)]) == 0
    found = safetensors.numpy.load_file(out)
    leaves = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
    expected = {}
    for path, array in safetensors.numpy.load_file(WEIGHTS).items():
        *parents, leaf = path.split("/")[1:]
        expected[".".join([*parents, leaves.get(leaf, leaf)])] = (
            array.T if array.ndim == 2 else (array.transpose(3, 2, 0, 1) if array.ndim == 4 else array)
        )
    assert {key for key in found if not key.endswith("num_batches_tracked")} == expected.keys()
    for key, array in expected.items():
        np.testing.assert_array_equal(found[key], array, key)


def test_export_to_stablehlo(workdir: Workdir, tmp_path: Path) -> None:
    out = tmp_path / "out.zip"
    assert run_command(export.main, ["--workdir", str(workdir("finished")), "--to=stablehlo", "--out", str(out)]) == 0
    with zipfile.ZipFile(out) as archive:
        info = json.loads(archive.read("info.json"))
        network = jax.export.deserialize(bytearray(archive.read("model.stablehlo"))).call
    assert info["checkpoint"] == EXPECTED["finished/best"]["evaluate"]["checkpoint"]
    rows = EXPECTED["finished/best"]["predict"]
    images = np.stack([np.asarray(Image.open(ROOT / row["file"])) for row in rows])
    of_class = [{top["label"]: top["probability"] for top in row["top_k"]} for row in rows]
    expected = [[row[name] for name in info["class_names"]] for row in of_class]
    np.testing.assert_allclose(network(images), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["finished", "ema_frozen"])
def test_report(workdir: Workdir, name: str) -> None:
    copy = workdir(name)
    assert not (copy / "report.html").exists()
    assert run_command(report.main, ["--workdir", str(copy)]) == 0
    html = (copy / "report.html").read_text()
    best = max(row["accuracy"] for row in lines(copy / "metrics.jsonl") if row["split"] == "eval")
    assert f"{best:.2%}" in html
    assert "automobile" in html


@pytest.mark.parametrize("path", sorted((FIXTURES / "configs").glob("*.json")), ids=lambda path: path.stem)
def test_shipped_configs_are_unchanged(path: Path) -> None:
    """Compares all keys of version 0.1.0 but the note; keys may be added."""
    expected = flatten(json.loads(path.read_text()), ".")
    assert expected.pop("note") or path.stem != "quickstart"
    for source in (path, ROOT / "configs" / f"{path.stem}.py"):
        found = flatten(jaxft.load_config(str(source), {}).to_dict(), ".")
        assert {key: found.get(key) for key in expected} == expected
