"""Tests which parameters are selected, and that frozen ones keep their bits."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from jaxft.config import default_config
from jaxft.data import datasets
from jaxft.data.batches import Batch, Examples, epoch_order, make_batches
from jaxft.errors import UserError
from jaxft.models import partition
from jaxft.models.network import abstract_variables
from jaxft.models.policy import Policy
from jaxft.models.resnet import ARCHITECTURES, BasicBlock, ResNet
from jaxft.training.optimizer import learning_rate_factor, make_optimizer
from jaxft.training.state import TrainState, abstract_train_state, create_train_state
from jaxft.training.steps import StepConfig, train_step
from jaxft.transforms.preprocessing import Preprocessing
from tests.helpers.devices import replicate_on
from tests.helpers.reference import torch, torchvision

PREPROCESSING = Preprocessing(32, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
MODEL = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=10, width=8, formulation="cpu")
PARTS = ResNet.parts
PATHS = sorted(flatten_dict(abstract_variables(MODEL)["params"], sep="/"))


def config_with(**values: Any) -> Any:
    """Returns the default config with these values in its `optimizer` section."""
    config = default_config()
    config.optimizer.update(**values)
    return config


def optimizer_config(**values: Any) -> Any:
    return config_with(**values).optimizer


def test_parts_are_torchvisions_modules() -> None:
    """Every parameter is in one part, as many in each as torchvision's network has there."""
    paths = partition.parameter_paths(ARCHITECTURES["resnet18"](num_classes=10))
    modules = {"stem": ("conv1", "bn1"), "head": ("fc",)} | {f"stage{i}": (f"layer{i}",) for i in range(1, 5)}
    reference = torchvision.models.resnet18(num_classes=10)
    assert sum(len(partition.select(paths, name, PARTS)) for name in modules) == len(paths)
    for name, children in modules.items():
        count = sum(1 for child in children for _ in getattr(reference, child).parameters())
        assert len(partition.select(paths, name, PARTS)) == count
    assert partition.select(PATHS, "backbone", PARTS) == set(PATHS) - partition.select(PATHS, "head", PARTS)
    assert partition.select(PATHS, "stem, bias$", PARTS) == partition.select(PATHS, "stem", PARTS) | {
        p for p in PATHS if p.endswith("bias")
    }
    assert partition.select(PATHS, "", PARTS) == set()


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"freeze": "stage5"}, "'stage5' is neither a part of the network"),
        ({"freeze": "stem,("}, "'(' is not a pattern"),
        ({"freeze": "."}, "leaves nothing to train"),
        ({"freeze": "stem", "unfreeze": "stem"}, "as in '3: stage4, 5: stage3'"),
        ({"freeze": "stem", "unfreeze": "2: stage1"}, "names 'stage1', which is not frozen in that epoch"),
        ({"freeze": "stage1-stage5"}, "there is no part 'stage5'; parts are stem, stage1-stage4, head"),
        ({"freeze": "backbone-head"}, "there is no part 'backbone'"),
        ({"freeze": "stage3-stage1"}, "'stage1' comes first; write stage1-stage3"),
        ({"freeze": "stem-head"}, "leaves nothing to train"),
        ({"freeze": "stem", "unfreeze": "2: stage1-stage2"}, "names 'stage1-stage2', which is not frozen"),
    ],
)
def test_wrong_names_are_errors(values: dict[str, str], part: str) -> None:
    with pytest.raises(UserError) as error:
        partition.make_policy(config_with(**values), MODEL, 1)
    assert part in str(error.value)


def test_parts_are_unfrozen_at_their_epochs() -> None:
    config = config_with(freeze="backbone", unfreeze="2: stage4, 4: backbone")
    assert partition.make_policy(config, MODEL, 1).frozen == partition.select(PATHS, "backbone", PARTS)
    for epoch in (2, 3):
        frozen = partition.make_policy(config, MODEL, epoch).frozen
        assert frozen == partition.select(PATHS, "stem,stage1,stage2,stage3", PARTS)
    assert partition.make_policy(config, MODEL, 4).frozen == set()


def test_the_first_epoch_of_each_parameter() -> None:
    config = optimizer_config(freeze="backbone", unfreeze="2: layer4/.*kernel, 4: backbone")
    paths = {"fc/bias": 1, "layer4/0/conv1/kernel": 2, "layer4/0/bn1/scale": 4, "conv1/kernel": 4}
    assert {path: partition.first_epoch(config, path, PARTS) for path in paths} == paths
    assert partition.first_epoch(optimizer_config(freeze="stem"), "bn1/bias", PARTS) == np.inf
    for epoch in range(1, 6):  # as the policies of the epochs say
        frozen = partition.make_policy(config_with(**config), MODEL, epoch).frozen
        assert frozen == {path for path in PATHS if partition.first_epoch(config, path, PARTS) > epoch}


def test_parts_that_join_later_are_announced() -> None:
    config = config_with(freeze="backbone", unfreeze="4: backbone, 2: stage4")
    config.num_epochs = 3
    assert partition.unfreezing(config, 1) == [
        "stage4 trains from epoch 2 on",
        "backbone trains from epoch 4 on, which is after the last (3)",
    ]
    assert len(partition.unfreezing(config, 2)) == 1
    assert partition.unfreezing(config, 4) == []


def test_ranges_are_the_parts_between_two() -> None:
    """A range follows the order of the network and includes both ends; optimizer.unfreeze takes ranges too."""
    assert partition.select(PATHS, "stem - stage2, head", PARTS) == partition.select(
        PATHS, "stem,stage1,stage2,head", PARTS
    )
    assert partition.select(PATHS, "stage4-stage4", PARTS) == partition.select(PATHS, "stage4", PARTS)
    config = config_with(freeze="stem-stage4", unfreeze="2: stage3-stage4")
    assert partition.make_policy(config, MODEL, 1).frozen == partition.select(PATHS, "backbone", PARTS)
    assert partition.make_policy(config, MODEL, 2).frozen == partition.select(PATHS, "stem-stage2", PARTS)
    assert partition.first_epoch(config.optimizer, "layer3/0/conv1/kernel", PARTS) == 2
    many = {"embed": "a", **{f"block{i}": "b" for i in range(24)}, "head": "c"}
    assert partition.listed(many) == "embed, block0-block23, head"
    assert partition.parts_between("embed-block10", many) == ["embed", *(f"block{i}" for i in range(11))]


def train(policy: Policy, config: Any, state: TrainState, steps: int, devices: int = 2) -> TrainState:
    sample = datasets.load("sample:cifar10", "train")
    tx = make_optimizer(config, steps_per_epoch=10, num_epochs=1, parts=PARTS)
    step = partial(train_step, config=StepConfig(MODEL, tx, PREPROCESSING, policy))
    p_step = jax.pmap(step, axis_name="batch", in_axes=(None, None, 0), out_axes=None)
    examples = Examples(sample.image, sample.label)
    state = replicate_on(devices, state)
    for batch in list(make_batches(epoch_order(0, 1, 2000), 32, devices))[:steps]:
        state, _ = p_step(state, examples, batch)
    return state


@pytest.mark.parametrize(
    ("names", "batch_norm"),
    [
        pytest.param("stem,stage1,stage2", "update", marks=pytest.mark.slow),
        ("backbone", "sync"),
        pytest.param("stage3", "update", marks=pytest.mark.slow),
    ],
)
def test_what_is_frozen_stays_to_the_bit_and_the_rest_moves(names: str, batch_norm: Any) -> None:
    """Parameters and statistics, with weight decay and on devices that see other images."""
    config = config_with(freeze=names, weight_decay=0.1, learning_rate=0.05)
    config.model.batch_norm = batch_norm
    policy = partition.make_policy(config, MODEL, 1)
    tx = make_optimizer(config.optimizer, 10, 1, parts=PARTS)
    state = jax.jit(partial(create_train_state, MODEL, tx, policy=policy))(jax.random.key(0))
    after = train(policy, config.optimizer, state, 3)
    for before_tree, after_tree in ((state.params, after.params), (state.batch_stats, after.batch_stats)):
        before, moved = flatten_dict(before_tree, sep="/"), flatten_dict(after_tree, sep="/")
        for path, array in before.items():
            frozen = partition.stage_of(path, PARTS) in names.split(",") or (
                names == "backbone" and partition.stage_of(path, PARTS) != "head"
            )
            assert (np.asarray(array).tobytes() == np.asarray(moved[path]).tobytes()) == frozen, path
    momentum = {
        part
        for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)
        for part in [jax.tree_util.keystr(path)]
        if ".trace" in part
    }
    assert len(momentum) == len(PATHS) - len(policy.frozen)


def products(jaxpr: Any) -> int:
    """Counts the convolutions and matrix products in a traced function and in everything that it calls."""
    count = 0
    for equation in jaxpr.eqns:
        count += equation.primitive.name in ("conv_general_dilated", "dot_general")
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            count += products(inner) if hasattr(inner, "eqns") else 0
    return count


def test_nothing_is_propagated_back_through_a_frozen_prefix() -> None:
    """If only the head trains, a step has the forward pass's products and one more: the head's gradient."""
    image = jnp.zeros((4, 32, 32, 3), jnp.uint8)
    examples, batch = Examples(image, jnp.zeros(4, jnp.int32)), Batch(jnp.arange(4), jnp.arange(4), jnp.ones(4))

    def in_a_step(names: str) -> int:
        config = config_with(freeze=names)
        policy = partition.make_policy(config, MODEL, 1)
        tx = make_optimizer(config.optimizer, 10, 1, parts=PARTS)
        state = abstract_train_state(MODEL, tx, policy)
        step = partial(train_step, config=StepConfig(MODEL, tx, PREPROCESSING, policy))
        return products(jax.make_jaxpr(step, axis_env=[("batch", 1)])(state, examples, batch).jaxpr)

    variables = abstract_variables(MODEL)
    forward = jax.make_jaxpr(partial(MODEL.apply, train=False))(variables, jnp.zeros((4, 32, 32, 3)))
    assert in_a_step("backbone") == products(forward.jaxpr) + 1
    assert in_a_step("backbone") < in_a_step("stem,stage1,stage2") < in_a_step("stem") < in_a_step("")


def test_an_unfrozen_part_begins_without_momentum_and_the_rest_keeps_it() -> None:
    """Compares with torch: two steps with conv1 frozen, then two with everything, towards a target."""
    config = optimizer_config(weight_decay=1e-2, learning_rate=2**-5)
    rng = np.random.default_rng(0)
    start, target = ({"conv1": {"kernel": rng.normal(size=5)}, "fc": {"kernel": rng.normal(size=5)}} for _ in range(2))
    with jax.enable_x64(True):
        tx = make_optimizer(config, 2, 2, parts=PARTS)
        params: Any = jax.tree.map(jnp.asarray, start)
        opt_state = tx.init(params)
        for frozen in ({"conv1/kernel"}, {"conv1/kernel"}, set(), set()):
            trainable, kept = partition.split_frozen(params, frozenset(frozen))
            grads = jax.tree.map(lambda a, b: a - b, trainable, partition.split_frozen(target, frozenset(frozen))[0])
            now = partition.merge_opt_state(opt_state, jax.eval_shape(tx.init, trainable))
            updates, now = tx.update(grads, now, trainable)
            params = partition.merge(optax.apply_updates(trainable, updates), kept)
            opt_state = partition.merge_opt_state(now, opt_state)
    for name, steps in (("conv1", 2), ("fc", 4)):
        array = torch.nn.Parameter(torch.from_numpy(start[name]["kernel"].copy()))
        sgd = torch.optim.SGD([array], 2**-5, momentum=0.9, weight_decay=1e-2)
        for _ in range(steps):
            sgd.zero_grad()
            ((array - torch.from_numpy(target[name]["kernel"])) ** 2 / 2).sum().backward()
            sgd.step()
        np.testing.assert_allclose(params[name]["kernel"], array.detach().numpy(), rtol=1e-10)


def test_learning_rates_by_part() -> None:
    config = optimizer_config(layer_decay=0.5, head_factor=10)
    paths = ("conv1/kernel", "layer1/0/bn1/bias", "layer4/1/x/y")
    factors = [learning_rate_factor(config, path, PARTS) for path in paths]
    assert factors == [0.5**5, 0.5**4, 0.5]
    assert learning_rate_factor(config, "fc/bias", PARTS) == 10

    def moved(**values: Any) -> dict[str, Any]:
        config = optimizer_config(learning_rate=0.01, **values)
        tx = make_optimizer(config, 10, 1, parts=PARTS)
        params = {"conv1": {"kernel": jnp.zeros(1)}, "fc": {"bias": jnp.zeros(1)}}
        return tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)[0]

    plain, scaled = moved(), moved(layer_decay=0.5, head_factor=10)
    np.testing.assert_allclose(scaled["fc"]["bias"], 10 * plain["fc"]["bias"])
    np.testing.assert_allclose(scaled["conv1"]["kernel"], 0.5**5 * plain["conv1"]["kernel"])


def test_the_table_lists_what_trains() -> None:
    policy = partition.make_policy(config_with(freeze="stem,stage1"), MODEL, 1)
    lines = partition.table(MODEL, policy).splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines[1:]}
    assert rows["stem"][1:] == ["0", "stay"]
    assert rows["stage1"][1:] == ["0", "stay"]
    assert rows["stage2"][0] == rows["stage2"][1]
    assert rows["stage2"][2] == "move"
    reference = sum(p.numel() for p in torch.nn.Sequential(torch.nn.Linear(64, 10)).parameters())
    assert rows["head"] == [f"{reference:,}", f"{reference:,}"]
