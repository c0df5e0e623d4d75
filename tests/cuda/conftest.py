"""Tests of what only a card does, on tiny networks. All are marked ``cuda``.

With ``NNSSL_ADAPT_REHEARSE_CUDA=1`` they run on the CPU: benchmarks/gpu.py --rehearse does so in CI.
"""

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.cuda)


@pytest.fixture(autouse=True)
def quick_compiler(cuda_device, monkeypatch):
    """In a rehearsal nothing is compiled, which takes minutes."""
    if cuda_device.type == "cpu":
        monkeypatch.setattr(torch, "compile", lambda model, **_: model)
