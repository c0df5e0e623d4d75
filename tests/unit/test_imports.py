"""What a command loads before it does anything: nobody should wait for libraries that are not used."""

import subprocess
import sys

import pytest
from support.heavy_modules import HEAVY


@pytest.mark.parametrize("module", ["nnssl_adapt.inference.predictor", "nnssl_adapt.training.trainer"])
def test_slow_libraries_are_loaded_when_they_are_used(module):
    code = f"import sys, {module}; print(*[name for name in {HEAVY} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert loaded.split() == []


@pytest.mark.parametrize(
    "module", ["training.loop", "training.batches.augment_gpu", "planning.memory", "inference.sliding_window"]
)
def test_what_trains_on_a_bare_machine_is_loaded_without_simpleitk(module):
    code = f"import sys; sys.modules['SimpleITK'] = None; import nnssl_adapt.{module}"
    subprocess.run([sys.executable, "-c", code], check=True)
