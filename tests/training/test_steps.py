"""Compares train and evaluation steps with torch, and with other ways of sharing the work among devices."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft.config import default_config, load_config
from jaxft.data import datasets
from jaxft.data.batches import Batch, Examples, epoch_order, make_batches
from jaxft.data.loader import ResidentLoader
from jaxft.models.partition import make_policy
from jaxft.models.policy import BatchNormMode, Policy
from jaxft.models.resnet import BasicBlock, ResNet
from jaxft.ops.formulation import Formulation
from jaxft.pretrained.convert import from_torch
from jaxft.targets.classification import Counts, count_predictions, cross_entropy
from jaxft.train import train_and_evaluate
from jaxft.training.evaluation import evaluate_images, extract_features, pmap_eval_steps, recalibrate
from jaxft.training.optimizer import make_optimizer
from jaxft.training.state import TrainState, create_train_state
from jaxft.training.steps import EvalConfig, StepConfig, train_step, train_steps
from jaxft.training.steps_per_call import StepsPerCall
from jaxft.transforms.augment import Augmentation
from jaxft.transforms.preprocessing import Preprocessing, preprocess
from tests.helpers.devices import replicate_on
from tests.helpers.reference import torch
from tests.helpers.torch_models import flax_model, random_torch_model, to_flax

PREPROCESSING = Preprocessing(64, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


def torch_input(image: np.ndarray) -> torch.Tensor:
    """Returns in float64 the very pixels that the steps see; test_preprocessing.py tests these."""
    array = np.asarray(jax.jit(preprocess, static_argnums=1)(image, PREPROCESSING), np.float64)
    return torch.from_numpy(array.transpose(0, 3, 1, 2).copy())


SMALL = ResNet(BasicBlock, (1,), num_classes=10, width=8, formulation="cpu")


def random_state(model: ResNet, tx: Any, policy: Policy = Policy(), *, ema: bool = False) -> TrainState:  # noqa: B008
    return jax.jit(partial(create_train_state, model, tx, policy=policy, ema=ema))(jax.random.key(0))


def is_trace(node: Any) -> bool:
    return isinstance(node, optax.TraceState)


def pmap_step(config: StepConfig) -> Any:
    return jax.pmap(partial(train_step, config=config), axis_name="batch", in_axes=(None, None, 0), out_axes=None)


def sgd_steps(
    state: TrainState, examples: Examples, batches: list[Batch], config: StepConfig
) -> tuple[TrainState, list[Counts]]:
    p_step = pmap_step(config)
    state = replicate_on(len(batches[0].mask), state)
    counts = []
    for batch in batches:
        state, count = p_step(state, examples, batch)
        counts.append(count)
    return state, counts


@pytest.mark.parametrize(
    ("arch", "nesterov"),
    [
        ("basic", True),
        pytest.param("resnet18", True, marks=pytest.mark.slow),
        pytest.param("resnet18", False, marks=pytest.mark.slow),
    ],
)
def test_ten_steps_with_a_smaller_last_batch_are_torchs(arch: str, nesterov: bool) -> None:
    """In float64: 75 images in batches of 8, the last of 3; parameters, momentum and running statistics."""
    reference = random_torch_model(arch).train()
    sample = datasets.load("sample:cifar10", "train")
    order = epoch_order(0, 1, 2000)[:75]
    with jax.enable_x64(True):
        model = flax_model(arch, dtype=jnp.float64, formulation="cpu")
        config = default_config().optimizer
        config.update(learning_rate=2**-7, momentum=0.9, weight_decay=1e-4, nesterov=nesterov)  # 2^-7 is exact
        tx = make_optimizer(config, steps_per_epoch=10, num_epochs=1, parts=ResNet.parts)
        state_dict = {key: value.numpy().copy() for key, value in reference.state_dict().items()}
        variables = from_torch(state_dict, model)
        params, batch_stats = variables["params"], variables["batch_stats"]
        state = TrainState(jnp.int32(0), params, batch_stats, tx.init(params))
        examples = Examples.packed(sample.image, sample.label)
        batches = list(make_batches(order, 8, 1))
        state, counts = sgd_steps(state, examples, batches, StepConfig(model, tx, PREPROCESSING))

        sgd = torch.optim.SGD(reference.parameters(), 2**-7, momentum=0.9, weight_decay=1e-4, nesterov=nesterov)
        for i, start in enumerate(range(0, 75, 8)):
            index = order[start : start + 8]
            sgd.zero_grad()
            loss = torch.nn.functional.cross_entropy(
                reference(torch_input(sample.image[index])), torch.from_numpy(sample.label[index]).long()
            )
            loss.backward()
            sgd.step()
            assert float(counts[i].loss / counts[i].num_images) == pytest.approx(loss.item(), rel=1e-9)
            assert int(counts[i].num_images) == len(index)
        expected = from_torch({k: v.numpy() for k, v in reference.state_dict().items()}, model)
        buffers = {
            name: sgd.state[parameter]["momentum_buffer"].numpy() for name, parameter in reference.named_parameters()
        }
        momentum = from_torch({k: v.numpy() for k, v in reference.state_dict().items()} | buffers, model)["params"]
    (trace,) = [part.trace for part in jax.tree.leaves(state.opt_state, is_leaf=is_trace) if is_trace(part)]
    for ours, theirs in (
        (state.params, expected["params"]),
        (state.batch_stats, expected["batch_stats"]),
        (trace, momentum),
    ):
        difference = jax.tree.map(lambda a, b: np.sum((np.asarray(a) - b) ** 2), ours, theirs)
        norm = jax.tree.map(lambda b: np.sum(b**2), theirs)
        assert sum(jax.tree.leaves(difference)) ** 0.5 <= 1e-8 * sum(jax.tree.leaves(norm)) ** 0.5
    assert int(state.step) == 10


@pytest.mark.parametrize(
    ("batch_norm", "formulation"),
    [("sync", "cpu"), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("sync", "tpu"), ("frozen", "cpu")))],
)
def test_eight_devices_take_the_steps_of_one(batch_norm: BatchNormMode, formulation: Formulation) -> None:
    """In float64, with a last batch that leaves one device without images and another with fewer than the rest."""
    sample = datasets.load("sample:cifar10", "train")
    examples = Examples(sample.image, sample.label)
    order = epoch_order(0, 1, 2000)[:86]  # 32, 32 and 22: shares of 4, 4, 4, 4, 4, 2, 0, 0
    with jax.enable_x64(True):
        model = SMALL.clone(formulation=formulation, dtype=jnp.float64)
        tx = optax.sgd(0.05, momentum=0.9)
        config = StepConfig(model, tx, PREPROCESSING, Policy(batch_norm=batch_norm))
        state = random_state(model, tx)
        state = jax.tree.map(lambda a: a.astype(jnp.float64) if a.dtype == jnp.float32 else a, state)
        one, counts_one = sgd_steps(state, examples, list(make_batches(order, 32, 1)), config)
        eight, counts_eight = sgd_steps(state, examples, list(make_batches(order, 32, 8)), config)
    np.testing.assert_allclose([c.loss for c in counts_eight], [c.loss for c in counts_one], rtol=1e-9)
    np.testing.assert_array_equal([c.correct for c in counts_eight], [c.correct for c in counts_one])
    np.testing.assert_array_equal([c.num_images for c in counts_eight], [32, 32, 22])
    for a, b in zip(jax.tree.leaves(eight), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9)
    if batch_norm == "frozen":
        assert all(
            np.array_equal(a, b)
            for a, b in zip(jax.tree.leaves(eight.batch_stats), jax.tree.leaves(state.batch_stats), strict=True)
        )


@pytest.mark.slow
@pytest.mark.parametrize("padded", [True, False])
def test_steps_in_one_call_are_the_steps_of_several(padded: bool) -> None:
    """Bit for bit, on two devices, with augmentation, in loops of traced or static length."""
    sample = datasets.load("sample:cifar10", "test")
    model = ResNet(BasicBlock, (1, 1), num_classes=10, width=4, formulation="cpu")
    tx = make_optimizer(default_config().optimizer, steps_per_epoch=10, num_epochs=1, parts=ResNet.parts)
    config = StepConfig(model, tx, PREPROCESSING, Policy(batch_norm="sync"), augmentation=Augmentation(flip=True))
    devices = jax.local_devices()[:2]
    p_steps = jax.pmap(
        partial(train_steps, step=partial(train_step, config=config)),
        axis_name="batch",
        in_axes=(None, None, 0, None, None),
        out_axes=None,
        devices=devices,
    )
    batches = list(make_batches(epoch_order(0, 1, 1000)[:93], 16, 2))
    results = []
    for per_call in (1, 2, 6):
        state, losses = random_state(model, tx), []
        for start in range(0, 6, per_call):
            padding = batches[:1] * (6 - per_call) if padded else []
            call = jax.tree.map(lambda *arrays: np.stack(arrays, 1), *batches[start : start + per_call], *padding)
            num_steps = np.int32(per_call) if padded else None
            state, counts = p_steps(state, Examples(sample.image, sample.label), call, None, num_steps)
            losses.append(np.asarray(counts.loss)[:per_call])
        results.append([np.concatenate(losses), *map(np.asarray, jax.tree.leaves(state))])
    for other in results[1:]:
        for mine, theirs in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("shape", [(32, 32, 3), (16, 8, 3), (5, 7, 3)])
def test_packed_examples_are_gathered_unchanged(shape: tuple[int, ...]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (9, *shape), np.uint8)
    index, label = np.array([8, 0, 3, 3]), np.zeros(9, np.int32)
    np.testing.assert_array_equal(jax.jit(Examples.gather)(Examples.packed(image, label), index), image[index])
    batches = Examples.packed(image.reshape(3, 3, *shape), label.reshape(3, 3))  # of three devices
    np.testing.assert_array_equal(jax.vmap(Examples.gather)(batches, np.array([[2], [0], [1]])), image[[[2], [3], [7]]])


def test_statistics_of_each_device_are_weighted_by_its_images() -> None:
    """Compared with torch's BatchNorm on each device's share: bn1, which only a convolution precedes."""
    sample = datasets.load("sample:cifar10", "train")
    order = np.arange(0, 2000, 91)[:22]
    shares = [order[start : start + 4] for start in range(0, 22, 4)]
    with jax.enable_x64(True):
        model = SMALL.clone(dtype=jnp.float64)
        tx = optax.sgd(0.0)
        state = random_state(model, tx)
        (batch,) = make_batches(order, 32, 8)
        new_state, _ = sgd_steps(
            state, Examples(sample.image, sample.label), [batch], StepConfig(model, tx, PREPROCESSING)
        )
        kernel = torch.from_numpy(np.array(state.params["conv1"]["kernel"], np.float64).transpose(3, 2, 0, 1).copy())
    expected: dict[str, Any] = {"running_mean": 0.0, "running_var": 0.0}
    for share in shares:
        norm = torch.nn.BatchNorm2d(8).double().train()
        norm(torch.nn.functional.conv2d(torch_input(sample.image[share]), kernel, stride=2, padding=3))
        for key in expected:
            expected[key] += norm.state_dict()[key].numpy() * len(share) / 22
    statistics = new_state.batch_stats["bn1"]
    np.testing.assert_allclose(statistics["mean"], expected["running_mean"], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(statistics["var"], expected["running_var"], rtol=1e-6)


@pytest.mark.parametrize("per_call", [1, 2, 3])
def test_evaluation_predicts_each_image_as_torch_does(per_call: int) -> None:
    reference = random_torch_model("basic", seed=1).float().eval()
    sample = datasets.load("sample:cifar10", "test")
    model = flax_model("basic", formulation="cpu")
    variables = to_flax(reference.state_dict(), model)
    state = TrainState(jnp.int32(0), variables["params"], variables["batch_stats"], ())
    order = np.arange(0, 1000, 13)  # 77 images; 27 in the last batch leave devices of 7 without any
    loader = ResidentLoader(Examples(sample.image[order], sample.label[order]))
    p_eval_steps = pmap_eval_steps(EvalConfig(model, PREPROCESSING))
    found = evaluate_images(p_eval_steps, state, loader, 50, StepsPerCall(per_call, padded=True))
    with torch.no_grad():
        logits = reference(torch_input(sample.image[order]).float())
    label = torch.from_numpy(sample.label[order]).long()
    confidence, predicted = logits.softmax(1).max(1)
    np.testing.assert_array_equal(found.label, label)
    np.testing.assert_array_equal(found.predicted, predicted)
    np.testing.assert_array_equal(found.rank, (logits.argsort(1, descending=True) == label[:, None]).int().argmax(1))
    np.testing.assert_allclose(found.confidence, confidence, rtol=1e-4)
    np.testing.assert_allclose(
        found.loss, torch.nn.functional.cross_entropy(logits, label, reduction="none"), rtol=1e-4
    )
    counts = count_predictions(found)
    assert (int(counts.num_images), int(counts.correct)) == (77, int((logits.argmax(1) == label).sum()))
    assert counts.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, label, reduction="sum").item(), 1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [(), (0.5, 2.0, 1.0)])
def test_cross_entropy_is_torchs(smoothing: float, weights: tuple[float, ...]) -> None:
    rng = np.random.default_rng(0)
    logits, label = rng.normal(size=(20, 3)), rng.integers(0, 3, 20)
    with jax.enable_x64(True):
        losses, counted = jax.device_get(cross_entropy(jnp.asarray(logits), jnp.asarray(label), smoothing, weights))
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits),
        torch.from_numpy(label),
        weight=torch.tensor(weights, dtype=torch.float64) if weights else None,
        label_smoothing=smoothing,
    )
    assert np.sum(losses) / np.sum(counted) == pytest.approx(expected.item(), rel=1e-12)


def small_step(devices: int, steps: int, **options: Any) -> list[TrainState]:
    """Returns the states after each of some steps in float32 on real images."""
    sample = datasets.load("sample:cifar10", "train")
    tx = optax.sgd(0.05, momentum=0.9)
    state = random_state(SMALL, tx, ema="ema_decay" in options)
    p_step = pmap_step(StepConfig(SMALL, tx, Preprocessing(32, *PREPROCESSING[1:]), **options))
    states = [replicate_on(devices, state)]
    for batch in list(make_batches(epoch_order(0, 1, 2000)[:70], 32, devices))[:steps]:
        states.append(p_step(states[-1], Examples(sample.image, sample.label), batch)[0])
    return states


@pytest.mark.slow
def test_mixed_images_are_the_same_on_one_device_and_on_four() -> None:
    """Also in a last batch that is not full: partners come from the whole batch, not from a device's share."""
    augmentation = Augmentation(flip=True, shift=0.1, mixup=0.5, cutmix=0.5, erase=0.3)
    policy = Policy(batch_norm="sync")
    one, four = (small_step(devices, 3, augmentation=augmentation, policy=policy)[-1] for devices in (1, 4))
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(four.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5)


def test_the_ema_is_what_numpy_averages() -> None:
    states = small_step(1, 2, ema_decay=0.5)
    mean = np.asarray(states[0].params["fc"]["kernel"])
    for i, state in enumerate(states[1:], 1):
        decay = min(0.5, (1 + i) / (10 + i))
        mean = decay * mean + (1 - decay) * np.asarray(state.params["fc"]["kernel"])
    np.testing.assert_allclose(states[-1].variables()["params"]["fc"]["kernel"], mean, rtol=1e-5)
    assert states[-1].variables()["params"] is not states[-1].params


def test_a_head_learns_the_same_from_features_as_from_images() -> None:
    config = default_config()
    config.optimizer.update(freeze="backbone", learning_rate=0.1)
    policy = make_policy(config, SMALL, 1)
    preprocessing = Preprocessing(32, *PREPROCESSING[1:])
    sample = datasets.load("sample:cifar10", "test")
    tx = make_optimizer(config.optimizer, 10, 1, ResNet.parts)
    state = random_state(SMALL, tx, policy)
    examples = Examples(sample.image[:90], sample.label[:90])
    features = extract_features(EvalConfig(SMALL, preprocessing), state, ResidentLoader(examples), 32)
    assert features.image.shape == (90, 8)
    step = pmap_step(StepConfig(SMALL, tx, preprocessing, policy))
    ends = []
    for data in (examples, features):
        end = replicate_on(1, state)
        for batch in make_batches(np.arange(90), 32, 1):
            end, counts = step(end, data, batch)
        ends.append((end, counts))
    (a, a_counts), (b, b_counts) = ends
    assert float(a_counts.loss) == pytest.approx(float(b_counts.loss), rel=1e-4)
    np.testing.assert_allclose(a.params["fc"]["kernel"], b.params["fc"]["kernel"], rtol=1e-3, atol=1e-5)


def test_recalibrated_statistics_are_those_of_torchs_update_bn() -> None:
    """With a last batch that is not full; frozen statistics stay."""
    reference = random_torch_model("basic").train()
    sample = datasets.load("sample:cifar10", "test")
    loader = ResidentLoader(Examples(sample.image[:40], sample.label[:40]))
    with jax.enable_x64(True):
        model = flax_model("basic", dtype=jnp.float64, formulation="cpu")
        variables = to_flax(reference.state_dict(), model)
        state = TrainState(jnp.int32(0), variables["params"], variables["batch_stats"], ())
        config = EvalConfig(model, PREPROCESSING)
        found = jax.device_get(recalibrate(config, state, loader, 16, StepsPerCall(2)))
        frozen = config._replace(policy=Policy(frozenset({"bn1/scale", "bn1/bias"})))
        kept = jax.device_get(recalibrate(frozen, state, loader, 16)).batch_stats
    torch_batches = [torch_input(sample.image[start : start + 16][: 40 - start]) for start in (0, 16, 32)]
    torch.optim.swa_utils.update_bn(torch_batches, reference)
    for name in ("bn1", "layer4.0.bn2"):
        ours: Any = found.batch_stats
        for part in name.split("."):
            ours = ours[part]
        theirs: Any = reference.get_submodule(name)
        for a, b in ((ours["mean"], theirs.running_mean.numpy()), (ours["var"], theirs.running_var.numpy())):
            assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(b)  # pixels are float32
    np.testing.assert_allclose(kept["bn1"]["mean"], variables["batch_stats"]["bn1"]["mean"], rtol=1e-15)


@pytest.mark.slow
def test_a_device_with_only_padding_does_no_harm(tmp_path: Path) -> None:
    """The last of 1,000 images in batches of 48 on eight devices are 40, in shares of 6: one device has none."""
    changes = {"batch_size": "48", "image_size": "16", "num_epochs": "1", "data.train_split": "test"}
    config = load_config("quickstart", changes | {"model.pretrained": "", "model.width": "4"})
    state = train_and_evaluate(config, tmp_path / "run")
    assert int(state.step) == 21
    assert all(np.isfinite(array).all() for array in jax.tree.leaves((state.params, state.batch_stats)))
