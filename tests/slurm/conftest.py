"""A Slurm for all tests of this folder; skipped where there is none."""

import pytest
from support.slurm import real_slurm, why_not


@pytest.fixture(scope="session")
def slurm_cluster(tmp_path_factory):
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    with real_slurm(tmp_path_factory.mktemp("slurm")) as slurm:
        yield slurm


@pytest.fixture
def slurm(slurm_cluster):
    """The cluster, without any job before and after."""
    yield slurm_cluster
    slurm_cluster.clear()
