"""The house rules that a machine can check."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "nnssl_adapt"
# A room may import rooms above it in this list, and itself. Inner rooms are ordered in the same way; a file that lies in a
# room itself stands below its inner rooms and may import them all, and none of them may import it.
ROOMS = [
    "errors",
    "files",
    "paths",
    "text",
    "figures",
    "machine",
    "geometry",
    "data",
    "weights",
    "planning",
    "inference",
    "evaluation",
    "training",
    "sharing",
    "cluster",
    "studies",
    "demo",
    "cli",
    "train",
]
INNER_ROOMS = {
    "weights": ["sources", "modules", "network", "families", "checkpoint", "transfer", "proof"],
    "training": ["recipe", "progress", "fused", "optimise", "device", "run", "launch", "batches"],
}
# Inner rooms that stand below the files of their room instead: they build on them, and none of these imports them.
BELOW = {"data": ["verifying", "convert"], "evaluation": ["report"]}
PEERS = {"nnunetv2", "batchgenerators", "sklearn", "skimage"}


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def imported_names(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module


def place(module):
    """Where a module stands in the house: the number of its room and of its inner room, which may not import later ones."""
    room, *rest = module.split(".")[1:]
    inner = INNER_ROOMS.get(room, [])
    if rest and rest[0] in inner:
        return ROOMS.index(room), inner.index(rest[0])
    if rest and rest[0] in BELOW.get(room, []):
        return ROOMS.index(room), len(inner) + 1 + BELOW[room].index(rest[0])
    return ROOMS.index(room), len(inner)


def module_of(path):
    return ".".join(("nnssl_adapt", *path.relative_to(PACKAGE).with_suffix("").parts))


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    if path == PACKAGE / "__init__.py":
        pytest.skip("the public page names every room")
    for name in imported_names(path):
        assert name.split(".")[0] not in PEERS, f"{path} imports {name}, which is no dependency"
        if name.startswith("nnssl_adapt."):
            assert place(name) <= place(module_of(path)), f"{module_of(path)} must not import {name}"


SHELVES = {("weights", "families")}
"""Inner rooms with one file for each thing of a kind."""


def test_no_room_is_overgrown():
    """Twelve files an inner room: more hide a second question. Shelves, of which every file has the same form, may grow."""
    for room in INNER_ROOMS:
        for inner in INNER_ROOMS[room]:
            if (room, inner) in SHELVES:
                continue
            files = [p for p in (PACKAGE / room / inner).glob("*.py") if p.stem != "__init__"]
            assert len(files) <= 12, f"{room}/{inner} has {len(files)} files"


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
