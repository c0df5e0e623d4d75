"""A Slurm for all tests of this folder; skipped where there is none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.slurm import real_slurm, why_not
from support.slurm_folders import RECIPE, SOURCE, model_in
from support.synthetic import make_dataset

import nnssl_adapt


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


@pytest.fixture(scope="session")
def undisturbed(slurm_cluster, tmp_path_factory):
    """nnU-Net's folders with a raw dataset and, by ``submit --cluster local``, its model of three folds."""
    folder = tmp_path_factory.mktemp("undisturbed")
    make_dataset(folder / "nnUNet_raw", cases=6, shape=(20, 28, 24))
    words = ["submit", "-d", "991", "-pc", str(SOURCE), "-n", "mae", "--folds", "0-2", "--cluster", "local", *RECIPE]
    done = subprocess.run(
        [sys.executable, "-m", "nnssl_adapt.cli.main", *words],
        env={**os.environ, **_settings(folder)},
        capture_output=True,
        text=True,
        timeout=840,  # on a busy machine
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return model_in(folder / "nnUNet_results")


@pytest.fixture
def folders(undisturbed, tmp_path, monkeypatch, slurm):
    """The same raw dataset, an environment in which Slurm's commands work, and results of their own."""
    raw = undisturbed.parents[2] / "nnUNet_raw"
    for name, value in {**slurm.environment, **_settings(tmp_path), "nnUNet_raw": str(raw)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("nnssl_pretrained_models", raising=False)
    return tmp_path


@pytest.fixture
def prepared(undisturbed, folders, monkeypatch):
    """The dataset is preprocessed already; returns the folder of results."""
    monkeypatch.setenv("nnUNet_preprocessed", str(undisturbed.parents[2] / "nnUNet_preprocessed"))
    return folders / "nnUNet_results"


def _settings(folder: Path) -> dict[str, str]:
    parts = {f"nnUNet_{part}": str(folder / f"nnUNet_{part}") for part in ("raw", "preprocessed", "results")}
    return {**parts, "PYTHONPATH": str(Path(nnssl_adapt.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
