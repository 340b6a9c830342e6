"""Training with a class, tags and a number: steps beside torch's, the fit of the head, distillation and refusals."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

from jaxft import evaluate, train
from jaxft.config import default_config
from jaxft.data import datasets
from jaxft.data.batches import Examples, epoch_order, make_batches, sampled_order
from jaxft.data.dataset import Dataset
from jaxft.data.fields import Field
from jaxft.data.loader import make_loader
from jaxft.errors import MESSAGE_LENGTH, UserError, run_command
from jaxft.models.policy import Policy
from jaxft.models.resnet import BasicBlock, ResNet
from jaxft.pretrained.convert import from_torch
from jaxft.targets import joint
from jaxft.train import train_and_evaluate
from jaxft.training.loop import order_of
from jaxft.training.probe import LossConfig, fit_linear_head, minimize, standardization
from jaxft.training.restore import load_checkpoint
from jaxft.training.start import check_labels
from jaxft.training.state import TrainState, create_train_state
from jaxft.training.steps import StepConfig, train_step
from jaxft.transforms.augment import Augmentation
from jaxft.transforms.preprocessing import Preprocessing, preprocess
from tests.helpers.devices import replicate_on
from tests.helpers.joint_loss import NUMBER, TARGETS, joint_loss, random_labels
from tests.helpers.reference import torch
from tests.helpers.runs import metrics, same_bits
from tests.helpers.tables import SIDE, table_changes, table_config
from tests.helpers.tables import TARGETS as TABLE_TARGETS
from tests.helpers.ten_steps import check_equal
from tests.helpers.torch_models import flax_model, nchw, random_torch_model

PREPROCESSING = Preprocessing(SIDE, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
SMALL = ResNet(BasicBlock, (1,), num_classes=6, width=4, stem="small", formulation="cpu")

pytestmark = pytest.mark.usefixtures("compile_quickly", "no_reports")


# ---- steps ----


def pmap_step(config: StepConfig) -> Any:
    return jax.pmap(partial(train_step, config=config), axis_name="batch", in_axes=(None, None, 0), out_axes=None)


@pytest.mark.parametrize("devices", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_ten_steps_are_torchs(devices: int) -> None:
    """Trains in float64 on missing labels, too. The last batch of 4 images leaves four of eight devices without any."""
    reference = random_torch_model("basic").train()
    images = np.random.default_rng(0).integers(0, 256, (90, SIDE, SIDE, 3), np.uint8)
    label, order = random_labels(90), epoch_order(0, 1, 90)[:76]
    label["age"][order[8:16]] = np.nan  # none in the second batch
    with jax.enable_x64(True):
        model = flax_model("basic", dtype=jnp.float64, formulation="cpu")
        tx = optax.sgd(2**-7, momentum=0.5)  # exact in float32
        variables = from_torch({key: value.numpy().copy() for key, value in reference.state_dict().items()}, model)
        params, batch_stats = variables["params"], variables["batch_stats"]
        state = replicate_on(devices, TrainState(jnp.int32(0), params, batch_stats, tx.init(params)))
        step = pmap_step(StepConfig(model, tx, PREPROCESSING, Policy(batch_norm="sync"), targets=TARGETS))
        counts = []
        for batch in make_batches(order, 8, devices):
            state, counted = step(state, Examples(images, label), batch)
            counts.append(jax.device_get(counted.targets))
        pixels = np.asarray(jax.jit(preprocess, static_argnums=1)(images, PREPROCESSING), np.float64)

    sgd = torch.optim.SGD(reference.parameters(), 2**-7, momentum=0.5)
    for start, counted in zip(range(0, 76, 8), counts, strict=True):
        index = order[start : start + 8]
        own = {name: array[index] for name, array in label.items()}
        sgd.zero_grad()
        joint_loss(reference(nchw(pixels[index])), own).backward()
        sgd.step()
        known = [(own["species"] >= 0).sum(), (own["tags"] >= 0).sum(), (~np.isnan(own["age"])).sum()]
        assert [int(counted[name].num_images) for name in ("species", "tags", "age")] == known
    expected = from_torch({key: value.numpy() for key, value in reference.state_dict().items()}, model)
    check_equal(jax.device_get({"params": state.params, "batch_stats": state.batch_stats}), expected)
    assert counts[1]["age"].num_images == 0 and counts[1]["age"].loss == 0


@pytest.mark.slow
@pytest.mark.parametrize("targets", ["class:colour, tags:tags", "tags:tags, number:brightness, class:colour"])
def test_streamed_images_have_the_labels_of_resident_ones(table: Path, targets: str) -> None:
    """Compares two steps bit for bit, with mixed labels unless they are numbers, an EMA and recomputed activations."""
    config = table_config(table, targets)
    data = datasets.load_config_data(config.data, "train", SIDE, targets=targets)
    model = SMALL.clone(num_classes=joint.count_outputs(joint.make_targets(config, data)), remat=True)
    tx = optax.sgd(0.1)
    augmentation = Augmentation(flip=True, mixup=0.0 if "number" in targets else 0.4)
    step = pmap_step(
        StepConfig(
            model,
            tx,
            PREPROCESSING,
            augmentation=augmentation,
            targets=joint.make_targets(config, data),
            ema_decay=0.9,
        )
    )
    initial = jax.jit(partial(create_train_state, model, tx, policy=Policy(), ema=True))(jax.random.key(0))
    results = []
    for stream in ("never", "always"):
        config.data.stream = stream
        loader = make_loader(data, config.data, partners=augmentation.mixup > 0)
        state, counts = replicate_on(8, initial), []
        for batch in list(loader.batches(epoch_order(0, 1, 40), 16))[1:]:  # of 16 and 8 images
            state, counted = step(state, loader.examples, batch)
            counts.append(counted)
        results.append(jax.device_get((state, counts)))
    assert same_bits(*results)
    assert all(np.isfinite(array).all() for array in jax.tree.leaves(results[0]))


def test_the_config_chooses_the_order() -> None:
    config = default_config()
    label = np.repeat([0, 1, 2, -1], [40, 8, 8, 4]).astype(np.int32)
    images = np.zeros((60, 1, 1, 3), np.uint8)
    fields = (Field("number", "age", "age"), Field("class", "kind", "kind", names=("a", "b", "c")))
    several = Dataset(images, {"age": np.zeros(60, np.float32), "kind": label}, (), fields=fields)
    np.testing.assert_array_equal(order_of(config, several, 3), epoch_order(config.seed, 3, 60))
    for sampling, power in (("balanced", 1.0), ("sqrt", 0.5)):
        config.data.sampling = sampling
        expected = sampled_order(config.seed, 3, label, power)
        np.testing.assert_array_equal(order_of(config, several, 3), expected)
        np.testing.assert_array_equal(order_of(config, Dataset(images, label, ("a", "b", "c")), 3), expected)


# ---- the fit of a head ----


def random_features(num_images: int, num_features: int = 6) -> np.ndarray:
    rng = np.random.default_rng(3)
    return (rng.normal(size=(num_images, num_features)) * np.geomspace(0.3, 2, num_features)).astype(np.float32)


@pytest.mark.slow
def test_the_fitted_head_is_scipys() -> None:
    """Minimises the joint loss with smoothing, weights and missing labels, plus the penalty, in float64."""
    inputs, label, inverse_penalty = random_features(60), random_labels(60), 0.5

    def value(flat: np.ndarray) -> tuple[float, np.ndarray]:
        params = torch.from_numpy(flat).requires_grad_()
        kernel, bias = params[:60].reshape(6, 10), params[60:]
        loss: Any = joint_loss(torch.from_numpy(inputs).double() @ kernel + bias, label)
        loss = loss + (kernel**2).sum() / (2 * inverse_penalty * 60)
        (gradient,) = torch.autograd.grad(loss, params)
        return loss.item(), gradient.numpy()

    found = scipy.optimize.minimize(value, np.zeros(70), jac=True, method="L-BFGS-B", options={"gtol": 1e-9})
    zero = {"kernel": np.zeros((6, 10), np.float32), "bias": np.zeros(10, np.float32)}
    mask, loss_config = np.ones(60, np.float32), LossConfig(10, TARGETS)
    params = minimize(zero, inputs, label, mask, np.float32(inverse_penalty), loss_config)
    kernel, bias = found.x[:60].reshape(6, 10), found.x[60:]
    np.testing.assert_allclose(params["kernel"], kernel, atol=0.003 * np.abs(kernel).max())
    np.testing.assert_allclose(params["bias"], bias, atol=0.003 * np.abs(bias).max())


def test_the_head_of_a_number_is_a_ridge_regression() -> None:
    """Compares the whole fit with the closed form for the chosen penalty, which counts all images, labelled or not."""
    features, label = 5 + random_features(80), random_labels(80)["age"]
    label[::2] += 0.7 * features[::2, 1]
    fit = fit_linear_head(features, {"age": label}, LossConfig(1, (NUMBER,)), seed=0)
    center, scale = standardization(features)
    known = ~np.isnan(label)
    inputs, values = ((features - center) / scale)[known], label[known].astype(np.float64)
    x, y = inputs - inputs.mean(0), values - values.mean()
    penalty = np.eye(6) / (2 * NUMBER.field.weight * fit.inverse_penalty * 80)
    kernel = np.linalg.solve(x.T @ x / known.sum() + penalty, x.T @ y / known.sum())
    expected = (features - center) / scale @ kernel + values.mean() - inputs.mean(0) @ kernel
    found = features @ fit.kernel + fit.bias
    np.testing.assert_allclose(found[:, 0], expected, atol=0.003 * np.abs(expected).max())


def test_a_fit_without_any_label_of_a_target_is_finite() -> None:
    label = random_labels(60)
    label["age"][:] = np.nan
    fit = fit_linear_head(random_features(60), label, LossConfig(10, TARGETS), seed=0)
    assert np.isfinite(fit.kernel).all() and np.isfinite(fit.bias).all()
    assert not fit.kernel[:, -1].any() and fit.bias[-1] == 0


@pytest.fixture(scope="module")
def fitted(table: Path) -> Path:
    """The workdir of a run that only fits its head. Not to be changed."""
    train_and_evaluate(table_config(table, optimizer__fit_head="only"), table.parent / "fitted")
    return table.parent / "fitted"


@pytest.mark.slow
def test_a_run_that_only_fits_has_every_target(fitted: Path) -> None:
    rows = metrics(fitted)
    assert [(row["step"], row["split"]) for row in rows] == [(1, "train"), (1, "val"), (1, "eval")]
    assert rows[0].keys() >= {"loss", "colour.loss", "tags.loss", "brightness.loss"}
    assert rows[0]["brightness.loss"] < 1  # the loss of the mean


@pytest.mark.slow
def test_training_begins_with_the_fitted_head(fitted: Path, table: Path, tmp_path: Path) -> None:
    changes = {"optimizer__fit_head": "first", "optimizer__learning_rate": "0", "num_epochs": "1"}
    train_and_evaluate(table_config(table, **changes), tmp_path / "run")
    ours, expected = (metrics(workdir)[-2:] for workdir in (tmp_path / "run", fitted))
    timed = ("step", "seconds", "images_per_second")
    for mine, theirs in zip(ours, expected, strict=True):
        assert {k: v for k, v in mine.items() if k not in timed} == {k: v for k, v in theirs.items() if k not in timed}


# ---- distillation ----


def train_command(table: Path, workdir: Path, targets: str = TABLE_TARGETS, **changes: str) -> int:
    arguments = [f"--config.{key}={value}" for key, value in table_changes(table, targets, **changes).items()]
    return run_command(train.main, ["--config=quickstart", *arguments, "--workdir", str(workdir)])


@pytest.mark.slow
def test_a_student_learns_every_target_of_its_teacher(
    fitted: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both have the same random backbone. Missing labels do not matter, since the teacher predicts all of them."""
    workdir = tmp_path / "student"
    changes = {"distill__teacher": str(fitted), "distill__weight": "1", "optimizer__learning_rate": "0.02"}
    assert train_command(table, workdir, checkpoint__keep_latest="9", num_epochs="4", **changes) == 0
    assert f"teacher  checkpoint 1 of {fitted}" in capsys.readouterr().out
    assert load_checkpoint(workdir, "latest").info["teacher_checkpoint"] == "1"
    teacher = evaluate.evaluate(fitted)
    first, last = (evaluate.evaluate(workdir, which) for which in ("3", "latest"))
    for name in ("colour", "tags", "brightness"):
        distances = []
        for student in (first, last):
            own, taught = (jnp.asarray(found.predictions.logits) for found in (student, teacher))
            parts = zip(joint.each(teacher.targets, own), joint.each(teacher.targets, taught), strict=True)
            (distance,) = (t.distillation_loss(a, b, 2.0) for (t, a, _), (_, b, _) in parts if t.field.name == name)
            distances.append(float(distance.mean()))
        assert distances[1] < distances[0], name


@pytest.mark.slow
def test_a_teacher_of_other_targets_is_refused(
    fitted: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_command(table, tmp_path / "run", "class:colour, tags:tags", distill__teacher=str(fitted)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: distill.teacher {fitted} was trained on other ")
    assert "colour (green, red, yellow)" in line and "brightness (number)" in line
    assert not (tmp_path / "run").exists()


# ---- refusals ----


@pytest.mark.parametrize(
    ("targets", "changes", "expected"),
    [
        ("number:brightness", {"augment__mixup": "0.2"}, "labels that are numbers cannot be mixed"),
        ("tags:tags, number:brightness", {"augment__cutmix": "1"}, "labels that are numbers cannot be mixed"),
        ("tags:tags", {"data__sampling": "balanced"}, "data.sampling=balanced needs a target of kind class"),
        ("tags:tags", {"data__name": "sample:cifar10"}, "targets are columns of a table"),
        ("tags:tags", {"data__name": "folder:tests"}, "targets are columns of a table"),
        ("tags:tags", {"best_metric": "map"}, "no target has the metric 'map' of best_metric; did you mean 'mAP'?"),
        (TABLE_TARGETS, {"best_metric": "mae"}, "did you mean 'brightness.mae'?"),
        ("tags:tags", {"best_metric": "speed"}, "there are mAP, auroc"),
        ("class:colour", {"data__val_split": "test"}, "data.val_split is test, which is also trained or tested on"),
        ("class:colour", {"data__val_split": "train"}, "data.val_split is train, which is also trained or tested on"),
        ("class:colour", {"data__val_split": "1.5"}, "a fraction lies between 0 and 1"),
        ("class:colour", {"data__val_split": "0"}, "a fraction lies between 0 and 1"),
        ("class:colour", {"data__val_split": "-0.1"}, "a fraction lies between 0 and 1"),
        ("class:colour", {"data__val_split": "nan"}, "a fraction lies between 0 and 1"),
        ("class:colour", {"data__val_split": "other"}, "no row has the split 'other'"),
        ("class:colour", {"data__val_split": "0.001"}, "leaves no image to hold out"),
        ("class:color", {}, "there is no column 'color'"),
        ("klass:colour", {}, "did you mean 'class'?"),
        ("class:color", {"data__eval_split": "other"}, "did you mean 'colour'? (--config.targets); no row has"),
    ],
)
def test_contradictions_are_refused_before_training(
    fails: Callable[..., str], table: Path, tmp_path: Path, targets: str, changes: dict[str, str], expected: str
) -> None:
    arguments = [f"--config.{key}={value}" for key, value in table_changes(table, targets, **changes).items()]
    line = fails("-m", "jaxft.train", "--config=quickstart", *arguments, "--workdir", tmp_path / "run")
    assert expected in line and len(line) <= MESSAGE_LENGTH
    assert not (tmp_path / "run").exists()


def test_all_contradictions_are_in_one_error(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = {"best_metric": "acc", "data__val_split": "2", "data__eval_split": "other", "augment__mixup": "0.1"}
    with pytest.raises(UserError) as caught:
        check_labels(table_config(table, "class:color, number:brightness", **changes))
    expected = [
        "no target has the metric 'acc'",
        "labels that are numbers cannot be mixed",
        "data.val_split is 2; a fraction lies between 0 and 1",
        "there is no column 'color', did you mean 'colour'?",
        "no row has the split 'other'",
    ]
    lines = capsys.readouterr().err.splitlines()  # since the error's line is cut
    assert len(lines) == len(expected)
    for part, line in zip(expected, lines, strict=True):
        assert part in str(caught.value) and part in line
