"""Fixtures of whole runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mantrans.data.dataset import prepare
from mantrans.data.tokenizer import load_tokenizer
from tests.support.processes import Processes
from tests.support.runs import small


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long forms may take their time."""
    for item in items:
        if item.get_closest_marker("slow") and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(3600))


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of token files that all small runs share, filled once."""
    folder = tmp_path_factory.mktemp("tokens")
    data = small(folder, folder).data
    prepare(data, load_tokenizer(data.tokenizer), cache_dir=folder, quiet=True)
    return folder


@pytest.fixture(scope="session")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    started = Processes(tmp_path_factory.mktemp("processes"))
    yield started
    started.close()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums are formed in the same order everywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
