from __future__ import annotations

import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest

import nnssl_adapt.data.store as store_module
from nnssl_adapt.data.arrays import piece_shapes
from nnssl_adapt.data.properties import load_properties
from nnssl_adapt.data.store import (
    CaseStore,
    PreprocessedCase,
    describe_source,
)
from nnssl_adapt.errors import CaseError, DatasetNotFound, OutputError

PATCH = (8, 16, 12)


def some_case(seed: int = 0, shape: tuple[int, ...] = (10, 20, 30)) -> PreprocessedCase:
    random = np.random.default_rng(seed)
    return PreprocessedCase(
        data=random.normal(size=(2, *shape)).astype(np.float32),
        seg=random.integers(-1, 4, (1, *shape)).astype(np.int16),
        properties={
            "spacing": [2.0, 1.0, 0.5],
            "sitk_stuff": {"spacing": (0.5, 1.0, 2.0), "origin": (0.0, 0.0, 0.0), "direction": (1.0,) * 9},
            "shape_before_cropping": (12, 22, 32),
            "bbox_used_for_cropping": [[1, 11], [1, 21], [1, 31]],
            "class_locations": {1: random.integers(0, 9, (5, 4)), (1, 2): random.integers(0, 9, (3, 4)), 3: []},
        },
    )


def test_a_written_case_comes_back(tmp_path: Path) -> None:
    store = CaseStore(tmp_path / "store")
    case = some_case()
    store.begin({"digest": "d"})
    store.write("a", case, PATCH, digest="d")
    assert store.identifiers == ["a"] and len(store) == 1
    stored = store.open("a")
    assert stored.data.dtype == np.float32 and stored.seg.dtype == np.int16
    np.testing.assert_array_equal(stored.data[:], case.data)
    np.testing.assert_array_equal(stored.data[1, 2:5, 7:9, 20:], case.data[1, 2:5, 7:9, 20:])
    np.testing.assert_array_equal(stored.seg[:], case.seg)
    properties = stored.properties
    assert properties["shape_before_cropping"] == (12, 22, 32)
    assert list(properties["class_locations"]) == [1, (1, 2), 3]
    np.testing.assert_array_equal(properties["class_locations"][1, 2], case.properties["class_locations"][1, 2])


def test_only_what_nnunet_allows_lies_in_the_folder(tmp_path: Path) -> None:
    store = CaseStore(tmp_path)
    store.begin({"digest": "d"})
    store.write("a", some_case(), PATCH, digest="d")
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["a.b2nd", "a.pkl", "a_seg.b2nd"]
    assert not list((tmp_path / ".nnssl_adapt" / "unfinished").iterdir())


@pytest.mark.parametrize("victim", ["a.b2nd", "a_seg.b2nd", "a.pkl", ".nnssl_adapt/cases/a.json"])
def test_a_case_without_one_of_its_files_does_not_count(tmp_path: Path, victim: str) -> None:
    store = CaseStore(tmp_path)
    store.begin({"digest": "d"})
    for name in "ab":
        store.write(name, some_case(), PATCH, digest="d")
    (tmp_path / victim).unlink()
    assert store.identifiers == ["b"]
    assert not store.is_complete("a")


def test_a_shortened_file_does_not_count(tmp_path: Path) -> None:
    store = CaseStore(tmp_path)
    store.begin({"digest": "d"})
    store.write("a", some_case(), PATCH, digest="d")
    with open(tmp_path / "a.b2nd", "r+b") as stream:
        stream.truncate(500)
    assert store.identifiers == []
    with pytest.raises(CaseError, match=r"a\.b2nd is damaged"):
        store.open("a")


@pytest.mark.parametrize("survived", range(5))
def test_a_writer_killed_at_any_step_leaves_no_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, survived: int
) -> None:
    """The old case's removal, three renames and the record: whatever is done of them, the case is whole or absent."""

    class Killed(BaseException):
        pass

    store = CaseStore(tmp_path)
    store.begin({"digest": "new"})
    store.write("a", some_case(0), PATCH, digest="old")
    steps = 0

    def step() -> None:
        nonlocal steps
        if steps == survived:
            raise Killed
        steps += 1

    replace, remove, write_json = Path.replace, CaseStore.remove, store_module.write_json
    monkeypatch.setattr(Path, "replace", lambda self, target: (step(), replace(self, target))[1])
    monkeypatch.setattr(CaseStore, "remove", lambda self, identifier: (step(), remove(self, identifier))[1])
    monkeypatch.setattr(store_module, "write_json", lambda *arguments: (step(), write_json(*arguments))[1])
    with pytest.raises(Killed):
        store.write("a", some_case(1), PATCH, digest="new")
    monkeypatch.undo()
    assert store.identifiers == []
    if survived < 4:  # nnU-Net counts a case by its .b2nd, which must then not stand beside another case's files
        assert survived == 0 or not (tmp_path / "a.b2nd").exists()
    store.begin({"digest": "new"})
    store.write("a", some_case(1), PATCH, digest="new")
    assert store.identifiers == ["a"]
    np.testing.assert_array_equal(store.open("a").data[:], some_case(1).data)


def test_cases_of_other_settings_do_not_count(tmp_path: Path) -> None:
    store = CaseStore(tmp_path)
    store.begin({"digest": "old"})
    store.write("a", some_case(), PATCH, digest="old")
    store.begin({"digest": "new"})
    store.write("b", some_case(), PATCH, digest="new")
    assert store.identifiers == ["b"]
    assert store.is_complete("a", digest="old") and not store.is_complete("a", digest="new")
    with pytest.raises(DatasetNotFound, match=r"lacks 1 preprocessed case\(s\): a;"):
        store.require(["a", "b"])


def test_changed_sources_are_noticed(tmp_path: Path) -> None:
    source = tmp_path / "image.nii.gz"
    source.write_bytes(b"one")
    store = CaseStore(tmp_path / "store")
    store.begin({"digest": "d"})
    store.write("a", some_case(), PATCH, digest="d", sources=[describe_source(source)])
    assert store.is_complete("a", "d", [describe_source(source)])
    os.utime(source, ns=(1, 1))
    assert not store.is_complete("a", "d", [describe_source(source)])
    source.write_bytes(b"other")
    assert not store.is_complete("a", "d", [describe_source(source)])


def test_nnunets_own_folders_are_read(tmp_path: Path) -> None:
    case = some_case()
    for suffix, array in (("", case.data), ("_seg", case.seg)):
        blosc2.asarray(np.ascontiguousarray(array), urlpath=str(tmp_path / f"x{suffix}.b2nd"), mode="w")
    assert CaseStore(tmp_path).identifiers == []  # not whole yet
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(case.properties))
    store = CaseStore(tmp_path)
    assert store.identifiers == ["x"] and store.settings == {}
    np.testing.assert_array_equal(store.open("x").seg[:], case.seg)


def test_class_locations_shared_by_a_folder_are_read(tmp_path: Path) -> None:
    """The layout that nnU-Net after 2.8 documents: flat indices of all cases in one file."""
    case = some_case()
    full = case.properties.pop("class_locations")
    for name in ("w", "x"):
        for suffix, array in (("", case.data), ("_seg", case.seg)):
            blosc2.asarray(np.ascontiguousarray(array), urlpath=str(tmp_path / f"{name}{suffix}.b2nd"), mode="w")
        (tmp_path / f"{name}.pkl").write_bytes(pickle.dumps(case.properties))
    shape = (10, 20, 30)
    runs = {key: np.unique(np.ravel_multi_index(full[key].T[1:], shape)) for key in (1, (1, 2))}
    shared = tmp_path / "fg_sampling"
    shared.mkdir()
    first = np.arange(4)  # case "w" has a run of class 3
    locations = np.concatenate([first, runs[1], runs[1, 2]]).astype(np.uint64)
    blosc2.asarray(locations, urlpath=str(shared / "locations.b2nd"), mode="w")
    np.save(shared / "indptr.npy", np.array([0, 1, 3]))
    np.save(shared / "class_id.npy", np.array([2, 0, 1], np.uint16))
    np.save(shared / "count.npy", np.array([4, len(runs[1]), len(runs[1, 2])], np.uint32))
    np.save(shared / "base.npy", np.array([0, 4]))
    np.save(shared / "shape.npy", np.array([shape, shape]))
    meta = {"version": 1, "identifiers": ["w", "x"], "class_keys": [1, [1, 2], 3]}
    (shared / "meta.json").write_text(json.dumps(meta))
    found = CaseStore(tmp_path).open("x").properties["class_locations"]
    assert set(found) == {1, (1, 2), 3} and len(found[3]) == 0
    for key, flat in runs.items():
        assert found[key].shape[1] == 4 and not found[key][:, 0].any()
        np.testing.assert_array_equal(np.ravel_multi_index(found[key].T[1:], shape), flat)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("true",)


@pytest.mark.parametrize(
    "content, message",
    [
        (pickle.dumps({"x": Evil()}), r"(posix|nt)\.system"),
        (pickle.dumps({"x": print}), r"builtins\.print"),
        (pickle.dumps([1]), "expected a dict"),
        (b"", "can't be read"),
        (b"\x80\x04nonsense", "a.pkl"),
        (pickle.dumps({"x": np.arange(100)})[:60], "a.pkl"),
    ],
)
def test_properties_that_run_code_or_are_damaged_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.pkl").write_bytes(content)
    with pytest.raises(CaseError, match=message):
        load_properties(tmp_path / "a.pkl")


@pytest.mark.parametrize("protocol", range(2, 6))
def test_properties_of_any_protocol_are_read(tmp_path: Path, protocol: int) -> None:
    content = {
        "array": np.arange(6).reshape(2, 3),
        "fortran": np.asfortranarray(np.ones((2, 3), np.float32)),
        "scalar": np.float64(0.5),
        "ordered": OrderedDict(a=1),
        "nested": {(1, 2): [np.int64(3)], "set": {1, 2}},
    }
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    read = load_properties(tmp_path / "a.pkl")
    np.testing.assert_array_equal(read["array"], content["array"])
    np.testing.assert_array_equal(read["fortran"], content["fortran"])
    assert read["scalar"] == 0.5 and read["ordered"] == {"a": 1} and read["nested"] == content["nested"]


def test_numpy_1_pickles_name_another_module(tmp_path: Path) -> None:
    content = pickle.dumps({"a": np.arange(3)}, protocol=2).replace(b"numpy._core", b"numpy.core")
    (tmp_path / "a.pkl").write_bytes(content)
    np.testing.assert_array_equal(load_properties(tmp_path / "a.pkl")["a"], np.arange(3))


@pytest.mark.parametrize("name", ["a.b2nd", "a_seg.b2nd", "a.pkl"])
def test_a_flipped_bit_is_found_when_everything_is_read(tmp_path: Path, name: str) -> None:
    store = CaseStore(tmp_path)
    store.begin({"digest": "d"})
    store.write("a", some_case(), PATCH, digest="d")
    assert store.is_complete("a", "d", read_all=True)
    content = bytearray((tmp_path / name).read_bytes())
    content[len(content) // 2] ^= 4
    (tmp_path / name).write_bytes(content)
    assert store.is_complete("a", "d")  # as many bytes as ever
    assert not store.is_complete("a", "d", read_all=True)


def test_a_record_says_what_made_the_case(tmp_path: Path) -> None:
    store = CaseStore(tmp_path)
    store.begin({"digest": "d"})
    store.write("a", some_case(), PATCH, digest="d")
    record = json.loads((tmp_path / ".nnssl_adapt" / "cases" / "a.json").read_text())
    assert {"numpy", "scipy", "SimpleITK", "blosc2", "nnssl-adapt"} == set(record["made_with"])
    assert record["made_with"]["numpy"] == np.__version__


def test_a_full_disk_is_named_and_leaves_no_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(handle: int) -> None:
        raise OSError(28, "No space left on device")

    store = CaseStore(tmp_path)
    store.begin({"digest": "d"})
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OutputError, match="no space left"):
        store.write("a", some_case(), PATCH, digest="d")
    assert store.identifiers == [] and not (tmp_path / "a.b2nd").exists()


def test_missing_cases_and_cases_without_labels(tmp_path: Path) -> None:
    store = CaseStore(tmp_path / "none")
    assert store.identifiers == []
    with pytest.raises(CaseError, match=r"no whole case 'a' .*a\.b2nd"):
        store.open("a")
    case = some_case()
    with pytest.raises(ValueError, match="no labels"):
        store.write("a", PreprocessedCase(case.data, None, {}), PATCH)


def test_pieces_hold_one_channel_and_fit_their_limits() -> None:
    blocks, chunks = piece_shapes((3, 150, 200, 170), (96, 128, 112), 4)
    assert blocks[0] == chunks[0] == 1
    assert np.prod(blocks) * 4 <= 128 * 1024 and np.prod(chunks) * 4 <= 6 * 1024**2
    assert all(chunk <= 1.5 * patch for chunk, patch in zip(chunks[1:], (96, 128, 112), strict=True))
