"""What an installation contains: each folder of code, and each file that the code reads."""

import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = ROOT / "nnssl_adapt"


@pytest.fixture(scope="module")
def setuptools_settings():
    tomllib = pytest.importorskip("tomllib")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]


def package_of(folder):
    return ".".join(folder.relative_to(ROOT).parts)


def test_each_folder_of_code_is_installed(setuptools_settings):
    with_code = {package_of(path.parent) for path in CODE.rglob("*.py") if "__pycache__" not in path.parts}
    listed = set(setuptools_settings["packages"])
    assert with_code - listed == set()
    gone = [name for name in listed if not (ROOT / name.replace(".", "/")).is_dir() and name != "nnssl_adapt.configs"]
    assert gone == []


def test_each_file_that_is_no_code_is_installed(setuptools_settings):
    patterns = setuptools_settings["package-data"]
    files = [path for path in CODE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    left_out = [path for path in files if not is_listed(path, CODE.parent, patterns)]
    configs = {"configs": patterns["nnssl_adapt.configs"]}
    left_out += [path for path in (ROOT / "configs").rglob("*.*") if not is_listed(path, ROOT, configs)]
    assert left_out == []


def is_listed(path, root, patterns):
    """Whether one of the folders above a file names it among its data."""
    folders = [folder for folder in path.parents if folder.is_relative_to(root) and folder != root]
    return any(
        fnmatch.fnmatch(path.relative_to(folder).as_posix(), pattern)
        for folder in folders
        for pattern in patterns.get(".".join(folder.relative_to(root).parts), [])
    )
