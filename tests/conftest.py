"""What all tests share: nnU-Net's folders in a temporary place, and the small real checkpoints."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Tiny arrays gain nothing from threads, and two test processes would fight over the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

CHECKPOINTS = Path(__file__).parent / "data" / "nnssl_checkpoints"


@pytest.fixture
def nnunet_folders(tmp_path, monkeypatch):
    """nnUNet_raw, _preprocessed and _results below a temporary folder, which is returned."""
    for part in ("raw", "preprocessed", "results"):
        folder = tmp_path / f"nnUNet_{part}"
        folder.mkdir()
        monkeypatch.setenv(f"nnUNet_{part}", str(folder))
    monkeypatch.delenv("nnssl_pretrained_models", raising=False)
    return tmp_path


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
