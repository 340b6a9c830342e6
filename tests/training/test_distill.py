"""Compares distillation with torch's divergence, and a student with its teacher."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from jaxft.data import datasets
from jaxft.data.batches import Examples, make_batches
from jaxft.models.policy import Policy
from jaxft.models.resnet import BasicBlock, ResNet
from jaxft.targets.classification import ClassTarget
from jaxft.training.distill import Distillation
from jaxft.training.restore import load_checkpoint
from jaxft.training.state import create_train_state
from jaxft.training.steps import StepConfig, train_step
from jaxft.transforms.augment import Augmentation
from jaxft.transforms.preprocessing import Preprocessing
from tests.helpers.reference import torch
from tests.helpers.runs import TINY, Run, metrics

PREPROCESSING = Preprocessing(24, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_divergence_is_torchs(temperature: float) -> None:
    rng = np.random.default_rng(0)
    own, taught = rng.normal(0, 3, (2, 7, 5))
    with jax.enable_x64(True):
        found = np.asarray(ClassTarget().distillation_loss(jnp.asarray(own), jnp.asarray(taught), temperature))
    soft, target = (torch.log_softmax(torch.from_numpy(logits) / temperature, 1) for logits in (own, taught))
    expected = torch.nn.functional.kl_div(soft, target, reduction="none", log_target=True).sum(1) * temperature**2
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def step_with(weight: float, teacher: Any) -> Any:
    """Returns the parameters after a step on two devices, with a last batch that is not full."""
    sample = datasets.load("sample:cifar10", "train")
    model = ResNet(BasicBlock, (1,), num_classes=10, width=4, stem="small", formulation="cpu")
    tx = optax.sgd(0.1)
    state = jax.jit(partial(create_train_state, model, tx))(jax.random.key(0))
    distillation = Distillation(model.clone(width=8), Policy(), PREPROCESSING, weight, temperature=2.0)
    config = StepConfig(
        model,
        tx,
        PREPROCESSING._replace(image_size=16),
        Policy(batch_norm="sync"),
        augmentation=Augmentation(flip=True, mixup=0.3),
        distillation=distillation if weight else None,
    )
    p_step = jax.pmap(
        partial(train_step, config=config), axis_name="batch", in_axes=(None, None, 0, None), out_axes=None
    )
    (batch,) = make_batches(np.arange(13), 16, 2)
    return jax.device_get(p_step(state, Examples(sample.image, sample.label), batch, teacher))[0].params


@pytest.mark.slow
def test_a_step_mixes_what_labels_and_teacher_say() -> None:
    """Gradients add up: half of the teacher's weight moves the parameters half of the way."""
    teacher = ResNet(BasicBlock, (1,), num_classes=10, width=8, stem="small")
    variables = jax.jit(partial(teacher.init, train=False))(jax.random.key(1), jnp.zeros((1, 24, 24, 3)))
    none, half, whole = (step_with(weight, variables) for weight in (0.0, 0.5, 1.0))
    moved = 0.0
    for a, b, c in zip(*map(jax.tree.leaves, (none, half, whole)), strict=True):
        np.testing.assert_allclose(b, (a + c) / 2, rtol=1e-4, atol=1e-6)
        moved = max(moved, float(np.abs(a - c).max()))
    assert moved > 1e-3


@pytest.mark.slow
def test_a_student_learns_its_teacher(run: Run, fails: Callable[..., str], small_run: Path, tmp_path: Path) -> None:
    arguments = [argument for argument in TINY if "mixup" not in argument]
    teacher = f"--config.distill.teacher={small_run}"
    agreement = []
    for weight in (0, 1):
        workdir = tmp_path / str(weight)
        result = run(*arguments, teacher, f"--config.distill.weight={weight}", "--workdir", workdir)
        assert result.returncode == 0, result.stderr
        with np.load(workdir / "evaluation.npz") as mine, np.load(small_run / "evaluation.npz") as theirs:
            agreement.append((mine["predicted"] == theirs["predicted"]).mean())
    assert agreement[1] > agreement[0] + 0.03
    best = load_checkpoint(small_run, "best").step
    assert load_checkpoint(workdir, "latest").info["teacher_checkpoint"] == str(best)
    assert f"teacher  checkpoint {best} of {small_run}" in result.stdout
    other = f"--config.data.name=folder:{_two_classes(tmp_path)}"
    assert "trained on other classes" in fails(*TINY, teacher, other, "--workdir", tmp_path / "other")
    assert not (tmp_path / "other").exists()
    assert "there is no checkpoint" in fails(*TINY, "--config.distill.teacher=nowhere", "--workdir", tmp_path / "x")
    assert len(metrics(workdir)) == 45


def _two_classes(folder: Path) -> Path:
    for name in ("train/a", "train/b", "test/a", "test/b"):
        (folder / "pictures" / name).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(folder / "pictures" / name / "0.png")
    return folder / "pictures"
