"""Files are whole or absent, whatever happens while they are written."""

import errno
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from nnssl_adapt.errors import OutputError
from nnssl_adapt.files import (
    TEMPORARY_PREFIX,
    atomic_path,
    explain_write_errors,
    leftovers,
    make_folder,
    sha256_of,
    write_json,
    write_text,
)


@pytest.mark.parametrize("ending", [None, ".nii.gz"])
def test_what_a_killed_process_left_is_found(tmp_path, ending):
    path, other = tmp_path / "c00.hdr.nii.gz", tmp_path / "c01.hdr.nii.gz"
    with atomic_path(path, ending) as temporary, atomic_path(other, ending):
        assert list(leftovers(path)) == [temporary] and temporary.name.endswith(".nii.gz")
        assert ending is None or ".hdr" not in temporary.name
    assert list(leftovers(path)) == []


@pytest.mark.parametrize("reason", [RuntimeError, KeyboardInterrupt])
def test_what_ends_early_leaves_the_old_file_and_nothing_else(tmp_path, reason):
    path = tmp_path / "plans.json"
    path.write_text("old")
    with pytest.raises(reason), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise reason
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_the_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "case.nii.gz"
    with atomic_path(path) as temporary:
        assert temporary.parent == path.parent and temporary.name.startswith(TEMPORARY_PREFIX)
        assert temporary.name.endswith("case.nii.gz")
        temporary.write_bytes(b"voxels")
        assert not path.exists()
    assert path.read_bytes() == b"voxels" and list(path.parent.iterdir()) == [path]


def test_the_temporary_name_may_have_only_the_ending(tmp_path):
    with atomic_path(tmp_path / "a.nrrd.nii.gz", ending=".nii.gz") as temporary:
        assert "nrrd" not in temporary.name and temporary.name.endswith(".nii.gz")
    assert (tmp_path / "a.nrrd.nii.gz").exists()


def test_files_can_be_read_by_those_who_may_read_other_files(tmp_path):
    (tmp_path / "usual").touch()
    write_text(tmp_path / "ours", "text")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_json_of_numpy_and_paths(tmp_path):
    content = {"b": np.float32(0.5), "a": np.arange(3), "path": Path("x/y")}
    write_json(tmp_path / "a.json", content, sort_keys=True)
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == {"a": [0, 1, 2], "b": 0.5, "path": "x/y"}
    assert text.startswith('{\n    "a"') and text.endswith("}\n")


def test_json_that_is_none_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", [1])
    with pytest.raises(TypeError, match="object"):
        write_json(tmp_path / "a.json", object())
    assert json.loads((tmp_path / "a.json").read_text()) == [1]


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "no space"), (errno.EDQUOT, "quota"), (errno.EACCES, "permissions"), (errno.EROFS, "not allowed")],
)
def test_the_system_s_refusals_are_explained(number, words):
    with pytest.raises(OutputError, match=words) as caught, explain_write_errors(Path("results/model.pth")):
        raise OSError(number, os.strerror(number))
    assert "results/model.pth" in str(caught.value)


def test_other_errors_of_the_system_pass_unchanged():
    with pytest.raises(OSError, match="Input/output") as caught, explain_write_errors(Path("x")):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    assert not isinstance(caught.value, OutputError)


def test_a_file_where_a_folder_is_needed(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file"):
        make_folder(tmp_path / "file" / "below")
    assert make_folder(tmp_path / "a" / "b") == make_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"


def test_digest_of_more_than_one_block(tmp_path):
    content = bytes(range(256)) * (1 << 15) + b"end"  # 8 MiB and a little
    (tmp_path / "a").write_bytes(content)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(content).hexdigest()
