"""Compares the loss of several targets with torch's, on one device and on eight, and tests the names of metrics."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.config import default_config
from jaxft.data.fields import Field
from jaxft.errors import UserError
from jaxft.targets import joint
from jaxft.targets.classification import ClassTarget
from jaxft.targets.number import NumberTarget
from jaxft.targets.tags import TagsTarget
from tests.helpers.joint_loss import CLASS, NUMBER, TAGS, TARGETS, joint_loss, random_labels
from tests.helpers.reference import torch

NUM_IMAGES = 32

pytestmark = pytest.mark.usefixtures("compile_quickly")


def random_logits(num_images: int = NUM_IMAGES) -> np.ndarray:
    return np.random.default_rng(1).normal(0, 2, (num_images, 10))


@partial(jax.jit, static_argnums=0)
def loss_and_gradient(targets: joint.Targets, logits: Any, labels: Any, mask: Any) -> tuple[jax.Array, jax.Array]:
    return jax.value_and_grad(lambda logits: joint.mean_loss(targets, logits, labels, mask, None))(logits)


def one_device(
    label: Any, mask: np.ndarray, logits: np.ndarray, targets: joint.Targets = TARGETS
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the loss and the gradient in float64."""
    with jax.enable_x64(True):
        return jax.device_get(loss_and_gradient(targets, logits, [(label, np.ones(len(mask)))], mask * 1.0))


def test_the_loss_is_the_weighted_sum_of_torchs() -> None:
    """Only images whose mask is 1 count; the others have labels too."""
    logits, label = random_logits(), random_labels(NUM_IMAGES)
    mask = np.arange(NUM_IMAGES) < 27
    loss, gradient = one_device(label, mask, logits)
    theirs: Any = torch.from_numpy(logits).requires_grad_()
    expected = joint_loss(theirs[:27], {name: array[:27] for name, array in label.items()})
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    np.testing.assert_allclose(gradient, theirs.grad, rtol=1e-10, atol=1e-15)


def test_mixed_labels_count_by_their_shares() -> None:
    """Compares classes and tags with torch's losses of each image; one label of a pair may be missing."""
    targets, logits = (CLASS, TAGS), random_logits()[:, :9]
    pair = [random_labels(NUM_IMAGES, seed) for seed in (0, 1)]
    share = np.random.default_rng(2).random(NUM_IMAGES)
    shares = (share, 1 - share)
    with jax.enable_x64(True):
        labels = [({k: label[k] for k in ("species", "tags")}, s) for label, s in zip(pair, shares, strict=True)]
        loss, gradient = jax.device_get(loss_and_gradient(targets, logits, labels, np.ones(NUM_IMAGES)))
    theirs: Any = torch.from_numpy(logits).requires_grad_()
    weights, pos_weight = (torch.tensor(t, dtype=torch.float64) for t in (CLASS.class_weights, TAGS.positive_weights))
    losses: Any = ([], [])  # of each target: of one label of the pair, then of the other
    counts: Any = ([], [])
    for label, part in zip(pair, map(torch.from_numpy, shares), strict=True):
        classes = torch.from_numpy(label["species"]).long()
        smoothing = CLASS.label_smoothing
        own = torch.nn.functional.cross_entropy(
            theirs[:, :4], classes, weights, ignore_index=-1, reduction="none", label_smoothing=smoothing
        )
        losses[0].append((own * part).sum())
        counts[0].append((weights[classes] * (classes >= 0) * part).sum())
        known = torch.from_numpy(label["tags"]) >= 0
        goal = torch.from_numpy(label["tags"]).clamp(0).double() * (1 - smoothing) + smoothing / 2
        own = torch.nn.functional.binary_cross_entropy_with_logits(
            theirs[:, 4:], goal, reduction="none", pos_weight=pos_weight
        )
        losses[1].append((own * known * part[:, None]).sum())
        counts[1].append((known * part[:, None]).sum())
    expected: Any = 2.0 * sum(losses[0]) / sum(counts[0]) + 0.5 * sum(losses[1]) / sum(counts[1])
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    np.testing.assert_allclose(gradient, theirs.grad, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.field.kind)
def test_a_target_without_any_label_in_a_batch_adds_nothing(target: joint.Target) -> None:
    logits, label, mask = random_logits(), random_labels(NUM_IMAGES), np.ones(NUM_IMAGES)
    name = target.field.name
    loss, gradient = one_device(
        label | {name: np.full_like(label[name], np.nan if name == "age" else -1)}, mask, logits
    )
    rest = tuple(other for other in TARGETS if other is not target)
    kept = np.concatenate([np.full(t.field.num_outputs, t is not target) for t in TARGETS])
    expected_loss, expected = one_device(label, mask, logits[:, kept], rest)
    assert loss == pytest.approx(expected_loss, rel=1e-14)
    np.testing.assert_allclose(gradient[:, kept], expected, rtol=1e-14)
    assert not gradient[:, ~kept].any()


def test_a_batch_without_any_label_has_a_loss_of_0() -> None:
    label = {"species": np.full(4, -1), "tags": np.full((4, 5), -1), "age": np.full(4, np.nan)}
    loss, gradient = one_device(label, np.ones(4), random_logits(4))
    assert loss == 0 and not gradient.any()


def test_eight_devices_have_the_loss_of_one() -> None:
    """All labels of a target are on few devices, and the last device has only padding."""
    logits, label = random_logits(), random_labels(NUM_IMAGES)
    label["species"][8:] = -1
    label["tags"][:20] = -1
    label["age"][4:] = np.nan
    mask = np.arange(NUM_IMAGES) < 26
    loss, gradient = one_device(label, mask, logits)

    def share_of_loss(logits: jax.Array, label: Any, mask: jax.Array) -> jax.Array:
        return joint.mean_loss(TARGETS, logits, [(label, jnp.ones_like(mask))], mask, "batch")

    with jax.enable_x64(True):
        arrays = jax.tree.map(lambda array: array.reshape(8, 4, *array.shape[1:]), (logits, label, mask * 1.0))
        losses, gradients = jax.device_get(jax.pmap(jax.value_and_grad(share_of_loss), axis_name="batch")(*arrays))
    assert losses.sum() == pytest.approx(loss, rel=1e-13)
    np.testing.assert_allclose(gradients.reshape(gradient.shape), gradient, rtol=1e-12, atol=1e-16)


def test_the_distance_from_a_teacher_is_the_weighted_sum() -> None:
    """The weight of a single target counts too, as in the loss of its labels."""
    own, taught = np.random.default_rng(0).normal(size=(2, 6, 10))

    def distance(function: Any, *columns: int) -> np.ndarray:
        with jax.enable_x64(True):
            return jax.device_get(jax.jit(function)(own[:, slice(*columns)], taught[:, slice(*columns)], 2.0))

    found = distance(partial(joint.distillation_loss, TARGETS), 10)
    parts = [
        weight * distance(target.distillation_loss, *columns)
        for target, weight, *columns in ((CLASS, 2.0, 0, 4), (TAGS, 0.5, 4, 9), (NUMBER, 0.25, 9, 10))
    ]
    np.testing.assert_allclose(found, sum(parts), rtol=1e-13)
    np.testing.assert_allclose(distance(partial(joint.distillation_loss, (TAGS,)), 4, 9), parts[1], rtol=1e-13)


def test_a_row_of_metrics_has_the_weighted_loss_and_each() -> None:
    logits, label = random_logits(), random_labels(NUM_IMAGES)
    plain = tuple(type(target)(target.field) for target in TARGETS)
    values = joint.losses_of(TARGETS, joint.count_on_host(TARGETS, joint.JointPredictions(logits, label)))
    loss, _ = one_device(label, np.ones(NUM_IMAGES), logits, plain)
    assert values["loss"] == pytest.approx(loss, rel=1e-5)  # without smoothing and balancing
    assert values["loss"] == pytest.approx(
        2 * values["species.loss"] + values["tags.loss"] / 2 + values["age.loss"] / 4, rel=1e-6
    )
    for target, own, own_label in joint.each(plain, logits, label):
        loss_of_one, _ = one_device(own_label, np.ones(NUM_IMAGES), own, (target,))
        assert values[f"{target.field.name}.loss"] * target.field.weight == pytest.approx(loss_of_one, rel=1e-5)
    assert set(joint.losses_of((TAGS,), joint.JointCounts(np.array(1), {"tags": TAGS_COUNTS}))) == {"loss"}


TAGS_COUNTS = joint.Counts(np.array(2.0), np.array(1), np.array(4))


@pytest.mark.parametrize(
    ("targets", "name", "expected"),
    [
        (TARGETS, "", "species.accuracy"),
        ((TAGS, NUMBER), "", "tags.mAP"),
        ((NUMBER,), "", "mae"),
        ((TAGS,), "exact_match", "exact_match"),
        (TARGETS, "age.rmse", "age.rmse"),
        (joint.ONE_CLASS, "f1_macro", "f1_macro"),
    ],
)
def test_the_metric_that_chooses_the_best_checkpoint(targets: joint.Targets, name: str, expected: str) -> None:
    assert joint.find_metric(targets, name) == expected


@pytest.mark.parametrize(
    ("targets", "name", "hint"),
    [
        (TARGETS, "tags.map", "did you mean 'tags.mAP'?"),
        (TARGETS, "mAP", "did you mean 'tags.mAP'?"),
        (TARGETS, "species.map", "did you mean 'species.mAP'?"),
        ((NUMBER, TAGS), "mAP", "did you mean 'tags.mAP'?"),
        ((NUMBER,), "age.mae", "did you mean 'mae'?"),
        ((NUMBER,), "x", "there are mae, rmse, r2"),
        ((TAGS,), "f1", "did you mean 'f1_macro'?"),
        (TARGETS, "tags.f1", "did you mean 'tags.f1_macro'?"),
    ],
)
def test_an_unknown_metric_is_refused(targets: joint.Targets, name: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        joint.find_metric(targets, name)
    assert f"no target has the metric '{name}' of best_metric; " in str(caught.value)
    assert hint in str(caught.value)


@pytest.mark.parametrize(
    ("metric", "sign"), [("accuracy", 1), ("tags.mAP", 1), ("r2", 1), ("mae", -1), ("age.rmse", -1), ("a.log_loss", -1)]
)
def test_the_highest_score_is_the_best(metric: str, sign: int) -> None:
    score = joint.score_of(metric, {metric: 0.25})
    assert score == sign * 0.25
    assert joint.value_of_score(metric, score) == 0.25
    assert joint.score_of(metric, {}) is None


def test_a_checkpoints_info_gives_its_targets() -> None:
    fields = [target.field for target in TARGETS]
    info = {"targets": [field._asdict() for field in fields], "class_names": [], "config": default_config().to_dict()}
    assert joint.targets_of(info) == tuple(type(target)(target.field) for target in TARGETS)
    (one,) = joint.targets_of({"class_names": ["a", "b"]})
    assert isinstance(one, ClassTarget) and one.field.names == ("a", "b")
    assert joint.count_outputs(TARGETS) == 10 and hash(TARGETS)


def test_heads_are_exchanged_only_if_their_outputs_mean_the_same() -> None:
    def outputs(*targets: joint.Target) -> Any:
        return joint.outputs_of(targets)

    assert outputs(TAGS) == outputs(TagsTarget(TAGS.field._replace(weight=9.0, column="other")))
    assert outputs(CLASS) == outputs(ClassTarget(CLASS.field._replace(name="other", column="other")))
    assert outputs(TAGS) != outputs(TagsTarget(TAGS.field._replace(names=tuple("pqrsu"))))
    assert outputs(TAGS) != outputs(ClassTarget(TAGS.field._replace(kind="class")))
    assert outputs(NUMBER) != outputs(NumberTarget(Field("number", "age", "age", mean=40.0, std=13.0)))
    assert outputs(CLASS, NUMBER) != outputs(NUMBER, CLASS)
