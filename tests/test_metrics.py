"""metrics.jsonl after interruptions."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxft.metrics import MetricsFile


@given(last_step=st.integers(0, 10), torn=st.integers(0, 40))
def test_what_lies_beyond_the_checkpoint_is_cut(
    tmp_path_factory: pytest.TempPathFactory, last_step: int, torn: int
) -> None:
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    metrics = MetricsFile(path, 0)
    for step in range(1, 11):
        metrics.write(step=step, split="train", loss=1 / step)
    metrics.close()
    torn_line = json.dumps({"step": 11, "split": "train", "loss": 0.5})[:torn]
    path.write_text(path.read_text() + torn_line)

    metrics = MetricsFile(path, last_step)
    metrics.write(step=last_step + 1, split="train", loss=0.0)
    metrics.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, last_step + 2))
