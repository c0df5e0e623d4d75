"""What the comparisons with nnU-Net share."""

import pytest
from support.peer_threads import pool_threads


@pytest.fixture(scope="session", autouse=True)
def pools_of_threads():
    """nnU-Net's pools are threads of this process, except in what a test starts as a process of its own."""
    with pytest.MonkeyPatch.context() as patched:
        pool_threads(patched.setattr)
        yield
