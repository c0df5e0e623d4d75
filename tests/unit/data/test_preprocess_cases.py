"""A dataset becomes a store: in parallel, in parts, interrupted at any moment, and never a wrong one."""

from __future__ import annotations

import importlib
import json
import logging
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from support.killing import forked, killed_while
from support.synthetic import make_dataset, write_image

import nnssl_adapt.data.preprocess_cases as cases_module
import nnssl_adapt.machine.workers as parallel_module
from nnssl_adapt.data.dataset import RawDataset
from nnssl_adapt.data.preprocess import PreprocessedCase, PreprocessSettings
from nnssl_adapt.data.preprocess_cases import Shard, memory_needed, preprocess_cases
from nnssl_adapt.data.store import CaseStore
from nnssl_adapt.errors import ConfigurationError, OutputError, PreprocessingError
from nnssl_adapt.machine.scratch import workplace
from nnssl_adapt.machine.workers import over_cases

SHAPE = (8, 12, 10)
SPACING = (2.0, 1.0, 1.3)


def settings(**changes: Any) -> PreprocessSettings:
    values: dict[str, Any] = {
        "spacing": None,
        "transpose_forward": (0, 1, 2),
        "transpose_backward": (0, 1, 2),
        "normalization_schemes": ("NoNormalization",),
        "use_mask_for_norm": (False,),
        "patch_size": (8, 8, 8),
    }
    return PreprocessSettings(**{**values, **changes})


@pytest.fixture
def dataset(tmp_path: Path) -> RawDataset:
    return RawDataset.open(make_dataset(tmp_path / "raw", cases=4, shape=SHAPE, spacing=SPACING))


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the cases that are really preprocessed (in this process)."""
    names: list[str] = []
    original = cases_module.preprocess_case

    def noting(case: Any, *rest: Any) -> PreprocessedCase:
        names.append(case.identifier)
        return original(case, *rest)

    monkeypatch.setattr(cases_module, "preprocess_case", noting)
    return names


ALL = ["case_00", "case_01", "case_02", "case_03"]


def test_worker_processes_make_the_same_store(tmp_path: Path, dataset: RawDataset) -> None:
    chosen = settings(spacing=(1.5, 1.1, 1.2))
    here = preprocess_cases(dataset, chosen, tmp_path / "here", workers=1)
    there = preprocess_cases(dataset, chosen, tmp_path / "there", workers=2)
    assert here.identifiers == there.identifiers == ALL
    assert preprocess_cases(dataset, chosen, tmp_path / "there", workers=2).identifiers == ALL  # nothing to do
    for name in ALL:
        np.testing.assert_array_equal(here.open(name).data[:], there.open(name).data[:])
        np.testing.assert_array_equal(here.open(name).seg[:], there.open(name).seg[:])
    assert here.settings == there.settings
    assert here.settings["settings"]["spacing"] == [1.5, 1.1, 1.2]
    assert here.settings["settings_digest"] == chosen.digest()


def test_a_second_run_does_only_what_is_missing_or_changed(
    tmp_path: Path, dataset: RawDataset, done: list[str]
) -> None:
    folder = tmp_path / "store"
    preprocess_cases(dataset, settings(), folder, workers=1)
    assert sorted(done) == ALL
    done.clear()
    preprocess_cases(dataset, settings(), folder, workers=1)
    assert done == []
    (folder / "case_01.pkl").unlink()
    with open(folder / "case_02_seg.b2nd", "ab") as stream:
        stream.write(b"x")
    os.utime(dataset.cases[3].label or "", ns=(5, 5))
    preprocess_cases(dataset, settings(patch_size=(4, 4, 4)), folder, workers=1)
    assert sorted(done) == ALL[1:]
    done.clear()
    preprocess_cases(dataset, settings(), folder, workers=1, overwrite=True)
    assert sorted(done) == ALL


def test_a_damaged_case_is_made_again_when_asked_to_check(
    tmp_path: Path, dataset: RawDataset, done: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    store = preprocess_cases(dataset, settings(), tmp_path / "store", workers=1)
    expected = store.open("case_02").data[:]
    content = bytearray((tmp_path / "store" / "case_02.b2nd").read_bytes())
    content[-200] ^= 1
    (tmp_path / "store" / "case_02.b2nd").write_bytes(content)
    done.clear()
    preprocess_cases(dataset, settings(), tmp_path / "store", workers=1)
    assert done == []
    with caplog.at_level(logging.WARNING):
        store = preprocess_cases(dataset, settings(), tmp_path / "store", workers=1, check=True)
    assert done == ["case_02"]
    assert "case case_02 is damaged: made again" in caplog.text
    np.testing.assert_array_equal(store.open("case_02").data[:], expected)


def test_other_settings_never_mix(
    tmp_path: Path, dataset: RawDataset, done: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "store"
    store = preprocess_cases(dataset, settings(), folder, workers=1)
    done.clear()

    class Killed(BaseException):
        pass

    write = CaseStore.write

    def dying(self: CaseStore, identifier: str, *rest: Any) -> None:
        if len(store.identifiers) == 2:
            raise Killed
        write(self, identifier, *rest)

    monkeypatch.setattr(CaseStore, "write", dying)
    with pytest.raises(Killed):
        preprocess_cases(dataset, settings(spacing=(2.0, 2.0, 2.0)), folder, workers=1)
    first = store.identifiers
    assert len(first) == 2
    monkeypatch.setattr(CaseStore, "write", write)
    done.clear()
    preprocess_cases(dataset, settings(spacing=(2.0, 2.0, 2.0)), folder, workers=1)
    assert sorted(done + first) == ALL
    assert store.identifiers == ALL


def test_other_regions_are_other_settings(tmp_path: Path, dataset: RawDataset, done: list[str]) -> None:
    """They change which class locations are remembered."""
    preprocess_cases(dataset, settings(), tmp_path / "store", workers=1)
    path = dataset.folder / "dataset.json"
    content = json.loads(path.read_text())
    content["labels"] = {"background": 0, "whole": [1, 2], "rim": 2}
    content["regions_class_order"] = [1, 2]
    path.write_text(json.dumps(content))
    done.clear()
    store = preprocess_cases(RawDataset.open(dataset.folder), settings(), tmp_path / "store", workers=1)
    assert sorted(done) == ALL
    assert list(store.open("case_00").properties["class_locations"]) == [(1, 2), 2]


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_cases_are_listed_and_the_others_done(tmp_path: Path, dataset: RawDataset, workers: int) -> None:
    images = dataset.folder / "imagesTr"
    (images / "case_01_0000.nii.gz").write_text("no image")
    broken = sitk.GetArrayFromImage(sitk.ReadImage(str(images / "case_03_0000.nii.gz"))).astype(np.float32)
    broken[3, 4, 5] = np.inf
    write_image(images / "case_03_0000.nii.gz", broken, SPACING)
    with pytest.raises(PreprocessingError) as caught:
        preprocess_cases(dataset, settings(), tmp_path / "store", workers=workers)
    message = str(caught.value)
    assert message.startswith("2 of 4 cases could not be preprocessed")
    assert "case_01_0000.nii.gz can't be read" in message and "case_03_0000.nii.gz: 0 voxels are NaN and 1" in message
    assert CaseStore(tmp_path / "store").identifiers == ["case_00", "case_02"]


def test_cases_that_left_the_dataset_leave_the_store(
    tmp_path: Path, dataset: RawDataset, caplog: pytest.LogCaptureFixture
) -> None:
    store = preprocess_cases(dataset, settings(), tmp_path / "store", workers=1)
    (dataset.folder / "imagesTr" / "case_03_0000.nii.gz").unlink()
    preprocess_cases(RawDataset.open(dataset.folder), settings(), tmp_path / "store", workers=1)
    assert store.identifiers == ALL[:3]
    assert not list((tmp_path / "store").glob("case_03*"))
    assert "case_03 is no longer in" in caplog.text


def test_an_unwritable_place(tmp_path: Path, dataset: RawDataset) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="a file stands where a folder is needed"):
        preprocess_cases(dataset, settings(), tmp_path / "file" / "store", workers=1)


# -- parts of a dataset ------------------------------------------------------------------------------------------------


def test_shards_fill_one_store_at_the_same_time(tmp_path: Path, dataset: RawDataset, done: list[str]) -> None:
    whole = preprocess_cases(dataset, settings(), tmp_path / "whole", workers=1)
    done.clear()
    store = CaseStore(tmp_path / "parts")
    with workplace(store.folder / ".nnssl_adapt" / "unfinished") as other:
        (other / "another.b2nd").write_text("another job is writing this")
        for number in (2, 3, 1):
            preprocess_cases(dataset, settings(), store.folder, workers=1, shard=Shard(number, 3))
        assert (other / "another.b2nd").exists()
    assert sorted(done) == ALL == store.identifiers
    for name in ALL:
        np.testing.assert_array_equal(store.open(name).data[:], whole.open(name).data[:])
    assert not list(other.parent.iterdir())


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_another_job_has_done_meanwhile_is_left_alone(
    tmp_path: Path, dataset: RawDataset, done: list[str], monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    """The jobs of an array start together and find the same store empty; one that trains already reads its files."""
    folder = tmp_path / "store"
    noting = cases_module.preprocess_case

    def overtaken(case: Any, *rest: Any) -> PreprocessedCase:
        monkeypatch.setattr(cases_module, "preprocess_case", noting)
        preprocess_cases(dataset, settings(), folder, workers=1)
        files.update({path: path.stat().st_ino for path in folder.glob("case_*")})
        return noting(case, *rest)

    files: dict[Path, int] = {}
    monkeypatch.setattr(cases_module, "preprocess_case", overtaken)
    assert preprocess_cases(dataset, settings(), folder, workers=1, overwrite=overwrite).identifiers == ALL
    assert len(files) == 3 * len(ALL)
    kept = [path for path, number in files.items() if path.stat().st_ino == number]
    assert len(done) == (2 * len(ALL) if overwrite else len(ALL) + 1)
    assert overwrite or len(kept) == len(files)


def test_jobs_that_start_together_all_succeed(tmp_path: Path, dataset: RawDataset) -> None:
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    store = tmp_path / "store"
    children = [forked(lambda: preprocess_cases(dataset, settings(), store, workers=1)) for _ in range(6)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * len(children)
    assert CaseStore(store).identifiers == ALL


@pytest.mark.parametrize(
    ("text", "problem"), [("0/3", "1/3 to 3/3"), ("4/3", "1/3 to 3/3"), ("2", "1/4"), ("a/b", "1/4")]
)
def test_impossible_shards(text: str, problem: str) -> None:
    with pytest.raises(ConfigurationError, match=problem):
        Shard.parse(text)


def test_every_case_is_in_exactly_one_shard() -> None:
    cases: Any = list(range(11))
    parts = [Shard.parse(f"{number}/4").part_of(cases) for number in range(1, 5)]
    assert sorted(case for part in parts for case in part) == cases and max(map(len, parts)) - min(map(len, parts)) == 1


def test_large_cases_come_first(tmp_path: Path, done: list[str]) -> None:
    root = make_dataset(tmp_path / "raw", cases=3, shape=SHAPE, spacing=SPACING)
    for kind in ("imagesTr/case_01_0000", "labelsTr/case_01"):
        write_image(root / f"{kind}.nii.gz", np.ones((16, 24, 20), np.uint8), SPACING)
    preprocess_cases(RawDataset.open(root), settings(), tmp_path / "store", workers=1)
    assert done[0] == "case_01" and sorted(done) == ALL[:3]


# -- memory ------------------------------------------------------------------------------------------------------------


def test_memory_is_foreseen_from_the_header(tmp_path: Path, dataset: RawDataset) -> None:
    """What the arrays of a case take: a case with four times the voxels needs four times as much."""
    case = dataset.cases[0]
    coarse = memory_needed(case, settings(spacing=(2.0, 1.0, 1.3)))
    fine = memory_needed(case, settings(spacing=(1.0, 0.5, 1.3)))
    assert coarse >= np.prod(SHAPE) * 4 * 2 and 3 * coarse < fine < 5 * coarse
    case.images[0].write_text("no image")
    assert memory_needed(case, settings()) == 0  # reading it will say what is wrong


def peak() -> int:
    """The most bytes that this process ever had in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def foreseen_and_taken(root: str) -> tuple[int, int]:
    dataset = RawDataset.open(Path(root))
    schemes = {"normalization_schemes": ("ZScoreNormalization",) * 4, "use_mask_for_norm": (False,) * 4}
    chosen = settings(spacing=(1.0, 1.0, 1.3), patch_size=(64, 96, 96), **schemes)
    importlib.import_module("blosc2")  # loaded when something is packed; libraries are not what is foreseen
    before = peak()
    preprocess_cases(dataset, chosen, Path(root) / "store", workers=1)
    return memory_needed(dataset.cases[0], chosen), peak() - before


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="Linux tells the peak")
def test_a_case_takes_no_more_memory_than_foreseen(tmp_path: Path) -> None:
    """In a process of its own. Of several channels writing takes the most: pixels of noise can't be compressed."""
    root = make_dataset(tmp_path / "raw", cases=1, channels=4, shape=(40, 140, 120), spacing=(2.0, 1.0, 1.3))
    random = np.random.default_rng(1)
    for path in (root / "imagesTr").iterdir():
        write_image(path, random.normal(100, 20, (40, 140, 120)).astype(np.float32), (2.0, 1.0, 1.3))
    here = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    script = f"import sys; sys.path[:0] = {here!r}; import {Path(__file__).stem} as test; "
    script += f"print(*test.foreseen_and_taken({str(root)!r}))"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    foreseen, taken = map(int, answer.stdout.split())
    assert 0.5 * foreseen < taken < 1.1 * foreseen + (24 << 20)  # libraries need a little of their own


def span(folder: str, number: int) -> None:
    """Note when it ran."""
    start = time.monotonic()
    time.sleep(0.3)
    Path(folder, str(number)).write_text(f"{start} {time.monotonic()}")


@pytest.mark.parametrize(("limit", "together"), [(10, 1), (25, 2)])
def test_no_more_cases_at_a_time_than_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, limit: int, together: int
) -> None:
    workers = 2
    monkeypatch.setattr(parallel_module, "_USABLE_SHARE", 1.0)
    monkeypatch.setattr(parallel_module, "available_memory", lambda: limit + workers * parallel_module._WORKER_BYTES)
    tasks = [(f"case {n}", (str(tmp_path), n)) for n in range(4)]
    needs = {f"case {n}": 12 for n in range(4)}
    with caplog.at_level(logging.WARNING):
        outcomes = list(over_cases(span, tasks, workers, memory=needs))
    assert [outcome.error for outcome in outcomes] == [None] * 4
    spans = sorted(tuple(map(float, path.read_text().split())) for path in tmp_path.iterdir())
    most = max(sum(start <= other[0] < end for other in spans) for start, end in spans)
    assert most == together
    assert ("may need" in caplog.text) == (limit < 12)


# -- kill -9 -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_thirty_random_moments_it_ends_as_if_undisturbed(tmp_path: Path) -> None:
    root = make_dataset(tmp_path / "raw", cases=6, shape=(16, 24, 20), spacing=SPACING)
    dataset = RawDataset.open(root)
    chosen = settings(spacing=(1.0, 0.9, 1.1))
    started = time.monotonic()
    reference = preprocess_cases(dataset, chosen, tmp_path / "reference", workers=1)
    duration = time.monotonic() - started
    moments = random.Random(7)
    store = CaseStore(tmp_path / "store")
    interrupted = 0
    while interrupted < 30:
        left = duration * (1 - len(store) / len(reference))
        if killed_while(lambda: preprocess_cases(dataset, chosen, store.folder, workers=1), moments.uniform(0, left)):
            interrupted += 1
        else:  # it was quicker than the first one
            duration *= 0.8
        for name in store.identifiers:  # what counts as whole is whole
            np.testing.assert_array_equal(store.open(name).data[:], reference.open(name).data[:])
        if len(store) == len(reference):
            for name in moments.sample(store.identifiers, 4):
                store.remove(name)
    preprocess_cases(dataset, chosen, store.folder, workers=1)
    assert store.identifiers == reference.identifiers
    here, there = ({p.name: p.read_bytes() for p in s.folder.iterdir() if p.is_file()} for s in (store, reference))
    assert here == there
