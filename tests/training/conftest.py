"""Fixtures of runs on a small table."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxft.reporting.reporter import Reporter
from tests.helpers.tables import write_table


@pytest.fixture(scope="module")
def no_reports() -> Iterator[None]:
    """Leaves out the reports, which take longer than the runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reporter, "update", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_table(tmp_path_factory.mktemp("table"))
