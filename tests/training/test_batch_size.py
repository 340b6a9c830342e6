"""The batch size that is found."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxft.errors import UserError
from jaxft.training.batch_size import largest_share
from tests.helpers.runs import TINY, Run, metrics

SEARCHED = (*TINY, "--config.data.train_split=train", "--config.batch_size=0", "--config.num_epochs=1")


@given(st.integers(0, 10**6), st.integers(1, 10**4), st.integers(0, 10**8), st.integers(1, 10**5), st.integers(0, 99))
def test_it_is_the_largest_power_of_two_that_fits(base: int, each: int, memory: int, at_most: int, bend: int) -> None:
    """Also where the memory does not grow quite as foretold, it fits."""

    def bytes_of(share: int) -> int:
        return base + each * share + (bend * each * share // 100 if share > 32 else 0)

    fitting = [2**i for i in range(20) if 2**i <= at_most and bytes_of(2**i) <= memory]
    if bytes_of(1) > memory:
        with pytest.raises(UserError, match=r"GiB for one image.*model.remat=True"):
            largest_share(bytes_of, memory, at_most)
    elif bend == 0 or max(fitting) <= 32:
        assert largest_share(bytes_of, memory, at_most) in (fitting[-1:] if bend == 0 else fitting)
    else:
        assert largest_share(bytes_of, memory, at_most) in fitting


@pytest.mark.slow
def test_a_run_finds_it_once(run: Run, tmp_path: Path) -> None:
    """An epoch has ten steps at least, so that 2,000 pictures allow for 128 and not for 256."""
    result = run(*SEARCHED, "--workdir", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    assert re.search(r"batch    128 images; a step needs 0\.\d GiB of each device's \d+\.\d", result.stdout)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["batch_size"] == 128
    assert metrics(tmp_path / "run")[-1]["step"] == 16
    again = run(*SEARCHED, "--workdir", tmp_path / "run")
    assert again.returncode == 0, again.stderr
    assert "batch  " not in again.stdout
