"""What all tests share: nnU-Net's folders in a temporary place, and the small real checkpoints."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

# Tiny arrays gain nothing from threads, and two test processes would fight over the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

CHECKPOINTS = Path(__file__).parent / "data" / "nnssl_checkpoints"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Downloads and unpacked zips of a test are its own, wherever they are kept by default."""
    folder = tmp_path_factory.mktemp("cache_home")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "nnssl_adapt"


@pytest.fixture
def nnunet_folders(tmp_path, monkeypatch):
    """nnUNet_raw, _preprocessed and _results below a temporary folder, which is returned."""
    for part in ("raw", "preprocessed", "results"):
        folder = tmp_path / f"nnUNet_{part}"
        folder.mkdir()
        monkeypatch.setenv(f"nnUNet_{part}", str(folder))
    monkeypatch.delenv("nnssl_pretrained_models", raising=False)
    return tmp_path


@pytest.fixture(scope="session")
def known_fingerprints():
    """Fingerprints by the arguments of the dataset: drawing nnU-Net's 10⁸ voxels takes seconds, however small the images."""
    return {}


@pytest.fixture
def tiny_dataset(nnunet_folders, known_fingerprints):
    """Make a tiny raw dataset with its fingerprint: ``tiny_dataset(channels=2, …)``, see ``synthetic.make_dataset``."""
    from synthetic import make_dataset

    from nnssl_adapt.data.dataset import RawDataset
    from nnssl_adapt.data.fingerprint import fingerprint_dataset
    from nnssl_adapt.files import write_json

    def make(**arguments) -> Path:
        folder = make_dataset(nnunet_folders / "nnUNet_raw", **arguments)
        key = json.dumps(arguments, sort_keys=True)
        if key not in known_fingerprints:
            known_fingerprints[key] = fingerprint_dataset(RawDataset.open(folder)).to_dict()
        write_json(
            nnunet_folders / "nnUNet_preprocessed" / folder.name / "dataset_fingerprint.json", known_fingerprints[key]
        )
        return folder

    return make


@pytest.fixture
def small_resenc() -> Path:
    """Folder of a small ResEnc that nnssl's masked autoencoder pre-trained at 1 mm on patches of 32³."""
    return CHECKPOINTS / "small_resenc"


def pytest_collection_modifyitems(items):
    import torch

    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs CUDA")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(skip)
