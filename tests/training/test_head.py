"""The standardised input of a head: its statistics, its independence of the features' scale, and its place in a run."""

import dataclasses
import re
import zipfile
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import jaxft
from benchmarks.recipes import scale_last_stage
from jaxft.classifier import Classifier
from jaxft.config import default_config
from jaxft.data import datasets
from jaxft.data.batches import Examples, epoch_order, make_batches, replicate
from jaxft.data.loader import ResidentLoader
from jaxft.export import export_flax, export_stablehlo, export_torchvision
from jaxft.models.build import make_model
from jaxft.models.fold import fold_head_norm, fold_norms
from jaxft.models.heads import HEAD_NORM, unfold_standardize
from jaxft.models.network import Network
from jaxft.models.partition import make_policy
from jaxft.models.policy import BatchNormMode, Policy, eval_features, eval_logits
from jaxft.models.resnet import BasicBlock, ResNet
from jaxft.targets.classification import cross_entropy
from jaxft.targets.joint import ONE_CLASS, targets_of
from jaxft.training import probe
from jaxft.training.evaluation import recalibrate
from jaxft.training.head import prepare_head, set_head_norm
from jaxft.training.optimizer import make_optimizer
from jaxft.training.probe import Fit
from jaxft.training.restore import LoadedCheckpoint, load_checkpoint, load_weights
from jaxft.training.start import initial_state
from jaxft.training.state import TrainState, create_train_state, initial_train_state
from jaxft.training.steps import EvalConfig, StepConfig, train_step
from jaxft.training.steps_per_call import StepsPerCall
from jaxft.transforms.preprocessing import Preprocessing
from tests.helpers.reference import torch, torchvision
from tests.helpers.runs import ROOT, assert_same_run, same_bits
from tests.helpers.torch_models import NarrowResNet

SMALL = ResNet(BasicBlock, (1,), num_classes=4, width=32, formulation="cpu", head_norm=True)
RUN = {
    "image_size": "16",
    "data.train_split": "test",
    "model.pretrained": str(ROOT / "tests" / "fixtures" / "weights" / "width4.safetensors"),
    "model.width": "4",
    "model.head_norm": "True",
    "batch_size": "144",
    "augment.flip": "False",
    "optimizer.freeze": "backbone",
    "optimizer.learning_rate": "0.01",
    "optimizer.schedule": "constant",
    "optimizer.ema_decay": "0.9",
    "num_epochs": "2",
}


pytestmark = pytest.mark.usefixtures("compile_quickly")


def features(scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Returns features of overlapping classes, as after a ReLU, one of them dead: float32 (300, 32), int32 (300,)."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, 4, 300).astype(np.int32)
    raw = rng.normal(size=(300, 32)) * np.geomspace(0.01, 0.3, 32) + 0.2 * np.eye(4, 32)[label]
    raw[:, 5] = 0
    return (scale * np.maximum(raw, 0)).astype(np.float32), label


SGD = optax.sgd(0.01, 0.9)


def first_state(model: ResNet = SMALL, tx: Any = SGD, *, ema: bool = False) -> TrainState:
    if model != SMALL:
        return jax.jit(partial(create_train_state, model, tx, ema=ema))(jax.random.key(0))
    return initial_train_state(tx, random_variables(), ema=ema)


@cache
def random_variables() -> Any:
    return jax.jit(partial(SMALL.init, train=False))(jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32))


def logits_of(model: Network, variables: Any, inputs: np.ndarray) -> np.ndarray:
    return np.asarray(eval_logits(model, variables, jnp.asarray(inputs), Policy()))


def test_the_statistics_are_numpys(capsys: pytest.CaptureFixture[str]) -> None:
    inputs, _ = features()
    state = set_head_norm(first_state(ema=True), inputs, keeps_head=False, path=("fc",))
    found, wide = jax.device_get(state.batch_stats[HEAD_NORM]), inputs.astype(np.float64)
    np.testing.assert_allclose(found["mean"], wide.mean(0), rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(found["deviation"], np.sqrt(wide.var(0).mean()), rtol=1e-6)
    assert same_bits(state.ema["batch_stats"], state.batch_stats)
    expected = f"head     features standardised by 300 training images (mean {wide.mean():.3g}, deviation "
    assert expected in capsys.readouterr().out
    logits = logits_of(SMALL, state.variables(), inputs)
    head = jax.tree.map(np.float64, jax.device_get(state.params["fc"]))
    standardised = (wide - wide.mean(0)) / np.sqrt(wide.var(0).mean())
    np.testing.assert_allclose(logits, standardised @ head["kernel"] + head["bias"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-11), (np.float32, 1e-5)])
def test_folding_keeps_the_logits(dtype: Any, tolerance: float) -> None:
    """Compares the standardised and the folded head with NumPy in float64, relative to the largest logit."""
    with jax.enable_x64(dtype == np.float64):
        inputs = features()[0].astype(dtype)
        statistics = {"mean": np.float32(inputs.mean(0)), "deviation": np.float32(0.07)}
        head: Any = jax.tree.map(dtype, jax.device_get(random_variables()["params"]["fc"]))
        variables = {
            "params": random_variables()["params"] | {"fc": head},
            "batch_stats": random_variables()["batch_stats"] | {HEAD_NORM: statistics},
        }
        standardised = (inputs.astype(np.float64) - statistics["mean"]) / statistics["deviation"]
        expected = standardised @ head["kernel"].astype(np.float64) + head["bias"]
        model, folded = fold_norms(SMALL, variables)
        assert not model.head_norm and folded["params"]["fc"]["kernel"].dtype == dtype
        for own, parts in ((SMALL, variables), (model, folded)):
            logits = logits_of(own, parts, inputs)
            np.testing.assert_allclose(logits, expected, rtol=0, atol=tolerance * np.abs(expected).max())
        unfolded = unfold_standardize(jax.device_get(folded["params"]["fc"]), statistics)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=10 * tolerance, atol=10 * tolerance), unfolded, head)


@pytest.mark.parametrize(
    "inputs", [np.zeros((3, 32)), np.full((3, 32), 0.1), *(scale * np.eye(3, 32) for scale in (1e-12, 1e12))]
)
def test_degenerate_features_give_finite_logits(inputs: np.ndarray) -> None:
    state = set_head_norm(first_state(), inputs.astype(np.float32), keeps_head=False, path=("fc",))
    for model, variables in ((SMALL, state.variables()), fold_norms(SMALL, state.variables())):
        assert np.isfinite(logits_of(model, variables, inputs.astype(np.float32))).all()


def trained_head(scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Trains the head for four epochs on two devices; returns the losses and the predictions of the last 100 images."""
    inputs, label = features(scale)
    examples = Examples(inputs[:200], label[:200])
    state = set_head_norm(first_state(), inputs[:200], keeps_head=False, path=("fc",))
    config = StepConfig(SMALL, SGD, Preprocessing(16, (0.5,) * 3, (0.25,) * 3))
    devices = jax.local_devices()[:2]
    p_step = jax.pmap(
        partial(train_step, config=config), "batch", in_axes=(None, None, 0), out_axes=None, devices=devices
    )
    losses = []
    for epoch in range(4):
        for batch in make_batches(epoch_order(0, epoch, 200), 32, 2):
            state, counts = p_step(state, examples, batch)
            losses.append(float(counts.loss))
    model, variables = fold_norms(SMALL, state.variables())
    return np.array(losses), logits_of(model, variables, inputs[200:]).argmax(-1)


def test_training_does_not_depend_on_the_scale_of_features() -> None:
    expected_losses, expected = trained_head(1)
    assert expected_losses[-7:].sum() < 0.9 * expected_losses[:7].sum()
    for scale in (0.1, 10):
        losses, predicted = trained_head(scale)
        np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
        np.testing.assert_array_equal(predicted, expected)


@pytest.mark.parametrize(
    "batch_norm", ["update", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("sync", "frozen"))]
)
def test_the_statistics_never_move(batch_norm: BatchNormMode) -> None:
    """On eight devices, the last one without images, with an average of the weights and recalibrated BatchNorm."""
    data = datasets.load("sample:cifar10", "train")
    examples = Examples(data.image[:40], data.label[:40] % 4)
    policy = Policy(batch_norm=batch_norm)
    before = set_head_norm(first_state(ema=True), features()[0], keeps_head=False, path=("fc",))
    config = StepConfig(SMALL, SGD, Preprocessing(16, (0.5,) * 3, (0.25,) * 3), policy, ema_decay=0.5)
    p_step = jax.pmap(partial(train_step, config=config), "batch", in_axes=(None, None, 0), out_axes=None)
    state = replicate(jax.device_get(before))
    for batch in make_batches(np.arange(27), 32, 8):
        state, _ = p_step(state, examples, batch)
    loader = ResidentLoader(replicate(examples))
    recalibrated = recalibrate(EvalConfig(SMALL, config.preprocessing, policy), state, loader, 16)
    newest = dataclasses.replace(state, ema={})
    for after in (state.batch_stats, state.ema["batch_stats"], recalibrated.ema["batch_stats"], newest.batch_stats):
        assert same_bits(after[HEAD_NORM], before.batch_stats[HEAD_NORM])
    assert same_bits(state.batch_stats["bn1"], before.batch_stats["bn1"]) == (batch_norm == "frozen")


def test_the_fitted_head_is_the_same_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the weights and in their average; the counts are those of the fit."""
    inputs, label = features()
    rng = np.random.default_rng(1)
    kernel, bias = (rng.normal(size=shape).astype(np.float32) for shape in ((32, 4), (4,)))
    fit = Fit(10 * kernel, bias, 1.0)
    monkeypatch.setattr(probe, "fit_linear_head", lambda *_: fit)
    eval_config = EvalConfig(SMALL, Preprocessing(16, (0.5,) * 3, (0.25,) * 3))
    state = set_head_norm(first_state(ema=True), inputs, keeps_head=False, path=("fc",))
    loader = ResidentLoader(Examples(inputs, label))
    state, counts = probe.fit_head(default_config(), eval_config, state, loader, ONE_CLASS, StepsPerCall())
    expected = inputs.astype(np.float64) @ fit.kernel + fit.bias
    assert int(counts.correct) == (expected.argmax(1) == label).sum()
    for variables in variables_of(state):
        for model, parts in ((SMALL, variables), fold_norms(SMALL, variables)):
            np.testing.assert_allclose(logits_of(model, parts, inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_gradients_do_not_depend_on_the_scale_of_the_last_stage() -> None:
    """Except those of the norms that make its output large, which are inversely proportional. In float64."""
    model = ResNet(BasicBlock, (1, 1, 1, 2), num_classes=4, width=8, dtype=jnp.float64, head_norm=True)
    with jax.enable_x64(True):
        image, label = np.random.default_rng(0).normal(size=(16, 64, 64, 3)), np.arange(16) % 4
        original = flatten_dict(model.init(jax.random.key(0), image, train=False), sep="/")

        def gradients(factor: float) -> dict[str, Any]:
            scaled = scale_last_stage({key: np.asarray(array) for key, array in original.items()}, factor)
            variables = unflatten_dict({key: np.float64(array) for key, array in scaled.items()}, sep="/")
            inputs = np.asarray(eval_features(model, variables, jnp.asarray(image), Policy()))
            statistics = {"mean": inputs.mean(0), "deviation": np.sqrt(inputs.var(0).mean())}
            batch_stats = variables["batch_stats"] | {HEAD_NORM: statistics}

            def loss(params: Any) -> jax.Array:
                parts = {"params": params, "batch_stats": batch_stats}
                logits: Any = model.apply(parts, image, train=True, mutable=["batch_stats"])[0]
                return cross_entropy(logits, label)[0].mean()

            return flatten_dict(jax.jit(jax.grad(loss))(variables["params"]), sep="/")

        expected = gradients(1)
        for factor in (0.1, 10):
            for key, gradient in gradients(factor).items():
                carries = re.fullmatch(r"layer4/\d/(bn2|downsample/1)/(scale|bias)", key)
                wanted = expected[key] / (factor if carries else 1)
                difference = np.linalg.norm(gradient - wanted)
                assert difference <= 0.02 * np.linalg.norm(wanted), key  # BatchNorm's epsilon is not scaled


def variables_of(state: TrainState) -> tuple[Any, Any]:
    return {"params": state.params, "batch_stats": state.batch_stats}, state.ema


def test_features_of_random_weights_stay_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    config, state = default_config(), first_state()
    config.model.head_norm = True
    loader = ResidentLoader(Examples(*features()))
    eval_config = EvalConfig(SMALL, Preprocessing(16, (0.5,) * 3, (0.25,) * 3))
    found = prepare_head(config, eval_config, state, loader, ONE_CLASS, StepsPerCall(), keeps_head=False)
    assert found is state
    assert "head     features of random weights are not standardised" in capsys.readouterr().out


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of a run that trains only a head, with head_norm. Not to be changed."""
    workdir = tmp_path_factory.mktemp("runs") / "trained"
    jaxft.train_and_evaluate(jaxft.load_config("quickstart", RUN), workdir)
    return workdir


@pytest.mark.slow
def test_a_resumed_run_has_the_same_bits(trained: Path, tmp_path: Path) -> None:
    for epochs in ("1", "2"):
        state = jaxft.train_and_evaluate(jaxft.load_config("quickstart", RUN | {"num_epochs": epochs}), tmp_path)
    assert float(state.batch_stats[HEAD_NORM]["deviation"]) != 1
    assert_same_run(tmp_path, trained)


@pytest.mark.slow
def test_another_run_gets_a_plain_head_or_computes_the_same_logits(trained: Path) -> None:
    checkpoint = load_checkpoint(trained, "best")
    inputs = np.random.default_rng(0).uniform(size=(5, 32)).astype(np.float32)
    expected = logits_of(checkpoint.model, checkpoint.state.variables(), inputs)
    variables, provenance = load_weights(str(trained), "resnet18")
    assert HEAD_NORM not in variables["batch_stats"]
    config = jaxft.load_config("quickstart", RUN | {"model.pretrained": str(trained)})
    model = make_model(config.model, 10)
    tx = make_optimizer(config.optimizer, 1, 1, model.parts)
    state, _ = initial_state(config, model, make_policy(config, model, 1), tx, targets_of(provenance))
    state = set_head_norm(state, 3 * inputs + 1, keeps_head=True, path=("fc",))
    for own, parts in ((model.clone(head_norm=False), variables), *((model, parts) for parts in variables_of(state))):
        np.testing.assert_allclose(logits_of(own, parts, inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_exported_weights_have_a_plain_head(trained: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(trained, "best")
    export_flax(trained, checkpoint, tmp_path / "out.safetensors", "float32")
    variables, _ = jaxft.load_pretrained(str(tmp_path / "out.safetensors"), "resnet18")
    assert same_bits(variables, fold_head_norm(jax.device_get(checkpoint.state.variables()), ("fc",)))
    inputs = np.random.default_rng(0).uniform(size=(5, 32)).astype(np.float32)
    found = logits_of(checkpoint.model.clone(head_norm=False), variables, inputs)
    expected = logits_of(checkpoint.model, checkpoint.state.variables(), inputs)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_exports_give_the_probabilities_of_predict(trained: Path, tmp_path: Path) -> None:
    """Uses a network of one block a stage, which compiles quickly."""
    model = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=10, width=4, head_norm=True)
    inputs = np.random.default_rng(0).gamma(1, 0.3, (20, 32)).astype(np.float32)
    state = set_head_norm(first_state(model, optax.identity()), inputs, keeps_head=False, path=("fc",))
    found = load_checkpoint(trained, "best")
    checkpoint = LoadedCheckpoint(1, found.info, model, Policy(), replicate(jax.device_get(state)))
    images = datasets.load("sample:cifar10", "test").image[:8, 8:24, 8:24]
    expected = Classifier(checkpoint).probabilities(images)
    export_stablehlo(checkpoint, tmp_path / "model.zip", "float32")
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        exported = jax.export.deserialize(bytearray(archive.read("model.stablehlo")))
    np.testing.assert_allclose(jax.jit(exported.call)(images), expected, rtol=1e-4, atol=1e-6)
    export_torchvision(checkpoint, tmp_path / "model.pth")
    network = NarrowResNet(torchvision.models.resnet.BasicBlock, (1, 1, 1, 1), 4)
    network.load_state_dict(torch.load(tmp_path / "model.pth"), strict=True)
    mean, std = (np.array(found.info["preprocessing"][key], np.float32) for key in ("mean", "std"))
    pixels = torch.from_numpy(((images / np.float32(255) - mean) / std).transpose(0, 3, 1, 2).copy())
    probabilities = network.eval()(pixels.float()).softmax(1).detach().numpy()
    np.testing.assert_allclose(probabilities, expected, rtol=1e-4, atol=1e-6)


def test_images_and_their_cached_features_have_the_same_logits() -> None:
    state = set_head_norm(first_state(), features()[0], keeps_head=False, path=("fc",))
    image = np.random.default_rng(0).normal(size=(4, 16, 16, 3)).astype(np.float32)
    apply: Any = jax.jit(partial(SMALL.apply, train=True, policy=Policy(batch_norm="frozen"), mutable=["batch_stats"]))
    inputs = eval_features(SMALL, state.variables(), jnp.asarray(image), Policy())
    np.testing.assert_allclose(apply(state.variables(), inputs)[0], apply(state.variables(), image)[0], rtol=1e-5)
