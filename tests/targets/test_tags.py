"""Compares the losses of tags with torch's, and their counts and display with sums by hand."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.data.fields import Field
from jaxft.targets.tags import TagsTarget, balanced_tag_weights
from tests.helpers.reference import torch

pytestmark = pytest.mark.usefixtures("compile_quickly")

FIELD = Field("tags", "tags", "tags", names=("cat", "dog", "owl"))
POSITIVE_WEIGHTS = (0.5, 1.0, 3.0)  # exact in float32


def examples(num_images: int = 30) -> tuple[np.ndarray, np.ndarray]:
    """Returns logits, float64 (N, 3), and labels, int8 (N, 3): a third is missing, and the first image has none."""
    rng = np.random.default_rng(0)
    label = rng.integers(-1, 2, (num_images, 3)).astype(np.int8)
    label[0] = -1
    return rng.normal(0, 5, (num_images, 3)), label


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [(), POSITIVE_WEIGHTS])
def test_the_loss_is_torchs(smoothing: float, weights: tuple[float, ...]) -> None:
    """Compares the mean over the known tags, and its gradient."""
    logits, label = examples()
    target = TagsTarget(FIELD, smoothing, weights)

    def mean(logits: jax.Array) -> jax.Array:
        losses, counted = target.loss(logits, jnp.asarray(label))
        return losses.sum() / counted.sum()

    with jax.enable_x64(True):
        loss, gradient = jax.device_get(jax.jit(jax.value_and_grad(mean))(logits))
    theirs: Any = torch.from_numpy(logits).requires_grad_()
    known = torch.from_numpy(label >= 0)
    pos_weight = torch.tensor(weights or (1.0,) * 3, dtype=torch.float64).expand(len(label), 3)[known]
    goal = torch.from_numpy(label.astype(np.float64))[known] * (1 - smoothing) + smoothing / 2
    expected = torch.nn.functional.binary_cross_entropy_with_logits(theirs[known], goal, pos_weight=pos_weight)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    np.testing.assert_allclose(gradient, theirs.grad, rtol=1e-10, atol=1e-15)


def test_logits_of_any_size_have_a_finite_loss_and_gradient() -> None:
    logits, label = jnp.array([[1e4, -1e4, 0.0]] * 3), jnp.array([[1, 0, 1], [0, 1, 0], [-1, -1, -1]], jnp.int8)
    losses, back, counted = jax.jit(
        lambda x: jax.vjp(lambda x: TagsTarget(FIELD, 0.1).loss(x, label), x, has_aux=True)
    )(logits)
    assert np.isfinite(losses).all() and counted.tolist() == [3, 3, 0] and losses[2] == 0
    (gradient,) = back(jnp.ones(3))
    assert np.isfinite(gradient).all() and not gradient[2].any()


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_distance_from_a_teacher_is_torchs(temperature: float) -> None:
    """Compares it with the mean over tags of the divergences of Bernoulli distributions."""
    own, taught = np.random.default_rng(0).normal(0, 3, (2, 7, 3))
    with jax.enable_x64(True):
        found = jax.jit(TagsTarget(FIELD).distillation_loss)(own, taught, temperature)
    student, teacher = (torch.distributions.Bernoulli(logits=torch.from_numpy(x) / temperature) for x in (own, taught))
    expected = torch.distributions.kl_divergence(teacher, student).mean(1) * temperature**2
    np.testing.assert_allclose(found, expected, rtol=1e-11)


def test_a_teacher_is_at_no_distance_from_itself() -> None:
    logits = jnp.array([[200.0, -200.0, 0.3]])
    distance_from = jax.value_and_grad(lambda own: TagsTarget(FIELD).distillation_loss(own, logits, 1.0).sum())
    distance, gradient = jax.jit(distance_from)(logits)
    assert distance == 0 and np.abs(gradient).max() < 1e-6


def test_known_tags_of_images_in_the_mask_are_counted() -> None:
    logits, label = examples()
    mask = np.arange(30) % 3 > 0
    with jax.enable_x64(True):
        counts = jax.device_get(TagsTarget(FIELD, 0.1, POSITIVE_WEIGHTS).count_batch(logits, label, mask * 1.0))
    known = (label >= 0) & mask[:, None]
    right = (logits[known] > 0) == (label[known] > 0)
    plain = np.where(label[known] > 0, np.logaddexp(0, -logits[known]), np.logaddexp(0, logits[known]))
    assert (int(counts.num_images), int(counts.correct)) == (known.sum(), right.sum())
    assert counts.loss == pytest.approx(plain.sum(), rel=1e-12)


def test_balanced_weights_are_negatives_per_positive() -> None:
    label = np.array([[1, 0, -1], [0, 0, 1], [0, 0, 1], [0, -1, -1]], np.int8)
    assert balanced_tag_weights(label) == (3.0, 3.0, 0.5)  # at least one of each is assumed


def test_predictions_for_display() -> None:
    target, output = TagsTarget(FIELD), np.array([0.5, 0.2, 0.9])
    found = target.prediction(output, {}, top_k=1)
    assert found.tags == ("owl", "cat") and str(found) == "owl 90.0%, cat 50.0%"
    fitted = target.prediction(output, {"temperature": 2.0, "thresholds": [0.6, 0.1, 0.95]}, top_k=1)
    assert fitted.tags == ("dog",)
    none = target.prediction(output, {"thresholds": [1.0, 1.0, 1.0]}, top_k=1)
    assert str(none) == "no tag"
    expected = {"tags": ["dog"], "probabilities": {"owl": 0.9, "cat": 0.5, "dog": 0.2}}
    assert json.loads(json.dumps(fitted.to_json())) == expected


def test_probabilities_on_the_host_and_on_the_device_agree() -> None:
    logits, _ = examples()
    calibration = {"temperature": 1.7}
    expected = torch.sigmoid(torch.from_numpy(logits) / 1.7)
    np.testing.assert_allclose(TagsTarget(FIELD).outputs(logits, calibration), expected, rtol=1e-13)
    with jax.enable_x64(True):
        found = jax.jit(lambda x: TagsTarget(FIELD).outputs(x, calibration))(jnp.asarray(logits))
    np.testing.assert_allclose(found, expected, rtol=1e-13)
