"""Whole runs of the recipes for ViTs and ConvNeXts, with tiny networks."""

from pathlib import Path

import pytest

from tests.helpers.runs import Run, metrics

SMALL = (
    *("--config.data.name=sample:cifar10", "--config.data.eval_split=test", "--config.image_size=32"),
    *("--config.data.resize=0", "--config.model.onednn=never"),
)
RANDOM = (
    *("--config.model.pretrained=", "--config.num_epochs=6", "--config.optimizer.fit_head=no"),
    *("--config.optimizer.learning_rate=0.002", "--config.optimizer.layer_decay=1", "--config.augment.crop_area=0.8"),
)


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "frozen"), [("vit", "embed,block0-block2"), ("convnext", "stem-stage2")])
def test_a_recipe_learns_and_its_weights_start_another(run: Run, tmp_path: Path, recipe: str, frozen: str) -> None:
    """First from random weights, at a higher rate; then, as the recipe says, from those of that run."""
    train = ("-m", "jaxft.train", f"--config={recipe}", f"--config.model.arch=test_{recipe}", *SMALL)
    result = run(*train, *RANDOM, "--workdir", tmp_path / "first")
    assert result.returncode == 0, result.stderr
    first = metrics(tmp_path / "first")[-1]["accuracy"]
    assert first > 0.2  # 0.1 by chance
    again = (
        *(f"--config.model.pretrained={tmp_path / 'first'}", "--config.num_epochs=2"),
        f"--config.optimizer.freeze={frozen}",
    )
    result = run(*train, *again, "--workdir", tmp_path / "second")
    assert result.returncode == 0, result.stderr
    assert metrics(tmp_path / "second")[-1]["accuracy"] > first - 0.03
