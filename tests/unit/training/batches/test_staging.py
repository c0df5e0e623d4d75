"""Copies of cases on the machine's own disk: the same training, whatever becomes of them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.training_runs import assert_same_training, at, trainer_of

import nnssl_adapt
from nnssl_adapt.data.store import CaseStore
from nnssl_adapt.errors import CaseError
from nnssl_adapt.machine.copying import Stage, prefix_of_copies, remove_abandoned_copies
from nnssl_adapt.training.batches import staging
from nnssl_adapt.training.batches.staging import open_nearest, staged
from nnssl_adapt.training.launch.distributed import Ranks

CASES = ["case_00", "case_01", "case_02"]
PATIENCE = 60.0

HOLDING = """
import sys, time
from pathlib import Path
from nnssl_adapt.data.store import CaseStore
from nnssl_adapt.machine.copying import Stage
from nnssl_adapt.training.batches.staging import staged
from nnssl_adapt.training.launch.distributed import Ranks
with staged(CaseStore(sys.argv[1]), ["case_00", "case_01"], Stage(Path(sys.argv[2])), Ranks()):
    time.sleep(600)
"""


def eventually(condition):
    until = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def copies_in(folder):
    return sorted(path.name for path in folder.glob(f"{prefix_of_copies()}*/case_*"))


def files_of(*cases):
    return sorted(f"{case}{ending}" for case in cases for ending in (".b2nd", ".pkl", "_seg.b2nd"))


@pytest.fixture
def store(plan):
    return CaseStore(plan.store_folder)


@pytest.fixture
def disk(tmp_path):
    return tmp_path / "disk"


def test_cases_are_read_from_their_copies_once_they_are_there(store, disk):
    with staged(store, CASES, Stage(disk), Ranks()) as copies:
        eventually(lambda: copies_in(disk) == files_of(*CASES))
        near = open_nearest(store, CaseStore(copies.folder), "case_01")
        far = store.open("case_01")
        assert near.folder == copies.folder and near.folder.stat().st_mode & 0o777 == 0o700
        assert (near.data[:] == far.data[:]).all() and near.properties.keys() == far.properties.keys()
        (copies.folder / "case_01.pkl").unlink()  # somebody tidies up
        assert open_nearest(store, CaseStore(copies.folder), "case_01").folder == store.folder
        assert open_nearest(store, CaseStore(copies.folder), "case_03").folder == store.folder  # not asked for
    assert list(disk.iterdir()) == []


def test_a_training_is_the_same_and_removes_its_copies_also_when_it_fails(
    plan, recipe, tmp_path, monkeypatch, disk, caplog
):
    shared = trainer_of(plan, recipe, results_folder=tmp_path / "shared", stage="none").run()
    at(monkeypatch, lambda: eventually(lambda: len(copies_in(disk)) == 3 * len(CaseStore(plan.store_folder))), step=2)
    monkeypatch.setenv("A_DISK", str(disk))
    assert_same_training(trainer_of(plan, recipe, results_folder=tmp_path / "near", stage="$A_DISK").run(), shared)
    assert "are read from" in caplog.text and list(disk.iterdir()) == []

    def fail():
        raise RuntimeError("a step fails")

    at(monkeypatch, fail, step=2)
    with pytest.raises(RuntimeError, match="a step fails"):
        trainer_of(plan, recipe, results_folder=tmp_path / "failed", stage=str(disk)).run()
    assert list(disk.iterdir()) == []


def held_by_a_process(store, disk):
    environment = {**os.environ, "PYTHONPATH": str(Path(nnssl_adapt.__file__).parents[1])}
    process = subprocess.Popen([sys.executable, "-c", HOLDING, str(store.folder), str(disk)], env=environment)
    eventually(lambda: copies_in(disk) == files_of("case_00", "case_01"))
    return process


def test_copies_vanish_when_the_training_is_killed(store, disk):
    process = held_by_a_process(store, disk)
    remove_abandoned_copies(disk)
    assert copies_in(disk)  # still wanted
    process.kill()
    process.wait()
    eventually(lambda: not list(disk.iterdir()))


def test_what_a_killed_job_left_is_removed_by_the_next_one(store, disk):
    process = held_by_a_process(store, disk)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in (*children, process.pid):  # all at once, as schedulers do
        os.kill(int(pid), signal.SIGKILL)
    process.wait()
    assert copies_in(disk)
    with staged(store, ["case_02"], Stage(disk), Ranks()):
        eventually(lambda: copies_in(disk) == files_of("case_02"))
    assert list(disk.iterdir()) == []


@pytest.mark.parametrize("whole", [False, True])
def test_a_full_disk_is_said_once_and_the_shared_store_is_read(store, disk, whole, monkeypatch, caplog):
    disk.mkdir()
    monkeypatch.setattr(staging, "SPARE", 1 << 60)
    with staged(store, CASES, Stage(disk, whole=whole), Ranks()):
        eventually(lambda: ("no copies" if whole else "0 of 3 cases") in caplog.text)
    (said,) = [record for record in caplog.records if record.levelname == ("INFO" if whole else "WARNING")][-1:]
    assert str(disk) in said.getMessage() and list(disk.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_said_and_not_an_error(store, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with staged(store, CASES, Stage(tmp_path / "file" / "disk"), Ranks()):
        eventually(lambda: "no copies" in caplog.text)
    assert "all cases are read from" in caplog.text


def test_damage_in_the_store_is_found_while_copying(plan, store, disk):
    path = plan.store_folder / "case_01_seg.b2nd"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with staged(store, CASES, Stage(disk), Ranks()) as copies:
        eventually(lambda: copies.damaged)
        assert copies_in(disk) == files_of("case_00", "case_02")
        with pytest.raises(CaseError, match="case_01") as error:
            copies.refuse_damaged()
    assert error.value.path == plan.store_folder
