"""Commands start at once: none loads a heavy module that it does not need. The real commands, each in its own process."""

import json
import os
import subprocess
import sys

import pytest
from support.heavy_modules import HEAVY
from support.synthetic import make_dataset

PEER = ("nnunetv2", "batchgenerators", "skimage", "sklearn", "pandas")

SCRIPT = """
import json, sys
from nnssl_adapt.cli.main import main
try:
    code = main(sys.argv[1:])
except SystemExit as exit:
    code = exit.code
print("loaded:" + json.dumps([code or 0, sorted(sys.modules)]))
"""


def loaded(*words, **environment):
    """Exit code and modules of a command."""
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    line = next((line for line in run.stdout.splitlines() if line.startswith("loaded:")), None)
    assert line is not None, run.stderr
    code, modules = json.loads(line.removeprefix("loaded:"))
    return code, set(modules)


@pytest.mark.parametrize(
    "words", [["--help"], ["predict", "--help"], ["train", "--help"], ["preprocess", "--help"], ["name", "--help"]]
)
def test_help_loads_neither_torch_nor_numpy(words):
    code, modules = loaded(*words)
    assert code == 0
    assert modules & {"torch", "numpy", "scipy", "SimpleITK", "huggingface_hub", *HEAVY, *PEER} == set()


def test_inspect_loads_nothing_heavy(small_resenc):
    code, modules = loaded("inspect", small_resenc)
    assert code == 0
    assert modules & {*HEAVY, *PEER} == set()


def test_preprocess_loads_nothing_heavy_and_neither_when_there_is_nothing_to_do(small_resenc, tmp_path):
    folders = {f"nnUNet_{name}": str(tmp_path / name) for name in ("raw", "preprocessed", "results")}
    make_dataset(tmp_path / "raw", cases=2, shape=(12, 16, 14))
    words = ("preprocess", "-d", "991", "-n", "mae", "-pc", small_resenc, "-np", "1")
    for _ in range(2):
        code, modules = loaded(*words, **folders)
        assert code == 0
        assert modules & {*HEAVY, *PEER} == set()


def test_what_judges_segmentations_needs_no_network(tmp_path):
    code, modules = loaded("evaluate", "-p", tmp_path, "-g", tmp_path)
    assert code == 1  # there is nothing to judge
    assert modules & {"torch", *HEAVY, *PEER} == set()
