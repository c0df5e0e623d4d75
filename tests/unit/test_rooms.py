"""The house rules that a machine can check."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "nnssl_adapt"
# A room may import rooms above it in this list, and itself.
ROOMS = [
    "errors",
    "files",
    "paths",
    "geometry",
    "data",
    "weights",
    "planning",
    "inference",
    "evaluation",
    "training",
    "sharing",
    "demo",
    "cli",
    "train",
]
PEERS = {"nnunetv2", "batchgenerators", "sklearn", "skimage"}


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def imported_names(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own == "__init__":
        pytest.skip("the public page names every room")
    for name in imported_names(path):
        parts = name.split(".")
        assert parts[0] not in PEERS, f"{path} imports {name}, which is no dependency"
        if parts[0] == "nnssl_adapt" and len(parts) > 1:
            assert ROOMS.index(parts[1]) <= ROOMS.index(own), f"{own} must not import {name}"


def test_no_relative_imports():
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.ImportFrom) and node.level), path


def test_importing_the_package_is_cheap_and_every_public_name_exists():
    script = (
        "import sys, nnssl_adapt\n"
        "heavy = {'torch', 'numpy', 'SimpleITK', 'scipy', 'matplotlib', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "for name in nnssl_adapt.__all__: assert getattr(nnssl_adapt, name).__doc__, name\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_everything_imports_without_the_peer():
    names = [
        ".".join(("nnssl_adapt", *path.relative_to(PACKAGE).with_suffix("").parts))
        for path in modules()
        if path.stem != "__init__"
    ]
    script = f"""
import importlib, sys
sys.modules["nnunetv2"] = None  # importing it now raises ImportError
for name in {names!r}:
    importlib.import_module(name)
"""
    subprocess.run([sys.executable, "-c", script], check=True)
