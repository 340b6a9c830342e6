"""Tests the fit of a head to fixed features, against SciPy's L-BFGS in float64, and its place in a run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import scipy.special

import jaxft
from jaxft import train
from jaxft.errors import MESSAGE_LENGTH, UserError, run_command
from jaxft.pretrained.weights_file import write_weights
from jaxft.targets.classification import ClassTarget
from jaxft.training import evaluation
from jaxft.training.feature_cache import load_or_compute
from jaxft.training.probe import LossConfig, fit_linear_head, hold_out, minimize
from jaxft.training.restore import load_checkpoint
from tests.helpers.runs import ROOT, metrics, same_bits

CLASSES = 4
PROBE = {
    "image_size": "16",
    "data.train_split": "test",
    "model.pretrained": "",
    "model.width": "4",
    "batch_size": "144",
    "augment.flip": "False",
    "optimizer.freeze": "backbone",
    "optimizer.fit_head": "only",
}
ROOT_CONFIG = str(ROOT / "configs" / "quickstart.py")


pytestmark = pytest.mark.usefixtures("compile_quickly")


def examples(scale: float = 1.0, offset: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Returns overlapping classes: float32 (200, 12) and int32 (200,)."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, CLASSES, 200).astype(np.int32)
    features = rng.normal(size=(200, 12)) * np.geomspace(0.1, 3, 12) + 0.7 * np.eye(CLASSES, 12)[label]
    return (scale * (features + offset)).astype(np.float32), label


@pytest.mark.parametrize("inverse_penalty", [0.1, 10.0])
@pytest.mark.parametrize(("smoothing", "weights"), [(0.0, ()), (0.1, (0.5, 1.0, 1.0, 2.0))])
def test_the_optimum_is_scipys(inverse_penalty: float, smoothing: float, weights: tuple[float, ...]) -> None:
    """Without smoothing and weights, it is the objective of scikit-learn's LogisticRegression(C=inverse_penalty)."""
    features, label = examples()
    inputs, own = features.astype(np.float64), np.array(weights or (1.0,) * CLASSES)

    def value(flat: np.ndarray) -> float:
        kernel, bias = flat[: 12 * CLASSES].reshape(12, CLASSES), flat[12 * CLASSES :]
        logp = scipy.special.log_softmax(inputs @ kernel + bias, axis=1)
        smooth = smoothing * own[None] / CLASSES
        loss = -((1 - smoothing) * own[label] * logp[np.arange(200), label] + (logp * smooth).sum(1)).sum()
        return loss / own[label].sum() + (kernel**2).sum() / (2 * inverse_penalty * 200)

    found = scipy.optimize.minimize(value, np.zeros(13 * CLASSES), method="L-BFGS-B", options={"maxfun": 10**6})
    zero = {"kernel": np.zeros((12, CLASSES), np.float32), "bias": np.zeros(CLASSES, np.float32)}
    params = minimize(
        zero,
        features,
        label,
        np.ones(200, np.float32),
        np.float32(inverse_penalty),
        LossConfig(CLASSES, (ClassTarget(label_smoothing=smoothing, class_weights=weights),)),
    )
    kernel = found.x[: 12 * CLASSES].reshape(12, CLASSES)
    np.testing.assert_allclose(params["kernel"], kernel, atol=0.003 * np.abs(kernel).max())


@pytest.mark.parametrize(("scale", "offset"), [(1e-6, 0.0), (1e4, 0.0), (1.0, 5.0)])
def test_the_scale_of_the_features_does_not_matter(scale: float, offset: float) -> None:
    expected_inputs, label = examples()
    expected = fit_linear_head(expected_inputs, label, LossConfig(CLASSES), seed=0)
    features, _ = examples(scale, offset)
    found = fit_linear_head(features, label, LossConfig(CLASSES), seed=0)
    assert found.inverse_penalty == expected.inverse_penalty
    logits, expected_logits = (x @ fit.kernel + fit.bias for x, fit in ((features, found), (expected_inputs, expected)))
    np.testing.assert_allclose(logits, expected_logits, atol=0.1)  # logits up to 18; L-BFGS stops near the optimum


@pytest.mark.parametrize(
    ("features", "label", "classes"),
    [
        (np.zeros((6, 3)), [0, 0, 1, 1, 1, 1], 2),  # nothing but the frequency of the classes can be learnt
        (np.eye(3), [0, 1, 2], 3),  # one image of each class: none can be held out
        (np.eye(2), [0, 0], 1),
        (1e30 * np.eye(4), [0, 0, 1, 1], 2),
    ],
)
def test_degenerate_features(features: np.ndarray, label: list[int], classes: int) -> None:
    inputs, labels = features.astype(np.float32), np.array(label, np.int32)
    fit = fit_linear_head(inputs, labels, LossConfig(classes), seed=0)
    assert np.isfinite(fit.kernel).all() and np.isfinite(fit.bias).all()
    predicted = (inputs @ fit.kernel + fit.bias).argmax(1)
    assert (predicted == (labels if features.any() else 1)).all()


def test_a_fifth_of_each_class_is_held_out() -> None:
    label = np.array([0] * 50 + [1] * 10 + [2] * 2 + [3])
    mask = hold_out(label, seed=1)
    assert np.bincount(label[mask], minlength=4).tolist() == [10, 2, 1, 0]
    assert (mask == hold_out(label, seed=1)).all() and (mask != hold_out(label, seed=2)).any()


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of a run that only fits its head. Not to be changed."""
    workdir = tmp_path_factory.mktemp("runs") / "fitted"
    jaxft.train_and_evaluate(jaxft.load_config(ROOT_CONFIG, PROBE), workdir)
    return workdir


def test_a_run_that_only_fits_is_a_run(fitted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = metrics(fitted)
    assert [(row["step"], row["epoch"], row["split"]) for row in rows] == [(1, 1, "train"), (1, 1, "eval")]
    assert rows[1]["accuracy"] > 0.15  # of ten classes, by random features
    assert json.loads((fitted / "config.json").read_text())["num_epochs"] == 1
    assert (fitted / "report.html").exists()
    assert jaxft.load(fitted).evaluate().predictions.rank.tolist().count(0) == round(1000 * rows[1]["accuracy"])
    arguments = [f"--config.{key}={value}" for key, value in PROBE.items()]
    assert run_command(train.main, ["--config", ROOT_CONFIG, "--workdir", str(fitted), *arguments]) == 0
    assert metrics(fitted) == rows
    assert "resuming after step 1" in capsys.readouterr().out


def test_the_features_are_read_from_the_disk(fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the features were computed again")

    monkeypatch.setattr(evaluation, "features_step", fail)
    state = jaxft.train_and_evaluate(jaxft.load_config(ROOT_CONFIG, PROBE), tmp_path / "again")
    expected = load_checkpoint(fitted, "latest").state
    assert same_bits(state.params, expected.params)
    for i, changed in enumerate([{"seed": "1"}, {"data.cache": "never"}]):
        with pytest.raises(AssertionError, match="computed again"):
            jaxft.train_and_evaluate(jaxft.load_config(ROOT_CONFIG, PROBE | changed), tmp_path / f"other{i}")


def test_training_begins_with_the_fitted_head(fitted: Path, tmp_path: Path) -> None:
    """With a learning rate of 0 it also ends with it, and so do the averages."""
    settings = {"optimizer.fit_head": "first", "optimizer.learning_rate": "0", "num_epochs": "1"}
    config = jaxft.load_config(ROOT_CONFIG, PROBE | settings | {"optimizer.ema_decay": "0.9"})
    state = jaxft.train_and_evaluate(config, tmp_path / "run")
    expected = load_checkpoint(fitted, "latest").state.params["fc"]
    for params in (state.params, state.ema["params"]):
        assert same_bits(params["fc"], expected)
    assert metrics(tmp_path / "run")[-1]["accuracy"] == metrics(fitted)[-1]["accuracy"]


@pytest.mark.parametrize(
    "setting",
    ["augment.flip=True", "augment.first_image_size=8", "optimizer.freeze=stem", "optimizer.unfreeze=2: backbone"],
)
def test_only_fitting_needs_fixed_features(fails: Callable[..., str], tmp_path: Path, setting: str) -> None:
    arguments = [f"--config.{key}={value}" for key, value in PROBE.items()]
    line = fails(
        "-m", "jaxft.train", "--config", ROOT_CONFIG, *arguments, f"--config.{setting}", "--workdir", tmp_path / "run"
    )
    assert "optimizer.fit_head=only trains only the head" in line and "optimizer.freeze=backbone" in line
    assert len(line) <= MESSAGE_LENGTH
    assert not (tmp_path / "run").exists()


def test_features_that_are_not_finite_are_refused(tmp_path: Path, fitted: Path) -> None:
    weights = jaxft.load_pretrained(str(ROOT / "tests" / "fixtures" / "weights" / "width4.safetensors"))
    weights.variables["params"]["bn1"]["scale"] = 1e38 * weights.variables["params"]["bn1"]["scale"]
    write_weights(tmp_path / "huge.safetensors", weights)
    config = jaxft.load_config(ROOT_CONFIG, PROBE | {"model.pretrained": str(tmp_path / "huge.safetensors")})
    with pytest.raises(UserError, match=r"features of \d+ of 1,000 images are not finite; choose another model\.pre"):
        jaxft.train_and_evaluate(config, tmp_path / "run")


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "text", "folder"])
def test_damaged_features_are_computed_again(tmp_path: Path, damage: str) -> None:
    path, features = tmp_path / "features" / "a.npz", np.arange(600, dtype=np.float32).reshape(100, 6)
    np.testing.assert_array_equal(load_or_compute(path, lambda: features), features)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    if damage == "folder":
        path.mkdir()
    else:
        damaged = {"flip": content, "truncate": content[:900], "empty": b"", "text": b"features"}
        path.write_bytes(bytes(damaged[damage]))
    np.testing.assert_array_equal(load_or_compute(path, lambda: 2 * features), 2 * features)
    if damage != "folder":
        np.testing.assert_array_equal(load_or_compute(path, lambda: features), 2 * features)
