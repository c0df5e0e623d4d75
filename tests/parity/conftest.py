"""What the comparisons with nnU-Net share."""

from pathlib import Path

import pytest
from support.peer_threads import pool_threads


@pytest.fixture(scope="session", autouse=True)
def pools_of_threads():
    """nnU-Net's pools are threads of this process, except in what a test starts as a process of its own."""
    with pytest.MonkeyPatch.context() as patched:
        pool_threads(patched.setattr)
        yield


def pytest_collection_modifyitems(items):
    """nnU-Net takes means of nothing, also through NumPy's functions."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning:numpy"))
