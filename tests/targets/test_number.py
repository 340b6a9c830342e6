"""Compares the losses of numbers with torch's, and their scores in the unit with scikit-learn's."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st

from jaxft.data.fields import Field
from jaxft.targets.number import NumberTarget
from tests.helpers.reference import torch

pytestmark = pytest.mark.usefixtures("compile_quickly")

FIELD = Field("number", "age", "age", mean=40.0, std=12.0)


def examples(num_images: int = 30) -> tuple[np.ndarray, np.ndarray]:
    """Returns logits, float64 (N, 1), and standardised labels, float32 (N,); every third is missing."""
    rng = np.random.default_rng(0)
    label = rng.normal(size=num_images).astype(np.float32)
    label[::3] = np.nan
    return rng.normal(size=(num_images, 1)), label


def test_the_loss_is_torchs() -> None:
    """Compares the mean over the images with a label, and its gradient."""
    logits, label = examples()

    def mean(logits: jax.Array) -> jax.Array:
        losses, counted = NumberTarget(FIELD).loss(logits, jnp.asarray(label))
        return losses.sum() / counted.sum()

    with jax.enable_x64(True):
        loss, gradient = jax.device_get(jax.jit(jax.value_and_grad(mean))(logits))
    theirs: Any = torch.from_numpy(logits).requires_grad_()
    known = ~np.isnan(label)
    expected = torch.nn.functional.mse_loss(theirs[known, 0], torch.from_numpy(label[known].astype(np.float64)))
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    np.testing.assert_allclose(gradient, theirs.grad, rtol=1e-12)


def test_images_without_a_label_have_no_loss_and_no_gradient() -> None:
    label = jnp.full(4, jnp.nan)
    (losses, counted), back = jax.vjp(lambda logits: NumberTarget(FIELD).loss(logits, label), jnp.ones((4, 1)))
    (gradient,) = back((jnp.ones(4), jnp.ones(4)))
    assert not losses.any() and not counted.any() and not gradient.any()


def test_the_distance_from_a_teacher_is_the_squared_difference() -> None:
    own, taught = np.random.default_rng(0).normal(size=(2, 7, 1))
    with jax.enable_x64(True):
        found = NumberTarget(FIELD).distillation_loss(jnp.asarray(own), jnp.asarray(taught), temperature=4.0)
    np.testing.assert_allclose(found, (own - taught)[:, 0] ** 2, rtol=1e-14)


def test_known_numbers_of_images_in_the_mask_are_counted() -> None:
    logits, label = examples()
    mask = np.arange(30) % 2
    with jax.enable_x64(True):
        counts = jax.device_get(NumberTarget(FIELD).count_batch(jnp.asarray(logits), label, mask * 1.0))
    known = ~np.isnan(label) & (mask > 0)
    assert (int(counts.num_images), int(counts.correct)) == (known.sum(), 0)
    assert counts.loss == pytest.approx(((logits[known, 0] - label[known]) ** 2).sum(), rel=1e-12)


def test_scores_and_display_are_in_the_unit_of_the_labels() -> None:
    logits, label = examples()
    target, known = NumberTarget(FIELD), ~np.isnan(label)
    value, predicted = (12.0 * array[known].astype(np.float64) + 40 for array in (label, logits[:, 0]))
    scores = target.scores(logits, label, {})
    assert scores["mae"] == pytest.approx(sklearn.metrics.mean_absolute_error(value, predicted), rel=1e-12)
    assert scores["rmse"] == pytest.approx(sklearn.metrics.root_mean_squared_error(value, predicted), rel=1e-12)
    assert scores["r2"] == pytest.approx(sklearn.metrics.r2_score(value, predicted), rel=1e-12)
    assert target.details(logits, label, {})["num_images"] == known.sum()
    prediction = target.prediction(target.outputs(logits, {})[1], {}, top_k=5)
    assert prediction.to_json() == {"value": pytest.approx(12 * logits[1, 0] + 40)}
    assert str(target.prediction(np.array(1234.567), {}, 5)) == "1235"


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.floats(-5, 5))
def test_a_value_survives_standardisation(mean: float, std: float, standardised: float) -> None:
    target = NumberTarget(FIELD._replace(mean=mean, std=std))
    label = np.array([standardised], np.float32)
    expected = mean + std * np.float64(label[0])
    assert target.values(label)[0] == pytest.approx(expected, rel=1e-12, abs=1e-12)
    np.testing.assert_array_equal(target.outputs(label[:, None], {}), target.values(label))


def test_values_on_the_device_are_those_on_the_host() -> None:
    logits, _ = examples()
    traced = jax.jit(lambda logits: NumberTarget(FIELD).outputs(logits, {}))(logits.astype(np.float32))
    np.testing.assert_allclose(traced, NumberTarget(FIELD).outputs(logits, {}), rtol=1e-6)
